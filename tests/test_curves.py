"""curves.py: from log.jsonl to curves, numbers on axes, and charts in text."""

import io
import json
import re
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import quick

from flatgpt import plots
from flatgpt.errors import UserError

SKY = [3.0, 2.0, 1.0, 1.5, 2.0]   # validation losses: the third is the best


def write(folder, val=SKY, every=10, per_step=100, extra='', **changes):
    """A run of as many evaluations, with a loss line at each step between them that is twice its number plus one."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i, loss in enumerate(val):
        step = i * every
        lines.append({'step': step, 'train_loss': loss + 0.5, 'val_loss': loss, 'best_val_loss': min(val[:i + 1]),
                      'tokens': step * per_step, 'flops': step * per_step * 6, 'seconds': 1.0 + i**2, **changes})
        lines += [{'iter': n, 'loss': 2.0 * n + 1, 'lr': 1e-3, 'grad_norm': 0.5, 'mfu': None}
                  for n in range(step, step + every)]
    (folder / 'log.jsonl').write_text(''.join(json.dumps({k: v for k, v in line.items() if v != 'drop'}) + '\n'
                                              for line in lines) + extra)
    return plots.read(folder)


# ---------------------------------------------------------------------------------------------------------------------
# logs

def test_a_log_is_read_into_evaluations_single_steps_and_the_best(tmp_path):
    run = write(tmp_path / 'one')
    assert (run.name, len(run.evals), len(run.lines), run.best['step']) == ('one', 5, 50, 20)


def test_lines_that_cannot_be_read_are_left_out_and_named(tmp_path, capsys):
    whole = write(tmp_path / 'run')
    damaged = write(tmp_path / 'run', extra='[1, 2]\n{"iter": 50, "lo')
    assert (damaged.evals, damaged.lines) == (whole.evals, whole.lines)
    assert capsys.readouterr().err == f'{tmp_path / "run" / "log.jsonl"}: left out line 56, 57, no JSON object\n'


def test_losses_that_are_no_numbers_are_no_points(tmp_path):
    run = write(tmp_path / 'run', extra='{"iter": 50, "loss": null}\n{"step": 60, "train_loss": 1, "val_loss": null}\n'
                                        '{"iter": 51, "loss": "low"}\n{"iter": 52, "loss": NaN}\n')
    assert len(run.evals) == 5
    raw = plots.curves_of(run, 'loss')[0]
    assert raw.kind == 'raw' and len(raw.x) == 50


def test_a_log_that_is_no_file_is_refused(tmp_path):
    (tmp_path / 'log.jsonl').symlink_to('/dev/zero')
    with pytest.raises(UserError, match='no ordinary file'):
        plots.read(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# curves

@pytest.mark.parametrize('by, at, steps', [
    ('step', [0, 10, 20, 30, 40], [0, 5, 15, 40, 45]),
    ('tokens', [0, 1000, 2000, 3000, 4000], [0, 500, 1500, 4000, 4500]),
    ('flops', [0, 6000, 12000, 18000, 24000], [0, 3000, 9000, 24000, 27000]),
    ('seconds', [1, 2, 5, 10, 17], [1, 1.5, 3.5, 17, 17 + 5 * 17 / 40]),   # by the mean pace after the end
])
def test_single_steps_are_placed_between_the_evaluations_around_them(tmp_path, by, at, steps):
    run = write(tmp_path / 'run')
    marks, places = plots.places(run, by)
    assert marks.tolist() == at
    np.testing.assert_allclose(places[[0, 5, 15, 40, 45]], steps)


def test_a_scale_that_an_old_log_lacks_is_refused_and_others_are_named(tmp_path):
    run = write(tmp_path / 'run', flops='drop')
    with pytest.raises(UserError, match='does not say the flops .* --by=step or --by=tokens or --by=seconds$'):
        plots.places(run, 'flops')


@quick
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(1, 40))
def test_smoothing_is_the_mean_of_the_neighbours(values, width):
    y, half = np.array(values), width // 2
    expected = [np.mean(y[i - min(i, half):i + min(i, half) + 1]) for i in range(len(y))]
    np.testing.assert_allclose(plots.smoothed(y, width), expected, atol=1e-9)


def test_a_straight_line_stays_where_it_is_when_smoothed():
    line = np.arange(20.0)
    np.testing.assert_allclose(plots.smoothed(line, 5)[:-2], line[:-2])


def test_a_panel_has_its_curves_and_only_loss_has_those_of_evaluations(tmp_path):
    run = write(tmp_path / 'run')
    kinds = {panel: [curve.kind for curve in plots.curves_of(run, panel)] for panel in ('loss', 'lr', 'grad_norm')}
    assert kinds == {'loss': ['raw', 'smooth', 'train', 'val'], 'lr': ['raw'], 'grad_norm': ['raw', 'smooth']}
    raw, smooth, train, val = plots.curves_of(run, 'loss')
    assert val.y.tolist() == SKY and train.y.tolist() == [y + 0.5 for y in SKY]
    assert (raw.y == 2 * raw.x + 1).all()
    assert smooth.width == 50 // 12 and (smooth.y == plots.smoothed(raw.y, smooth.width)).all()
    assert [curve.kind for curve in plots.curves_of(run, 'loss', smooth=1)] == ['raw', 'train', 'val']
    with pytest.raises(UserError, match='says nothing of mfu'):
        plots.curves_of(run, 'mfu')


def test_a_logarithmic_axis_has_no_place_for_zero(tmp_path):
    run = write(tmp_path / 'run')
    for curve in plots.curves_of(run, 'loss', log_x=True):
        assert curve.x.min() > 0
    assert len(plots.curves_of(run, 'loss', log_x=True)[3].x) == 4
    with pytest.raises(UserError, match='leave log_x and log_y away'):
        plots.curves_of(write(tmp_path / 'still', val=[1.0], every=0), 'loss', log_x=True)


# ---------------------------------------------------------------------------------------------------------------------
# numbers

@pytest.mark.parametrize('value, text', [
    (0, '0'), (0.25, '0.25'), (1.5, '1.5'), (999, '999'), (1500, '1,500'), (20_000, '20k'), (819_200, '819.2k'),
    (3.2e6, '3.2M'), (3e11, '300B'), (2e12, '2T'), (1e15, '1e15'), (6.25e21, '6.25e21'), (6e-4, '6e-4'),
    (-2e-5, '-2e-5'),
])
def test_numbers_are_short(value, text):
    assert plots.short(value) == text


@quick
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 10))
def test_ticks_are_few_even_and_inside(low, size, n):
    high = low + size
    assume(size > 1e-9 * abs(low))
    marks = plots.ticks(low, high, n)
    assert len(marks) <= 2.5 * n + 1
    assert all(low - 1e-6 * size <= mark <= high + 1e-6 * size for mark in marks)
    assert np.allclose(np.diff(marks), marks[1] - marks[0]) if len(marks) > 2 else True


@quick
@given(st.floats(-6, 15), st.floats(0.05, 12), st.integers(3, 8))
def test_logarithmic_ticks_are_few_rising_and_inside(power, decades, n):
    low, high = 10**power, 10**(power + decades)
    marks = plots.ticks(low, high, n, log=True)
    assert 0 < len(marks) <= 2.5 * n + 1
    assert sorted(set(marks)) == sorted(marks)
    assert all(low * (1 - 1e-9) <= mark <= high * (1 + 1e-9) for mark in marks)


# ---------------------------------------------------------------------------------------------------------------------
# charts in text

def cells(text, height=16):
    """The rows of a chart without what is left of its axis."""
    return [re.split('[│┤]', line, maxsplit=1)[1] for line in text.splitlines()[1:1 + height]]


def dots(rows):
    """The set of dots, (x, y) from the top left, that are lit."""
    found = set()
    for r, row in enumerate(rows):
        for c, sign in enumerate(row):
            if 0x2800 <= ord(sign) < 0x2900:
                found |= {(2 * c + dx, 4 * r + dy) for dx in (0, 1) for dy in range(4)
                          if (ord(sign) - 0x2800) & int(plots.DOTS[dy, dx])}
    return found


def test_a_chart_of_a_straight_line_is_one(tmp_path):
    run = write(tmp_path / 'run')
    text = plots.chart([run], panel='lr', width=43, height=16)
    assert len({y for _, y in dots(cells(text))}) == 1
    run.lines = [{'iter': i, 'lr': float(i)} for i in range(2)]
    lit = dots(cells(plots.chart([run], panel='lr', width=43, height=16)))
    n = max(x for x, _ in lit) + 1
    assert {x for x, _ in lit} == set(range(n)) and {y for _, y in lit} == set(range(64))
    assert all(abs((63 - y) / 63 - x / (n - 1)) < 0.02 for x, y in lit)


@pytest.mark.parametrize('how', [{}, {'log_x': True}, {'log_y': True}, {'by': 'seconds', 'log_x': True}])
@pytest.mark.parametrize('width, height', [(40, 8), (79, 16), (200, 40)])
def test_a_chart_has_its_size_and_the_best_loss_under_a_star(tmp_path, width, height, how):
    run = write(tmp_path / 'run', [30.0, 20.0, 10.0, 15.0, 20.0])   # the loss lines reach from 1 to 99
    text = plots.chart([run], smooth=1, width=width, height=height, **how)
    lines = text.splitlines()
    assert max(len(line) for line in lines[:height + 3]) <= width
    assert text.count('★') == 1 and 'validation, best 10.0000 at' in text
    rows = cells(text, height)
    star = next(r for r, row in enumerate(rows) if '★' in row)
    assert star == max(r for r, row in enumerate(rows) if set(row) & set('●★'))   # nothing of validation is lower


def test_two_runs_are_told_apart_without_colors(tmp_path):
    text = plots.chart([write(tmp_path / 'one'), write(tmp_path / 'two', [3.0, 2.9, 2.8])])
    assert text.count('★') == 2 and 'training' not in text
    assert 'a one: validation, best 1.0000 at step 20' in text and 'b two: validation, best 2.8000 at step 20' in text
    assert {'a', 'b'} <= set(''.join(cells(text)))


def test_runs_of_one_name_are_called_by_their_paths(tmp_path):
    (tmp_path / 'x').mkdir()
    (tmp_path / 'y').mkdir()
    runs = [write(tmp_path / 'x' / 'out'), write(tmp_path / 'y' / 'out')]
    assert plots.names_of(runs) == [f'{tmp_path / "x" / "out"}: ', f'{tmp_path / "y" / "out"}: ']


def test_colors_change_nothing_but_the_color(tmp_path):
    runs = [write(tmp_path / 'one'), write(tmp_path / 'two', [3.0, 2.9, 2.8])]
    plain, colored = (plots.chart(runs, color=color) for color in (False, True))
    assert '\x1b' not in plain and {'\x1b[33m', '\x1b[36m'} <= set(re.findall('\x1b\\[\\d\\dm', colored))
    assert re.sub('\x1b\\[\\d+m', '', colored) == plain


def test_one_evaluation_makes_a_chart(tmp_path):
    text = plots.chart([write(tmp_path / 'run', [2.0], every=0)])
    assert text.count('★') == 1


def test_a_chart_is_ascii_where_stdout_is(tmp_path, monkeypatch):
    text = plots.chart([write(tmp_path / 'run')])
    for encoding, kept in (('utf-8', True), ('ascii', False), ('cp1252', False)):
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        shown = plots.encodable(text)
        assert (shown == text) == kept and (kept or shown.isascii() and '*' in shown and '.....' in shown)
        assert [len(line) for line in shown.splitlines()] == [len(line) for line in text.splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def points(svg, name):
    """How many points the curves of one name have, in a picture."""
    found = re.findall(rf'<g id="{name}">\s*<path d="([^"]*)"', svg)   # M x y, then L x y for each further point
    return [d.count('L') + 1 for d in found]


def svg_of(tmp_path, *args, **how):
    pytest.importorskip('matplotlib')
    plots.picture(tmp_path / 'drawn.svg', *args, **how)
    return (tmp_path / 'drawn.svg').read_text()


def test_a_picture_has_every_loss_every_evaluation_and_the_best(tmp_path):
    svg = svg_of(tmp_path, [write(tmp_path / 'run')])
    assert points(svg, 'loss-val') == points(svg, 'loss-train') == [5]
    assert points(svg, 'loss-raw')[0] == 50
    assert '<!-- validation, best 1.0000 at step 20 -->' in svg


def test_panels_stand_in_the_order_that_was_asked_for(tmp_path):
    svg = svg_of(tmp_path, [write(tmp_path / 'run')], panels=('lr', 'loss', 'grad_norm'))
    places = [svg.index(f'<g id="{name}-raw">') for name in ('lr', 'loss', 'grad_norm')]
    assert places == sorted(places)


@pytest.mark.parametrize('by', ['tokens', 'flops', 'seconds'])
def test_a_picture_compares_runs_on_any_scale_with_logarithmic_axes(tmp_path, by):
    runs = [write(tmp_path / 'one'), write(tmp_path / 'two', [3.0, 2.5])]
    svg = svg_of(tmp_path, runs, by=by, log_x=True, log_y=True)
    zero = by != 'seconds'   # for which there is no place
    assert points(svg, 'loss-val') == [5 - zero, 2 - zero]
    assert 'one: validation, best 1.0000 at' in svg and 'two: validation, best 2.5000 at' in svg


@pytest.mark.parametrize('to', ['nowhere/loss.png', 'loss.doc'])
def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, to):
    with pytest.raises(UserError, match=f'cannot write {tmp_path / to}: '):
        svg_of(tmp_path, [write(tmp_path / 'run')])
        plots.picture(tmp_path / to, [write(tmp_path / 'run')])


def test_a_run_without_an_evaluation_leaves_no_picture_and_no_traceback(tmp_path, capsys):
    (tmp_path / 'log.jsonl').write_text('{"iter": 0, "loss": 1}\n')
    plots.leave_picture(tmp_path)
    assert 'no evaluation yet' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['log.jsonl']
