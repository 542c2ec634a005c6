"""Ids on disk come back or are refused with a reason; the batch of a step is a pure function of (seed, step)."""

import copy
import json
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import quick

from flatgpt import dataset
from flatgpt.dataset import Dataset, find, random_starts, read_meta, write
from flatgpt.errors import UserError
from flatgpt.tokenizer import CharTokenizer, from_dict

CPU = torch.device('cpu')
OLD = {'train': np.array([0, 1, 2, 3] * 10, np.uint16), 'val': np.array([3, 2, 1, 0] * 5, np.uint16)}
NEW = {'train': np.array([1, 0] * 20, np.uint16), 'val': np.array([0, 1] * 10, np.uint16)}   # as many tokens
OLD_TOK, NEW_TOK = CharTokenizer('abcd'), CharTokenizer('yz')


# Made once by the code that these tests hold fast: another number here, and no run can be repeated
GOLDEN_STARTS = [436839, 855744, 797373, 350499, 442185, 322254, 207622, 486480]
GOLDEN_X = [[[459, 460, 461], [640, 641, 642]], [[393, 394, 395], [584, 585, 586]],
            [[793, 794, 795], [929, 930, 931]], [[460, 461, 462], [782, 783, 784]]]


def sized(vocab_size):
    """What dataset.write needs of a tokenizer."""
    return SimpleNamespace(vocab_size=vocab_size, eot=None, count=lambda ids: (len(ids), len(ids)),
                           to_dict=lambda: {'kind': 'a test'})


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(os, 'fsync', lambda file: None)   # no test here loses power, and a disk takes its time


@pytest.fixture
def old(tmp_path):
    """A folder with a dataset."""
    write(tmp_path, OLD, OLD_TOK, {'text': 'old'})
    return tmp_path


@pytest.fixture(scope='module')
def ramp(tmp_path_factory):
    """A dataset in which every id is its own position: 1,000 for training and 300 for validation."""
    folder = tmp_path_factory.mktemp('ramp')
    write(folder, {'train': np.arange(1000), 'val': np.arange(300)}, sized(1000), {})
    return Dataset(str(folder))


