"""
What moves the weights: which parameters decay, AdamW, and the learning rate of a step.
"""

import math

import torch

from configurator import UsageError
from runtime import spread_like

SCHEDULES = ('cosine', 'linear', 'constant')


def param_groups(model, weight_decay):
    """Parameters in two groups: matrices, which decay, and biases and norms, which do not. Each trainable parameter is
    in exactly one; a tied one counts once."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]


def adamw(model, learning_rate, betas, weight_decay):
    """AdamW (Loshchilov & Hutter, 2019), in torch's fused form, which updates all parameters in one pass."""
    return torch.optim.AdamW(param_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)


def load_state(optimizer, state):
    """Take over the moments of a saved optimizer. Rates, betas and weight decay stay those of the new one, because the
    configuration of this run decides them."""
    ours = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    groups = [{**group, **options} for group, options in zip(state['param_groups'], ours, strict=True)]
    params = [p for group in optimizer.param_groups for p in group['params']]
    moments = {i: {key: spread_like(value, params[i]) if torch.is_tensor(value) else value for key, value in of.items()}
               for i, of in state['state'].items()}
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


def check_schedule(schedule):
    if schedule not in SCHEDULES:
        raise UsageError(f'schedule={schedule!r}: expected {", ".join(map(repr, SCHEDULES))}')
