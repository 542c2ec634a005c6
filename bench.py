"""
How fast this machine trains, decodes, reads data and attends, and how far that is from what it could do.

    python bench.py config/train_shakespeare_char_cpu.py        the model, the batch and the data of a recipe
    python bench.py                                             GPT-2 (124M) on random ids, no dataset needed
    python bench.py --versus="attention=math loss_chunks=8"     beside the same with other options, step by step in turn
    python bench.py --mode=decode                               one token after another, for 1 row and for 10
    python bench.py --mode=prefill --init_from=gpt2             a prompt, to its first token
    python bench.py --mode=attention --block_size=256           the ways to compute it beside each other
    python bench.py --mode=data --dataset=shakespeare_char      drawing batches, and nothing else
    python bench.py --profile=True                              and a trace in ./bench_log for ui.perfetto.dev

Prints a table, and as the last line of stdout one JSON object. The first steps warm up and are not counted. The limit
is what matrix products, or reading from memory, would take at the rates that this machine shows just after.
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
mode = 'train'                     # 'train' (a step), 'decode' (a token), 'prefill', 'data' (a batch), 'attention'
versus: str | None = None          # other options to measure in turn with these, such as 'attention=math compile=False'
warmup_steps = 2                   # not counted; compilation falls into the first
steps = 8                          # counted at most, each on its own; the median is reported
seconds = 30.0                     # begin no more steps after this time, once three are counted
profile = False                    # trace three more steps and print the ten costliest operators
dataset: str | None = None         # take token ids from this dataset, None: random ones
batch_size: int | None = None      # rows per step, None: 12 on a GPU, 1 on a CPU, to decode 1 beside 10
block_size = 1024                  # tokens per row: the context
prompt_tokens: int | None = None   # length of the prompt, None: 16 to decode, 500 for prefill
quantize: str | None = None        # to decode and for prefill: 'int8', weights in 8 bits
vocab_size = 50304                 # of the random ids; a dataset has its own
init_from = 'scratch'              # or the shape, not the weights, of a model: a path, 'gpt2', 'owner/name' on the hub
arch = 'gpt2'                      # a set of switches in model.py: 'gpt2', 'llama', 'qwen3', 'speedrun'
pos: str | None = None             # positions: 'learned', 'rope', 'alibi'; None: those of arch
window: int | None = None          # how many tokens back attention reaches, None: all
layer_scale: float | None = None   # initial gain of what a block adds, None: no gains
n_layer = 12                       # number of blocks; this and the next two are those of GPT-2 (124M)
n_embd = 768                       # width of the model
n_head = 12                        # attention heads per block
bias = False                       # biases in linear layers and norms
dropout = 0.0                      # share of activations that training drops
attention = 'auto'                 # 'sdpa' (torch's fused kernels), 'math' (written out), 'auto' (the faster one)
loss_chunks = 1                    # more: logits in so many pieces, which saves their memory, not their time
activation_checkpointing = False   # a third more work for much less memory: keep only what enters each block
optimizer = 'adamw'                # 'adamw', 'muon'
lora_rank = 0                      # train adapters of this rank instead of the weights; 0: the weights
seed = 1337                        # of weights, random ids and batches
device = 'auto'                    # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first one available)
dtype = 'auto'                     # 'float32', 'bfloat16', 'float16' (with loss scaling), 'auto' (bfloat16 if native)
compile: str | bool = 'auto'       # torch.compile: True, False, 'auto' (where it pays for itself)
peak_flops: float | None = None    # FLOP/s of the device at most, for the mfu figure; None: from a table, or measured
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import atexit
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch  # not above the options: --help and a misspelt option need not wait for it
from tqdm import tqdm

from flatgpt import checkpoint, lora, optim, runtime, start
from flatgpt.dataset import Dataset
from flatgpt.engine import cache_bytes, compile_step, generate
from flatgpt.errors import UsageError, UserError
from flatgpt.quantize import kernels, prepare
from flatgpt.validate import at_least, one_of
from model import ARCHS, GPT, GPTConfig, attend, make_attn_mask

# what is compared: one setting of the options, or two

settings = [SimpleNamespace(**config)]
if versus:
    for word in versus.split():
        if not re.match(r'(?!(versus|mode|steps|warmup_steps|seconds|profile)=)\w+=', word):
            raise UsageError(f'versus: {word!r} cannot be compared, expected words such as attention=math')
    settings.append(SimpleNamespace(**configure(globals(), [f'--{word}' for word in versus.split()])))
elif mode == 'attention':
    settings = [SimpleNamespace(**{**config, 'attention': way}) for way in ('math', 'sdpa')]
elif mode == 'decode' and batch_size is None:
    settings = [SimpleNamespace(**{**config, 'batch_size': n}) for n in (1, 10)]

for o in settings:
    o.prompt_tokens = o.prompt_tokens or (500 if mode == 'prefill' else 16)
    at_least(1, vars(o), 'steps', 'block_size', 'vocab_size', 'prompt_tokens', 'batch_size')
    at_least(0, vars(o), 'warmup_steps', 'seconds', 'lora_rank')
    one_of((None, 'int8'), vars(o), 'quantize')
    one_of(optim.OPTIMIZERS, vars(o), 'optimizer')
    one_of(ARCHS, vars(o), 'arch')

if profile:
    try:
        os.makedirs('bench_log', exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write ./bench_log: {error.strerror}; start it in another folder') from None


@dataclass
class Work:
    """A workload: a callable, and the tokens, FLOPs and bytes of one call (roofline)."""
    run: Callable          # does it once; in training, returns the loss
    tokens: int
    flops: float
    traffic: float         # bytes to and from memory
    parameters: int = 0
    kernels: list = field(default_factory=list)   # of matrix products: [shape, kernel, bytes of one, how many]


def shape_of(o):
    """The configuration of the model; with a dataset, its vocabulary."""
    if o.init_from in ('scratch', 'resume', 'auto'):   # which the config of a run may say
        return start.new_config(vars(o), Dataset(o.dataset).vocab_size if o.dataset else o.vocab_size)
    given = checkpoint.fields(o.init_from)
    return GPTConfig(**{**given, 'block_size': min(o.block_size, given['block_size']), 'dropout': o.dropout,
                        'attention': o.attention, 'loss_chunks': o.loss_chunks})


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
        runtime.recompute(model)
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
    return Work(step, x.numel(), model.flops_per_token() * x.numel(), traffic, n)


def for_decoding(o, rt, rows, longest, tokens):
    """(model, prompt, Work that reads each matrix once, for so many tokens at once)."""
    model = GPT(shape_of(o)).eval()
    c = model.config
    if longest > c.block_size:
        raise UsageError(f'{longest} tokens, of the prompt, warmup_steps and steps: expected at most '
                         f'block_size={c.block_size}, beyond which part of the context is computed again')
    work = Work(None, tokens, 2 * model.get_num_params() * tokens, 0, model.get_num_params(non_embedding=False))
    prepare(model, rt, o.quantize, o.dtype, rows)
    if rt.compile:
        compile_step(model)
    for (shape, kernel, nbytes), n in kernels(model, tokens).items():
        work.traffic += n * nbytes
        work.kernels.append([f'{shape[0]} x {shape[1]}', kernel, nbytes, n])
    return model, torch.randint(c.vocab_size, (rows, o.prompt_tokens), device=rt.device), work


def decode(o, rt, rows):
    """The next token of each row, the prompt's pass being the first."""
    model, prompt, work = for_decoding(o, rt, rows, o.prompt_tokens + o.warmup_steps + o.steps, rows)
    tokens = 1 + o.warmup_steps + o.steps + 3   # of the prompt's pass; to trace
    stream = generate(model, prompt, tokens, top_k=200, static_cache=rt.compile)
    atexit.register(stream.close)   # while torch is still there
    work.run = lambda: next(stream)
    c = model.config
    length = min(o.prompt_tokens + o.warmup_steps + o.steps // 2, c.window or c.block_size)   # on average
    work.traffic += cache_bytes(c, length * rows, rt.dtype.itemsize)   # read once
    return work


def prefill(o, rt, rows):
    """The first token after the prompt of each row."""
    model, prompt, work = for_decoding(o, rt, rows, o.prompt_tokens, rows * o.prompt_tokens)
    work.run = lambda: next(generate(model, prompt, 1))
    return work


def batches(o, rt, rows):
    """Batches of a dataset, until they are on the device."""
    if o.dataset is None:
        raise UsageError('mode=data needs a dataset to draw from: give --dataset=shakespeare_char, or a config file')
    data = Dataset(o.dataset)
    data.validate_ids(o.block_size, data.vocab_size)
    step = itertools.count()
    tokens = rows * o.block_size
    traffic = tokens * (2 * data.data['train'].dtype.itemsize + 2 * 8)   # ids as they are stored, and as int64
    return Work(lambda: data.train_batch(next(step), o.seed, 1, rows, o.block_size, rt.device), tokens, 0, traffic)


def attention_pass(o, rt, rows):
    """Forward and backward pass of the attention of one layer, between the products with its weights."""
    c = shape_of(o)
    size = (rows, c.n_head, o.block_size, c.head_width)                               # B, H, T, D
    q, k, v = (torch.randn(size, device=rt.device, dtype=rt.dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(size, device=rt.device, dtype=rt.dtype)                    # of the result
    positions = torch.arange(o.block_size, device=rt.device)                          # (T,)
    attn_mask = make_attn_mask(positions, positions, c.n_head, c.pos, c.window)
    function = torch.compile(attend) if rt.compile else attend

    def both():
        q.grad = k.grad = v.grad = None
        function(q, k, v, o.dropout, attn_mask, o.attention).backward(gradient)

    seen = min(c.window or o.block_size, o.block_size / 2)   # keys per query that are not in the future, on average
    return Work(both, rows * o.block_size, 12 * c.n_embd * o.block_size * seen * rows, 12 * q.nbytes)


MODES = {'train': ('step', train), 'decode': ('token', decode), 'prefill': ('prompt', prefill),
         'data': ('batch', batches), 'attention': ('pass', attention_pass)}
one_of(MODES, config, 'mode')
unit, make_work = MODES[mode]

# set up all that is compared, then take turns

measured = []   # (options, Runtime, Work, seconds of each call, result) of each setting
for o in settings:
    rt = runtime.setup(o.device, o.dtype, o.compile, o.seed, training=mode in ('train', 'attention'),
                       decoding=mode in ('decode', 'prefill'))
    if all(rt != other for _, other, *_ in measured):
        print(rt.describe(), file=sys.stderr)
    rows = o.batch_size or (12 if rt.device.type != 'cpu' and mode not in ('decode', 'prefill') else 1)
    work = make_work(o, rt, rows)
    result = {'mode': mode, 'parameters': work.parameters, 'kernels': work.kernels, 'batch_size': rows,
              'block_size': o.block_size, 'attention': o.attention, 'machine': rt.describe(), 'loss': None}
    measured.append((o, rt, work, [], result))

uncounted = warmup_steps + (1 if mode == 'decode' else 0)   # decoding first reads the prompt
begin = time.perf_counter()
for i in tqdm(range(uncounted + steps), desc=unit, leave=False, disable=None):
    if i >= uncounted + 3 and time.perf_counter() - begin > seconds:
        break
    for _, rt, work, taken, result in measured:
        rt.sync()
        t0 = time.perf_counter()
        loss = work.run()
        rt.sync()
        taken.append(time.perf_counter() - t0)
        if mode == 'train':
            result['loss'] = loss.item()

rates = {}   # (device, dtype): (FLOP/s, bytes per second), measured once, so that both settings have one limit
for o, rt, work, taken, result in measured:
    counted = taken[uncounted:]
    dt = statistics.median(counted)
    if (rt.device, rt.dtype) not in rates:
        rates[rt.device, rt.dtype] = (rt.measured_flops(), rt.measured_bandwidth())
    flops, bandwidth = rates[rt.device, rt.dtype]
    by_flops = work.flops / flops
    by_bandwidth = work.traffic / bandwidth
    peak = o.peak_flops or (flops if rt.device.type == 'cpu' else rt.peak_flops())
    memory = rt.peak_memory() if len(measured) == 1 else None   # that of both says nothing about one
    result |= {'steps': len(counted), 'ms_per_step': dt * 1000, 'ms_min': min(counted) * 1000,
               'ms_max': max(counted) * 1000, 'tok_per_s': work.tokens / dt, 'first_step_s': taken[0],
               'peak_memory_bytes': memory, 'flops': work.flops, 'traffic_bytes': work.traffic, 'peak_flops': peak,
               'measured_flops': flops, 'measured_bandwidth': bandwidth, 'ms_by_flops': by_flops * 1000,
               'ms_by_bandwidth': by_bandwidth * 1000, 'reached': max(by_flops, by_bandwidth) / dt, 'mfu': None}
    if mode == 'train' and peak:
        result['mfu'] = work.flops / dt / peak

if profile:
    on_done = torch.profiler.tensorboard_trace_handler('bench_log')
    with torch.profiler.profile(on_trace_ready=on_done) as trace:   # of all that torch can trace here
        for _ in range(3):
            for _, rt, work, *_ in measured:
                work.run()
                rt.sync()
    by = 'self_cpu_time_total' if measured[0][1].device.type == 'cpu' else 'self_device_time_total'
    print(trace.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=40))
    print('trace in ./bench_log: open the file in ui.perfetto.dev', file=sys.stderr)


# what came out: a column per setting

def column(o, work, r):
    """{label: text} of the lines of the table; r: the result of a setting."""
    lines = {}
    if len(settings) > 1:
        changed = [name for name in config if len({getattr(other, name) for other in settings}) > 1]
        lines['setting'] = ' '.join(f'{name}={getattr(o, name)}' for name in changed)
    parameters = f'{work.parameters:,} parameters, ' if work.parameters else ''
    context = f'{o.prompt_tokens} tokens of prompt' if mode in ('decode', 'prefill') else o.block_size
    lines['work'] = f'{parameters}batch {r["batch_size"]} x {context}'
    lines[unit] = f'{r["ms_per_step"]:,.2f} ms, median of {r["steps"]} ({r["ms_min"]:,.2f} to {r["ms_max"]:,.2f})'
    lines['speed'] = f'{r["tok_per_s"]:,.0f} tok/s'
    if mode == 'train':
        lines['mfu'] = '- (unknown device, give --peak_flops)'
        lines['first step'] = f'{r["first_step_s"]:,.1f} s'
    if r['mfu']:
        lines['mfu'] = f'{r["mfu"]:.1%} of {r["peak_flops"] / 1e12:,.2f} TFLOP/s'
    lines['limit'] = (f'{r["ms_by_flops"]:,.3f} ms at {r["measured_flops"] / 1e9:,.0f} GFLOP/s, '
                      f'{r["ms_by_bandwidth"]:,.3f} ms for {work.traffic / 1e6:,.1f} MB at '
                      f'{r["measured_bandwidth"] / 1e9:,.0f} GB/s')
    lines['reached'] = f'{r["reached"]:.1%} of it'
    for shape, kernel, nbytes, n in work.kernels:
        lines[shape] = f'{kernel}, {n} of {nbytes / 1e6:,.1f} MB'
    if r['peak_memory_bytes']:
        lines['peak memory'] = f'{r["peak_memory_bytes"] / 2**30:,.2f} GiB'
    return lines


columns = [column(o, work, result) for o, _, work, _, result in measured]
for label in dict.fromkeys(label for texts in columns for label in texts):
    print(f'{label:<12} ' + '   '.join(f'{texts.get(label, ""):<60}' for texts in columns).rstrip())
if len(measured) == 1:
    print(json.dumps(measured[0][-1]))
else:
    pairs = zip(*(taken[uncounted:] for _, _, _, taken, _ in measured))   # neighbours in time
    ratios = sorted(b / a for a, b in pairs)
    ratio = statistics.median(ratios)
    extremes = len(ratios) // 6   # the range is without them: on a busy machine one step may take any time
    low, high = ratios[extremes], ratios[-1 - extremes]
    verdict = 'no difference seen: ' if low <= 1 <= high else ''
    print(f'{"ratio":<12} {verdict}the second takes {ratio:.3f} of the time of the first ({low:.3f} to {high:.3f})')
    results = [result for *_, result in measured]
    print(json.dumps({'ratio': ratio, 'ratio_min': low, 'ratio_max': high, 'settings': results}))
