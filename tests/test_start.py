"""What a run starts from, what has changed since it was saved, and what a user is told before it starts."""

import io
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_process import options
from properties import quick

from flatgpt import lora, optim, runtime, start
from flatgpt.dataset import Dataset, write
from flatgpt.errors import UsageError, UserError
from flatgpt.tokenizer import CharTokenizer
from model import ARCHS, GPT, GPTConfig

RT = runtime.Runtime(torch.device('cpu'), torch.float32, False, 0, 1)
SMALL = {'vocab_size': 16, 'block_size': 8, 'n_layer': 2, 'n_embd': 8, 'n_head': 2}


def saved_run(config=None, **more):
    """The state of a run that was saved at step 10 by this version."""
    return {'iter_num': 10, 'best_val_loss': 1.5, 'evaluated': 8, 'bad_evals': 2, 'tokens': 640, 'flops': 6400,
            'seconds': 3.0, 'measured': 7, 'wandb_id': 'abc', 'planned': None, 'config': config or {}, **more}


# ---------------------------------------------------------------------------------------------------------------------
# a run that goes on

def resumed(saved, *args, measured=7):
    """The progress of a run that goes on with these options, and the lines for the user."""
    config = options('train.py', *args)
    config.adopt(saved['config'])
    progress = start.Progress(measured=measured)
    return progress, progress.resume(saved, 'out/ckpt.pt', config, 10)


def test_progress_is_what_was_saved():
    progress, lines = resumed(saved_run())
    assert vars(progress) == {'step': 10, **{name: value for name, value in saved_run().items()
                                            if name not in ('iter_num', 'config')}}
    assert lines == ['resumed out/ckpt.pt: step 10, 640 tokens seen, best val loss 1.5000']


def test_tokens_and_flops_never_go_backwards_whatever_the_batch_is_now():
    for args in ((), ('--batch_size=1',), ('--gradient_accumulation_steps=1', '--block_size=8')):
        progress, _ = resumed(saved_run({'batch_size': 4, 'block_size': 16}), *args)
        assert (progress.tokens, progress.flops) == (640, 6400)


@pytest.mark.parametrize('config, tokens', [
    ({'batch_size': 4, 'block_size': 16, 'gradient_accumulation_steps': 2}, 10 * 128), ({}, 10 * 40 * 12 * 1024)])
def test_a_run_that_did_not_count_tokens_has_seen_what_its_options_say(config, tokens):
    saved = {name: value for name, value in saved_run(config).items() if name not in ('tokens', 'flops')}
    progress, _ = resumed(saved, *([] if not config else ['--batch_size=1']))
    assert (progress.tokens, progress.flops) == (tokens, 10 * tokens)


@pytest.mark.parametrize('saved, args, measured, same', [
    (saved_run(), (), 7, True), (saved_run(), (), 8, False), (saved_run(), ('--batch_size=1',), 7, True),
    *((saved_run({'dataset': 'a', 'batch_size': 4, 'eval_iters': 5, 'block_size': 16}), (f'--{option}',), None, False)
      for option in ('dataset=b', 'batch_size=2', 'eval_iters=2', 'block_size=8')),
    (saved_run({'dataset': 'a', 'batch_size': 4}), ('--learning_rate=1',), None, True), (saved_run(), (), None, True),
])
def test_the_best_loss_and_patience_begin_anew_when_something_else_is_measured(saved, args, measured, same):
    """measured None: a run of an earlier version, which did not say what it measured."""
    if measured is None:
        saved = {name: value for name, value in saved.items() if name != 'measured'}
    progress, lines = resumed(saved, *args, measured=7 if measured is None else measured)
    expected = (1.5, 8, 2) if same else (math.inf, -1, 0)
    assert (progress.best_val_loss, progress.evaluated, progress.bad_evals) == expected
    told = [line for line in lines if 'begin anew' in line]
    assert bool(told) != same and all('best-10.pt' in line for line in told)


def dataset_of(folder, ids, mask=None):
    tok = CharTokenizer('abcd')
    masks = mask is not None and {'train': mask, 'val': mask}
    write(folder, {'train': ids, 'val': ids}, tok, {}, masks or None)
    return Dataset(str(folder))


def test_what_is_measured_is_the_text_its_windows_and_what_is_to_be_learnt(tmp_path):
    ids = np.arange(200, dtype=np.uint16) % 4
    other = np.arange(200, dtype=np.uint16)[::-1] % 4
    mask = np.arange(200) % 3 == 0
    plain, twin, changed, masked = (dataset_of(tmp_path / f'{i}', *args) for i, args in enumerate((
        (ids,), (ids,), (other,), (ids, mask))))
    number = start.evaluation_id(plain, 4, 2, 8)
    assert start.evaluation_id(twin, 4, 2, 8) == number
    others = [(changed, 4, 2, 8), (masked, 4, 2, 8), (plain, 5, 2, 8), (plain, 4, 3, 8), (plain, 4, 2, 9)]
    assert number not in [start.evaluation_id(*args) for args in others]