def nanogpt(folder, itos=None, train=(0, 1, 2, 1), val=(2, 0)):
    """Make folder a dataset as nanoGPT prepares it."""
    np.array(train, np.uint16).tofile(folder / 'train.bin')
    np.array(val, np.uint16).tofile(folder / 'val.bin')
    if itos is not None:
        meta = {'vocab_size': len(itos), 'itos': itos, 'stoi': {c: i for i, c in itos.items()}}
        (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return str(folder)


def seen(folder):
    """What a reader finds: 'old', 'new', 'unfinished' or 'nothing'; anything else fails."""
    try:
        data = Dataset(str(folder))
    except UserError as error:
        if re.search('half written; run the prepare.py|is being written anew: try again', str(error)):
            return 'unfinished'
        assert re.match('no dataset|cannot read', str(error)) and not (folder / 'meta.json').exists()
        return 'nothing'
    for word, splits, tok in ('old', OLD, OLD_TOK), ('new', NEW, NEW_TOK):
        if data.tokenizer == tok.to_dict():
            assert data.vocab_size == tok.vocab_size
            assert all(np.array_equal(data.data[split], splits[split]) for split in splits)
            return word
    raise AssertionError(f'a mixture: {data.tokenizer}')


def refusal(folder, block_size=4):
    """The one line with which a dataset is refused when it is opened, or checked for a model of its vocabulary."""
    with pytest.raises(UserError) as error:
        data = Dataset(str(folder))
        data.validate_ids(block_size, data.vocab_size)
    assert '\n' not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# writing and reading

@pytest.mark.parametrize('vocab_size, dtype, ids', [
    (4, 'uint16', [0, 3, 1, 2]), (50257, 'uint16', [50256, 0]), (65536, 'uint16', [0, 255, 256, 32768, 65535]),
    (65537, 'uint32', [0, 65535, 65536]), (2**25, 'uint32', [0, 2**16, 2**25 - 1, 16909060]),
])
@pytest.mark.parametrize('given_dtype', [np.int64, np.uint32])
def test_what_is_written_is_read(tmp_path, capsys, vocab_size, dtype, ids, given_dtype):
    splits = {'train': np.array(ids * 300, given_dtype), 'val': np.array(ids, given_dtype)}
    write(tmp_path, splits, sized(vocab_size), {'path': 'a.txt', 'sha256': '00'})
    data = Dataset(f'{tmp_path}{os.sep}')
    assert data.vocab_size == vocab_size and data.tokenizer == {'kind': 'a test'}
    for split in splits:
        assert data.data[split].dtype == dtype and data.data[split].tolist() == splits[split].tolist()
        raw = (tmp_path / f'{split}.bin').read_bytes()
        assert raw == b''.join(i.to_bytes(np.dtype(dtype).itemsize, 'little') for i in splits[split].tolist())
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']
    counts = f'{len(ids) * 300:,} train tokens, {len(ids):,} val tokens'
    assert capsys.readouterr().out == f'{tmp_path}: vocabulary of {vocab_size:,}, {counts}\n'


def test_meta_json_says_all_about_the_dataset(old):
    assert json.loads((old / 'meta.json').read_text(encoding='ascii')) == {
        'format': 1, 'dtype': 'uint16', 'vocab_size': 4, 'mask': False,
        'tokens': {'train': 40, 'val': 20},
        'bytes': {'train': 40, 'val': 20}, 'characters': {'train': 40, 'val': 20},
        'source': {'text': 'old'}, 'tokenizer': {'kind': 'char', 'chars': 'abcd'}}


def test_any_character_survives_meta_json(tmp_path):
    tok = CharTokenizer('\na\0"\\é世\u2028\U0010ffff')
    write(tmp_path, {'train': tok.encode('世é'), 'val': tok.encode('')}, tok, {})
    data = Dataset(str(tmp_path))
    assert data.tokenizer == tok.to_dict() and len(data.data['val']) == 0


def test_ids_are_mapped_from_disk_and_cannot_be_changed(old):
    ids = Dataset(str(old)).data['train']
    assert isinstance(ids.base, np.memmap) and not ids.flags.writeable


def test_an_id_outside_the_vocabulary_is_not_written(old):
    with pytest.raises(AssertionError):
        write(old, {**NEW, 'val': np.array([0, 2])}, NEW_TOK, {})
    assert seen(old) == 'old'


# what a reader finds while a dataset is written, or after its writer has failed: `begin` is there before

def began(tmp_path, begin):
    if begin == 'flatgpt':
        write(tmp_path, OLD, OLD_TOK, {})
    elif begin == "nanoGPT's":
        nanogpt(tmp_path, dict(enumerate('abcd')), OLD['train'], OLD['val'])
    return 'nothing' if begin == 'nothing' else 'old'


@pytest.mark.parametrize('begin', ['flatgpt', "nanoGPT's", 'nothing'])
def test_a_reader_finds_the_old_dataset_or_the_new_one_at_every_moment(tmp_path, monkeypatch, begin):
    before, found, real = began(tmp_path, begin), [], os.replace

    def replace(source, target):
        found.append(seen(tmp_path))
        real(source, target)

    monkeypatch.setattr(os, 'replace', replace)
    write(tmp_path, NEW, NEW_TOK, {})
    assert found == [before] + ['unfinished'] * 3 and seen(tmp_path) == 'new'


@pytest.mark.parametrize('begin, error', [('flatgpt', OSError(28, 'No space left on device')),
                                          ("nanoGPT's", OSError(28, 'No space left on device')),
                                          ('nothing', KeyboardInterrupt())], ids=['flatgpt', "nanoGPT's", 'nothing'])
@pytest.mark.parametrize('call, n', [('replace', n) for n in range(4)] + [('fsync', n) for n in range(4)])
def test_a_failure_at_any_point_leaves_no_mixture(tmp_path, monkeypatch, begin, call, n, error):
    before, calls, real = began(tmp_path, begin), [], getattr(os, call)

    def fail_at_n(*args):
        calls.append(args)
        if len(calls) == n + 1:
            raise error
        real(*args)

    monkeypatch.setattr(os, call, fail_at_n)
    with pytest.raises((UserError, KeyboardInterrupt)) as raised:
        write(tmp_path, NEW, NEW_TOK, {})
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert str(raised.value) == f'cannot write the dataset {tmp_path}: No space left on device'
    assert seen(tmp_path) == (before if n < {'replace': 1, 'fsync': 3}[call] else 'unfinished')
    assert not list(tmp_path.glob('*.tmp'))
    write(tmp_path, NEW, NEW_TOK, {})
    assert seen(tmp_path) == 'new' and not list(tmp_path.glob('*.new'))


def test_a_reader_that_overlaps_a_writer_finds_no_mixture(old, monkeypatch):
    def read_meta_then_be_overtaken(folder, real=read_meta):
        meta = real(folder)
        if meta['tokenizer'] != NEW_TOK.to_dict():
            write(old, NEW, NEW_TOK, {})
        return meta

    monkeypatch.setattr(dataset, 'read_meta', read_meta_then_be_overtaken)
    assert seen(old) in ('old', 'new', 'unfinished')


def test_a_dataset_that_is_open_stays_what_it_was_while_another_is_written(old):
    data = Dataset(str(old))
    write(old, NEW, NEW_TOK, {})
    assert np.array_equal(data.data['train'], OLD['train']) and seen(old) == 'new'


def test_every_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def note(what, file):
        calls.append((what, os.stat(file).st_ino, os.stat(file).st_size))

    monkeypatch.setattr(os, 'fsync', lambda file: (note('fsync', file), fsync(file)))
    monkeypatch.setattr(os, 'replace', lambda old, new: (note(Path(new).name, old), replace(old, new)))
    write(tmp_path, NEW, NEW_TOK, {})
    synced = set()
    for what, inode, size in calls:
        if what == 'fsync':
            synced.add((inode, size))
        assert (inode, size) in synced, f'{what} was renamed before all of it was on the disk'
    assert [what for what, *_ in calls if what.endswith(('.bin', '.json'))] == ['meta.json', 'train.bin', 'val.bin',
                                                                              'meta.json']


def test_what_a_killed_writer_left_breaks_neither_reading_nor_writing(old):
    for name in ('train.bin.new', 'val.bin.new.tmp', 'meta.json.tmp'):
        (old / name).write_bytes(b'x')
    assert seen(old) == 'old'
    write(old, NEW, NEW_TOK, {})
    assert seen(old) == 'new'


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=f'^cannot write the dataset {tmp_path}/file/x: Not a directory$'):
        write(tmp_path / 'file' / 'x', NEW, NEW_TOK, {})
    write(tmp_path / 'new' / 'folder', NEW, NEW_TOK, {})
    assert seen(tmp_path / 'new' / 'folder') == 'new'


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT's folders

