"""
Token ids on disk, and batches of them.

A dataset is a folder. train.bin and val.bin hold token ids, little-endian, without a header; meta.json holds their
type and number, the tokenizer, the size of the text and its source. Folders of nanoGPT are read too, and those with
several files for a split, train-00000.bin, train-00001.bin and so on.
"""

import contextlib
import json
import math
import os
import pickle
import re
from pathlib import Path

import filelock
import numpy as np

from flatgpt import tokenizer
from flatgpt.errors import UserError, do_you_mean, nearest_to

FORMAT = 1
SPLITS = ('train', 'val')
RESUME = 'resume.json'   # in an unfinished dataset: where to continue
BEGINS = 2               # in a mask: the first token of a conversation
FILES = re.compile(r'(train|val)(-\d{5})?\.(bin|mask)(\.new)?|tokenizer\.json')   # of a dataset, beside meta.json


# ---------------------------------------------------------------------------------------------------------------------
# writing

def write(folder, splits: dict, tok, source: dict, masks: dict | None = None):
    """Write a dataset, replacing the one that was there, and print its size.

    splits: {'train': ids, 'val': ids}. tok: their tokenizer. source: {key: value} for meta.json, where the text came
    from. masks: {'train': numbers, 'val': numbers}, for each token 1 if it is a target to learn, 0 if not, or BEGINS if
    a conversation begins with it; None: all are to learn. A reader sees the old dataset, the new one, or that it is
    unfinished; never a mixture.
    """
    with open_writer(folder) as writer:
        writer.begin(tok)
        for split in SPLITS:
            writer.append(split, splits[split])
        sizes = [tok.count(splits[split]) for split in SPLITS]
        n_characters, n_bytes = (dict(zip(SPLITS, numbers)) for numbers in zip(*sizes))
        writer.finish(source, n_bytes, n_characters, masks, mask=bool(masks))
    counts = ', '.join(f'{n:,} {split} tokens' for split, n in writer.num_tokens.items())
    print(f'{folder}: vocabulary of {tok.vocab_size:,}, {counts}')


@contextlib.contextmanager
def open_writer(folder, key: str | None = None):
    """A Writer, in a block in which no other process writes the folder. Errors of the disk become a UserError."""
    folder = Path(folder)
    lock = filelock.FileLock(folder / '.lock')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock.acquire(timeout=0):
            writer = Writer(folder, key)
            try:
                yield writer
            finally:
                if not (folder / RESUME).exists():   # nothing to continue
                    for split in SPLITS:
                        writer.path(split).unlink(missing_ok=True)
                with contextlib.suppress(PermissionError):   # Windows
                    os.unlink(lock.lock_file)   # while it is this process's
    except filelock.Timeout:
        raise UserError(f'another process is writing the dataset {folder}: wait for it, or stop it') from None
    except OSError as error:
        raise UserError(f'cannot write the dataset {folder}: {error.strerror}') from None
    finally:
        with contextlib.suppress(OSError):   # if it is empty
            folder.rmdir()


