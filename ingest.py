"""
Documents into a dataset, whatever their size: tokenized on all cores and written piece by piece, with a result that
depends neither on the number of cores nor on interruptions: what a killed process had done up to its last commit is not
done again, and what comes out is the same, bit for bit.

Each document belongs to training or to validation as a whole, by the hash of its beginning.
"""

import collections
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import tokenizer
from configurator import UsageError, UserError
from corpus import PIECE, Corpus, estimate, kind_of, progress
from dataset import MAX_BYTES, SPLITS, Writer
from download import PATIENT, download, hub, hub_files

FORMAT = 2   # of what is written, and how: another one does not go on where this one was
COST = 100   # bytes that a character of NO_BLANKS takes in training beyond those of an English one, as measured
NO_BLANKS = ((0x0e00, 0x0eff), (0x1000, 0x109f), (0x1780, 0x17ff),   # Thai, Lao, Burmese, Khmer
             (0x3040, 0x30ff), (0x3400, 0x9fff), (0xf900, 0xfaff), (0x20000, 0x3ffff))   # Japanese, Chinese

# ---------------------------------------------------------------------------------------------------------------------
# what one knows of a document by its hash

def fraction(digest, seed, purpose):
    """A number in [0, 1) that a digest draws."""
    drawn = hashlib.blake2b(digest, digest_size=8, key=f'{seed} {purpose}'.encode()).digest()
    return int.from_bytes(drawn, 'big') / 2**64


def later_copies(pieces):
    """A boolean for each document: whether one that is equal came before."""
    digests, digest = [np.empty(0, np.uint64)], hashlib.blake2b(digest_size=8)
    found = bytearray()
    for piece in pieces:
        digest.update(piece.text.encode())
        if piece.last:
            found += digest.digest()
            digest = hashlib.blake2b(digest_size=8)
    digests = np.frombuffer(bytes(found), np.uint64)
    copies = np.ones(len(digests), bool)
    copies[np.unique(digests, return_index=True)[1]] = False
    return copies


def kept(pieces, copies):
    """The pieces of those documents that are no copies."""
    number = 0
    for piece in pieces:
        if copies is None or not copies[number]:
            yield piece
        number += piece.last


def training_share(corpus, copies, train_bytes):
    """The share of a corpus that costs as much to train an encoding on as train_bytes of English. Scripts without
    blanks between words cost more: the trainer counts what lies between two blanks, and most of it occurs once."""
    cost = 0
    for piece in kept(corpus.all('measuring the text'), copies):
        cost += len(piece.text)
        if not piece.text.isascii():
            points = np.frombuffer(piece.text.encode('utf-32-le'), '<u4')
            cost += COST * sum(int(((first <= points) & (points <= last)).sum()) for first, last in NO_BLANKS)
    return train_bytes / max(cost, 1)


def sample(pieces, share, seed):
    """The texts of an even share of pieces."""
    for piece in pieces:
        if piece.text and (share >= 1 or fraction(piece.text.encode()[:4096], seed, 'sample') < share):
            yield piece.text


# ---------------------------------------------------------------------------------------------------------------------
# tokenizing and writing

class Pipeline:
    """Texts go in one after another, ids come out into a Writer in the same order; in between, threads tokenize: the
    libraries that do it let go of Python's lock."""

    def __init__(self, tok, writer, threads, inside=False):
        self.tok, self.writer, self.threads = tok, writer, threads
        self.pool, self.queue = ThreadPoolExecutor(threads), collections.deque()
        self.waiting = {split: [] for split in SPLITS}   # whole documents, too short to be tokenized alone
        self.length = dict.fromkeys(SPLITS, 0)
        self.begun = {split: writer.tokens[split] > 0 for split in SPLITS}
        self.held = []             # pieces of a document that must not be cut
        self.first = not inside    # whether the next piece is the first one of a document
        if tok.parallel:
            tok.encode_texts(['\n'])   # the first call sets up what threads then share

    def add(self, split, text, last):
        """Take the next piece of the document at hand; last: it ends here."""
        if self.tok.eot is None and self.first:   # what parts the documents then
            text, self.begun[split] = '\n' * self.begun[split] + text, True
        whole, self.first = self.first and last, last
        if not self.tok.cuttable:
            self.held.append(text)
            if not last:
                return
            text, whole, self.held = ''.join(self.held), True, []
        if not whole or self.length[split] + len(text) > PIECE:
            self.flush(split)
        if whole:
            self.waiting[split].append(text)
            self.length[split] += len(text)
        else:
            self.submit(split, [text], last)

    def flush(self, split):
        """Have what waits tokenized."""
        if self.waiting[split]:
            self.submit(split, self.waiting[split], True)
            self.waiting[split], self.length[split] = [], 0

    def submit(self, split, texts, end):
        if not self.tok.parallel:
            self.writer.append(split, self.tok.encode_texts(texts, end))
            return
        self.queue.append((split, self.pool.submit(self.tok.encode_texts, texts, end)))
        while len(self.queue) > self.threads + 2:
            self.write()

    def write(self):
        split, future = self.queue.popleft()
        self.writer.append(split, future.result())

    def drain(self):
        """All that was added is written."""
        for split in SPLITS:
            self.flush(split)
        while self.queue:
            self.write()


