"""Finetuning with train.py: adapters, freezing, masks; interrupted, in several processes, refused."""

import os
import shutil

import numpy as np
import pytest
import ranks
import torch
from conftest import assert_one_line, log_of, needs, run
from in_process import call
from test_checkpoint import assert_same_weights
from test_train import HERE, contents, load, train

from flatgpt import checkpoint, dataset, lora, optim
from flatgpt.dataset import Dataset
from flatgpt.errors import UserError
from flatgpt.tokenizer import CharTokenizer

LORA = ('--lora_rank=2', '--learning_rate=3e-2', '--lora_dropout=0.1')


@pytest.fixture(scope='module')
def adapted(tmp_path_factory, tiny, trained):
    """The out_dir of a run that trained adapters for the model of the tiny run."""
    out_dir = tmp_path_factory.mktemp('adapted')
    done = train(tiny, *LORA, f'--init_from={trained}', f'--out_dir={out_dir}')
    assert 'step 0: 2,048 parameters are trained' in done.stderr
    return out_dir


# ---------------------------------------------------------------------------------------------------------------------
# adapters

def test_adapters_learn_and_are_saved_alone_with_the_name_and_fingerprint_of_their_base(adapted, trained):
    ckpt = load(adapted / 'ckpt.pt')
    assert all(key.endswith(('lora_A', 'lora_B')) for key in ckpt['model']) and len(ckpt['model']) == 16
    assert ckpt['lora'] == {'rank': 2, 'alpha': 16.0, 'dropout': 0.1, 'targets': 'attn|mlp'}
    assert ckpt['base'] == {'path': str(trained / 'best.pt'), 'relative': 'base.pt',
                            'fingerprint': checkpoint.fingerprint(trained / 'best.pt')}
    losses = [record['val_loss'] for record in log_of(adapted) if 'step' in record]
    assert min(losses) < losses[0]
    first = [record['val_loss'] for record in log_of(trained) if 'step' in record][-1]
    assert losses[0] == pytest.approx(first, abs=1e-6)   # step 0 is the base


@pytest.mark.full
def test_an_adapter_run_that_is_resumed_is_the_same_bit_for_bit(adapted, trained, tiny, tmp_path):
    train(tiny, *LORA, f'--init_from={trained}', f'--out_dir={tmp_path}', '--max_iters=13', '--lr_decay_iters=20')
    train(f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=20', '--lr_decay_iters=None')
    log = [record for record in log_of(tmp_path) if record.get('step') != 13]
    assert log == log_of(adapted)
    assert_same_weights(*(load(folder / 'ckpt.pt')['model'] for folder in (tmp_path, adapted)))


def test_an_adapter_is_found_with_its_base_after_both_have_moved(adapted, trained, tmp_path):
    for folder in (adapted, trained):
        shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / trained.name / 'best.pt').rename(tmp_path / 'kept.pt')
    ckpt = load(adapted / 'best.pt')
    ckpt['base'] |= {'path': '/gone/best.pt', 'relative': '../kept.pt'}
    checkpoint.save(tmp_path / adapted.name / 'best.pt', ckpt)
    again, model = checkpoint.load_model(tmp_path / adapted.name)[0], checkpoint.load_model(adapted)[0]
    assert_same_weights(again.state_dict(), model.state_dict())
    (tmp_path / 'kept.pt').unlink()
    with pytest.raises(UserError, match='an adapter for /gone/best.pt, which is gone'):
        checkpoint.load_model(tmp_path / adapted.name)


def in_form_of_an_earlier_version(ckpt, trained):
    """The checkpoint of an adapter whose base is named by the digest of its weights."""
    base = {name: value for name, value in ckpt['base'].items() if name != 'fingerprint'}
    return {**ckpt, 'base': {**base, 'sha256': checkpoint.digest(checkpoint.load_model(trained)[0])}}


@pytest.mark.parametrize('earlier', [False, True], ids=['fingerprint', 'digest'])
def test_an_adapter_loads_on_its_base_alone(adapted, trained, tmp_path, earlier):
    ckpt, base = load(adapted / 'best.pt'), load(trained / 'best.pt')
    if earlier:
        ckpt = in_form_of_an_earlier_version(ckpt, trained)
    checkpoint.save(tmp_path / 'best.pt', ckpt)
    assert_same_weights(checkpoint.load_model(tmp_path)[0].state_dict(), checkpoint.load_model(adapted)[0].state_dict())
    base['model']['transformer.ln_f.weight'][0] += 1e-3
    checkpoint.save(tmp_path / 'base.pt', base)
    ckpt['base'] |= {'path': str(tmp_path / 'base.pt'), 'relative': 'base.pt'}
    checkpoint.save(tmp_path / 'best.pt', ckpt)
    with pytest.raises(UserError, match='an adapter for other weights than those in .*, which have changed'):
        checkpoint.load_model(tmp_path / 'best.pt')


