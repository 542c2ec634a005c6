"""
Optimizers (AdamW, Muon), the learning rate of a step, and which parameters are trained.
"""

import inspect
import math
import re

import torch
from torch import Tensor, nn

from flatgpt.errors import UserError
from flatgpt.lora import finds
from flatgpt.runtime import distribute_like, full_tensor

SCHEDULES = ('cosine', 'linear', 'constant')
OPTIMIZERS = ('adamw', 'muon')


class Freezer:
    """Keeps the parameters of a model fixed whose names the regex freeze finds, such as 'wte|wpe', or by step, in
    '0: wte|h; 1000: wte; 2000:', where an empty regex finds none. What is never trained needs no optimizer state.
    Raises UserError.

    .by_step: {first step: set of parameters that are fixed from then on}. .changes: whether there are several.
    .notes: lines for the user.
    """

    def __init__(self, model: nn.Module, freeze: str):
        by_step = re.match(r'\s*\d+\s*:', freeze) is not None
        parts = [part.partition(':') for part in freeze.split(';')] if by_step else [('0', ':', freeze)]
        steps = [int(step) if step.strip().isdecimal() else None for step, _, _ in parts]
        if steps[0] != 0 or None in steps or steps != sorted(set(steps)):
            raise UserError(f"freeze={freeze!r}: expected a regex, or '0: regex; 1000: regex; ...' with rising steps")
        self.by_step = {step: frozen(model, regex.strip()) for step, (_, _, regex) in zip(steps, parts)}
        self.changes = len(steps) > 1
        self.current = None
        self.total = sum(p.numel() for p in model.parameters())
        always = set.intersection(*self.by_step.values())
        self.trained = [p for p in model.parameters() if p.requires_grad and p not in always]
        for p in always:
            p.requires_grad_(False)
        tied = model.config.tie_weights and any(model.lm_head.weight in found for found in self.by_step.values())
        self.notes = ['transformer.wte.weight is lm_head.weight: freezing the one freezes the other'] if tied else []

    def at(self, step: int) -> int | None:
        """Freeze and release what is to be at a step. Returns how many parameters are trained from now on; None if that
        did not change, or if all of them always are."""
        first = max(start for start in self.by_step if start <= step)
        if first == self.current:
            return None
        self.current = first
        if self.changes:
            for p in self.trained:
                p.requires_grad_(p not in self.by_step[first])
        count = sum(p.numel() for p in self.trained if p.requires_grad)
        return count if self.changes or count < self.total else None


def frozen(model: nn.Module, regex: str) -> set:
    """Return the set of parameters that a regex finds, by any of the names of a tied one; none if it is empty."""
    named = list(model.named_parameters(remove_duplicate=False))
    found = {p for name, p in named if regex and finds(regex, name, 'freeze')}
    if regex and not found:
        some = ', '.join(list(dict(model.named_parameters()))[:4])
        raise UserError(f'freeze={regex!r} finds no parameter; there are {some}, ...')
    if len(found) == len(list(model.parameters())):
        tied = ' (lm_head.weight is transformer.wte.weight)' if len(named) > len(found) else ''
        raise UserError(f'freeze={regex!r} finds every parameter{tied}: there is nothing left to train')
    return found


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the trainable parameters of a model in two groups: matrices, which decay, and biases and norms, which do
    not. A tied parameter counts once."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the decorators of its methods that import torch's compiler, which takes a second: they only
    matter if an optimizer is compiled."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


for method in vars(torch.optim.Optimizer).values():   # these decorators call what they find under this name
    if hasattr(method, '__wrapped__'):
        setattr(method.__wrapped__, '__dynamo_disable', method.__wrapped__)


