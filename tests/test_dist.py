"""Several processes: the same run as one, whichever way they share the work, and an end for all when one fails."""

import functools
import os
import re
import signal
import time
from pathlib import Path

import pytest
import ranks
import torch
from conftest import ROOT, assert_one_line, log_of, needs, run, started, torchrun
from in_process import call
from test_checkpoint import assert_same_weights

from flatgpt import runtime
from flatgpt.errors import UsageError
from model import GPT, GPTConfig

pytestmark = needs('two_processes')
forks = needs('fork')   # of a process that has imported torch, see ranks.py
HERE = ('--device=cpu', '--peak_flops=1e12')


def load(path):
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# one process, DDP, FSDP: the same losses and weights

# Small steps: large ones blow up the rounding of sums, which are added in another order
FIFTY = ('--max_iters=50', '--learning_rate=1e-3', '--min_lr=1e-4', '--lr_decay_iters=50', '--eval_iters=3',
         '--gradient_accumulation_steps=4', *HERE)
WAYS = {'one': (), 'ddp': ('--parallel=ddp',), 'fsdp': ('--parallel=fsdp',)}


def go(way, *args):
    """train.py in a way: in one process, or in two that share the work by DDP or FSDP."""
    done = (run if way == 'one' else ranks.run)('train.py', *args, *WAYS[way])
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope='module')
def fifty(tmp_path_factory, tiny):
    """A function of a way: the out_dir of the same fifty steps."""
    @functools.cache
    def of(way):
        out_dir = tmp_path_factory.mktemp(way)
        done = go(way, tiny, *FIFTY, f'--out_dir={out_dir}')
        assert done.stdout.count('step 50: train loss') == 1   # only one process talks
        assert done.stderr.count(f'{1 if way == "one" else 2} process') == 1
        return out_dir
    return of


def test_torchrun_with_two_processes_trains_as_one(tmp_path, tiny):
    args = (tiny, *FIFTY, '--max_iters=4', '--eval_interval=2')
    done = run('train.py', *args, f'--out_dir={tmp_path / "one"}')
    assert done.returncode == 0, done.stderr
    done = torchrun('train.py', *args, f'--out_dir={tmp_path / "two"}')
    assert done.stdout.count('step 4: train loss') == 1 and done.stderr.count('2 processes') == 1
    loss, weight = differences(tmp_path / 'one', tmp_path / 'two', steps=4)
    assert loss < 1e-5 and weight < 1e-5


def differences(out_dir, other, steps=50):
    """(largest relative difference of a loss, largest difference of a weight) of two runs."""
    logs = [[record for record in log_of(folder)] for folder in (out_dir, other)]
    assert [record.keys() for record in logs[0]] == [record.keys() for record in logs[1]]
    losses = [abs(one[key] / two[key] - 1) for one, two in zip(*logs) for key in one if 'loss' in key]
    one, two = (load(folder / 'ckpt.pt') for folder in (out_dir, other))
    assert one['iter_num'] == two['iter_num'] == steps and one['model'].keys() == two['model'].keys()
    weights = [(one['model'][name] - two['model'][name]).abs().max().item() for name in one['model']]
    return max(losses), max(weights)


@pytest.mark.full
@forks
@pytest.mark.parametrize('way', ['ddp', 'fsdp'])
def test_two_processes_train_as_one(fifty, way):
    loss, weight = differences(fifty('one'), fifty(way))
    print(f'{way}: losses differ by {loss:.1e} at most, relative; weights by {weight:.1e}')
    assert loss < 1e-5 and weight < 1e-4


@pytest.mark.full
@forks
@pytest.mark.parametrize('way', ['ddp', 'fsdp'])
def test_the_files_are_the_same_whoever_wrote_them(fifty, way):
    folders = fifty('one'), fifty(way)
    one, other = (load(out_dir / 'ckpt.pt') for out_dir in folders)
    assert {k: type(v) for k, v in one.items()} == {k: type(v) for k, v in other.items()}
    assert {k: v.shape for k, v in one['model'].items()} == {k: v.shape for k, v in other['model'].items()}
    assert one['optimizer']['param_groups'] == other['optimizer']['param_groups']
    for i, moments in one['optimizer']['state'].items():
        assert {k: (type(v), v.shape) for k, v in moments.items()} == \
               {k: (type(v), v.shape) for k, v in other['optimizer']['state'][i].items()}
    for folder in folders:   # tied weights are stored once
        ckpt = load(folder / 'ckpt.pt')['model']
        assert ckpt['lm_head.weight'].data_ptr() == ckpt['transformer.wte.weight'].data_ptr()
    sizes = [(folder / 'best.pt').stat().st_size for folder in folders]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.full
