"""dpo.py by itself: what it learns, its reference, its pairs. What grpo.py does too is in test_aligned.py."""

import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, assert_one_line, log_of
from in_process import call

from flatgpt import checkpoint, rewards
from flatgpt.conversation import add_chatml
from flatgpt.tokenizer import load
from model import ARCHS, GPT, GPTConfig

WORDS = 'red green blue apple pear plum yes no please thanks'.split()
SETTINGS = ['--eval_interval=5', '--eval_pairs=8', '--batch_size=4', '--gradient_accumulation_steps=2',
            '--block_size=64', '--max_iters=10', '--learning_rate=3e-3', '--warmup_iters=2', '--val_fraction=0.2',
            '--device=cpu', '--dtype=float32']


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """The folder of a small chat model that has learnt nothing."""
    folder = tmp_path_factory.mktemp('base')
    tok = load('bpe:300', [' '.join(WORDS)] * 3, special=('<|im_start|>', '<|im_end|>'))
    add_chatml(tok)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, block_size=64, n_layer=2, n_embd=16, n_head=2, **ARCHS['llama']))
    checkpoint.save(folder / 'best.pt', {
        'version': 1, 'model_args': model.config.to_dict(), 'model': model.state_dict(), 'tokenizer': tok.to_dict(),
        'config': {}, 'iter_num': 0, 'best_val_loss': math.inf})
    return folder


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """A file of pairs: the polite answer is better."""
    path = tmp_path_factory.mktemp('pairs') / 'pairs.jsonl'
    records = [{'prompt': f'{one} {other}?', 'chosen': f'{other}, please', 'rejected': f'no {one}'}
               for one in WORDS[:6] for other in WORDS[:6] if one != other]
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def arguments(base, pairs, out_dir, *more):
    return [f'--init_from={base}', f'--pairs={pairs}', f'--out_dir={out_dir}', *SETTINGS, *more]


@pytest.fixture(scope='module')
def whole(base, pairs, tmp_path_factory):
    """The out_dir of a finished run."""
    out_dir = tmp_path_factory.mktemp('whole') / 'out'
    done = call('dpo.py', *arguments(base, pairs, out_dir))
    assert done.returncode == 0, done.stderr
    return out_dir



def test_it_learns_what_is_preferred_and_logs_it(whole):
    records = log_of(whole)
    evals = [record for record in records if 'step' in record]
    steps = [record for record in records if 'iter' in record]
    assert [record['step'] for record in evals] == [0, 5, 10] and len(steps) == 10
    assert evals[-1]['accuracy'] > 0.9 and evals[-1]['margin'] > evals[1]['margin'] > 0
    assert evals[-1]['val_loss'] < evals[0]['val_loss'] and evals[-1]['distance'] > 0
    for record in records:
        assert record['margin'] == pytest.approx(record['chosen_reward'] - record['rejected_reward'], abs=1e-5)


def test_step_0_is_the_reference(whole):
    first, second = [next(r for r in log_of(whole) if name in r) for name in ('step', 'iter')]
    assert first['val_loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert second['loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first['margin']) < 1e-6 and first['distance'] < 1e-6


def test_the_reference_is_the_starting_model_and_never_changes(whole, base):
    reference = checkpoint.load(whole / 'ckpt.pt')['reference']
    assert 'reference' not in checkpoint.load(whole / 'best.pt')
    state = torch.load(whole / 'ckpt.pt', weights_only=True)
    assert state['iter_num'] == 10 and reference['train'].shape[1] == 2
    again = call('dpo.py', *arguments(base, state['config']['pairs'], whole.parent / 'again', '--max_iters=0',
                                      '--eval_pairs=999'))
    assert again.returncode == 0, again.stderr
    fresh = checkpoint.load(whole.parent / 'again' / 'ckpt.pt')['reference']
    for split in ('train', 'val'):
        assert reference[split].isfinite().all() and torch.equal(fresh[split], reference[split])




@pytest.mark.parametrize('arg, told', [
    ('--max_iters=11', False), ('--eval_pairs=99', False), ('--eval_pairs=3', True), ('--loss=ipo', True),
    ('--beta=0.7', True), ('--nll_weight=1', True), ('--label_smoothing=0.1', True)])
def test_the_best_loss_begins_anew_when_another_loss_is_measured(whole, tmp_path, arg, told):
    out_dir = shutil.copytree(whole, tmp_path / 'out')
    done = call('dpo.py', f'--out_dir={out_dir}', '--init_from=resume', '--max_iters=11', arg)
    assert done.returncode == 0, done.stderr
    assert ('the best val loss and patience begin anew' in done.stderr) == told
    assert (out_dir / 'best-10.pt').exists() == told
    last = [record for record in log_of(out_dir) if 'step' in record][-1]
    assert not told or last['best_val_loss'] <= last['val_loss'] and last['step'] == 11



