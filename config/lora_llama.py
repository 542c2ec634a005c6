# LoRA adapters for a Llama-like model, here SmolLM2 (135M), on a text of your own: a place to start, not tuned.
#
#     hf download HuggingFaceTB/SmolLM2-135M --local-dir smollm2
#     python data/text/prepare.py --input=book.txt --name=book_smollm2 --tokenizer=smollm2/tokenizer.json
#     python train.py config/lora_llama.py
#     python sample.py --out_dir=out-lora-llama --start="Chapter 1" --num_samples=1
#
# For Qwen3, Llama or another model of these types, give its name or folder: --init_from=Qwen/Qwen3-0.6B. The data must
# be prepared with the tokenizer of the model. To train all weights: --lora_rank=0 --learning_rate=3e-5 --min_lr=3e-6.
#
# hardware: 2 CPU cores, or any GPU | time: not yet measured | result: with --block_size=128 --max_iters=40
# --gradient_accumulation_steps=1 --warmup_iters=4 --eval_iters=4 --dtype=float32, SmolLM2-135M-Instruct on 0.4 MB of
# tiny Shakespeare: val loss from 4.38 to 4.03 | 2026-11-26

out_dir = 'out-lora-llama'
init_from = 'smollm2'
dataset = 'book_smollm2'

block_size = 512                   # length of a row; the model keeps its longer context
batch_size = 4
gradient_accumulation_steps = 4    # 4 x 4 x 512 = 8,192 tokens per step
max_iters = 200
eval_interval = 50
eval_iters = 10
log_interval = 10

lora_rank = 8
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 10
