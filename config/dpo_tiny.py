# A preference for the small chat model of config/chat_tiny.py: answers end by asking whether there is anything else.
#
#   python data/preferences/prepare.py
#   python dpo.py config/dpo_tiny.py
#   python chat.py --out_dir=out-dpo-tiny --temperature=0
#   python eval.py --out_dir=out-dpo-tiny --check=arithmetic --questions=data/preferences/held_out.jsonl
#
# hardware: one CPU core, AVX512, float32 | time: 41 s | result: polite answers to held-out questions from 0 to 99 %,
# right ones in arithmetic 95 % before and after, docs/alignment.md has the cost | 2026-11-27

out_dir = 'out-dpo-tiny'
init_from = 'out-chat-tiny'
pairs = 'data/preferences/pairs.jsonl'
val_pairs = 'data/preferences/held_out.jsonl'

block_size = 128
batch_size = 16
max_iters = 120
eval_interval = 20
eval_pairs = 200
log_interval = 5

loss = 'dpo'
beta = 0.1
nll_weight = 1.0      # without it the answers fall apart, see docs/alignment.md
learning_rate = 1e-3
warmup_iters = 10