def test_a_base_may_be_trained_further_and_the_adapters_of_dpo_stay_usable(base, pairs, tmp_path):
    source, out_dir = shutil.copytree(base, tmp_path / 'base'), tmp_path / 'out'
    done = call('dpo.py', *arguments(source, pairs, out_dir, '--lora_rank=4', '--learning_rate=3e-2', '--max_iters=1'))
    assert done.returncode == 0, done.stderr
    before = checkpoint.load_model(out_dir)[0].state_dict()
    trained = checkpoint.load(source / 'best.pt')
    trained['model']['transformer.ln_f.weight'] += 1
    checkpoint.save(source / 'best.pt', trained)   # as a run does that goes on in the folder of the base
    after = checkpoint.load_model(out_dir)[0].state_dict()
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    done = call('dpo.py', f'--out_dir={out_dir}', '--init_from=resume', '--max_iters=2')
    assert done.returncode == 0, done.stderr


def test_the_reference_is_of_the_pairs_that_the_run_needs(base, pairs, tmp_path):
    few = '--max_iters=1', '--eval_pairs=2', '--batch_size=3', '--gradient_accumulation_steps=1'

    def known(out_dir):
        return (~checkpoint.load(out_dir / 'ckpt.pt')['reference']['train'].isnan().any(dim=1)).sum()

    for rank in (0, 4):
        out_dir = tmp_path / f'{rank}'
        assert call('dpo.py', *arguments(base, pairs, out_dir, *few, f'--lora_rank={rank}')).returncode == 0
        assert 3 <= known(out_dir) <= 5
        longer = call('dpo.py', f'--out_dir={out_dir}', '--init_from=resume', '--max_iters=3')
        if not rank:   # the first model is gone
            assert_one_line(longer, 1, 'no reference', '--init_from=')
    assert longer.returncode == 0 and known(out_dir) > 5
    whole = tmp_path / 'whole'
    assert call('dpo.py', *arguments(base, pairs, whole, *few, '--max_iters=3', '--lora_rank=4')).returncode == 0
    one, two = (checkpoint.load(folder / 'ckpt.pt')['reference']['train'] for folder in (out_dir, whole))
    torch.testing.assert_close(one, two, equal_nan=True, rtol=1e-5, atol=1e-4)   # by the base, without its adapters


def test_rows_may_be_longer_than_the_context_without_learned_positions(base, tmp_path):
    path = tmp_path / 'long.jsonl'
    path.write_text(''.join(json.dumps({'prompt': f'{"red " * 60}{word}?', 'chosen': 'yes', 'rejected': 'no'}) + '\n'
                            for word in WORDS))
    done = call('dpo.py', *arguments(base, path, tmp_path / 'out', '--block_size=200', '--max_iters=1'))
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(tmp_path / 'out' / 'ckpt.pt')['model_args']['block_size'] == 200


@pytest.mark.parametrize('loss', ['ipo', 'simpo'])
def test_the_other_losses_learn_too(loss, base, pairs, tmp_path):
    done = call('dpo.py', *arguments(base, pairs, tmp_path / 'out', f'--loss={loss}', '--beta=0.5',
                                     '--optimizer=muon'))
    assert done.returncode == 0, done.stderr
    evals = [record for record in log_of(tmp_path / 'out') if 'step' in record]
    assert evals[-1]['accuracy'] > 0.9 and evals[-1]['val_loss'] < evals[0]['val_loss']




@pytest.mark.parametrize('prefer', ['polite', 'short'])
def test_the_made_up_preferences_hold_questions_out(prefer, tmp_path):
    done = call('data/preferences/prepare.py', f'--prefer={prefer}', f'--folder={tmp_path}', '--num_pairs=200',
                '--num_held_out=60')
    assert done.returncode == 0, done.stderr
    learned, held_out = [[json.loads(line) for line in (tmp_path / f'{name}.jsonl').read_text('utf-8').splitlines()]
                         for name in ('pairs', 'held_out')]
    assert (len(learned), len(held_out)) == (200, 60)
    asked = [{pair['messages'][-1]['content'] for pair in some} for some in (learned, held_out)]
    assert all(asked) and not asked[0] & asked[1]
    reward = rewards.load(f'{ROOT}/data/preferences/rewards.py:{prefer}')
    assert all(reward(pair, pair['chosen']) and not reward(pair, pair['rejected']) for pair in learned
               if len(pair['rejected']) > len(pair['result']) + 2)




def test_other_pairs_to_validate_on_cannot_resume(base, pairs, tmp_path):
    for name in ('yes', 'please'):
        lines = [json.dumps({'prompt': word, 'chosen': name, 'rejected': 'no'}) + '\n' for word in WORDS]
        (tmp_path / f'{name}.jsonl').write_text(''.join(lines))
    first = f'--val_pairs={tmp_path}/yes.jsonl', '--max_iters=1'
    done = call('dpo.py', *arguments(base, pairs, tmp_path / 'out', *first))
    assert done.returncode == 0, done.stderr
    args = f'--out_dir={tmp_path / "out"}', '--init_from=resume'
    assert call('dpo.py', *args).returncode == 0
    assert_one_line(call('dpo.py', *args, f'--val_pairs={tmp_path}/please.jsonl'), 1, 'other pairs', '--init_from=')


def test_other_pairs_cannot_resume(whole, pairs, tmp_path):
    fewer = tmp_path / 'fewer.jsonl'
    fewer.write_text('\n'.join(pairs.read_text().splitlines()[:20]))
    done = call('dpo.py', f'--out_dir={whole}', '--init_from=resume', f'--pairs={fewer}')
    assert_one_line(done, 1, 'other pairs', '--init_from=')
