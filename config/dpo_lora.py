# Adapters that learn a preference, for an instruct model, here SmolLM2 (135M): a place to start, not tuned. Each line
# of pairs.jsonl is {"prompt": ..., "chosen": ..., "rejected": ...}.
#
#   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir smollm2-instruct
#   python dpo.py config/dpo_lora.py --pairs=pairs.jsonl
#   python chat.py --out_dir=out-dpo-lora
#   python export.py --out_dir=out-dpo-lora --to=my-model
#
# hardware: 2 CPU cores, AVX512-BF16, float32 | time: 2.0 s per step of 4 pairs, 680 tokens
# result: tried for 4 steps on made-up pairs that are easy to rank, loss 0.693 to 0.450 | 2026-11-26

out_dir = 'out-dpo-lora'
init_from = 'smollm2-instruct'

block_size = 512
batch_size = 4
max_iters = 60
eval_interval = 20
eval_pairs = 40
log_interval = 5

lora_rank = 8
beta = 0.1
learning_rate = 1e-4
warmup_iters = 5
