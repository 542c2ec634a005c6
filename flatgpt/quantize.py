"""
How the weights of a built model are stored for decoding, where reading them takes most of the time: in oneDNN's order,
or in 8 bits.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn as nn
from torch.nn import functional as F

from flatgpt.machine import works

KERNEL_ROWS = 32   # up to so many rows torch's 8-bit kernel for CPUs is faster than converting the weights to bfloat16


class PackedLinear(nn.Module):
    """A Linear on a CPU whose matrix is stored in the order in which oneDNN multiplies; the numbers are the same.
    nn.Linear reorders its matrix at each call, which for few rows takes as long as the product."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class Int8Linear(nn.Module):
    """A Linear whose matrix is stored in 8 bits, with one scale per output channel (weight-only, symmetric, Dettmers et
    al., 2022, section 2): half the bytes of bfloat16, for a little precision.

    use_kernel: whether to use torch's 8-bit kernel for CPUs where it applies; None: if it works on this machine.
    """

    def __init__(self, linear: nn.Linear, use_kernel: bool | None = None):
        super().__init__()
        self.use_kernel = int8_kernel_works() if use_kernel is None else use_kernel
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).to(linear.weight.dtype)   # (out,)
        steps = (weight / scale.float()[:, None]).round().clamp(-127, 127)            # (out, in)
        self.register_buffer('weight', steps.to(torch.int8))
        self.register_buffer('scale', scale)
        self.bias = linear.bias

    def forward(self, x):
        width = x.size(-1)
        rows = x.numel() // width
        kernel_applies = x.device.type == 'cpu' and x.dtype == torch.bfloat16 and rows <= KERNEL_ROWS
        if self.use_kernel and kernel_applies and width % 32 == 0:
            y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:   # torch.compile makes one kernel of it
            y = F.linear(x, self.weight.to(x.dtype) * self.scale[:, None])
        return y if self.bias is None else y + self.bias


def replace_linears(model: nn.Module, convert: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Replace every nn.Linear of a model, the head included, by convert(linear); the model cannot be trained then."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, convert(child))
    return model


def int8(model: nn.Module) -> nn.Module:
    """Store the matrices of a model in 8 bits, in place."""
    return replace_linears(model, Int8Linear)


def pack(model: nn.Module) -> nn.Module:
    """Store the matrices of a model in the order of oneDNN's kernels, in place, if they are in bfloat16 on a CPU and
    these kernels work on this machine; else change nothing."""
    weight = model.lm_head.weight
    if weight.device.type == 'cpu' and weight.dtype == torch.bfloat16 and can_pack():
        replace_linears(model, packed_if_possible)
    return model


def prepare(model: nn.Module, quantize: str | None) -> nn.Module:
    """Store the matrices of a model for decoding, in place: in 8 bits if quantize is 'int8', else as pack() does."""
    return int8(model) if quantize == 'int8' else pack(model)


def packed_if_possible(linear: nn.Linear) -> nn.Module:
    """A PackedLinear, or the Linear itself if oneDNN refuses it."""
    try:
        return PackedLinear(linear)
    except RuntimeError:
        return linear


# ---------------------------------------------------------------------------------------------------------------------
# whether the kernels work on this machine: one trial of each per process

@functools.cache
def can_pack() -> bool:
    """Whether a PackedLinear gives the numbers of a Linear: it needs oneDNN and a CPU with AVX-512 or more."""
    return works(lambda: agree(PackedLinear, lambda linear: linear))


@functools.cache
def int8_kernel_works() -> bool:
    """Whether an Int8Linear gives the same numbers with torch's 8-bit kernel as without it."""
    with_kernel = functools.partial(Int8Linear, use_kernel=True)
    without_kernel = functools.partial(Int8Linear, use_kernel=False)
    return works(lambda: agree(with_kernel, without_kernel))


@torch.inference_mode()
def agree(convert: Callable[[nn.Linear], nn.Module], reference: Callable[[nn.Linear], nn.Module]) -> bool:
    """Whether two conversions of one small Linear in bfloat16 give nearly the same numbers."""
    linear = nn.utils.skip_init(nn.Linear, 64, 48, dtype=torch.bfloat16)   # which draws no random numbers
    for p in linear.parameters():
        p.copy_(torch.arange(p.numel()).sin().view_as(p))
    x = torch.arange(3 * 64).cos().view(3, 64).bfloat16()
    return torch.allclose(convert(linear)(x), reference(linear)(x), atol=0.1, rtol=0.02)
