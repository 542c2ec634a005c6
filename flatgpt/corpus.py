"""
Documents from files, in pieces, so that memory holds a few megabytes of text however large the files are.

A document is a text file, a line of a .jsonl or a row of a .parquet; files may be compressed with gzip or Zstandard.
Invalid UTF-8 is an error that names the file and the byte, or it is replaced, or its document is left out.
"""

import codecs
import contextlib
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from flatgpt import tokenizer
from flatgpt.errors import UserError

SUFFIXES = ('.txt', '.md', '.py', '.jsonl', '.parquet')   # of the files that are read in a folder
COMPRESSED = ('.gz', '.zst')                              # may follow
BLOCK = 2**18          # bytes that are read at a time
PIECE = 2**18          # characters that are encoded at a time
LONGEST_LINE = 2**28   # bytes of a line of .jsonl


# ---------------------------------------------------------------------------------------------------------------------
# files

def find_files(paths: str) -> list[Path]:
    """The files that comma-separated paths name, each once. A path is a file, a glob (** descends), or a folder: all
    files with known suffixes in and below it that are not hidden. Files of a glob or a folder are sorted."""
    found = {}
    for path in [paths] if os.path.exists(paths) else filter(None, map(str.strip, paths.split(','))):
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            files = [file for file in Path(path).rglob('*') if text_suffix(file) in SUFFIXES
                     and not any(part.startswith('.') for part in file.relative_to(path).parts)]
        else:
            files = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
        files = sorted(Path(file) for file in files if os.path.isfile(file))
        if not files:
            raise UserError(f'no file {path}: expected comma-separated files (no pipes), globs such as "x/*.log", or '
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
        raise UserError(f'cannot read {path}: {reason[:100]}') from None


@contextlib.contextmanager
def open_file(path):
    """(f, raw): a file opened for reading bytes, decompressed, and the same as it is on the disk."""
    suffix = Path(path).suffix.lower()
    with reading(path), open(path, 'rb') as raw:
        if suffix == '.gz':
            yield gzip.GzipFile(fileobj=raw), raw
        elif suffix == '.zst':
            pa = import_pyarrow(path)
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode='r'), 'zstd'), BLOCK), raw
        else:
            yield raw, raw


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
# documents

@dataclass
class Piece:
    """A part of the text of a document."""
    text: str           # '' if the document is empty or left out
    start: int          # number of its first character in the document
    last: bool          # whether the document ends here
    fault: str = ''     # in the last piece: why the document is left out or, if it has text, was repaired


