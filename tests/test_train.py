"""train.py as a person runs it: what it prints and writes, that it can be stopped anywhere, and what it refuses."""

import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, log_of, needs, run, started
from in_process import call
from test_checkpoint import Code, as_nanogpt, assert_same_weights

from flatgpt import runtime
from flatgpt.dataset import Dataset, write
from flatgpt.tokenizer import CharTokenizer
from model import GPT, GPTConfig

CPU = torch.device('cpu')
HERE = ('--device=cpu', '--peak_flops=1e12')   # as in the tiny config, for runs without it; the peak is not measured


def train(*args, status=0, **more):
    done = run('train.py', *args, *HERE, **more)
    assert done.returncode == status, done.stderr
    return done


def load(path):
    return torch.load(path, weights_only=True)


def contents(folder):
    """{name: bytes} of the files in a folder and below, but for the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*')
            if path.is_file() and path.name != '.lock'}


def records(out_dir, kind):
    """The records of log.jsonl of a kind, 'iter' or 'step', in their order."""
    lines = (out_dir / 'log.jsonl').read_text(encoding='utf-8').splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [record for record in parsed if kind in record]


@pytest.fixture
def again(trained, tmp_path):
    """A copy of the finished run, to go on with."""
    return shutil.copytree(trained, tmp_path / 'again')


@pytest.fixture(scope='module')
def signals(tmp_path_factory):
    """A function that makes a config file, with which a run gets a signal in the middle of a step."""
    folder = tmp_path_factory.mktemp('signals')

    def config(name, step, times=1):
        (folder / f'{name}.py').write_text(
            f'import signal\nfrom flatgpt import optim\n_rate_at = optim.learning_rate_at\n\n'
            f'def _with_signal(step, *rest):\n'
            f'    for _ in range({times} if step == {step} else 0):\n'
            f'        signal.raise_signal(signal.{name})\n'
            f'    return _rate_at(step, *rest)\n\n'
            f'optim.learning_rate_at = _with_signal\n')
        return folder / f'{name}.py'

    return config


# ---------------------------------------------------------------------------------------------------------------------
# a run

def fresh_model(**changes):
    """The model of the tiny config before its first step."""
    torch.manual_seed(1337)
    return GPT(GPTConfig(20, 16, n_layer=2, n_embd=32, n_head=2, bias=False, **changes))


def plain_adamw(model):
    groups = [{'params': [p for p in model.parameters() if p.dim() > 1], 'weight_decay': 0.1},
              {'params': [p for p in model.parameters() if p.dim() == 1], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)


def plain_loop(model, optimizer, dataset, steps, max_norm):
    """The tiny config as the shortest loop: no micro-batches, no fused kernels. Returns what iter records hold."""
    found = []
    for step in steps:
        low, peak, warmup, end = 1e-3, 1e-2, 2, 20
        wave = math.cos(math.pi * (step - warmup) / (end - warmup))
        rate = peak * (step + 1) / (warmup + 1) if step < warmup else (peak + low) / 2 + (peak - low) / 2 * wave
        x, y = (rows[0] for rows in Dataset(str(dataset)).train_batch(step, 1337, 1, 8, 16, CPU))
        loss = torch.nn.functional.cross_entropy(model(x, y)[0].reshape(-1, 20), y.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in model.parameters()))
        for group in optimizer.param_groups:
            group['lr'] = rate
        for p in model.parameters():
            p.grad *= min(1, max_norm / norm)
        optimizer.step()
        found.append({'iter': step, 'loss': loss.item(), 'lr': rate, 'grad_norm': norm})
    return found


def assert_close(found, expected, rel=1e-4):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one == {name: pytest.approx(value, rel=rel) for name, value in other.items()}


@torch.no_grad()
def plain_loss(model, dataset, split):
    """The mean loss over eight windows spread evenly over a split."""
    ids = np.fromfile(dataset / f'{split}.bin', '<u2').astype(np.int64)
    starts = [int(i * (len(ids) - 17) / 7) for i in range(8)]
    rows = torch.from_numpy(np.stack([ids[start:start + 17] for start in starts]))
    return model.eval()(rows[:, :-1], rows[:, 1:])[1].item()


CLOCK = ('dt', 'tok_per_s', 'mfu')


def test_a_run_with_micro_batches_equals_the_plain_loop(trained, char_dataset):
    model = fresh_model()
    evals = [{split: plain_loss(model, char_dataset, split) for split in ('train', 'val')}]
    steps = plain_loop(model.train(), plain_adamw(model), char_dataset, range(20), max_norm=1.0)
    evals.append({split: plain_loss(model, char_dataset, split) for split in ('train', 'val')})
    assert steps[0]['grad_norm'] > 1 > steps[-1]['grad_norm']   # clipped, and not
    assert_close([record for record in log_of(trained) if 'iter' in record], steps)
    logged = records(trained, 'step')
    assert [record['step'] for record in logged] == [0, 10, 20]
    assert_close([{split: record[f'{split}_loss'] for split in ('train', 'val')} for record in logged[::2]], evals)
    ckpt = load(trained / 'ckpt.pt')
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ckpt['model'][name], tensor, rtol=1e-3, atol=1e-5)


def test_one_batch_equals_its_micro_batches_and_grad_clip_0_is_no_limit(tmp_path, tiny, trained, char_dataset):
    train(tiny, f'--out_dir={tmp_path}', '--batch_size=8', '--gradient_accumulation_steps=1', '--eval_iters=1',
          '--grad_clip=0.0', '--max_iters=6', '--lr_decay_iters=20')
    model = fresh_model()
    steps = plain_loop(model, plain_adamw(model), char_dataset, range(6), max_norm=math.inf)
    assert_close([record for record in log_of(tmp_path) if 'iter' in record], steps)
    clipped, free = log_of(trained), log_of(tmp_path)
    assert free[0] == pytest.approx(clipped[0], rel=1e-6)   # the losses of step 0, over the same windows
    assert free[1] == pytest.approx(clipped[1], rel=1e-5)   # iter 0: loss and gradient before any clipping
    assert free[4]['loss'] != pytest.approx(clipped[4]['loss'], rel=1e-4)


def test_a_run_makes_exactly_max_iters_updates(trained):
    assert [record['iter'] for record in records(trained, 'iter')] == list(range(20))
    ckpt = load(trained / 'ckpt.pt')
    assert ckpt['iter_num'] == 20
    assert {state['step'].item() for state in ckpt['optimizer']['state'].values()} == {20}
    assert len(ckpt['optimizer']['state']) == len(ckpt['model']) - 1   # all but the tied head


def test_the_loss_goes_down_and_best_pt_is_the_last_when_the_last_is_best(trained):
    losses = [record['val_loss'] for record in records(trained, 'step')]
    assert losses[2] < losses[1] < losses[0] - 0.5
    assert abs(losses[0] - math.log(20)) < 0.1   # at first it knows nothing
    ckpt, best = load(trained / 'ckpt.pt'), load(trained / 'best.pt')
    assert best['iter_num'] == 20 and best['best_val_loss'] == ckpt['best_val_loss'] == losses[2]
    assert_same_weights(best['model'], ckpt['model'])


def test_a_checkpoint_says_all_that_is_needed_to_use_it(trained, char_dataset):
    ckpt = load(trained / 'ckpt.pt')
    assert ckpt['version'] == 1 and ckpt['config']['learning_rate'] == 1e-2 and ckpt['config']['max_iters'] == 20
    assert ckpt['model_args'] == {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 16, 'bias': False,
                                  'vocab_size': 20, 'dropout': 0.0}
    assert ckpt['tokenizer'] == Dataset(str(char_dataset)).tokenizer
    assert contents(trained).keys() == {'ckpt.pt', 'best.pt', 'log.jsonl'}


STEP = re.compile(r'step (\d+): train loss (\d\.\d{4}), val loss (\d\.\d{4})')
ITER = re.compile(r'iter (\d+): loss (\d\.\d{4}), time (\d+\.\d\d)ms, mfu (-|\d+\.\d\d%), ([\d,]+) tok/s'
                  r'(?:, (\d+ s) left)?')


@pytest.fixture(scope='module')
def whole(tmp_path_factory, tiny):
    """(what it printed, out_dir) of an uninterrupted run in float16 with dropout."""
    out_dir = tmp_path_factory.mktemp('whole')
    return train(tiny, f'--out_dir={out_dir}', '--dtype=float16', '--dropout=0.2'), out_dir


def test_stdout_has_the_losses_in_the_known_form_and_the_log_has_the_same_numbers(whole):
    done, out_dir = whole
    logged = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    lines = done.stdout.splitlines()
    assert len(lines) == len(logged) == 23
    for line, record in zip(lines, logged):
        if 'step' in record:
            match = STEP.fullmatch(line)
            assert match and int(match[1]) == record['step'] and record['tokens'] == 128 * record['step']
            assert match[2] == f'{record["train_loss"]:.4f}' and match[3] == f'{record["val_loss"]:.4f}'
        else:
            match = ITER.fullmatch(line)
            assert match and int(match[1]) == record['iter'] and match[2] == f'{record["loss"]:.4f}'
            assert match[3] == f'{record["dt"] * 1000:.2f}' and match[5] == f'{record["tok_per_s"]:,.0f}'
            assert match[4] == (f'{record["mfu"]:.2%}' if record['mfu'] else '-')
            assert (match[6] is None) == (record['iter'] == 0)   # the first step is not like the others
    assert [logged[i].get('step') for i in (0, 11, 22)] == [0, 10, 20]   # each before the update of that step


def test_the_log_has_consistent_times(whole):
    iters, steps = records(whole[1], 'iter'), records(whole[1], 'step')
    model = fresh_model()
    assert iters[0]['mfu'] is None   # the first step warms up
    for record in iters[1:]:
        assert record['tok_per_s'] == pytest.approx(128 / record['dt'])
        assert record['mfu'] == pytest.approx(model.flops_per_token() * record['tok_per_s'] / 1e12)
    seconds = [record['seconds'] for record in steps]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert sum(record['dt'] for record in iters) < seconds[2]


def test_notices_go_to_stderr(whole):
    done, out_dir = whole
    machine, size, *rest = done.stderr.splitlines()
    assert machine.startswith('cpu (') and 'float16, not compiled, 1 process' in machine
    assert f'{fresh_model().get_num_params(non_embedding=False):,} parameters, 128 tokens per step' in size
    assert all('step 20' in line for line in rest)


# ---------------------------------------------------------------------------------------------------------------------
# interruptions

def assert_same_run(out_dir, other):
    """Weights, optimizer, scaler, counters, options and log of two runs are equal bit for bit."""
    for name in ('ckpt.pt', 'best.pt'):
        one, two = load(out_dir / name), load(other / name)
        assert one.keys() == two.keys()
        assert_same_weights(one['model'], two['model'])
        if name == 'ckpt.pt':
            states, others = one['optimizer']['state'], two['optimizer']['state']
            assert states.keys() == others.keys()
            for i in states:
                assert_same_weights(states[i], others[i])
            assert one['optimizer']['param_groups'] == two['optimizer']['param_groups']
            for part in ('scaler', 'evaluated', 'bad_evals'):
                assert one[part] == two[part]
        for part in ('iter_num', 'best_val_loss', 'model_args', 'tokenizer'):
            assert one[part] == two[part]
        local = {'out_dir', 'init_from', 'peak_flops'}
        assert {k: v for k, v in one['config'].items() if k not in local} == \
               {k: v for k, v in two['config'].items() if k not in local}
    assert log_of(out_dir) == log_of(other)


def test_resumed_at_an_evaluation_equals_uninterrupted(tmp_path, tiny, trained):
    train(tiny, f'--out_dir={tmp_path}', '--max_iters=10', '--lr_decay_iters=20')
    done = train(f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=20', '--lr_decay_iters=None')
    assert f'resumed {tmp_path / "ckpt.pt"}: step 10, 1,280 tokens seen' in done.stderr
    assert done.stdout.startswith('iter 10: ')   # the evaluation of step 10 is not made again
    assert_same_run(tmp_path, trained)
    seconds = [record['seconds'] for record in records(tmp_path, 'step')]
    assert seconds == sorted(seconds)


def interrupt_and_resume(out_dir, signals, name, *args):
    done = train(*args, signals(name, step=13), f'--out_dir={out_dir}', status=130)
    assert done.stdout.splitlines()[-1].startswith('iter 13: ')   # the step at hand was finished
    assert_one_line(done, 130, 'step 14', str(out_dir / 'ckpt.pt'), '--init_from=resume')
    assert load(out_dir / 'ckpt.pt')['iter_num'] == 14
    assert load(out_dir / 'best.pt')['iter_num'] == 10
    train(f'--out_dir={out_dir}', '--init_from=resume')   # the options are in the checkpoint


def test_terminated_between_evaluations_and_resumed_equals_uninterrupted(tmp_path, tiny, whole, signals):
    interrupt_and_resume(tmp_path, signals, 'SIGTERM', tiny, '--dtype=float16', '--dropout=0.2')
    assert_same_run(tmp_path, whole[1])
    assert load(tmp_path / 'ckpt.pt')['scaler']['scale'] > 1


@pytest.mark.full
def test_interrupted_in_bfloat16_and_resumed_equals_uninterrupted(tmp_path, tiny, signals):
    args = tiny, '--dtype=bfloat16', '--dropout=0.2'
    train(*args, f'--out_dir={tmp_path / "whole"}')
    interrupt_and_resume(tmp_path / 'parts', signals, 'SIGINT', *args)
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


def test_a_new_run_sets_the_earlier_one_aside(again, trained, tiny):
    done = train(tiny, f'--out_dir={again}', '--max_iters=1')
    assert f'the run that was in {again} is now in {again / "previous-1"}' in done.stderr
    assert contents(again / 'previous-1') == contents(trained)
    assert len(records(again, 'iter')) == 1


def test_a_second_interrupt_leaves_at_once_with_the_latest_checkpoint_whole(tmp_path, tiny, signals):
    done = train(tiny, signals('SIGINT', step=13, times=2), f'--out_dir={tmp_path}', status=130)
    assert_one_line(done, 130, 'interrupted')
    assert done.stdout.splitlines()[-1].startswith('iter 12: ')   # step 13 was not finished
    assert load(tmp_path / 'ckpt.pt')['iter_num'] == 10
    assert contents(tmp_path).keys() == {'ckpt.pt', 'best.pt', 'log.jsonl'}


@pytest.mark.full
def test_a_signal_from_outside_saves_the_steps_that_were_made(tmp_path, tiny):
    args = [tiny, f'--out_dir={tmp_path}', '--max_iters=1000000', '--eval_interval=1000000', *HERE]
    with started(ROOT / 'train.py', *args, OMP_NUM_THREADS='1') as process:
        for line in process.stdout:
            if line.startswith('iter 20:'):
                process.send_signal(signal.SIGTERM)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in err
    ckpt, iters = load(tmp_path / 'ckpt.pt'), records(tmp_path, 'iter')
    assert ckpt['iter_num'] == iters[-1]['iter'] + 1 == len(iters) > 20
    assert {state['step'].item() for state in ckpt['optimizer']['state'].values()} == {len(iters)}


def test_auto_starts_then_goes_on_from_any_folder_and_says_what_changed(tmp_path, tiny):
    done = train(os.path.relpath(tiny, tmp_path), '--init_from=auto', '--out_dir=out', '--max_iters=3',
                 '--schedule=constant', cwd=tmp_path)
    assert 'resumed' not in done.stderr and 'changed' not in done.stderr
    done = train('--init_from=auto', '--out_dir=out', '--max_iters=6', '--learning_rate=0.02', cwd=tmp_path)
    assert 'resumed out/ckpt.pt: step 3,' in done.stderr
    changed = {line for line in done.stderr.splitlines() if line.startswith('changed')}
    assert changed == {'changed: max_iters=6, was 3', 'changed: learning_rate=0.02, was 0.01'}
    assert [(record['iter'], record['lr']) for record in records(tmp_path / 'out', 'iter')][2:] == [
        (2, 0.01), (3, 0.02), (4, 0.02), (5, 0.02)]
    assert [record['step'] for record in records(tmp_path / 'out', 'step')] == [0, 3, 6]
    config = load(tmp_path / 'out' / 'ckpt.pt')['config']
    assert config['n_embd'] == 32 and config['schedule'] == 'constant' and config['learning_rate'] == 0.02


def test_a_finished_run_is_not_trained_again(again, tiny):
    before = contents(again)
    assert train(tiny, f'--out_dir={again}', '--init_from=auto').stdout == ''
    assert contents(again) == before


def test_weights_of_another_run_start_at_step_0_and_may_be_cropped(tmp_path, trained, tiny):
    done = train(tiny, f'--init_from={trained}', f'--out_dir={tmp_path}', '--block_size=8', '--max_iters=0')
    assert 'resumed' not in done.stderr and done.stdout.count('\n') == 1
    ckpt, source = load(tmp_path / 'ckpt.pt'), load(trained / 'best.pt')['model']
    source['transformer.wpe.weight'] = source['transformer.wpe.weight'][:8]
    assert_same_weights(ckpt['model'], source)
    assert ckpt['iter_num'] == 0 and not ckpt['optimizer']['state'] and ckpt['model_args']['block_size'] == 8


@pytest.mark.parametrize('start, step', [pytest.param('scratch', 0, marks=pytest.mark.full), ('resume', 20),
                                         ('path', 20)])
def test_eval_only_gives_the_loss_that_training_logged_and_writes_nothing(
        tmp_path, trained, tiny, char_dataset, start, step):
    before, out_dir = contents(trained), trained if start == 'resume' else tmp_path / 'out'
    if start == 'path':   # the checkpoint says which model, and the command line the rest
        args = [f'--init_from={trained / "ckpt.pt"}', f'--dataset={char_dataset}', '--batch_size=4', '--eval_iters=2',
                '--dtype=float32', '--dropout=0.5']   # which an evaluation does not use
    else:
        args = [tiny, f'--init_from={start}']
    done = train(*args, '--eval_only=True', f'--out_dir={out_dir}')
    record = next(record for record in records(trained, 'step') if record['step'] == step)
    match = STEP.fullmatch(done.stdout.strip())
    assert match and int(match[1]) == (0 if start == 'path' else step)
    assert match[2] == f'{record["train_loss"]:.4f}' and match[3] == f'{record["val_loss"]:.4f}'
    assert contents(trained) == before and not (tmp_path / 'out').exists()


def test_a_nanogpt_run_goes_on_with_its_optimizer(tmp_path, char_dataset):
    model = fresh_model(gelu='erf')
    optimizer = plain_adamw(model)
    plain_loop(model, optimizer, char_dataset, range(5), max_norm=1.0)
    config = {'out_dir': 'elsewhere', 'eval_interval': 5, 'log_interval': 1, 'eval_iters': 2, 'eval_only': False,
              'always_save_checkpoint': False, 'init_from': 'scratch', 'wandb_log': False, 'wandb_project': 'owt',
              'wandb_run_name': 'gpt2', 'dataset': str(char_dataset), 'gradient_accumulation_steps': 2,
              'batch_size': 4, 'block_size': 16, 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'dropout': 0.0,
              'bias': False, 'learning_rate': 1e-2, 'max_iters': 20, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95,
              'grad_clip': 1.0, 'decay_lr': True, 'warmup_iters': 2, 'lr_decay_iters': 20, 'min_lr': 1e-3,
              'backend': 'nccl', 'device': 'cuda', 'dtype': 'float32', 'compile': True}
    torch.save(as_nanogpt(model, '_orig_mod.', iter_num=5, config=config, optimizer=optimizer.state_dict()),
               tmp_path / 'ckpt.pt')
    train('--init_from=resume', f'--out_dir={tmp_path}', '--device=cpu', '--max_iters=10')
    steps = plain_loop(model, optimizer, char_dataset, range(5, 10), max_norm=1.0)
    assert_close([record for record in log_of(tmp_path) if 'iter' in record], steps)
    ckpt = load(tmp_path / 'ckpt.pt')
    assert ckpt['model_args']['gelu'] == 'erf'
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ckpt['model'][name], tensor, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# runs that go wrong

def test_an_interrupted_eval_only_ends_at_once_and_claims_no_save(tmp_path, tiny, signals):
    (tmp_path / 'stop.py').write_text('import signal\nfrom flatgpt.dataset import Dataset\n'
                                      'def _stop(*args):\n    signal.raise_signal(signal.SIGINT)\n'
                                      'Dataset.eval_batch = _stop\n')
    done = run('train.py', tiny, tmp_path / 'stop.py', '--eval_only', f'--out_dir={tmp_path / "out"}')
    assert_one_line(done, 130, 'interrupted')
    assert 'saved' not in done.stderr and not (tmp_path / 'out').exists()


def test_a_resume_with_nothing_to_do_says_so(again):
    done = train('--init_from=resume', f'--out_dir={again}', '--max_iters=7')
    assert 'nothing to do: the run has made 20 steps, max_iters=7: raise --max_iters to go on' in done.stderr


def test_patience_stops_a_run_that_gets_worse_and_best_pt_keeps_the_best(tmp_path, tiny):
    done = train(tiny, f'--out_dir={tmp_path}', '--learning_rate=0.2', '--warmup_iters=40', '--max_iters=100',
                 '--eval_interval=2', '--patience=3')
    steps = records(tmp_path, 'step')
    losses = [record['val_loss'] for record in steps]
    lowest = losses.index(min(losses))
    assert 0 < lowest == len(losses) - 4   # three without a new best, and no more
    assert [record['best_val_loss'] for record in steps] == [min(losses[:i + 1]) for i in range(len(losses))]
    best, ckpt = load(tmp_path / 'best.pt'), load(tmp_path / 'ckpt.pt')
    assert best['iter_num'] == steps[lowest]['step'] and 'optimizer' not in best
    assert best['best_val_loss'] == ckpt['best_val_loss'] == min(losses)
    assert ckpt['iter_num'] == steps[-1]['step'] and ckpt['bad_evals'] == 3
    assert '3 evaluations' in done.stderr.splitlines()[-1] and f'{min(losses):.4f}' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('log_interval, what', [
    pytest.param(1, 'the loss is nan at step 21', id='in a step'),
    pytest.param(1000, 'the train loss is nan at step 25', id='in an evaluation', marks=pytest.mark.full),
    pytest.param(1000, 'a weight is not finite at step 23', id='at an interrupt', marks=pytest.mark.full)])
def test_a_loss_that_becomes_nan_ends_the_run_and_the_checkpoint_stays_good(again, signals, log_interval, what):
    before = contents(again)
    interrupt = [signals('SIGINT', step=22)] if 'weight' in what else []
    done = train(*interrupt, f'--out_dir={again}', '--init_from=resume', '--max_iters=25', '--learning_rate=1e30',
                 '--schedule=constant', f'--log_interval={log_interval}', status=1)
    assert_one_line(done, 1, what, 'learning_rate', f'{again / "ckpt.pt"} holds the last good state')
    after = contents(again)
    assert {name: after[name] for name in ('ckpt.pt', 'best.pt')} == {name: before[name] for name in
                                                                     ('ckpt.pt', 'best.pt')}
    assert after.keys() == before.keys()
    assert [record['iter'] for record in records(again, 'iter')][20:] in ([], [20])   # and all lines are JSON
    assert [record['step'] for record in records(again, 'step')] == [0, 10, 20]


@pytest.mark.full
def test_a_run_with_the_newest_of_everything_resumes_bit_for_bit_and_keeps_its_optimizer(tmp_path, tiny):
    args = (tiny, '--arch=speedrun', '--optimizer=muon', '--loss_chunks=3', '--dtype=bfloat16', '--window=5')
    train(*args, f'--out_dir={tmp_path / "whole"}')
    train(*args, f'--out_dir={tmp_path / "parts"}', '--max_iters=13', '--lr_decay_iters=20')
    done = run('train.py', f'--out_dir={tmp_path / "parts"}', '--init_from=resume', '--optimizer=adamw')
    assert_one_line(done, 2, "the state of another run, of optimizer='muon'", 'give --init_from=')
    train(f'--out_dir={tmp_path / "parts"}', '--init_from=resume', '--max_iters=20', '--lr_decay_iters=None')
    log = [record for record in log_of(tmp_path / 'parts') if record.get('step') != 13]
    assert log == log_of(tmp_path / 'whole')
    assert_same_weights(*(load(tmp_path / name / 'ckpt.pt')['model'] for name in ('parts', 'whole')))
    assert log[-1]['val_loss'] < log[0]['val_loss'] - 0.5
    train(f'--init_from={tmp_path / "parts"}', tiny, f'--out_dir={tmp_path / "new"}', '--max_iters=1')
    assert load(tmp_path / 'new' / 'ckpt.pt')['config']['arch'] == 'speedrun'


@pytest.mark.full
@needs('limits')
def test_a_full_disk_does_not_end_the_run_and_leaves_the_old_checkpoint(again):
    import resource
    before = contents(again)
    limit = (len(before['log.jsonl']) + len(before['best.pt'])) // 2   # room for the log, none for weights
    done = subprocess.run(
        [sys.executable, ROOT / 'train.py', f'--out_dir={again}', '--init_from=resume', '--max_iters=24',
         '--eval_interval=2', *HERE], capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_one_line(done, 1, 'cannot write', str(again), 'intact')
    assert done.stdout.count('step ') == 2 and done.stderr.count('cannot write') == 2   # at 22, at 24
    after = contents(again)
    assert {name: file for name, file in after.items() if name != 'log.jsonl'} == {
        name: file for name, file in before.items() if name != 'log.jsonl'}
    assert len(records(again, 'iter')) == 24


@pytest.fixture(scope='module')
def bad(tmp_path_factory, trained):
    """A folder of things that no run can start from."""
    folder = tmp_path_factory.mktemp('bad')
    text = 'other characters ' * 100
    tok = CharTokenizer.of(text)
    (folder / 'other').mkdir()
    write(folder / 'other', {'train': tok.encode(text), 'val': tok.encode(text)}, tok, {})
    for name in ('cut', 'hostile', 'weights'):
        (folder / name).mkdir()
    whole = (trained / 'ckpt.pt').read_bytes()
    (folder / 'cut' / 'ckpt.pt').write_bytes(whole[:len(whole) // 2])
    torch.save({**load(trained / 'ckpt.pt'), 'tokenizer': Code(folder / 'marker')}, folder / 'hostile' / 'ckpt.pt')
    shutil.copy(trained / 'best.pt', folder / 'weights' / 'ckpt.pt')
    torch.save({'version': 1, 'model': {}, 'model_args': {}}, folder / 'empty.pt')
    (folder / 'file').touch()
    return folder


@pytest.mark.parametrize('args, status, words', [
    ('--dataset=nowhere', 1, ["no dataset 'nowhere'", 'shakespeare_char']),
    ('--block_size=5000', 1, ['val.bin', '3,000', 'block_size=5000']),
    ('--dataset={bad}/other --init_from={trained}', 2, ['another tokenizer', 'other']),
    ('--out_dir={bad}/cut --init_from=resume', 1, ['cut/ckpt.pt', 'cut off']),
    ('--out_dir={bad}/hostile --init_from=resume', 1, ['code', 'open', 'not run']),
    ('--out_dir={bad}/weights --init_from=resume', 1, ['weights/ckpt.pt', 'optimizer']),
    ('--init_from={bad}/empty.pt', 1, ['empty.pt']),
    ('--init_from=resume', 1, ['there is no', 'out', 'train into it first']),
    ('--init_from=gpt2-xl', 1, ['gpt2-xl']),
    ('--out_dir={trained} --init_from=resume --n_layer=3 --block_size=8', 2,
     ['n_layer=2, not 3', 'block_size=16, not 8']),
    ('--init_from={trained} --bias=True --block_size=32', 2, ['bias=False, not True', 'block_size=16, not 32']),
    ('--out_dir={bad}/file/out', 1, ['out_dir', 'file/out']),
    ('--n_embd=33', 2, ['n_embd=33', 'n_head=2', '34']),
    ('--device=tpu', 2, ["device='tpu'", "'auto'"]),
    ('--parallel=fsdp --dtype=float16', 2, ["dtype='float16'", '--dtype=bfloat16']),
    ('--init_from={trained} --arch=llama', 2, ["has pos='learned', not 'rope'", 'arch']),
    ('--init_from={trained} --window=4', 2, ['window=None, not 4']),
])
def test_what_cannot_be_ends_in_one_line(tmp_path, tiny, trained, bad, args, status, words):
    done = call('train.py', tiny, f'--out_dir={tmp_path / "out"}', *args.format(bad=bad, trained=trained).split())
    assert_one_line(done, status, *words)
    assert done.stdout == '' and not (bad / 'marker').exists()
    assert not contents(tmp_path)


@pytest.mark.parametrize('seed', [0, -1, 20261120123456, 2**63 - 1])
def test_any_integer_is_a_seed_and_dropout_a_function_of_it_and_the_step(char_dataset, seed):
    rt = runtime.setup('cpu', 'float32', False, seed)
    drawn = []
    for step in (0, 1, 10**6, 0):
        rt.reseed(seed, step)
        drawn.append(torch.rand(4).tolist())
        Dataset(str(char_dataset)).train_batch(step, seed, 1, 2, 16, CPU)
    assert drawn[0] == drawn[3] and len({tuple(numbers) for numbers in drawn}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# what a run keeps, counts and tells

def other_text(folder, char_dataset):
    """A dataset of the same characters in another order."""
    data = Dataset(str(char_dataset))
    tok = CharTokenizer(data.tokenizer['chars'])
    write(folder, {split: np.ascontiguousarray(ids[::-1]) for split, ids in data.data.items()}, tok, {})
    return folder


def test_a_run_that_goes_on_with_another_text_begins_its_best_loss_anew_and_keeps_its_best_weights(
        tmp_path, again, char_dataset):
    best = load(again / 'best.pt')
    other = other_text(tmp_path / 'other', char_dataset)
    args = (f'--dataset={other}', '--batch_size=2', '--max_iters=22', '--learning_rate=0', '--min_lr=0')
    done = call('train.py', f'--out_dir={again}', '--init_from=resume', *args, *HERE)
    assert done.returncode == 0, done.stderr
    assert 'evaluations measure something else than before' in done.stderr
    last = records(again, 'step')[-1]
    ckpt, replaced = load(again / 'ckpt.pt'), load(again / 'best.pt')
    assert ckpt['best_val_loss'] == replaced['best_val_loss'] == last['val_loss'] > best['best_val_loss'] + 0.5
    assert ckpt['bad_evals'] == 1 and f'best val loss {last["val_loss"]:.4f}' in done.stderr.splitlines()[-1]
    assert_same_weights(load(again / 'best-20.pt')['model'], best['model'])
    tokens = [record['tokens'] for record in records(again, 'step')]
    assert tokens == [0, 10 * 128, 20 * 128, 20 * 128, 20 * 128 + 2 * 64]   # counted; the text of step 20 is another
    flops = [record['flops'] for record in records(again, 'step')]
    assert flops == [n * flops[1] / tokens[1] for n in tokens]


@pytest.mark.parametrize('args, words', [
    ('--dataset=nowhere', 'no dataset'), ('--block_size=5000', 'too few'), ('--batch_size=100000000', 'GiB of memory'),
    ('--init_from=nowhere.pt', 'nowhere.pt'), ('--n_embd=33', 'n_embd=33'), ('--device=tpu', 'tpu'),
    ('--freeze=(', 'freeze'), ('--init_from=resume', 'there is no '), ('--max_iters=-1', 'max_iters'),
    ('--lora_rank=2', 'lora_rank')])
@pytest.mark.parametrize('before', ['nothing', 'a run'])
def test_a_start_that_fails_leaves_all_as_it_was(tmp_path, trained, tiny, args, words, before):
    out_dir = tmp_path / 'a' / 'b'
    if before == 'a run':
        shutil.copytree(trained, out_dir)
        if args == '--init_from=resume':
            (out_dir / 'ckpt.pt').unlink()
            words = 'best.pt has weights but no optimizer state'
    there = contents(tmp_path), sorted(tmp_path.rglob('*'))
    done = call('train.py', tiny, *HERE, f'--out_dir={out_dir}', *args.split())
    assert done.returncode in (1, 2) and words in done.stderr.splitlines()[-1], done.stderr
    assert (contents(tmp_path), sorted(tmp_path.rglob('*'))) == there


def test_a_run_that_dies_before_it_writes_has_not_moved_the_earlier_one(again, tiny, tmp_path):
    """As a batch that is too large for the memory makes it."""
    (tmp_path / 'die.py').write_text('from model import GPT\ndef _die(*args):\n    raise MemoryError\n'
                                     'GPT.logits_and_loss = _die\n')
    before = contents(again)
    done = run('train.py', tiny, tmp_path / 'die.py', f'--out_dir={again}', *HERE)
    assert_one_line(done, 1, 'out of memory')
    assert contents(again) == before


@pytest.mark.parametrize('option', ['eval_iters', 'block_size'])
def test_evaluation_windows_without_a_token_to_learn_name_the_options(tmp_path, tiny, option):
    tok, ids, mask = CharTokenizer('ab'), np.zeros(3000, np.uint16), np.zeros(3000, bool)
    mask[1000:1010] = True   # far from all windows of the evaluation
    (tmp_path / 'data').mkdir()
    write(tmp_path / 'data', {'train': ids, 'val': ids}, tok, {}, {'train': mask, 'val': mask})
    done = call('train.py', tiny, f'--dataset={tmp_path / "data"}', f'--out_dir={tmp_path / "out"}', '--eval_iters=1',
                '--batch_size=2', '--gradient_accumulation_steps=1', *HERE)
    assert_one_line(done, 1, 'no token is to be learnt in the 2 evaluation windows of train',
                    'raise eval_iters, now 1', 'block_size, now 16')
    assert 'learning_rate' not in done.stderr


@pytest.mark.parametrize('arch, context', [('gpt2', 8), ('llama', 16), ('speedrun', 16)])
def test_rows_shorter_than_the_context_cut_learned_positions_only(tmp_path, tiny, arch, context):
    common = (tiny, f'--arch={arch}', '--max_iters=1', *HERE)
    for args in ((f'--out_dir={tmp_path / "a"}',),
                 (f'--init_from={tmp_path / "a"}', f'--out_dir={tmp_path / "b"}', '--block_size=8')):
        done = call('train.py', *common, *args)
        assert done.returncode == 0, done.stderr
    ckpt = load(tmp_path / 'b' / 'ckpt.pt')
    assert ckpt['model_args']['block_size'] == context and ckpt['config']['block_size'] == 8
    per_token = records(tmp_path / 'b', 'step')[-1]['flops'] / (64)
    assert per_token == GPT(GPTConfig(**ckpt['model_args'])).flops_per_token(8)
    done = call('train.py', f'--out_dir={tmp_path / "b"}', '--init_from=resume', '--max_iters=2', *HERE)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / 'b' / 'ckpt.pt')['model_args']['block_size'] == context
    if arch == 'llama':
        done = call('train.py', *common, f'--init_from={tmp_path / "a"}', f'--out_dir={tmp_path / "c"}',
                    '--block_size=24')
        assert done.returncode == 0, done.stderr
        assert load(tmp_path / 'c' / 'ckpt.pt')['model_args']['block_size'] == 24


def test_equal_perplexities_are_told_once(tmp_path, trained, tiny):
    done = call('train.py', tiny, f'--out_dir={tmp_path}', '--max_iters=1', *HERE)
    assert re.search(r'done at step 1: .*a perplexity of [\d.]+ per character, in ', done.stderr.splitlines()[-1])


def test_a_resumed_run_goes_on_in_its_run_of_wandb(tmp_path, tiny, monkeypatch):
    calls = []

    class Wandb:
        Error = ValueError
        run = SimpleNamespace(id='abc')
        init = staticmethod(lambda **args: calls.append(args))
        log = finish = staticmethod(lambda *args, **more: None)

    monkeypatch.setitem(sys.modules, 'wandb', Wandb)
    for args in ((tiny, '--max_iters=1'), ('--init_from=resume', '--max_iters=2')):
        done = call('train.py', *args, f'--out_dir={tmp_path}', '--wandb_log', *HERE)
        assert done.returncode == 0, done.stderr
    assert [(args['id'], args['resume']) for args in calls] == [(None, None), ('abc', 'allow')]
    assert load(tmp_path / 'ckpt.pt')['wandb_id'] == 'abc' and 'wandb_id' not in load(tmp_path / 'best.pt')


def test_the_peak_of_a_busy_machine_is_measured_again(tmp_path, tiny):
    """A share of the peak above a half is suspicious: the first measurement is far below the others."""
    (tmp_path / 'busy.py').write_text('from flatgpt.runtime import Runtime\n_found = [1e6, 1e14, 1e13]\n'
                                      'Runtime.peak_flops = lambda self: _found.pop(0)\n')
    done = run('train.py', tiny, tmp_path / 'busy.py', f'--out_dir={tmp_path / "out"}', '--max_iters=6',
               '--eval_interval=3', '--device=cpu')
    assert done.returncode == 0, done.stderr
    model = fresh_model()
    for record in records(tmp_path / 'out', 'iter')[1:]:
        peak = 1e14 if record['iter'] >= 3 else 1e6
        assert record['mfu'] == pytest.approx(model.flops_per_token() * record['tok_per_s'] / peak)


# ---------------------------------------------------------------------------------------------------------------------
# companions

def wandb_records(path):
    """The records in a file that wandb wrote offline: blocks of 32 KiB with pieces of records, each after its checksum,
    length and kind (1: whole, 2: first, 3: middle, 4: last), as LevelDB's log has them, but for the first 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b''
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from('<IHB', data, at)
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b''
        if kind == 0 or 32768 - at % 32768 < 7:   # padding
            at += -at % 32768


