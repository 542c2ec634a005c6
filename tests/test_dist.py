"""Several processes: the same run as one, whichever way they share the work, and an end for all when one fails."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line, log_of, run, started, torchrun
from test_checkpoint import assert_same_weights

import runtime
from model import GPT, GPTConfig

pytestmark = pytest.mark.processes
HERE = ('--device=cpu', '--peak_flops=1e12')


def load(path):
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# one process, DDP, FSDP: the same losses and weights

# Small steps: large ones blow up the rounding of sums, which are added in another order
FIFTY = ('--max_iters=50', '--learning_rate=1e-3', '--min_lr=1e-4', '--lr_decay_iters=50', '--eval_iters=3',
         '--gradient_accumulation_steps=4', *HERE)
WAYS = {'one': (), 'ddp': ('--parallel=ddp',), 'fsdp': ('--parallel=fsdp',)}


def go(way, *args, **more):
    """train.py in a way: in one process, or in two that share the work by DDP or FSDP."""
    done = (run if way == 'one' else torchrun)('train.py', *args, *WAYS[way], **more)
    assert done.returncode == more.get('status', 0), done.stderr
    return done


@pytest.fixture(scope='module')
def fifty(tmp_path_factory, tiny):
    """{way: out_dir} of the same fifty steps in all ways."""
    folders = {way: tmp_path_factory.mktemp(way) for way in WAYS}
    for way, out_dir in folders.items():
        done = go(way, tiny, *FIFTY, f'--out_dir={out_dir}')
        assert done.stdout.count('step 50: train loss') == 1   # only one process talks
        assert done.stderr.count(f'{1 if way == "one" else 2} process') == 1
    return folders


def differences(out_dir, other):
    """(largest relative difference of a loss, largest difference of a weight) of two runs."""
    logs = [[record for record in log_of(folder)] for folder in (out_dir, other)]
    assert [record.keys() for record in logs[0]] == [record.keys() for record in logs[1]]
    losses = [abs(one[key] / two[key] - 1) for one, two in zip(*logs) for key in one if 'loss' in key]
    one, two = (load(folder / 'ckpt.pt') for folder in (out_dir, other))
    assert one['iter_num'] == two['iter_num'] == 50 and one['model'].keys() == two['model'].keys()
    weights = [(one['model'][name] - two['model'][name]).abs().max().item() for name in one['model']]
    return max(losses), max(weights)


@pytest.mark.parametrize('way', ['ddp', 'fsdp'])
def test_two_processes_train_as_one(fifty, way):
    loss, weight = differences(fifty['one'], fifty[way])
    print(f'{way}: losses differ by {loss:.1e} at most, relative; weights by {weight:.1e}')
    assert loss < 1e-5 and weight < 1e-4


def test_the_files_are_the_same_whoever_wrote_them(fifty):
    one, *others = (load(out_dir / 'ckpt.pt') for out_dir in fifty.values())
    for other in others:
        assert {k: type(v) for k, v in one.items()} == {k: type(v) for k, v in other.items()}
        assert {k: v.shape for k, v in one['model'].items()} == {k: v.shape for k, v in other['model'].items()}
        assert one['optimizer']['param_groups'] == other['optimizer']['param_groups']
        for i, moments in one['optimizer']['state'].items():
            assert {k: (type(v), v.shape) for k, v in moments.items()} == \
                   {k: (type(v), v.shape) for k, v in other['optimizer']['state'][i].items()}
    for folder in fifty.values():   # tied weights are stored once
        assert (folder / 'best.pt').stat().st_size == pytest.approx((fifty['one'] / 'best.pt').stat().st_size, rel=0.01)
        ckpt = load(folder / 'ckpt.pt')['model']
        assert ckpt['lm_head.weight'].data_ptr() == ckpt['transformer.wte.weight'].data_ptr()


@pytest.mark.parametrize('ways', [('one', 'fsdp', 'ddp'), pytest.param(('ddp', 'fsdp', 'one'), marks=pytest.mark.slow)],
                         ids='-'.join)
def test_a_run_goes_on_in_another_way(tmp_path, fifty, tiny, ways):
    for way, end in zip(ways, (15, 33, 50)):   # between evaluations
        done = go(way, tiny, *FIFTY, f'--max_iters={end}', f'--out_dir={tmp_path}', '--init_from=auto')
        assert f'stopped at step {end}' in done.stderr
    loss, weight = differences_without_extra_evaluations(tmp_path, fifty['one'])
    assert loss < 1e-5 and weight < 1e-4


def differences_without_extra_evaluations(out_dir, other):
    (out_dir / 'log.jsonl').write_text(''.join(
        line for line in (out_dir / 'log.jsonl').read_text().splitlines(keepends=True)
        if '"step": 15,' not in line and '"step": 33,' not in line))
    return differences(out_dir, other)


@pytest.mark.slow
@pytest.mark.parametrize('way', ['ddp', 'fsdp'])
def test_two_processes_train_as_one_with_muon_and_every_switch(tmp_path, tiny, way):
    args = (tiny, *FIFTY, '--optimizer=muon', '--arch=speedrun', '--window=9', '--layer_scale=0.5', '--max_iters=12')
    for each in ('one', way):
        go(each, *args, f'--out_dir={tmp_path / each}')
    one, two = (log_of(tmp_path / each) for each in ('one', way))
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = (load(tmp_path / each / 'ckpt.pt') for each in ('one', way))
    for name, weight in one['model'].items():
        torch.testing.assert_close(two['model'][name], weight, rtol=0, atol=1e-4)
    assert one['optimizer']['param_groups'] == two['optimizer']['param_groups']


@pytest.mark.slow
def test_fsdp_with_recomputed_activations_dropout_and_bfloat16_trains_and_resumes_bit_for_bit(tmp_path, tiny):
    args = (tiny, *HERE, '--dtype=bfloat16', '--dropout=0.1', '--activation_checkpointing', '--parallel=fsdp')
    torchrun('train.py', *args, f'--out_dir={tmp_path / "whole"}')
    torchrun('train.py', *args, f'--out_dir={tmp_path / "parts"}', '--max_iters=10', '--lr_decay_iters=20')
    torchrun('train.py', *args, f'--out_dir={tmp_path / "parts"}', '--init_from=resume', '--lr_decay_iters=None')
    assert log_of(tmp_path / 'parts') == log_of(tmp_path / 'whole')
    assert_same_weights(*(load(tmp_path / name / 'ckpt.pt')['model'] for name in ('parts', 'whole')))
    losses = [record['val_loss'] for record in log_of(tmp_path / 'whole') if 'step' in record]
    assert losses[-1] < losses[0] - 0.5


# ---------------------------------------------------------------------------------------------------------------------
# recomputed activations

def test_recomputed_activations_give_the_same_gradients_and_hold_less(tmp_path):
    def gradients(recomputed):
        torch.manual_seed(0)
        model = GPT(GPTConfig(50, 32, n_layer=3, n_embd=32, n_head=2, dropout=0.2, attention='math'))
        for block in model.transformer.h if recomputed else ():
            runtime.recompute(block)
        torch.manual_seed(1)
        idx, held = torch.randint(50, (4, 32)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):
            loss = model(idx, idx)[1]
        loss.backward()
        return [p.grad for p in model.parameters()], sum(held)

    plain, much = gradients(False)
    again, little = gradients(True)
    assert all(torch.equal(one, two) for one, two in zip(plain, again))
    assert little < much / 4


def test_a_run_with_recomputed_activations_is_the_same_run(tmp_path, tiny):
    for name, *args in (('plain',), ('recomputed', '--activation_checkpointing')):
        done = run('train.py', tiny, *HERE, '--dropout=0.2', '--max_iters=5', f'--out_dir={tmp_path / name}', *args)
        assert done.returncode == 0, done.stderr
    assert log_of(tmp_path / 'recomputed') == log_of(tmp_path / 'plain')


# ---------------------------------------------------------------------------------------------------------------------
# one of them fails

def in_rank(rank, tmp_path, what):
    """A config file that makes one of the processes do something at step 5."""
    path = tmp_path / 'fault.py'
    path.write_text(f"""
