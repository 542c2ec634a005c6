"""
Token ids on disk, and batches of them.

A dataset is a folder: train.bin and val.bin hold ids, headerless and little-endian, and meta.json says all else: their
type and number, the vocabulary, the tokenizer, how much text they stand for and where it came from. A split that is too
large for one file lies in several, train-00000.bin and so on. nanoGPT's folders are read too. Batches are pure
functions of the seed and the step, so that neither the number of processes nor an interruption changes a run.
"""

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np

import tokenizer
from configurator import UserError

FORMAT = 1
SPLITS = ('train', 'val')
JOURNAL = 'resume.json'   # beside a dataset that is being made: how much of its files counts
MAX_BYTES = 2**32         # of a file of ids; what is more goes into the next one


# ---------------------------------------------------------------------------------------------------------------------
# writing

def write(folder, splits, tok, source, masks=None):
    """Make folder a dataset, replacing the one that was there: a reader finds the old one, the new one, or the note
    that it is unfinished; never a mixture.

    splits: {'train': ids, 'val': ids}, arrays of token ids. tok: their tokenizer. source: {key: value}, where the text
    came from. masks: if given, {'train': booleans, 'val': booleans}, whether each token is to be learnt as a target.
    Prints what was written.
    """
    writer = Writer(folder)
    try:
        writer.begin(tok)
        for split in SPLITS:
            writer.append(split, splits[split])
            if masks:
                writer.mask(split, masks[split])
        writer.finish(source, *zip(*(tokenizer.text_size(tok, splits[split]) for split in SPLITS)), mask=bool(masks))
    finally:
        writer.close()
    counts = ', '.join(f'{n:,} {split} tokens' for split, n in writer.tokens.items())
    print(f'{folder}: vocabulary of {tok.vocab_size:,}, {counts}')