@forks
@pytest.mark.parametrize('ways', [('one', 'fsdp', 'ddp'), ('ddp', 'fsdp', 'one')], ids='-'.join)
def test_a_run_goes_on_in_another_way(tmp_path, fifty, tiny, ways):
    for way, end in zip(ways, (15, 33, 50)):   # between evaluations
        done = go(way, tiny, *FIFTY, f'--max_iters={end}', f'--out_dir={tmp_path}', '--init_from=auto')
        assert f'done at step {end}' in done.stderr
    loss, weight = differences_without_extra_evaluations(tmp_path, fifty('one'))
    assert loss < 1e-5 and weight < 1e-4


def differences_without_extra_evaluations(out_dir, other):
    (out_dir / 'log.jsonl').write_text(''.join(
        line for line in (out_dir / 'log.jsonl').read_text().splitlines(keepends=True)
        if '"step": 15,' not in line and '"step": 33,' not in line))
    return differences(out_dir, other)


@pytest.mark.full
@forks
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


@pytest.mark.full
@forks
@pytest.mark.parametrize('way', ['ddp', 'fsdp'])
def test_two_compiled_processes_train_as_one(tmp_path, tiny, way):
    """All of torch.compile but its last stage, C++, which takes a minute."""
    (tmp_path / 'quick.py').write_text(
        "import functools\nimport torch\ntorch.compile = functools.partial(torch.compile, backend='aot_eager')\n")
    args = (tiny, *FIFTY, '--max_iters=4', '--eval_interval=2')
    go('one', *args, f'--out_dir={tmp_path / "one"}')
    done = go(way, *args, tmp_path / 'quick.py', '--compile=True', f'--out_dir={tmp_path / "two"}')
    assert 'compiled, 2 processes' in done.stderr and 'not compiled' not in done.stderr
    loss, weight = differences(tmp_path / 'one', tmp_path / 'two', steps=4)
    assert loss < 1e-5 and weight < 1e-5


@pytest.mark.full
@forks
def test_fsdp_with_recomputed_activations_dropout_and_bfloat16_trains_and_resumes_bit_for_bit(tmp_path, tiny):
    args = (tiny, *HERE, '--dtype=bfloat16', '--dropout=0.1', '--activation_checkpointing', '--parallel=fsdp')
    for more in ([f'--out_dir={tmp_path / "whole"}'],
                 [f'--out_dir={tmp_path / "parts"}', '--max_iters=10', '--lr_decay_iters=20'],
                 [f'--out_dir={tmp_path / "parts"}', '--init_from=resume', '--lr_decay_iters=None']):
        done = ranks.run('train.py', *args, *more)
        assert done.returncode == 0, done.stderr
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
        if recomputed:
            runtime.recompute(model)
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


@pytest.mark.full
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
from flatgpt import optim
from flatgpt.errors import UserError
_rate_at, _once = optim.learning_rate_at, Path({str(tmp_path)!r}, 'happened')
def _fault(step, *rest):
    if step == 5 and os.environ['RANK'] == '{rank}':
        {what}
    return _rate_at(step, *rest)