@dataclass
class Corpus:
    """Files of documents, and how to read them."""
    files: list                 # paths, or names from which fetch makes paths
    field: str = 'text'         # the key of the text in a line of .jsonl
    column: str = 'text'        # the column of the text in a .parquet
    errors: str = 'strict'      # invalid text: 'strict' (UserError), 'replace' (by U+FFFD), 'skip' (the document)
    sizes: list = None          # bytes of each file, and what changes when it does; default: as on the disk
    versions: list = None
    fetch: object = None        # function: number of a file -> its path
    release: object = None      # function: called with the number of a file that will not be read again
    duplicates: list = None     # for each file booleans, one per document: whether it is not read
    position = 0                # bytes read so far of the current file

    def __post_init__(self):
        if self.sizes is None:
            self.sizes = [os.path.getsize(file) for file in self.files]
            self.versions = [os.stat(file).st_mtime_ns for file in self.files]

    def is_one_text(self) -> bool:
        """Whether the corpus is a single text file, and so a single document."""
        return len(self.files) == 1 and text_suffix(self.files[0]) not in ('.jsonl', '.parquet')

    def pieces(self, i: int, bar=None) -> Iterator[Piece]:
        """The pieces of the documents of file i. bar: a progress bar, which advances by the bytes read."""
        path = self.fetch(i) if self.fetch else self.files[i]
        suffix = text_suffix(path)
        if suffix == '.jsonl':
            documents = ([line] for line in self.lines(path))
        elif suffix == '.parquet':
            documents = ([row] for row in self.rows(path))
        else:
            documents = [self.text(path)]
        self.position = reported = 0
        for number, document in enumerate(documents):
            if self.duplicates is not None and self.duplicates[i][number]:
                continue
            for piece in in_pieces(document):
                yield piece
                if bar is not None:
                    bar.update(self.position - reported)
                    reported = self.position

    def all(self, title: str) -> Iterator[Piece]:
        """The pieces of all documents, with a progress bar."""
        with progress(title, self.sizes) as bar:
            for i in range(len(self.files)):
                yield from self.pieces(i, bar)

    def decode(self, content, where, start=0, final=True):
        """(text, number of bytes decoded, fault) of UTF-8 that begins at byte `start` of `where`."""
        try:
            return *codecs.utf_8_decode(content, 'strict', final), ''
        except UnicodeDecodeError as error:
            fault = f'{where} is not UTF-8: byte {start + error.start:,} is 0x{content[error.start]:02x}'
            if self.errors == 'replace':
                return *codecs.utf_8_decode(content, 'replace', final), fault
            self.leave_out(fault, 'convert it, for instance from UTF-16 or GBK with iconv, or give --errors=replace or '
                                  '--errors=skip')
            return '', len(content), fault

    def leave_out(self, fault, advice):
        """UserError unless documents with a fault are left out."""
        if self.errors != 'skip':
            raise UserError(f'{fault}; {advice}')

    def text(self, path):
        """(text, fault) of each part of a text file; ('', fault) alone if it is left out."""
        if self.errors == 'skip':
            fault = next((fault for _, fault in self.blocks(path) if fault), '')
            if fault:
                return [('', fault)]
        return self.blocks(path)

    def blocks(self, path):
        """(text, fault) of each block of a text file, without a byte order mark."""
        start = 0    # of the bytes that are not decoded yet
        rest = b''
        block = None
        with open_file(path) as (f, raw):
            while block != b'':
                block = f.read(BLOCK)
                content = rest + block
                text, used, fault = self.decode(content, path, start, final=not block)
                if '\0' in text and not fault:
                    fault = f'{path} is not text: byte {start + content.index(0):,} is 0x00'
                    if self.errors != 'replace':
                        self.leave_out(fault, 'remove it from --input, or give --errors=skip or --errors=replace')
                    text = text.replace('\0', '\ufffd')
                self.position = raw.tell()
                yield text.removeprefix('\ufeff') if start == 0 else text, fault
                rest = content[used:]
                start += used

    def lines(self, path):
        """(text, fault) of each document of a .jsonl."""
        number = 0
        with open_file(path) as (f, raw):
            while line := f.readline(LONGEST_LINE):
                number += 1
                where = f'{path}, line {number:,}'
                if len(line) == LONGEST_LINE:
                    raise UserError(f'{where} is longer than {LONGEST_LINE:,} bytes')
                self.position = raw.tell()
                if line.strip():
                    text, _, fault = self.decode(line, where)
                    if text:
                        text, json_fault = self.parse(text.removeprefix('\ufeff'), where)
                        fault = fault or json_fault
                    yield text, fault

    def parse(self, line, where):
        """(text, fault) of a JSON object."""
        record = None
        try:
            record = json.loads(line)
            text = record[self.field]
            valid = tokenizer.no_surrogates(text)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fault = f'{where}: expected a JSON object with a text under {self.field!r}'
            has = f'; it has {", ".join(map(repr, record))}'[:100] if isinstance(record, dict) else ''
            self.leave_out(fault + has, 'give --field=NAME, or --errors=skip')
            return '', fault
        if valid == text:
            return text, ''
        fault = f'{where} has half a surrogate pair'   # written as \ud800
        if self.errors != 'replace':
            self.leave_out(fault, 'give --errors=replace or --errors=skip')
            valid = ''
        return valid, fault

    def rows(self, path):
        """(text, fault) of each document of a .parquet."""
        pa = import_pyarrow(path)
        number = 0
        with reading(path, pa.ArrowException, UnicodeDecodeError):
            with pa.parquet.ParquetFile(path, pre_buffer=False) as table:
                names = table.schema_arrow.names
                if self.column not in names:
                    raise UserError(f'{path} has no column {self.column!r}: it has {", ".join(names)[:100]}; '
                                    f'give --column=NAME')
                for batch in table.iter_batches(batch_size=128, columns=[self.column]):
                    for content in batch.column(0).cast(pa.large_binary()).to_pylist():
                        number += 1
                        self.position = os.path.getsize(path) * number // table.metadata.num_rows
                        text, _, fault = self.decode(content or b'', f'{path}, row {number:,}')
                        yield text, fault


def in_pieces(parts) -> Iterator[Piece]:
    """The pieces of one document, given as (text, fault) of its parts. Where they end depends on its text alone."""
    held = ''
    held_start = 0   # in the document
    first_fault = ''
    for text, fault in parts:
        first_fault = first_fault or fault
        held += text
        start = 0
        while len(held) - start > PIECE:
            end = last_border(held, start)
            yield Piece(held[start:end], held_start + start, False)
            start = end
        held = held[start:]
        held_start += start
    yield Piece(held, held_start, True, first_fault)


def last_border(text, start):
    """Where a piece that begins at start ends: at the last border before start + PIECE, or there, if it has none."""
    for width in (2**6, 2**12, PIECE):   # it is usually close to the end
        first = start + max(PIECE - width, 2)   # a border shows by two characters before it
        for match in reversed(list(tokenizer.BORDER.finditer(text, first, start + PIECE))):
            return match.start()
    return start + PIECE