class Writer:
    """Writes a dataset piece by piece into *.bin.new, which readers see after finish().

    key: a text that stands for the input and the options. If a process was killed that wrote the same folder with the
    same key, the Writer continues at its last commit(); else, and if key is None, it starts anew. .num_tokens: {split:
    number of ids so far}; ids past it are removed at the end. .state: what the last commit() of that process was given,
    or None. .tok: the tokenizer.
    """

    def __init__(self, folder, key):
        self.folder = folder
        self.key = key
        self.num_tokens = dict.fromkeys(SPLITS, 0)
        self.state = None
        try:
            saved = json.loads((folder / RESUME).read_bytes())
        except (OSError, ValueError):   # there is none
            saved = {'key': None}
        if key is None or saved['key'] != key:
            (folder / RESUME).unlink(missing_ok=True)
        else:
            self.num_tokens = saved['num_tokens']
            self.state = saved['state']
            self.begin(tokenizer.from_dict(saved['tokenizer']))

    def path(self, split):
        return self.folder / f'{split}.bin.new'

    def begin(self, tok):
        """Set the tokenizer of the ids, before the first append()."""
        self.tok = tok
        self.dtype = tokenizer.id_type(tok.vocab_size).newbyteorder('<')
        self.trim()

    def trim(self):
        """Remove from the files what comes after num_tokens ids."""
        for split in SPLITS:
            with open(self.path(split), 'ab') as f:
                f.truncate(self.num_tokens[split] * self.dtype.itemsize)

    def sync(self):
        """Put what was appended on the disk."""
        for split in SPLITS:
            with open(self.path(split), 'r+b') as f:
                os.fsync(f.fileno())

    def append(self, split: str, ids: np.ndarray):
        """Append ids to a split."""
        assert len(ids) == 0 or ids.max() < self.tok.vocab_size
        with open(self.path(split), 'ab') as f:
            f.write(ids.astype(self.dtype, copy=False).data)
        self.num_tokens[split] += len(ids)

    def read(self, split: str, start: int, n: int = 2**20) -> np.ndarray:
        """The ids of a split from start on, at most n."""
        n = min(n, self.num_tokens[split] - start)
        return np.fromfile(self.path(split), self.dtype, n, offset=start * self.dtype.itemsize)

    def commit(self, state: dict):
        """Make this the point where a later process continues, with this state: plain data."""
        self.sync()
        saved = {'key': self.key, 'num_tokens': self.num_tokens, 'state': state, 'tokenizer': self.tok.to_dict()}
        write_atomically(self.folder / RESUME, json.dumps(saved).encode())

    def finish(self, source: dict, n_bytes: dict, n_characters: dict, masks: dict | None = None, **more):
        """Give the files their final names, and write meta.json. n_bytes, n_characters: {split: size of the text}.
        source, masks: see write(). more: further entries of meta.json."""
        meta = {'format': FORMAT, 'dtype': self.dtype.name, 'vocab_size': self.tok.vocab_size,
                'tokens': self.num_tokens, 'bytes': n_bytes, 'characters': n_characters, 'source': source,
                'tokenizer': self.tok.to_dict(), **more}
        self.trim()
        self.sync()
        write_atomically(self.folder / 'meta.json', json.dumps({'format': FORMAT, 'unfinished': True}).encode())
        (self.folder / RESUME).unlink(missing_ok=True)   # from here on there is nothing to continue
        names = [f'{split}.bin' for split in SPLITS]
        for split in SPLITS:
            os.replace(self.path(split), self.folder / f'{split}.bin')
            if masks:
                assert len(masks[split]) == self.num_tokens[split]
                write_atomically(self.folder / f'{split}.mask', masks[split].astype(np.uint8).tobytes())
                names.append(f'{split}.mask')
        if 'json' in meta['tokenizer']:
            write_atomically(self.folder / 'tokenizer.json', meta['tokenizer']['json'].encode())
            names.append('tokenizer.json')
        for path in list(self.folder.iterdir()):   # of the dataset that was there
            if FILES.fullmatch(path.name) and path.name not in names:
                path.unlink()
        write_atomically(self.folder / 'meta.json', json.dumps(meta, indent=1).encode())


