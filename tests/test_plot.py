"""plot.py: the picture of a run, and what it says when there is nothing to draw."""

import json
import re

import pytest
from conftest import assert_one_line, run


def test_draws_every_evaluation_and_the_best_loss(trained, tmp_path):
    pytest.importorskip('matplotlib')
    picture = tmp_path / 'loss.svg'
    done = run('plot.py', f'--runs={trained}', f'--to={picture}')
    assert done.returncode == 0, done.stderr
    assert done.stdout == ''
    evals = [r for r in map(json.loads, (trained / 'log.jsonl').read_text().splitlines()) if 'step' in r]
    svg = picture.read_text()
    assert f'best {min(r["val_loss"] for r in evals):.4f}' in svg
    curves = re.findall(r'<path d="([^"]*)" clip-path', svg)   # a curve is M x y, then L x y for each further point
    assert sorted(d.count('L') + 1 for d in curves)[-3:] == [len(evals), len(evals), 20]


def test_compares_two_runs_by_tokens(trained, tmp_path):
    pytest.importorskip('matplotlib')
    done = run('plot.py', f'--runs={trained},{trained}', '--by=tokens', f'--to={tmp_path / "both.svg"}')
    assert done.returncode == 0, done.stderr
    svg = (tmp_path / 'both.svg').read_text()
    assert svg.count(f'{trained.name}: validation') == 2
    assert '>tokens<' in svg or 'tokens -->' in svg


@pytest.mark.parametrize('log, words', [
    (None, ['log.jsonl', 'No such file']), ('', ['no evaluation']), ('{"iter": 1}\n{', ['log.jsonl']),
])
def test_nothing_to_draw_is_one_line(tmp_path, log, words):
    pytest.importorskip('matplotlib')
    if log is not None:
        (tmp_path / 'log.jsonl').write_text(log)
    assert_one_line(run('plot.py', f'--runs={tmp_path}'), 1, *words)


def test_unknown_scale_is_refused():
    assert_one_line(run('plot.py', '--by=minutes'), 2, "by='minutes'", 'seconds')
