"""What dpo.py and grpo.py promise both: resume, adapters, several processes, kills, the other scripts, refusals."""

import functools
import time
from collections import namedtuple

import pytest
import test_dpo
import test_grpo
import torch
from conftest import assert_one_line, needs, run, started, torchrun
from in_process import call, options
from test_grpo import records, weights

from flatgpt import alignment, checkpoint, lora, validate
from flatgpt.conversation import add_chatml
from flatgpt.errors import UsageError
from flatgpt.tokenizer import load

base, pairs, letters = test_dpo.base, test_dpo.pairs, test_grpo.letters   # fixtures
STEPS = '--max_iters=8', '--eval_interval=4', '--schedule=constant'
# arguments: (out_dir, *more) -> list. moved: the figure of a step that is 0 for the reference. panels: of plot.py
Case = namedtuple('Case', 'script start arguments option moved panels')


@pytest.fixture(scope='module', params=['dpo.py', 'grpo.py'])
def case(request, base, pairs, letters):
    """One of the scripts, with the weights that it starts from and its arguments."""
    if request.param == 'dpo.py':
        return Case('dpo.py', base / 'best.pt', functools.partial(test_dpo.arguments, base, pairs), 'pairs=',
                    'distance', 'loss,accuracy,margin,distance')

    def arguments(out_dir, *more):
        return test_grpo.arguments(letters, out_dir, '--kl=0.01', *more)

    return Case('grpo.py', letters / 'ckpt.pt', arguments, 'reward=', 'kl',
                'reward,length,kl,entropy,clipped,no_signal')


@pytest.fixture(scope='module')
def whole(case, tmp_path_factory):
    """The out_dir of a finished run."""
    out_dir = tmp_path_factory.mktemp('whole') / 'out'
    succeed(case.script, *case.arguments(out_dir, *STEPS))
    return out_dir


def succeed(script, *args):
    done = call(script, *args)
    assert done.returncode == 0, done.stderr
    return done


def assert_same_run(out_dir, other):
    """Two runs have logged and saved the same, bit for bit."""
    assert records(out_dir) == records(other)
    for name in ('ckpt.pt', 'best.pt'):
        one, two = checkpoint.load(out_dir / name), checkpoint.load(other / name)
        for key in ('model', 'optimizer', 'reference'):
            torch.testing.assert_close(one.get(key), two.get(key), rtol=0, atol=0)


def test_a_resumed_run_is_the_whole_run(case, whole, tmp_path):
    succeed(case.script, *case.arguments(tmp_path / 'out', *STEPS, '--max_iters=4'))
    done = succeed(case.script, f'--out_dir={tmp_path / "out"}', '--init_from=resume', '--max_iters=8')
    assert 'step 4' in done.stderr
    assert_same_run(tmp_path / 'out', whole)


def test_weights_change_and_the_reference_is_not_in_the_best_ones(case, whole):
    before = weights(case.start)
    assert any(not torch.equal(p, before[name]) for name, p in weights(whole / 'best.pt').items())
    assert checkpoint.load(whole / 'ckpt.pt')['reference'] and 'reference' not in checkpoint.load(whole / 'best.pt')


def test_only_adapters_change_and_the_base_is_the_reference(case, tmp_path):
    out_dir = tmp_path / 'out'
    succeed(case.script, *case.arguments(out_dir, *STEPS, '--lora_rank=4'))
    saved = checkpoint.load(out_dir / 'ckpt.pt')
    model = checkpoint.build(saved, out_dir / 'ckpt.pt')
    before = weights(case.start)
    assert saved['model'].keys() == lora.adapters(model).keys()
    for name, p in model.named_parameters():
        if name not in saved['model']:
            assert torch.equal(p, before[name]), name
    idx = torch.randint(8, (2, 9))
    with alignment.adapters_off(model), torch.no_grad():
        found = alignment.LogProbs(model)(idx, idx)
    original = checkpoint.build(checkpoint.load(case.start), case.start)
    assert torch.equal(found, alignment.LogProbs(original)(idx, idx))
    moved = [record[case.moved] for record in records(out_dir) if 'iter' in record]
    assert moved[0] == pytest.approx(0, abs=1e-6) and moved[-1] > 0
    succeed(case.script, f'--out_dir={out_dir}', '--init_from=resume', '--max_iters=9')


def test_max_minutes_plans_the_steps_and_a_long_warmup_is_told(case, tmp_path):
    done = succeed(case.script, *case.arguments(tmp_path / 'out', '--max_minutes=0.05', '--max_iters=1000000'))
    assert 'max_minutes=0.05: ' in done.stderr and 'steps fit' in done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith('iter')][-1].endswith(' 0 s left')
    assert checkpoint.load(tmp_path / 'out' / 'ckpt.pt')['iter_num'] < 10000
    done = succeed(case.script, *case.arguments(tmp_path / 'short', '--max_iters=1', '--warmup_iters=5'))
    assert 'warmup_iters=5 is not below max_iters=1' in done.stderr


