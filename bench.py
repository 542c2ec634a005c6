"""
How fast a training step runs here: milliseconds, tokens per second, the share of the device's peak, memory.

    python bench.py                                            GPT-2 (124M) on random ids, no dataset needed
    python bench.py config/train_shakespeare_char_cpu.py       the model and batch of a recipe
    python bench.py --profile=True                             and a trace in ./bench_log for TensorBoard or Perfetto

Prints a table, and as the last line of stdout one JSON object. The first steps warm up and are not counted.
"""

import json
import statistics
import sys
import time

import torch

import optim
import runtime
from configurator import UsageError, configure
from dataset import Dataset
from model import GPT, GPTConfig, switches

# ---------------------------------------------------------------------------------------------------------------------
dataset: str | None = None         # take token ids from this dataset, None: random ones
batch_size: int | None = None      # rows per step, None: 12 on a GPU, 1 on a CPU
block_size = 1024                  # tokens per row: the context
vocab_size = 50304                 # of the random ids; a dataset has its own
arch = 'gpt2'                      # a set of switches in model.py: 'gpt2', 'llama', 'qwen3', 'speedrun'
pos: str | None = None             # 'learned', 'rope', 'alibi'; None: that of arch
window: int | None = None          # how many tokens back attention reaches, None: all
layer_scale: float | None = None   # initial gain of what a block adds, None: no gains
n_layer = 12                       # the size: that of GPT-2 (124M)
n_embd = 768
n_head = 12
bias = False
dropout = 0.0
attention = 'auto'                 # 'sdpa' (torch's fused kernels), 'math' (written out), 'auto' (the faster one)
loss_chunks = 1                    # more: logits in so many pieces, which saves their memory, not their time
optimizer = 'adamw'                # 'adamw', 'muon'
warmup_steps = 2                   # not counted; compilation falls into the first
steps = 8                          # counted, each on its own; the median is reported
profile = False                    # trace three more steps and print the ten costliest operators
seed = 1337
device = 'auto'                    # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is there)
dtype = 'auto'                     # 'float32', 'bfloat16', 'float16' (with loss scaling), 'auto' (bfloat16 if native)
compile: str | bool = 'auto'       # torch.compile: True, False, 'auto' (where it pays for itself)
peak_flops: float | None = None    # FLOP/s of the device at most; None: from a table, or measured
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

rt = runtime.setup(device, dtype, compile, seed)
rows = batch_size or (1 if rt.device.type == 'cpu' else 12)
for name, value in (('batch_size', rows), ('block_size', block_size), ('steps', steps), ('vocab_size', vocab_size)):
    if value < 1:
        raise UsageError(f'{name}={value}: expected 1 or more')
if optimizer not in optim.OPTIMIZERS:
    raise UsageError(f'optimizer={optimizer!r}: expected one of {", ".join(map(repr, optim.OPTIMIZERS))}')
if warmup_steps < 0:
    raise UsageError(f'warmup_steps={warmup_steps}: expected 0 or more')
print(rt.describe(), file=sys.stderr)

# data: the same shapes as in training; one batch is as good as another

if dataset is None:
    tokens = torch.randint(vocab_size, (rows, block_size + 1), device=rt.device)
    x, y = tokens[:, :-1], tokens[:, 1:]
else:
    data = Dataset(dataset)
    vocab_size = data.vocab_size
    data.check(block_size, vocab_size)
    x, y = (both[0] for both in data.train_batch(0, seed, 1, rows, block_size, rt.device))   # (B, T) each

# model and step, as train.py has them

try:
    shape = GPTConfig(vocab_size, block_size, n_layer, n_embd, n_head, bias, dropout, attention=attention,
                      loss_chunks=loss_chunks, **switches(arch, pos=pos, window=window, layer_scale=layer_scale))
except ValueError as error:
    raise UsageError(error) from None
model = GPT(shape).to(rt.device)
if rt.compile:
    model.compile()
opt = optim.build(optimizer, model, 1e-4, (0.9, 0.95), 0.1, rt.dtype)
scaler = rt.grad_scaler()


def train_step():
    with rt.autocast():
        _, loss = model(x, y)
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    return loss


# measure

times = []
for _ in range(warmup_steps + steps):
    rt.sync()
    t0 = time.perf_counter()
    loss = train_step()
    rt.sync()
    times.append(time.perf_counter() - t0)
dt = statistics.median(times[warmup_steps:])
peak = peak_flops or rt.peak_flops()
memory = rt.peak_memory()
result = {
    'ms_per_step': dt * 1000, 'ms_min': min(times[warmup_steps:]) * 1000, 'ms_max': max(times[warmup_steps:]) * 1000,
    'tok_per_s': rows * block_size / dt,
    'mfu': model.flops_per_token() * rows * block_size / dt / peak if peak else None, 'peak_flops': peak,
    'peak_memory_bytes': memory, 'first_step_s': times[0], 'loss': loss.item(),
    'parameters': model.get_num_params(non_embedding=False), 'batch_size': rows, 'block_size': block_size,
    'machine': rt.describe(),
}

if profile:
    on_done = torch.profiler.tensorboard_trace_handler('bench_log')
    with torch.profiler.profile(on_trace_ready=on_done) as trace:   # of all that torch can trace here
        for _ in range(3):
            train_step()
        rt.sync()
    by = 'self_cpu_time_total' if rt.device.type == 'cpu' else 'self_device_time_total'
    print(trace.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=40))
    print('trace in ./bench_log: tensorboard --logdir=bench_log, or open the file in ui.perfetto.dev', file=sys.stderr)

for label, text in (
    ('model', f'{result["parameters"]:,} parameters, batch {rows} x {block_size}'),
    ('step', f'{dt * 1000:,.2f} ms, median of {steps} ({result["ms_min"]:,.2f} to {result["ms_max"]:,.2f})'),
    ('speed', f'{result["tok_per_s"]:,.0f} tok/s'),
    ('mfu', f'{result["mfu"]:.1%} of {peak / 1e12:,.2f} TFLOP/s' if peak else '- (unknown device, give --peak_flops)'),
    ('first step', f'{result["first_step_s"]:,.1f} s'),
    ('peak memory', f'{memory / 2**30:,.2f} GiB' if memory else '-'),
):
    print(f'{label:<12} {text}')
print(json.dumps(result))
