"""Documents from files: all of their text and nothing else, cut where no token could be; errors name the position."""

import csv
import gzip
import io
import itertools
import json
import os
import random
import sys
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import needs
from hypothesis import example, given
from hypothesis import strategies as st
from properties import quick

from flatgpt import corpus, dataset, tokenizer
from flatgpt.corpus import Corpus, find_files, in_pieces, read_records, text_suffix
from flatgpt.errors import UserError

texts = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'))   # NUL is refused: not text
ZH = '你好，世界！今天我们去北京。\n'


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Pieces and blocks of a few characters, so that small files take many."""
    monkeypatch.setattr(corpus, 'PIECE', 50)
    monkeypatch.setattr(corpus, 'BLOCK', 7)


def documents(*files, **how):
    """[(text, fault)] of the documents of files, each put together from its pieces."""
    found, parts = [], []
    of = Corpus(list(files), **how)
    for i in range(len(files)):
        for piece in of.pieces(i):
            assert len(piece.text) <= 50
            parts.append(piece.text)
            if piece.last:
                found.append((''.join(parts), piece.fault))
                parts = []
    assert parts == []
    return found


def parquet(path, columns, **how):
    pq.write_table(pa.table(columns), path, **how)
    return path


def jsonl(path, *records):
    path.write_text(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records), encoding='utf-8')
    return path


def refusal(*files, **how):
    with pytest.raises(UserError) as error:
        documents(*files, **how)
    assert '\n' not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# which files

@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ('a.txt', 'b/c.md', 'b/d.py', 'b/e.c', 'b/.git/f.txt', 'g.jsonl.zst', 'h.TXT.GZ', 'i.parquet', 'j.bin'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('paths, found', [
    ('.', 'a.txt b/c.md b/d.py g.jsonl.zst h.TXT.GZ i.parquet'), ('b', 'b/c.md b/d.py'), ('b/', 'b/c.md b/d.py'),
    ('b/e.c', 'b/e.c'), ('j.bin,a.txt', 'j.bin a.txt'), ('**/*.txt', 'a.txt'), ('b/*', 'b/c.md b/d.py b/e.c'),
    ('**/*.[cm]*', 'b/c.md b/e.c'), (' b/d.py , b , b/d.py', 'b/d.py b/c.md'),
])
def test_paths_name_files_folders_and_globs(tree, paths, found):
    assert [file.as_posix() for file in find_files(paths)] == found.split()


@pytest.mark.parametrize('paths, words', [
    ('', 'no input'), (',', 'no input'), ('b/.git/..,nowhere.txt', 'no file nowhere.txt'), ('*.rst', r'no file \*.rst'),
])
def test_paths_that_name_nothing_are_refused(tree, paths, words):
    with pytest.raises(UserError, match=words):
        find_files(paths)


@pytest.mark.parametrize('name', ['bok.txt', 'book.tx', 'boook.txt'])
def test_a_mistyped_path_is_named_with_the_nearest_that_is_there(tmp_path, name):
    (tmp_path / 'book.txt').write_text('x')
    for read in (find_files, lambda path: list(read_records(path)), tokenizer.read_text, dataset.find):
        with pytest.raises(UserError) as error:
            read(str(tmp_path / name))
        assert str(tmp_path / name) in str(error.value)
        assert f'; do you mean {tmp_path / "book.txt"}?' in str(error.value)


def test_a_folder_without_a_known_file_is_refused(tmp_path):
    (tmp_path / 'x.log').touch()
    with pytest.raises(UserError, match=r'no file .*\*\.json", or folders with .txt .md .py .jsonl .ndjson'):
        find_files(str(tmp_path))


@pytest.mark.parametrize('name, suffix', [('a.txt', '.txt'), ('a.JSONL.gz', '.jsonl'), ('a.b.zst', '.b'), ('gz', '')])
def test_the_suffix_of_a_compressed_file_is_that_of_its_content(name, suffix):
    assert text_suffix(name) == suffix


# ---------------------------------------------------------------------------------------------------------------------
# documents

@quick
@given(texts, st.sampled_from(['.txt', '.txt.gz', '.txt.zst']))
def test_a_text_file_is_one_document_with_all_of_its_text(tmp_path_factory, text, kind):
    path, text = tmp_path_factory.getbasetemp() / f'x{kind}', text.replace('\0', '')
    content = text.encode()
    packed = {'.txt': content, '.txt.gz': gzip.compress(content), '.txt.zst': pa.compress(content, 'zstd')}
    path.write_bytes(packed[kind])
    assert documents(path) == [(text.removeprefix('\ufeff').replace('\r\n', '\n'), '')]


@pytest.mark.parametrize('kind', ['.txt', '.txt.gz', '.jsonl', '.jsonl.zst'])
def test_a_byte_order_mark_is_no_text_but_only_the_first_and_only_in_the_beginning(tmp_path, kind):
    path, text = tmp_path / f'x{kind}', '\ufeffGröße \ufeffund 世界'
    content = ('\ufeff' + (json.dumps({'text': text}) if 'jsonl' in kind else text)).encode()
    path.write_bytes(gzip.compress(content) if kind.endswith('gz') else
                     bytes(pa.compress(content, 'zstd')) if kind.endswith('zst') else content)
    assert documents(path) == [(text, '')]


@quick
@given(st.lists(texts))
def test_each_line_of_jsonl_and_each_row_of_parquet_is_a_document(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    expected = [(row.replace('\r\n', '\n'), '') for row in rows]
    assert documents(jsonl(folder / 'x.jsonl', *({'n': i, 'text': row} for i, row in enumerate(rows)))) == expected
    table = {'text': pa.array(rows, pa.string()), 'n': list(range(len(rows)))}
    assert documents(parquet(folder / 'x.parquet', table)) == expected


def test_packed_jsonl_other_fields_blank_lines_and_a_last_line_without_an_end(tmp_path):
    content = b'{"body": "a\\nb"}\r\n\n  \n{"body": "c", "text": 7}'
    (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress(content[:20]) + gzip.compress(content[20:]))
    assert documents(tmp_path / 'x.jsonl.gz', field='body') == [('a\nb', ''), ('c', '')]


@pytest.mark.parametrize('column', [
    pa.array(['a', None, 'b'], pa.large_string()), pa.array([b'a', None, b'b']),
    pa.array(['a', None, 'b']).dictionary_encode()], ids=['large', 'binary', 'dictionary'])
def test_a_column_of_any_text_type_is_read(tmp_path, column):
    path = parquet(tmp_path / 'x.parquet', {'words': column}, row_group_size=2)
    assert documents(path, column='words') == [('a', ''), ('', ''), ('b', '')]


def test_the_bar_is_told_of_all_bytes_of_each_file(tmp_path):
    files = [tmp_path / 'a.txt', tmp_path / 'b.txt.gz', jsonl(tmp_path / 'c.jsonl', {'text': 'x' * 100}),
             parquet(tmp_path / 'd.parquet', {'text': ['x'] * 300})]
    files[0].write_text('x' * 100)
    files[1].write_bytes(gzip.compress(random.Random(0).randbytes(200).hex().encode()))
    for i, file in enumerate(files):
        seen = []
        bar = type('Bar', (), {'update': staticmethod(seen.append)})
        list(Corpus(files).pieces(i, bar))
        assert sum(seen) == file.stat().st_size


# ---------------------------------------------------------------------------------------------------------------------
# pieces

WORDS = {   # how encodings of tiktoken find words
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    'cl100k_base': r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
                   r"\s*[\r\n]|\s+(?!\S)|\s",
    'o200k_base': r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|"
                  r"'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|"
                  r"'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"}


@pytest.fixture(scope='module', params=WORDS)
def greedy(request):
    """An encoding whose words are those of a known one, and in which any two bytes of a word become one token, so that
    a word that is cut in two shows."""
    ranks = {bytes([i]): i for i in range(256)} | {bytes([i, j]): 256 + 256 * i + j
                                                  for i in range(256) for j in range(256)}
    return tiktoken.Encoding('greedy', pat_str=WORDS[request.param], mergeable_ranks=ranks, special_tokens={})


parts = st.lists(st.sampled_from(['a', 'B', '1', '.', "'s", ' ', '\n', '\r\n', '\t', '你', '。', '/', 'é', '\u0301',
                                  '\u3000', '\x1c', '_', '😀']), max_size=400).map(''.join)


@quick
@given(text=parts)
def test_a_text_that_is_cut_at_its_borders_has_the_ids_of_the_whole(greedy, text):
    borders = [match.start() for match in tokenizer.BORDER.finditer(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *borders, len(text)])]
    assert [i for piece in pieces for i in greedy.encode_ordinary(piece)] == greedy.encode_ordinary(text)


@quick
@given(text=parts, sizes=st.lists(st.integers(1, 60), min_size=1))
def test_where_a_document_is_cut_does_not_depend_on_how_it_is_read(text, sizes):
    blocks, rest = [], text
    for size in itertools.cycle(sizes):
        blocks.append(rest[:size])
        rest = rest[size:]
        if not rest:
            break
    cut = list(in_pieces([*((block, False) for block in blocks), ('', True)]))
    assert cut == list(in_pieces([(text, True)]))
    assert ''.join(piece.text for piece in cut) == text
    assert [piece.start for piece in cut] == [0, *itertools.accumulate(len(piece.text) for piece in cut[:-1])]
    assert [piece.last for piece in cut] == [False] * (len(cut) - 1) + [True]


@pytest.mark.parametrize('text', ['word ' * 100, ZH * 20, 'x = 1\n' * 50, 'a. b.\n' * 50])
def test_pieces_of_prose_and_code_end_at_borders_and_are_long(text):
    cut = [piece.text for piece in in_pieces([(text, True)])]
    at = list(itertools.accumulate(map(len, cut)))[:-1]
    borders = {match.start() for match in tokenizer.BORDER.finditer(text)}
    assert set(at) <= borders and all(len(piece) > 25 for piece in cut[:-1])


def test_a_text_without_any_border_is_cut_all_the_same():
    assert [len(piece.text) for piece in in_pieces([('x' * 120, True)])] == [50, 50, 20]


# ---------------------------------------------------------------------------------------------------------------------
# invalid input

LATIN = 'Die Größe des Käses'.encode('latin-1')


@pytest.mark.parametrize('name, content, words', [
    ('x.txt', LATIN, 'x.txt is not UTF-8: byte 6 is 0xf6; convert it, for instance from UTF-16 or GBK with iconv'),
    ('x.txt', b'plain ' * 1000 + LATIN, 'byte 6,006 is 0xf6'),
    ('x.txt', '你'.encode()[:2], 'byte 0 is 0xe4'),
    ('x.txt', ('x' * 20 + '你').encode()[:-1], 'byte 20 is 0xe4'),
    ('x.txt', b'\xff\xfeh\0i\0', 'byte 0 is 0xff; convert it, for instance from UTF-16'),
    ('x.py', b'\x7fELF\x02\x01\x01\0\0', 'x.py is not text: byte 7 is 0x00'),
    ('x.txt.gz', b'no gzip', 'cannot read'), ('x.txt.gz', gzip.compress(b'text' * 99, mtime=0)[:-9], 'cannot read'),
    ('x.txt.zst', b'no zstandard', 'cannot read'), ('x.parquet', b'no parquet', 'cannot read'),
    ('x.jsonl', b'{"text": "a"}\n{"text": "\xff"}\n', 'x.jsonl, line 2 is not UTF-8: byte 10 is 0xff'),
    ('x.jsonl', b'{"text": "a"}\n{"text": "\\ud800"}\n', 'line 2 has half a surrogate pair'),
    ('x.jsonl', b'{"text": "a"}\n\n{"text": \n',
     'line 3 is not JSON: '),
    ('x.jsonl', b'{"body": "a", "id": 1}\n', "line 1: expected a text under 'text'; it has 'body'"),
    ('x.jsonl', b'{"text": 7}\n', "line 1: expected a text under 'text'"),
    ('x.jsonl', b'[' * 99999 + b'\n', 'line 1 is not JSON: '),
], ids=['Latin-1', 'Latin-1 later', 'cut at once', 'cut at the end', 'UTF-16', 'program', 'no gzip', 'gzip cut off',
        'no zstandard', 'no parquet', 'line not UTF-8', 'half a surrogate pair', 'cut JSON', 'other key', 'number',
        'brackets'])
def test_invalid_text_is_refused_with_its_place(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    line = refusal(path)
    assert words in line and str(path) in line


def test_a_gz_that_is_damaged_inside_is_refused_in_one_line(tmp_path):
    content = gzip.compress(random.Random(0).randbytes(500).hex().encode())
    path = tmp_path / 'x.txt.gz'
    path.write_bytes(content[:10] + b'\x07' + content[11:])   # a block of a kind that there is not
    with pytest.raises(zlib.error):
        gzip.decompress(path.read_bytes())
    assert refusal(path).startswith(f'cannot read {path}: ')


@pytest.mark.parametrize('line, block', [(0, 1), (1, 30), (2, 2**18), (3, 1), (4, 30)])
def test_the_place_of_a_fault_is_exact_in_every_line(tmp_path, monkeypatch, line, block):
    monkeypatch.setattr(corpus, 'BLOCK', block)
    lines = [b'{"text": "%s"}' % (b'x' * 3 ** i) for i in range(5)]
    lines[line] = lines[line].replace(b'x"', b'\xff"')
    content = b'\n\n'.join(lines)
    (tmp_path / 'x.jsonl').write_bytes(content)
    position = f'line {2 * line + 1} is not UTF-8: byte {lines[line].index(255)} is 0xff'
    assert position in refusal(tmp_path / 'x.jsonl')


def test_a_missing_column_and_a_column_of_numbers_are_refused(tmp_path):
    path = parquet(tmp_path / 'x.parquet', {'body': ['a'], 'n': [[1]]})
    assert f'{path} has no column \'text\': it has body, n; give --column=NAME' == refusal(path)
    assert "row 1: expected a text under 'n'" in refusal(path, column='n')


def test_bytes_that_are_no_text_in_a_parquet_are_refused_by_row(tmp_path):
    path = parquet(tmp_path / 'x.parquet', {'text': [b'a', b'b\xff']})
    assert 'row 2 is not UTF-8: byte 1 is 0xff' in refusal(path)


@pytest.mark.parametrize('name', ['x.txt', 'x.md', 'x.jsonl', 'x.json', 'x.csv', 'x.parquet', 'x.txt.gz', 'x.jsonl.zst',
                                  'tokenizer.json'])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path, name):
    path = tmp_path / name
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n')
    expected = f'cannot read {path}: it is a pointer of Git LFS: run `git lfs pull` in its folder'
    if name == 'tokenizer.json':
        with pytest.raises(UserError) as error:
            tokenizer.load(str(path))
        assert str(error.value) == expected
    else:
        assert refusal(path) == expected


def test_a_damaged_parquet_is_read_or_refused_in_one_line(tmp_path):
    good = parquet(tmp_path / 'good.parquet', {'text': ['some words ' * 9] * 20}, compression='none').read_bytes()
    generator, refused, path = random.Random(0), 0, tmp_path / 'x.parquet'
    for _ in range(150):
        content = bytearray(good)
        for _ in range(generator.choice([1, 4])):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        try:
            documents(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and '\n' not in str(error)
    assert refused > 20


def test_a_compressed_parquet_is_refused(tmp_path):
    path = tmp_path / 'x.parquet.gz'
    path.write_bytes(gzip.compress(parquet(tmp_path / 'x.parquet', {'text': ['a']}).read_bytes()))
    assert refusal(path).startswith(f'cannot read {path}: ')


@needs('symlinks')
def test_a_file_counts_once_however_it_is_spelled_and_may_have_a_comma_in_its_name(tmp_path, monkeypatch):
    (tmp_path / 'a,b').mkdir()
    (tmp_path / 'a,b' / 'x.txt').write_text('x')
    (tmp_path / 'y.txt').write_text('y')
    (tmp_path / 'z.txt').symlink_to(tmp_path / 'y.txt')
    monkeypatch.chdir(tmp_path)
    assert list(map(str, find_files('a,b'))) == ['a,b/x.txt']
    assert list(map(str, find_files(f'y.txt,./y.txt,{tmp_path}/y.txt,a*/../y.txt,z.txt'))) == ['y.txt']


@needs('fifo')
def test_a_pipe_is_refused_because_it_cannot_be_read_again(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match=r'no file .*/pipe: expected comma-separated files \(no pipes\)'):
        find_files(str(tmp_path / 'pipe'))


@pytest.mark.parametrize('name', ['x.txt', 'x.jsonl.gz', 'x.parquet'])
def test_a_file_that_cannot_be_opened_is_refused(tmp_path, name):
    path = tmp_path / name
    path.touch()
    of = Corpus([path])
    path.unlink()
    with pytest.raises(UserError, match=f'cannot read {path}: '):
        list(of.pieces(0))


def test_a_line_that_does_not_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'LONGEST', 100)
    path = tmp_path / 'x.jsonl'
    path.write_text('{"text": "a"}\n' + 'x' * 200)
    assert 'x.jsonl, line 2 has 100 characters or more' in refusal(path)


@pytest.mark.parametrize('name, content, repaired', [
    ('x.txt', b'x' * 60 + LATIN, 'x' * 60 + 'Die Gr\ufffd\ufffde des K\ufffdses'),
    ('x.txt', b'a\0b', 'a\ufffdb'),
    ('x.jsonl', b'{"text": "a\xffb"}\n', 'a\ufffdb'), ('x.jsonl', b'{"text": "a\\ud800b"}\n', 'a\ufffdb'),
], ids=['Latin-1', 'NUL', 'line not UTF-8', 'half a surrogate pair'])
def test_errors_replace_repairs_a_document_and_reports_it(tmp_path, name, content, repaired):
    (tmp_path / name).write_bytes(content)
    ((text, fault),) = documents(tmp_path / name, errors='replace')
    assert text.replace('\ufffd\ufffd', '\ufffd') == repaired.replace('\ufffd\ufffd', '\ufffd')
    assert str(tmp_path / name) in fault


@pytest.mark.parametrize('name, content, kept', [
    ('x.txt', b'x' * 600 + LATIN, []), ('x.txt', b'a\0b', []),
    ('x.jsonl', b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n{}\n{"text": "\\udfff"}\n', ['a', 'b']),
], ids=['Latin-1', 'NUL', 'lines'])
def test_errors_skip_leaves_out_the_whole_document_and_says_so(tmp_path, name, content, kept):
    (tmp_path / name).write_bytes(content)
    found = documents(tmp_path / name, errors='skip')
    assert [text for text, fault in found if not fault] == kept
    assert all(text == '' for text, fault in found if fault) and any(fault for _, fault in found)


@pytest.mark.parametrize('name', ['x.txt.zst', 'x.parquet'])
def test_without_pyarrow_one_line_says_how_to_get_it(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b'x')
    for module in 'pyarrow', 'pyarrow.parquet':
        monkeypatch.setitem(sys.modules, module, None)
    assert refusal(tmp_path / name) == f'{tmp_path / name} needs pyarrow: pip install pyarrow'


# ---------------------------------------------------------------------------------------------------------------------
# records

ROWS = [{'title': '靜夜思', 'lines': '床前明月光\n疑是地上霜'}, {'title': 'a "b", c;\td', 'lines': 'x\u2028y\x85z'},
        {'title': '', 'lines': "it's"}]


def as_csv(rows, delimiter=','):
    f = io.StringIO()
    writer = csv.DictWriter(f, ['title', 'lines'], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return f.getvalue()


def as_lines(rows, end='\n'):
    return ''.join(json.dumps(row, ensure_ascii=False) + end for row in rows)


RECORD_FILES = {   # {name: content}, all with the same records
    'x.jsonl': as_lines(ROWS), 'x.ndjson': as_lines(ROWS, '\r\n\r\n'), 'lines.json': as_lines(ROWS),
    'x.json': json.dumps(ROWS, indent=1, ensure_ascii=False), 'short.json': json.dumps(ROWS),
    'x.csv': as_csv(ROWS), 'unix.csv': as_csv(ROWS).replace('\r\n', '\n'), 'semicolon.csv': as_csv(ROWS, ';'),
    'x.tsv': as_csv(ROWS, '\t'), 'x.parquet': None}


@pytest.mark.parametrize('packed', ['', '.gz', '.zst'])
@pytest.mark.parametrize('mark', ['', '\ufeff'], ids=['plain', 'with a byte order mark'])
@pytest.mark.parametrize('name', RECORD_FILES)
def test_records_are_the_same_from_files_of_all_kinds(tmp_path, name, mark, packed):
    if name == 'x.parquet':
        path = parquet(tmp_path / name, {key: [row[key] for row in ROWS] for key in ROWS[0]})
    else:
        content = (mark + RECORD_FILES[name]).encode()
        pack = {'': bytes, '.gz': gzip.compress, '.zst': lambda raw: pa.compress(raw, 'zstd', asbytes=True)}[packed]
        path = tmp_path / f'{name}{packed}'
        path.write_bytes(pack(content))
    records = list(read_records(path))
    assert [record.value for record in records] == ROWS
    assert all(record.where.startswith(str(path)) for record in records) and len({r.where for r in records}) == 3
    expected = [(f'{row["title"]}\n\t{row["lines"]}'.replace('\r\n', '\n'), '') for row in ROWS]
    assert documents(path, template=r'{title}\n\t{lines}') == expected
    assert documents(path, field='lines', column='lines') == [(row['lines'], '') for row in ROWS]


@pytest.mark.parametrize('name, content, how, texts', [
    ('x.json', '["a", "b"]', {}, ['a', 'b']), ('x.json', '[]', {}, []),
    ('x.jsonl', '"a"\n{"text": "b"}', {}, ['a', 'b']),
    ('x.jsonl', '{"text": ["a", null, "b"]}', {}, ['a\n\nb']), ('x.jsonl', '{"text": null}', {}, ['']),
    ('x.jsonl', '{"text": "a\\r\\nb"}', {}, ['a\nb']), ('x.csv', 'text\r\n"a\r\nb"\r\n', {}, ['a\nb']),
    ('x.jsonl', '{"id": 7, "t": ["a", "b"]}', {'template': '{id}: {t}'}, ['7: a\nb']), ('x.csv', '', {}, []),
    ('x.json', '[["a"], "b"]', {'template': '<{text}>', 'errors': 'skip'}, ['', '<b>']),
    ('x.csv', 'text,n\na\nb,1,2\n', {}, ['a', 'b']), ('x.csv', 'text,n\na\n', {'template': '{text}{n}'}, ['a']),
], ids=str)
def test_texts_of_records(tmp_path, name, content, how, texts):
    (tmp_path / name).write_bytes(content.encode())
    assert [text for text, _ in documents(tmp_path / name, **how)] == texts


@pytest.mark.parametrize('name, content, words', [
    ('x.json', '[{"text": "a"}', 'x.json is not JSON: '), ('x.json', '{\n"text": "a"}', 'x.json, line 1 is not JSON'),
    ('x.json', '[{"text": "a"}, {"body": "b"}]', "record 2: expected a text under 'text'; it has 'body'"),
    ('x.json', '[{"text": {"a": 1}}]', "record 1: expected a text under 'text'"),
    ('x.csv', 'a,b\n1,2\n', "line 2: expected a text under 'text'; it has 'a', 'b'"),
    ('x.csv', 'text\n"open\n', 'cannot read '), ('x.tsv', 'text\tb\n"a"b\tc\n', 'cannot read '),
    ('x.csv', 'text\nGr\xf6\xdfe\n', 'line 2 is not UTF-8: byte 2 is 0xf6'),
    ('x.html', '<p>a</p>', 'is markup, not text: convert it, for instance with pandoc -t plain'),
    ('x.xml.gz', '', 'is markup, not text'),
])
def test_an_invalid_record_is_refused_with_its_place(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content.encode('latin-1'))
    assert words in refusal(path) and str(path) in refusal(path)


@pytest.mark.parametrize('name, content', [
    ('x.csv', b'text\na\xffb\n'), ('x.jsonl', b'{"text": "a\xffb"}'), ('x.json', b'[{"text": "a\xffb"}]'),
    ('x.txt', b'a\xffb'),
    ('x.jsonl', b'{"text": "\\ud800"}'), ('x.json', b'["\\udfff"]')])
def test_invalid_text_of_a_record_is_refused_repaired_or_left_out(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'is not UTF-8: byte \d+ is 0xff|half a surrogate'):
        list(read_records(path))
    ((text, fault),) = documents(path, errors='replace')
    assert '\ufffd' in text and str(path) in fault
    assert documents(path, errors='skip') == [('', fault)]


@pytest.mark.parametrize('name, words', [
    ('no.jsonl', 'cannot read'), ('no.txt', 'cannot read'), ('x.html', 'is markup')])
def test_records_of_a_file_that_cannot_be_read_are_one_line(tmp_path, name, words):
    if name == 'x.html':
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=words):
        list(read_records(tmp_path / name))


def test_lines_of_a_text_file_are_records_and_end_at_line_breaks_alone(tmp_path):
    (tmp_path / 'x.txt').write_bytes('\ufeffa\u2028b\x0cc\r\n\n  \nd\x85e'.encode())
    assert [record.value for record in read_records(tmp_path / 'x.txt')] == ['a\u2028b\x0cc', 'd\x85e']


def test_a_list_that_is_too_long_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, 'LONGEST', 100)
    (tmp_path / 'x.json').write_text(json.dumps(['text'] * 50))
    assert 'x.json has 100 characters or more: convert it to .jsonl' in refusal(tmp_path / 'x.json')


@quick
@given(st.lists(st.text(st.sampled_from('a\n<|e>'), max_size=12)))
def test_a_separator_ends_a_document_wherever_blocks_end(tmp_path_factory, texts):
    texts = [text.replace('<|e|>', '') for text in texts]
    path = tmp_path_factory.getbasetemp() / 'separated.txt'
    for end in '<|e|>', '<|e|>\n':
        path.write_bytes(end.join(texts).encode())
        expected = [text if i == 0 or end[-1] == '\n' else text.removeprefix('\n') for i, text in enumerate(texts)]
        assert [text for text, _ in documents(path, separator='<|e|>')] == (expected or [''])


def test_a_separator_counts_in_a_txt_alone(tmp_path):
    for name in 'x.txt', 'x.md', 'x.py':
        (tmp_path / name).write_text('a<|e|>b')
        assert len(documents(tmp_path / name, separator='<|e|>')) == (2 if name == 'x.txt' else 1)
        assert Corpus([tmp_path / name], separator='<|e|>').has_documents(2) == (name == 'x.txt')
    assert documents(tmp_path / 'x.txt') == [('a<|e|>b', '')]


@quick
@given(st.text(st.sampled_from('ab\r\n\ufeff世'), max_size=60))
@example('aaaaa\r\r\n')
def test_line_ends_are_plain_wherever_blocks_end(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / 'ends.txt'
    path.write_bytes(('\ufeff' + text).encode())
    assert documents(path) == [(text.replace('\r\n', '\n'), '')]


def test_a_folder_with_lists_and_tables_says_that_they_are_not_read(tmp_path, capsys):
    for name in 'a.txt', 'b.json', 'c.csv', 'd.log':
        (tmp_path / name).touch()
    assert [file.name for file in find_files(str(tmp_path))] == ['a.txt']
    assert '2 files that end in .json, .csv, .tsv are not read' in capsys.readouterr().err
    assert len(find_files(f'{tmp_path}/*.json')) == 1
