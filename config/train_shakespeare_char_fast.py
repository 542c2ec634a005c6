# A GPT of 10.7M parameters on tiny Shakespeare: the size, context and data of train_shakespeare_char.py, with a newer
# architecture, Muon and half the batch; it reaches a lower loss in a fifth of the steps.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_fast.py
#   python sample.py --out_dir=out-shakespeare-char-fast --start="ROMEO:"
#
# hardware: 2 cores, AVX512-BF16 | time: 24 minutes | result: val loss 1.459 (over all of val.bin) | 2026-11-20
# hardware: H100 | time: 26 s | result: val loss 1.449 | 2026-11-27

out_dir = 'out-shakespeare-char-fast'
dataset = 'shakespeare_char'

eval_interval = 100
eval_iters = 14   # of 32 rows: all of val.bin
log_interval = 10

arch = 'speedrun'
n_layer = 6
n_embd = 384
n_head = 6
dropout = 0.1
block_size = 256
batch_size = 32
gradient_accumulation_steps = 1

optimizer = 'muon'
max_iters = 1000
learning_rate = 4e-3
schedule = 'linear'
min_lr = 0.0
warmup_iters = 20
