"""
Documents and records from files, in bounded memory.

A text file is a document, or several with a separator between them. A line of .jsonl or .ndjson, an entry of the list
in a .json and a row of .csv, .tsv or .parquet is a record: its text is a field of it, or a template that is filled with
its fields. Files may be compressed with gzip or Zstandard. Text is UTF-8; byte order marks are removed, and line ends
are \\n.
"""

import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from flatgpt import tokenizer
from flatgpt.errors import UserError, nearest_to, refuse_pointer

SUFFIXES = ('.txt', '.md', '.py', '.jsonl', '.ndjson', '.parquet')   # of the files that are read in a folder
TABLES = ('.json', '.csv', '.tsv')                                   # are read if they are named
RECORDS = ('.jsonl', '.ndjson', '.parquet', *TABLES)
MARKUP = ('.html', '.htm', '.xhtml', '.xml')
COMPRESSED = ('.gz', '.zst')                                         # may follow
BLOCK = 2**18     # characters that are read at a time
PIECE = 2**18     # characters that are encoded at a time
LONGEST = 2**28   # characters of a line, and of a list in a .json
FIELD = re.compile(r'\{([^{}]+)\}')          # in a template
INVALID = re.compile('[\0\ud800-\udfff]')


# ---------------------------------------------------------------------------------------------------------------------
# files

def find_files(paths: str) -> list[Path]:
    """The files that comma-separated paths name, each once. A path is a file, a glob (** descends), or a folder: all
    files with known suffixes in and below it that are not hidden. Files of a glob or a folder are sorted."""
    found = {}
    for path in [paths] if os.path.exists(paths) else filter(None, map(str.strip, paths.split(','))):
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            files = [file for file in Path(path).rglob('*')
                     if not any(part.startswith('.') for part in file.relative_to(path).parts)]
            tables = sum(text_suffix(file) in TABLES for file in files)
            if tables:
                print(f'{path}: {tables:,} files that end in {", ".join(TABLES)} are not read: to read them, name them '
                      f'with a glob', file=sys.stderr)
            files = [file for file in files if text_suffix(file) in SUFFIXES]
        else:
            files = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
        files = sorted(Path(file) for file in files if os.path.isfile(file))
        if not files and not glob.has_magic(path) and nearest_to(path):
            raise UserError(f'no file {path}{nearest_to(path)}')
        if not files:
            raise UserError(f'no file {path}: expected comma-separated files (no pipes), globs such as "x/*.json", or '
                            f'folders with {" ".join(SUFFIXES)} files, which may end in {" or ".join(COMPRESSED)} too')
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise UserError('no input: give --input=PATHS, comma-separated files, folders or globs')
    return list(found.values())


def text_suffix(path) -> str:
    """The suffix of a file that tells its format, in lower case, without that of its compression."""
    path = Path(path)
    return (Path(path.stem) if path.suffix.lower() in COMPRESSED else path).suffix.lower()


@contextlib.contextmanager
def reading(path, *exceptions):
    """A block that reads a file: errors of the system, of gzip and of further classes become a UserError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, *exceptions) as error:
        reason = ' '.join(str(getattr(error, 'strerror', None) or error).split())
        raise UserError(f'cannot read {path}: {reason[:100]}{nearest_to(path)}') from None


@contextlib.contextmanager
def open_text(path):
    """(f, raw): a file opened for reading text, decompressed and without a byte order mark, and the same file as it is
    on the disk. Bytes that are not UTF-8 are read as lone surrogates, and line ends as they are."""
    if text_suffix(path) in MARKUP:
        raise UserError(f'{path} is markup, not text: convert it, for instance with pandoc -t plain; to learn the '
                        f'markup itself, let its name end in .txt, or use data/my_code')
    suffix = Path(path).suffix.lower()
    with reading(path), open(path, 'rb') as raw:
        refuse_pointer(path, raw.peek(64))
        f = raw
        if suffix == '.gz':
            f = gzip.GzipFile(fileobj=raw)
        elif suffix == '.zst':
            pa = import_pyarrow(path)
            f = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode='r'), 'zstd'), BLOCK)
        yield io.TextIOWrapper(f, encoding='utf-8-sig', errors='surrogateescape', newline='\n'), raw


def import_pyarrow(path):
    """The package pyarrow, to read a file."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path} needs pyarrow: pip install pyarrow') from None
    return pyarrow


