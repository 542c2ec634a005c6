# LoRA adapters for an instruct model, here SmolLM2 (135M), on conversations of your own: a place to start, not tuned.
#
#   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir smollm2-instruct
#   python data/chat/prepare.py --input=talks.jsonl --name=talks --tokenizer=smollm2-instruct
#   python train.py config/chat_lora.py
#   python chat.py --out_dir=out-chat-lora
#   python export.py --out_dir=out-chat-lora --to=my-model
#
# hardware: 2 CPU cores, or any GPU | time: not yet measured | result: with --block_size=64 --batch_size=2
# --max_iters=24 --learning_rate=2e-3 --dtype=float32, 30 conversations about one fact: val loss from 3.34 to 0.14, and
# the model states the fact, also when it is asked in other words | 2026-11-26

out_dir = 'out-chat-lora'
init_from = 'smollm2-instruct'
dataset = 'talks'

block_size = 512                   # length of a row; the model keeps its longer context
batch_size = 4
gradient_accumulation_steps = 1
max_iters = 60
eval_interval = 20
eval_iters = 4
log_interval = 10

lora_rank = 8
learning_rate = 5e-4
schedule = 'linear'
min_lr = 5e-5
warmup_iters = 5