def test_a_folder_without_meta_is_gpt2_in_uint16(tmp_path):
    data = Dataset(nanogpt(tmp_path, train=[50256, 0, 7], val=[1]))
    assert data.vocab_size == 50257 and data.tokenizer == {'kind': 'tiktoken', 'name': 'gpt2'}
    assert data.data['train'].tolist() == [50256, 0, 7] and data.data['val'].tolist() == [1]
    assert data.data['train'].dtype == np.uint16


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_pkl_of_nanogpt_is_read(tmp_path, protocol):
    folder = nanogpt(tmp_path)
    meta = {'vocab_size': 3, 'itos': {0: '\n', 1: 'a', 2: '世'}, 'stoi': {'\n': 0, 'a': 1, '世': 2}}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta, protocol))
    data = Dataset(folder)
    assert data.vocab_size == 3 and data.tokenizer == {'kind': 'char', 'chars': '\na世'}
    assert data.perplexity(1.0) == {unit: pytest.approx(np.e) for unit in ('token', 'character')}


def test_the_ids_of_a_meta_pkl_in_any_order_keep_their_characters(tmp_path):
    data = Dataset(nanogpt(tmp_path, {0: 'b', 1: 'c', 2: 'a'}))
    assert from_dict(data.tokenizer).decode(data.data['train']) == 'bcac'


