"""What machines do to a run: it is killed, its disk is full, its files are damaged, its numbers overflow."""

import random
import shutil

import pytest
from conftest import ROOT, assert_one_line, log_of, needs, run, started
from in_process import call
from test_train import HERE, again, assert_same_run, contents, load, records, train  # noqa: F401

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


# Starts train.py repeatedly in a fork of a process that has imported torch already, until it is left to finish;
# each life is killed while it trains, every other one while a checkpoint is being written
LIVES = """
import os, random, runpy, signal, sys, time
import numpy, torch, torch._dynamo

kills, seed, out_dir, *sys.argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *sys.argv[4:]
chance = random.Random(seed)

def state(name):
    try:
        found = os.stat(os.path.join(out_dir, name))
        return found.st_ino, found.st_mtime_ns, found.st_size
    except FileNotFoundError:
        return None

for life in range(kills + 1):
    before = {name: state(name) for name in ('ckpt.pt.tmp', 'log.jsonl')}   # what the lives before have left
    changed = lambda name: state(name) not in (None, before[name])
    pid = os.fork()
    if pid == 0:
        os.environ['HASTE'] = str(int(life == kills))
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name='__main__')
        sys.exit()
    if life == kills:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if life % 2 == 0 and changed('ckpt.pt.tmp') and chance.random() < 0.1:
            break
        if life % 2 == 1 and end - time.monotonic() > 1 and changed('log.jsonl'):   # it trains
            end = time.monotonic() + chance.uniform(0, 0.5)
        time.sleep(0.0005)
        if os.waitpid(pid, os.WNOHANG)[0]:
            sys.exit(f'life {life} ended before it was killed')
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print('killed', 'in a save' if changed('ckpt.pt.tmp') else 'elsewhere', flush=True)
"""

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


@pytest.mark.full
@needs('fork')
def test_a_run_killed_many_times_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, tiny):
    kills, steps = 6, 600
    (tmp_path / 'slow.py').write_text(SLOW)
    args = [tiny, tmp_path / 'slow.py', *HERE, '--init_from=auto', f'--max_iters={steps}', '--eval_interval=20',
            '--checkpoint_interval=3', '--keep_last=2', '--dropout=0.1', '--log_interval=5']
    train(*args, f'--out_dir={tmp_path / "calm"}', HASTE='1')
    seed = random.randrange(10**6)
    print(f'seed {seed}')   # of the instants
    out_dir = tmp_path / 'out'
    with started('-c', LIVES, kills, seed, out_dir, ROOT / 'train.py', *args, f'--out_dir={out_dir}') as process:
        out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    print(f'{out.count("killed")} kills, {out.count("in a save")} of them in a save, '
          f'{err.count("resumed")} lives resumed')
    assert out.count('killed') == kills and out.count('in a save') >= kills // 3
    assert err.count('resumed') >= kills // 3
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
def test_checkpoints_between_evaluations_and_older_ones_are_kept_if_asked(tmp_path, tiny, trained):
    train(tiny, f'--out_dir={tmp_path}', '--checkpoint_interval=4', '--keep_last=3')
    steps = {path.name: load(path)['iter_num'] for path in tmp_path.glob('ckpt*.pt')}
    assert steps == {'ckpt.pt': 20, 'ckpt-16.pt': 16, 'ckpt-12.pt': 12, 'ckpt-10.pt': 10}
    assert log_of(tmp_path) == log_of(trained)
    shutil.copy(tmp_path / 'ckpt-12.pt', tmp_path / 'ckpt.pt')   # back to an older one
    done = train(f'--out_dir={tmp_path}', '--init_from=resume')
    assert 'step 12, ' in done.stderr
    assert log_of(tmp_path) == log_of(trained)


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
@pytest.mark.parametrize('init_from', ['scratch', 'auto', 'resume'])
def test_a_second_run_in_the_same_folder_is_refused(again, tiny, init_from):   # noqa: F811
    before = contents(again)
    release = outdir.claim(again)
    done = call('train.py', tiny, f'--out_dir={again}', f'--init_from={init_from}', *HERE)
    release()
    assert_one_line(done, 1, str(again), 'another run writes to', 'choose another folder')
    assert contents(again) == before