@pytest.mark.full
def test_wandb_gets_what_is_logged(tmp_path, tiny):
    pytest.importorskip('wandb')
    done = train(tiny, '--out_dir=out', '--wandb_log=True', '--max_iters=2', cwd=tmp_path)
    (path,) = (tmp_path / 'wandb').glob('offline-run-*/*.wandb')
    sent = {}
    for record in wandb_records(path):
        if record.WhichOneof('record_type') == 'history':
            items = {'.'.join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            sent.setdefault(items['_step'], {}).update(items)
    logged = {}
    for kind in ('step', 'iter'):
        for record in records(tmp_path / 'out', kind):
            logged.setdefault(record[kind], {}).update(record)
    assert {step: {k: v for k, v in items.items() if k[0] != '_'} for step, items in sent.items()} == logged
    lines = done.stdout.splitlines()
    assert [line.split(':')[0] for line in lines] == ['step 0', 'iter 0', 'iter 1', 'step 2']


def board_of(out_dir):
    """{name: [(step, value)]} that TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(out_dir / 'tensorboard')).Reload()
    return {name: [(event.step, event.value) for event in shown.Scalars(name)] for name in shown.Tags()['scalars']}


@pytest.mark.full
def test_tensorboard_shows_what_is_logged_and_nothing_twice_after_a_resume(tmp_path, tiny):
    pytest.importorskip('tensorboard')
    train(tiny, f'--out_dir={tmp_path}', '--tensorboard', '--max_iters=7', '--lr_decay_iters=20', '--eval_interval=5')
    ckpt = load(tmp_path / 'ckpt.pt')
    torch.save({**ckpt, 'iter_num': 5, 'evaluated': 5}, tmp_path / 'ckpt.pt')   # as if a later save had been lost
    train('--init_from=resume', f'--out_dir={tmp_path}', '--max_iters=10')
    shown = board_of(tmp_path)
    for kind in ('iter', 'step'):
        for name in set(records(tmp_path, kind)[-1]) - {'mfu'}:
            logged = [(record[kind], record[name]) for record in records(tmp_path, kind)]
            assert [step for step, _ in shown[name]] == [step for step, _ in logged]
            np.testing.assert_allclose([value for _, value in shown[name]], [value for _, value in logged], rtol=1e-6)
    assert [step for step, _ in shown['val_loss']] == [0, 5, 10]


@pytest.mark.parametrize('package, option', [('wandb', 'wandb_log'), ('tensorboard', 'tensorboard')])
def test_a_package_that_is_missing_is_named_with_its_installation(tmp_path, tiny, monkeypatch, package, option):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, 'torch.utils.tensorboard', raising=False)   # imports it once
    done = call('train.py', tiny, f'--out_dir={tmp_path / "out"}', f'--{option}')
    assert_one_line(done, 1, f'{option}=True', f'pip install {package}')


@pytest.mark.full
def test_a_run_leaves_a_picture_of_its_losses_where_matplotlib_is(tmp_path, tiny, trained):
    pytest.importorskip('matplotlib')
    train(tiny, f'--out_dir={tmp_path}', '--max_iters=2', DRAW='yes')
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert not (trained / 'loss.png').exists()   # without it nothing is said


@pytest.mark.full
def test_a_picture_that_cannot_be_written_fails_no_run(tmp_path, tiny):
    pytest.importorskip('matplotlib')
    (tmp_path / 'loss.png').mkdir()
    done = train(tiny, f'--out_dir={tmp_path}', '--max_iters=1', DRAW='yes')
    assert f'cannot write {tmp_path / "loss.png"}: ' in done.stderr and 'done at step 1' in done.stderr


def test_evaluations_say_how_many_flops_were_spent(trained):
    ckpt = load(trained / 'ckpt.pt')
    per_token = GPT(GPTConfig(**ckpt['model_args'])).flops_per_token()
    assert [r['flops'] for r in records(trained, 'step')] == [r['tokens'] * per_token for r in records(trained, 'step')]
    assert records(trained, 'step')[-1]['flops'] > 0


@pytest.mark.full
@needs('c_compiler')
def test_a_compiled_run_has_the_same_losses_and_parameter_names(tmp_path, tiny, trained):
    done = train(tiny, f'--out_dir={tmp_path}', '--compile=True', '--max_iters=3', '--lr_decay_iters=20', timeout=600)
    assert ', compiled,' in done.stderr
    assert_close([record for record in log_of(tmp_path) if 'iter' in record],
                 [record for record in log_of(trained) if 'iter' in record][:3])
    assert load(tmp_path / 'ckpt.pt')['model'].keys() == load(trained / 'ckpt.pt')['model'].keys()


@pytest.mark.parametrize('first, later', [('True', 'False'), ('False', 'True')])
def test_a_resumed_run_keeps_the_dtype_that_auto_has_chosen(tmp_path, tiny, first, later):
    patch = 'from flatgpt import machine, runtime\nmachine.cpu_multiplies_bfloat16 = lambda: True\n'
    for name, faster in (('first', first), ('later', later)):
        (tmp_path / f'{name}.py').write_text(f'{patch}runtime.bfloat16_is_faster = lambda world_size: {faster}\n')
    args = (tiny, '--dtype=auto', f'--out_dir={tmp_path / "out"}')
    expected = 'bfloat16' if first == 'True' else 'float32'
    done = train(*args, tmp_path / 'first.py', '--max_iters=2')
    assert f', {expected}, ' in done.stderr and load(tmp_path / 'out' / 'ckpt.pt')['machine'] == ('cpu', expected)
    done = train(*args, tmp_path / 'later.py', '--max_iters=3', '--init_from=resume')
    assert f', {expected}, ' in done.stderr


@pytest.mark.parametrize('args, gelu', [([], 'tanh'), (['--gelu=erf'], 'erf')])
def test_the_model_and_its_checkpoint_have_the_gelu_of_the_option(tiny, tmp_path, args, gelu):
    done = call('train.py', tiny, f'--out_dir={tmp_path / "out"}', '--max_iters=1', '--eval_iters=1', *args, *HERE)
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / 'out/ckpt.pt', weights_only=True)
    assert saved['model_args'].get('gelu', 'tanh') == gelu
    resume = ['--init_from=resume', '--max_iters=2', *HERE]
    done = call('train.py', f'--out_dir={tmp_path / "out"}', *resume)
    assert done.returncode == 0, done.stderr
    other = {'tanh': 'erf', 'erf': 'tanh'}[gelu]
    done = call('train.py', f'--out_dir={tmp_path / "out"}', f'--gelu={other}', *resume)
    assert_one_line(done, 2)
    assert f'gelu={gelu!r}, not {other!r}' in done.stderr
