# Tiny Shakespeare in a few seconds on a CPU: the loss of train_shakespeare_char_cpu.py, with the same data, context and
# number of tokens, a seventh of the parameters, a newer architecture, and Muon.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu_fast.py
#
# hardware: 2 cores, AVX512-BF16 | time: 7 s | result: val loss 1.841 (over all of val.bin) | 2026-11-20

out_dir = 'out-shakespeare-char-cpu-fast'
dataset = 'shakespeare_char'
eval_interval = 340   # at the start and at the end
eval_iters = 20
log_interval = 50

arch = 'speedrun'
batch_size = 24
gradient_accumulation_steps = 1
block_size = 64
n_layer = 2
n_head = 4
n_embd = 64

optimizer = 'muon'
learning_rate = 8e-3
max_iters = 340
warmup_iters = 10
schedule = 'linear'
min_lr = 0.0
weight_decay = 0.1
