"""
The curves of runs, from the log.jsonl in their folders: as a picture, with matplotlib, or as text, without.
"""

import atexit
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatgpt.errors import UserError, exit_callbacks

SCALES = {'step': 'step', 'tokens': 'tokens', 'seconds': 'seconds', 'flops': 'FLOPs'}   # what runs along the bottom
PANELS = {'loss': 'loss, nats per token', 'lr': 'learning rate', 'grad_norm': 'norm of the gradient',
          'mfu': 'MFU', 'tok_per_s': 'tokens per second'}


# ---------------------------------------------------------------------------------------------------------------------
# from a log to curves

@dataclass
class Run:
    name: str
    log: Path
    evals: list    # records of evaluations, as train.py logs them
    lines: list    # records of single steps
    best: dict     # the evaluation with the lowest validation loss


@dataclass
class Curve:
    """Points of one panel: 'val' and 'train' (at evaluations), 'raw' (of single steps), 'smooth' (a mean of those)."""
    kind: str
    x: np.ndarray
    y: np.ndarray
    width: int = 1   # how many values each is the mean of


def read(folder):
    """The Run in a folder. UserError if it has no log, or that holds no evaluation; a line that cannot be read, such as
    a power cut leaves, is reported and left out."""
    path = Path(folder) / 'log.jsonl'
    if path.exists() and not path.is_file():   # a device may have no end
        raise UserError(f'{path} is no ordinary file: there is nothing to draw')
    try:
        records, broken = parse(path)
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}; give folders that train.py has written') from None
    if broken:
        print(f'{path}: left out line {", ".join(broken[:5])}{" ..." if broken[5:] else ""}, no JSON object',
              file=sys.stderr)
    evals = [r for r in records if {'step', 'train_loss', 'val_loss'} <= r.keys()]
    if not evals:
        raise UserError(f'{path} holds no evaluation yet: there is nothing to draw')
    best = min(evals, key=lambda r: r['val_loss'])
    return Run(Path(folder).resolve().name, path, evals, [r for r in records if 'iter' in r], best)


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
    """Writes records into out_dir/tensorboard, for TensorBoard. A run that resumes at a step takes the place of what is
    there from then on. Needs tensorboard: UserError without it."""

    def __init__(self, out_dir, step=None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError('tensorboard=True needs the tensorboard package: pip install tensorboard') from None

        self.new_writer = functools.partial(SummaryWriter, Path(out_dir) / 'tensorboard', purge_step=step)
        self.writer = None   # made for the first record: before, an earlier run may be in the folder
        for record in [] if step is None else parse(Path(out_dir) / 'log.jsonl')[0]:
            if record.get('step') == step:   # the evaluation before the step is not made again
                self.show(record, step)

    def show(self, record, step):
        if not self.writer:
            self.writer = self.new_writer()
            for finish in (exit_callbacks.append, atexit.register):
                finish(self.writer.close)
        for name, value in record.items():
            if is_number(value):
                self.writer.add_scalar(name, value, step)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def parse(path):
    """The records in a log, each with its numbers only, and the numbers of lines that are none."""
    records, broken = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            records.append({name: value for name, value in json.loads(line).items() if is_number(value)})
        except (ValueError, AttributeError):
            broken.append(str(number))
    return records, broken


def column(records, name):
    return np.array([r.get(name, math.nan) for r in records], dtype=float)


def places(run, by):
    """Positions of the evaluations of a run and of its single steps on a scale: two arrays. A step knows its number;
    the rest follows from the evaluations around it, or after the last one from the pace until then."""
    at, steps, marks = column(run.evals, 'step'), column(run.lines, 'iter'), column(run.evals, by)
    if by == 'step':
        return marks, steps
    if np.isnan(marks).any():
        others = ' or '.join(f'--by={name}' for name in SCALES if not np.isnan(column(run.evals, name)).any())
        raise UserError(f'{run.log} does not say the {by} of its evaluations: give {others}')
    pace = marks[-1] / at[-1] if at[-1] else math.nan
    return marks, np.interp(steps, at, marks) + pace * np.maximum(steps - at[-1], 0)


def smoothed(y, width):
    """The means of the `width` values around each; of as many before as after, so that a steep beginning stays where
    it is, except near the end, where only those before are left."""
    i, n = np.arange(len(y)), len(y)
    reach = np.minimum(i, width // 2)
    sums = np.concatenate(([0.0], np.cumsum(y)))
    first, last = i - reach, np.minimum(i + reach + 1, n)
    return (sums[last] - sums[first]) / (last - first)


def curves_of(run, panel, by='step', smooth=None, log_x=False, log_y=False):
    """The curves of a panel. smooth: how many values a smoothed one averages, None: a 12th of them, 1: there is none.
    What a logarithmic axis has no place for is left out."""
    marks, steps = places(run, by)
    y = column(run.lines, panel)
    known = ~np.isnan(y) & ~np.isnan(steps)   # gradients may be infinite, the first step has no MFU
    x, y = steps[known], y[known]
    width = max(len(y) // 12, 1) if smooth is None else smooth
    found = [Curve('raw', x, y)] if len(y) else []
    if width > 1 and len(y) > 2 and panel != 'lr':
        found.append(Curve('smooth', x, smoothed(y, width), width))
    if panel == 'loss':
        found += [Curve(kind, marks, column(run.evals, f'{kind}_loss')) for kind in ('train', 'val')]
    if not found:
        raise UserError(f'{run.log} says nothing of {panel}: leave it out of panels')
    for curve in found:
        seen = ((curve.x > 0) | (not log_x)) & ((curve.y > 0) | (not log_y))
        curve.x, curve.y = curve.x[seen], curve.y[seen]
    if not any(len(curve.x) for curve in found):
        raise UserError(f'{run.log}: {panel} by {by} is nowhere above zero: leave log_x and log_y away')
    return found


# ---------------------------------------------------------------------------------------------------------------------
# numbers on an axis

def short(value):
    """A number in a few characters: 0.25, 1,500, 20k, 3.2M, 1e15, 6e-4."""
    size = abs(value)
    if size and not 1e-3 <= size < 1e15:
        power = math.floor(math.log10(size) + 1e-9)
        return f'{value / 10**power:.3g}e{power}'
    for unit, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if size >= 10 * unit or size >= unit > 1e3:
            return f'{value / unit:.4g}{letter}'
    return f'{value:,.0f}' if size >= 1000 else f'{value:.4g}'


def ticks(low, high, n, log=False):
    """About n round numbers from low to high."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        marks = [mark for mark in marks if low <= mark <= high]
        if len(marks) > n:
            marks = [mark for mark in marks if f'{mark:e}'[0] == '1']
            marks = marks[::-(-len(marks) // n)]
        if len(marks) > 2:
            return marks
    step = (high - low) / n or 1.0
    power = 10.0**math.floor(math.log10(step))
    step = min((digit * power for digit in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / step)))
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def names_of(runs):
    """What to call each run: its folder, as much of the path as tells them apart; nothing if there is one."""
    if len(runs) == 1:
        return ['']
    names = [run.name for run in runs]
    return [f'{name if names.count(name) == 1 else run.log.parent}: ' for name, run in zip(names, runs)]


def best_of(run, by):
    """Return a text with the lowest validation loss of a run and its step."""
    where = f'step {run.best["step"]:,.0f}' if by == 'step' else f'{short(run.best[by])} {SCALES[by]}'
    return f'best {run.best["val_loss"]:.4f} at {where}'


# ---------------------------------------------------------------------------------------------------------------------
# as a picture

COLORS = ('#d1495b', '#00798c', '#edae49', '#30638e', '#6a994e', '#8e5ea2', '#3d3d3d', '#f28482')
LOOKS = {'raw': {'alpha': 0.25, 'linewidth': 0.8}, 'smooth': {'alpha': 0.6, 'linewidth': 1.5},
         'train': {'linestyle': '--', 'linewidth': 1.2}, 'val': {'linewidth': 1.8, 'marker': 'o', 'markersize': 3.5},
         'lr': {'linewidth': 1.5}}


def picture(path, runs, by='step', panels=('loss',), smooth=None, log_x=False, log_y=False):
    """Draw the curves of runs into a file whose ending says the format. Needs matplotlib: ImportError without it.
    UserError if the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.5 + 2 * len(panels)), layout='constrained')
    heights = [1.6 if panel == 'loss' else 1 for panel in panels]
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(grid, panels):
        for i, (run, name) in enumerate(zip(runs, names_of(runs))):
            for curve in curves_of(run, panel, by, smooth, log_x, log_y and panel != 'lr'):
                if curve.kind == 'train' and name:
                    continue   # too much to look at
                look = {**LOOKS['lr' if panel == 'lr' else curve.kind],
                        'color': COLORS[(i if name else curve.kind != 'val') % len(COLORS)]}
                if len(curve.x) > 60:
                    look['marker'] = None
                if panel == 'loss' and (curve.kind == 'val' or curve.kind != 'raw' and not name):
                    words = {'smooth': f'training, mean of {curve.width}', 'train': 'training, as evaluated',
                             'val': f'validation, {best_of(run, by)}'}
                    look['label'] = name + words[curve.kind]
                axes.plot(curve.x, curve.y, gid=f'{panel}-{curve.kind}', **look)
                if panel == 'loss' and curve.kind == 'smooth' and i == len(runs) - 1 > 0:
                    axes.plot([], [], color='gray', **LOOKS['smooth'], label=f'training, mean of {curve.width}')
            if panel == 'loss' and (run.best[by] > 0 or not log_x):
                axes.plot(run.best[by], run.best['val_loss'], color=COLORS[i % len(COLORS)], marker='*', markersize=14,
                          markeredgecolor='white', zorder=5)
        axes.set_ylabel(PANELS[panel])
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
        if log_y and panel != 'lr':
            make_log(axes, 'y')
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        if panel == 'loss':
            axes.legend(frameon=False)
    if log_x:
        make_log(grid[-1], 'x')
    grid[-1].xaxis.set_major_formatter(lambda value, _: short(value))
    grid[-1].set_xlabel(SCALES[by])
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot write {path}: {getattr(error, "strerror", None) or error}') from None


def make_log(axes, way):
    """Make an axis of a picture, 'x' or 'y', logarithmic, with round numbers on it."""
    axes.set(**{f'{way}scale': 'log'})
    axis = getattr(axes, f'{way}axis')
    axis.set_ticks([], minor=True)
    axis.set_ticks(ticks(*getattr(axes, f'get_{way}lim')(), 7, log=True))


def leave_picture(out_dir):
    """Write out_dir/loss.png where matplotlib is. No run fails for its picture: what goes wrong is one line."""
    try:
        picture(Path(out_dir) / 'loss.png', [read(out_dir)])
    except ImportError:
        pass
    except UserError as error:
        print(error, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# as text

DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])   # of a braille character, 4 x 2
INKS = (33, 36, 35, 32, 34, 31)   # the terminal's own colours: yellow, cyan, magenta, green, blue, red
PLAIN = {0x2800: ' ', **dict.fromkeys(range(0x2801, 0x2900), '.'), **dict(zip(map(ord, '│┤─┬└●★'), '||-++o*'))}