def rises(*args, saved):
    """The lines that tell of a jump of the learning rate."""
    config = options('train.py', *args)
    config.adopt(saved)
    return [line for line in start.changes(config, saved, 100) if 'learning rate rises' in line]


RECIPE = {'max_iters': 100, 'warmup_iters': 10, 'learning_rate': 1e-3, 'min_lr': 1e-4, 'schedule': 'cosine',
          'lr_decay_iters': None, 'cooldown_iters': None}


@pytest.mark.parametrize('schedule', [{'schedule': 'cosine'}, {'schedule': 'linear'},
                                      {'schedule': 'linear', 'cooldown_iters': 50}])
def test_a_longer_run_whose_learning_rate_jumps_is_told_with_both_rates_and_the_way(schedule):
    (line,) = rises('--max_iters=400', saved={**RECIPE, **schedule})
    assert ('rises from 0.0001' in line or 'rises from 0.00011' in line) and 'cooldown_iters=N (WSD)' in line


@pytest.mark.parametrize('args, changes', [
    (['--max_iters=400'], {'schedule': 'constant'}), (['--max_iters=400'], {'lr_decay_iters': 100}),
    (['--max_iters=101'], {}), (['--max_iters=50'], {}), (['--learning_rate=1e-2'], {}), ([], {})])
def test_a_learning_rate_that_does_not_jump_or_was_asked_for_is_not_told(args, changes):
    assert not rises(*args, saved={**RECIPE, **changes})


@quick
@given(st.integers(1, 1000), st.integers(1, 1000), st.sampled_from(optim.SCHEDULES), st.booleans())
def test_lines_about_changes_never_fail(before, after, schedule, nanogpt):
    saved = {'max_iters': before} if nanogpt else {**RECIPE, 'max_iters': before, 'schedule': schedule}
    config = options('train.py', f'--max_iters={after}')
    config.adopt(saved)
    lines = start.changes(config, saved, before)
    assert [line for line in lines if line.startswith('changed: max_iters')] == (
        [] if before == after else [f'changed: max_iters={after}, was {before}'])


@pytest.mark.parametrize('files, words', [
    ([], 'no best.pt, ckpt.pt or config.json in'), (['previous-1/ckpt.pt'], 'that was there is in .*previous-1'),
    (['previous-1/best.pt', 'previous-2/best.pt'], 'is in .*previous-2'), (['log.jsonl'], 'train into it first')])
def test_a_run_that_is_not_there_says_where_it_may_be(tmp_path, files, words):
    for n, name in enumerate(files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (n, n))
    with pytest.raises(UserError, match=words):
        start.choose_start(options('train.py', '--init_from=resume', f'--out_dir={tmp_path}'))


# ---------------------------------------------------------------------------------------------------------------------
# before the first step

@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('rows', [4, 8, 12])
def test_rows_may_be_shorter_than_the_context_and_longer_without_learned_positions(arch, rows):
    model = GPT(GPTConfig(**SMALL, **ARCHS[arch]))
    learned = model.config.pos == 'learned'
    if learned and rows > 8:
        with pytest.raises(ValueError, match='block_size=12'):
            start.fit_context(model, rows)
        return
    start.fit_context(model, rows)
    assert model.config.block_size == (rows if learned else max(rows, 8))
    ids = torch.zeros(1, rows, dtype=torch.long)
    assert model(ids, ids)[1].isfinite()


def told(*args, model=None, steps=100, peak=None):
    """The lines that a run with these options is told before it starts."""
    model = model or GPT(GPTConfig(**SMALL))
    flops = 480 * 1024 * model.flops_per_token()
    return start.train_notices(options('train.py', *args), model, steps, flops, RT, peak)


@pytest.mark.parametrize('warmup, steps, minutes, expected', [
    (2000, 20, None, True), (20, 20, None, True), (19, 20, None, False), (2000, 20, 1.0, False), (0, 0, None, False)])
def test_a_warmup_that_is_longer_than_the_run_is_told(warmup, steps, minutes, expected):
    lines = told(f'--warmup_iters={warmup}', f'--max_iters={steps}', f'--max_minutes={minutes}', steps=steps)
    assert any(f'try --warmup_iters={steps // 10}' in line for line in lines) == expected


def test_a_run_of_hours_is_told_before_its_first_evaluation_and_a_fast_one_is_not():
    (line,) = told('--warmup_iters=1', peak=1e8, steps=1000)
    assert 'an evaluation would take' in line and 'a step' in line and ' h;' in line
    assert not told('--warmup_iters=1', peak=1e15) and not told('--warmup_iters=1', peak=None)
    (line,) = told('--warmup_iters=1', '--max_minutes=10', peak=1e8, steps=1000)
    assert 'the run 10 min;' in line
    assert not told('--warmup_iters=1', '--eval_only', peak=1e8)


