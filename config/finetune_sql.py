# Text-to-SQL: a small model that learns only the answers to questions in English.
#
#   python data/sql/prepare.py
#   python train.py config/finetune_sql.py
#   python sample.py --out_dir=out-sql --prompts=data/sql/val_questions.jsonl --temperature=0 --stop='["\n"]'
#
# hardware: 1 core, AVX512-BF16 | time: 192 s | result: val loss 0.100, 195 of 200 new questions right | 2026-11-21
#
# To finetune GPT-2, which has another shape, prepare with --tokenizer=gpt2, and train without this file, with
# --dataset=sql --init_from=gpt2 --block_size=256 and the learning rate of config/finetune_shakespeare.py.

out_dir = 'out-sql'
dataset = 'sql'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 160          # a question and its answer
arch = 'speedrun'

batch_size = 16
gradient_accumulation_steps = 1
eval_interval = 300
eval_iters = 20
log_interval = 20

optimizer = 'muon'
max_iters = 1500
learning_rate = 3e-3
warmup_iters = 20
schedule = 'linear'
min_lr = 0.0