def adamw(model: nn.Module, learning_rate: float, betas: tuple, weight_decay: float) -> AdamW:
    """Return AdamW (Loshchilov & Hutter, 2019) for the trainable parameters of a model, in torch's fused form, which
    updates all of them in one pass."""
    fused = next(model.parameters()).device.type != 'meta'   # which has no numbers, and no fused form
    return AdamW(param_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=fused)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, AdamW for all else: embeddings, head, biases, norms.

    Muon (Jordan et al., 2024) moves a matrix by its momentum, made orthogonal, so that no direction is favoured. Its
    steps are scaled to the size of AdamW's (Liu et al., 2025, eq. 4): one learning rate serves both. Matrices of one
    shape are handled in one batch, which is what makes it cheap. dtype: that of its matrix products.
    """

    def __init__(self, model, learning_rate, betas, weight_decay, momentum=0.95, dtype=torch.bfloat16):
        of_blocks = {p for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad}
        self.adamw = adamw(model, learning_rate, betas, weight_decay)
        matrices = [p for group in self.adamw.param_groups for p in group['params'] if p in of_blocks]
        for group in self.adamw.param_groups:
            group['params'] = [p for p in group['params'] if p not in of_blocks]
        self.dtype = dtype
        muon = {'params': matrices, 'lr': learning_rate, 'weight_decay': weight_decay, 'momentum': momentum}
        super().__init__([*self.adamw.param_groups, muon], defaults={})

    @torch.no_grad()
    def step(self):
        *self.adamw.param_groups, muon = self.param_groups
        self.adamw.state = self.state
        self.adamw.step()
        self.step_matrices(**muon)

    def step_matrices(self, params, lr, weight_decay, momentum):
        """Make a step of Muon."""
        by_shape = {}   # [(parameter, direction)], where a matrix and a transposed one have the same shape
        for p in params:
            if p.grad is None:
                continue
            if p not in self.state:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
            mean = self.state[p]['momentum_buffer'].lerp_(p.grad, 1 - momentum)
            direction = full_tensor(p.grad.lerp(mean, momentum)).to(self.dtype)          # Nesterov's look ahead
            if direction.size(0) > direction.size(1):
                direction = direction.T
            by_shape.setdefault(direction.shape, []).append((p, direction))
        for shape, pairs in by_shape.items():
            size = 0.2 * math.sqrt(shape[1])   # the root mean square of AdamW's steps, at full rank
            directions = orthogonalise(torch.stack([direction for _, direction in pairs]))
            for (p, _), direction in zip(pairs, directions):
                if direction.shape != p.shape:
                    direction = direction.T
                p.mul_(1 - lr * weight_decay)
                p.add_(distribute_like(direction.to(p.dtype), p), alpha=-lr * size)


def orthogonalise(matrices: Tensor, steps=5) -> Tensor:
    """Return matrices, (n, rows, columns), with rows <= columns, with their singular values brought near 1, between
    about 0.7 and 1.2, and the same singular vectors: a Newton-Schulz iteration of degree 5, whose coefficients make
    small values grow fast (Jordan et al., 2024)."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)   # no singular value above 1
    for _ in range(steps):
        a = x @ x.mT                                                                  # (n, rows, rows)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


def build(optimizer: str, model: nn.Module, learning_rate: float, betas: tuple, weight_decay: float, dtype):
    """Return the optimizer of a name for the trainable parameters of a model. dtype: of the run's matrix products."""
    if optimizer == 'adamw':
        return adamw(model, learning_rate, betas, weight_decay)
    bfloat16 = dtype == torch.bfloat16   # orthogonalise() needs its range, which float16 lacks
    return Muon(model, learning_rate, betas, weight_decay, dtype=torch.bfloat16 if bfloat16 else torch.float32)


def load_state(optimizer, state: dict):
    """Load the moments of a saved optimizer. Learning rates, betas and weight decay stay those of the new one, because
    the configuration of this run decides them."""
    groups = []
    for saved, new in zip(state['param_groups'], optimizer.param_groups, strict=True):
        groups.append({**saved, **{name: value for name, value in new.items() if name != 'params'}})
    params = [p for group in optimizer.param_groups for p in group['params']]
    moments = {i: {key: distribute_like(value, params[i]) if torch.is_tensor(value) else value
                   for key, value in of.items()} for i, of in state['state'].items()}
    optimizer.load_state_dict({**state, 'state': moments, 'param_groups': groups})


def learning_rate_at(step: int, schedule: str, peak: float, low: float, warmup_iters: int, decay_iters: int,
                     cooldown_iters: int | None) -> float:
    """Return the learning rate of a step, counted from 0.

    It rises linearly over warmup_iters steps. Then 'cosine' falls from peak to low until decay_iters (Loshchilov &
    Hutter, 2017); 'linear' stays at peak and falls over the last cooldown_iters before decay_iters (WSD, Hu et al.,
    2024), or over all of it if cooldown_iters is None; 'constant' stays. After decay_iters the first two stay at low.
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if schedule == 'constant':
        return peak
    start = warmup_iters
    if schedule == 'linear' and cooldown_iters is not None:
        start = max(start, decay_iters - cooldown_iters)
    done = min(max((step - start) / max(decay_iters - start, 1), 0.0), 1.0) if step < decay_iters else 1.0
    left = 1 - done if schedule == 'linear' else (1 + math.cos(math.pi * done)) / 2
    return low + (peak - low) * left


def scheduled_rate(step: int, options: dict, planned: int | None = None) -> float:
    """Return the learning rate of a step, as the options of a run say.

    planned: the steps that fit into max_minutes, None if it sets no limit. If it does, the learning rate falls until
    the end of the run, and the warmup is at most a tenth of it.
    """
    warmup = options['warmup_iters']
    decay = options['max_iters'] if options['lr_decay_iters'] is None else options['lr_decay_iters']
    if planned is not None:
        warmup = min(warmup, planned // 10)
        decay = planned
    return learning_rate_at(step, options['schedule'], options['learning_rate'], options['min_lr'], warmup, decay,
                            options['cooldown_iters'])
