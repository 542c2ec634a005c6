"""
How fast this machine trains, decodes, reads data and attends, and how far that is from what it could do.

    python bench.py                                             GPT-2 (124M) on random ids, no dataset needed
    python bench.py config/train_shakespeare_char_cpu.py        the model, the batch and the data of a recipe
    python bench.py --versus="attention=math loss_chunks=8"     beside the same with other options, step by step in turn
    python bench.py --mode=decode --batch_size=10               one token after another
    python bench.py --mode=attention --block_size=256           the ways to compute it beside each other
    python bench.py --mode=data --dataset=shakespeare_char      drawing batches, and nothing else
    python bench.py --profile=True                              and a trace in ./bench_log for TensorBoard or Perfetto

Prints a table, and as the last line of stdout one JSON object. The first steps warm up and are not counted. The limit
is what matrix products, or reading from memory, would take at the rates that this machine shows just after.
"""

import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from configurator import configure
from flatgpt import checkpoint, lora, optim, runtime
from flatgpt.dataset import Dataset
from flatgpt.engine import cache_bytes, generate
from flatgpt.errors import UsageError
from flatgpt.quantize import int8, pack
from model import GPT, GPTConfig, arch_fields, attend, make_attn_mask

# ---------------------------------------------------------------------------------------------------------------------
mode = 'train'                     # 'train' (a step), 'decode' (a token), 'data' (a batch), 'attention' (one layer's)
versus: str | None = None          # other options to measure in turn with these, such as 'attention=math compile=False'
warmup_steps = 2                   # not counted; compilation falls into the first
steps = 8                          # counted, each on its own; the median is reported
profile = False                    # trace three more steps and print the ten costliest operators
dataset: str | None = None         # take token ids from this dataset, None: random ones
batch_size: int | None = None      # rows per step, None: 12 on a GPU, 1 on a CPU or to decode
block_size = 1024                  # tokens per row: the context
prompt_tokens = 16                 # to decode: what there is to go on with
quantize: str | None = None        # to decode: 'int8', weights in 8 bits
vocab_size = 50304                 # of the random ids; a dataset has its own
init_from = 'scratch'              # or the shape, not the weights, of a model: a path, 'gpt2', 'owner/name' on the hub
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
activation_checkpointing = False   # a third more work for much less memory: keep only what enters each block
optimizer = 'adamw'                # 'adamw', 'muon'
lora_rank = 0                      # train adapters of this rank instead of the weights; 0: the weights
seed = 1337
device = 'auto'                    # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is there)
dtype = 'auto'                     # 'float32', 'bfloat16', 'float16' (with loss scaling), 'auto' (bfloat16 if native)
compile: str | bool = 'auto'       # torch.compile: True, False, 'auto' (where it pays for itself)
peak_flops: float | None = None    # FLOP/s of the device at most, for the mfu figure; None: from a table, or measured
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())
settings = [SimpleNamespace(**config)]
if versus:
    if not all(re.match(r'(?!versus\b)\w+=', word) for word in versus.split()):
        raise UsageError(f'versus={versus!r}: expected words such as attention=math')
    settings.append(SimpleNamespace(**configure(globals(), [f'--{word}' for word in versus.split()])))
elif mode == 'attention':
    settings = [SimpleNamespace(**{**config, 'attention': way}) for way in ('math', 'sdpa')]

# refusals

for o in settings:
    for name in ('steps', 'block_size', 'vocab_size', 'prompt_tokens', 'batch_size'):
        if getattr(o, name) is not None and getattr(o, name) < 1:
            raise UsageError(f'{name}={getattr(o, name)}: expected 1 or more')
    for name in ('warmup_steps', 'lora_rank'):
        if getattr(o, name) < 0:
            raise UsageError(f'{name}={getattr(o, name)}: expected 0 or more')
    if o.quantize not in (None, 'int8'):
        raise UsageError(f"quantize={o.quantize!r}: expected 'int8' or None")
    if o.optimizer not in optim.OPTIMIZERS:
        raise UsageError(f'optimizer={o.optimizer!r}: expected one of {", ".join(map(repr, optim.OPTIMIZERS))}')
    for name in ('mode', 'steps', 'warmup_steps', 'profile'):
        if getattr(o, name) != config[name]:
            raise UsageError(f'versus={versus!r}: {name} is the same for both')


