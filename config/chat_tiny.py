# A small chat model from scratch, in English and Chinese: arithmetic, lookups in a table, dates, units, SQL, small
# talk. `make chat` does the first three.
#
#   python data/chat/prepare.py
#   python train.py config/chat_tiny.py
#   python chat.py --out_dir=out-chat-tiny --temperature=0 --max_new_tokens=60
#   python eval.py --out_dir=out-chat-tiny --questions=data/chat/questions.jsonl
#
# hardware: 2 CPU cores, AVX2 | time: 10 minutes, by max_minutes | result: after 3,266 steps 96 % of held-out questions
# of arithmetic and 88 % of lookups are answered right, docs/chat.md says more | 2026-11-27

out_dir = 'out-chat-tiny'
dataset = 'chat'

eval_interval = 500
eval_iters = 10
log_interval = 50

arch = 'qwen3'       # with one matrix for embedding and head, copying out of a table is learned sooner
n_layer = 4
n_head = 4
n_embd = 128
block_size = 192      # the longest of the conversations
batch_size = 8        # small: that takes many steps, whatever their size
gradient_accumulation_steps = 1

optimizer = 'muon'
max_iters = 5000
max_minutes = 10
learning_rate = 4e-3
schedule = 'linear'
warmup_iters = 50
min_lr = 2.5e-4
