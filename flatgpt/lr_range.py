"""
The learning-rate range test (Smith, 2017): train for a few hundred steps while the rate rises from far too low to far
too high, and see up to which rate the loss falls.
"""

import json
import math
from pathlib import Path

from flatgpt.errors import UserError

STEPS, LOW, HIGH = 300, 1e-6, 1.0   # how many steps, and the rates of the first and the last
MARGIN = 3                          # what is suggested is so many times lower than what the loss just bears
NEAR = 10                           # steps on either side over which a loss is smoothed


class RangeTest:
    """A range test: which rate a step has, what its losses were, what follows from them."""

    def __init__(self):
        self.rates, self.losses = [], []

    def rate(self, step):
        """The rate of a step: each is the one before times the same factor."""
        return LOW * (HIGH / LOW) ** (step / (STEPS - 1))

    def add(self, rate, loss):
        """Keep the loss that an update at a rate began with. Returns whether the losses are so high by now that the
        test can end."""
        if math.isfinite(loss):
            self.rates.append(rate)
            self.losses.append(loss)
        return not math.isfinite(loss) or len(self.losses) > NEAR and min(self.losses[-NEAR:]) > self.losses[0] + 1

    def smooth(self):
        """Each loss, averaged with its neighbours."""
        near = [self.losses[max(i - NEAR, 0):i + NEAR + 1] for i in range(len(self.losses))]
        return [sum(part) / len(part) for part in near]

    def suggestion(self):
        """(learning rate or None, the reason)"""
        smooth = self.smooth()
        if len(smooth) <= NEAR:
            return None, 'the loss is no number from the first steps on: look for the error elsewhere'
        distances = sorted(abs(loss - mean) for loss, mean in zip(self.losses, smooth))
        noise = distances[len(distances) // 2] / 2
        low = min(smooth)
        edge = max(i for i, mean in enumerate(smooth) if mean <= low + noise)
        if edge < NEAR:
            return None, f'the loss rises from a rate of {self.rates[edge]:.1e} on: there is nothing to gain'
        if edge == len(smooth) - 1:
            return None, f'the loss does not rise even at a rate of {self.rates[-1]:.1e}: something is not trained'
        rate = self.rates[edge] / MARGIN
        fall = f'falls to {low:.3f}' if low < smooth[0] - noise else f'does not fall below {low:.3f}'
        return rate, (f'the loss {fall}, stays there up to a rate of {self.rates[edge]:.1e} and rises beyond, and a '
                      f'factor of {MARGIN} is a margin for a longer run')

    def report(self, out_dir):
        """Write out_dir/find_lr.jsonl and, with matplotlib, find_lr.png. Returns what to tell the user."""
        rate, reason = self.suggestion()
        path = Path(out_dir) / 'find_lr.jsonl'
        records = [{'lr': lr, 'loss': loss, 'smooth': mean}
                   for lr, loss, mean in zip(self.rates, self.losses, self.smooth())]
        try:
            path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
            picture = self.draw(path.with_suffix('.png'), rate)
        except OSError as error:
            raise UserError(f'cannot write {path}: {error.strerror}; make room') from None
        advice = f'try --learning_rate={rate:.1e}: {reason}' if rate else reason
        return f'{advice}; the curve is in {path}{f" and {picture}" if picture else ""}'

    def draw(self, path, rate):
        """Draw the curve; returns the path, or None without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        figure = Figure(figsize=(8, 4.5), layout='constrained')
        axes = figure.subplots()
        axes.semilogx(self.rates, self.losses, color='C0', alpha=0.25, linewidth=1)
        axes.semilogx(self.rates, self.smooth(), color='C0', label='loss, smoothed')
        if rate:
            axes.axvline(rate, color='C1', linestyle='--', label=f'suggested: {rate:.1e}')
        low, high = min(self.losses, default=0), max(self.losses[:NEAR], default=1)
        axes.set_ylim(low - 0.1, high + 0.5)
        axes.set(xlabel='learning rate', ylabel='loss, nats per token')
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=120)
        return path