def test_another_script_cannot_resume(case, whole):
    done = call('train.py', f'--out_dir={whole}', '--init_from=resume', '--dataset=shakespeare_char')
    assert_one_line(done, 2, 'another run', case.option)


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(case, base, tmp_path):
    larger = load('bpe:400', [' '.join(test_dpo.WORDS)],
                  special=('<|im_start|>', '<|im_end|>', *map('<{}>'.format, range(60))))
    add_chatml(larger)
    checkpoint.save(tmp_path / 'best.pt', {**checkpoint.load(case.start), 'tokenizer': larger.to_dict()})
    done = call(case.script, *case.arguments(tmp_path / 'out'), f'--init_from={tmp_path}')
    assert_one_line(done, 1, 'do not belong together')


@pytest.mark.parametrize('script, words, args', [
    *((script, *case) for script in ('dpo.py', 'grpo.py') for case in (
        (('init_from', 'expected weights'), ['--init_from=scratch']), (('batch_size',), ['--batch_size=0']),
        (('beta1',), ['--beta1=1']), (('optimizer',), ['--optimizer=sgd']))),
    ('dpo.py', ('loss', "'ipo'"), ['--loss=kto']), ('dpo.py', ('beta=0',), ['--beta=0']),
    ('dpo.py', ('label_smoothing',), ['--label_smoothing=0.6']), ('dpo.py', ('val_fraction',), ['--val_fraction=1']),
    ('grpo.py', ('group_size=1', '2 or more'), ['--group_size=1']), ('grpo.py', ('kl=-1',), ['--kl=-1']),
    ('grpo.py', ('normalize', "'answer'"), ['--normalize=mean']), ('grpo.py', ('updates=0',), ['--updates=0']),
    ('grpo.py', ('clip_low=1.5',), ['--clip_low=1.5']), ('grpo.py', ('clip_high',), ['--clip_high=-1']),
    ('grpo.py', ('temperature=0', 'must differ'), ['--temperature=0']), ('grpo.py', ('num_val=0',), ['--num_val=0']),
    ('grpo.py', ('max_new_tokens=256', 'block_size=256'), ['--max_new_tokens=256']),
    ('grpo.py', ('needs questions',), ['--reward=x.py:f'])])
def test_wrong_options_are_one_line(script, words, args):
    config = options(script, '--init_from=x', *args)
    with pytest.raises(UsageError) as error:
        validate.weights_option(config)
        getattr(validate, f'{script[:-3]}_options')(config)
    assert all(word in str(error.value) for word in words)


def test_a_run_is_read_by_the_other_scripts(case, whole, tmp_path):
    hf = tmp_path / 'hf'
    for script, *args in (('sample.py', f'--out_dir={whole}', '--num_samples=1', '--max_new_tokens=3', '--start=a'),
                          ('export.py', f'--out_dir={whole}', f'--to={hf}'),
                          ('plot.py', f'--runs={whole}', f'--panels={case.panels}')):
        succeed(script, *args)


@pytest.mark.full
@needs('two_processes')
def test_two_processes_are_as_one(case, whole, tmp_path):
    torchrun(case.script, *case.arguments(tmp_path / 'out', *STEPS))
    for one, two in zip(records(tmp_path / 'out'), records(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    for name, p in weights(tmp_path / 'out' / 'ckpt.pt').items():
        torch.testing.assert_close(p, weights(whole / 'ckpt.pt')[name], rtol=1e-3, atol=1e-4)
    one, two = (checkpoint.load(folder / 'ckpt.pt')['reference'] for folder in (tmp_path / 'out', whole))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.full
@needs('linux')
def test_killed_five_times_it_ends_as_if_nothing_had_happened(case, tmp_path):
    steps = '--max_iters=400' if case.script == 'dpo.py' else '--max_iters=120', '--eval_interval=10'
    args = [*case.arguments(tmp_path / 'out', *steps), f'--init_from=auto:{case.start.parent}']
    log = tmp_path / 'out' / 'log.jsonl'
    for kill in range(5):
        with started(case.script, *args) as process:
            while process.poll() is None and not (log.exists() and log.read_bytes().count(b'"step"') > 2 * kill + 2):
                time.sleep(0.005)
            assert process.poll() is None   # it has not ended by itself
            process.kill()
    assert run(case.script, *args).returncode == 0
    assert run(case.script, *case.arguments(tmp_path / 'calm', *steps)).returncode == 0
    assert_same_run(tmp_path / 'out', tmp_path / 'calm')
