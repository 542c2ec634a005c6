# Arithmetic by trial and reward, for a small chat model whose supervised training ended early: it shows its working,
# but many results are wrong. The reward is 1 if the last number of an answer is right, else 0.
#
#   python data/chat/prepare.py
#   python train.py config/chat_tiny.py --max_iters=1300 --out_dir=out-chat-short
#   python grpo.py config/grpo_arithmetic.py
#   python eval.py --out_dir=out-grpo-arithmetic --check=arithmetic
#
# hardware: 2 cores, AVX2 | time: 13 minutes, by max_minutes | result: right greedy answers to 500 held-out questions
# from 47 to 85 % | 2026-11-27

out_dir = 'out-grpo-arithmetic'
init_from = 'out-chat-short'
reward = 'arithmetic'

eval_interval = 25
num_val = 200

batch_size = 32
group_size = 8
block_size = 128
max_new_tokens = 40

max_iters = 1000
max_minutes = 14
learning_rate = 7e-4
schedule = 'linear'
warmup_iters = 30   # the first steps, of which Adam knows little, cost accuracy
min_lr = 3e-5
beta2 = 0.99        # rewards are noisy