@dataclass
class Axis:
    """A range of numbers, from left to right or from bottom to top."""
    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, arrays, log):
        """That of all numbers in some arrays."""
        values = np.concatenate(arrays)
        low, high = values.min(), values.max()
        return cls(low, high if high > low else low + (abs(low) or 1) / 10, log)

    def place(self, values, n):
        """Which of n places numbers have, the first being 0."""
        low, high, values = (np.log(v) if self.log else np.asarray(v) for v in (self.low, self.high, values))
        return np.rint((values - low) / (high - low) * (n - 1)).astype(int)

    def ticks(self, n, places):
        """{place: text} of about n round numbers."""
        return {int(self.place(mark, places)): short(mark) for mark in ticks(self.low, self.high, n, self.log)}


@dataclass
class Layer:
    curve: Curve
    marker: str    # over some of its points; '' for none
    ink: int
    words: str     # in the legend


def layers_of(runs, by, panel, *how):
    """What a chart shows: of one run training and validation; of several, marked a, b, c, only the latter."""
    found = []
    for i, (run, name) in enumerate(zip(runs, names_of(runs))):
        kinds = {curve.kind: curve for curve in curves_of(run, panel, by, *how)}
        marker, ink = chr(ord('a') + i % 26) if name else '', INKS[i % len(INKS)]
        if panel == 'loss' and not name:
            training = kinds.get('smooth', kinds['train'])
            mean = f', mean of {training.width}' if training.width > 1 else ''
            found.append(Layer(training, '', INKS[1], f'training{mean}'))
        if panel == 'loss':
            found.append(Layer(kinds['val'], marker or '●', ink, f'{name}validation, {best_of(run, by)}'))
        else:
            found.append(Layer(kinds.get('smooth') or kinds['raw'], marker, ink, name.removesuffix(': ')))
    return found


