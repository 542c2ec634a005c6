"""
How the matrices of a built model are stored for decoding, where reading them takes most of the time: in 16 or 8 bits,
in the order of a kernel of torch that is fast for few rows.

On a CPU a matrix has at most two forms: one for many rows, such as those of a prompt, and one for few. Which one is
faster depends on the CPU and on the shape: prepare() measures it. Both hold the same numbers, so the text does not
depend on the measurement. A kernel is used after a trial on this machine.
"""

import collections
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
from torch.nn import functional as F

from flatgpt.machine import works

FEW_ROWS = 16      # up to so many rows a product waits for the matrix, not for the arithmetic
KERNEL_ROWS = 32   # up to so many rows torch's 8-bit kernel for CPUs is faster than converting the weights to bfloat16
SMALL = 2**16      # numbers of a matrix that stays as it is
CACHED = 2**24     # bytes of the matrices of a model that stays as it is: caches hold it
PIECE = 8192       # outputs that are packed together: more are packed slower, because caches do not hold them
NOTICED = 2**31    # bytes of second forms that are worth a notice
WAIT = 8           # tokens that are decoded before matrices are packed: short answers need not wait for it
BANDWIDTH = 16e9   # bytes per second from memory, as of most laptops; not measured, so that the choice is steady

# ---------------------------------------------------------------------------------------------------------------------
# the forms of a matrix

class Form(nn.Module):
    """A Linear whose matrix is stored in another way. kernel: its name; itemsize: bytes per number of the matrix."""

    kernel: str
    itemsize: int

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.shape = tuple(linear.weight.shape)                                       # (out, in)
        self.bias = linear.bias


class PackedLinear(Form):
    """A Linear in bfloat16 on a CPU whose matrix is stored in the order in which oneDNN multiplies; the numbers are the
    same. nn.Linear reorders its matrix at each call, which for few rows takes as long as the product."""

    kernel = 'oneDNN bfloat16'
    itemsize = 2

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class Float16Linear(Form):
    """A Linear in float32 on a CPU whose matrix is stored in float16; FBGEMM's kernel (Khudia et al., 2021) computes in
    float32."""

    kernel = 'FBGEMM float16'
    itemsize = 2

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        weights = linear.weight.detach().split(PIECE)
        biases = [None] * len(weights) if linear.bias is None else linear.bias.detach().split(PIECE)
        self.pieces = map_in_threads(torch.ops.quantized.linear_prepack_fp16, weights, biases)

    def forward(self, x):
        outputs = [torch.ops.quantized.linear_dynamic_fp16(x, piece) for piece in self.pieces]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class Int8Linear(Form):
    """A Linear whose matrix is stored in 8 bits, with one scale per output channel (weight-only, symmetric, Dettmers et
    al., 2022, section 2): half the bytes of bfloat16, for a little precision.

    use_kernel: whether to use torch's 8-bit kernel for CPUs where it applies; None: if it works on this machine.
    """

    kernel = 'torch int8'
    itemsize = 1

    def __init__(self, linear: nn.Linear, use_kernel: bool | None = None):
        super().__init__(linear)
        self.use_kernel = runs(INT8_KERNEL) if use_kernel is None else use_kernel
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()          # (out,)
        weight = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)   # (out, in)
        self.register_buffer('weight', weight)
        self.register_buffer('scale', scale)

    def forward(self, x):
        width = x.size(-1)
        rows = x.numel() // width
        if self.use_kernel and x.device.type == 'cpu' and rows <= KERNEL_ROWS and width % 32 == 0:
            y = torch._weight_int8pack_mm(x.reshape(rows, width).bfloat16(), self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1).to(x.dtype)
        else:   # torch.compile makes one kernel of it
            y = F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None])
        return y if self.bias is None else y + self.bias