def count_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


@dataclass
class Tally:
    """What is known of the documents up to a point, and where that is. All of it goes into the journal."""
    file: int = 0       # the file at hand, how many of its documents are done, and pieces of the one after them
    document: int = 0
    piece: int = 0
    number: int = 0     # of documents in all, those that were left out among them
    documents: dict = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    characters: dict = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    empty: int = 0
    duplicates: int = 0
    left_out: int = 0
    mended: int = 0
    faults: list = field(default_factory=list)                # the first ten
    longest: list = field(default_factory=lambda: [0, ''])    # bytes, and the file that it is in
    snippets: list = field(default_factory=list)              # [a random number, a text] of the ten lowest
    lowest: list = field(default_factory=list)                # the same, [number, bytes, digest], equal ones as one
    digest: str = ''                                          # of the digests of all documents, in their order
    tail: bool = False                                        # whether validation is the end of the only document

    def enter(self, document, piece, name):
        """Count a document that has ended with this piece, in the file of this name."""
        self.number += 1
        self.document, self.piece = self.document + 1, 0
        if piece.fault:
            self.faults = [*self.faults, piece.fault][:10]
            self.mended += document.size > 0
        if not document.size:
            self.left_out += bool(piece.fault)
            self.empty += not piece.fault
        elif document.copy:
            self.duplicates += 1
        else:
            self.documents[document.split] += 1
            self.bytes[document.split] += document.size
            self.characters[document.split] += document.length
            self.longest = max(self.longest, [document.size, name], key=lambda longest: longest[0])
            known = [entry for entry in self.lowest if entry[2] == document.first.hex()]
            if known:
                known[0][1] += document.size
            elif len(self.lowest) < 2 or document.drawn < self.lowest[1][0]:
                self.lowest = sorted([*self.lowest, [document.drawn, document.size, document.first.hex()]])[:2]
            number = document.drawn * 2**20 % 1
            if len(self.snippets) < 10 or number < self.snippets[9][0]:
                start = int(number * 2**20 % 1 * max(len(piece.text) - 80, 0))
                self.snippets = sorted([*self.snippets, [number, piece.text[start:start + 80]]])[:10]
            self.digest = hashlib.sha256(bytes.fromhex(self.digest) + document.hash.digest()).hexdigest()


class Document:
    """The document at hand, of which some pieces are read."""

    def __init__(self, content, seed, val_fraction, copy, given):
        self.hash = hashlib.sha256(content)
        self.first = self.hash.digest()   # of its first piece, which is all there is of nearly all documents
        self.drawn = fraction(self.first, seed, 'split')
        self.split = SPLITS[self.drawn < val_fraction if given is None else self.first == given]
        self.copy, self.size, self.length = copy, 0, 0


def check_options(val_fraction, seed, **limits):
    """UsageError for options that make no sense: limits are above 0 or None."""
    if abs(seed) >= 2**63:
        raise UsageError(f'seed={seed}: expected less than 2^63')
    if not 0 < val_fraction < 1:
        raise UsageError(f'val_fraction={val_fraction}: expected more than 0 and less than 1')
    for name, value in limits.items():
        if value is not None and not 0 < value < 2**31:
            raise UsageError(f'{name}={value}: expected more than 0, and less than 2^31')