def chart(runs, by='step', panel='loss', smooth=None, log_x=False, log_y=False, width=80, height=16, color=False):
    """The curves of a panel in lines of at most `width` characters, `height` of them for the curves. color: in the
    colours of the terminal."""
    layers = layers_of(runs, by, panel, smooth, log_x, log_y)
    across = Axis.over([layer.curve.x for layer in layers], log_x)
    up = Axis.over([layer.curve.y for layer in layers], log_y)
    at_rows = {height - 1 - row: words for row, words in up.ticks(max(height // 3, 3), height).items()}
    margin = max(map(len, at_rows.values()), default=0)
    columns = max(width - margin - 2, 20)

    def spot(x, y):   # in dots, from the top left
        return across.place(x, 2 * columns), 4 * height - 1 - up.place(y, 4 * height)

    dots, inks = np.zeros((height, columns), int), np.zeros((height, columns), int)
    signs = {}   # (row, column) -> what stands over the dots
    for layer in layers:
        points = list(zip(*spot(layer.curve.x, layer.curve.y)))
        for (x0, y0), (x1, y1) in zip(points, points[1:] or points):
            n = max(abs(x1 - x0), abs(y1 - y0)) + 1
            c, r = np.rint(np.linspace((x0, y0), (x1, y1), n)).astype(int).T
            np.bitwise_or.at(dots, (r // 4, c // 2), DOTS[r % 4, c % 2])
            inks[r // 4, c // 2] = layer.ink
        free = 0
        for x, y in points:
            if layer.marker and x // 2 >= free:   # not so many that they hide the line
                signs[y // 4, x // 2], free = (layer.marker, layer.ink), x // 2 + 4
    for run, layer in zip(runs, [layer for layer in layers if layer.curve.kind == 'val']):
        if run.best[by] > 0 or not log_x:
            x, y = spot(run.best[by], run.best['val_loss'])
            signs[y // 4, x // 2] = '★', layer.ink

    def painted(sign, ink):
        return f'\x1b[{ink}m{sign}\x1b[0m' if color and ink else sign

    lines = [PANELS[panel]]
    for r in range(height):
        cells = (painted(*signs.get((r, c), (chr(0x2800 + dots[r, c]) if dots[r, c] else ' ', inks[r, c])))
                 for c in range(columns))
        lines.append(f'{at_rows.get(r, ""):>{margin}} {"┤" if r in at_rows else "│"}{"".join(cells)}'.rstrip())
    lines += [f'{"":{margin}} {line}' for line in bottom(across, SCALES[by], columns)]
    lines += [f'{"":{margin}}   {painted(layer.marker or "─", layer.ink)} {layer.words}' for layer in layers
              if layer.words]
    return '\n'.join(lines)


def bottom(across, name, columns):
    """The lines under a chart: the axis, and its numbers with its name, where there is room for it."""
    axis, words = ['─'] * columns, ''
    for place, number in across.ticks(max(columns // 14, 2), columns).items():
        axis[place] = '┬'
        start = min(max(place - len(number) // 2, 0), columns - len(number))
        if not words or start > len(words) + 1:
            words = words.ljust(start) + number
    start = columns - len(name)
    if start <= len(words) + 1:   # the last number is in the way: what is before it may leave more room
        return ['└' + ''.join(axis), ' ' + words, ' ' + name.rjust(columns)]
    return ['└' + ''.join(axis), ' ' + words.ljust(start) + name]


def encodable(text):
    """A chart as stdout can print it: in ASCII, if its encoding lacks the signs."""
    try:
        text.encode(sys.stdout.encoding or 'ascii')
    except UnicodeError:
        return text.translate(PLAIN)
    return text
