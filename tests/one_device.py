"""A check without a GPU that tensors stay on their device, as a GPU needs it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# operators by which the host reads a number, and the answer that it gets here
ANSWERS = {aten._local_scalar_dense.default: 1, aten.item.default: 1, aten.is_nonzero.default: True,
           aten.equal.default: True}
MIXED = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default}   # indices may be on the CPU


class OneDevice(TorchDispatchMode):
    """A block in which it is an error, as on a GPU, that an operator gets tensors of the device and of another one;
    except copies, indices and tensors without dimensions.

    .operators: how many operators had tensors of the device.
    .reads: how often the host read a number, for which it would have to wait.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.operators, self.reads = torch.device(device), 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        others = [value for value in tensors if value.device.type != self.device.type]
        if len(others) < len(tensors):
            self.operators += 1
            if operator in ANSWERS:
                self.reads += 1
                return ANSWERS[operator]
            assert operator in MIXED or all(value.dim() == 0 for value in others), (
                f'{operator} gets tensors on {self.device} and others: {others}')
        return operator(*args, **kwargs or {})


def no_fused_adamw(monkeypatch):
    """Build AdamW in its plain form: the fused one works on real devices only."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, 'AdamW', lambda *args, fused, **options: adamw(*args, **options))
