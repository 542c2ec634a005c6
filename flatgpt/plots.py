"""
The curves of runs, from the log.jsonl in their folders: as a picture by matplotlib, as text by plotext. While a run
goes on, Weights & Biases and TensorBoard get its records.
"""

import atexit
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatgpt.errors import UserError, exit_callbacks, nothing_at

SCALES = {'step': 'step', 'tokens': 'tokens', 'seconds': 'seconds', 'flops': 'FLOPs'}   # of the horizontal axis
PANELS = {'loss': 'loss, nats per token', 'bits_per_byte': 'bits per byte of the validation text',
          'bits_per_character': 'bits per character of the validation text', 'lr': 'learning rate',
          'accuracy': 'pairs ranked rightly', 'margin': 'margin of rewards',
          'chosen_reward': 'reward of chosen', 'rejected_reward': 'reward of rejected',
          'distance': 'distance from the reference', 'reward': 'reward', 'length': 'tokens of an answer',
          'entropy': 'entropy, nats per token', 'kl': 'KL divergence from the first model', 'clipped': 'clipped tokens',
          'no_signal': 'groups without signal', 'grad_norm': 'norm of the gradient',
          'mfu': 'MFU', 'tok_per_s': 'tokens per second'}
COLORS = ('#d1495b', '#00798c', '#edae49', '#30638e', '#6a994e', '#8e5ea2', '#3d3d3d', '#f28482')
STYLES = {'raw': {'alpha': 0.25, 'linewidth': 0.8}, 'smooth': {'alpha': 0.6}, 'train': {'linestyle': '--'},
          'val': {'linewidth': 1.8, 'marker': '.'}}


@dataclass
class Run:
    name: str      # its folder
    log: Path
    evals: list    # records of evaluations, as scripts log them, without values that are not finite numbers
    steps: list    # records of single steps
    best: dict     # the evaluation with the lowest validation loss


def read(folder) -> Run:
    """The Run in a folder. UserError if it has no log with an evaluation. Lines that cannot be read, such as a power
    cut leaves, are skipped and reported."""
    path = Path(folder) / 'log.jsonl'
    try:
        records, broken = parse(path)
    except OSError as error:
        reason = f'cannot read {path}: {error.strerror}' if os.path.isdir(folder) else nothing_at(folder)
        raise UserError(f'{reason}; give folders that train.py has written') from None
    if broken:
        print(f'{path}: skipped line {", ".join(broken)}, not a JSON object', file=sys.stderr)
    evals = [record for record in records if {'step', 'val_loss'} <= record.keys()]
    if not evals:
        raise UserError(f'{path} holds no evaluation yet: there is nothing to draw')
    best = min(evals, key=lambda record: record['val_loss'])
    name = os.fsencode(Path(folder).resolve().name).decode(errors='backslashreplace')   # which a picture can show
    return Run(name, path, evals, [record for record in records if 'iter' in record], best)


def parse(path) -> tuple[list[dict], list[str]]:
    """The records in a log, each with its finite numbers, and the numbers of lines that are not records."""
    records, broken = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            records.append({name: value for name, value in json.loads(line).items() if is_number(value)})
        except (ValueError, AttributeError):
            broken.append(str(number))
    return records, broken


def is_number(value) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def column(records, name):
    return np.array([record.get(name, math.nan) for record in records], dtype=float)