def build(folder, corpus, spec, val_fraction=0.1, seed=1337, deduplicate=False, min_frequency=2, special=(),
          train_bytes=100_000_000, threads=None, save_bytes=2**26, max_bytes=MAX_BYTES, source=None, given=None):
    """Make folder a dataset of all documents of a corpus.

    spec: the tokenizer, see tokenizer.make; one that is trained sees an even sample that costs as much as train_bytes
    of English. val_fraction: of the documents, drawn with seed. save_bytes: of text between two points from which a
    killed process goes on. max_bytes: of a file of ids. source: {key: value} for meta.json. given: the digest of a
    document that is for validation, whatever is drawn; b'' for none. Returns (tokenizer, report); the report is in
    meta.json too.
    """
    asked = locals()
    folder, trained = Path(folder), tokenizer.trained_size(spec) is not None
    tok = None if trained or spec == 'char' else tokenizer.make(spec)   # first of all, so that a typo is found at once
    if given is None and len(corpus.files) == 1 and kind_of(corpus.files[0]) not in ('.jsonl', '.parquet'):
        given = b''   # the only document is for training, but for its end
    key = json.dumps([FORMAT, spec, tok and tok.to_dict(), [str(file) for file in corpus.files], corpus.sizes,
                      corpus.versions, corpus.field, corpus.column, corpus.errors, val_fraction, seed, deduplicate,
                      min_frequency, list(special), train_bytes, max_bytes, None if given is None else given.hex()])
    key = hashlib.sha256(key.encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot make the folder {folder}: {error.strerror}') from None
    writer = Writer(folder, key, max_bytes)
    try:
        if writer.done:
            print(f'{folder} only had to be finished', file=sys.stderr)
            tok = tokenizer.from_dict(writer.tokenizer)
            return tok, report(tok, Tally(**writer.notes), writer.tokens)
        copies = later_copies(corpus.all('looking for copies')) if deduplicate else None
        if writer.notes is None:
            tally = Tally()
            share = training_share(corpus, copies, train_bytes) if trained else 1
            t0 = time.perf_counter()
            if tok is None:
                tok = tokenizer.make(spec, vocabulary_texts(corpus, copies, share, seed), min_frequency, special)
            if trained:
                print(f'{tok.vocab_size:,} tokens trained on {min(share, 1):.1%} of the text in '
                      f'{time.perf_counter() - t0:.1f} s', file=sys.stderr)
            writer.begin(tok)
            writer.commit(vars(tally))
        else:
            tok, tally = tokenizer.from_dict(writer.tokenizer), Tally(**writer.notes)
            print(f'{folder} is begun, {sum(writer.tokens.values()):,} tokens are there: going on', file=sys.stderr)
        if tally.file < len(corpus.files):
            check_room(folder, corpus, tok, writer, tally.file)
        pipeline = Pipeline(tok, writer, threads or count_cores(), inside=tally.piece > 0)
        try:
            write_documents(corpus, pipeline, tally, copies, val_fraction, seed, save_bytes, given)
        finally:
            pipeline.pool.shutdown(cancel_futures=True)
        writer.commit(vars(tally))
        n = sum(tally.documents.values())
        if n == 0:
            raise UserError(f'no text in {len(corpus.files):,} files: {tally.empty:,} documents are empty'
                            + (f', {tally.left_out:,} left out, as {tally.faults[0]}' if tally.faults else ''))
        if n > 1 and len(tally.lowest) == 1:
            raise UserError(f'all {n:,} documents are equal: give more text, or --deduplicate and have the end of one '
                            f'for validation')
        if given is None and not all(tally.documents.values()):   # few documents: which is for validation is settled
            half = sum(tally.bytes.values()) / 2
            given = next((bytes.fromhex(first) for _, size, first in tally.lowest if size <= half), b'')
            writer.close()
            return build(**{**asked, 'given': given})
        if n == 1 and not tally.tail:
            cut_tail(writer, tok, tally, val_fraction)
        if min(writer.tokens.values()) < 2:
            raise UserError(f'too little text: {writer.tokens["train"]:,} tokens to train on and '
                            f'{writer.tokens["val"]:,} for validation, expected at least 2 of each; give more text or '
                            f'another --val_fraction')
        made = report(tok, tally, writer.tokens)
        writer.finish({**(source or {}), 'sha256': tally.digest},
                      *([counts[split] for split in SPLITS] for counts in (tally.bytes, tally.characters)), report=made)
        return tok, made
    finally:
        writer.close()


def vocabulary_texts(corpus, copies, share, seed):
    """The texts of which a vocabulary is made."""
    yield from sample(kept(corpus.all('reading the vocabulary'), copies), share, seed)
    if len(corpus.files) > 1 or kind_of(corpus.files[0]) in ('.jsonl', '.parquet'):
        yield '\n'   # which may have to part the documents


def check_room(folder, corpus, tok, writer, i):
    """UserError unless the disk has room for the ids, judged by the beginnings of some files from file i on."""
    texts, length, ahead = [], 0, 1 if corpus.fetch else 100   # files
    for piece in (piece for k in range(i, len(corpus.files))[:ahead] for piece in corpus.pieces(k)):
        texts.append(piece.text)
        length += len(piece.text)
        if length > PIECE // 4:
            break
    size, n = len(''.join(texts).encode()), sum(len(tok.encode_texts([text])) for text in texts if text)
    width = tokenizer.id_type(tok.vocab_size).itemsize
    needed = (estimate(corpus) * n / max(size, 1) - sum(writer.tokens.values())) * width
    if corpus.fetch:
        needed += max(corpus.sizes)   # of the one that is downloaded while another, which is there, is read
    free = shutil.disk_usage(folder).free
    if needed > free:
        needed, free = (f'{n / 1e9:,.1f} GB' if n >= 1e9 else f'{n / 1e6:,.1f} MB' for n in (needed, free))
        raise UserError(f'{folder}: about {needed} are needed and {free} are free: make room, or choose a folder on '
                        f'another disk with --name=PATH')


def write_documents(corpus, pipeline, tally, copies, val_fraction, seed, save_bytes, given):
    """Read on from where the tally is to the end, and write."""
    since = 0   # bytes of text since the last commit
    if corpus.release and tally.file:
        corpus.release(tally.file - 1)   # a killed process may not have come to that

    def commit():
        pipeline.drain()
        pipeline.writer.commit(vars(tally))

    with progress('tokenizing', sum(corpus.sizes), sum(corpus.sizes[:tally.file])) as bar:
        while tally.file < len(corpus.files):
            name, skip, document, seen = str(corpus.files[tally.file]), tally.document, None, tally.piece
            for piece in corpus.pieces(tally.file, bar):
                if skip:   # before the interruption
                    skip -= piece.last
                    continue
                content = piece.text.encode()
                if document is None:
                    copy = copies is not None and bool(copies[tally.number])
                    document = Document(content, seed, val_fraction, copy, given)
                else:
                    document.hash.update(content)
                document.size += len(content)
                document.length += len(piece.text)
                if seen:   # written before the interruption
                    seen -= 1
                    continue
                tally.piece += 1
                if document.size and not document.copy:
                    pipeline.add(document.split, piece.text, piece.last)
                    since += len(content)
                if piece.last:
                    tally.enter(document, piece, name)
                    document = None
                if since >= save_bytes and not pipeline.held:
                    commit()
                    since = 0
            tally.file, tally.document = tally.file + 1, 0
            if corpus.release:   # a shard is done with
                commit()
                corpus.release(tally.file - 1)
        pipeline.drain()


def cut_tail(writer, tok, tally, val_fraction):
    """Make the end of the only document validation."""
    end = writer.tokens['train']
    start = at = int(end * (1 - val_fraction))
    size, length = 0, 0
    while at < end:
        ids = writer.read('train', at)
        writer.append('val', ids)
        more = tokenizer.text_size(tok, ids)
        size, length, at = size + more[0], length + more[1], at + len(ids)
    writer.cut('train', start)
    tally.bytes = {'train': tally.bytes['train'] - size, 'val': size}
    tally.characters = {'train': tally.characters['train'] - length, 'val': length}
    tally.tail = True
    writer.commit(vars(tally))


# ---------------------------------------------------------------------------------------------------------------------
# what came out

def report(tok, tally, tokens):
    """What there is to know of a dataset, for people and for meta.json."""
    return {'documents': tally.documents, 'bytes': tally.bytes, 'characters': tally.characters, 'tokens': dict(tokens),
            'bytes_per_token': sum(tally.bytes.values()) / sum(tokens.values()),
            'duplicates': tally.duplicates, 'empty': tally.empty, 'left_out': tally.left_out, 'mended': tally.mended,
            'faults': tally.faults, 'longest': {'bytes': tally.longest[0], 'file': tally.longest[1]},
            'validation': 'the end of the only document' if tally.tail else 'documents, by their hash',
            'snippets': [text for _, text in tally.snippets]}


def report_lines(made, tok):
    """A report as lines of text."""
    for split in SPLITS:
        yield (f'{split}: {made["documents"][split]:,} documents, {made["bytes"][split]:,} bytes, '
               f'{made["characters"][split]:,} characters, {made["tokens"][split]:,} tokens')
    yield (f'vocabulary of {tok.vocab_size:,}, {made["bytes_per_token"]:.3f} bytes per token; longest document '
           f'{made["longest"]["bytes"]:,} bytes, in {made["longest"]["file"]}; validation is {made["validation"]}')
    yield (f'left out: {made["duplicates"]:,} duplicates, {made["empty"]:,} empty, {made["left_out"]:,} unreadable; '
           f'mended: {made["mended"]:,}')
    yield from (f'  {fault}' for fault in made['faults'])
    yield 'snippets:'
    yield from (f'  {text!r}' for text in made['snippets'])


def compare(corpus, toks, n_bytes=20_000_000, seed=0):
    """{name: bytes per token} for {name: tokenizer} on the same even sample of a corpus."""
    size, tokens = 0, dict.fromkeys(toks, 0)
    for text in sample(corpus.all('comparing'), n_bytes / max(estimate(corpus), 1), seed):
        size += len(text.encode())
        for name, tok in toks.items():
            tokens[name] += len(tok.encode_texts([text], end=False))
    return {name: size / n for name, n in tokens.items() if n}


def rate(corpus, tok, n_bytes=20_000_000):
    """Bytes per second at which one thread encodes the beginning of a corpus, piece by piece."""
    texts, size = [], 0
    for piece in corpus.all('measuring'):
        texts.append(piece.text)
        size += len(piece.text.encode())
        if size > n_bytes:
            break
    t0 = time.perf_counter()
    for text in texts:
        tok.encode_texts([text])
    return size / (time.perf_counter() - t0)


# ---------------------------------------------------------------------------------------------------------------------
# shards that lie on the hub

class Shards:
    """Files of the hub, as download.hub_files lists them, one of which is read while the next one is on its way."""

    def __init__(self, folder, files):
        self.folder, self.files, self.threads, self.errors = Path(folder), files, {}, {}

    def path(self, i):
        """Where file i lies: under a name that its content has a part in, so that no other file is taken for it."""
        file = self.files[i]
        name = f'{file["path"]} {file["sha256"] or file["url"]}'
        return self.folder / f'shard-{hashlib.sha256(name.encode()).hexdigest()[:16]}.parquet'

    def start(self, i):
        """Have file i downloaded in the background, unless it is there."""
        def get():
            try:
                if not self.path(i).exists():
                    file = self.files[i]
                    download(file['url'], self.path(i), file['sha256'], PATIENT, size=file['size'], headers=hub()[1])
            except BaseException as error:
                self.errors[i] = error

        if i < len(self.files) and i not in self.threads:
            self.threads[i] = threading.Thread(target=get, daemon=True)   # whoever stops does not wait for it
            self.threads[i].start()

    def fetch(self, i):
        """The path of file i, when it is there."""
        if not self.threads:   # what a process that was killed may have left, of this or of another dataset
            wanted = [self.path(k).name for k in range(i, len(self.files))]
            for left in self.folder.glob('shard-*.parquet*'):
                if not left.name.startswith(tuple(wanted)):
                    left.unlink()
        self.start(i)
        self.threads[i].join()
        if i in self.errors:
            raise self.errors[i]
        self.start(i + 1)
        return self.path(i)

    def release(self, i):
        """Remove file i."""
        self.path(i).unlink(missing_ok=True)
        self.threads.pop(i, None)


def build_from_hub(folder, repo, path, revision, shards, column, spec, **options):
    """build() out of the .parquet files in a folder of a dataset of the hub, the first so many of them, None: all."""
    files = hub_files(repo, path, revision)[:shards]
    there = Shards(folder, files)
    corpus = Corpus([file['path'] for file in files], column=column, errors='replace', fetch=there.fetch,
                    release=there.release, sizes=[file['size'] for file in files],
                    versions=[file['sha256'] or file['url'] for file in files])
    source = {'repo': repo, 'path': path, 'revision': revision, 'files': len(files)}
    return build(folder, corpus, spec, source=source, **options)
