"""What machines do to a run: it is killed or told to end, its files are damaged, its numbers overflow."""

import contextlib
import random
import shutil
import time

import pytest
from conftest import ROOT, assert_one_line, needs, started
from in_process import call
from test_train import HERE, again, assert_same_run, contents, load, train  # noqa: F401

from flatgpt import outdir


def config_with(tmp_path, code):
    path = tmp_path / 'fault.py'
    path.write_text('import os, signal, threading, time\n' + code)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# kill -9

IN_MID_SAVE = """
import torch
_save = torch.save
def _die(state, f):
    _save(state, f)
    path = str(f.name)
    if path.endswith('ckpt.pt.tmp') and os.path.exists(path.removesuffix('.tmp')):   # there is a state already
        f.truncate(f.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = _die
"""


def test_a_run_killed_in_mid_save_goes_on_bit_for_bit_from_the_state_before(tmp_path, tiny, trained):
    out_dir = tmp_path / 'out'
    train(tiny, config_with(tmp_path, IN_MID_SAVE), f'--out_dir={out_dir}', status=-9)
    assert (out_dir / 'ckpt.pt.tmp').exists() and load(out_dir / 'ckpt.pt')['iter_num'] == 0
    train(f'--out_dir={out_dir}', '--init_from=resume')
    assert_same_run(out_dir, trained)
    assert not (out_dir / 'ckpt.pt.tmp').exists()


# No faster than 100 steps a second, so that no life reaches the end, until the last one
SLOW = """
import os, time
from flatgpt import optim
_rate_at = optim.learning_rate_at
def _slow(*args):
    time.sleep(0 if os.environ.get('HASTE') == '1' else 0.01)
    return _rate_at(*args)
optim.learning_rate_at = _slow
"""


def changes(path):
    """A function that tells whether a file is there and is not the one that it is now."""
    def state():
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            return found.st_ino, found.st_mtime_ns, found.st_size

    before = state()
    return lambda: state() not in (None, before)


@pytest.mark.full
def test_a_run_killed_many_times_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, tiny):
    """Every other time while a checkpoint is being written."""
    steps, in_saves, out_dir = 600, 0, tmp_path / 'out'
    (tmp_path / 'slow.py').write_text(SLOW)
    args = [tiny, tmp_path / 'slow.py', *HERE, '--init_from=auto', f'--max_iters={steps}', '--eval_interval=20',
            '--checkpoint_interval=3', '--keep_last=2', '--dropout=0.1', '--log_interval=5']
    train(*args, f'--out_dir={tmp_path / "calm"}', HASTE='1')
    seed = random.randrange(10**6)
    print(f'seed {seed}')   # of the instants
    chance = random.Random(seed)
    for life in range(6):
        saving, training = changes(out_dir / 'ckpt.pt.tmp'), changes(out_dir / 'log.jsonl')
        with started(ROOT / 'train.py', *args, f'--out_dir={out_dir}') as process:
            while not (training() if life % 2 else saving() and chance.random() < 0.1):
                assert process.poll() is None
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.5) if life % 2 else 0)
            process.kill()
            process.wait()
        in_saves += saving()
    assert in_saves >= 2
    done = train(*args, f'--out_dir={out_dir}', HASTE='1')
    assert 'resumed' in done.stderr
    assert_same_run(out_dir, tmp_path / 'calm')
    assert {path.name for path in out_dir.iterdir() if 'previous' not in path.name} - {'loss.png'} == {
        'ckpt.pt', f'ckpt-{steps - 3}.pt', f'ckpt-{steps - 6}.pt', 'best.pt', 'log.jsonl'}


# ---------------------------------------------------------------------------------------------------------------------
# signals

IN_EVALUATION = """
from flatgpt.dataset import Dataset
_eval_batch, _calls = Dataset.eval_batch, []
def _signal(*args):
    _calls.append(args)
    if len(_calls) == 8:    # in the second of three evaluations, of four batches each; two calls precede them
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(_calls) <= 8, 'the evaluation goes on'
    return _eval_batch(*args)
Dataset.eval_batch = _signal
"""

IN_SAVE = """
from flatgpt import outdir
_save = outdir.save
def _signal(path, state):
    if state['iter_num'] == 10 and path.name == 'ckpt.pt':
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
    _save(path, state)
outdir.save = _signal
"""


@pytest.mark.full
@pytest.mark.parametrize('code, at', [(IN_EVALUATION, range(10, 11)), (IN_SAVE, range(10, 20))],
                         ids=['evaluation', 'save'])