def positions(run: Run, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the evaluations and the single steps of a run are on a scale. A step knows its number; the rest follows
    from the evaluations around it, or after the last one from the mean pace until then."""
    at, steps, marks = column(run.evals, 'step'), column(run.steps, 'iter'), column(run.evals, by)
    if by == 'step':
        return marks, steps
    if np.isnan(marks).any():
        raise UserError(f'{run.log} does not say the {by} of its evaluations: give another --by, such as step')
    pace = marks[-1] / at[-1] if at[-1] else math.nan
    return marks, np.interp(steps, at, marks) + pace * np.maximum(steps - at[-1], 0)


def curves(run: Run, panel: str = 'loss', by: str = 'step', smooth: int | None = None, log_x: bool = False,
           log_y: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """{kind: (x, y, label)} of the curves of a panel: 'raw' of single steps, 'smooth' of means over them, and at
    evaluations 'val' and for the loss 'train'. smooth: how many steps a mean is over; None: a 12th of them, 1: no such
    curve. What a logarithmic axis has no place for is dropped."""
    marks, steps = positions(run, by)
    y = column(run.steps, panel)
    known = ~np.isnan(y) & ~np.isnan(steps)   # gradients may be infinite, the first step has no MFU
    x, y = steps[known], y[known]
    found = {'raw': (x, y, 'training, single steps' if panel == 'loss' else '')} if len(y) else {}
    width = min(max(len(y) // 12, 1) if smooth is None else smooth, len(y))
    if width > 1 and panel != 'lr':
        means = np.convolve(y, np.ones(width) / width, 'valid')
        found['smooth'] = x[width // 2:][:len(means)], means, f'training, mean of {width}'
    if panel == 'loss':
        at = f'step {run.best["step"]:,.0f}' if by == 'step' else f'{short(run.best[by])} {SCALES[by]}'
        if 'train_loss' in run.best:
            found['train'] = marks, column(run.evals, 'train_loss'), 'training, as evaluated'
        found['val'] = marks, column(run.evals, 'val_loss'), f'validation, best {run.best["val_loss"]:.4f} at {at}'
    elif panel in run.best:
        found['val'] = marks, column(run.evals, panel), f'{run.best[panel]:.4f} at the best loss'
    elif f'val_{panel}' in run.best:
        best = f'held-out questions, best {run.best[f"val_{panel}"]:.4f}'
        found['val'] = marks, column(run.evals, f'val_{panel}'), best
    for kind, (x, y, label) in found.items():
        seen = ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
        found[kind] = x[seen], y[seen], label
    if not any(len(x) for x, _, _ in found.values()):
        raise UserError(f'{run.log} has nothing to draw of {panel} by {by}: choose other panels or axes')
    return found


def comparable(runs: list[Run]) -> bool:
    """Whether losses per token of runs can be compared: as far as is known, their tokens are as long as each other."""
    ratios = [run.best['val_loss'] / run.best['bits_per_byte'] for run in runs if run.best.get('bits_per_byte')]
    return not ratios or max(ratios) < 1.001 * min(ratios)


def labels(runs: list[Run]) -> list[str]:
    """What to call each run: its folder, as much of the path as tells them apart; nothing if there is one."""
    names = [run.name for run in runs]
    paths = [name if names.count(name) == 1 else run.log.parent for name, run in zip(names, runs)]
    return [f'{path}: ' for path in paths] if len(runs) > 1 else ['']


def short(value: float) -> str:
    """A number in a few characters: 0.25, 1.5k, 3.2M, 1e+15."""
    for unit, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if unit <= abs(value) < 1e15:
            return f'{value / unit:.4g}{letter}'
    return f'{value:.4g}'


def figure(runs: list[Run], by: str = 'step', panels=('loss',), smooth: int | None = None, log_x: bool = False,
           log_y: bool = False):
    """The matplotlib Figure of the curves of runs, one panel below another. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 2.5 + 2 * len(panels)), layout='constrained')
    grid = drawn.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels):
        for i, (run, name) in enumerate(zip(runs, labels(runs))):
            for kind, (x, y, label) in curves(run, panel, by, smooth, log_x, log_y).items():
                if not name or panel != 'loss' or kind == 'val':   # of several runs all would be too much to look at
                    color = COLORS[(i if name else int(kind != 'val')) % len(COLORS)]
                    axes.plot(x, y, color=color, label=label and name + label, gid=f'{panel}-{kind}', **STYLES[kind])
            if panel == 'loss':
                axes.plot(run.best[by], run.best['val_loss'], '*', color=COLORS[i % len(COLORS)], markersize=14)
                if not name:
                    axes.set_title(run.name)
        if panel == 'loss' or panel.startswith('bits'):
            axes.legend(frameon=False)
        axes.set_ylabel(PANELS[panel])
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
        for set_scale, axis, log in ((axes.set_xscale, axes.xaxis, log_x), (axes.set_yscale, axes.yaxis, log_y)):
            set_scale('log' if log else 'linear')
            if not log:
                axis.set_major_formatter(lambda value, _: short(value))
    grid[-1].set_xlabel(SCALES[by])
    return drawn


