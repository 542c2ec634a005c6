"""
Scaling laws: the loss that N parameters reach after D tokens, fitted to runs, and how to split a budget between them.

After Hoffmann et al. (2022), "Training compute-optimal large language models", whose model was named Chinchilla. N is
what get_num_params() of model.py counts, losses are in nats per token, budgets in FLOPs.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch


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
