# GPT-2 (124M) from scratch on OpenWebText, half a million tokens per step.
#
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# A dataset made by nanoGPT's data/openwebtext/prepare.py works too: give its folder as --dataset=PATH.
#
# Large micro-batches keep a GPU busy; if they do not fit, halve batch_size and double gradient_accumulation_steps.
#
# hardware: 8 GPUs, how much memory is not yet measured | time: not yet measured | result: not yet measured

out_dir = 'out-gpt2'
dataset = 'openwebtext'
wandb_run_name = 'gpt2-124M'

eval_interval = 1000
eval_iters = 200
log_interval = 10

batch_size = 30
block_size = 1024
gradient_accumulation_steps = 2 * 8   # 30 x 1024 x 16 = 491,520 tokens per step, on any number of GPUs that divides 16

max_iters = 600000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 1e-1