def progress(title: str, sizes: list, done: int = 0):
    """A progress bar over the bytes of files of these sizes, of which the first `done` are done."""
    return tqdm(desc=title, total=sum(sizes), initial=sum(sizes[:done]), unit='B', unit_scale=True, leave=False,
                disable=None)


# ---------------------------------------------------------------------------------------------------------------------
# records and documents

class Record(NamedTuple):
    """A record of a file."""
    where: str      # the file, and the line, row or number in it
    value: object   # an object of JSON, a row as {column: cell}, or a text; None: left out


class Piece(NamedTuple):
    """A part of the text of a document."""
    text: str         # '' if the document is empty or left out
    start: int        # number of its first character in the document
    last: bool        # whether the document ends here
    fault: str = ''   # in the last piece: why the document is left out or, if it has text, was repaired


def read_records(path) -> Iterator[Record]:
    """The records of a file; of a text file, the lines that are not blank, as texts. UserError names the place of what
    is invalid."""
    corpus = Corpus([path], options=False)
    if text_suffix(path) not in RECORDS:
        yield from (Record(where, line.rstrip('\r\n')) for where, line in corpus.lines(path) if line.strip())
        return
    for where, value in corpus.records(path):
        for text in value.values() if isinstance(value, dict) else [value]:
            if isinstance(text, str):
                corpus.repair(text, where)
        yield Record(where, value)