optim.learning_rate_at = _fault
""")
    return path


@pytest.mark.full
def test_a_process_that_fails_ends_all_of_them_at_once_with_its_error(tmp_path, tiny):
    fault = in_rank(1, tmp_path, "_once.touch(); raise UserError('the second process has a reason')")
    done = torchrun('train.py', tiny, fault, *HERE, f'--out_dir={tmp_path / "out"}', '--max_iters=1000000', status=1)
    assert time.time() - (tmp_path / 'happened').stat().st_mtime < 25   # torchrun kills who is still there after 30
    assert 'train.py: the second process has a reason' in done.stderr
    assert 'iter 4:' in done.stdout and 'iter 6:' not in done.stdout
    assert 'terminate called' not in done.stderr
    assert load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 0   # the last evaluation


@pytest.mark.full
@forks
def test_a_process_that_is_lost_is_given_up_after_a_while(tmp_path, tiny):
    done = ranks.run('train.py', tiny, in_rank(1, tmp_path, 'time.sleep(12)'), *HERE, f'--out_dir={tmp_path / "out"}',
                     DIST_TIMEOUT='6')
    assert done.returncode == 1
    line = next(line for line in done.stderr.splitlines() if line.startswith('rank 0: lost the connection'))
    assert re.search(r'tim(ed|e) ?out', line, re.IGNORECASE), line


@pytest.mark.full
def test_a_killed_process_is_restarted_with_the_others_and_the_run_ends_as_if_undisturbed(tmp_path, tiny):
    kill = 'if not _once.exists(): _once.touch(); os.kill(os.getpid(), signal.SIGKILL)'
    args = (tiny, *HERE, '--init_from=auto', '--checkpoint_interval=2')
    done = ranks.run('train.py', *args, f'--out_dir={tmp_path / "calm"}')
    assert done.returncode == 0, done.stderr
    done = torchrun('train.py', *args, in_rank(0, tmp_path, kill), f'--out_dir={tmp_path / "out"}', restarts=3)
    assert (tmp_path / 'happened').exists() and 'resumed' in done.stderr
    assert log_of(tmp_path / 'out') == log_of(tmp_path / 'calm')
    assert_same_weights(*(load(tmp_path / name / 'ckpt.pt')['model'] for name in ('out', 'calm')))


def test_a_restart_that_would_begin_anew_is_refused(tmp_path, tiny):
    done = call('train.py', tiny, *HERE, f'--out_dir={tmp_path / "out"}', TORCHELASTIC_RESTART_COUNT='1')
    assert_one_line(done, 1, "init_from='scratch' would begin anew: give --init_from=auto")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@forks
def test_processes_that_do_not_share_out_dir_are_refused(tmp_path, tiny):
    (tmp_path / 'apart.py').write_text(f'import os\nout_dir = {str(tmp_path)!r} + "/out" + os.environ["RANK"]\n')
    done = ranks.run('train.py', tiny, *HERE, tmp_path / 'apart.py')
    assert done.returncode == 1 and not done.stdout
    assert 'must be a folder that all hosts share' in done.stderr


@pytest.mark.full
@forks
def test_an_error_of_ones_own_is_not_taken_for_a_lost_connection(tmp_path, tiny):
    (tmp_path / 'gloo').touch()
    done = ranks.run('train.py', tiny, *HERE, f'--out_dir={tmp_path / "gloo"}')
    assert done.returncode == 1
    assert 'train.py: cannot write to out_dir=' in done.stderr


def children(pid):
    return [int(folder.name) for folder in Path('/proc').glob('[0-9]*')
            if (folder / 'stat').read_text().rpartition(')')[2].split()[1] == str(pid)]


@pytest.mark.full
@needs('linux')   # /proc says which processes are torchrun's
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=['SIGTERM', 'SIGINT'])
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


@pytest.mark.full
def test_a_process_whose_peers_do_not_come_says_so(tmp_path, tiny):
    port = ranks.free_port()
    done = run('train.py', tiny, *HERE, f'--out_dir={tmp_path}', RANK='0', LOCAL_RANK='0', WORLD_SIZE='2',
               MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), DIST_TIMEOUT='2')
    assert_one_line(done, 1, 'the 2 processes did not meet', f'127.0.0.1:{port}', 'within 2 s')


@pytest.mark.parametrize('seconds', ['0', 'soon', '-1', '1.5'])
def test_a_timeout_that_is_none_is_refused(monkeypatch, seconds):
    monkeypatch.setenv('DIST_TIMEOUT', seconds)
    with pytest.raises(UsageError, match=f'DIST_TIMEOUT={seconds}: expected a whole number of seconds'):
        runtime.join_process_group(torch.device('cpu'))
