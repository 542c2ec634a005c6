"""The datasets: what each prepare.py makes, run as a person runs it, in a copy of the project."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED, assert_one_line, needs
from in_process import call

from flatgpt import tokenizer

NAMES = ('python_char', 'shakespeare_char', 'shakespeare')
TEXT = SHARED / 'tinyshakespeare.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
FILES = ('train.bin', 'val.bin', 'meta.json')


def copy_project(folder):
    """The parts and the prepare scripts without any data, so that nothing is written into the working tree."""
    prepares = [ROOT / 'data' / name / 'prepare.py' for name in NAMES]
    for path in [*ROOT.glob('*.py'), *ROOT.glob('flatgpt/*.py'), *prepares]:
        new = folder / path.relative_to(ROOT)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new)
    return folder


def prepare(project, name, *args, cwd, **env):
    """Run a prepare.py of a copy of the project in this process."""
    return call(project / 'data' / name / 'prepare.py', *args, cwd=cwd, **env)


def prepare_apart(project, name, *args, cwd, **env):
    """Run it in a process of its own."""
    return subprocess.run([sys.executable, project / 'data' / name / 'prepare.py', *map(str, args)], cwd=cwd,
                          timeout=120, text=True, encoding='utf-8', capture_output=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1', **env})


def by_table(chars):
    """A function from ids to text, for which character i has id i."""
    points = np.array([ord(char) for char in chars], '<u4')
    return lambda ids: points[ids].tobytes().decode('utf-32-le')


class Made:
    """A dataset as it is stored on disk, read without the help of dataset.py."""

    def __init__(self, folder):
        self.meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        self.ids = {split: np.fromfile(folder / f'{split}.bin', '<u2') for split in ('train', 'val')}
        assert self.meta['dtype'] == 'uint16'
        assert self.meta['tokens'] == {split: len(ids) for split, ids in self.ids.items()}
        assert max(ids.max() for ids in self.ids.values()) < self.meta['vocab_size']
        kind = self.meta['tokenizer']
        decode = by_table(kind['chars']) if kind['kind'] == 'char' else tokenizer.from_dict(kind).decode
        self.text = {split: decode(ids) for split, ids in self.ids.items()}
        self.whole = self.text['train'] + self.text['val']


def left_in(folder):
    """What a script left beside itself, caches aside."""
    return set(os.listdir(folder)) - {'prepare.py', '__pycache__'}


# ---------------------------------------------------------------------------------------------------------------------
# Python's standard library

@pytest.fixture(scope='module')
def library(tmp_path_factory):
    """(the dataset, what the script printed, the folder)"""
    project, cwd = copy_project(tmp_path_factory.mktemp('project')), tmp_path_factory.mktemp('elsewhere')
    done = prepare_apart(project, 'python_char', cwd=cwd, PYTHONHASHSEED='1')
    assert (done.returncode, done.stderr) == (0, '')
    assert os.listdir(cwd) == []
    return Made(project / 'data' / 'python_char'), done.stdout, project / 'data' / 'python_char'


@pytest.fixture(scope='module')
def full(library):
    """The dataset without a character dropped. It is prepared over the other one, and then that one again, which must
    be as before."""
    _, printed, folder = library
    first = {name: (folder / name).read_bytes() for name in FILES}
    done = prepare_apart(folder.parents[1], 'python_char', '--min_count=1', cwd=folder)
    assert (done.returncode, done.stderr) == (0, '')
    made = Made(folder)
    assert all((folder / name).read_bytes() != first[name] for name in FILES)
    again = prepare_apart(folder.parents[1], 'python_char', cwd=folder, PYTHONHASHSEED='2')
    assert again.stdout == printed
    assert {name: (folder / name).read_bytes() for name in FILES} == first
    return made


STDLIB = Path(sysconfig.get_path('stdlib'))


def blanks(text):
    return re.sub('[ \t]+', ' ', text)


def test_library_is_at_least_four_megabytes_and_is_told_of(library):
    made, printed, folder = library
    assert len(made.whole) >= 4_000_000
    assert f'{len(made.whole):,} characters, {made.meta["vocab_size"]} distinct' in printed
    assert f'{len(made.ids["train"]):,} train tokens, {len(made.ids["val"]):,} val tokens' in printed
    assert left_in(folder) == set(FILES)
    assert made.meta['source']['sha256'] == hashlib.sha256(made.whole.encode()).hexdigest()
    assert sys.version.split()[0] in made.meta['source']['text']
    assert len(made.ids['train']) == len(made.whole) * 9 // 10   # the last tenth is for validation


def test_lines_are_indented_with_tabs_of_four(library):
    text = library[0].whole
    assert '\ndef heappush(heap, item):\n\t"""Push item onto heap' in text
    assert '\n\t\treturn ' in text
    assert '   ' not in text and '\n' + 7 * '\t' not in text
    assert '\n' + 6 * '\t' in text