@contextlib.contextmanager
def atomic_file(path):
    """A context with a file to write bytes to. Whatever happens, path has its old content or all of the new one."""
    new = Path(f'{path}.tmp')
    try:
        with open(new, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_atomically(path, content: bytes):
    """Write a file that has its old content or the new one, whatever happens."""
    with atomic_file(path) as f:
        f.write(content)


# ---------------------------------------------------------------------------------------------------------------------
# reading

def find(name: str) -> Path:
    """The folder of a dataset: data/<name> in the project or, if the name has a slash, the path itself."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(name) if '/' in name or os.sep in name else root / 'data' / name
    if os.path.exists(folder / 'meta.json') or all(os.path.exists(folder / f'{split}.bin') for split in SPLITS):
        return folder
    if os.path.exists(folder / 'prepare.py') and folder.name != 'text':   # which makes datasets of other names
        raise UserError(f'the dataset {name!r} is not there yet, make it with: python '
                        f'{os.path.relpath(folder / "prepare.py")}')
    if os.path.exists(folder / RESUME):
        raise UserError(f'the dataset {name!r} is unfinished: run the command that makes it again, it will continue')
    known = {path.parent.name for path in [*root.glob('data/*/prepare.py'), *root.glob('data/*/meta.json')]} - {'text'}
    near = do_you_mean(name, known) or nearest_to(folder)
    raise UserError(f'no dataset {name!r} in {folder}{near}; there are '
                    f'{", ".join(sorted(known))}, or give the path of a folder; to make it: python '
                    f'data/text/prepare.py --input=PATHS --name={name}')


def read_meta(folder: Path) -> dict:
    """What is known of a dataset: dtype, vocab_size, files ({split: numbers of ids}), mask, bytes, characters and
    tokenizer, from its meta.json or, for a folder that nanoGPT prepared, from its meta.pkl."""
    path = folder / 'meta.json' if (folder / 'meta.json').exists() else folder / 'meta.pkl'
    try:
        if path.name == 'meta.pkl':
            return read_nanogpt_meta(folder)
        meta = json.loads(path.read_text(encoding='utf-8'))
        if meta.get('unfinished'):
            raise ValueError('it was left half written')
        if meta['format'] != FORMAT:
            raise ValueError(f'format {meta["format"]}, expected {FORMAT}')
        if meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError(f'dtype {meta["dtype"]}, expected uint16 or uint32')
        files = meta.get('files') or {split: [meta['tokens'][split]] for split in SPLITS}
        return {'dtype': np.dtype(meta['dtype']), 'vocab_size': int(meta['vocab_size']),
                'files': {split: [int(n) for n in files[split]] for split in SPLITS}, 'mask': bool(meta.get('mask')),
                'bytes': meta.get('bytes'), 'characters': meta.get('characters'), 'tokenizer': dict(meta['tokenizer'])}
    except OSError as error:
        raise UserError(f'cannot read {folder}: {error.strerror}') from None
    except Exception as error:   # whatever a damaged or hostile file makes json or pickle raise
        reason = ' '.join(str(error).split())[:100] or type(error).__name__
        raise UserError(f'{path}: {reason}; run the prepare.py of this dataset again') from None


def read_nanogpt_meta(folder):
    """read_meta() of a folder without meta.json: ids in uint16, of the characters in meta.pkl, or GPT-2's."""
    meta = {'dtype': np.dtype(np.uint16), 'vocab_size': 50257, 'mask': False, 'bytes': None, 'characters': None,
            'files': {split: [os.path.getsize(folder / f'{split}.bin') // 2] for split in SPLITS},
            'tokenizer': {'kind': 'tiktoken', 'name': 'gpt2'}}
    if (folder / 'meta.pkl').exists():
        with open(folder / 'meta.pkl', 'rb') as f:
            chars = PlainUnpickler(f).load()['itos']
        if any(len(char) != 1 for char in chars.values()):
            raise ValueError('its ids are not of one character each')
        meta['tokenizer'] = tokenizer.CharTokenizer(''.join(chars[i] for i in range(len(chars)))).to_dict()
        meta['vocab_size'] = len(chars)
        meta['characters'] = {split: n for split, (n,) in meta['files'].items()}
    return meta


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, strings and numbers, and nothing that has a class or could run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def open_ids(path, dtype: np.dtype, num_tokens: int | None = None) -> np.ndarray:
    """The ids in a file, mapped from disk. UserError if they are not num_tokens; None: any number."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path} is missing: run the prepare.py of this dataset again')
    n, rest = divmod(path.stat().st_size, dtype.itemsize)
    if rest:
        raise UserError(f'{path} has {path.stat().st_size:,} bytes, not a multiple of {dtype.itemsize}: it is cut off '
                        f'or not of type {dtype}; run the prepare.py of this dataset again')
    if num_tokens not in (None, n):
        raise UserError(f'{path} has {n:,} tokens, but meta.json says {num_tokens:,}: run the prepare.py of this '
                        f'dataset again')
    return np.asarray(np.memmap(path, dtype.newbyteorder('<'), mode='r')) if n else np.empty(0, dtype)


class JoinedArrays:
    """Arrays of ids read as one, by slices of step 1 and by arrays of positions; both give copies."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays
        self.dtype = arrays[0].dtype
        self.starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self):
        return int(self.starts[-1])

    def max(self):
        return max(array.max() for array in self.arrays if len(array))

    def __getitem__(self, index):
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        file = np.searchsorted(self.starts, index, side='right') - 1
        ids = np.empty(np.shape(index), self.dtype)
        for i in np.unique(file).tolist():
            ids[file == i] = self.arrays[i][index[file == i] - self.starts[i]]
        return ids


class Dataset:
    """A dataset, by a name that find() knows: .vocab_size; .tokenizer, its description; .data[split], the ids, mapped
    from disk; .mask[split], as write() gets it, or .mask == {} if all are to learn; .bytes[split] and
    .characters[split], the size of the text, or None if it is not known; .begins[split], where conversations begin, if
    there are any: then each row of a batch begins at one, and the next ones follow; after the last, the first."""

    def __init__(self, name: str):
        self.folder = find(name)
        meta = read_meta(self.folder)
        self.vocab_size = meta['vocab_size']
        self.tokenizer = meta['tokenizer']
        self.bytes = meta['bytes']
        self.characters = meta['characters']
        self.data = {}
        self.mask = {}
        self.begins = {}
        for split, sizes in meta['files'].items():
            files = [f'{split}-{i:05d}.bin' for i in range(len(sizes))] if len(sizes) > 1 else [f'{split}.bin']
            arrays = [open_ids(self.folder / file, meta['dtype'], n) for file, n in zip(files, sizes)]
            self.data[split] = JoinedArrays(arrays) if len(arrays) > 1 else arrays[0]
            if meta['mask']:
                self.mask[split] = open_ids(self.folder / f'{split}.mask', np.dtype(np.uint8), len(self.data[split]))
                begins = np.flatnonzero(self.mask[split] == BEGINS)
                if len(begins):
                    self.begins[split] = begins
        if read_meta(self.folder) != meta:
            raise UserError(f'{self.folder} is being written anew: try again when that is done')

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size of a new model: from 1,000 on a multiple of 64, for which matrix products are faster. The added
        ids never occur."""
        return self.vocab_size if self.vocab_size < 1000 else 64 * math.ceil(self.vocab_size / 64)

    def validate_ids(self, block_size: int, vocab_size: int):
        """UserError if a split is too short for block_size, or has an id that is not below vocab_size. In files of more
        than 2**29 ids a thousand places are checked."""
        for split, ids in self.data.items():
            path = self.folder / f'{split}.bin'
            if len(ids) < block_size + 1 and not self.begins:
                raise UserError(f'{path} has {len(ids):,} tokens, too few for block_size={block_size}: it needs '
                                f'{block_size + 1:,}; lower block_size or prepare more text')
            for start in range(0, len(ids), 2**19 if len(ids) <= 2**29 else len(ids) // 1000):
                largest = ids[start:start + 2**19].max()
                if largest >= vocab_size:
                    raise UserError(f'{path} has the token id {largest:,}, the vocabulary ends at {vocab_size - 1:,}: '
                                    f'it was made with another tokenizer; run its prepare.py again')

    def windows(self, split: str, starts: np.ndarray, block_size: int, device):
        """Inputs and targets of the windows at starts, an array of any shape: two tensors of ids of that shape and one
        dimension of block_size more. Targets are one token ahead, -1 where the mask is 0, and NEW_DOCUMENT where a
        conversation begins."""
        import torch

        from flatgpt.machine import to_device
        from model import NEW_DOCUMENT

        positions = starts[..., None] + np.arange(block_size + 1)
        if self.begins:
            positions %= len(self.data[split])
        tokens = to_device(torch.from_numpy(self.data[split][positions].astype(np.int64)), device)   # (..., T + 1)
        targets = tokens[..., 1:]
        if self.mask:
            mask = to_device(torch.from_numpy(self.mask[split][positions[..., 1:]]), device)
            targets = targets.masked_fill(mask == 0, -1).masked_fill(mask == BEGINS, NEW_DOCUMENT)
        return tokens[..., :-1], targets

    def perplexity(self, loss: float, split: str = 'val') -> dict:
        """{'token': ..., 'byte': ..., 'character': ...}: perplexities, for a mean loss per token in nats. The last two
        compare between tokenizers; they are missing if the text is of unknown size, or if a mask hides a part of it."""
        num_tokens = len(self.data[split])
        sizes = {'token': {split: num_tokens}}
        if not self.mask:
            sizes |= {'byte': self.bytes, 'character': self.characters}
        return {unit: math.exp(min(loss * num_tokens / n[split], 700)) for unit, n in sizes.items() if n and n[split]}

    def bits(self, loss: float, split: str = 'val') -> dict:
        """{'bits_per_byte': ..., 'bits_per_character': ...} for a mean loss per token in nats, as far as perplexity()
        knows them."""
        return {f'bits_per_{unit}': math.log2(value) for unit, value in self.perplexity(loss, split).items()
                if unit != 'token'}

    def num_starts(self, split: str, block_size: int) -> int:
        """At how many places a row can begin: conversations, or windows of block_size + 1 tokens."""
        return len(self.begins[split]) if self.begins else len(self.data[split]) - block_size

    def num_cut(self, block_size: int) -> int:
        """How many conversations of the training data are longer than a row: what is past its end is not learned."""
        lengths = np.diff(self.begins['train'], append=len(self.data['train'])) if self.begins else np.array([])
        return int((lengths > block_size + 1).sum())

    def train_batch(self, step: int, seed: int, micro_batches: int, batch_size: int, block_size: int, device,
                    rank: int = 0, world_size: int = 1):
        """The inputs and targets, (micro_batches / world_size, B, T) each, of process `rank` in a step: its share of a
        batch of micro_batches, which is a pure function of (seed, step)."""
        starts = random_starts(self.num_starts('train', block_size), micro_batches * batch_size, seed, step)
        starts = self.begins['train'][starts] if self.begins else starts
        return self.windows('train', starts.reshape(micro_batches, batch_size)[rank::world_size], block_size, device)

    def eval_batch(self, split: str, i: int, eval_iters: int, batch_size: int, block_size: int, device):
        """The inputs and targets, (B, T) each, of batch i of the eval_iters batches of every evaluation: windows that
        are spread evenly over the split."""
        starts = np.linspace(0, self.num_starts(split, block_size) - 1, eval_iters * batch_size).astype(np.int64)
        starts = self.begins[split][starts] if self.begins else starts
        return self.windows(split, starts.reshape(eval_iters, batch_size)[i], block_size, device)


def random_starts(num_starts: int, rows: int, seed: int, step: int) -> np.ndarray:
    """Where the rows of a step begin, numbers below num_starts: uniform, a pure function of (seed, step), by a
    counter-based generator (Salmon et al., 2011) whose raw numbers no release of numpy changes."""
    raw = np.random.Philox(key=seed % 2**64, counter=[0, step, 0, 0]).random_raw(rows)
    return (raw % np.uint64(num_starts)).astype(np.int64)
