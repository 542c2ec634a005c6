# A small GPT that writes Python, on a dataset that needs no download. `make` trains it.
#
#   python data/python_char/prepare.py
#   python train.py config/train_python_char.py
#   python sample.py --out_dir=out-python-char --start="def "
#
# hardware: 2 CPU cores | time: at most 1.8 minutes | result: see "The recipe of make" in docs/results.md

out_dir = 'out-python-char'
dataset = 'python_char'

eval_interval = 400
eval_iters = 20
log_interval = 50

arch = 'speedrun'
n_layer = 4
n_embd = 128
n_head = 4
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

optimizer = 'muon'
max_iters = 1200
max_minutes = 1.8      # fewer steps on CPUs where 1,200 take longer
learning_rate = 5e-3   # high, because the model is small and the run is short
min_lr = 0.0
warmup_iters = 10
schedule = 'linear'
