# A small GPT that writes Python, from the dataset that needs no download. This is what `make` trains.
#
#   python data/python_char/prepare.py
#   python train.py config/train_python_char.py
#   python sample.py --out_dir=out-python-char --start="def "
#
# hardware: 2 cores, AVX512-BF16 | time: 66 s | result: val loss 1.422 | 2026-11-20

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
max_minutes = 1.6      # fewer steps where 1,200 take longer, as on 2 cores without bfloat16
learning_rate = 5e-3   # high, for a small model and a short run that ends at zero
min_lr = 0.0
warmup_iters = 10
schedule = 'linear'