def test_sigterm_during(tmp_path, tiny, trained, code, at):
    done = train(tiny, config_with(tmp_path, code), f'--out_dir={tmp_path / "out"}', status=130)
    ckpt = load(tmp_path / 'out' / 'ckpt.pt')
    assert_one_line(done, 130, f'interrupted at step {ckpt["iter_num"]}', '--init_from=resume')
    assert ckpt['iter_num'] in at
    train(f'--out_dir={tmp_path / "out"}', '--init_from=resume')
    assert_same_run(tmp_path / 'out', trained)


@pytest.mark.full
def test_an_early_stop_can_be_overruled_and_the_run_is_as_if_it_had_not_stopped(tmp_path, tiny):
    args = (tiny, '--learning_rate=0.2', '--warmup_iters=40', '--max_iters=30', '--eval_interval=2')
    train(*args, f'--out_dir={tmp_path / "whole"}')
    done = train(*args, f'--out_dir={tmp_path / "parts"}', '--patience=2')
    stopped = load(tmp_path / 'parts' / 'ckpt.pt')['iter_num']
    assert 'no better loss in 2 evaluations' in done.stderr and stopped < 30
    done = train(f'--out_dir={tmp_path / "parts"}', '--init_from=resume')
    assert f'done at step {stopped}' in done.stderr and done.stdout == ''
    train(f'--out_dir={tmp_path / "parts"}', '--init_from=resume', '--patience=0')
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


@pytest.mark.full
@pytest.mark.parametrize('more', [['--schedule=constant'], ['--lr_decay_iters=20']], ids=['constant', 'decayed'])
def test_a_finished_run_whose_max_iters_is_raised_goes_on_as_if_it_had_been_so_from_the_start(tmp_path, tiny, more):
    train(tiny, *more, f'--out_dir={tmp_path / "whole"}', '--max_iters=30')
    train(tiny, *more, f'--out_dir={tmp_path / "parts"}')
    train(f'--out_dir={tmp_path / "parts"}', '--init_from=resume', '--max_iters=30')
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


# ---------------------------------------------------------------------------------------------------------------------
# files

@pytest.mark.full
def test_the_scale_of_float16_goes_on_where_it_was_after_an_overflow(tmp_path, tiny):
    """The first steps overflow on purpose, so that the scale is not the one that every run begins with."""
    code = """
import torch
_scaler = torch.amp.GradScaler
torch.amp.GradScaler = lambda *args, **kwargs: _scaler(*args, init_scale=2.0**40, growth_interval=4, **kwargs)
"""
    fault = config_with(tmp_path, code)
    train(tiny, fault, f'--out_dir={tmp_path / "whole"}', '--dtype=float16', '--max_iters=40', '--schedule=constant')
    train(tiny, fault, f'--out_dir={tmp_path / "parts"}', '--dtype=float16', '--max_iters=30', '--schedule=constant')
    scaler = load(tmp_path / 'parts' / 'ckpt.pt')['scaler']
    assert scaler['scale'] < 2.0**30 and scaler['_growth_tracker'] > 0
    train(fault, f'--out_dir={tmp_path / "parts"}', '--init_from=resume', '--max_iters=40')
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


@pytest.mark.parametrize(('init_from', 'damage'), [('resume', 'cut'), ('auto', 'flip')])
def test_a_damaged_checkpoint_is_refused_and_stays(tmp_path, trained, tiny, init_from, damage):
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    whole = (out_dir / 'ckpt.pt').read_bytes()
    middle = len(whole) // 2
    damaged = whole[:middle] if damage == 'cut' else whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1:]
    (out_dir / 'ckpt.pt').write_bytes(damaged)
    before = contents(out_dir)
    done = call('train.py', tiny, f'--out_dir={out_dir}', f'--init_from={init_from}', *HERE)
    assert_one_line(done, 1, str(out_dir / 'ckpt.pt'), 'damaged', f'--init_from={out_dir / "best.pt"}')
    assert contents(out_dir) == before


@needs('file_locks')
@pytest.mark.parametrize('init_from', ['scratch', 'resume'])
def test_a_second_run_in_the_same_folder_is_refused(again, tiny, init_from):   # noqa: F811
    before = contents(again)
    release = outdir.claim(again)
    done = call('train.py', tiny, f'--out_dir={again}', f'--init_from={init_from}', *HERE)
    release()
    assert_one_line(done, 1, str(again), 'another run writes to', 'choose another folder')
    assert contents(again) == before
