"""plot.py and flatgpt/plots.py: from log.jsonl to curves, pictures and charts in text."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, log_of, run
from in_process import call

from flatgpt import plots
from flatgpt.errors import UserError

VAL = [3.0, 2.0, 1.0, 1.5, 2.0]   # validation losses: the third is the best


def write(folder, val=VAL, every=10, per_step=100, extra='', **changes):
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
    assert (run.name, len(run.evals), len(run.steps), run.best['step']) == ('one', 5, 50, 20)


def test_lines_that_cannot_be_read_are_skipped_and_named(tmp_path, capsys):
    whole = write(tmp_path / 'run')
    damaged = write(tmp_path / 'run', extra='[1, 2]\n{"iter": 50, "lo')
    assert (damaged.evals, damaged.steps) == (whole.evals, whole.steps)
    assert capsys.readouterr().err == f'{tmp_path / "run" / "log.jsonl"}: skipped line 56, 57, not a JSON object\n'


def test_losses_that_are_not_finite_numbers_are_not_points(tmp_path):
    run = write(tmp_path / 'run', extra='{"iter": 50, "loss": null}\n{"step": 60, "train_loss": 1, "val_loss": null}\n'
                                        '{"iter": 51, "loss": "low"}\n{"iter": 52, "loss": NaN}\n')
    assert len(run.evals) == 5 and len(plots.curves(run)['raw'][0]) == 50


# ---------------------------------------------------------------------------------------------------------------------
# curves

@pytest.mark.parametrize('by, at, steps', [
    ('step', [0, 10, 20, 30, 40], [0, 5, 15, 40, 45]),
    ('tokens', [0, 1000, 2000, 3000, 4000], [0, 500, 1500, 4000, 4500]),
    ('flops', [0, 6000, 12000, 18000, 24000], [0, 3000, 9000, 24000, 27000]),
    ('seconds', [1, 2, 5, 10, 17], [1, 1.5, 3.5, 17, 17 + 5 * 17 / 40]),   # by the mean pace after the end
])
def test_single_steps_are_placed_between_the_evaluations_around_them(tmp_path, by, at, steps):
    marks, positions = plots.positions(write(tmp_path / 'run'), by)
    assert marks.tolist() == at
    np.testing.assert_allclose(positions[[0, 5, 15, 40, 45]], steps)


def test_a_scale_that_an_old_log_lacks_is_refused(tmp_path):
    run = write(tmp_path / 'run', flops='drop')
    with pytest.raises(UserError, match='does not say the flops .* another --by, such as step$'):
        plots.positions(run, 'flops')


def test_a_smoothed_curve_has_means_in_the_middle_of_their_steps(tmp_path):
    x, y, label = plots.curves(write(tmp_path / 'run'), smooth=5)['smooth']
    assert y == pytest.approx(2 * x + 1) and x.tolist() == [*range(2, 48)] and label == 'training, mean of 5'
    run = write(tmp_path / 'run')
    run.steps = [{'iter': i, 'loss': loss} for i, loss in enumerate([1.0, 4.0, 4.0])]
    assert plots.curves(run, smooth=3)['smooth'][1] == pytest.approx([3.0])
    assert plots.curves(run, smooth=99)['smooth'][1] == pytest.approx([3.0])


def test_a_panel_has_its_curves_and_only_loss_has_those_of_evaluations(tmp_path):
    run = write(tmp_path / 'run')
    kinds = {panel: [*plots.curves(run, panel)] for panel in ('loss', 'lr', 'grad_norm')}
    assert kinds == {'loss': ['raw', 'smooth', 'train', 'val'], 'lr': ['raw'], 'grad_norm': ['raw', 'smooth']}
    found = plots.curves(run)
    assert found['val'][1].tolist() == VAL and found['train'][1].tolist() == [y + 0.5 for y in VAL]
    assert found['smooth'][2] == f'training, mean of {50 // 12}'
    assert [*plots.curves(run, smooth=1)] == ['raw', 'train', 'val']
    with pytest.raises(UserError, match='nothing to draw of mfu'):
        plots.curves(run, 'mfu')


def test_a_logarithmic_axis_has_no_place_for_zero(tmp_path):
    found = plots.curves(write(tmp_path / 'run'), log_x=True)
    assert all(x.min() > 0 for x, _, _ in found.values()) and len(found['val'][0]) == 4
    with pytest.raises(UserError, match='choose other panels or axes'):
        plots.curves(write(tmp_path / 'still', val=[1.0], every=0), log_x=True)


@pytest.mark.parametrize('value, text', [
    (0, '0'), (0.25, '0.25'), (1.5, '1.5'), (999, '999'), (1500, '1.5k'), (819_200, '819.2k'), (3.2e6, '3.2M'),
    (3e11, '300B'), (2e12, '2T'), (1e15, '1e+15'), (6e-4, '0.0006'), (-2e-5, '-2e-05'), (-2e4, '-20k')])
def test_numbers_are_short(value, text):
    assert plots.short(value) == text


def test_runs_of_one_name_are_called_by_their_paths(tmp_path):
    for name in ('x', 'y'):
        (tmp_path / name).mkdir()
    runs = [write(tmp_path / 'x' / 'out'), write(tmp_path / 'y' / 'out'), write(tmp_path / 'one')]
    assert plots.labels(runs) == [f'{tmp_path}/x/out: ', f'{tmp_path}/y/out: ', 'one: ']
    assert plots.labels(runs[:1]) == ['']


# ---------------------------------------------------------------------------------------------------------------------
# charts in text

@pytest.mark.parametrize('how', [{}, {'log_x': True}, {'log_y': True}, {'by': 'seconds', 'log_x': True}])
@pytest.mark.parametrize('width, height', [(40, 12), (79, 20)])
def test_a_chart_has_its_size_its_curves_and_its_numbers(tmp_path, width, height, how):
    text = plots.chart([write(tmp_path / 'run')], width=width, height=height, **how)
    lines = text.splitlines()
    assert len(lines) == height + 2 and max(map(len, lines[:height])) == width
    rows = [line.split('┤')[-1].split('│')[-2 if '┤' not in line else 0] for line in lines if '│' in line]
    assert '•' in rows[-1] and '•' not in rows[0]   # validation is below, training rises to the top
    assert any(0x2800 < ord(sign) < 0x2900 for sign in rows[0])
    assert lines[-1].startswith('  • validation, best 1.0000 at') and lines[-2] == '  ⠒ training, mean of 4'
    assert lines[0].strip() == 'loss, nats per token' and '\x1b' not in text
    numbers = [line.split('┤')[0].strip() for line in lines if '┤' in line]
    assert numbers[0] == '96' and numbers[-1] == '1'


def test_runs_are_told_apart_without_colors(tmp_path):
    runs = [write(tmp_path / 'one'), write(tmp_path / 'two', [4.0, 3.9, 3.8])]
    text = plots.chart(runs)
    assert 'training' not in text
    assert '  a one: validation, best 1.0000 at step 20\n  b two: validation, best 3.8000 at step 20' in text
    canvas = text.split('└')[0]
    assert canvas.count('a') > 20 and canvas.count('b') > 20
    assert text == re.sub('\x1b\\[[^m]*m', '', plots.chart(runs, color=True)) and plots.chart(runs, color=True) != text


def test_one_evaluation_and_a_constant_make_a_chart(tmp_path):
    rows = plots.chart([write(tmp_path / 'run', [2.0], every=0)], width=80, height=20).splitlines()
    [line] = [line for line in rows[:20] if '•' in line]
    assert 30 < line.index('•') < 60   # in the middle
    text = plots.chart([write(tmp_path / 'run')], panel='lr')
    assert '0.001┤' in text and text.splitlines()[-1].strip() == 'step'


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def drawn(*args, **how):
    """[[(name of a curve, x, y)] for each panel] of a picture."""
    return [[(line.get_gid(), *line.get_data()) for line in axes.get_lines()]
            for axes in plots.figure(*args, **how).axes]


def test_a_picture_has_every_loss_every_evaluation_and_the_best(tmp_path):
    figure = plots.figure([write(tmp_path / 'run')])
    curves = {line.get_gid(): line.get_data() for line in figure.axes[0].get_lines()}
    assert curves['loss-val'][1].tolist() == VAL and len(curves['loss-train'][0]) == 5
    assert len(curves['loss-raw'][0]) == 50 and [value.tolist() for value in curves[None]] == [[20], [1.0]]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ['training, single steps', 'training, mean of 4', 'training, as evaluated',
                      'validation, best 1.0000 at step 20']
    assert figure.axes[0].get_title() == 'run'


def test_panels_stand_in_the_order_that_was_asked_for(tmp_path):
    panels = drawn([write(tmp_path / 'run')], panels=('lr', 'loss', 'grad_norm'))
    assert [curves[0][0] for curves in panels] == ['lr-raw', 'loss-raw', 'grad_norm-raw']


@pytest.mark.parametrize('by', ['tokens', 'flops', 'seconds'])
def test_a_picture_compares_runs_on_any_scale_with_logarithmic_axes(tmp_path, by):
    runs = [write(tmp_path / 'one'), write(tmp_path / 'two', [3.0, 2.5])]
    figure = plots.figure(runs, by=by, log_x=True, log_y=True)
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ('log', 'log', plots.SCALES[by])
    lines = [line for line in axes.get_lines() if line.get_gid() == 'loss-val']
    zero = by != 'seconds'   # for which there is no place
    assert [len(line.get_xdata()) for line in lines] == [5 - zero, 2 - zero]
    assert len({line.get_color() for line in axes.get_lines()}) == 2
    one, two = [text.get_text() for text in axes.get_legend().get_texts()]   # and no training curves
    assert one.startswith('one: validation, best 1.0000 at') and two.startswith('two: validation, best 2.5000 at')


@pytest.mark.parametrize('to', ['nowhere/loss.png', 'loss.doc'])
def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, to):
    with pytest.raises(UserError, match=f'cannot write {tmp_path / to}: '):
        plots.save_picture(tmp_path / to, [write(tmp_path / 'run')])


def test_a_run_without_an_evaluation_or_matplotlib_leaves_no_picture_and_no_traceback(tmp_path, capsys, monkeypatch):
    (tmp_path / 'log.jsonl').write_text('{"iter": 0, "loss": 1}\n')
    plots.leave_picture(tmp_path)
    assert 'no evaluation yet' in capsys.readouterr().err
    write(tmp_path)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    plots.leave_picture(tmp_path)
    assert capsys.readouterr().err == '' and [path.name for path in tmp_path.iterdir()] == ['log.jsonl']


# ---------------------------------------------------------------------------------------------------------------------
# runs with different tokenizers

def test_panels_per_byte_and_per_character_compare_runs_with_different_tokenizers(tmp_path):
    chars = write(tmp_path / 'chars', bits_per_byte=2.0, bits_per_character=2.5)
    words = write(tmp_path / 'words', [6.0, 5.0], bits_per_byte=1.5, bits_per_character=1.75)
    runs = [chars, words]
    found = drawn(runs, panels=('bits_per_byte', 'bits_per_character'))
    assert [[(name, set(y)) for name, _, y in panel] for panel in found] == [
        [('bits_per_byte-val', {2.0}), ('bits_per_byte-val', {1.5})],
        [('bits_per_character-val', {2.5}), ('bits_per_character-val', {1.75})]]
    assert 'b words: 1.5000 at the best loss' in plots.chart(runs, panel='bits_per_byte')
    assert '• 2.0000 at the best loss' in plots.chart([chars], panel='bits_per_byte')
    assert not plots.comparable(runs) and plots.comparable([chars, chars])
    old = write(tmp_path / 'old')
    assert plots.comparable([chars, old])   # as far as is known
    with pytest.raises(UserError, match='nothing to draw of bits_per_byte'):
        plots.curves(old, 'bits_per_byte')
    done = call('plot.py', f'--runs={tmp_path}/chars,{tmp_path}/words', '--text')
    assert done.returncode == 0
    assert_one_line(done, 0, 'losses per token do not compare', '--panels=bits_per_byte')
    assert call('plot.py', f'--runs={tmp_path}/chars,{tmp_path}/words', '--text', '--panels=bits_per_byte').stderr == ''


def test_a_run_logs_its_bits_per_byte_and_per_character(trained):
    for record in log_of(trained):
        if 'step' in record:   # a character of this text is a byte and a token
            assert record['bits_per_byte'] == record['bits_per_character'] == pytest.approx(
                record['val_loss'] / math.log(2))


# ---------------------------------------------------------------------------------------------------------------------
# plot.py

def test_plot_draws_what_it_is_told(trained, tmp_path):
    done = run('plot.py', f'--runs={trained},{trained}', '--by=tokens', '--panels=grad_norm,loss', '--log_x', '--log_y',
               '--smooth=3', f'--to={tmp_path / "both.svg"}')
    assert done.returncode == 0 and done.stdout == '', done.stderr
    best = min(r['val_loss'] for r in log_of(trained) if 'step' in r)
    svg = (tmp_path / 'both.svg').read_text()
    assert svg.count(f': validation, best {best:.4f} at 2.56k tokens -->') == 2 and 'training, ' not in svg
    assert 0 < svg.index('<g id="grad_norm-smooth">') < svg.index('<g id="loss-val">')


def test_a_picture_is_written_beside_the_first_log_when_no_path_is_given(trained, tmp_path):
    (tmp_path / 'log.jsonl').write_bytes((trained / 'log.jsonl').read_bytes())
    done = call('plot.py', f'--runs={tmp_path},{trained}')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_text_is_a_chart_per_panel_on_stdout_as_wide_as_the_terminal(trained):
    done = call('plot.py', f'--runs={trained}', '--text', '--panels=loss,lr', COLUMNS='60', LINES='30')
    assert done.returncode == 0 and done.stderr == ''
    widths = [len(line) for line in done.stdout.splitlines() if '└' in line]
    assert widths == [59, 59] and '\x1b' not in done.stdout


def test_line_art_that_a_terminal_lacks_is_asterisks(trained):
    done = call('plot.py', f'--runs={trained}', '--text', encoding='cp1252', COLUMNS='60')
    assert done.returncode == 0 and '*' * 50 in done.stdout and '\\u' not in done.stdout, done.stderr


@pytest.mark.parametrize('package, args', [('matplotlib', ['--to=x.png']), ('plotext', ['--text'])])
def test_a_missing_package_is_one_line_that_names_its_installation(trained, monkeypatch, package, args):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f'{package}.figure', raising=False)
    assert_one_line(call('plot.py', f'--runs={trained}', *args), 1, f'needs {package}', 'pip install', 'matplotlib')


def test_nothing_of_torch_is_imported_to_draw(tmp_path):
    write(tmp_path / 'run')
    code = ('import runpy, sys; sys.argv = ["plot.py", "--runs=run", "--text"]; '
            'runpy.run_path(sys.path[0] + "/plot.py"); assert "torch" not in sys.modules')
    done = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r}); {code}'],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('log, text, words', [
    (None, True, ['log.jsonl', 'No such file']), ('', False, ['no evaluation']),
    ('{"iter": 1}\n{', True, ['no evaluation']),
])
def test_nothing_to_draw_is_one_line(tmp_path, log, text, words):
    if log is not None:
        (tmp_path / 'log.jsonl').write_text(log)
    done = call('plot.py', f'--runs={tmp_path}', f'--text={text}')
    assert_one_line(done, 1, *words)
    assert done.stdout == ''


@pytest.mark.parametrize('args, words', [
    (['--by=minutes'], ["by='minutes'", "'seconds'"]), (['--panels=loss,x'], ["panels='loss,x'", "'grad_norm'"]),
    (['--smooth=0'], ['smooth=0', '1 or more']), (['--text', '--to=a.png'], ['text=True', "to='a.png'"]),
])
def test_wrong_options_are_refused(args, words):
    assert_one_line(call('plot.py', *args), 2, *words)
