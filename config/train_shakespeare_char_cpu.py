# A GPT for a laptop on tiny Shakespeare, with a character tokenizer: the small model of nanoGPT's README.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu.py
#   python sample.py --out_dir=out-shakespeare-char-cpu
#
# hardware: 2 cores, AVX512-BF16 | time: 38 s | result: val loss 1.872 to 1.886 over three seeds, with --gelu=tanh
# | 2026-11-20

out_dir = 'out-shakespeare-char-cpu'
dataset = 'shakespeare_char'

eval_interval = 250
eval_iters = 20
log_interval = 50

n_layer = 4
n_embd = 128
n_head = 4
dropout = 0.0
gelu = 'erf'   # nanoGPT's; on a CPU a step takes an eighth less time than with GPT-2's tanh
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1

max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99   # higher than usual, because a step has few tokens
