"""
Loss curves of one run, or of several to compare, from their logs.

    python plot.py --runs=out-python-char                   writes out-python-char/loss.png
    python plot.py --runs=out-a,out-b --by=seconds --to=both.svg

Needs matplotlib: pip install matplotlib
"""

import json
import sys
from pathlib import Path

from configurator import UsageError, UserError, configure

# ---------------------------------------------------------------------------------------------------------------------
runs = 'out'             # folders with a log.jsonl, separated by commas
by = 'step'              # what runs along the bottom: 'step', 'tokens' or 'seconds'
to: str | None = None    # the picture, its ending says which kind; None: loss.png in the first folder
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

if by not in ('step', 'tokens', 'seconds'):
    raise UsageError(f"by={by!r}: expected 'step', 'tokens' or 'seconds'")
try:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
except ImportError:
    raise UserError('plot.py needs matplotlib: pip install matplotlib') from None

figure, axes = plt.subplots(figsize=(8, 4.5), layout='constrained')
folders = [Path(name) for name in runs.split(',')]
for i, folder in enumerate(folders):
    try:
        records = [json.loads(line) for line in (folder / 'log.jsonl').read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read {folder}/log.jsonl: {getattr(error, "strerror", None) or error}') from None
    evals = [r for r in records if 'step' in r]
    if not evals:
        raise UserError(f'{folder}/log.jsonl holds no evaluation yet')
    best = min(evals, key=lambda r: r['val_loss'])
    color, name = f'C{i}', f'{folder.name}: ' if len(folders) > 1 else ''
    if by == 'step':   # the other scales are known at evaluations only
        losses = [r for r in records if 'iter' in r]
        axes.plot([r['iter'] for r in losses], [r['loss'] for r in losses], color=color, alpha=0.25, linewidth=1)
    along = [r[by] for r in evals]
    axes.plot(along, [r['train_loss'] for r in evals], color=color, linestyle='--', label=f'{name}train')
    axes.plot(along, [r['val_loss'] for r in evals], color=color, marker='o', markersize=3,
              label=f'{name}validation, best {best["val_loss"]:.4f}')
    axes.plot(best[by], best['val_loss'], color=color, marker='*', markersize=12)
axes.set(xlabel=by, ylabel='loss, nats per token')
axes.grid(alpha=0.3)
axes.spines[['top', 'right']].set_visible(False)
axes.legend(frameon=False)

path = Path(to) if to else folders[0] / 'loss.png'
try:
    figure.savefig(path, dpi=120)
except (OSError, ValueError) as error:
    raise UserError(f'cannot write {path}: {getattr(error, "strerror", None) or error}') from None
print(f'wrote {path}', file=sys.stderr)
