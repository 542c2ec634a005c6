"""plot.py: pictures and charts of runs, and what it says when there is nothing to draw."""

import sys

import pytest
from conftest import assert_one_line, log_of, run
from in_process import call

pytest.importorskip('matplotlib')


def test_draws_what_it_is_told(trained, tmp_path):
    done = run('plot.py', f'--runs={trained},{trained}', '--by=tokens', '--panels=grad_norm,loss', '--log_x', '--log_y',
               '--smooth=3', f'--to={tmp_path / "both.svg"}')
    assert done.returncode == 0 and done.stdout == '', done.stderr
    best = min(r['val_loss'] for r in log_of(trained) if 'step' in r)
    svg = (tmp_path / 'both.svg').read_text()
    assert svg.count(f': validation, best {best:.4f} at 2,560 tokens -->') == 2 and 'training, mean of 3' in svg
    assert 0 < svg.index('<g id="grad_norm-smooth">') < svg.index('<g id="loss-val">')


def test_a_picture_is_written_beside_the_first_log_when_no_place_is_given(trained, tmp_path):
    (tmp_path / 'log.jsonl').write_bytes((trained / 'log.jsonl').read_bytes())
    done = call('plot.py', f'--runs={tmp_path},{trained}')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_text_is_a_chart_per_panel_on_stdout_as_wide_as_the_terminal(trained):
    done = call('plot.py', f'--runs={trained}', '--text', '--panels=loss,lr', COLUMNS='60', LINES='30')
    assert done.returncode == 0 and done.stderr == ''
    assert done.stdout.count('┬') > 2 and done.stdout.count('└') == 2 and '\x1b' not in done.stdout
    widths = [len(line) for line in done.stdout.splitlines() if '└' in line]
    assert widths == [59, 59]


def test_without_matplotlib_there_is_a_chart_and_with_a_place_for_a_picture_an_error(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    done = call('plot.py', f'--runs={trained}')
    assert done.returncode == 0 and '★' in done.stdout
    assert_one_line(done, 0, 'no matplotlib here', 'pip install matplotlib')
    done = call('plot.py', f'--runs={trained}', '--to=x.png')
    assert_one_line(done, 1, 'x.png', 'pip install matplotlib', '--text')


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
