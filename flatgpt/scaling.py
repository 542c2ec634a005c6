"""
Scaling laws: the loss that N parameters reach after D tokens, fitted to runs, how to split a budget between them, and
the size of a model for a run of some minutes on this machine.

After Hoffmann et al. (2022), "Training compute-optimal large language models", whose model was named Chinchilla. N is
what get_num_params() of model.py counts, losses are in nats per token, budgets in FLOPs.
"""

import itertools
import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from flatgpt import optim
from flatgpt.errors import UsageError
from flatgpt.start import new_config
from model import GPT


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta: the entropy of the text, what it costs that the model is finite, and what
    it costs that the tokens are."""
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, params, tokens):
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops, cost=6.0, power=1.0):
        """(params, tokens) of the lowest loss for a budget, if a token costs cost * params**power FLOPs.

        Where it lies, 1 % more parameters would help as much as the tokens that they cost would harm, that is where
        alpha A / N^alpha = power beta B / D^beta.
        """
        balance = self.alpha * self.A / (power * self.beta * self.B)
        params = (balance * (flops / cost)**self.beta)**(1 / (self.alpha + power * self.beta))
        return params, flops / (cost * params**power)

    def exponents(self):
        """(a, b): the optimum for a budget C of 6 N D grows as N ~ C^a, D ~ C^b."""
        return self.beta / (self.alpha + self.beta), self.alpha / (self.alpha + self.beta)


# As printed in Hoffmann et al. (2022), eq. 10; as in the LaTeX source of that paper, with two digits more; as fitted
# anew to the runs of its figure 4 by Besiroglu et al. (2024), "Chinchilla scaling: a replication attempt"
PRINTED = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
UNROUNDED = Law(E=1.6934, A=406.4, alpha=0.3392, B=410.7, beta=0.2849)
REPLICATION = Law(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)

# As fit() gives it for the runs in scaling.json, which are of the characters of Python code
SMALL = Law(E=1.0699, A=18.478, alpha=0.34268, B=747.94, beta=0.56407)
# Layers and width of the models to choose from; heads are 32 wide
SIZES = ((1, 32), (2, 32), (2, 64), (3, 64), (3, 96), (4, 96), (4, 128), (5, 160), (6, 192), (6, 256), (8, 320),
         (8, 384), (10, 512), (12, 768))
RATE = 5.6e-3 * 64   # the best learning rate times the width, as sweep.py has it


def power_law(x, y):
    """(c, p) of y = c x^p, by least squares on logarithms."""
    power, log_c = np.polyfit(np.log(x), np.log(y), 1)
    return np.exp(log_c), power


def isoflop_minimum(params, losses):
    """(params, loss) at the bottom of a parabola in log(params), fitted to runs of one budget (approach 2). Raises
    ValueError if there is no bottom: fewer than three sizes, or a parabola that opens downwards."""
    if len(set(params)) < 3:
        raise ValueError(f'{len(set(params))} sizes: a parabola takes three')
    x = np.log(params)
    a, b, c = np.polyfit(x - x.mean(), losses, 2)
    if a <= 0:
        raise ValueError('the losses of this budget have no minimum: add smaller and larger sizes')
    return np.exp(x.mean() - b / (2 * a)), c - b * b / (4 * a)


def fit(params, tokens, losses, start=None, delta=1e-3):
    """The Law of runs (approach 3): the least sum of Huber losses of log L, by LBFGS from the best points of a grid, or
    from a Law that is near.

    delta: the difference in log L beyond which a run counts by its distance, not its square, so that one that went
    wrong does not bend the law. It takes five runs at least, of several sizes at several numbers of tokens each.
    """
    n, d, log_l = (torch.tensor(np.log(values), dtype=torch.float64) for values in (params, tokens, losses))
    mid_n, mid_d = n.mean(), d.mean()
    n, d = n - mid_n, d - mid_d   # what A and B are at the middle of the runs hardly depends on alpha and beta

    def objective(theta):
        """The objective at theta, (..., 5): the logarithms of E, A and B, and alpha and beta."""
        e, a, b, alpha, beta = theta[..., None].unbind(-2)                            # (..., 1) each
        terms = torch.stack(torch.broadcast_tensors(e, a - alpha * n, b - beta * d))  # (3, ..., runs)
        error = (terms.logsumexp(0) - log_l).abs()
        return torch.where(error < delta, error**2 / (2 * delta), error - delta / 2).sum(-1)

    if start is None:
        low, middle = log_l.exp().min(), log_l.exp().median()
        slopes = (0.1, 0.3, 0.6, 1)
        starts = torch.tensor([[torch.log(low * e), torch.log((middle - low * e) * share),
                                torch.log((middle - low * e) * (1 - share)), alpha, beta]
                               for e, share, alpha, beta in itertools.product((0.1, 0.4, 0.7, 0.95), (0.2, 0.5, 0.8),
                                                                              slopes, slopes)], dtype=n.dtype)
        starts = starts[objective(starts).argsort()[:8]]
    else:
        starts = torch.tensor([[np.log(start.E), np.log(start.A) - start.alpha * mid_n,
                                np.log(start.B) - start.beta * mid_d, start.alpha, start.beta]], dtype=n.dtype)
    ends = []
    for theta in starts:
        theta = theta.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12,
                                      history_size=10, line_search_fn='strong_wolfe')

        def closure(theta=theta, optimizer=optimizer):
            optimizer.zero_grad()
            value = objective(theta)
            value.backward()
            return value

        optimizer.step(closure)
        ends.append(theta.detach())
    e, a, b, alpha, beta = min(ends, key=lambda theta: objective(theta).nan_to_num(torch.inf)).tolist()
    return Law(math.exp(e), math.exp(a + alpha * mid_n.item()), alpha, math.exp(b + beta * mid_d.item()), beta)


def expected_loss(params: float, tokens: float, unique: int) -> float:
    """The loss that SMALL expects of a model after some tokens out of a text of `unique`. Repeated tokens teach less
    than fresh ones, and parameters are worth less beyond those that fit the text (Muennighoff et al., 2023, eq. 5)."""
    fitting = (SMALL.alpha * SMALL.A * unique**SMALL.beta / (SMALL.beta * SMALL.B))**(1 / SMALL.alpha)
    return SMALL.loss(discounted(params, fitting, 5.3), discounted(tokens, unique, 15.4))


def discounted(amount: float, full: float, decay: float) -> float:
    """An amount of which only the first `full` counts in full: the n-th part of that size after it counts exp(-n /
    decay)."""
    excess = max(amount / full - 1, 0.0)
    return min(amount, full) + full * decay * (1 - math.exp(-excess / decay))


def choose_size(config, data, rt, clock=time.perf_counter) -> str:
    """Set n_layer, n_embd, n_head and learning_rate to those of the size that SMALL says has the lowest loss after
    max_minutes, and return a line about it. Sizes are timed on this machine, small ones first, until two in a row would
    have a higher loss. Raises UsageError.

    config: the Config of train.py. data: the Dataset. rt: the Runtime.
    """
    given = config.given & {'n_layer', 'n_embd', 'n_head', 'learning_rate'}
    if given:
        raise UsageError(f"size='auto' chooses {', '.join(sorted(given))}: give one or the other")
    if not config['max_minutes']:
        raise UsageError("size='auto' needs to know the time: give --max_minutes, such as --max_minutes=10")
    begun = clock()
    seconds = 60 * config['max_minutes']
    found = []   # (loss, n_layer, n_embd, parameters, tokens, seconds per step), one per size
    for n_layer, n_embd in SIZES:
        params, per_step = time_size(config, data, rt, n_layer, n_embd, clock)
        steps = 0.9 * seconds / per_step   # the rest is for evaluations and the start
        tokens = steps * config['gradient_accumulation_steps'] * config['batch_size'] * config['block_size']
        loss = expected_loss(params, tokens, len(data.data['train']))
        found.append((loss, n_layer, n_embd, params, tokens, per_step))
        late = rt.mean_number(clock() - begun) > 0.1 * seconds
        if late or (len(found) > 2 and found[-1][0] > found[-2][0] > found[-3][0]):
            break
    loss, n_layer, n_embd, params, tokens, per_step = min(found)
    chosen = {'n_layer': n_layer, 'n_embd': n_embd, 'n_head': max(n_embd // 32, 1), 'learning_rate': RATE / n_embd}
    for name, value in chosen.items():
        config.put(name, value, 'size')
    others = ', '.join(f'{other[1]}x{other[2]} {other[0] - loss:+.3f}' for other in found if other[0] > loss)
    return (f'max_minutes={config["max_minutes"]:g}: {n_layer} layers of width {n_embd}, {params:,} parameters, about '
            f'{tokens / 1e6:.1f}M tokens at {1000 * per_step:.0f} ms per step; expected loss of other sizes, in nats: '
            f'{others}')


def time_size(config, data, rt, n_layer: int, n_embd: int, clock) -> tuple[int, float]:
    """(parameters, seconds per step) of a size, by the fastest of three steps of training."""
    shape = {'n_layer': n_layer, 'n_embd': n_embd, 'n_head': max(n_embd // 32, 1)}
    with torch.random.fork_rng([]):   # the weights of the run are those of a run that is given the size
        model = GPT(new_config({**config, **shape}, data.padded_vocab_size)).to(rt.device)
    model.within_documents = bool(data.begins)
    opt = optim.build(config['optimizer'], model, 1e-9, (0.9, 0.95), 0.0, rt.dtype)
    times = []
    for step in range(4):   # the first one allocates memory
        rt.sync()
        begun = clock()
        x, y = data.train_batch(step, 0, 1, config['batch_size'], config['block_size'], rt.device)
        with rt.autocast():
            loss = model(x[0], y[0])[1]
        loss.backward()
        rt.sync()
        backward = clock()
        rt.clip_gradients(model, 1.0)
        opt.step()
        opt.zero_grad()
        rt.sync()
        per_step = clock() - begun
        micro_batches = config['gradient_accumulation_steps'] // rt.world_size   # of this process
        times.append(per_step + (backward - begun) * (micro_batches - 1))
    return model.get_num_params(), rt.mean_number(min(times[1:]))
