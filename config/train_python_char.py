# A small GPT that writes Python, from the dataset that needs no download. This is what `make` trains.
#
#   python data/python_char/prepare.py
#   python train.py config/train_python_char.py
#   python sample.py --out_dir=out-python-char --start="def "
#
# hardware: 2 CPU cores with bfloat16 | time: 79 s | result: val loss 1.623 | 2026-11-20

out_dir = 'out-python-char'
dataset = 'python_char'

eval_interval = 500
eval_iters = 20
log_interval = 100

n_layer = 4
n_embd = 128
n_head = 4
block_size = 128
batch_size = 8
gradient_accumulation_steps = 1

max_iters = 3500
learning_rate = 4e-3   # high, for a small model and a short run that ends at zero
min_lr = 0.0
warmup_iters = 100
schedule = 'linear'
beta2 = 0.99   # higher than usual, since a step sees few tokens
