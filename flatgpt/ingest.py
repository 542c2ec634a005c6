"""
Documents to a dataset of any size, encoded on all cores and written piece by piece.

The bytes depend neither on the number of cores nor on interruptions: a killed process continues at its last commit.
A document belongs to training or to validation as a whole, by the hash of its first piece.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from flatgpt import hub, tokenizer
from flatgpt.corpus import PIECE, Corpus, progress
from flatgpt.dataset import SPLITS, open_writer
from flatgpt.errors import UsageError, UserError

FORMAT = 3   # of the state
# Thai, Lao, Burmese, Khmer, Japanese, Chinese: no spaces between words. A vocabulary is trained on the texts between
# spaces, most of which occur only once there: a character needs about a hundred times as much memory.
UNSPACED = re.compile('[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
                      '\U00020000-\U0003ffff]')
UNSPACED_WEIGHT = 100
AHEAD = 16   # batches per thread that are read before they are written


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
    max_file_gb: float = 4.0

    def __post_init__(self):
        if abs(self.seed) >= 2**63:
            raise UsageError(f'seed={self.seed}: expected less than 2^63')
        if not 0 < self.val_fraction < 1:
            raise UsageError(f'val_fraction={self.val_fraction}: expected more than 0 and less than 1')
        for name in ('min_frequency', 'train_mb', 'threads', 'save_mb', 'max_file_gb'):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**31:
                raise UsageError(f'{name}={value}: expected more than 0 and less than 2^31')


@dataclass
class State:
    """How far a dataset has come, as plain data with which another process can continue."""
    file: int = 0                     # number of the current file
    pieces: int = 0                   # of the current file that are written
    validation: float | None = None   # the random number of the validation documents; None: all below val_fraction
    lowest: list = field(default_factory=list)   # the two lowest random numbers, with the bytes of their documents
    report: dict = field(default_factory=lambda: {
        'documents': dict.fromkeys(SPLITS, 0), 'bytes': dict.fromkeys(SPLITS, 0),
        'characters': dict.fromkeys(SPLITS, 0), 'empty': 0, 'left_out': 0, 'repaired': 0, 'faults': [],
        'longest': {'characters': 0, 'file': ''}, 'validation': 'documents, by their hash'})

    def add(self, piece, split, random, file):
        """Count a piece of a document, which belongs to a split, drew a random number and comes from a file."""
        report = self.report
        self.pieces += 1
        if piece.fault:
            report['faults'] = [*report['faults'], piece.fault][:10]
        if piece.start == 0 and not piece.text:
            report['left_out' if piece.fault else 'empty'] += 1
            return
        n_bytes = len(piece.text.encode())
        end = piece.start + len(piece.text)
        report['bytes'][split] += n_bytes
        report['characters'][split] += len(piece.text)
        report['documents'][split] += int(piece.last)
        report['repaired'] += int(piece.fault != '')
        if end > report['longest']['characters']:
            report['longest'] = {'characters': end, 'file': file}
        lowest = dict(self.lowest)
        lowest[random] = lowest.get(random, 0) + n_bytes
        self.lowest = sorted(lowest.items())[:2]


def build(folder, corpus: Corpus, options: Options, source: dict | None = None) -> tuple:
    """Write a dataset of all documents of a corpus, or continue to. Returns (tokenizer, report); the report is in
    meta.json too. source: {key: value} for meta.json, where the documents came from."""
    made = options.tokenizer == 'char' or tokenizer.trained_size(options.tokenizer) is not None
    tok = None if made else tokenizer.make(options.tokenizer)   # before anything is read: a typo is found at once
    same = {**asdict(options), 'threads': None, 'save_mb': None}   # these two do not change the bytes
    key = json.dumps([FORMAT, same, tok and tok.to_dict(), [str(file) for file in corpus.files], corpus.sizes,
                      corpus.versions, corpus.field, corpus.column, corpus.errors])
    key = hashlib.sha256(key.encode()).hexdigest()
    with open_writer(folder, key, int(options.max_file_gb * 1e9)) as writer:
        if options.deduplicate:
            corpus.duplicates = find_duplicates(corpus)
        if writer.state is None:
            writer.begin(tok or make_tokenizer(corpus, options))
            state = State(validation=-1 if corpus.is_one_text() else None)
            writer.commit(vars(state))
        else:
            state = State(**writer.state)
            print(f'{folder} is unfinished, with {sum(writer.num_tokens.values()):,} tokens: continuing',
                  file=sys.stderr)
        write_documents(corpus, writer, state, options)
        if state.validation is None and not all(state.report['documents'].values()):
            state = State(validation=choose_validation(state))   # once more
            writer.rewind(dict.fromkeys(SPLITS, 0), vars(state))
            write_documents(corpus, writer, state, options)
        report = state.report
        if sum(report['documents'].values()) == 1 and not writer.num_tokens['val']:
            move_end_to_validation(writer, state, options.val_fraction)
        if min(writer.num_tokens.values()) < 2:
            raise UserError(f'too little text: {writer.num_tokens["train"]:,} tokens to train on and '
                            f'{writer.num_tokens["val"]:,} for validation, expected at least 2 of each; '
                            f'{report["empty"]:,} documents are empty, {report["left_out"]:,} unreadable; give more '
                            f'text or another --val_fraction')
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
    """A tokenizer of all characters of the documents, or one trained on as much text as takes the memory of train_mb of
    English."""
    start = time.perf_counter()
    share = 1
    if options.tokenizer != 'char':
        weight = sum(len(piece.text) + UNSPACED_WEIGHT * len(UNSPACED.findall(piece.text))
                     for piece in corpus.all('measuring the text'))
        share = options.train_mb * 1e6 / max(weight, 1)
    texts = sample(corpus, share, options.seed, 'reading the vocabulary')
    separator = [] if corpus.is_one_text() else ['\n']   # between documents, if there is no end-of-text token
    tok = tokenizer.make(options.tokenizer, itertools.chain(texts, separator), options.min_frequency, options.special)
    if options.tokenizer != 'char':
        print(f'{tok.vocab_size:,} tokens trained on {min(share, 1):.1%} of the text in '
              f'{time.perf_counter() - start:.1f} s', file=sys.stderr)
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
    tok.encode_texts([''])   # the first call sets up what the threads share
    saved = 0                  # characters
    released = state.file

    def encode(batch):
        texts, complete = batch
        return {split: tok.encode_texts(texts[split], complete) for split in SPLITS if texts[split]}

    with progress('encoding', corpus.sizes, state.file) as bar, ThreadPoolExecutor(threads) as pool:
        batches = read_batches(corpus, tok, state, options, bar)
        for batch in batches:
            for ids in pool.map(encode, itertools.chain([batch], itertools.islice(batches, AHEAD * threads))):
                for split in ids:
                    writer.append(split, ids[split])
            characters = sum(state.report['characters'].values())   # all of which are written now
            if characters - saved >= options.save_mb * 1e6 or (corpus.release and state.file > released):
                writer.commit(vars(state))
                saved = characters
                check_disk_space(writer, (sum(corpus.sizes[:state.file]) + corpus.position) / sum(corpus.sizes))
                while corpus.release and released < state.file:
                    corpus.release(released)
                    released += 1
    writer.commit(vars(state))


def check_disk_space(writer, fraction):
    """UserError if the disk has no room for the rest of the ids, when this fraction of the corpus is written."""
    written = sum(writer.num_tokens.values()) * writer.dtype.itemsize
    needed = written / fraction - written
    free = shutil.disk_usage(writer.folder).free
    if needed > free:
        raise UserError(f'{writer.folder}: about {needed / 1e6:,.1f} MB more are needed and {free / 1e6:,.1f} MB are '
                        f'free: make room and run the same command again, or choose another disk with --name=PATH')


def read_batches(corpus, tok, state, options, bar) -> Iterator[tuple]:
    """({split: texts}, whether their documents are complete) for texts that are encoded together: whole documents of at
    most PIECE characters, or a piece of a longer one. Advances the state up to the last batch."""
    batch = {of: [] for of in SPLITS}
    length = 0
    for i in range(state.file, len(corpus.files)):
        written = state.pieces   # before an interruption
        for number, piece in enumerate(corpus.pieces(i, bar), 1):
            if piece.start == 0:
                random = uniform(hashlib.sha256(piece.text.encode()).digest(), options.seed, 'split')
                is_val = random < options.val_fraction if state.validation is None else random == state.validation
                split = 'val' if is_val else 'train'
                texts = []
            if number <= written:
                continue
            if piece.start == 0:
                if length and (not piece.last or length + len(piece.text) > PIECE):
                    yield batch, True
                    batch = {of: [] for of in SPLITS}
                    length = 0
                if tok.eot is None and piece.text and state.report['documents'][split]:
                    texts.append('\n')   # after the document before it
            state.add(piece, split, random, str(corpus.files[i]))
            texts.append(piece.text)
            if piece.text and (piece.last or tok.cuttable):
                batch[split].append(''.join(texts))
                length += len(piece.text)
                texts = []
                if piece.start > 0 or not piece.last:
                    yield batch, piece.last
                    batch = {of: [] for of in SPLITS}
                    length = 0
        state.file = i + 1
        state.pieces = 0
    if length:
        yield batch, True


def choose_validation(state) -> float:
    """The random number of the documents for validation, if val_fraction leaves one split empty: of the two lowest, the
    first whose documents are at most half of the text; -1 if there is one document."""
    n = sum(state.report['documents'].values())
    if n > 1 and len(state.lowest) == 1:
        raise UserError(f'all {n:,} documents are equal: give more text, or --deduplicate to use the end of the only '
                        f'document for validation')
    half = sum(state.report['bytes'].values()) / 2
    return next((random for random, size in state.lowest if size <= half), -1)


def move_end_to_validation(writer, state, val_fraction):
    """Make the last ids of the only document the validation split."""
    end = writer.num_tokens['train']
    start = position = int(end * (1 - val_fraction))
    while position < end:
        ids = writer.read('train', position)
        writer.append('val', ids)
        position += len(ids)
        for unit, n in zip(('bytes', 'characters'), tokenizer.text_size(writer.tok, ids)):
            state.report[unit]['train'] -= n
            state.report[unit]['val'] += n
    state.report['validation'] = 'the end of the only document'
    writer.rewind({'train': start}, vars(state))


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
        yield (f'{split}: {report["documents"][split]:,} documents, {report["bytes"][split]:,} bytes, '
               f'{report["characters"][split]:,} characters, {report["tokens"][split]:,} tokens')
    yield (f'vocabulary of {tok.vocab_size:,}, {report["bytes_per_token"]:.3f} bytes per token; longest document '
           f'{report["longest"]["characters"]:,} characters, in {report["longest"]["file"]}; validation is '
           f'{report["validation"]}')
    yield (f'left out: {report["duplicates"]:,} duplicates, {report["empty"]:,} empty, {report["left_out"]:,} '
           f'unreadable; repaired: {report["repaired"]:,}')
    yield from (f'  {fault}' for fault in report['faults'])
    yield 'snippets:'
    yield from (f'  {text!r}' for text in report['snippets'])


# ---------------------------------------------------------------------------------------------------------------------
# corpora of the Hugging Face hub

class Shards:
    """Files of a dataset on the hub, see hub.dataset_files(): one is read while the next one is downloaded."""

    def __init__(self, folder: Path, repo: str, revision: str, files: list[dict]):
        self.folder = folder
        self.repo = repo
        self.revision = revision
        self.files = files
        self.futures = {}
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, i: int) -> Path:
        """The path of file i, which is downloaded then; the download of the next one is started."""
        for k in range(i, min(i + 2, len(self.files))):
            if k not in self.futures:
                self.futures[k] = Future()
                threading.Thread(target=self.download, args=(k,), daemon=True).start()   # ends with the process
            self.futures[i].result()
        return self.folder / self.files[i]['path']

    def download(self, i):
        try:
            hub.dataset_file(self.repo, self.revision, self.files[i], self.folder)
            self.futures[i].set_result(None)
        except BaseException as error:   # for the thread that asks for the result
            self.futures[i].set_exception(error)

    def release(self, i: int):
        """Remove file i."""
        (self.folder / self.files[i]['path']).unlink(missing_ok=True)
        self.futures.pop(i, None)


def build_from_hub(folder, config: dict):
    """Write the dataset that the options of data/openwebtext/prepare.py describe, and print its report. Its files are
    downloaded one after another and removed when they are written."""
    shards = config['shards']
    if shards is not None and shards < 1:
        raise UsageError(f'shards={shards}: expected more than 0')
    spec = config['tokenizer']
    if spec == 'char' or spec.startswith('bpe:'):
        raise UsageError(f'tokenizer={spec!r} is made of the text, which would be downloaded twice; make it of a part '
                         f'with data/text/prepare.py, and give the path of its tokenizer.json')
    names = ('tokenizer', 'val_fraction', 'seed', 'threads', 'save_mb', 'max_file_gb')
    options = Options(**{name: config[name] for name in names})
    folder = Path(config['name'] or folder)
    files = hub.dataset_files(config['repo'], config['path'], config['revision'])[:shards]
    stored = Shards(folder / 'shards', config['repo'], config['revision'], files)
    corpus = Corpus([file['path'] for file in files], column=config['column'], errors='replace', fetch=stored.fetch,
                    release=stored.release, sizes=[file['size'] for file in files],
                    versions=[file['sha256'] for file in files])
    source = {name: config[name] for name in ('repo', 'path', 'revision')}
    tok, report = build(folder, corpus, options, {**source, 'files': len(files)})
    shutil.rmtree(stored.folder)   # with what other runs have left
    print(f'{folder}:', *report_lines(report, tok), sep='\n')