def test_a_base_may_be_trained_further_or_anew_and_its_adapters_stay_usable(trained, tiny, tmp_path):
    base, adapter = shutil.copytree(trained, tmp_path / 'base'), tmp_path / 'adapter'
    done = call('train.py', tiny, '--lora_rank=2', f'--init_from={base}', f'--out_dir={adapter}', '--max_iters=1',
                *HERE)
    assert done.returncode == 0, done.stderr
    assert os.path.samefile(base / 'best.pt', adapter / 'base.pt')   # no second file on the disk
    before = checkpoint.load_model(adapter)[0].state_dict()
    for args in ((tiny, '--max_iters=1'), ('--init_from=resume', '--max_iters=2')):
        done = call('train.py', f'--out_dir={base}', *args, *HERE)
        assert done.returncode == 0, done.stderr
    shutil.move(adapter, tmp_path / 'elsewhere' / 'adapter')
    assert_same_weights(checkpoint.load_model(tmp_path / 'elsewhere' / 'adapter')[0].state_dict(), before)
    done = call('train.py', f'--out_dir={tmp_path / "elsewhere" / "adapter"}', '--init_from=resume', '--max_iters=2',
                *HERE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('at', [0, 4_000_000, 9_999_999])
def test_the_fingerprint_of_a_large_file_changes_with_its_size_and_with_each_block_that_it_samples(tmp_path, at):
    path = tmp_path / 'weights.pt'
    content = bytearray(10_000_000)
    path.write_bytes(content)
    before = checkpoint.fingerprint(path)
    step = len(content) // 1000
    at = at // step * step
    content[at] = 1
    path.write_bytes(content)
    assert checkpoint.fingerprint(path) != before
    path.write_bytes(bytes(10_000_001))
    assert checkpoint.fingerprint(path) != before


def test_the_fingerprint_of_a_folder_is_that_of_its_weights(tmp_path):
    (tmp_path / 'model.safetensors').write_bytes(b'weights')
    before = checkpoint.fingerprint(tmp_path)
    (tmp_path / 'config.json').touch()
    assert checkpoint.fingerprint(tmp_path) == before
    (tmp_path / 'model-2.safetensors').write_bytes(b'more')
    assert checkpoint.fingerprint(tmp_path) != before


def test_of_two_places_the_one_with_the_right_base_counts(adapted, trained, tmp_path):
    ckpt, other = load(adapted / 'best.pt'), load(trained / 'best.pt')
    other['model']['transformer.ln_f.weight'][0] += 1
    checkpoint.save(tmp_path / 'other.pt', other)
    (tmp_path / 'adapter').mkdir()
    shutil.copy(trained / 'best.pt', tmp_path / 'right.pt')
    ckpt['base'] |= {'path': str(tmp_path / 'other.pt'), 'relative': '../right.pt'}
    checkpoint.save(tmp_path / 'adapter' / 'best.pt', ckpt)
    checkpoint.load_model(tmp_path / 'adapter')


@pytest.mark.parametrize('damage', [lambda ckpt: ckpt['model'].popitem(), lambda ckpt: ckpt.pop('lora'),
                                    lambda ckpt: ckpt['base'].pop('relative'),
                                    lambda ckpt: ckpt['lora'].update(rank=5)],
                         ids=['a tensor', 'lora', 'a part of base', 'rank'])
def test_an_adapter_that_lacks_a_part_is_refused(adapted, tmp_path, damage):
    ckpt = load(adapted / 'best.pt')
    damage(ckpt)
    checkpoint.save(tmp_path / 'best.pt', ckpt)
    with pytest.raises(UserError, match='does not fit its own description'):
        checkpoint.load_model(tmp_path)


def test_merged_and_unmerged_give_the_same_logits(adapted):
    ids = torch.randint(12, (2, 16))
    merged, apart = (checkpoint.load_model(adapted, merged=flag)[0] for flag in (True, False))
    assert lora.adapters(apart) and not lora.adapters(merged)
    torch.testing.assert_close(merged(ids, ids)[0], apart(ids, ids)[0], rtol=0, atol=1e-5)


@pytest.mark.full
def test_full_finetuning_goes_on_from_an_adapter_as_merged(adapted, tiny, tmp_path):
    train(tiny, f'--init_from={adapted}', f'--out_dir={tmp_path}', '--max_iters=0')
    assert_same_weights(load(tmp_path / 'ckpt.pt')['model'], checkpoint.load_model(adapted)[0].state_dict())


def test_an_adapter_says_to_which_context_its_base_is_cropped(adapted, tmp_path):
    ckpt = load(adapted / 'best.pt')
    ckpt['model_args']['block_size'] = 8
    checkpoint.save(tmp_path / 'best.pt', ckpt)
    assert checkpoint.load_model(tmp_path)[0].config.block_size == 8


@pytest.mark.full
def test_an_adapter_for_a_cropped_base_knows_its_context(trained, tiny, tmp_path):
    train(tiny, *LORA, f'--init_from={trained}', f'--out_dir={tmp_path}', '--max_iters=2', '--block_size=8')
    assert checkpoint.load_model(tmp_path)[0].config.block_size == 8
    train(f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=4')


@pytest.mark.full
@needs('two_processes', 'fork')
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_processes_train_adapters_as_one(trained, tiny, tmp_path, parallel):
    args = (tiny, '--lora_rank=2', '--learning_rate=1e-3', f'--init_from={trained}', '--max_iters=4', *HERE)
    one = run('train.py', *args, f'--out_dir={tmp_path / "one"}')
    assert one.returncode == 0, one.stderr
    two = ranks.run('train.py', *args, f'--out_dir={tmp_path / "two"}', f'--parallel={parallel}')
    assert two.returncode == 0, two.stderr
    first, second = (load(tmp_path / name / 'ckpt.pt')['model'] for name in ('one', 'two'))
    assert first.keys() == second.keys()
    for name, p in first.items():
        torch.testing.assert_close(second[name], p, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# freezing

def changed(out_dir, trained):
    """The names of the parameters that a run from the tiny one has moved."""
    before, after = load(trained / 'best.pt')['model'], load(out_dir / 'ckpt.pt')['model']
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_what_is_frozen_does_not_move_and_has_no_moments(trained, tiny, tmp_path):
    done = train(tiny, f'--init_from={trained}', f'--out_dir={tmp_path}', '--max_iters=3', r'--freeze=wte|h\.0')
    moved = changed(tmp_path, trained)
    assert moved == {name for name in load(trained / 'best.pt')['model'] if not {'wte', '0'} & set(name.split('.'))
                     and name != 'lm_head.weight'}
    ckpt = load(tmp_path / 'ckpt.pt')
    assert len(ckpt['optimizer']['state']) == len(moved)
    assert 'transformer.wte.weight is lm_head.weight: freezing the one freezes the other' in done.stderr


@pytest.mark.full
def test_parameters_are_released_step_by_step_and_the_run_resumes_bit_for_bit(trained, tiny, tmp_path):
    freeze = r'--freeze=0: transformer\.(wte|wpe|h); 2: transformer\.(wte|wpe|h\.0); 4:'
    args = (tiny, f'--init_from={trained}', freeze, '--max_iters=6', '--lr_decay_iters=6', '--eval_interval=2')
    done = train(*args, '--keep_last=9', f'--out_dir={tmp_path / "whole"}')
    steps = [line.split()[1:3] for line in done.stderr.splitlines() if line.endswith('parameters are trained')]
    assert [step for step, _ in steps] == ['0:', '2:', '4:']
    counts = [int(count.replace(',', '')) for _, count in steps]
    assert counts[0] == 32 and counts == sorted(counts)
    assert counts[-1] == checkpoint.load_model(trained)[0].get_num_params(non_embedding=False)
    moments = load(tmp_path / 'whole' / 'ckpt-2.pt')['optimizer']['state']
    assert len(moments) == 1   # the last norm alone
    train(*args, '--max_iters=3', f'--out_dir={tmp_path / "parts"}')
    train(f'--out_dir={tmp_path / "parts"}', '--init_from=resume', '--max_iters=6')
    assert_same_weights(*(load(tmp_path / name / 'ckpt.pt')['model'] for name in ('parts', 'whole')))


@pytest.mark.full
@needs('two_processes', 'fork')
def test_two_processes_release_parameters_as_one(trained, tiny, tmp_path):
    args = (tiny, f'--init_from={trained}', r'--freeze=0: transformer\.(wte|wpe|h); 2: wte; 4:', '--max_iters=6',
            '--learning_rate=1e-3', *HERE)
    one = run('train.py', *args, f'--out_dir={tmp_path / "one"}')
    assert one.returncode == 0, one.stderr
    two = ranks.run('train.py', *args, f'--out_dir={tmp_path / "two"}')
    assert two.returncode == 0, two.stderr
    first, second = (load(tmp_path / name / 'ckpt.pt')['model'] for name in ('one', 'two'))
    for name, p in first.items():
        torch.testing.assert_close(second[name], p, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# masks

@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """A dataset of questions and answers, of which the answers alone are learnt: lines 'q=a', a being q backwards."""
    source = np.random.default_rng(0)
    words = [''.join(source.choice(list('abcd'), 4)) for _ in range(1000)]
    text = ''.join(f'{word}={word[::-1]}\n' for word in words)
    tok, folder = CharTokenizer.of(text), tmp_path_factory.mktemp('pairs')
    ids, mask = tok.encode(text), np.array(([False] * 5 + [True] * 5) * 1000)
    dataset.write(folder, {'train': ids[:9000], 'val': ids[9000:]}, tok, {}, {'train': mask[:9000], 'val': mask[9000:]})
    return folder, tok


def test_targets_outside_the_mask_are_minus_one_and_inputs_stay(pairs):
    folder, tok = pairs
    data = Dataset(str(folder))
    x, y = data.train_batch(3, 1, 2, 4, 20, torch.device('cpu'))
    for row, targets in zip(x.flatten(0, 1), y.flatten(0, 1)):
        text = tok.decode(row)
        for t, target in enumerate(targets.tolist()[:-1]):
            before = text[:t + 1].rpartition('\n')[2]
            if '\n' in text[:t + 1]:   # the line is known from its beginning
                assert (target != -1) == ('=' in before) and target in (-1, row[t + 1])


@pytest.mark.full
def test_the_mean_is_over_what_is_learnt_however_the_rows_are_shared_out(pairs, tiny, tmp_path):
    """Micro-batches have unequal numbers of targets, and still are worth what they have."""
    args = (tiny, f'--dataset={pairs[0]}', '--block_size=7', '--max_iters=4', '--learning_rate=1e-3', '--eval_iters=3')
    train(*args, '--batch_size=8', '--gradient_accumulation_steps=1', f'--out_dir={tmp_path / "one"}')
    train(*args, '--batch_size=2', '--gradient_accumulation_steps=4', f'--out_dir={tmp_path / "four"}')
    first, second = ([record['loss'] for record in log_of(tmp_path / name) if 'iter' in record]
                     for name in ('one', 'four'))
    assert first == pytest.approx(second, rel=1e-5)
    for name, p in load(tmp_path / 'one' / 'ckpt.pt')['model'].items():
        torch.testing.assert_close(load(tmp_path / 'four' / 'ckpt.pt')['model'][name], p, rtol=0, atol=1e-5)


@pytest.mark.full
@needs('two_processes', 'fork')
def test_two_processes_learn_what_is_to_be_learnt_as_one(pairs, tiny, tmp_path):
    args = (tiny, f'--dataset={pairs[0]}', '--block_size=7', '--max_iters=4', '--learning_rate=1e-3', '--batch_size=2',
            '--gradient_accumulation_steps=4', '--eval_iters=3', *HERE)
    one = run('train.py', *args, f'--out_dir={tmp_path / "one"}')
    assert one.returncode == 0, one.stderr
    two = ranks.run('train.py', *args, f'--out_dir={tmp_path / "two"}')
    assert two.returncode == 0, two.stderr
    for ours, theirs in zip(log_of(tmp_path / 'two'), log_of(tmp_path / 'one'), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_batch_with_nothing_to_learn_changes_nothing_and_is_no_nan(tmp_path, tiny):
    tok = CharTokenizer('ab')
    ids, nothing = np.zeros(500, np.uint16), np.zeros(500, bool)
    some = nothing.copy()
    some[250:] = True
    dataset.write(tmp_path, {'train': ids, 'val': ids}, tok, {}, {'train': nothing, 'val': some})
    data = Dataset(str(tmp_path))
    model = checkpoint.GPT(checkpoint.GPTConfig(vocab_size=2, block_size=8, n_layer=1, n_embd=8, n_head=2))
    x, y = data.train_batch(0, 1, 1, 2, 8, torch.device('cpu'))
    loss = model(x[0], y[0])[1]
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.full
def test_a_step_with_nothing_to_learn_is_no_nan_for_a_run_either(tmp_path, tiny):
    tok = CharTokenizer('ab')
    ids, mask = np.zeros(500, np.uint16), np.arange(500) >= 480
    (tmp_path / 'data').mkdir()
    dataset.write(tmp_path / 'data', {'train': ids, 'val': ids}, tok, {}, {'train': mask, 'val': mask})
    done = train(tiny, f'--dataset={tmp_path / "data"}', f'--out_dir={tmp_path / "out"}', '--batch_size=1',
                 '--gradient_accumulation_steps=1', '--max_iters=5', '--eval_iters=40')
    assert 'loss 0.0000' in done.stdout


@pytest.mark.full
def test_an_evaluation_weighs_batches_by_what_is_learnt(pairs, tiny, tmp_path):
    done = train(tiny, f'--dataset={pairs[0]}', f'--out_dir={tmp_path}', '--max_iters=0', '--eval_iters=3',
                 '--batch_size=2', '--block_size=7')
    model, data = checkpoint.load_model(tmp_path)[0], Dataset(str(pairs[0]))
    total, n = 0.0, 0
    for i in range(3):
        x, y = data.eval_batch('val', i, 3, 2, 7, torch.device('cpu'))
        k = (y != -1).sum().item()
        total, n = total + model(x, y)[1].item() * k, n + k
    assert f'val loss {total / n:.4f}' in done.stdout


@pytest.mark.parametrize('damage', ['gone', 'short'])
def test_a_mask_that_is_missing_or_too_short_is_refused(pairs, tmp_path, damage):
    folder = shutil.copytree(pairs[0], tmp_path / 'copy')
    if damage == 'gone':
        (folder / 'val.mask').unlink()
    else:
        os.truncate(folder / 'train.mask', 100)
    with pytest.raises(dataset.UserError, match='mask (is missing|has 100 tokens)'):
        Dataset(str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize(('freeze', 'words'), [
    ('wtee', ["freeze='wtee'", 'transformer.wte.weight']), ('(', ['freeze=', 'no regular expression']),
    ('.', ["freeze='.'", 'nothing left']), ('0: wte; 0:', ['rising steps']), ('5: wte', ['rising steps']),
    ('0: wte; x: wpe', ['rising steps'])])
def test_a_freeze_that_cannot_be_is_refused(trained, freeze, words):
    with pytest.raises(UserError) as refusal:
        optim.Freezer(checkpoint.load_model(trained)[0], freeze)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize('args, status, words', [
    (['--out_dir={adapted}', '--init_from=resume', '--lora_rank=4'], 2, ['another run, of lora_rank=2']),
    (['--out_dir={adapted}', '--init_from=resume', '--lora_alpha=4'], 2, ['another run, of lora_alpha=16.0']),
    (['--out_dir={adapted}', '--init_from=resume', '--lora_dropout=0.5'], 2, ['another run, of lora_dropout=0.1']),
    (['--out_dir={trained}', '--init_from=resume', '--freeze=wte'], 2, ["another run, of freeze=''"]),
    (['--out_dir={trained}', '--lora_rank=2', '--init_from={trained}'], 2, ['holds the weights', 'another folder']),
    (['--out_dir={tmp}/out', '--lora_rank=2', '--init_from={adapted}'], 2, ['lora_rank=2', 'no adapter']),
    (['--out_dir={tmp}/out', '--lora_rank=2', '--lora_targets=q_proj', '--init_from={trained}'], 1,
     ["lora_targets='q_proj'", 'c_attn']),
    (['--out_dir={tmp}/out', '--freeze=0: wte; 2:', '--parallel=fsdp'], 2, ["cannot freeze or release"]),
], ids=['rank', 'alpha', 'dropout', 'freeze', 'folder', 'adapter', 'targets', 'fsdp'])
def test_what_cannot_be_ends_in_one_line_and_writes_nothing(tmp_path, tiny, trained, adapted, args, status, words):
    before = contents(trained), contents(adapted)
    done = call('train.py', tiny, *(arg.format(trained=trained, adapted=adapted, tmp=tmp_path) for arg in args))
    assert_one_line(done, status, *words)
    assert (contents(trained), contents(adapted)) == before and not contents(tmp_path)