def test_tables_tests_and_packages_are_left_out(library):
    made, found = set(blanks(library[0].whole).splitlines()), 0
    for pattern in ('encodings/cp1252.py', '_sysconfigdata*.py', 'test/test_heapq.py', 'idlelib/pyshell.py',
                    'tkinter/ttk.py', 'site-packages/pip/__init__.py'):   # no system has all of them
        for path in STDLIB.glob(pattern):
            lines = [line for line in blanks(path.read_text(encoding='utf-8')).splitlines() if len(line) > 20]
            assert sum(line in made for line in lines) <= len(lines) / 2, path
            found += len(lines) > 0
    assert found


@pytest.mark.full
def test_characters_that_occur_fewer_than_a_hundred_times_are_dropped_and_no_others(library, full):
    made, whole = library[0], full
    assert whole.meta['source']['sha256'] == hashlib.sha256(whole.whole.encode()).hexdigest()
    chars, counts = np.unique(np.frombuffer(whole.whole.encode('utf-32-le'), '<u4'), return_counts=True)
    often = ''.join(map(chr, chars[counts >= 100]))
    assert made.meta['tokenizer'] == {'kind': 'char', 'chars': often}
    assert made.whole == whole.whole.translate({c: None for c in chars[counts < 100].tolist()})
    assert len(often) < len(chars)
    assert f' {len(chars) - len(often)} rare ones dropped' in library[1]


@pytest.mark.full
def test_library_decodes_to_python_source(full):
    text = blanks(full.whole)
    for name in ('heapq.py', 'json/decoder.py', 'asyncio/base_events.py', 'unittest/case.py'):
        assert blanks((STDLIB / name).read_text(encoding='utf-8')) in text


# ---------------------------------------------------------------------------------------------------------------------
# tiny Shakespeare

@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path / 'project')


@needs('shakespeare')
@pytest.mark.parametrize('way', ['--input', 'in its folder'])
def test_shakespeare_in_characters_has_the_known_numbers(project, tmp_path, way):
    folder = project / 'data' / 'shakespeare_char'
    if way == 'in its folder':
        shutil.copy(TEXT, folder / 'input.txt')
        done = prepare(project, 'shakespeare_char', cwd=folder)
    else:   # relative to where the person stands
        (tmp_path / 'mine.txt').write_bytes(TEXT.read_bytes())
        done = prepare(project, 'shakespeare_char', '--input=mine.txt', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    made = Made(folder)
    assert made.whole == TEXT.read_text(encoding='utf-8')
    assert (made.meta['vocab_size'], made.meta['tokens']) == (65, {'train': 1_003_854, 'val': 111_540})
    assert made.meta['source']['sha256'] == SHA256
    for words in ('1,115,394 characters, 65 distinct', 'vocabulary of 65', '1,003,854 train tokens',
                  '111,540 val tokens'):
        assert words in done.stdout
    assert left_in(folder) == {*FILES, *(['input.txt'] if way == 'in its folder' else [])}


@needs('shakespeare', 'gpt2_encoding')
def test_shakespeare_in_gpt2_tokens_has_the_known_numbers(project, tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
    done = prepare(project, 'shakespeare', f'--input={TEXT}', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    made = Made(project / 'data' / 'shakespeare')
    assert made.whole == TEXT.read_text(encoding='utf-8')
    assert len(made.text['train']) == 1_003_854   # split by characters, as the other one is
    assert (made.meta['vocab_size'], made.meta['tokens']) == (50_257, {'train': 301_966, 'val': 36_059})
    assert made.meta['tokenizer'] == {'kind': 'tiktoken', 'name': 'gpt2'}
    assert made.meta['source']['sha256'] == SHA256
    for words in ('vocabulary of 50,257', '301,966 train tokens', '36,059 val tokens'):
        assert words in done.stdout
    assert left_in(project / 'data' / 'shakespeare') == set(FILES)


@pytest.mark.parametrize('name', NAMES[1:])
def test_without_network_one_line_names_the_ways_out(project, tmp_path, name):
    nobody = {key: 'http://127.0.0.1:9' for key in ('HTTPS_PROXY', 'https_proxy', 'ALL_PROXY', 'all_proxy')}
    done = prepare(project, name, cwd=tmp_path, **nobody, NO_PROXY='', no_proxy='')
    folder = project / 'data' / name
    assert_one_line(done, 1, 'prepare.py: cannot download https://', '--input=PATH', str(folder / 'input.txt'),
                    'python data/python_char/prepare.py')
    assert done.stdout == ''
    assert left_in(folder) == set()


def test_another_text_in_place_is_used_with_a_notice(project, tmp_path):
    folder = project / 'data' / 'shakespeare_char'
    (folder / 'input.txt').write_bytes('Größe\n'.encode() * 100)
    done = prepare(project, 'shakespeare_char', cwd=tmp_path)
    assert done.returncode == 0
    assert_one_line(done, 0, str(folder / 'input.txt'), 'used as it is')
    assert Made(folder).whole == 'Größe\n' * 100
    assert Made(folder).meta['vocab_size'] == 6


def test_a_text_that_is_not_there_is_one_line(project, tmp_path):
    done = prepare(project, 'shakespeare_char', '--input=nowhere.txt', cwd=tmp_path)
    assert_one_line(done, 1, 'nowhere.txt', 'No such file')
    assert left_in(project / 'data' / 'shakespeare_char') == set()