def test_the_times_that_are_told_are_those_of_the_peak():
    """A step of 6e13 FLOPs at 1e12 FLOP/s needs 60 s; an evaluation has 2 x 200 batches of a third of the work, a step
    40 batches."""
    config = options('train.py', '--warmup_iters=1')
    (line,) = start.train_notices(config, GPT(GPTConfig(**SMALL)), 100, 6 * 10**13, RT, 1e12)
    assert 'an evaluation would take 3 min, a step 60 s and the run 100 min;' in line
    two = runtime.Runtime(torch.device('cpu'), torch.float32, False, 0, 2)
    (line,) = start.train_notices(config, GPT(GPTConfig(**SMALL)), 100, 6 * 10**13, two, 1e12)
    assert 'at 2.00 TFLOP/s, ' in line and 'a step 30 s and the run 50 min;' in line


@pytest.mark.parametrize('args, expected', [
    ((), False), (('--init_from=gpt2',), True), (('--init_from=resume',), False), (('--init_from=auto',), False),
    (('--init_from=some/ckpt.pt', '--learning_rate=6e-4'), False), (('--init_from=some/ckpt.pt',), True)])
def test_a_finetune_with_the_learning_rate_of_pretraining_is_told(args, expected):
    assert any('is for pretraining' in line for line in told('--warmup_iters=1', *args)) == expected


def test_a_model_that_cannot_be_exported_is_told():
    for arch in ARCHS:
        model = GPT(GPTConfig(**SMALL, **ARCHS[arch], bias=False))
        lines = told('--warmup_iters=1', '--max_iters=100', model=model)
        assert not told('--warmup_iters=1', '--max_iters=200', model=model)   # a run that goes on
        assert any('export.py' in line for line in lines) == (arch == 'speedrun')


def needed(*args, free, **changes):
    """Whether a run with these options is refused with so many bytes free."""
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    rt = SimpleNamespace(device=torch.device('cpu'), world_size=1, free_memory=lambda: free)
    try:
        start.require_memory(model, options('train.py', *args), rt)
    except UserError as error:
        assert 'GiB of memory' in str(error) and '--lora_rank' in str(error)
        return True
    return False


def test_a_run_that_cannot_fit_into_memory_is_refused_before_it_starts():
    gib = 2**30
    assert not needed(free=gib)
    assert not needed('--batch_size=100000', free=None)   # unknown
    assert needed('--batch_size=100000', free=gib)        # activations
    assert needed(free=10_000)                            # gradients and moments
    size = 65536
    assert needed('--batch_size=8', free=gib, vocab_size=size)   # logits: 8 * 1,024 * 65,536 * 4 bytes
    model = GPT(GPTConfig(**{**SMALL, 'vocab_size': size}))
    pairs = options('dpo.py', '--batch_size=8', '--block_size=1024')   # whose logits are computed in pieces
    rt = SimpleNamespace(device=torch.device('cpu'), world_size=1, free_memory=lambda: gib)
    start.require_memory(model, pairs, rt)
    model = GPT(GPTConfig(**SMALL))
    lora.put(model, 2, 4.0, 0.0, 'attn|mlp')
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rt = SimpleNamespace(device=torch.device('cpu'), world_size=1, free_memory=lambda: 12 * trained + 10_000)
    start.require_memory(model, options('train.py', '--batch_size=1', '--block_size=8'), rt)


def test_the_free_memory_of_this_machine_is_known_on_linux():
    free = RT.free_memory()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize(('limit', 'free'), [('max', 10_240_000), (3_000_000, 1_000_000), (1_000_000, 0),
                                               (None, 10_240_000)])
def test_what_a_container_uses_already_is_not_free(monkeypatch, limit, free):
    files = {'/proc/meminfo': 'MemAvailable: 9000 kB\nSwapFree: 1000 kB\n', '/sys/fs/cgroup/memory.max': f'{limit}\n',
             '/sys/fs/cgroup/memory.stat': 'anon 2000000\nfile 500000\nanon_thp 7\n'}
    if limit is None:
        del files['/sys/fs/cgroup/memory.max']

    def open_made_up(path):
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])

    monkeypatch.setattr(runtime.sys, 'platform', 'linux')
    monkeypatch.setattr(runtime, 'open', open_made_up, raising=False)
    assert RT.free_memory() == free


def test_weights_without_a_tokenizer_are_told_and_a_larger_or_another_one_is_refused(tmp_path, capsys):
    data = dataset_of(tmp_path, np.arange(200, dtype=np.uint16) % 4)
    ckpt = {'model_args': {'vocab_size': 4}, 'tokenizer': dict(data.tokenizer)}
    start.fit_tokenizer(ckpt, 'x.pt', data, RT)
    assert data.tokenizer is ckpt['tokenizer']   # not the dataset's, which may know less
    assert capsys.readouterr().err == ''
    start.fit_tokenizer({'model_args': {'vocab_size': 4}}, 'x.pt', data, RT)
    assert 'x.pt has no tokenizer' in capsys.readouterr().err
    with pytest.raises(UserError, match='x.pt knows 3 tokens'):
        start.fit_tokenizer({'model_args': {'vocab_size': 3}}, 'x.pt', data, RT)
    with pytest.raises(UsageError, match='another tokenizer'):
        start.fit_tokenizer({**ckpt, 'tokenizer': CharTokenizer('dcba').to_dict()}, 'x.pt', data, RT)
