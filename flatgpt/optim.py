"""
What moves the weights: which parameters decay, AdamW, Muon, and the learning rate of a step.
"""

import functools
import math
import re

import torch

from flatgpt.errors import UserError
from flatgpt.lora import finds
from flatgpt.runtime import distribute_like, full_tensor, works

SCHEDULES = ('cosine', 'linear', 'constant')
OPTIMIZERS = ('adamw', 'muon')


def param_groups(model, weight_decay):
    """Parameters in two groups: matrices, which decay, and biases and norms, which do not. Each trainable parameter is
    in exactly one; a tied one counts once."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]


class Freezer:
    """Keeps parameters of a model as they are: those that the regex freeze finds, 'wte|wpe', or from step to step, in
    '0: wte|h; 1000: wte; 2000:', where the last regex is none. An optimizer need not know those that stay for good.
    Raises UserError.

    .changes: whether it ever does.  .notes: what a user may not expect.
    """

    def __init__(self, model, freeze):
        by_steps = re.match(r'\s*\d+\s*:', freeze)
        parts = [part.partition(':') for part in freeze.split(';')] if by_steps else [('0', ':', freeze)]
        steps = [int(step) if step.strip().isdecimal() else None for step, _, _ in parts]
        if steps[0] != 0 or None in steps or steps != sorted(set(steps)):
            raise UserError(f"freeze={freeze!r}: expected a regex, or '0: regex; 1000: regex; ...' with rising steps")
        self.still = {step: frozen(model, regex.strip()) for step, (_, _, regex) in zip(steps, parts)}
        always = set.intersection(*self.still.values())
        self.trained = [p for p in model.parameters() if p.requires_grad and p not in always]
        for p in always:
            p.requires_grad_(False)
        self.changes, self.phase, self.total = len(steps) > 1, None, sum(p.numel() for p in model.parameters())
        names = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(p, []).append(name)
        self.notes = [f'{" is ".join(several)}: what holds the one holds the other' for p, several in names.items()
                      if len(several) > 1 and any(p in found for found in self.still.values())]

    def at(self, step):
        """Hold still what is to be at a step. Returns how many parameters are trained, or None if that has not changed
        or all of them are and ever will be."""
        phase = max(start for start in self.still if start <= step)
        if phase == self.phase:
            return None
        self.phase = phase
        if self.changes:
            for p in self.trained:
                p.requires_grad_(p not in self.still[phase])
        count = sum(p.numel() for p in self.trained if p.requires_grad)
        return count if self.changes or count < self.total else None


def frozen(model, regex):
    """The set of parameters that a regex finds, by any of the names of a tied one; none if it is empty."""
    named = list(model.named_parameters(remove_duplicate=False))
    found = {p for name, p in named if regex and finds(regex, name, 'freeze')}
    if regex and not found:
        some = ', '.join(list(dict(model.named_parameters()))[:4])
        raise UserError(f'freeze={regex!r} finds no parameter; there are {some}, ...')
    if len(found) == len(list(model.parameters())):
        tied = ' (lm_head.weight is transformer.wte.weight)' if len(named) > len(found) else ''
        raise UserError(f'freeze={regex!r} finds every parameter{tied}: there is nothing left to train')
    return found


def adamw(model, learning_rate, betas, weight_decay):
    """AdamW (Loshchilov & Hutter, 2019) for the trainable parameters of a model."""
    return adamw_of(param_groups(model, weight_decay), model, learning_rate, betas)


def adamw_of(groups, model, learning_rate, betas):
    """AdamW for groups of the parameters of a model, in torch's fused form, which updates all of them in one pass, or
    where that does not work in the form that torch prefers."""
    device = next(model.parameters()).device
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused_adamw_works(device) or None)


@functools.cache
def fused_adamw_works(device):
    """Whether torch's fused AdamW makes the right step on a device."""
    def trial():
        p = torch.ones(8, device=device)
        p.grad = torch.full_like(p, 0.5)
        torch.optim.AdamW([p], lr=0.1, weight_decay=0.2, fused=True).step()
        return torch.allclose(p, torch.full_like(p, 0.88))   # 1 - 0.1 * 0.2, and a first step as long as the rate

    return works(trial)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, AdamW for all else: embeddings, head, biases, norms.

    Muon (Jordan et al., 2024) moves a matrix by its momentum, made orthogonal, so that no direction is favoured. Its
    steps are scaled to the size of AdamW's (Liu et al., 2025, eq. 4): one learning rate serves both. Matrices of one
    shape are handled in one batch, which is what makes it cheap. dtype: that of its matrix products.
    """

    def __init__(self, model, learning_rate, betas, weight_decay, momentum=0.95, dtype=torch.bfloat16):
        of_blocks = {p for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad}
        rest = param_groups(model, weight_decay)
        matrices = [p for group in rest for p in group['params'] if p in of_blocks]
        for group in rest:
            group['params'] = [p for p in group['params'] if p not in of_blocks]
        self.adamw = adamw_of(rest, model, learning_rate, betas)
        self.dtype = dtype
        muon = {'params': matrices, 'lr': learning_rate, 'weight_decay': weight_decay, 'momentum': momentum}
        super().__init__([*self.adamw.param_groups, muon], defaults={})

    @torch.no_grad()
    def step(self):
        *self.adamw.param_groups, muon = self.param_groups
        self.adamw.state = self.state
        self.adamw.step()
        self.move(**muon)

    def move(self, params, lr, weight_decay, momentum):
        """One step of Muon."""
        alike = {}   # (parameter, direction) by shape, however it lies
        for p in params:
            if p.grad is None:
                continue
            if p not in self.state:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
            mean = self.state[p]['momentum_buffer'].lerp_(p.grad, 1 - momentum)
            direction = full_tensor(p.grad.lerp(mean, momentum)).to(self.dtype)          # Nesterov's look ahead
            alike.setdefault(tuple(sorted(p.shape)), []).append((p, flat(direction)))
        for (_, longer), pairs in alike.items():
            size = 0.2 * math.sqrt(longer)   # the root mean square of AdamW's steps, at full rank
            for (p, _), direction in zip(pairs, orthogonalise(torch.stack([direction for _, direction in pairs]))):
                direction = direction if direction.shape == p.shape else direction.T
                p.mul_(1 - lr * weight_decay)
                p.add_(distribute_like(direction.to(p.dtype), p), alpha=-lr * size)


def flat(matrix):
    """A matrix, turned so that it has no more rows than columns."""
    return matrix.mT if matrix.size(-2) > matrix.size(-1) else matrix


def orthogonalise(matrices, steps=5):
    """Matrices, (n, rows, columns), with no more rows than columns, with their singular values brought near 1, between
    about 0.7 and 1.2, and their singular vectors kept: a Newton-Schulz iteration of degree 5, whose coefficients make
    small values grow fast (Jordan et al., 2024)."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)   # no singular value above 1
    for _ in range(steps):
        a = x @ x.mT                                                                  # (n, rows, rows)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


