"""The sweep: every run once, each as train.py would make it, and what a file of results has is kept."""

import json

import pytest
from conftest import ROOT, assert_one_line, run
from in_process import call

pytestmark = pytest.mark.full   # each run of the sweep is a process of its own
TINY = ['--budgets=1e7,2e7', '--held_out=1x16:4e7', '--sizes=1x8,2x8', '--min_steps=20', '--max_epochs=0.1',
        '--block_size=16', '--batch_size=4', '--learning_rate=1e-3']


def sweep(*args):
    """Run `python -m flatgpt.sweep`, whose modules are found from the root of the project."""
    return run('flatgpt/sweep.py', *args, PYTHONPATH=str(ROOT))


@pytest.fixture(scope='module')
def swept(tmp_path_factory, char_dataset):
    """The file of results of a tiny sweep, and its arguments."""
    path = tmp_path_factory.mktemp('sweep') / 'results.json'
    args = [*TINY, f'--dataset={char_dataset}', f'--results={path}']
    done = sweep(*args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {'results': str(path), 'runs': 3, 'trained': 3}
    return path, args


def runs_of(path):
    return json.loads(path.read_text())['runs']


def test_each_run_spends_its_budget_and_those_too_short_or_too_long_are_left_out(swept):
    runs = runs_of(swept[0])
    for each in runs:
        assert each['tokens'] == 64 * each['steps']
        assert abs(each['flops'] - each['budget']) <= each['flops'] / each['steps'] / 2
    shapes = [(each['n_layer'], each['n_embd'], each['budget'], each['held_out']) for each in runs]
    assert shapes == [(1, 8, 1e7, False), (2, 8, 2e7, False), (1, 16, 4e7, True)]


def test_a_run_is_that_of_train_py(swept, tmp_path, char_dataset):
    (held,) = [each for each in runs_of(swept[0]) if each['held_out']]
    done = run('train.py', f'--dataset={char_dataset}', '--n_layer=1', '--n_embd=16', '--n_head=1', '--block_size=16',
               '--batch_size=4', '--gradient_accumulation_steps=1', '--arch=speedrun', '--optimizer=muon',
               f'--learning_rate={1e-3 * 64 / 16}', '--schedule=linear', '--min_lr=0', f'--max_iters={held["steps"]}',
               f'--warmup_iters={held["steps"] // 20}', '--eval_iters=64', f'--eval_interval={held["steps"]}',
               '--device=cpu', f'--out_dir={tmp_path}')
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[-1])
    assert (held['train_loss'], held['val_loss']) == pytest.approx((last['train_loss'], last['val_loss']), abs=1e-5)


def test_only_what_is_missing_is_trained_and_it_comes_out_the_same(swept):
    path, args = swept
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, 'runs': before['runs'][1:]}))
    done = sweep(*args)
    assert json.loads(done.stdout)['trained'] == 1 and '2 of 3 runs are in' in done.stderr
    clock = {'seconds': None}
    assert [{**each, **clock} for each in runs_of(path)] == [{**each, **clock} for each in before['runs']]


def test_a_file_of_other_runs_is_not_continued(swept):
    done = call('flatgpt/sweep.py', *swept[1], '--learning_rate=2e-3')
    assert_one_line(done, 2, 'learning_rate=0.001', 'another --results')


@pytest.mark.parametrize('change, status, words', [
    ('--sizes=2,3', 2, ['sizes=', "'2'", '2x64']),
    ('--budgets=1e7,1.2.3', 2, ['budgets=', "'1.2.3'"]),
    ('--held_out=1x8', 2, ['held_out=', '5x160:1e14']),
    ('--arch=best', 2, ['arch=', "'llama'"]),
    ('--jobs=0', 2, ['jobs=0', '1 or more']),
    ('--dataset=nowhere/at_all', 1, ['nowhere/at_all']),
])
def test_what_cannot_be_is_one_line(char_dataset, tmp_path, change, status, words):
    args = f'--dataset={char_dataset}', f'--results={tmp_path / "new.json"}'
    assert_one_line(call('flatgpt/sweep.py', *TINY, *args, change), status, *words)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_file_of_results_stays_as_it_is(char_dataset, tmp_path):
    for content in ('[]', '{"common": {"depth": 3}, "runs": []}', '{"runs": [1]}', 'x'):
        (tmp_path / 'mine.json').write_text(content)
        args = f'--dataset={char_dataset}', f'--results={tmp_path / "mine.json"}'
        assert_one_line(call('flatgpt/sweep.py', *TINY, *args), 1, 'not a file of results')
        assert (tmp_path / 'mine.json').read_text() == content


def test_a_run_that_fails_says_why(char_dataset, tmp_path):
    args = f'--dataset={char_dataset}', f'--results={tmp_path / "new.json"}'
    done = sweep(*TINY, *args, '--optimizer=best', '--max_epochs=0.01')
    assert_one_line(done, 1, 'optimizer=', "'muon'")
    assert not (tmp_path / 'new.json').exists()
