# About 10M parameters on your own text, in any language, with a BPE tokenizer of 5,000 tokens trained on it.
#
#   python data/text/prepare.py --input=PATHS --name=my_text --tokenizer=bpe:5000
#   python train.py config/train_bpe_10m.py
#   python sample.py --out_dir=out-bpe-10m
#
# The last line of training has the perplexity per token, per byte and per character. Only the last two can be compared
# between tokenizers.
#
# hardware: 2 cores, AVX512-BF16 | time: about 90 minutes | result: val loss 4.106 per token on 13 MB
# of documentation in Chinese and English, a perplexity of 2.63 per byte | 2026-11-21; on a GPU not yet measured

out_dir = 'out-bpe-10m'
dataset = 'my_text'

eval_interval = 250
eval_iters = 20
log_interval = 10

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.1
batch_size = 32
gradient_accumulation_steps = 1

max_iters = 2000
learning_rate = 3e-4
schedule = 'cosine'
warmup_iters = 100
lr_decay_iters = max_iters
min_lr = 3e-5