def save_picture(path, runs: list[Run], *how):
    """Write a figure() into a file whose ending names the format. UserError if that fails."""
    drawn = figure(runs, *how)
    try:
        with warnings.catch_warnings(action='ignore', category=UserWarning):   # of a font that lacks Chinese
            drawn.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {path}: {getattr(error, "strerror", None) or error}') from None


def leave_picture(out_dir):
    """Write out_dir/loss.png where matplotlib is installed. No run fails for its picture: an error is one line."""
    try:
        run = read(out_dir)
        panels = ('reward', 'length') if 'val_reward' in run.best else ('loss',)
        save_picture(Path(out_dir) / 'loss.png', [run], 'step', panels)
    except ImportError:
        pass
    except UserError as error:
        print(error, file=sys.stderr)


def chart(runs: list[Run], by: str = 'step', panel: str = 'loss', smooth: int | None = None, log_x: bool = False,
          log_y: bool = False, width: int = 80, height: int = 20, color: bool = False) -> str:
    """The curves of a panel as text: of one run training and validation; of several, drawn as a, b, c, only the latter.
    ImportError without plotext."""
    import plotext

    drawn = plotext.figure
    drawn.clear()
    drawn.theme('simple')
    drawn.plot_size(width, height)
    drawn.title(PANELS[panel])
    drawn.label(SCALES[by])
    legend = ''
    spans = [], []   # of x and of y
    for i, (run, name) in enumerate(zip(runs, labels(runs))):
        found = curves(run, panel, by, smooth, log_x, log_y)
        kinds = [next(kind for kind in ('smooth', 'raw', 'train', 'val') if kind in found)]
        if 'val' in found:
            kinds = ['val'] if name else sorted({*kinds, 'val'})
        for kind in kinds:
            x, y, label = found[kind]
            x, y = np.log(x) if log_x else x, np.log(y) if log_y else y
            marker = chr(ord('a') + i % 26) if name else '•' if kind == 'val' else 'braille'
            if len(x):
                drawn.draw(drawn.signal(x.tolist(), y.tolist(), marker=marker).lines())
                for span, values in zip(spans, (x, y)):
                    span += [values.min(), values.max()]
            if name or label:
                legend += f'\n  {marker.replace("braille", "⠒")} {name}{label}'.removesuffix(': ')
    for axis, span, log in (('x', spans[0], log_x), ('y', spans[1], log_y)):
        low, high = min(span), max(span)
        if low == high:   # a single point is in the middle
            margin = abs(high) / 10 or 1
            low, high = low - margin, high + margin
        marks = np.linspace(low, high, 5)
        drawn.ruler(axis).lim(low, high)
        drawn.ruler(axis).ticks(marks.tolist(), [short(mark) for mark in (np.exp(marks) if log else marks)])
    text = str(drawn.build()).rstrip()
    return (text if color else plotext.uncolorize(text)) + legend


def start_wandb(project: str, name: str, config: dict, run_id: str | None = None):
    """Start a run in Weights & Biases; returns the wandb module, whose log() takes the records. UserError if that does
    not work. config: {option: value}. run_id: of the run there that goes on; None: a new one."""
    try:
        import wandb
        wandb.init(project=project, name=name, config=config, id=run_id, resume='allow' if run_id else None)
    except ImportError:
        raise UserError('wandb_log=True needs the wandb package: pip install wandb') from None
    except wandb.Error as error:
        raise UserError(f'wandb: {error}; WANDB_MODE=offline keeps the log on this machine') from None
    return wandb


class Board:
    """Writes records into out_dir/tensorboard, for TensorBoard. A run that goes on from a step replaces what is there
    from then on. UserError without tensorboard."""

    def __init__(self, out_dir, step: int | None = None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError('tensorboard=True needs the tensorboard package: pip install tensorboard') from None

        self.writer = SummaryWriter(Path(out_dir) / 'tensorboard', purge_step=step)
        exit_callbacks.append(self.writer.close)
        atexit.register(self.writer.close)
        for record in [] if step is None else parse(Path(out_dir) / 'log.jsonl')[0]:
            if record.get('step') == step:   # the evaluation before the step is not made again
                self.show(record, step)

    def show(self, record: dict, step: int):
        """Write the numbers in a record of a step."""
        for name, value in record.items():
            if is_number(value):
                self.writer.add_scalar(name, value, step)
