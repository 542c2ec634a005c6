"""
How the weights of a built model lie in memory, for decoding, where reading them is what takes the time.
"""

import functools

import torch
import torch.nn as nn
from torch.nn import functional as F

from runtime import works


class PackedLinear(nn.Module):
    """A Linear whose matrix lies in the order in which oneDNN multiplies, on a CPU: nn.Linear puts it into that order
    at each call, which takes as long as the product when there are few rows. The same numbers."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class Int8Linear(nn.Module):
    """A Linear whose matrix is kept in 8 bits, with one scale per output channel (weight-only, symmetric, Dettmers et
    al., 2022, section 2): half of what a matrix in bfloat16 has to read, for a little precision.

    kernel: whether to use torch's kernel for that where it can; None: if it works on this machine."""

    def __init__(self, linear, kernel=None):
        super().__init__()
        self.kernel = int8_kernel_works() if kernel is None else kernel
        weight, dtype = linear.weight.detach().float(), linear.weight.dtype
        scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).to(dtype)           # (out,)
        steps = (weight / scale.float()[:, None]).round().clamp(-127, 127)            # (out, in)
        self.register_buffer('weight', steps.to(torch.int8))
        self.register_buffer('scale', scale)
        self.bias = linear.bias

    def forward(self, x):
        rows, width = x.numel() // x.size(-1), x.size(-1)
        suits = x.device.type == 'cpu' and x.dtype == torch.bfloat16 and rows <= FEW and width % 32 == 0
        if suits and self.kernel:
            y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:   # torch.compile makes one kernel of it
            y = F.linear(x, self.weight.to(x.dtype) * self.scale[:, None])
        return y if self.bias is None else y + self.bias


FEW = 32   # rows up to which torch's 8-bit kernel for CPUs, which wants whole vectors, is faster than making bfloat16


def replace_linears(model, kind):
    """Put a Linear of another kind in the place of every nn.Linear of a model, the head included. Training is over."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, kind(child))
    return model


def int8(model):
    """Keep the matrices of a model in 8 bits."""
    return replace_linears(model, Int8Linear)


def pack(model):
    """Put the matrices of a model on the CPU into the order of oneDNN's kernels, if they are in bfloat16 and these
    kernels work on this machine."""
    weight = model.lm_head.weight
    if weight.device.type == 'cpu' and weight.dtype == torch.bfloat16 and can_pack():
        replace_linears(model, packed)
    return model


def packed(linear):
    """A PackedLinear in the place of a Linear, or the Linear itself if oneDNN refuses it."""
    try:
        return PackedLinear(linear)
    except RuntimeError:
        return linear


# ---------------------------------------------------------------------------------------------------------------------
# whether the kernels work on this machine: a trial of each, once per process

@functools.cache
def can_pack():
    """Whether a PackedLinear gives the numbers of a Linear: it needs oneDNN and a CPU with AVX-512 or more."""
    return works(lambda: agree(PackedLinear, lambda linear: linear))


@functools.cache
def int8_kernel_works():
    """Whether an Int8Linear gives the same numbers with torch's kernel for 8 bits as without it."""
    return works(lambda: agree(functools.partial(Int8Linear, kernel=True), functools.partial(Int8Linear, kernel=False)))


@torch.inference_mode()
def agree(kind, other):
    """Whether two kinds of Linear, made of one small Linear in bfloat16, give nearly the same numbers."""
    linear = nn.utils.skip_init(nn.Linear, 64, 48, dtype=torch.bfloat16)   # which draws no random numbers
    for p in linear.parameters():
        p.copy_(torch.arange(p.numel()).sin().view_as(p))
    x = torch.arange(3 * 64).cos().view(3, 64).bfloat16()
    return torch.allclose(kind(linear)(x), other(linear)(x), atol=0.1, rtol=0.02)