@pytest.mark.full
@needs('file_locks')
def test_a_run_that_is_killed_frees_its_folder(tmp_path, tiny):
    with started(ROOT / 'train.py', tiny, *HERE, f'--out_dir={tmp_path}', '--max_iters=1000000',
                 '--eval_interval=1000000') as process:
        next(line for line in process.stdout if line.startswith('iter 3:'))
        done = run('train.py', tiny, *HERE, f'--out_dir={tmp_path}')
        assert_one_line(done, 1, str(tmp_path), 'another run writes to', 'choose another folder')
        process.kill()
        process.communicate()
    train(tiny, f'--out_dir={tmp_path}', '--init_from=auto', '--max_iters=3')
    assert load(tmp_path / 'ckpt.pt')['iter_num'] == 3


@pytest.mark.full
@needs('full_disk', 'symlinks')
def test_a_full_disk_under_the_log_costs_lines_and_not_the_run(tmp_path, tiny):
    (tmp_path / 'log.jsonl').symlink_to('/dev/full')
    patch = ('from flatgpt import outdir, plots\noutdir.set_aside = lambda out_dir: None\n'
             'plots.leave_picture = lambda out_dir: None\n')   # /dev/full can be read without end
    done = train(tiny, config_with(tmp_path, patch),
                 f'--out_dir={tmp_path}', '--max_iters=3')
    assert done.stderr.count('cannot write to') >= 3 and 'No space left' in done.stderr
    assert load(tmp_path / 'ckpt.pt')['iter_num'] == 3


@pytest.mark.full
@needs('limits')
def test_a_full_disk_leaves_the_old_state_and_the_run_goes_on_when_there_is_room_again(tmp_path, tiny, trained):
    code = """
import resource
from flatgpt import checkpoint, outdir
_save = outdir.save
def _full(path, state):
    limit = 50_000 if state['iter_num'] == 10 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        _save(path, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if state['iter_num'] == 10:
            (path.parent / 'then').write_text(str(checkpoint.load(path.parent / 'ckpt.pt')['iter_num']))
outdir.save = _full
"""
    done = train(tiny, config_with(tmp_path, code), f'--out_dir={tmp_path / "out"}')
    assert done.stderr.count('cannot write') == 1 and 'the one before it is intact; make room' in done.stderr
    assert (tmp_path / 'out' / 'then').read_text() == '0'   # the old state, whole
    assert_same_run(tmp_path / 'out', trained)


# ---------------------------------------------------------------------------------------------------------------------
# numbers

@pytest.mark.full
def test_a_nan_at_a_step_ends_the_run_with_advice_and_the_checkpoint_before_it_goes_on(tmp_path, tiny, trained):
    code = """
from flatgpt import optim
from model import GPT
_rate_at, _loss, _steps = optim.learning_rate_at, GPT.logits_and_loss, []
def _at(step, *rest):
    _steps.append(step)
    return _rate_at(step, *rest)
def _spoil(self, x, targets):
    if _steps and _steps[-1] == 13:
        self.transformer.ln_f.weight.data.fill_(float('nan'))
    return _loss(self, x, targets)
optim.learning_rate_at, GPT.logits_and_loss = _at, _spoil
"""
    done = train(tiny, config_with(tmp_path, code), f'--out_dir={tmp_path / "out"}', '--checkpoint_interval=6',
                 status=1)
    assert_one_line(done, 1, 'the loss is nan at step 13', 'ckpt.pt holds the last good state', 'learning_rate')
    ckpt = load(tmp_path / 'out' / 'ckpt.pt')
    assert ckpt['iter_num'] == 12 and all(weight.isfinite().all() for weight in ckpt['model'].values())
    train(f'--out_dir={tmp_path / "out"}', '--init_from=resume')
    assert records(tmp_path / 'out', 'step')[-1]['val_loss'] == records(trained, 'step')[-1]['val_loss']
