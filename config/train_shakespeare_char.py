# A GPT of 10.6M parameters on tiny Shakespeare, with a character tokenizer.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
#   python sample.py --out_dir=out-shakespeare-char
#
# hardware: one GPU | time: 10 to 13 ms per step on an H100 | result: not yet measured; nanoGPT reports a val loss of
# 1.4697 | 2026-11-27

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

eval_interval = 250   # often, because the model overfits; best.pt holds the best weights
eval_iters = 200
log_interval = 10

n_layer = 6
n_embd = 384
n_head = 6
dropout = 0.2
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1

max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99   # higher than usual, because a step has few tokens
