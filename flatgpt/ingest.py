"""
Documents to a dataset of any size, encoded on all cores and written piece by piece.

The bytes depend neither on the number of cores nor on interruptions: a killed process continues at its last commit.
A document belongs to training or to validation as a whole, by the hash of its first piece. Of few documents, the end of
the whole text is for validation.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from flatgpt import checkpoint, encodings, hub, tokenizer
from flatgpt.corpus import PIECE, Corpus, progress
from flatgpt.dataset import SPLITS, open_writer
from flatgpt.errors import UsageError, UserError

FORMAT = 6   # of the state
AHEAD = 16   # batches per thread that are read before they are written
FEW = 10     # documents: if validation may get fewer, it is the end of the text
# Characters of Thai, Lao, Burmese, Khmer, Japanese and Chinese, which have no spaces between words: training a
# vocabulary needs a hundred times as much memory for them, because the texts between spaces occur only once.
UNSPACED = re.compile('[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]')


@dataclass
class Options:
    """How to make a dataset: the options of data/text/prepare.py, which explains them, by their names."""
    tokenizer: str = 'gpt2'
    val_fraction: float = 0.1
    seed: int = 1337
    deduplicate: bool = False
    min_frequency: int = 2
    special: tuple = ()
    train_mb: float = 100.0
    threads: int | None = None
    save_mb: float = 64.0

    def __post_init__(self):
        if abs(self.seed) >= 2**63:
            raise UsageError(f'seed={self.seed}: expected less than 2^63')
        if not 0 < self.val_fraction < 1:
            raise UsageError(f'val_fraction={self.val_fraction}: expected more than 0 and less than 1')
        for name in ('min_frequency', 'train_mb', 'threads', 'save_mb'):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**31:
                raise UsageError(f'{name}={value}: expected more than 0 and less than 2^31')


@dataclass
class State:
    """How far a dataset has come, as plain data with which another process can continue."""
    by_hash: bool           # whether documents are drawn for validation; else the end of the text will be
    file: int = 0           # number of the current file
    pieces: int = 0         # of the current file that are written
    report: dict = field(default_factory=lambda: {
        'documents': dict.fromkeys(SPLITS, 0), 'bytes': dict.fromkeys(SPLITS, 0),
        'characters': dict.fromkeys(SPLITS, 0), 'empty': 0, 'left_out': 0, 'repaired': 0, 'unknown': 0, 'faults': [],
        'validation': 'documents, by their hash'})

    def add(self, piece, split):
        """Count a piece of a document, which belongs to a split."""
        report = self.report
        self.pieces += 1
        if piece.fault:
            report['faults'] = [*report['faults'], piece.fault][:10]
        if piece.start == 0 and not piece.text:
            report['left_out' if piece.fault else 'empty'] += 1
            return
        report['bytes'][split] += len(piece.text.encode())
        report['characters'][split] += len(piece.text)
        if piece.last:
            report['documents'][split] += 1
        if piece.fault:
            report['repaired'] += 1


def build(folder, corpus: Corpus, options: Options, source: dict | None = None) -> tuple:
    """Write a dataset of all documents of a corpus, or continue to. Returns (tokenizer, report); the report is in
    meta.json too. source: {key: value} for meta.json, where the documents came from."""
    made = options.tokenizer == 'char' or encodings.trained_size(options.tokenizer) is not None
    tok = None if made else checkpoint.load_tokenizer(options.tokenizer)   # before anything is read: a typo is found
    same = {**asdict(options), 'threads': None, 'save_mb': None}   # these two do not change the bytes
    key = json.dumps([FORMAT, same, tok and tok.to_dict(), [str(file) for file in corpus.files], corpus.versions,
                      corpus.field, corpus.column, corpus.errors, corpus.template, corpus.separator])
    with open_writer(folder, hashlib.sha256(key.encode()).hexdigest()) as writer:
        if options.deduplicate:
            corpus.duplicates = find_duplicates(corpus)
        if writer.state is None:
            many = corpus.fetch or corpus.has_documents(math.ceil(FEW / options.val_fraction))   # the hub's are large
            state = State(by_hash=bool(many))
            writer.begin(tok or make_tokenizer(corpus, options))
        else:
            state = State(**writer.state)
            print(f'{folder} is unfinished, with {sum(writer.num_tokens.values()):,} tokens: continuing',
                  file=sys.stderr)
        write_documents(corpus, writer, state, options)
        if not state.by_hash and not writer.num_tokens['val']:
            move_end_to_validation(writer, state, options.val_fraction)
        report = state.report
        if min(writer.num_tokens.values()) < 2:
            raise UserError(f'too little text: {writer.num_tokens["train"]:,} tokens to train on and '
                            f'{writer.num_tokens["val"]:,} for validation, expected at least 2 of each; '
                            f'{report["empty"]:,} documents are empty, {report["left_out"]:,} unreadable; give more '
                            f'text or another --val_fraction')
        share = writer.num_tokens['val'] / sum(writer.num_tokens.values())
        if state.by_hash and not options.val_fraction / 2 <= share <= options.val_fraction * 2:
            print(f'{share:.1%} of the tokens are for validation instead of {options.val_fraction:.1%}, because '
                  f'documents differ in length: another --seed draws others', file=sys.stderr)
        writer.commit(vars(state))
        report |= {'tokens': writer.num_tokens, 'snippets': snippets(writer),
                   'bytes_per_token': sum(report['bytes'].values()) / sum(writer.num_tokens.values()),
                   'duplicates': sum(int(found.sum()) for found in corpus.duplicates or [])}
        writer.finish(source or {}, report['bytes'], report['characters'], report=report)
        return writer.tok, report


# ---------------------------------------------------------------------------------------------------------------------
# before writing: what is read of all documents

def find_duplicates(corpus: Corpus) -> list[np.ndarray]:
    """For each file booleans, one per document: whether it has text and equals an earlier document."""
    digests = bytearray()   # 8 bytes per document
    ends = []               # number of documents up to the end of each file
    digest = hashlib.blake2b(digest_size=8)
    empty = np.frombuffer(digest.digest(), np.uint64)
    with progress('looking for duplicates', corpus.sizes) as bar:
        for i in range(len(corpus.files)):
            for piece in corpus.pieces(i, bar):
                digest.update(piece.text.encode())
                if piece.last:
                    digests += digest.digest()
                    digest = hashlib.blake2b(digest_size=8)
            ends.append(len(digests) // 8)
    numbers = np.frombuffer(digests, np.uint64)
    repeated = np.ones(len(numbers), bool)
    repeated[np.unique(numbers, return_index=True)[1]] = False
    return np.split(repeated & (numbers != empty), ends[:-1])


def make_tokenizer(corpus: Corpus, options: Options):
    """A tokenizer of all characters of the documents, or one trained on at most train_mb of them, in which a character
    without spaces around counts as a hundred."""
    if options.tokenizer == 'char':
        texts = (piece.text for piece in corpus.all('reading the vocabulary'))
        return tokenizer.load('char', itertools.chain(texts, ['\n']))   # which is between documents
    start = time.perf_counter()
    size = sum(len(piece.text) + 100 * len(UNSPACED.findall(piece.text)) for piece in corpus.all('measuring the text'))
    share = options.train_mb * 1e6 / max(size, 1)
    texts = sample(corpus, share, options.seed, 'reading the vocabulary')
    tok = tokenizer.load(options.tokenizer, texts, options.min_frequency, options.special)
    asked = encodings.trained_size(options.tokenizer)
    fewer = f'; the text is too short for {asked:,}' if tok.vocab_size < asked else ''
    print(f'{tok.vocab_size:,} tokens trained on {min(share, 1):.1%} of the text in '
          f'{time.perf_counter() - start:.1f} s{fewer}', file=sys.stderr)
    return tok


def sample(corpus: Corpus, share: float, seed: int, title: str) -> Iterator[str]:
    """The texts of an even share of the pieces of a corpus."""
    for piece in corpus.all(title):
        if piece.text and (share >= 1 or uniform(piece.text.encode()[:4096], seed, 'sample') < share):
            yield piece.text


def uniform(content: bytes, seed: int, purpose: str) -> float:
    """A random number in [0, 1) that is a function of its arguments."""
    digest = hashlib.blake2b(content, digest_size=8, key=f'{seed} {purpose}'.encode()).digest()
    return int.from_bytes(digest, 'big') / 2**64


# ---------------------------------------------------------------------------------------------------------------------
# encoding and writing

def write_documents(corpus, writer, state, options):
    """Write the documents that come after a state, and advance the state to the end of the corpus."""
    threads = options.threads or (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    tok = writer.tok
    tok.encode_texts([''], begin=False)   # the first call sets up what the threads share
    corpus.border = tok.border
    saved = 0   # characters

    def encode(batch):
        texts, first, last = batch
        return {split: tok.encode_texts(texts[split], end=last, begin=first) for split in texts}

    with progress('encoding', corpus.sizes, state.file) as bar, ThreadPoolExecutor(threads) as pool:
        batches = read_batches(corpus, tok, state, options, bar)
        for batch in batches:
            for ids in pool.map(encode, itertools.chain([batch], itertools.islice(batches, AHEAD * threads))):
                for split in ids:
                    writer.append(split, ids[split])
            characters = sum(state.report['characters'].values())   # all of which are written now
            if characters - saved >= options.save_mb * 1e6:
                writer.commit(vars(state))
                saved = characters
                check_disk_space(writer, (sum(corpus.sizes[:state.file]) + corpus.position) / sum(corpus.sizes))


def check_disk_space(writer, fraction):
    """UserError if the disk has no room for the rest of the ids, when this fraction of the corpus is written."""
    written = sum(writer.num_tokens.values()) * writer.dtype.itemsize
    needed = written / fraction - written
    free = shutil.disk_usage(writer.folder).free
    if needed > free:
        raise UserError(f'{writer.folder}: about {needed / 1e6:,.1f} MB more are needed and {free / 1e6:,.1f} MB are '
                        f'free: make room and run the same command again, or choose another disk with --name=PATH')


def read_batches(corpus, tok, state, options, bar) -> Iterator[tuple]:
    """({split: texts}, whether documents begin with them, whether they end) for texts that are encoded together: whole
    documents of at most PIECE characters, or a piece of a longer one. Advances the state up to the last batch."""
    batch = {}
    length = 0
    for i in range(state.file, len(corpus.files)):
        written = state.pieces   # before an interruption
        for number, piece in enumerate(corpus.pieces(i, bar), 1):
            if piece.start == 0:
                split = split_of(piece.text, state, options)
            if number <= written:
                continue
            is_document = piece.start == 0 and piece.last
            if batch and not (is_document and length + len(piece.text) <= PIECE):
                yield batch, True, True
                batch = {}
                length = 0
            if options.tokenizer != 'char':
                piece = without_unknown(piece, tok, state, corpus, i)
            follows = tok.eot is None and piece.start == 0 and state.report['documents'][split] > 0
            state.add(piece, split)
            text = '\n' + piece.text if follows else piece.text
            if not is_document:
                yield {split: [text]}, piece.start == 0, piece.last
            elif piece.text:
                batch.setdefault(split, []).append(text)
                length += len(text)
        state.file = i + 1
        state.pieces = 0
    if batch:
        yield batch, True, True


def without_unknown(piece, tok, state, corpus, i):
    """A piece without the characters that its tokenizer lacks, which are counted; UserError if errors are strict."""
    unknown = tok.unknown(piece.text)
    if not unknown:
        return piece
    if corpus.errors == 'strict':
        raise UserError(f'{corpus.files[i]} has {len(unknown):,} characters that the tokenizer lacks, such as '
                        f'{"".join(unknown[:20])!r}; give another tokenizer, or --errors=skip to leave them out')
    text = piece.text.translate(dict.fromkeys(map(ord, unknown)))
    state.report['unknown'] += len(piece.text) - len(text)
    return piece._replace(text=text)


def split_of(text, state, options) -> str:
    """The split of a document, by its first piece."""
    number = uniform(hashlib.sha256(text.encode()).digest(), options.seed, 'split')
    return 'val' if state.by_hash and number < options.val_fraction else 'train'


def move_end_to_validation(writer, state, val_fraction):
    """Make the last ids of the training split, in which all documents are, the validation split."""
    end = writer.num_tokens['train']
    start = position = int(end * (1 - val_fraction))
    while position < end:
        ids = writer.read('train', position)
        writer.append('val', ids)
        position += len(ids)
        for unit, n in zip(('characters', 'bytes'), writer.tok.count(ids)):
            state.report[unit]['train'] -= n
            state.report[unit]['val'] += n
    state.report['validation'] = 'the end of the text'
    writer.num_tokens['train'] = start


# ---------------------------------------------------------------------------------------------------------------------
# the report

def snippets(writer) -> list[str]:
    """Ten short texts, decoded from the ids at even distances in both splits."""
    texts = []
    for split in SPLITS:
        for start in np.linspace(0, writer.num_tokens[split], 5, endpoint=False).astype(int).tolist():
            texts.append(writer.tok.decode(writer.read(split, start, 40)).strip('\ufffd')[:80])
    return texts


def report_lines(report: dict, tok) -> Iterator[str]:
    """A report as lines of text."""
    for split in SPLITS:
        n = report['documents'][split]
        documents = f'{n:,} document{"s" if n > 1 else ""}, ' if n else ''
        yield (f'{split}: {documents}{report["bytes"][split]:,} bytes, {report["characters"][split]:,} characters, '
               f'{report["tokens"][split]:,} tokens')
    yield (f'vocabulary of {tok.vocab_size:,}, {report["bytes_per_token"]:.3f} bytes per token; validation is '
           f'{report["validation"]}')
    yield (f'left out: {report["duplicates"]:,} duplicates, {report["empty"]:,} empty, {report["left_out"]:,} '
           f'unreadable, {report["unknown"]:,} characters that the tokenizer lacks; repaired: {report["repaired"]:,}')
    yield from (f'  {fault}' for fault in report['faults'])
    yield 'snippets:'
    yield from (f'  {text!r}' for text in report['snippets'])


# ---------------------------------------------------------------------------------------------------------------------
# corpora of the Hugging Face hub

def fetcher(folder: Path, repo: str, revision: str, files: list[dict]):
    """A function from the number of a file, see hub.dataset_files(), to its path in a folder: the file is downloaded
    then, the next one while it is read, and the one before the last is removed."""

    def get_ahead(i):
        with contextlib.suppress(UserError):   # which is raised when the file is needed
            hub.dataset_file(repo, revision, files[i], folder)

    ahead = None   # the thread of get_ahead(), which ends with the process

    def fetch(i):
        nonlocal ahead
        if ahead:
            ahead.join()
        path = hub.dataset_file(repo, revision, files[i], folder)
        if i > 1:   # the last one may have to be read again
            (folder / files[i - 2]['path']).unlink(missing_ok=True)
        if i + 1 < len(files):
            ahead = threading.Thread(target=get_ahead, args=(i + 1,), daemon=True)
            ahead.start()
        return path

    return fetch


def build_from_hub(folder, config: dict):
    """Write the dataset that the options of data/openwebtext/prepare.py describe, and print its report. Its files are
    downloaded one after another and removed when they are written."""
    if config['shards'] is not None and config['shards'] < 1:
        raise UsageError(f'shards={config["shards"]}: expected more than 0')
    spec = config['tokenizer']
    if spec == 'char' or spec.startswith('bpe:'):
        raise UsageError(f'tokenizer={spec!r} is made of the text, which would be downloaded twice; make it of a part '
                         f'with data/text/prepare.py, and give the path of its tokenizer.json')
    names = ('tokenizer', 'val_fraction', 'seed', 'threads', 'save_mb')
    options = Options(**{name: config[name] for name in names})
    folder = Path(config['name'] or folder)
    shards = folder / 'shards'
    files = hub.dataset_files(config['repo'], config['path'], config['revision'])[:config['shards']]
    corpus = Corpus([file['path'] for file in files], column=config['column'], errors='replace',
                    fetch=fetcher(shards, config['repo'], config['revision'], files),
                    versions=[(file['size'], file['sha256']) for file in files])
    source = {name: config[name] for name in ('repo', 'path', 'revision')}
    tok, report = build(folder, corpus, options, {**source, 'files': len(files)})
    shutil.rmtree(shards, ignore_errors=True)   # with what other runs have left
    print(f'{folder}:', *report_lines(report, tok), sep='\n')