@dataclass
class Corpus:
    """Files of documents, and how to read them."""
    files: list                 # paths, or names from which fetch makes paths
    _: KW_ONLY
    field: str = 'text'         # the key of the text in a record
    column: str = 'text'        # the column of the text in a .parquet
    errors: str = 'strict'      # invalid text: 'strict' (UserError), 'replace' (by U+FFFD), 'skip' (the document)
    options: bool = True        # whether errors and field are options of the script, to be named in advice
    template: str = ''          # the text of a record, such as '{title}\n{text}'; empty: its field or column
    separator: str = ''         # what ends the documents of a .txt; empty: the file is one document
    versions: list = None       # (bytes, what changes when it does) of each file; default: as on the disk
    fetch: object = None        # function: number of a file -> its path
    duplicates: list = None     # for each file booleans, one per document: whether it is not read
    border: object = tokenizer.BORDER   # regular expression of where a document may be cut
    position = 0                # bytes read so far of the current file
    fault = ''                  # what is wrong with the document that is being read

    def __post_init__(self):
        with reading(self.files[0]):
            self.versions = self.versions or [(os.path.getsize(file), os.stat(file).st_mtime_ns) for file in self.files]
        self.sizes = [size for size, _ in self.versions]

    def has_documents(self, n: int) -> bool:
        """Whether there are n documents or more."""
        ends = (piece for i in range(len(self.files)) for piece in self.pieces(i) if piece.last)
        return next(itertools.islice(ends, n - 1, None), None) is not None

    def pieces(self, i: int, bar=None) -> Iterator[Piece]:
        """The pieces of the documents of file i. bar: a progress bar, which advances by the bytes read."""
        path = self.fetch(i) if self.fetch else self.files[i]
        self.position = reported = number = 0
        self.fault = ''
        for piece in in_pieces(self.texts(path) if text_suffix(path) in RECORDS else self.parts(path), self.border):
            if self.duplicates is None or not self.duplicates[i][number]:
                yield piece._replace(fault=self.fault) if piece.last else piece
            if piece.last:
                number += 1
                self.fault = ''
            if bar is not None:
                bar.update(self.position - reported)
                reported = self.position

    def all(self, title: str) -> Iterator[Piece]:
        """The pieces of all documents, with a progress bar."""
        with progress(title, self.sizes) as bar:
            for i in range(len(self.files)):
                yield from self.pieces(i, bar)

    def refuse(self, fault, advice, unless):
        """Note a fault of the current document, if errors are treated in one of the ways in unless; else UserError."""
        if self.errors not in unless:
            raise UserError(f'{fault}; {advice}' if self.options else fault)
        self.fault = self.fault or fault

    def repair(self, text, where, start=0):
        """What open_text() reads at byte `start` of `where`, with U+FFFD for what is invalid."""
        with contextlib.suppress(UnicodeEncodeError):   # much faster than INVALID.search()
            text.encode()
            if '\0' not in text:
                return text
        match = INVALID.search(text)
        byte = f'byte {start + len(text[:match.start()].encode()):,}'
        advice = 'give --errors=replace or --errors=skip'
        if match[0] == '\0':
            fault = f'{where} is not text: {byte} is 0x00'
            advice = f'remove it from --input, or {advice}'
        elif '\udc80' <= match[0] <= '\udcff':
            fault = f'{where} is not UTF-8: {byte} is 0x{ord(match[0]) - 0xdc00:02x}'
            advice = f'convert it, for instance from UTF-16 or GBK with iconv, or {advice}'
        else:   # written as \ud800 in JSON
            fault = f'{where} has half a surrogate pair'
        self.refuse(fault, advice, ('replace', 'skip'))
        with contextlib.suppress(UnicodeEncodeError):   # of half a pair
            text = text.encode(errors='surrogateescape').decode(errors='replace')
        return tokenizer.no_surrogates(text).replace('\0', '\ufffd')

    # text files

    def parts(self, path):
        """(text, whether the document ends) of each part of a text file."""
        if self.errors == 'skip' and any(self.fault for _ in self.blocks(path)):
            yield '', True
        else:
            yield from split_documents(self.blocks(path), self.separator if text_suffix(path) == '.txt' else '')

    def blocks(self, path):
        """The blocks of a text file."""
        start = 0   # of the block, in bytes
        with open_text(path) as (f, raw):
            while block := f.read(BLOCK):
                while block.endswith('\r') and (more := f.read(1)):   # a line end is not cut
                    block += more
                text = self.repair(block, path, start)
                self.position = raw.tell()
                yield text.replace('\r\n', '\n')
                start += len(block.encode(errors='surrogateescape'))

    # records

    def texts(self, path):
        """(text, True) of each record of a file."""
        names = FIELD.findall(self.template) or [self.column if text_suffix(path) == '.parquet' else self.field]
        for where, value in self.records(path, names):
            text = '' if value is None else self.text_of(value, names, where)
            yield '' if self.fault and self.errors == 'skip' else text, True

    def text_of(self, record, names, where):
        """The text of a record: its field, or the template with its fields. A list of texts is lines of text."""
        record = {self.field: record} if isinstance(record, str) else record
        template = self.template.replace('\\n', '\n').replace('\\t', '\t')
        try:
            cells = {name: cell(record[name], numbers=template != '') for name in names}
        except (KeyError, TypeError):
            has = f'; it has {", ".join(map(repr, record))}'[:100] if isinstance(record, dict) and record else ''
            self.refuse(f'{where}: expected a text under {" and ".join(map(repr, names))}{has}',
                        'give --field=NAME, --template={NAME}, or --errors=skip', ('skip',))
            return ''
        text = FIELD.sub(lambda match: cells[match[1]], template) if template else cells[names[0]]
        return self.repair(text.replace('\r\n', '\n'), where)

    def records(self, path, names=None) -> Iterator[Record]:
        """The records of a file. names: columns of a .parquet; None: all."""
        suffix = text_suffix(path)
        if suffix == '.parquet':
            yield from self.rows(path, names)
        elif suffix in ('.csv', '.tsv'):
            yield from self.table(path, suffix)
        elif suffix == '.json' and self.is_list(path):
            with open_text(path) as (f, raw):
                content = f.read(LONGEST)
                self.position = raw.tell()
            if len(content) == LONGEST:
                raise UserError(f'{path} has {LONGEST:,} characters or more: convert it to .jsonl, a record per line')
            records = self.parse(self.repair(content, path), path)
            records = [None] if records is None else records
            yield from (Record(f'{path}, record {i:,}', record) for i, record in enumerate(records, 1))
        else:
            yield from (Record(where, self.parse(line, where)) for where, line in self.lines(path) if line.strip())

    def is_list(self, path):
        """Whether a .json is a list of records, and not an object per line."""
        with open_text(path) as (f, _):
            return f.read(BLOCK).lstrip().startswith('[')

    def parse(self, text, where):
        """The value of a text in JSON; None if it is not JSON."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            self.refuse(f'{where} is not JSON: {" ".join(str(error).split())[:80]}',
                        'correct it, or give --errors=skip', ('skip',))

    def lines(self, path) -> Iterator[Record]:
        """The lines of a file, with their ends, as records."""
        with open_text(path) as (f, raw):
            for number in itertools.count(1):
                line = f.readline(LONGEST)
                where = f'{path}, line {number:,}'
                if line == '':
                    return
                if len(line) == LONGEST:
                    raise UserError(f'{where} has {LONGEST:,} characters or more')
                self.position = raw.tell()
                yield Record(where, self.repair(line, where))

    def table(self, path, suffix):
        """The rows of a .csv or .tsv as records."""
        csv.field_size_limit(LONGEST)
        with open_text(path) as (f, raw), reading(path, csv.Error):
            header = f.readline()
            delimiter = '\t' if suffix == '.tsv' else max(',;\t', key=header.count)
            reader = csv.DictReader(itertools.chain([header], f), delimiter=delimiter, strict=True)
            for row in reader:
                self.position = raw.tell()
                yield Record(f'{path}, line {reader.line_num:,}', row)

    def rows(self, path, names):
        """The rows of a .parquet as records, with these columns."""
        pa = import_pyarrow(path)
        with reading(path), open(path, 'rb') as f:
            refuse_pointer(path, f.read(64))
        with reading(path, pa.ArrowException, UnicodeError), pa.parquet.ParquetFile(path, pre_buffer=False) as table:
            has = table.schema_arrow.names
            missing = [name for name in names or () if name not in has]
            if missing:
                raise UserError(f'{path} has no column {missing[0]!r}: it has {", ".join(has)[:100]}; '
                                f'give --column=NAME')
            batches = table.iter_batches(batch_size=128, columns=names)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                self.position = os.path.getsize(path) * number // table.metadata.num_rows
                cells = {name: value.decode(errors='surrogateescape') if isinstance(value, bytes) else value
                         for name, value in row.items()}   # what is not UTF-8 becomes lone surrogates
                yield Record(f'{path}, row {number:,}', cells)


def cell(value, numbers):
    """The text of a field: a text, nothing, or a list of them; TypeError for other values, but numbers if so asked."""
    if isinstance(value, list):
        return '\n'.join(cell(part, numbers) for part in value)
    if value is None:
        return ''
    if not isinstance(value, (str, int, float) if numbers else str):
        raise TypeError
    return str(value)


def split_documents(blocks, separator):
    """(text, whether the document ends) of the parts of documents, from the blocks of their text. A line break after a
    separator belongs to it."""
    pattern = re.compile(re.escape(separator) + r'(?:\n|(?!\Z))')   # not at the end, where a line break may follow
    text = ''
    for block in blocks:
        *documents, text = pattern.split(text + block) if separator else [text + block]
        yield from ((document, True) for document in documents)
        end = max(len(text) - len(separator), 0)   # what begins there may be a separator with the next block
        yield text[:end], False
        text = text[end:]
    if separator and text == separator:
        yield '', True
        text = ''
    yield text, True


def in_pieces(parts, border=tokenizer.BORDER) -> Iterator[Piece]:
    """The pieces of documents, given as (text, whether the document ends) of their parts. A piece ends at the last
    border among its last 4,096 characters, if there is one, which depends on the text of the document alone."""
    held = ''
    held_start = 0   # in the document
    for text, last in parts:
        held += text
        start = 0
        while len(held) - start > PIECE:
            end = start + PIECE
            borders = list(border.finditer(held, max(start + 2, end - 4096), end))   # it shows by 2 characters before
            end = borders[-1].start() if borders else end
            yield Piece(held[start:end], held_start + start, False)
            start = end
        held = held[start:]
        held_start += start
        if last:
            yield Piece(held, held_start, True)
            held = ''
            held_start = 0
