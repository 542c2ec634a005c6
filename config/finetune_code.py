# Finetune a model of Python on your own code.
#
#   make
#   python data/my_code/prepare.py --input=~/project --tokenizer=out-python-char
#   python train.py config/finetune_code.py
#   python sample.py --out_dir=out-my-code --start=FILE:half_a_function.py --num_samples=3 --temperature=0.4
#
# hardware: 1 core, AVX512-BF16 | time: 2 minutes | result: val loss 1.511 on numpy's code, from 1.994 | 2026-11-21
#
# The base is the model that make trains. For GPT-2, prepare with --tokenizer=gpt2 and give --init_from=gpt2. For no
# base, put config/train_python_char.py before this file and give --init_from=scratch.

out_dir = 'out-my-code'
init_from = 'out-python-char'
dataset = 'my_code'

batch_size = 16
gradient_accumulation_steps = 1
eval_interval = 100
eval_iters = 40
log_interval = 20

max_iters = 400
learning_rate = 1.4e-3
warmup_iters = 20
min_lr = 1e-4
