"""
Documents out of files, piece by piece, so that memory holds a few megabytes of them whatever their size.

A document is a text file, a line of a .jsonl or a row of a .parquet, packed with gzip or Zstandard or not. What is no
UTF-8 is found, told by file and place, and refused, mended or left out. A long document comes in pieces, cut where no
token could be, if it has such a place.
"""

import codecs
import contextlib
import glob
import gzip
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import tokenizer
from configurator import UserError

KINDS = ('.txt', '.md', '.py', '.jsonl', '.parquet')   # what is looked for in a folder, also with one of PACKED behind
PACKED = ('.gz', '.zst')
BLOCK = 2**18       # bytes read at a time
PIECE = 2**18       # characters of a document that travel together, and of documents that are tokenized together
LONGEST_LINE = 2**28   # bytes of a line of .jsonl
PACKING = {'.gz': 4, '.zst': 4, '.parquet': 2.5}   # bytes of text in a byte of such a file, more or less


# ---------------------------------------------------------------------------------------------------------------------
# files

def find_files(paths):
    """The files that paths name, parted by commas: files, globs (** goes into folders), and folders, of which all
    files of known kinds count, hidden ones aside. In this order, those of a glob or a folder sorted; each once, however
    it is spelled."""
    found = []
    for path in [paths] if os.path.exists(paths) else filter(None, map(str.strip, paths.split(','))):
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            known = [file for file in Path(path).rglob('*') if kind_of(file) in KINDS and file.is_file()
                     and not any(part.startswith('.') for part in file.relative_to(path).parts)]
            if not known:
                raise UserError(f'{path} has no file of a known kind in it ({" ".join(KINDS)}, also with '
                                f'{" or ".join(PACKED)}): name the files, as in --input="{path}/*.log"')
            found += sorted(known)
        elif os.path.isfile(path):
            found.append(Path(path))
        elif os.path.exists(path):
            raise UserError(f'{path} is no ordinary file, and it is read more than once: put what it gives into one')
        else:
            known = [Path(file) for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
            if not known:
                raise UserError(f'no file {path}: expected files, folders or globs, parted by commas')
            found += sorted(known)
    if not found:
        raise UserError('no input: give --input=PATHS, files, folders or globs, parted by commas')
    once = {}
    for file in found:
        once.setdefault(file.resolve(), file)
    return list(once.values())


def kind_of(path):
    """The suffix of a file that tells what is in it, that of its packing aside, in lower case."""
    path = Path(path)
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


def import_pyarrow(name, path):
    try:
        return __import__(f'pyarrow.{name}' if name else 'pyarrow', fromlist=['*'])
    except ImportError:
        raise UserError(f'{path} takes pyarrow to read: pip install pyarrow') from None


@contextlib.contextmanager
def told(path, *also):
    """A block in which trouble with reading a file is told in one line; also: further exceptions that mean it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, *also) as error:
        reason = ' '.join(str(getattr(error, 'strerror', None) or error).split())
        raise UserError(f'cannot read {path}: {reason[:100]}') from None


def blocks(path, bar=None):
    """The bytes of a file, unpacked, block by block. bar is told of the bytes read from the disk."""
    with told(path), open(path, 'rb') as raw:
        packing, f = Path(path).suffix.lower(), raw
        if packing == '.gz':
            f = gzip.GzipFile(fileobj=raw)
        elif packing == '.zst':
            pa = import_pyarrow('', path)
            f = pa.CompressedInputStream(pa.PythonFile(raw, mode='r'), 'zstd')
        at = 0
        while block := f.read(BLOCK):
            if bar is not None:
                bar.update(raw.tell() - at)
                at = raw.tell()
            yield block


def estimate(corpus):
    """How many bytes of text there are, more or less."""
    names = [str(file).lower() for file in corpus.files]
    return sum(size * next((by for end, by in PACKING.items() if name.endswith(end)), 1)
               for name, size in zip(names, corpus.sizes))


def progress(what, total, initial=0):
    return tqdm(desc=what, total=total, initial=initial, unit='B', unit_scale=True, leave=False, disable=None)


# ---------------------------------------------------------------------------------------------------------------------
# documents

@dataclass
class Piece:
    """Some text of a document, in the order in which it stands there."""
    text: str           # '' if the document is empty or left out
    last: bool = True   # whether the document ends here
    fault: str = ''     # what is wrong with it, and where: it was left out if there is no text, else mended


@dataclass
class Corpus:
    """Files of documents, and how to read them."""
    files: list                 # paths, or what fetch makes paths of
    field: str = 'text'         # of an object in a line of .jsonl
    column: str = 'text'        # of a .parquet
    errors: str = 'strict'      # what is no UTF-8: 'strict' (refused), 'replace' (by U+FFFD), 'skip' (its document)
    sizes: list = None          # bytes of the files, and what changes when they do; by default, as on the disk
    versions: list = None
    fetch: object = None        # function: number of a file -> its path
    release: object = None      # function: called with the number of a file that will not be read again

    def __post_init__(self):
        if self.sizes is None:
            self.sizes, self.versions = [], []
            for file in self.files:
                with told(file):
                    stat = os.stat(file)
                self.sizes.append(stat.st_size)
                self.versions.append(stat.st_mtime_ns)

    def pieces(self, i, bar=None):
        """The pieces of the documents of file i."""
        path = self.fetch(i) if self.fetch else self.files[i]
        if kind_of(path) == '.jsonl':
            documents = self.lines(path, bar)
        elif kind_of(path) == '.parquet':
            documents = self.rows(path, bar)
        else:
            return self.text(path, bar)
        return (piece for text, fault in documents for piece in in_pieces([text], fault))

    def all(self, what):
        """All pieces of all files, with a progress bar."""
        with progress(what, sum(self.sizes)) as bar:
            for i in range(len(self.files)):
                yield from self.pieces(i, bar)

    def decode(self, content, where, offset, final=True):
        """(text, bytes it took, fault) for UTF-8 of which the first byte is that of number offset of `where`."""
        try:
            return *codecs.utf_8_decode(content, 'strict', final), ''
        except UnicodeDecodeError as error:
            byte = f'byte {offset + error.start:,} is 0x{content[error.start]:02x}'
            fault = f'{where} is not UTF-8: {byte}'
            if offset == 0 and content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                fault += ', as in UTF-16'
            if self.errors == 'replace':
                return *codecs.utf_8_decode(content, 'replace', final), fault
            return '', len(content), self.refuse(f'{fault}; convert it, for instance with iconv, or give '
                                                 f'--errors=replace or --errors=skip', fault)

    def refuse(self, message, fault):
        """The fault of what is to be left out; UserError unless that is what errors says."""
        if self.errors != 'skip':
            raise UserError(message)
        return fault

    def text(self, path, bar):
        """The pieces of a text file, which is one document."""
        if self.errors == 'skip':   # before the first piece is out
            fault = next((fault for _, fault in self.chunks(path, None) if fault), '')
            if fault:
                yield Piece('', True, fault)
                return
        first_fault = []

        def texts():
            for text, fault in self.chunks(path, bar):
                if fault and not first_fault:
                    first_fault.append(fault)
                yield text

        for piece in in_pieces(texts()):
            if piece.last and first_fault:
                piece.fault = first_fault[0]
            yield piece

    def chunks(self, path, bar):
        """(text, fault) of a text file, block by block, without a byte order mark."""
        rest, at = b'', 0   # what is not decoded yet, and the number of its first byte
        source = blocks(path, bar)
        while True:
            block = next(source, b'')
            content = rest + block
            text, used, fault = self.decode(content, path, at, final=not block)
            if '\0' in text and not fault:
                where = at + content.index(0)
                fault = f'{path} is no text: byte {where:,} is 0x00'
                if self.errors == 'replace':
                    text = text.replace('\0', '\ufffd')
                else:
                    self.refuse(f'{fault}; leave it out of --input, or give --errors=skip or --errors=replace', fault)
            yield text.removeprefix('\ufeff') if at == 0 else text, fault
            rest, at = content[used:], at + used
            if not block:
                return

    def lines(self, path, bar):
        """(text, fault) of the documents of a .jsonl."""
        number = 0
        for at, line in split_lines(path, bar):
            number += 1
            if not line.strip():
                continue
            text, _, fault = self.decode(line, path, at)
            if text:
                where, record = f'{path}, line {number:,}', None
                try:
                    record = json.loads(text.removeprefix('\ufeff'))
                    text = record[self.field]
                    if not isinstance(text, str):
                        raise TypeError
                    text.encode()
                except UnicodeEncodeError:   # as '\\ud800' has it
                    fault = f'{where} has half a surrogate pair'
                    text = tokenizer.no_surrogates(text)
                    if self.errors != 'replace':
                        text, fault = '', self.refuse(f'{fault}: give --errors=replace or --errors=skip', fault)
                except (ValueError, KeyError, TypeError, RecursionError):
                    has = f'; it has {", ".join(map(repr, record))}'[:100] if isinstance(record, dict) else ''
                    text, fault = '', self.refuse(f'{where}: expected a JSON object with a text under '
                                                  f'{self.field!r}{has}; give --field=NAME, or --errors=skip',
                                                  f'{where} has no text under {self.field!r}')
            yield text, fault

    def rows(self, path, bar):
        """(text, fault) of the documents of a .parquet."""
        pa, pq = import_pyarrow('', path), import_pyarrow('parquet', path)
        if Path(path).suffix.lower() in PACKED:
            raise UserError(f'{path} is a .parquet, which is packed within, packed once more: unpack it')
        number, at = 0, 0
        with told(path, pa.ArrowException, UnicodeDecodeError):
            with pq.ParquetFile(path, pre_buffer=False) as table:
                names = table.schema_arrow.names
                if self.column not in names:
                    raise UserError(f'{path} has no column {self.column!r}: it has {", ".join(names)[:100]}; '
                                    f'give --column=NAME')
                size, rows = os.path.getsize(path), max(table.metadata.num_rows, 1)
                for batch in table.iter_batches(batch_size=128, columns=[self.column]):
                    column = batch.column(0)
                    try:
                        column = column.cast(pa.large_binary())
                    except pa.ArrowException:
                        raise UserError(f'{path}: column {self.column!r} is of type {column.type}, expected text; '
                                        f'give --column=NAME') from None
                    for content in column.to_pylist():
                        number += 1
                        text, _, fault = self.decode(content or b'', f'{path}, row {number:,}', 0)
                        yield text, fault
                    if bar is not None:
                        bar.update(size * number // rows - at)
                        at = size * number // rows


def split_lines(path, bar):
    """(number of the first byte, bytes) of the lines of a file, unpacked."""
    at, rest, length = 0, [], 0   # of what has no end yet
    for block in blocks(path, bar):
        first, *more = block.split(b'\n')
        rest.append(first)
        length += len(first)
        if more:
            line = b''.join(rest)
            yield at, line
            at += len(line) + 1
            for line in more[:-1]:
                yield at, line
                at += len(line) + 1
            rest, length = more[-1:], len(more[-1])
        if length > LONGEST_LINE:
            raise UserError(f'{path}: the line that begins at byte {at:,} is longer than {LONGEST_LINE:,} bytes')
    if any(rest):
        yield at, b''.join(rest)


def in_pieces(texts, fault=''):
    """The pieces of one document, given as an iterable of texts of any length: where they are cut depends on the
    document alone."""
    held = ''
    for text in texts:
        held, at = held + text, 0
        while len(held) - at > PIECE:
            end = border(held, at)
            yield Piece(held[at:end], False)
            at = end
        held = held[at:]
    yield Piece(held, True, fault)


def border(text, start):
    """Where to end a piece that begins at start, of a text that has more than PIECE behind it: at the last border
    before that; if it has none, there."""
    for width in (2**6, 2**12, PIECE):
        first = start + max(PIECE - width, 2)   # a border shows by two characters before it
        for match in reversed(list(tokenizer.BORDER.finditer(text, first, start + PIECE))):
            return match.start()
    return start + PIECE
