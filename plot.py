"""
Loss curves of one run, or of several to compare, from their logs: as a picture, or in the terminal.

    python plot.py --runs=out-python-char                           writes out-python-char/loss.png
    python plot.py --runs=out-python-char --text                    prints a chart in the terminal
    python plot.py --runs=out-a,out-b --by=seconds --to=both.svg
    python plot.py --runs=out-a --by=flops --log_x --log_y --panels=loss,lr,grad_norm

Pictures need matplotlib, charts in the terminal plotext: pip install matplotlib "plotext>=6"
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
runs = 'out'                 # folders with a log.jsonl, separated by commas
by = 'step'                  # what runs along the bottom: 'step', 'tokens', 'seconds' or 'flops'
panels = 'loss'              # comma-separated: loss,bits_per_byte,bits_per_character,lr,grad_norm,mfu,tok_per_s
smooth: int | None = None    # how many values each point of a smoothed curve averages, None: a 12th, 1: no such curve
log_x = False                # a logarithmic scale along the bottom
log_y = False                # a logarithmic scale up the side
to: str | None = None        # the picture, its ending says which kind; None: loss.png in the first folder
text = False                 # a chart in the terminal and no picture
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

import codecs
import os
import shutil
import sys
from pathlib import Path

from flatgpt import plots
from flatgpt.errors import UsageError, UserError

if by not in plots.SCALES:
    raise UsageError(f'by={by!r}: expected one of {", ".join(map(repr, plots.SCALES))}')
names = panels.split(',')
if not set(names) <= plots.PANELS.keys():
    raise UsageError(f'panels={panels!r}: expected some of {", ".join(map(repr, plots.PANELS))}, with commas')
if smooth is not None and smooth < 1:
    raise UsageError(f'smooth={smooth}: expected 1 or more')
if text and to:
    raise UsageError(f'text=True prints, to={to!r} writes a picture: give one of them')

found = [plots.read(folder) for folder in runs.split(',')]
if 'loss' in names and not plots.comparable(found):
    print('these runs have tokens of different lengths, so that losses per token do not compare: give '
          '--panels=bits_per_byte or bits_per_character', file=sys.stderr)
path = Path(to) if to else found[0].log.with_name('loss.png')
try:
    if text:
        width, lines = shutil.get_terminal_size()
        codecs.register_error('asterisk', lambda error: ('*' * (error.end - error.start), error.end))
        for panel in names:
            chart = plots.chart(found, by, panel, smooth, log_x, log_y, width - 1, max((lines - 4) // len(names), 12),
                                color=sys.stdout.isatty() and 'NO_COLOR' not in os.environ)   # no-color.org
            print(chart.encode(sys.stdout.encoding, 'asterisk').decode(sys.stdout.encoding))   # not all have line art
    else:
        plots.save_picture(path, found, by, names, smooth, log_x, log_y)
        print(f'wrote {path}', file=sys.stderr)
except ImportError as error:
    raise UserError(f'plot.py needs {error.name}, for charts in the terminal plotext, for pictures matplotlib: '
                    f'pip install "plotext>=6" matplotlib') from None
