"""
Text from a model: continue a prompt, several times over.

    python sample.py --out_dir=out-python-char
    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3 --temperature=0.6
    python sample.py --init_from=some/ckpt.pt --start=FILE:prompt.txt > samples.txt

The samples, a line of dashes after each, go to stdout; all else goes to stderr. The same seed gives the same samples.
"""

import sys
import time

import torch
from tqdm import tqdm

import checkpoint
import runtime
import tokenizer
from configurator import UsageError, UserError, configure

# ---------------------------------------------------------------------------------------------------------------------
out_dir = 'out'                     # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                # 'resume' (the model in out_dir), or the path of a checkpoint or a folder
tokenizer_of: str | None = None     # for a checkpoint of nanoGPT, which has none: the dataset it was trained on
start = '\n'                        # the prompt, may be empty; FILE:prompt.txt reads it from a file
num_samples = 10                    # drawn together, each from a random stream of its own
max_new_tokens = 500                # per sample
temperature = 0.8                   # lower is safer, higher is wilder, 0 always takes the likeliest token
top_k: int | None = 200             # draw among so many likeliest tokens, None among all
seed = 1337
device = 'auto'                     # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is there)
dtype = 'auto'                      # 'float32', 'bfloat16', 'float16', 'auto' (bfloat16 if native)
compile: str | bool = False         # torch.compile: True, False, 'auto' (where it works and is a GPU)
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

if num_samples < 1 or max_new_tokens < 0:
    raise UsageError(f'num_samples={num_samples}, max_new_tokens={max_new_tokens}: expected at least 1 and at least 0')
if not temperature >= 0 or top_k is not None and top_k < 1:
    raise UsageError(f'temperature={temperature}, top_k={top_k}: expected at least 0.0, and at least 1 or None')

# model and prompt

path = checkpoint.resolve(out_dir if init_from == 'resume' else init_from)
model, tok, ckpt = checkpoint.load_model(path, tokenizer_of)
text = tokenizer.read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start
ids = tok.encode(text, special=True) if text else tok.beginning()
rt = runtime.setup(device, dtype, compile, seed)
print(f'{path}, step {ckpt["iter_num"]:,}, val loss {ckpt["best_val_loss"]:.4f}; {rt.describe()}', file=sys.stderr)
model.to(rt.device, rt.dtype)
if rt.compile:
    model.compile()

# continue the prompt, all samples at once

prompt = torch.from_numpy(ids.astype('int64')).to(rt.device).expand(num_samples, -1)     # (B, T)
stream = model.generate(prompt, max_new_tokens, temperature, top_k, seed, tok.vocab_size)
t0 = time.perf_counter()
try:
    tokens = [token.cpu() for token in tqdm(stream, total=max_new_tokens, unit='tok', leave=False, disable=None)]
except ValueError as error:
    raise UserError(f'{path}: {error}') from None
dt = time.perf_counter() - t0

samples = torch.stack(tokens, dim=1) if tokens else torch.empty(num_samples, 0)           # (B, max_new_tokens)
for sample in samples.tolist():
    print(text + tok.decode(sample))
    print('-' * 15, flush=True)
print(f'{samples.numel():,} tokens in {dt:.1f} s, {samples.numel() / dt:,.0f} tok/s', file=sys.stderr)