def build(optimizer, model, learning_rate, betas, weight_decay, dtype):
    """The optimizer of a name, for the trainable parameters of a model; dtype is that of the run's matrix products."""
    if optimizer == 'adamw':
        return adamw(model, learning_rate, betas, weight_decay)
    bfloat16 = dtype == torch.bfloat16   # whose range orthogonalise needs: not float16
    return Muon(model, learning_rate, betas, weight_decay, dtype=torch.bfloat16 if bfloat16 else torch.float32)


def load_state(optimizer, state):
    """Take over the moments of a saved optimizer. Rates, betas and weight decay stay those of the new one, because the
    configuration of this run decides them."""
    ours = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    groups = [{**group, **options} for group, options in zip(state['param_groups'], ours, strict=True)]
    params = [p for group in optimizer.param_groups for p in group['params']]
    moments = {i: {key: distribute_like(value, params[i]) if torch.is_tensor(value) else value
                   for key, value in of.items()} for i, of in state['state'].items()}
    optimizer.load_state_dict({**state, 'state': moments, 'param_groups': groups})


def learning_rate_at(step, schedule, peak, low, warmup_iters, decay_iters, cooldown_iters):
    """The learning rate of a step, counted from 0.

    It rises linearly over warmup_iters steps; then 'cosine' falls from peak to low until decay_iters (Loshchilov &
    Hutter, 2017), 'linear' falls over the last cooldown_iters before decay_iters and stays at peak until then (WSD, Hu
    et al., 2024), over all of it if cooldown_iters is None; 'constant' stays. After decay_iters the first two stay at
    low.
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
