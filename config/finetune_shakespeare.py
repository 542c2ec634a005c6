# Finetune GPT-2 (1558M) on tiny Shakespeare, in twenty steps.
#
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py
#   python sample.py --out_dir=out-shakespeare
#
# hardware: one GPU of 40 GB; smaller with --init_from=gpt2 | time: not yet measured | result: not yet measured

out_dir = 'out-shakespeare'
init_from = 'gpt2-xl'
dataset = 'shakespeare'

eval_interval = 5
eval_iters = 40

batch_size = 1
gradient_accumulation_steps = 32   # 32 x 1024 = 32,768 tokens per step; one epoch is about nine steps

max_iters = 20
learning_rate = 3e-5
schedule = 'constant'
warmup_iters = 0