class Writer:
    """A dataset that is appended to, and that a reader sees when it is finished and not before.

    key: what it is made of and how, as a text; a later Writer of the same folder and key goes on where commit() was
    last called, whatever has happened since, and one of another key begins anew. None: it always begins anew. The ids
    lie in *.bin.new until then. .tokens[split]: how many there are. .notes: those of the last commit(), None at the
    beginning. .tokenizer: the description given to begin(). .done: whether all that was left to do was to finish, and
    is done. Every failure of the disk is a UserError.
    """

    def __init__(self, folder, key=None, max_bytes=MAX_BYTES):
        self.folder, self.key, self.max_bytes, self.open = Path(folder), key, max_bytes, {}
        self.tokens, self.notes, self.tokenizer, self.done = dict.fromkeys(SPLITS, 0), None, None, False
        with Disk(self.folder):
            self.lock = hold(self.folder)
        try:
            journal = json.loads((self.folder / JOURNAL).read_bytes()) if key is not None else {}
        except (OSError, ValueError):   # there is none
            journal = {}
        if journal.get('key') == key is not None:
            self.tokens, self.tokenizer, self.notes = journal['tokens'], journal['tokenizer'], journal['notes']
            self.vocab_size = journal['vocab_size']
            self.dtype = tokenizer.id_type(self.vocab_size).newbyteorder('<')
            if journal['meta']:
                self.publish(journal['meta'])
                self.done = True
        else:
            with Disk(self.folder):
                (self.folder / JOURNAL).unlink(missing_ok=True)
                for path in self.unfinished():
                    path.unlink()

    def unfinished(self):
        return [path for split in SPLITS for path in self.folder.glob(f'{split}*.new')]

    def begin(self, tok):
        """Take the tokenizer of what is to be appended."""
        self.vocab_size, self.tokenizer = tok.vocab_size, tok.to_dict()
        self.dtype = tokenizer.id_type(tok.vocab_size).newbyteorder('<')

    def path(self, split, i):
        return self.folder / f'{split}-{i:05d}.bin.new'

    def per_file(self):
        return max(self.max_bytes // self.dtype.itemsize, 1)

    def append(self, split, ids):
        """Put an array of ids at the end of a split."""
        assert len(ids) == 0 or ids.max() < self.vocab_size
        ids = ids.astype(self.dtype, copy=False)
        with Disk(self.folder):
            while True:
                i, there = divmod(self.tokens[split], self.per_file())
                if self.open.get(split, (None,))[0] != i:
                    self.sync(split)
                    f = open(self.path(split, i), 'ab')
                    self.open[split] = i, f
                    f.truncate(there * self.dtype.itemsize)   # what a killed process wrote after its last commit
                room = self.per_file() - there
                self.open[split][1].write(ids[:room].data)
                self.tokens[split] += len(ids[:room])
                ids = ids[room:]
                if not len(ids):
                    return

    def mask(self, split, learnt):
        """Say of each id of a split, which is in one file, whether it is to be learnt as a target: booleans."""
        assert len(learnt) == self.tokens[split]
        with Disk(self.folder):
            replace(self.folder / f'{split}.mask.new', learnt.astype(np.uint8).tobytes())

    def sync(self, split):
        """What was appended to a split is on the disk, and no file of it open."""
        if split in self.open:
            _, f = self.open.pop(split)
            with f:
                f.flush()
                os.fsync(f.fileno())

    def commit(self, notes, meta=None):
        """From here a later Writer goes on, with these notes: {key: value}."""
        with Disk(self.folder):
            for split in SPLITS:
                self.sync(split)
            if self.key is not None:
                self.notes = notes
                journal = {'key': self.key, 'tokens': self.tokens, 'vocab_size': self.vocab_size, 'notes': notes,
                           'tokenizer': self.tokenizer, 'meta': meta}
                replace(self.folder / JOURNAL, json.dumps(journal).encode())

    def read(self, split, start):
        """The ids of a split from a place on, which must be committed; a piece of at most 2**20."""
        i, there = divmod(start, self.per_file())
        n = min(self.tokens[split] - start, self.per_file() - there, 2**20)
        with Disk(self.folder):
            return np.fromfile(self.path(split, i), self.dtype, n, offset=there * self.dtype.itemsize)

    def cut(self, split, n):
        """Forget what is past the first n ids of a split, from the next commit() on."""
        with Disk(self.folder):
            self.sync(split)
        self.tokens[split] = n

    def finish(self, source, n_bytes, n_characters, **more):
        """Let readers see it. source: {key: value}, where the text came from. n_bytes and n_characters of the text, for
        each split. more: what else is to stand in meta.json."""
        counts = {'tokens': self.tokens, 'bytes': dict(zip(SPLITS, n_bytes)),
                  'characters': dict(zip(SPLITS, n_characters))}
        meta = {'format': FORMAT, 'dtype': self.dtype.name, 'vocab_size': self.vocab_size, **counts, 'source': source,
                'tokenizer': self.tokenizer, **more}
        files = {split: self.files(split) for split in SPLITS}
        if any(len(sizes) > 1 for sizes in files.values()):
            meta['files'] = files
        for split in SPLITS:
            self.append(split, np.empty(0, self.dtype))   # which makes its last file, and ends it where it should
        self.commit(self.notes, meta)
        self.publish(meta)

    def files(self, split):
        """How many ids are in each file of a split."""
        whole, rest = divmod(self.tokens[split], self.per_file())
        return [self.per_file()] * whole + [rest] * (rest > 0 or whole == 0)

    def publish(self, meta):
        """Give the files their names; again, if a process was killed here."""
        with Disk(self.folder):
            replace(self.folder / 'meta.json', json.dumps({'format': FORMAT, 'unfinished': True}).encode())
            keep = set()
            for split in SPLITS:
                names = file_names(split, meta.get('files', {}).get(split))
                keep |= set(names)
                for i, name in enumerate(names):
                    if self.path(split, i).exists():
                        os.replace(self.path(split, i), self.folder / name)
                if meta.get('mask'):
                    keep.add(f'{split}.mask')
                    os.replace(self.folder / f'{split}.mask.new', self.folder / f'{split}.mask')
            numbered = [path for split in SPLITS for path in self.folder.glob(f'{split}-[0-9][0-9][0-9][0-9][0-9].bin')]
            whole = [self.folder / f'{split}.{kind}' for split in SPLITS for kind in ('bin', 'mask')]
            for path in [*numbered, *whole, *self.unfinished()]:   # of a dataset that was there, or past a cut
                if path.name not in keep:
                    path.unlink(missing_ok=True)
            (self.folder / 'tokenizer.json').unlink(missing_ok=True)
            if 'json' in meta['tokenizer']:
                replace(self.folder / 'tokenizer.json', meta['tokenizer']['json'].encode())
            replace(self.folder / 'meta.json', json.dumps(meta, indent=1).encode())
            (self.folder / JOURNAL).unlink(missing_ok=True)

    def close(self):
        """Let go of all files; without a key, of what was written and is not finished."""
        for _, f in self.open.values():
            try:
                f.close()
            except OSError:   # the disk is full, and it has been said
                pass
        self.open = {}
        if self.key is None:
            for path in self.unfinished():
                path.unlink(missing_ok=True)
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def hold(folder):
    """A folder, open and held for this process: UserError if another one holds it. None where there are no locks."""
    try:
        import fcntl
    except ImportError:   # Windows
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f'another process is writing the dataset {folder}: wait for it, or stop it') from None
    except OSError:   # a file system without locks
        pass
    return lock