class LinearByRows(nn.Module):
    """A Linear in two forms: one for a single row, one of the two for up to FEW_ROWS, one for more."""

    def __init__(self, one: nn.Module, few: nn.Module, many: nn.Module):
        super().__init__()
        self.one = one
        self.few = few
        self.many = many

    def forward(self, x):
        return self.form_for(x.numel() // x.size(-1))(x)

    def form_for(self, rows: int) -> nn.Module:
        """The form that multiplies so many rows."""
        if rows == 1:
            return self.one
        return self.few if rows <= FEW_ROWS else self.many


INT8_KERNEL = functools.partial(Int8Linear, use_kernel=True)   # for its trial

# ---------------------------------------------------------------------------------------------------------------------
# whole models

def linears(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, name of its child) of every nn.Linear of a model, the head included."""
    return [(module, name) for module in model.modules() for name, child in module.named_children()
            if type(child) is nn.Linear]


def replace_linears(model: nn.Module, form: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every nn.Linear of a model, the head included, by form(linear); the model cannot be trained then."""
    for module, name in linears(model):
        setattr(module, name, form(getattr(module, name)))


def prepare(model: nn.Module, rt, quantize: str | None = None, dtype: str = 'auto', rows: int = 1,
            gradually: bool = False) -> None:
    """Move a model to the device and the dtype of a Runtime, and store its matrices for decoding, in place.

    quantize: 'int8' stores them in 8 bits, once, so that they need the least memory. dtype: the option that rt was made
    with. 'float32' changes no number; 'auto' on a CPU rounds large matrices to float16, if its kernel works here, and
    computes in float32. Which numbers they have, and in 8 bits the kernel too, follows from the options alone, not from
    what is measured or from free memory. rows: how many are decoded together, at most. gradually: pack one block per
    token to float16 after the first WAIT tokens, so that a short text need not wait for it.
    """
    model.to(rt.device, rt.dtype)
    on_cpu = rt.device.type == 'cpu' and not rt.compile   # a compiled step takes the matrices as they are
    if quantize:
        replace_linears(model, Int8Linear)
    elif on_cpu and rt.dtype == torch.float32 and dtype == 'auto' and runs(Float16Linear):
        give_second_form(model, rt, rows, gradually)
    elif on_cpu and rt.dtype == torch.bfloat16 and runs(PackedLinear, torch.bfloat16):
        replace_linears(model, PackedLinear)


def give_second_form(model: nn.Module, rt, rows: int, gradually: bool) -> None:
    """Round the large matrices of a model to float16, and give those a Float16Linear beside their Linear for which it
    is faster for 1 row or for so many rows, block by block, in place. The Linear is dropped if the memory does not hold
    both."""
    parts = [[(model, 'lm_head')], *(linears(block) for block in model.transformer.h)]   # the head gains most
    parts = [[(module, name) for module, name in part if can_convert(getattr(module, name).weight)] for part in parts]
    weights = [getattr(module, name).weight for part in parts for module, name in part]
    if sum(weight.nbytes for weight in weights) < CACHED:
        return
    with torch.no_grad():   # both forms give the same numbers, but for rounding in float32
        for weight in weights:
            weight.copy_(weight.half())
    free = rt.free_memory()
    added = 2 * sum(weight.numel() for weight in weights)   # bytes
    drop = free is not None and 2 * added > free
    if added > NOTICED and not drop:
        rt.notice(f'{added / 1e9:.1f} GB more memory for matrices in 16 bits, which are read faster; --dtype=float32 '
                  f'and --quantize=int8 do without')

    def convert(part):
        old = [getattr(module, name) for module, name in part]
        one = [float16_is_faster(linear.weight.shape, 1) for linear in old]
        few = [float16_is_faster(linear.weight.shape, min(rows, FEW_ROWS)) for linear in old]
        new = map_in_threads(functools.partial(with_float16, drop=drop), old, one, few)
        for (module, name), linear in zip(part, new):
            setattr(module, name, linear)

    jobs = [functools.partial(convert, part) for part in parts if part]
    if gradually:
        after_some_tokens(model, jobs)
    else:
        for job in jobs:
            job()


def can_convert(weight: torch.Tensor) -> bool:
    """Whether a matrix is large enough to gain from another form, and float16 has all of its numbers."""
    return weight.numel() >= SMALL and bool(max(-weight.min(), weight.max()) <= torch.finfo(torch.float16).max)


def with_float16(linear: nn.Linear, one: bool, few: bool, drop: bool) -> nn.Module:
    """A Linear with a Float16Linear for a single row if `one`, and for some rows if `few`; the Float16Linear alone if
    the first form is to be dropped; the Linear itself if the other is never faster."""
    if not one and not few:
        return linear
    second = Float16Linear(linear)
    if drop:
        return second
    return LinearByRows(second if one else linear, second if few else linear, linear)


def after_some_tokens(model: nn.Module, jobs: list[Callable]) -> None:
    """Let a model do the jobs while it decodes: one per token, after the first WAIT."""
    next_logits = model.next_logits
    decoded = itertools.count(1)

    def next_logits_and_job(idx, kv_cache):
        if jobs and idx.size(1) == 1 and next(decoded) > WAIT:
            jobs.pop(0)()
        return next_logits(idx, kv_cache)

    model.next_logits = next_logits_and_job


def map_in_threads(work: Callable, *arguments: Sequence) -> list:
    """The results of a function for some arguments, as of map(), on as many threads as torch has: a matrix is packed by
    a single thread."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(work, *arguments))


def kernels(model: nn.Module, rows: int) -> collections.Counter:
    """What multiplies so many rows: {(shape (out, in), kernel, bytes of one matrix): how many matrices}."""
    found = collections.Counter()
    for module in model.modules():
        if isinstance(module, LinearByRows):   # its forms have been counted
            continue
        for child in module.children():
            used = child.form_for(rows) if isinstance(child, LinearByRows) else child
            if isinstance(used, Form):
                found[used.shape, used.kernel, math.prod(used.shape) * used.itemsize] += 1
            elif isinstance(used, nn.Linear):
                weight = used.weight
                found[tuple(weight.shape), f'torch {str(weight.dtype)[6:]}', weight.nbytes] += 1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# which form is faster

@functools.cache
def float16_is_faster(shape: torch.Size, rows: int) -> bool:
    """Whether a Float16Linear of this shape, (out, in), is faster than a Linear for so many rows: by the times of calls
    whose matrix is in a cache, and of reading it from memory. Only the first PIECE outputs are measured."""
    linear = nn.utils.skip_init(nn.Linear, shape[1], min(shape[0], PIECE), bias=False)
    nn.init.ones_(linear.weight)
    half = Float16Linear(linear)
    gain = linear.weight.numel() * (linear.weight.itemsize - half.itemsize) / BANDWIDTH   # seconds of reading less
    x = torch.ones(rows, shape[1])
    return seconds(half, x) < seconds(linear, x) + gain


@torch.inference_mode()
def seconds(module: nn.Module, x: torch.Tensor) -> float:
    """Seconds of the fastest of six calls of a Linear in any form."""
    times = []
    for _ in range(6):
        t0 = time.perf_counter()
        module(x)
        times.append(time.perf_counter() - t0)
    return min(times)


# ---------------------------------------------------------------------------------------------------------------------
# whether the kernels work on this machine: one trial of each per process

@functools.cache
def runs(form: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float32) -> bool:
    """Whether a form of a small Linear gives nearly its numbers in a dtype on this machine. oneDNN's needs AVX-512 or
    more, FBGEMM's a torch that was built with it."""
    @torch.inference_mode()
    def agrees():
        linear = nn.utils.skip_init(nn.Linear, 64, 48, dtype=dtype)   # which draws no random numbers
        for p in linear.parameters():
            p.copy_(torch.arange(p.numel()).sin().view_as(p))
        linear.weight[0] = 1   # with a row of ones, the largest sum
        x = torch.arange(3 * 64).cos().view(3, 64).to(dtype)
        x[0] = 1
        return all(torch.allclose(form(linear)(rows), linear(rows), atol=0.1, rtol=0.02) for rows in (x, x[:1]))

    return works(agrees)