@pytest.mark.parametrize('itos', [{0: 'a', 1: 'a', 2: 'c'}, {0: 'ab', 1: 'c', 2: 'd'}, {0: 'ab', 1: '', 2: 'c'}, {}],
                         ids=['doubled', 'two letters', 'two letters and none', 'empty'])
def test_a_meta_pkl_whose_ids_are_no_characters_is_refused(tmp_path, itos):
    folder = nanogpt(tmp_path, itos)
    line = refusal(folder, block_size=1)
    assert line.startswith(f'{folder}/meta.pkl: ') and 'run the prepare.py' in line


class Hostile:
    """What unpickles to an open file, and so makes it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_pkl_that_carries_code_is_refused_and_not_run(tmp_path, protocol):
    folder, trace = nanogpt(tmp_path), tmp_path / 'trace'
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'itos': {0: 'a'}, 'x': Hostile(trace)}, protocol))
    line = refusal(folder)
    assert not trace.exists()
    assert f'{folder}/meta.pkl: ' in line and 'open' in line and 'run the prepare.py' in line


@pytest.mark.parametrize('content', [
    b'', b'garbage', pickle.dumps({'itos': {0: 'a'}})[:-5], pickle.dumps([1, 2]), pickle.dumps({'stoi': {}}),
    pickle.dumps({'itos': 7}), pickle.dumps({'itos': {0: 1}}), pickle.dumps({'itos': {1: 'a'}}),
    pickle.dumps({'itos': np.arange(3)}), b'Pperson\n.', b'\x80\x04\x8e' + (2**62).to_bytes(8, 'little') + b'.',
], ids=range(11))
def test_a_broken_meta_pkl_is_refused(tmp_path, content):
    folder = nanogpt(tmp_path)
    (tmp_path / 'meta.pkl').write_bytes(content)
    line = refusal(folder)
    assert line.startswith(f'{folder}/meta.pkl: ') and 'run the prepare.py' in line


# ---------------------------------------------------------------------------------------------------------------------
# broken datasets

@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('damage, words', [
    (lambda path: path.write_bytes(path.read_bytes() + b'\0'), ['bytes, not a multiple of 2', 'run the prepare.py']),
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), ['tokens, but meta.json says', 'run the prepare.py']),
    (lambda path: path.write_bytes(path.read_bytes() * 2), ['tokens, but meta.json says', 'run the prepare.py']),
    (lambda path: path.write_bytes(b''), ['has 0 tokens, but meta.json says', 'run the prepare.py']),
    (lambda path: path.write_bytes(path.read_bytes()[:-2] + b'\4\0'),
     ['has the token id 4, the vocabulary ends at 3', 'run its prepare.py again']),
    (lambda path: path.unlink(), ['is missing', 'run the prepare.py']),
    (lambda path: (path.unlink(), path.mkdir()), ['prepare.py']),
], ids=['one byte more', 'shorter', 'longer', 'empty', 'other id', 'missing', 'folder'])
def test_a_damaged_split_is_refused_with_its_name_and_the_remedy(old, split, damage, words):
    path = old / f'{split}.bin'
    damage(path)
    line = refusal(old)
    assert str(path) in line and all(word in line for word in words), line


@pytest.mark.parametrize('content', ['', '{', '[]', 'null', '7', '"text"', '{}', '\xff', '{"a":' * 9999])
def test_a_meta_json_that_is_none_is_refused(old, content):
    (old / 'meta.json').write_text(content, encoding='latin-1')
    line = refusal(old)
    assert line.startswith(f'{old}/meta.json: ') and 'run the prepare.py' in line


@pytest.mark.parametrize('change', [
    {'format': 2}, {'format': None}, {'dtype': 'float16'}, {'dtype': 'int16'}, {'dtype': 'object'}, {'dtype': 'V0'},
    {'dtype': 'nonsense'}, {'dtype': None}, {'vocab_size': 'many'}, {'vocab_size': None}, {'tokens': {}},
    {'tokens': 60}, {'tokens': {'train': 40}}, {'tokenizer': 'char'}, {'tokenizer': None}], ids=str)
def test_a_meta_json_with_a_value_that_cannot_be_is_refused(old, change):
    meta = json.loads((old / 'meta.json').read_text())
    (old / 'meta.json').write_text(json.dumps({**meta, **change}))
    line = refusal(old)
    assert line.startswith(f'{old}/meta.json: ') and 'run the prepare.py' in line


@pytest.mark.parametrize('key', ['format', 'dtype', 'vocab_size', 'tokens', 'tokenizer'])
def test_a_meta_json_that_lacks_a_key_is_refused(old, key):
    meta = json.loads((old / 'meta.json').read_text())
    del meta[key]
    (old / 'meta.json').write_text(json.dumps(meta))
    line = refusal(old)
    assert line.startswith(f'{old}/meta.json: ') and repr(key) in line and 'run the prepare.py' in line


def test_a_newer_format_is_refused_with_both_numbers(old):
    (old / 'meta.json').write_text('{"format": 2, "unheard": "of"}')
    assert refusal(old) == f'{old}/meta.json: format 2, expected 1; run the prepare.py of this dataset again'


def test_a_meta_json_that_cannot_be_read_is_refused(old):
    (old / 'meta.json').unlink()
    (old / 'meta.json').mkdir()
    assert refusal(old) == f'cannot read {old}: Is a directory'


@pytest.mark.parametrize('block_size, short', [(19, None), (20, 'val'), (39, 'val')])
def test_a_split_must_hold_one_window(old, block_size, short):
    if short is None:
        Dataset(str(old)).validate_ids(block_size, 4)
        return
    line = refusal(old, block_size)
    assert line.startswith(f'{old / short}.bin has 20 tokens, too few for block_size={block_size}: it needs '
                           f'{block_size + 1:,}; lower block_size')


def test_ids_are_checked_against_the_vocabulary_of_the_model(old):
    Dataset(str(old)).validate_ids(4, 4)
    with pytest.raises(UserError, match='train.bin has the token id 3, the vocabulary ends at 2'):
        Dataset(str(old)).validate_ids(4, 3)


class Endless:
    """Ids of a file far too large to look at whole, all 0 but one; it notes which were read."""

    def __init__(self, n, bad):
        self.n, self.bad, self.looked = n, bad, []

    def __len__(self):
        return self.n

    def __getitem__(self, piece):
        self.looked.append(piece)
        start, stop, _ = piece.indices(self.n)
        return np.array([9 if start <= self.bad < stop else 0])


def test_a_large_file_is_checked_whole_up_to_a_limit_and_in_a_thousand_places_past_it(ramp):
    data = copy.copy(ramp)
    data.data = {'train': Endless(2**29, -1)}
    data.validate_ids(4, 1)
    assert [piece.start for piece in data.data['train'].looked] == list(range(0, 2**29, 2**19))
    data.data = {'train': Endless(2**33, 2**33 // 1000 * 999 + 5)}
    with pytest.raises(UserError, match='has the token id 9'):
        data.validate_ids(4, 1)
    assert len(data.data['train'].looked) == 1000


# ---------------------------------------------------------------------------------------------------------------------
# finding

@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the datasets one and two, which are not prepared, and a folder that is none."""
    for name in ('one', 'two'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        (tmp_path / 'data' / name / 'prepare.py').touch()
    (tmp_path / 'data' / 'none').mkdir()
    monkeypatch.setattr(dataset, '__file__', str(tmp_path / 'flatgpt' / 'dataset.py'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('cwd, command', [('.', 'data/one/prepare.py'), ('data', 'one/prepare.py'),
                                          ('data/one', 'prepare.py'), ('data/two', '../one/prepare.py')])
def test_a_dataset_that_is_not_prepared_yet_names_the_command_from_here(project, monkeypatch, cwd, command):
    monkeypatch.chdir(project / cwd)
    with pytest.raises(UserError) as error:
        find('one')
    assert str(error.value) == f"the dataset 'one' is not there yet, make it with: python {command}"


def test_a_path_to_a_dataset_that_is_not_prepared_names_the_command_too(project):
    with pytest.raises(UserError, match='make it with: python data/two/prepare.py$'):
        find('./data/two')


@pytest.mark.parametrize('name', ['three', 'none', '', './three', '/three', 'data/one/prepare.py', 'nul\0', 'x' * 300,
                                  './' + 'x' * 300, '\ud800'])
def test_an_unknown_dataset_lists_the_known_ones(project, name):
    with pytest.raises(UserError) as error:
        find(name)
    assert str(error.value).startswith(f'no dataset {name!r} in ')
    assert '; there are one, two, or give the path of a folder; ' in str(error.value)
    assert str(error.value).endswith(f'python data/text/prepare.py --input=PATHS --name={name}')


@pytest.mark.parametrize('name', ['one', 'data/one', './data/one', 'data/one/'])
def test_a_dataset_is_found_by_name_from_anywhere_and_by_path(project, monkeypatch, name):
    write(project / 'data' / 'one', OLD, OLD_TOK, {})
    assert find(name).resolve() == project / 'data' / 'one' and seen(find(name)) == 'old'
    monkeypatch.chdir('/')
    assert find('one') == project / 'data' / 'one'


def test_a_folder_of_the_same_name_here_is_not_taken_for_the_projects_dataset(project):
    (project / 'one').mkdir()
    write(project / 'one', NEW, NEW_TOK, {})
    write(project / 'data' / 'one', OLD, OLD_TOK, {})
    assert find('one') == project / 'data' / 'one' and find('./one').resolve() == project / 'one'


# ---------------------------------------------------------------------------------------------------------------------
# batches

def train_batch(data, step=5, seed=1337, micro_batches=4, batch_size=2, block_size=3, **of):
    return data.train_batch(step, seed, micro_batches, batch_size, block_size, CPU, **of)


def test_a_golden_batch_of_starts():
    assert random_starts(1_003_854 - 256, 8, 1337, 250).tolist() == GOLDEN_STARTS
    assert random_starts(1_003_854 - 256, 3, 1337, 250).tolist() == GOLDEN_STARTS[:3]


def test_a_golden_batch_of_contents(ramp):
    x, y = train_batch(ramp)
    assert x.tolist() == GOLDEN_X
    assert torch.equal(y, x + 1)   # in the ramp, the token ahead is one more


def test_a_training_batch_has_the_windows_at_its_starts_and_the_targets_one_ahead(ramp):
    data = copy.copy(ramp)
    data.data = {'train': np.random.default_rng(0).integers(0, 60000, 5000).astype(np.uint16)}
    x, y = train_batch(data, micro_batches=3, batch_size=5, block_size=7)
    assert x.shape == y.shape == (3, 5, 7) and x.dtype == y.dtype == torch.int64 and x.device == y.device == CPU
    for row, start in enumerate(random_starts(5000 - 7, 15, 1337, 5)):
        window = data.data['train'][start:start + 8].tolist()
        assert x.view(15, 7)[row].tolist() == window[:-1] and y.view(15, 7)[row].tolist() == window[1:]


def test_a_batch_depends_on_seed_and_step_and_nothing_else(ramp):
    first = train_batch(ramp)[0]
    for step in range(20):
        train_batch(ramp, step=step, seed=step)
    np.random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(train_batch(ramp)[0], first)
    assert torch.equal(train_batch(Dataset(str(ramp.folder)))[0], first)


@quick
@given(st.tuples(st.integers(-2**63, 2**64 - 1), st.integers(0, 2**40)),
       st.tuples(st.integers(-2**63, 2**64 - 1), st.integers(0, 2**40)))
def test_another_seed_or_step_gives_another_batch(one, two):
    same = one[0] % 2**64 == two[0] % 2**64 and one[1] == two[1]
    starts = [random_starts(10**9, 16, *key) for key in (one, two)]
    assert np.array_equal(*starts) == same
    assert same or len({*starts[0]} & {*starts[1]}) <= 2   # and not a shifted one


@pytest.mark.parametrize('one, two', [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((1, 0), (0, 1)), ((1337, 1), (1338, 0)),
                                      ((0, 0), (-1, 0)), ((0, 2**32), (0, 0)), ((2**32, 0), (0, 0))])
def test_neighbouring_seeds_and_steps_share_no_rows(one, two):
    assert not {*random_starts(10**12, 1000, *one)} & {*random_starts(10**12, 1000, *two)}


@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_the_ranks_share_out_the_same_global_batch(ramp, world_size):
    whole = train_batch(ramp, micro_batches=8)
    parts = [train_batch(ramp, micro_batches=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    for part, full in zip(zip(*parts), whole):
        assert all(rows.shape == (8 // world_size, 2, 3) for rows in part)
        assert torch.equal(torch.stack(part, dim=1).flatten(0, 1), full)   # turn by turn, in the same order


@pytest.mark.parametrize('n_tokens, block_size', [(5, 4), (6, 4), (20, 4), (2, 1)])
def test_the_first_and_the_last_window_are_drawn_and_no_other(n_tokens, block_size):
    starts = np.concatenate([random_starts(n_tokens - block_size, 50, 7, step) for step in range(20)])
    assert sorted(set(starts.tolist())) == list(range(n_tokens - block_size))


@pytest.mark.parametrize('rows, steps', [(60_000, 1), (1, 6_000), (10, 6_000)])
def test_starts_are_uniform_over_all_windows_within_a_step_and_over_steps(rows, steps):
    windows = 60
    starts = np.concatenate([random_starts(windows, rows, 1337, step) for step in range(steps)])
    expected = len(starts) / windows
    chi2 = ((np.bincount(starts, minlength=windows) - expected) ** 2 / expected).sum()
    assert 29 < chi2 < 102   # 59 degrees of freedom: 1 in 2,000 falls below, as many above


def test_successive_starts_are_independent():
    starts = random_starts(8, 64_001, 1337, 3)
    pairs = np.bincount(starts[:-1] * 8 + starts[1:], minlength=64)
    assert 32 < ((pairs - 1000) ** 2 / 1000).sum() < 107   # 63 degrees of freedom


@quick
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.integers(0, 250))
def test_evaluation_windows_spread_evenly_from_the_first_token_to_the_last(ramp, block_size, eval_iters, rows, more):
    data = copy.copy(ramp)
    data.data = {'val': np.arange(block_size + 1 + more)}
    batches = [data.eval_batch('val', i, eval_iters, rows, block_size, CPU) for i in range(eval_iters)]
    x, y = (torch.cat(parts) for parts in zip(*batches))
    assert x.shape == y.shape == (eval_iters * rows, block_size)
    assert torch.equal(x[:, :1] + torch.arange(block_size), x) and torch.equal(y, x + 1)
    starts = x[:, 0]
    assert starts[0] == 0
    if len(starts) > 1:
        assert y[-1, -1] == len(data.data['val']) - 1
        steps = starts.diff()
        assert steps.min() >= 0 and steps.max() - steps.min() <= 1


def test_evaluation_batches_are_always_the_same_and_of_their_split(ramp):
    of = dict(eval_iters=3, batch_size=4, block_size=5, device=CPU)
    first = [[ramp.eval_batch(split, i, **of)[0] for i in range(3)] for split in ('train', 'val')]
    train_batch(ramp)
    again = Dataset(str(ramp.folder))
    for split, batches in zip(('train', 'val'), first):
        assert all(torch.equal(again.eval_batch(split, i, **of)[0], x) for i, x in enumerate(batches))
        assert batches[-1][-1, -1] == len(ramp.data[split]) - 2


def test_batches_are_put_on_the_device_that_is_named(ramp):
    for batch in (ramp.train_batch(5, 1337, 4, 2, 3, torch.device('meta')),
                  ramp.eval_batch('val', 0, 2, 3, 4, torch.device('meta'))):
        assert [tensor.device.type for tensor in batch] == ['meta', 'meta']


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(ramp):
    for device in (torch.device('cuda', 0), CPU):
        x, y = ramp.train_batch(5, 1337, 4, 2, 3, device)
        assert x.device == y.device == device and x.tolist() == GOLDEN_X and torch.equal(y, x + 1)