class Disk:
    """A block in which trouble with the disk is told in one line."""

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            raise UserError(f'cannot write the dataset {self.folder}: {error.strerror}') from None


def file_names(split, sizes):
    """The names of the files of a split: one, or with the sizes of several as many."""
    several = sizes is not None and len(sizes) > 1
    return [f'{split}-{i:05d}.bin' for i in range(len(sizes))] if several else [f'{split}.bin']


def replace(path, content):
    """Put bytes into a file, on the disk and all at once."""
    new = Path(f'{path}.tmp')
    try:
        with open(new, 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# reading

class Plain(pickle.Unpickler):
    """Unpickles containers, strings and numbers, and nothing that has a class or could run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def find(name):
    """The folder of a dataset: data/<name> of the project, or a path as it stands if it has a slash."""
    here = Path(__file__).resolve().parent
    folder = Path(name) if os.sep in name or '/' in name else here / 'data' / name
    if os.path.exists(folder / 'meta.json') or all(os.path.exists(folder / f'{split}.bin') for split in SPLITS):
        return folder
    if os.path.exists(folder / 'prepare.py') and folder.name != 'text':   # which makes datasets of other names
        script = os.path.relpath(folder / 'prepare.py')
        raise UserError(f'the dataset {name!r} is not there yet, make it with: python {script}')
    if os.path.exists(folder / JOURNAL):
        raise UserError(f'the dataset {name!r} is unfinished: run the command that makes it again, it will go on')
    known = {path.parent.name for path in [*here.glob('data/*/prepare.py'), *here.glob('data/*/meta.json')]} - {'text'}
    raise UserError(f'no dataset {name!r} in {folder}; there are {", ".join(sorted(known))}, or give the path of a '
                    f'folder; to make it: python data/text/prepare.py --input=PATHS --name={name}')


def read_meta(folder):
    """meta.json of a dataset, or its like for a folder that nanoGPT prepared."""
    path = folder / 'meta.json'
    try:
        if path.exists():
            meta = json.loads(path.read_text(encoding='utf-8'))
            if meta.get('unfinished'):
                raise ValueError('it was left half written')
            if meta['format'] != FORMAT:
                raise ValueError(f'format {meta["format"]}, expected {FORMAT}')
            if meta['dtype'] not in ('uint16', 'uint32'):
                raise ValueError(f'dtype {meta["dtype"]}, expected uint16 or uint32')
            return {'dtype': np.dtype(meta['dtype']), 'vocab_size': int(meta['vocab_size']),
                    'tokens': {split: int(meta['tokens'][split]) for split in SPLITS},
                    'files': {split: [int(n) for n in meta['files'][split]] if 'files' in meta else None
                              for split in SPLITS},
                    'mask': bool(meta.get('mask')), 'bytes': meta.get('bytes'), 'characters': meta.get('characters'),
                    'tokenizer': dict(meta['tokenizer'])}
        tokens = {split: os.path.getsize(folder / f'{split}.bin') // 2 for split in SPLITS}
        meta = {'dtype': np.dtype(np.uint16), 'vocab_size': 50257, 'tokens': tokens, 'bytes': None, 'characters': None,
                'files': dict.fromkeys(SPLITS), 'mask': False, 'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}
        path = folder / 'meta.pkl'
        if path.exists():
            with open(path, 'rb') as f:
                chars = Plain(f).load()['itos']
            if any(len(char) != 1 for char in chars.values()):
                raise ValueError('its ids are not of one character each')
            meta['vocab_size'] = len(chars)
            meta['tokenizer'] = tokenizer.CharTokenizer(''.join(chars[i] for i in range(len(chars)))).to_dict()
        return meta
    except OSError as error:
        raise UserError(f'cannot read {folder}: {error.strerror}') from None
    except Exception as error:   # whatever a damaged or hostile file makes json or pickle say
        reason = ' '.join(str(error).split())[:100] or type(error).__name__
        raise UserError(f'{path}: {reason}; run the prepare.py of this dataset again') from None


def open_ids(path, dtype, n_tokens=None):
    """The ids in a file, mapped from disk; UserError if they are not so many as meta.json says, where that is known."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path} is missing: run the prepare.py of this dataset again')
    size, width = path.stat().st_size, dtype.itemsize
    if size % width:
        raise UserError(f'{path} has {size:,} bytes, no multiple of {width}: it is cut off or not of type {dtype}; '
                        f'run the prepare.py of this dataset again')
    if n_tokens not in (None, size // width):
        raise UserError(f'{path} has {size // width:,} tokens, but meta.json says {n_tokens:,}: '
                        f'run the prepare.py of this dataset again')
    dtype = dtype.newbyteorder('<')
    return np.asarray(np.memmap(path, dtype, mode='r')) if size else np.empty(0, dtype)


class Joined:
    """Several arrays of ids as one: its length, slices and places, which come as copies."""

    def __init__(self, arrays):
        self.arrays, self.dtype, self.itemsize = arrays, arrays[0].dtype, arrays[0].itemsize
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, places):
        """The ids at a slice of step 1, or at an array of places of any shape."""
        if isinstance(places, slice):
            start, stop, step = places.indices(len(self))
            assert step == 1
            pieces = [array[max(start - end + len(array), 0):max(stop - end + len(array), 0)]
                      for array, end in zip(self.arrays, self.ends.tolist())]
            return np.concatenate(pieces)
        of, ids = np.searchsorted(self.ends, places, side='right'), np.empty(np.shape(places), self.dtype)
        for i in np.unique(of).tolist():
            array = self.arrays[i]
            ids[of == i] = array[places[of == i] - (int(self.ends[i]) - len(array))]
        return ids

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


class Dataset:
    """A dataset opened for reading: .vocab_size, .tokenizer (a description), .data[split] (ids, mapped from disk),
    .mask[split] (1 where an id is to be learnt as a target, else 0; empty if all are), and, None where that is not
    known, .bytes[split] and .characters[split] of the text that they stand for."""

    def __init__(self, name):
        self.folder = find(name)
        meta = read_meta(self.folder)
        self.vocab_size, self.tokenizer, self.data = meta['vocab_size'], meta['tokenizer'], {}
        self.mask = {}
        self.bytes, self.characters = meta['bytes'], meta['characters']
        for split in SPLITS:
            sizes = meta['files'][split] or [meta['tokens'][split]]
            files = [open_ids(self.folder / name, meta['dtype'], n)
                     for name, n in zip(file_names(split, sizes), sizes)]
            self.data[split] = files[0] if len(files) == 1 else Joined(files)
            if meta['mask']:
                self.mask[split] = open_ids(self.folder / f'{split}.mask', np.dtype(np.uint8), len(self.data[split]))
        if read_meta(self.folder) != meta:
            raise UserError(f'{self.folder} is being written anew: try again when that is done')

    def check(self, block_size, vocab_size):
        """UserError if a split is too short for a context of block_size, or has an id that vocab_size does not cover.
        Files past 2**29 ids are looked at in a thousand places, smaller ones whole."""
        for split, ids in self.data.items():
            path = self.folder / f'{split}.bin'
            if len(ids) < block_size + 1:
                raise UserError(f'{path} has {len(ids):,} tokens, too few for block_size={block_size}: it takes '
                                f'{block_size + 1:,}; lower block_size or prepare more text')
            piece = 2**19
            starts = range(0, len(ids), piece if len(ids) <= 2**29 else len(ids) // 1000)
            for start in starts:
                worst = ids[start:start + piece].max()
                if worst >= vocab_size:
                    raise UserError(f'{path} has the token id {worst:,}, the vocabulary ends at {vocab_size - 1:,}: '
                                    f'it was made with another tokenizer; run its prepare.py again')

    def windows(self, split, starts, block_size, device):
        """Inputs and targets that begin at starts, an integer array of any shape: two tensors of ids of that shape and
        block_size more, the second one token ahead, and -1 where it is not to be learnt."""
        # here, so that whoever only writes does without torch
        import torch

        from runtime import to_device

        ids = self.data[split]
        if isinstance(ids, Joined):
            rows = ids[starts[..., None] + np.arange(block_size + 1)]
        else:
            rows = np.lib.stride_tricks.sliding_window_view(ids, block_size + 1)[starts]
        tokens = torch.from_numpy(rows.astype(np.int64))                               # (..., T + 1)
        if self.mask:
            learnt = np.lib.stride_tricks.sliding_window_view(self.mask[split], block_size + 1)[starts]
            y = tokens[..., 1:].masked_fill(torch.from_numpy(learnt[..., 1:] == 0), -1)
            return to_device(tokens[..., :-1].contiguous(), device), to_device(y, device)
        tokens = to_device(tokens, device)
        return tokens[..., :-1], tokens[..., 1:]

    def perplexity(self, loss, split='val'):
        """{'token': ..., 'byte': ..., 'character': ...}: e to the mean loss, in nats, of one of each, for a mean loss
        per token. Only the last two can be compared between tokenizers; they are left out where they are not known."""
        units = {'token': {split: len(self.data[split])}}
        if not self.mask:   # a loss of some tokens is not spread over the whole text
            units |= {'byte': self.bytes, 'character': self.characters}
        known = {unit: counts[split] for unit, counts in units.items() if counts and counts[split]}
        return {unit: math.exp(min(loss * len(self.data[split]) / n, 700)) for unit, n in known.items()}

    def train_batch(self, step, seed, micro_batches, batch_size, block_size, device, rank=0, world_size=1):
        """The batch of a step: a pure function of (seed, step), of which each of world_size processes takes its rows.

        micro_batches: how many there are in all. Returns x, y of shape (micro_batches / world_size, B, T).
        """
        starts = random_starts(len(self.data['train']), block_size, micro_batches * batch_size, seed, step)
        return self.windows('train', starts.reshape(micro_batches, batch_size)[rank::world_size], block_size, device)

    def eval_batch(self, split, i, eval_iters, batch_size, block_size, device):
        """Batch i of the eval_iters that stand for a split at every evaluation: windows spread evenly over it."""
        starts = np.linspace(0, len(self.data[split]) - block_size - 1, eval_iters * batch_size).astype(np.int64)
        return self.windows(split, starts.reshape(eval_iters, batch_size)[i], block_size, device)


def random_starts(n_tokens, block_size, rows, seed, step):
    """Where the rows of a step begin: uniform over all windows of block_size + 1 tokens, as a pure function of (seed,
    step), by a counter-based generator (Salmon et al., 2011) whose raw numbers no release of numpy changes."""
    raw = np.random.Philox(key=seed % 2**64, counter=[0, step, 0, 0]).random_raw(rows)
    return (raw % np.uint64(n_tokens - block_size)).astype(np.int64)