# what to time

@dataclass
class Work:
    """A workload to repeat: a callable, and the tokens, FLOPs and bytes of one call (roofline)."""
    run: Callable          # does it once; in training, returns the loss
    tokens: int
    flops: float
    traffic: float         # bytes to and from memory
    what: str
    parameters: int = 0


def shape_of(o):
    """The configuration of the model; with a dataset, its vocabulary."""
    ways = {'dropout': o.dropout, 'attention': o.attention, 'loss_chunks': o.loss_chunks}
    if o.init_from not in ('scratch', 'resume', 'auto'):   # which the config of a run may say
        given = checkpoint.fields(o.init_from)
        return GPTConfig(**{**given, **ways, 'block_size': min(o.block_size, given['block_size'])})
    try:
        ids = Dataset(o.dataset).vocab_size if o.dataset else o.vocab_size
        return GPTConfig(ids, o.block_size, o.n_layer, o.n_embd, o.n_head, o.bias, **ways,
                         **arch_fields(o.arch, pos=o.pos, window=o.window, layer_scale=o.layer_scale))
    except ValueError as error:
        raise UsageError(error) from None


def train(o, rt, rows):
    """An update as train.py makes it, of one micro-batch, always the same: one is as good as another."""
    c = shape_of(o)
    if o.dataset is None:
        tokens = torch.randint(c.vocab_size, (rows, c.block_size + 1), device=rt.device)
        x, y = tokens[:, :-1], tokens[:, 1:]                                          # (B, T) each
    else:
        data = Dataset(o.dataset)
        data.validate_ids(o.block_size, data.vocab_size)
        x, y = (both[0] for both in data.train_batch(0, o.seed, 1, rows, o.block_size, rt.device))
    model = GPT(c)
    if o.lora_rank:
        lora.put(model, o.lora_rank, 16.0, 0.0, 'attn|mlp')
    model.to(rt.device)
    if o.activation_checkpointing:
        for block in model.transformer.h:
            runtime.recompute(block)
    if rt.compile:
        rt.compile_model(model)
    opt = optim.build(o.optimizer, model, 1e-4, (0.9, 0.95), 0.1, rt.dtype)
    scaler = rt.grad_scaler()

    def step():
        with rt.autocast():
            loss = model(x, y)[1]
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        rt.clip_gradients(model, 1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        return loss

    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = 1 if o.optimizer == 'muon' else 2
    traffic = 8 * n * (2 + moments)   # weights, gradients and moments, each read and written once in float32
    return Work(step, x.numel(), model.flops_per_token() * x.numel(), traffic, f'batch {rows} x {o.block_size}', n)


def decode(o, rt, rows):
    """The next token of each row, the prompt's pass being the first."""
    model = GPT(shape_of(o)).to(rt.device, rt.dtype).eval()
    n, c, parameters = model.get_num_params(), model.config, model.get_num_params(non_embedding=False)
    matrix = 1 if o.quantize else rt.dtype.itemsize   # bytes per weight
    if o.quantize:
        int8(model)
    if rt.compile:
        rt.compile_step(model)
    elif not o.quantize:
        pack(model)
    longest = o.prompt_tokens + o.warmup_steps + o.steps
    if longest > c.block_size:
        raise UsageError(f'prompt_tokens + warmup_steps + steps = {longest}: expected '
                         f'at most block_size={c.block_size}, beyond which the context is read anew now and then')
    prompt = torch.randint(c.vocab_size, (rows, o.prompt_tokens), device=rt.device)
    tokens = 1 + o.warmup_steps + o.steps + 3   # of the prompt's pass; to trace
    for _ in itertools.islice(generate(model, prompt, tokens, static_cache=rt.compile), 3):
        pass   # torch's own first time is not the model's; as many tokens, so that the KV cache has the same shape
    stream = generate(model, prompt, tokens, top_k=200, static_cache=rt.compile)
    length = min(o.prompt_tokens + o.warmup_steps + o.steps // 2, c.window or c.block_size)   # on average
    traffic = n * matrix + cache_bytes(c, length * rows, rt.dtype.itemsize)   # each read once
    return Work(lambda: next(stream), rows, 2 * n * rows, traffic,
                f'batch {rows}, {o.prompt_tokens} tokens of prompt', parameters)


def draw(o, rt, rows):
    """Batches of a dataset, until they are on the device."""
    if o.dataset is None:
        raise UsageError('mode=data needs a dataset to draw from: give --dataset=shakespeare_char, or a config file')
    data, step = Dataset(o.dataset), itertools.count()
    data.validate_ids(o.block_size, data.vocab_size)
    traffic = rows * o.block_size * (2 * data.data['train'].dtype.itemsize + 2 * 8)   # ids as they lie, and as int64
    return Work(lambda: data.train_batch(next(step), o.seed, 1, rows, o.block_size, rt.device),
                rows * o.block_size, 0, traffic, f'batch {rows} x {o.block_size}')


def attention_pass(o, rt, rows):
    """Forward and backward pass of the attention of one layer, between the products with its weights."""
    c = shape_of(o)
    size = rows, c.n_head, o.block_size, c.head_width                                 # B, H, T, D
    q, k, v = (torch.randn(size, device=rt.device, dtype=rt.dtype, requires_grad=True) for _ in range(3))
    up = torch.randn(size, device=rt.device, dtype=rt.dtype)                          # the gradient of the result
    positions = torch.arange(o.block_size, device=rt.device)                          # (T,)
    attn_mask = make_attn_mask(positions, positions, c.n_head, c.pos, c.window)
    attention = torch.compile(attend) if rt.compile else attend

    def both():
        q.grad = k.grad = v.grad = None
        attention(q, k, v, o.dropout, attn_mask, o.attention).backward(up)

    seen = min(c.window or o.block_size, o.block_size / 2)   # keys per query that are not in the future, on average
    return Work(both, rows * o.block_size, 12 * c.n_embd * o.block_size * seen * rows, 12 * q.nbytes,
                f'batch {rows} x {o.block_size}, {c.n_head} heads of {size[-1]}')


MODES = {'train': train, 'decode': decode, 'data': draw, 'attention': attention_pass}
UNIT = {'train': 'step', 'decode': 'token', 'data': 'batch', 'attention': 'pass'}
if mode not in MODES:
    raise UsageError(f'mode={mode!r}: expected one of {", ".join(map(repr, MODES))}')

# set up all that is compared, then take turns

works, results = [], []
for o in settings:
    rt = runtime.setup(o.device, o.dtype, o.compile, o.seed, training=mode in ('train', 'attention'))
    print(rt.describe(), file=sys.stderr)
    rows = o.batch_size or (1 if rt.device.type == 'cpu' or mode == 'decode' else 12)
    work = MODES[mode](o, rt, rows)
    works.append((rt, work))
    results.append({'mode': mode, 'parameters': work.parameters, 'batch_size': rows,
                    'block_size': o.block_size, 'attention': o.attention, 'machine': rt.describe()})

times = [[] for _ in works]
for _ in range(warmup_steps + steps + (1 if mode == 'decode' else 0)):   # decoding first reads the prompt
    for (rt, work), taken, r in zip(works, times, results):
        rt.sync()
        t0 = time.perf_counter()
        loss = work.run()
        rt.sync()
        taken.append(time.perf_counter() - t0)
        r['loss'] = loss.item() if mode == 'train' else None

for o, r, (rt, work), taken in zip(settings, results, works, times):
    counted = taken[-steps:]
    dt = statistics.median(counted)
    memory = rt.peak_memory() if len(works) == 1 else None   # that of both tells nothing of one
    flops, bandwidth = rt.measured_flops(), rt.measured_bandwidth()
    by_flops, by_bandwidth = work.flops / flops, work.traffic / bandwidth
    peak = o.peak_flops or (flops if rt.device.type == 'cpu' else rt.peak_flops())
    r |= {'ms_per_step': dt * 1000, 'ms_min': min(counted) * 1000, 'ms_max': max(counted) * 1000,
          'tok_per_s': work.tokens / dt, 'first_step_s': taken[0], 'peak_memory_bytes': memory,
          'flops': work.flops, 'traffic_bytes': work.traffic, 'peak_flops': peak,
          'measured_flops': flops, 'measured_bandwidth': bandwidth,
          'ms_by_flops': by_flops * 1000, 'ms_by_bandwidth': by_bandwidth * 1000,
          'reached': max(by_flops, by_bandwidth) / dt, 'mfu': None}
    if mode == 'train' and peak:
        r['mfu'] = work.flops / dt / peak
    if mode == 'decode':
        r['prompt_tok_per_s'] = work.tokens * o.prompt_tokens / taken[0]

if profile:
    on_done = torch.profiler.tensorboard_trace_handler('bench_log')
    with torch.profiler.profile(on_trace_ready=on_done) as trace:   # of all that torch can trace here
        for _ in range(3):
            for rt, work in works:
                work.run()
                rt.sync()
    by = 'self_cpu_time_total' if works[0][0].device.type == 'cpu' else 'self_device_time_total'
    print(trace.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=40))
    print('trace in ./bench_log: tensorboard --logdir=bench_log, or open the file in ui.perfetto.dev', file=sys.stderr)

# what came out: a column per setting

def column(o, r, work):
    """(label, text) of each line of the table."""
    if len(settings) > 1:
        yield 'setting', ' '.join(f'{name}={value}' for name, value in vars(o).items()
                                  if any(getattr(other, name) != value for other in settings))
    yield 'work', (f'{r["parameters"]:,} parameters, ' if r['parameters'] else '') + work.what
    yield UNIT[mode], f'{r["ms_per_step"]:,.2f} ms, median of {steps} ({r["ms_min"]:,.2f} to {r["ms_max"]:,.2f})'
    yield 'speed', f'{r["tok_per_s"]:,.0f} tok/s'
    if mode == 'decode':
        yield 'prompt', f'{r["first_step_s"] * 1000:,.1f} ms, {r["prompt_tok_per_s"]:,.0f} tok/s'
    if mode == 'train':
        yield 'mfu', (f'{r["mfu"]:.1%} of {r["peak_flops"] / 1e12:,.2f} TFLOP/s' if r['mfu']
                      else '- (unknown device, give --peak_flops)')
        yield 'first step', f'{r["first_step_s"]:,.1f} s'
    arithmetic = f'{r["ms_by_flops"]:,.3f} ms at {r["measured_flops"] / 1e9:,.0f} GFLOP/s, ' if work.flops else ''
    yield 'limit', (f'{arithmetic}{r["ms_by_bandwidth"]:,.3f} ms for {work.traffic / 1e6:,.1f} MB at '
                    f'{r["measured_bandwidth"] / 1e9:,.0f} GB/s')
    yield 'reached', f'{r["reached"]:.1%} of it'
    if r['peak_memory_bytes']:
        yield 'peak memory', f'{r["peak_memory_bytes"] / 2**30:,.2f} GiB'


columns = [dict(column(o, r, work)) for o, r, (_, work) in zip(settings, results, works)]
for label in columns[0]:
    print(f'{label:<12} ' + '   '.join(f'{texts[label]:<60}' for texts in columns).rstrip())
if len(works) == 1:
    print(json.dumps(results[0]))
else:
    first, second = (taken[-steps:] for taken in times)
    ratios = sorted(b / a for a, b in zip(first, second))   # of neighbours, which had the same machine
    ratio = statistics.median(ratios)
    print(f'{"ratio":<12} the second takes {ratio:.3f} of the time of the first ({ratios[0]:.3f} to {ratios[-1]:.3f})')
    print(json.dumps({'ratio': ratio, 'ratio_min': ratios[0], 'ratio_max': ratios[-1], 'settings': results}))
