# SQL by trial and reward, for a small chat model whose supervised training ended early. The reward is 1 if a query
# gives the same rows as the right one on a small database in memory, which it can only read, else 0.
#
#   python data/chat/prepare.py
#   python train.py config/chat_tiny.py --max_iters=1300 --out_dir=out-chat-short
#   python grpo.py config/grpo_sql.py
#   python eval.py --out_dir=out-grpo-sql --check=sql
#
# hardware: one core | time: 81 steps in 2 minutes | result: none: the model knows nearly all queries that it is asked
# (reward 0.98 at the start); of the held-out ones 48 % are right before and after | 2026-11-27

out_dir = 'out-grpo-sql'
init_from = 'out-chat-short'
reward = 'sql'

eval_interval = 25
num_val = 200

batch_size = 32
group_size = 8
block_size = 128
max_new_tokens = 48

max_iters = 300
max_minutes = 6
learning_rate = 3e-4
schedule = 'linear'
warmup_iters = 5
min_lr = 3e-5