import os, signal, time
from pathlib import Path
import optim
from configurator import UserError
_rate_at, _once = optim.learning_rate_at, Path({str(tmp_path)!r}, 'happened')
def _fault(step, *rest):
    if step == 5 and os.environ['RANK'] == '{rank}':
        {what}
    return _rate_at(step, *rest)
optim.learning_rate_at = _fault
""")
    return path


@pytest.mark.parametrize('what, words', [
    ("raise UserError('the second process has a reason')", 'train.py: the second process has a reason'),
    pytest.param("raise IndexError('a defect')", 'IndexError: a defect', marks=pytest.mark.slow),
    pytest.param('os._exit(7)', 'exitcode  : 7', marks=pytest.mark.slow),
], ids=['error', 'defect', 'sudden'])
def test_a_process_that_fails_ends_all_of_them_at_once_with_its_error(tmp_path, tiny, what, words):
    began = time.monotonic()
    done = torchrun('train.py', tiny, in_rank(1, tmp_path, what), *HERE, f'--out_dir={tmp_path / "out"}',
                    '--max_iters=1000000', status=1, timeout=60)
    assert time.monotonic() - began < 25   # torchrun kills who is still there after 30
    assert words in done.stderr
    assert 'iter 4:' in done.stdout and 'iter 6:' not in done.stdout
    assert 'terminate called' not in done.stderr
    assert load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 0   # the last evaluation


@pytest.mark.slow
def test_a_process_that_is_lost_is_given_up_after_a_while(tmp_path, tiny):
    wait = 'signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(1000)'
    done = torchrun('train.py', tiny, in_rank(1, tmp_path, wait), *HERE, f'--out_dir={tmp_path / "out"}',
                    status=1, timeout=90, DIST_TIMEOUT='4')
    line = next(line for line in done.stderr.splitlines() if line.startswith('rank 0: no connection'))
    assert re.search(r'tim(ed|e) ?out', line, re.IGNORECASE), line


@pytest.mark.parametrize('rank', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_is_restarted_with_the_others_and_the_run_ends_as_if_undisturbed(tmp_path, tiny, rank):
    kill = 'if not _once.exists(): _once.touch(); os.kill(os.getpid(), signal.SIGKILL)'
    args = (tiny, *HERE, '--init_from=auto', '--checkpoint_interval=2')
    torchrun('train.py', *args, f'--out_dir={tmp_path / "calm"}')
    done = torchrun('train.py', *args, in_rank(rank, tmp_path, kill), f'--out_dir={tmp_path / "out"}', restarts=3)
    assert (tmp_path / 'happened').exists() and 'resumed' in done.stderr
    assert log_of(tmp_path / 'out') == log_of(tmp_path / 'calm')
    assert_same_weights(*(load(tmp_path / name / 'ckpt.pt')['model'] for name in ('out', 'calm')))


@pytest.mark.slow
def test_a_restart_that_would_begin_anew_is_refused(tmp_path, tiny):
    once = "if not _once.exists(): _once.touch(); raise UserError('the first time')"
    done = torchrun('train.py', tiny, *HERE, in_rank(1, tmp_path, once), f'--out_dir={tmp_path / "out"}', restarts=1,
                    status=1, timeout=60)
    assert "init_from='scratch' would begin anew: give --init_from=auto" in done.stderr
    assert load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 0 and not (tmp_path / 'out' / 'previous-1').exists()


def test_processes_that_do_not_share_out_dir_are_refused(tmp_path, tiny):
    (tmp_path / 'apart.py').write_text(f'import os\nout_dir = {str(tmp_path)!r} + "/out" + os.environ["RANK"]\n')
    done = torchrun('train.py', tiny, *HERE, tmp_path / 'apart.py', status=1)
    assert 'must be a folder that all hosts share' in done.stderr and not done.stdout


@pytest.mark.slow
def test_an_error_of_ones_own_is_not_taken_for_a_lost_connection(tmp_path, tiny):
    (tmp_path / 'gloo').touch()
    done = torchrun('train.py', tiny, *HERE, f'--out_dir={tmp_path / "gloo"}', status=1)
    assert 'train.py: cannot write to out_dir=' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_compiled_processes_end(tmp_path, tiny, parallel):
    """torch's pool of compilers has threads that never end."""
    done = torchrun('train.py', tiny, *HERE, f'--out_dir={tmp_path / "out"}', '--max_iters=4', '--compile=True',
                    f'--parallel={parallel}', TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache'))
    assert 'stopped at step 4' in done.stderr


def children(pid):
    return [int(folder.name) for folder in Path('/proc').glob('[0-9]*')
            if (folder / 'stat').read_text().rpartition(')')[2].split()[1] == str(pid)]


@pytest.mark.parametrize('number', [
    pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT], ids=['SIGTERM', 'SIGINT'])
def test_a_signal_to_torchrun_saves_the_run(tmp_path, tiny, number):
    with started('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'train.py', tiny, *HERE,
                 f'--out_dir={tmp_path}', '--max_iters=1000000', '--eval_interval=1000000') as process:
        for line in process.stdout:
            if line.startswith('iter 20:'):
                for child in children(process.pid) if number == signal.SIGTERM else ():   # as a scheduler would
                    os.kill(child, number)
                process.send_signal(number)   # which torchrun passes on to them
                break
        out, err = process.communicate(timeout=60)
    assert f'saved in {tmp_path / "ckpt.pt"}' in err and 'terminate called' not in err
    ckpt = load(tmp_path / 'ckpt.pt')
    assert ckpt['iter_num'] == len([record for record in log_of(tmp_path) if 'iter' in record]) > 20


@pytest.mark.slow
def test_a_process_whose_peers_do_not_come_says_so(tmp_path, tiny):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    done = run('train.py', tiny, *HERE, f'--out_dir={tmp_path}', RANK='0', LOCAL_RANK='0', WORLD_SIZE='2',
               MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), DIST_TIMEOUT='2')
    assert_one_line(done, 1, 'the 2 processes did not meet', f'127.0.0.1:{port}', 'within 2 s')


@pytest.mark.parametrize('seconds', ['0', 'soon', '-1', '1.5'])
def test_a_timeout_that_is_none_is_refused(tmp_path, tiny, seconds):
    done = run('train.py', tiny, *HERE, f'--out_dir={tmp_path}', RANK='0', WORLD_SIZE='2', DIST_TIMEOUT=seconds)
    assert_one_line(done, 2, f'DIST_TIMEOUT={seconds}', 'seconds')
