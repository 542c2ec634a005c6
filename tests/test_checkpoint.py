"""Checkpoints on disk: written whole or not at all, read without running anything, whoever wrote them."""

import contextlib
import functools
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, needs

from flatgpt import checkpoint
from flatgpt.errors import UserError
from flatgpt.tokenizer import CharTokenizer
from model import GPT, GPTConfig


def small_model(vocab_size=5, **changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size, **{'block_size': 4, 'n_layer': 2, 'n_head': 2, 'n_embd': 4, **changes}))


def state_of(model, **more):
    """What train.py would save of a model."""
    return {'version': checkpoint.VERSION, 'model': model.state_dict(), 'model_args': model.config.to_dict(),
            'tokenizer': CharTokenizer('abcde').to_dict(), 'config': {'dataset': 'letters', 'patience': 0},
            'iter_num': 7, 'best_val_loss': 1.5, **more}


def as_nanogpt(model, prefix='', **more):
    """The same as nanoGPT's train.py would save it: no version, no tokenizer, prefixes, a tensor for a loss."""
    args = {name: getattr(model.config, name)
            for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
    return {'model': {prefix + name: tensor for name, tensor in model.state_dict().items()}, 'optimizer': {},
            'model_args': args, 'iter_num': 250, 'best_val_loss': torch.tensor(1.25), 'config': {}, **more}


@pytest.fixture
def path(tmp_path):
    """The path of a good checkpoint."""
    torch.save(state_of(small_model()), tmp_path / 'ckpt.pt')
    return tmp_path / 'ckpt.pt'


@contextlib.contextmanager
def file_size_limit(size):
    """No file of this process may grow beyond size bytes: the nearest thing to a full disk. Python ignores SIGXFSZ."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps_in(folder):
    """{name: step} of the checkpoints in a folder."""
    return {path.name: checkpoint.load(path)['iter_num'] for path in folder.glob('*.pt')}


def assert_same_weights(weights, others):
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# writing

def test_load_gives_back_what_save_was_given(tmp_path):
    state = state_of(small_model(bias=False, dropout=0.5), optimizer={'state': {0: {'step': torch.tensor(3.0)}}})
    weights = {name: tensor.clone() for name, tensor in state['model'].items()}
    checkpoint.save(str(tmp_path / 'ckpt.pt'), state)
    ckpt = checkpoint.load(str(tmp_path / 'ckpt.pt'))
    assert_same_weights(ckpt.pop('model'), weights)
    assert ckpt == {name: value for name, value in state.items() if name != 'model'}
    assert [file.name for file in tmp_path.iterdir()] == ['ckpt.pt']


def test_save_puts_the_file_on_the_disk_before_it_takes_the_name(path, monkeypatch):
    old, seen = path.read_bytes(), []

    def fsync(number):
        seen.append((path.read_bytes() == old, torch.load(path.with_name('ckpt.pt.tmp'))['iter_num']))

    monkeypatch.setattr('os.fsync', fsync)
    checkpoint.save(path, state_of(small_model(), iter_num=8))
    assert seen == [(True, 8)]   # complete in the temporary file, while the old one is still in its place
    assert checkpoint.load(path)['iter_num'] == 8


class Bomb:
    """Raises an error when it is pickled."""
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize('error, raised', [
    (OSError(28, 'No space left on device'), UserError), (RuntimeError('unexpected pos'), UserError),
    (ValueError('a bug'), ValueError), (KeyboardInterrupt(), KeyboardInterrupt),
], ids=lambda error: getattr(error, '__name__', None) or type(error).__name__)
def test_an_error_in_the_middle_of_a_save_leaves_the_old_file_and_nothing_else(path, error, raised):
    old = path.read_bytes()
    with pytest.raises(raised):
        checkpoint.save(path, state_of(small_model(), iter_num=8, bomb=Bomb(error)))
    assert path.read_bytes() == old
    assert [file.name for file in path.parent.iterdir()] == ['ckpt.pt']


@needs('limits')
def test_a_save_that_finds_no_room_says_so_and_leaves_the_old_file(path):
    old = path.read_bytes()
    with file_size_limit(len(old) // 2), pytest.raises(UserError, match='cannot write .*ckpt.pt: .*intact') as error:
        checkpoint.save(path, state_of(small_model(), iter_num=8))
    assert '\n' not in str(error.value) and error.value.status == 1
    assert path.read_bytes() == old
    assert [file.name for file in path.parent.iterdir()] == ['ckpt.pt']


@needs('limits')
def test_a_first_save_that_finds_no_room_says_that_there_is_none_yet(tmp_path):
    with file_size_limit(1000), pytest.raises(UserError, match='cannot write .*best.pt: .*none yet'):
        checkpoint.save(tmp_path / 'best.pt', state_of(small_model()))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# reading other files than checkpoints

def assert_refused(path, *words):
    """load() gives one line with the path and all the words."""
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    for word in (str(path), *words):
        assert word in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('part', [0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999, 1])
def test_a_truncated_checkpoint_is_refused(path, part):
    whole = path.read_bytes()
    path.write_bytes(whole[:min(int(part * len(whole)), len(whole) - 1)])
    assert_refused(path, 'cut off')


def flipped(content, at, bit):
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]


@pytest.mark.parametrize('part', [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 8))])
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path, part):
    """What has no checksum is padding, and what the directory of the zip file says twice."""
    path, state = tmp_path / 'ckpt.pt', state_of(small_model())
    checkpoint.save(path, state)
    whole, refused = path.read_bytes(), 0
    bits = [int(n) for n in np.random.Philox(key=part).random_raw(60)]
    places = [(n // 8 % len(whole), n % 8) for n in bits] + [(len(whole) - 1 - i, i % 8) for i in range(part, 1600, 8)]
    for at, bit in places:   # anywhere, and in the directory
        path.write_bytes(flipped(whole, at, bit))
        try:
            ckpt = checkpoint.load(path)
        except UserError as error:
            assert 'damaged' in str(error)
            refused += 1
        else:
            assert_same_weights(ckpt.pop('model'), state['model'])
            assert ckpt == {name: value for name, value in state.items() if name != 'model'}
    assert refused > 50


@pytest.mark.parametrize('comment', [b'flatgpt sha256 ' + b'0' * 64, b'anything'])
def test_a_checkpoint_that_ends_with_the_digest_of_an_earlier_version_is_read(path, comment):
    with zipfile.ZipFile(path, 'a') as records:
        records.comment = comment
    assert checkpoint.load(path)['iter_num'] == 7


def test_a_checkpoint_in_the_format_of_old_releases_is_read(tmp_path):
    torch.save(state_of(small_model()), tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=False)
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'] == 7


def test_a_flipped_bit_in_a_weight_that_others_have_written_is_refused_with_the_way_out(path, tmp_path):
    weight = small_model().transformer.wte.weight.detach().numpy().tobytes()
    damaged = path.read_bytes()
    path.write_bytes(flipped(damaged, damaged.index(weight), 0))
    assert torch.load(path, weights_only=True)   # which torch does not notice
    assert_refused(path, 'damaged', 'use another checkpoint')
    checkpoint.save(tmp_path / 'best.pt', state_of(small_model()))
    assert_refused(path, 'damaged', f'start from the best weights with --init_from={tmp_path / "best.pt"}')
    for step in (9, 10, 8):
        checkpoint.save(tmp_path / f'ckpt-{step}.pt', state_of(small_model()))
        os.utime(tmp_path / f'ckpt-{step}.pt', (step, step))
    assert_refused(path, 'damaged', 'copy ckpt-10.pt over ckpt.pt')


@pytest.mark.parametrize('content', [
    b'\n', b'to be or not to be\n' * 100, 'größer\n'.encode() * 50, b'\x80', b'PK\x03\x04', b'\0' * 5000,
    b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 497764107\n',
    *(np.random.Philox(key=i).random_raw(200).tobytes() for i in range(3)),
], ids=['line', 'text', 'utf8', 'pickle', 'zip', 'zeros', 'pointer', *(f'random{i}' for i in range(3))])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / 'ckpt.pt').write_bytes(content)
    assert_refused(tmp_path / 'ckpt.pt', 'git lfs pull' if b'git-lfs' in content else 'not a file of weights')


@pytest.mark.parametrize('name', ['nowhere.pt', '.', 'a\0b'])
def test_a_path_without_a_file_is_refused(tmp_path, name):
    assert_refused(tmp_path / name)


class Code:
    """Makes a file when it is unpickled."""
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, 'w')


@pytest.mark.parametrize('write, read', [
    (lambda state, path: path.write_bytes(pickle.dumps(state)), lambda path: pickle.loads(path.read_bytes())),
    (lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False), None),
    (torch.save, None),
], ids=['pickle', 'legacy', 'zip'])
@pytest.mark.filterwarnings('ignore::ResourceWarning', 'ignore::pytest.PytestUnraisableExceptionWarning')
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, write, read):
    path, marker = tmp_path / 'ckpt.pt', tmp_path / 'marker'
    write(state_of(small_model(), config=Code(marker)), path)
    assert_refused(path, *(['code', 'open', 'not run'] if read is None else []))
    assert not marker.exists()
    (read or functools.partial(torch.load, weights_only=False))(path)
    assert marker.exists()   # it was armed


@pytest.mark.parametrize('what', [
    [], torch.zeros(3), {}, {'model': {}}, {'model_args': {}}, {'model': [], 'model_args': {}},
    {'model': {}, 'model_args': None}, small_model().state_dict(),
], ids=['list', 'tensor', 'empty', 'no model_args', 'no model', 'model', 'model_args', 'state_dict'])
def test_plain_data_that_is_no_checkpoint_is_refused(tmp_path, what):
    torch.save(what, tmp_path / 'ckpt.pt')
    assert_refused(tmp_path / 'ckpt.pt', 'is no checkpoint')


@pytest.mark.parametrize('version', [checkpoint.VERSION + 1, 99, 'two'])
def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path, version):
    torch.save(state_of(small_model(), version=version), tmp_path / 'ckpt.pt')
    assert_refused(tmp_path / 'ckpt.pt', f'version {version}', 'newer')


# ---------------------------------------------------------------------------------------------------------------------
# models out of checkpoints

@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
@pytest.mark.parametrize('bias', [False, True])
def test_a_nanogpt_checkpoint_loads_with_its_weights_and_its_gelu(tmp_path, prefix, bias):
    model = small_model(bias=bias, gelu='erf')
    state = as_nanogpt(model, prefix)
    for i in range(2):   # the buffers of releases before torch 2.0
        state['model'][f'{prefix}transformer.h.{i}.attn.bias'] = torch.ones(1, 1, 4, 4)
        state['model'][f'{prefix}transformer.h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
    torch.save(state, tmp_path / 'ckpt.pt')
    ckpt = checkpoint.load(tmp_path / 'ckpt.pt')
    loaded = checkpoint.build(ckpt, tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded.state_dict(), model.state_dict())
    ids = torch.tensor([[4, 0, 3, 1]])
    assert torch.equal(loaded(ids, ids)[0], model(ids, ids)[0])
    assert ckpt['iter_num'] == 250
    assert ckpt['best_val_loss'] == 1.25 and type(ckpt['best_val_loss']) is float


WPE = 'transformer.wpe.weight'


@pytest.mark.parametrize('weights, args', [
    ({WPE: None}, {}), ({'transformer.h.9.x': torch.zeros(1)}, {}), ({WPE: torch.zeros(3, 4)}, {}), ({WPE: 1}, {}),
    ({}, {'n_layer': 3}), ({}, {'n_layer': 1}), ({}, {'bias': False}), ({}, {'n_head': 3}), ({}, {'n_embd': 'four'}),
    ({}, {'n_lairs': 2}), ({}, {'dropout': -1.0}), ({}, {'n_embd': 2**50}), ({}, {'vocab_size': 6}),
], ids=['missing', 'extra', 'shape', 'no tensor', 'deeper', 'shallower', 'bias', 'heads', 'type', 'name', 'dropout',
        'huge', 'vocabulary'])
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, weights, args):
    state = state_of(small_model())
    state['model'] = {name: w for name, w in {**state['model'], **weights}.items() if w is not None}
    state['model_args'] |= args
    with pytest.raises(UserError, match=r'x\.pt: .*do not fit') as error:
        checkpoint.build(state, 'x.pt')
    assert '\n' not in str(error.value) and len(str(error.value)) < 400


def test_resolve_takes_a_file_as_it_is_and_of_a_folder_the_best_then_the_latest(path):
    assert checkpoint.resolve(path) == path
    assert checkpoint.resolve(str(path.parent)) == path
    shutil.copy(path, path.with_name('best.pt'))
    assert checkpoint.resolve(path.parent) == path.with_name('best.pt')


def test_resolve_refuses_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r'no best\.pt, ckpt\.pt or config\.json'):
        checkpoint.resolve(tmp_path)


@pytest.mark.parametrize('name', ['gpt2', 'gpt2-xl', 'some/model'])
def test_a_file_or_folder_goes_before_a_name_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f'{name} is not in the cache'):
        checkpoint.resolve(name)
    with pytest.raises(UserError, match=f'^there is no {name}; train into it first'):
        checkpoint.model_path(name, 'resume')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert checkpoint.resolve(name) == Path(name)


@pytest.mark.parametrize('typed, near', [('out-python-chr', 'out-python-char'), ('out-python-char/', 'out-python-char'),
                                         ('./out-pyton-char', './out-python-char'), ('runs/modle', 'runs/model'),
                                         ('runs/model/bets.pt', 'runs/model/best.pt'), ('elsewhere', None)])
def test_a_model_that_is_not_there_is_named_with_the_nearest_that_is(tmp_path, monkeypatch, typed, near):
    (tmp_path / 'out-python-char').mkdir()
    (tmp_path / 'runs/model').mkdir(parents=True)
    (tmp_path / 'runs/model/best.pt').touch()
    monkeypatch.chdir(tmp_path)
    if typed.endswith('/'):
        (tmp_path / 'out-python-char').rename(tmp_path / 'out-python-chat')
        near = 'out-python-chat'
    for path in (typed, tmp_path / typed):
        with pytest.raises(UserError) as error:
            checkpoint.in_folder(path)
        assert str(error.value).startswith('there is no ')
        assert ('do you mean' in str(error.value)) == bool(near)
        assert not near or f'{near.removeprefix("./")}?' in str(error.value)


def test_load_model_gives_the_model_and_the_tokenizer_that_travelled_with_it(path):
    model, tok, ckpt = checkpoint.load_model(path.parent, dropout=0.25)
    assert not model.training and model.config.dropout == 0.25
    assert_same_weights(model.state_dict(), small_model().state_dict())
    assert tok.decode([2, 0, 1]) == 'cab' and ckpt['iter_num'] == 7


def test_the_tokenizer_of_a_nanogpt_checkpoint_is_that_of_the_named_dataset(tmp_path, char_dataset):
    vocabulary = json.loads((char_dataset / 'meta.json').read_text())['tokenizer']['chars']
    torch.save(as_nanogpt(small_model(len(vocabulary))), tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='--tokenizer_of='):
        checkpoint.load_model(tmp_path)
    _, tok, _ = checkpoint.load_model(tmp_path, tokenizer_of=str(char_dataset))
    assert tok.chars == vocabulary


@pytest.mark.parametrize('config, vocab_size, found', [
    ('{dataset}', 20, True), ('{dataset}', 64, True), ('{dataset}', 32, False), ('nowhere', 20, False),
    (None, 20, False)])
def test_a_nanogpt_checkpoint_uses_the_dataset_that_its_config_names_if_the_vocabulary_fits(
        tmp_path, char_dataset, capsys, config, vocab_size, found):
    config = {'dataset': config.format(dataset=char_dataset)} if config else {}
    torch.save(as_nanogpt(small_model(vocab_size), config=config), tmp_path / 'ckpt.pt')
    if not found:
        with pytest.raises(UserError, match='--tokenizer_of='):
            checkpoint.load_model(tmp_path)
        return
    _, tok, _ = checkpoint.load_model(tmp_path)
    assert tok.to_dict() == json.loads((char_dataset / 'meta.json').read_text())['tokenizer']
    assert 'has no tokenizer: that of the dataset' in capsys.readouterr().err


def test_a_folder_whose_run_was_moved_says_where_it_is(path):
    (path.parent / 'previous-1').mkdir()
    path.rename(path.parent / 'previous-1' / 'ckpt.pt')
    with pytest.raises(UserError, match='the run that was there is in .*previous-1'):
        checkpoint.resolve(path.parent)


def test_a_model_is_built_without_a_second_copy_of_its_weights_and_trains_all_of_them(path):
    ckpt = checkpoint.load(path)
    model = checkpoint.build(ckpt, path)
    for name, p in model.named_parameters():
        assert p.data_ptr() == ckpt['model'][name].data_ptr() and p.requires_grad
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype_become_float32(path, dtype):
    ckpt = checkpoint.load(path)
    ckpt['model'] = {name: p.to(dtype) for name, p in ckpt['model'].items()}
    assert {p.dtype for p in checkpoint.build(ckpt, path).parameters()} == {torch.float32}


def test_the_tokenizer_of_the_named_dataset_must_not_be_larger_than_the_model(tmp_path, char_dataset):
    torch.save(as_nanogpt(small_model(5)), tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='do not belong together'):
        checkpoint.load_model(tmp_path, tokenizer_of=str(char_dataset))


@needs('gpt2_encoding')
@pytest.mark.parametrize('vocab_size', [pytest.param(50257, marks=pytest.mark.full), 50304])
def test_a_nanogpt_checkpoint_of_gpt2s_vocabulary_gets_its_tokenizer(tmp_path, monkeypatch, capsys, vocab_size):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
    torch.save(as_nanogpt(small_model(vocab_size)), tmp_path / 'ckpt.pt')
    _, tok, _ = checkpoint.load_model(tmp_path)
    assert tok.encode('hello world').tolist() == [31373, 995]
    assert "has no tokenizer: GPT-2's is used" in capsys.readouterr().err


@pytest.mark.parametrize('description', ['gpt2', {'kind': 'runes'}, {'kind': 'char'}, {'kind': 'char', 'chars': 5}],
                         ids=str)
def test_a_tokenizer_that_nobody_knows_is_refused(tmp_path, description):
    torch.save(state_of(small_model(), tokenizer=description), tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='tokenizer'):
        checkpoint.load_model(tmp_path)
