# Short answers, for the small chat model of config/chat_tiny.py: the result alone instead of a sentence or the working.
#
#   python data/preferences/prepare.py
#   python dpo.py config/dpo_tiny.py
#   python chat.py --out_dir=out-dpo-tiny --temperature=0
#   python eval.py --out_dir=out-dpo-tiny --questions=data/chat/questions.jsonl
#
# hardware: 2 cores | time: not yet measured | result: not yet measured

out_dir = 'out-dpo-tiny'
init_from = 'out-chat-tiny'
pairs = 'data/preferences/pairs.jsonl'
val_pairs = 'data/preferences/held_out.jsonl'

block_size = 128
batch_size = 16
max_iters = 150
eval_interval = 25
eval_pairs = 200
log_interval = 5

loss = 'dpo'
beta = 0.1
learning_rate = 3e-4
warmup_iters = 10
