# A GPT from scratch on your own text, of the size that this machine can train best in the minutes that you have.
#
#   python data/text/prepare.py --input=PATHS --name=my_text --tokenizer=char
#   python train.py config/train_my_text.py --max_minutes=10
#   python sample.py --out_dir=out-my-text
#
# Any other dataset: --dataset=NAME --out_dir=out-NAME. The first seconds time a step of some sizes on this machine. The
# size is the one that has the lowest loss after max_minutes, by the law that is fitted in scaling_laws.ipynb; one line
# says which and why. A run that is resumed keeps it.
#
# hardware: any | time: max_minutes | result: see "The size for some minutes" in docs/training.md

out_dir = 'out-my-text'
dataset = 'my_text'

eval_interval = 500
eval_iters = 20
log_interval = 50

size = 'auto'
arch = 'speedrun'
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1

optimizer = 'muon'
max_minutes = 10.0
min_lr = 0.0
warmup_iters = 20
schedule = 'linear'
