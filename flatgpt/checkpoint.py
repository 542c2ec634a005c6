"""
The output folder on disk, and models out of it.

    out_dir/ckpt.pt          everything that a run needs to go on: weights, optimizer, step, ...
    out_dir/ckpt-1000.pt     the same as it was at an earlier step, if keep_last asks for it
    out_dir/best.pt          the weights at the lowest validation loss
    out_dir/log.jsonl        one JSON object per log line
    out_dir/loss.png         the same as curves, where matplotlib is
    out_dir/.lock            held by the run that writes here

Files are plain tensors and plain data, written whole or not at all, and read without executing anything in them.
An adapter is kept alone, beside the name and the digest of the weights that it is for. nanoGPT's ckpt.pt is read too,
and reads ours; folders of Hugging Face and names on its hub work too.
"""

import contextlib
import datetime
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import socket
import struct
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import torch

from flatgpt import hub, lora, pretrained, runtime, tokenizer, validate
from flatgpt.dataset import find, read_meta, write_atomically
from flatgpt.errors import UserError
from flatgpt.runtime import exit_callbacks
from model import GPT, NANOGPT_FIELDS, GPTConfig

VERSION = 1
RUN_ONLY = ('optimizer', 'scaler', 'machine', 'planned', 'evaluated', 'bad_evals', 'seconds')   # for resuming only


def claim(out_dir):
    """Make out_dir and hold it for this process until it ends, however it ends. Returns the open lock file, which must
    be kept; UserError if another run holds it or it cannot be written to."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = open(Path(out_dir) / '.lock', 'a+')
    except OSError as error:
        raise UserError(f'cannot write to out_dir={str(out_dir)!r}: {error.strerror}; choose another') from None
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        with lock:
            lock.seek(0)
            other = lock.read().strip()
        raise UserError(f'another run writes to out_dir={str(out_dir)!r}, {other}: stop it, or choose another '
                        f'folder') from None
    except (ImportError, OSError):   # Windows, or a file system without locks
        pass
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now()}\n')
    lock.flush()
    os.fsync(lock.fileno())   # for the other hosts
    return lock


def holder(out_dir):
    """A number that stands for the run that holds out_dir, or held it last; -1 if there is none."""
    path = Path(out_dir) / '.lock'
    return zlib.crc32(path.read_bytes()) if path.exists() else -1


def claim_for_all(out_dir, rt: runtime.Runtime):
    """Claim out_dir for all processes of a run, each of which must call this. Returns the lock file in the master
    process, None in the others; UserError also if the hosts see different folders. rt: the Runtime."""
    lock = None
    if rt.master:
        lock = claim(out_dir)
    rt.any_process(False)   # wait until the master has written the lock file
    shared = rt.same_everywhere(holder(out_dir))
    if not shared:
        raise UserError(f'out_dir={out_dir!r} must be a folder that all hosts share')
    return lock


def state_of(model: GPT, optimizer, scaler, description: dict, config: dict, step: int, best_val_loss: float,
             machine: tuple, base: dict | None = None, adapter: dict | None = None, **progress) -> dict:
    """The state of a run, a dictionary to save, from which the run can be resumed. Tensors are not copied.

    description: the tokenizer, as to_dict() gives it. config: {option: value}. step: number of updates made. machine:
    (device type, dtype). adapter: if only an adapter is trained, its description for lora.put(); then its weights alone
    are in the state, and base says which weights it belongs to. progress: other values, plain data.
    """
    state = {'version': VERSION, 'model_args': model.config.to_dict()}
    if adapter:
        state |= {'model': lora.adapters(model), 'base': base, 'lora': adapter}
    else:
        state['model'] = model.state_dict(keep_vars=True)   # tied weights stay one tensor
    return {**state, 'tokenizer': description, 'config': dict(config), 'iter_num': step,
            'best_val_loss': best_val_loss, 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
            'machine': machine, **progress}


def save(path, state):
    """Write a dictionary of tensors and plain data to path: whole, or UserError says why and the old file stays."""
    path = Path(path)
    new = path.with_name(path.name + '.tmp')
    try:
        with open(new, 'w+b') as f:
            torch.save(state, f)
            seal(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:   # torch's writer turns a full disk into a RuntimeError
        reason = getattr(error, 'strerror', None) or 'the disk is full or there is a limit on file sizes'
        kept = 'the one before it is intact' if path.exists() else 'there is none yet'
        raise UserError(f'cannot write {path}: {reason}; {kept}; make room') from None
    finally:
        new.unlink(missing_ok=True)


SEAL = b'flatgpt sha256 '   # and a digest of all that precedes, as the comment with which a zip file may end


def seal(f):
    """End a file that torch has written, a zip file, with a digest, so that no change goes unnoticed."""
    f.seek(-2, os.SEEK_END)
    f.write(struct.pack('<H', len(SEAL) + 64))   # the length of the comment
    f.seek(0)
    digest = hashlib.file_digest(f, 'sha256').hexdigest()
    f.write(SEAL + digest.encode())


def check_seal(path):
    """ValueError if a checkpoint has changed since it was written: by its digest, or for those that others have
    written, as far as the checksums (CRC-32) of the zip file tell."""
    with open(path, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        tail = content[-len(SEAL) - 64:]
        if tail.startswith(SEAL):
            with memoryview(content)[:-len(tail)] as sealed:
                intact = hashlib.sha256(sealed).hexdigest().encode() == tail[len(SEAL):]
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                intact = not parts.testzip()
        else:   # torch's format before 1.6
            intact = True
    if not intact:
        raise ValueError('checksum')


class Writer:
    """Writes the states of a run into out_dir in the background, one at a time. A write that fails ends nothing: it is
    reported, the older files stay, and the next one may find room."""

    def __init__(self, out_dir, keep_last=0, step=None):
        self.out_dir, self.keep_last = Path(out_dir), keep_last   # how many earlier states to keep
        self.step = step       # of the state in ckpt.pt, if there is one
        self.best = None       # the best weights, until they are on the disk
        self.error = None      # why the latest write failed
        self.seconds = 0.0     # how long the latest write took
        self.thread = None
        exit_callbacks.append(self.wait)

    def put(self, state, best):
        """Begin to write a state, which must not change any more, to ckpt.pt, and its weights to best.pt if they are
        the best so far. Waits for the write before it."""
        self.wait()
        if best:
            self.best = {key: value for key, value in state.items() if key not in RUN_ONLY}
        self.thread = threading.Thread(target=self.write, args=(state,))
        self.thread.start()

    def wait(self):
        """Returns why the latest write failed, or None, once it has ended."""
        if self.thread:
            self.thread.join()
        return self.error

    def write(self, state):
        self.error = 'the write was cut short'
        begun = time.perf_counter()
        try:
            if self.best:
                save(self.out_dir / 'best.pt', self.best)
                self.best = None
            if self.keep_last and self.step not in (None, state['iter_num']) and (self.out_dir / 'ckpt.pt').exists():
                keep(self.out_dir, self.step, self.keep_last)
            save(self.out_dir / 'ckpt.pt', state)
            self.step, self.error = state['iter_num'], None
            self.seconds = time.perf_counter() - begun
        except UserError as error:
            self.error = error
            print(error, file=sys.stderr, flush=True)


def keep(out_dir, step, n):
    """Let the state in ckpt.pt, of a step, stay as ckpt-<step>.pt when a newer one takes its place, and drop all but
    the n latest of such. A link, so that there is a ckpt.pt at every moment."""
    older = out_dir / f'ckpt-{step}.pt'
    try:
        older.unlink(missing_ok=True)
        os.link(out_dir / 'ckpt.pt', older)
        for path in sorted(older_states(out_dir), key=os.path.getmtime)[:-n]:
            path.unlink()
    except OSError as error:
        print(f'cannot keep {older}: {error.strerror}', file=sys.stderr, flush=True)


def older_states(out_dir):
    return [path for path in Path(out_dir).glob('ckpt-*.pt') if re.fullmatch(r'ckpt-\d+\.pt', path.name)]


def load(path):
    """The checkpoint in a file, on the CPU, in one form whoever wrote it: a dictionary with 'model', 'model_args' and
    what else it holds. UserError if the file is anything else or any of its bytes has changed; nothing in it is
    executed."""
    path = Path(path)
    start = {'iter_num': 0, 'best_val_loss': math.inf, 'config': {}}
    if path.is_dir():
        return {**start, **pretrained.load(path)}
    try:
        open(path, 'rb').close()
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read the checkpoint {path}: {getattr(error, "strerror", error)}') from None
    try:
        check_seal(path)
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:   # a damaged or hostile file may raise anything
        code = re.search(r'GLOBAL ([\w.]+)', str(error))
        what = f'it carries code ({code[1]}), which is not run' if code else 'it is cut off, damaged or no checkpoint'
        raise UserError(f'cannot load {path}: {what}; {instead_of(path)}') from None
    if not isinstance(ckpt, dict) or not all(isinstance(ckpt.get(part), dict) for part in ('model', 'model_args')):
        raise UserError(f"{path} is no checkpoint of flatgpt or nanoGPT: it has no 'model' and 'model_args'")
    if ckpt.get('version', VERSION) != VERSION:
        raise UserError(f'{path} has version {ckpt["version"]}, this flatgpt reads {VERSION}: use the newer flatgpt')
    if 'version' not in ckpt:   # nanoGPT's: prefixes of torch.compile and DDP, exact GELU, mask buffers of old releases
        ckpt['model'] = {re.sub(r'^(_orig_mod\.|module\.)+', '', k): v for k, v in ckpt['model'].items()}
        ckpt['model'] = {k: v for k, v in ckpt['model'].items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
        ckpt['model_args'] = {**GPTConfig(gelu='erf').to_dict(), **ckpt['model_args']}
        ckpt['best_val_loss'] = float(ckpt.get('best_val_loss', math.inf))
        if ckpt.get('config', {}).get('decay_lr') is False:   # neither warmup nor decay
            ckpt['config'] |= {'schedule': 'constant', 'warmup_iters': 0}
    missing = [name for name in NANOGPT_FIELDS if name not in ckpt['model_args']]
    if missing:
        raise UserError(f'{path} does not say the {", ".join(missing)} of its model: it is damaged')
    return {**start, **ckpt}


SWITCHES = ('arch', 'pos', 'window', 'layer_scale')   # options that select a kind of model
# Options that a resumed run does not take from its checkpoint: they belong to one start
LOCAL = ('out_dir', 'init_from', 'eval_only', 'find_lr', 'device', 'compile', 'peak_flops')


def choose_start(config) -> tuple:
    """Load what a run of train.py starts from, as init_from says. Returns (checkpoint, its path, whether its run is
    resumed); (None, None, False) from scratch. Raises UserError, UsageError.

    config: the Config of train.py. Options that the user has not given get the values of the checkpoint: all of them if
    its run is resumed, else those of the model.
    """
    init_from = config['init_from']
    latest = os.path.join(config['out_dir'], 'ckpt.pt')
    if runtime.restarts() and init_from not in ('resume', 'auto'):
        raise UserError(f'torchrun has started this run again, and init_from={init_from!r} would begin anew: '
                        f'give --init_from=auto')
    resuming = init_from == 'resume' or (init_from == 'auto' and os.path.exists(latest))
    if not resuming and init_from in ('scratch', 'auto'):
        return None, None, False
    path = latest if resuming else resolve(init_from)
    ckpt = load(path)
    if resuming:
        if 'optimizer' not in ckpt:
            raise UserError(f'{path} has weights but no optimizer state: give --init_from={path}')
        config.adopt(ckpt['config'], but=LOCAL)
        validate.same_run(config, ckpt['config'], path)
    shape = {name: ckpt['model_args'][name] for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias')}
    # The context of weights may be cropped: to a block_size that the user gives, and for weights of other projects,
    # which have no config, to the default, because their context may be too long to train.
    may_crop = not resuming and ('block_size' in config.given or not ckpt['config'])
    if may_crop and config['block_size'] < shape['block_size']:
        del shape['block_size']
    asked = {name: config[name] for name in shape if name in config.given}
    validate.same_model(asked, shape, path, 'remove these options, or start from scratch')
    config.adopt({name: ckpt['config'][name] for name in SWITCHES if name in ckpt['config']})
    config.adopt(shape)
    return ckpt, path, resuming


def instead_of(path):
    """What to do without a checkpoint that cannot be read."""
    older = [other.name for other in sorted(older_states(path.parent), key=os.path.getmtime) if other != path]
    if older:
        return f'to go on from an earlier state, copy {older[-1]} over {path.name}'
    if path.name != 'best.pt' and (path.parent / 'best.pt').exists():
        return f'start from the best weights with --init_from={path.parent / "best.pt"}'
    return 'use another checkpoint'


def resolve(path, names=True):
    """Where the model lies that a path means: the file itself; in a folder best.pt, else ckpt.pt, else the folder, if
    it is one of Hugging Face. With names, that of a repository on the hub means its folder in the cache, which is
    filled."""
    if names and hub.is_name(path):
        return pretrained.fetch(str(path))
    path = Path(path)
    if not os.path.isdir(path):
        return path
    for name in ('best.pt', 'ckpt.pt'):
        if (path / name).exists():
            return path / name
    if (path / 'config.json').exists():
        return path
    raise UserError(f'no best.pt, ckpt.pt or config.json in {path}: train into it first, or give another folder')


def build(ckpt, path, merged=False, **overrides):
    """The model of a loaded checkpoint, its configuration changed by overrides; with merged, an adapter has become part
    of its matrices. Raises UserError if something does not fit."""
    if 'base' in ckpt:
        model = adapted(ckpt, path, **overrides)
        return lora.merge(model) if merged else model
    try:
        model = GPT(GPTConfig(**{**ckpt['model_args'], **overrides}))
        model.load_state_dict(ckpt['model'])
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{path}: the weights do not fit the configuration they came with: {reason}') from None
    return model


def adapted(ckpt, path, **overrides):
    """The model of an adapter: the weights that it is for, and it."""
    try:
        base, description = ckpt['base'], ckpt['lora']
        places = [base['path'], os.path.join(Path(path).parent, base['relative'])]
        there = [place for place in places if os.path.exists(place) or hub.is_name(place) and place == base['path']]
        if not there:
            raise UserError(f'{path} is an adapter for {places[0]}, which is gone: put it back')
        for place in map(resolve, there):   # where it was, and where it is seen from the adapter
            found = load(place)
            model = build(found, place, **overrides) if 'base' not in found else None
            if model and digest(model) == base['sha256']:
                break
        else:
            raise UserError(f'{path} is an adapter for weights with sha256 {base["sha256"][:16]}..., and those in '
                            f'{place} have changed or are others: get the former back')
        model.crop_block_size(ckpt['model_args']['block_size'])
        lora.put(model, **description)
        if ckpt['model'].keys() != lora.adapters(model).keys():
            raise KeyError
        model.load_state_dict(ckpt['model'], strict=False)
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f'{path} is an adapter that does not fit its own description: it is damaged') from None
    return model


def base_of(model, name, path, out_dir):
    """What an adapter in out_dir says about the weights that it is for: how the user named them, where they lie, and
    their digest."""
    name = str(name) if hub.is_name(name) else os.path.abspath(path)
    return {'path': name, 'relative': os.path.relpath(path, out_dir), 'sha256': digest(model)}


def digest(model):
    """The sha256 of the parameters of a model, the same in whatever file they come."""
    total = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        total.update(name.encode())
        total.update(p.detach().float().contiguous().cpu().numpy())
    return total.hexdigest()


def load_model(path, tokenizer_of=None, merged=True, **overrides):
    """(model in eval mode, tokenizer, checkpoint) of what resolve() finds, with adapters merged or not. nanoGPT's
    checkpoints carry no tokenizer: theirs is that of the dataset tokenizer_of, or GPT-2's if the vocabulary has its
    size."""
    path = resolve(path)
    ckpt = load(path)
    model = build(ckpt, path, merged, **overrides).eval()
    description = ckpt.get('tokenizer')
    if description is None and tokenizer_of:
        description = read_meta(find(tokenizer_of))['tokenizer']
    if description is None and model.config.vocab_size in (50257, 50304):
        description = {'kind': 'tiktoken', 'name': 'gpt2'}
    if description is None:
        raise UserError(f'{path} carries no tokenizer: name its dataset, as in --tokenizer_of=shakespeare_char')
    tok = tokenizer.from_dict(description)
    if tok.vocab_size > model.config.vocab_size:
        raise UserError(f'{path} knows {model.config.vocab_size:,} tokens and its tokenizer {tok.vocab_size:,}: '
                        f'they do not belong together')
    return model, tok, ckpt


def load_tokenizer(name):
    """The tokenizer that a user names: one of tiktoken's, such as 'gpt2', or that of a model, a path or a name on the
    hub, from where its weights are not fetched."""
    import tiktoken

    if name in tiktoken.list_encoding_names():
        return tokenizer.TiktokenTokenizer(name)
    path = pretrained.fetch_config(name) if hub.is_name(name) else resolve(name)
    tok = pretrained.tokenizer_in(path) if path.is_dir() else load(path).get('tokenizer')
    if tok is None:
        raise UserError(f'{path} carries no tokenizer: name another model, or an encoding of tiktoken')
    return tokenizer.from_dict(tok) if isinstance(tok, dict) else tok


def fields(path):
    """The fields of GPTConfig, {name: value}, of what resolve() would find; without the weights of one on the hub."""
    if hub.is_name(path):
        return pretrained.config_from_hf(pretrained.read_json(pretrained.fetch_config(str(path)) / 'config.json'), path)
    return load(resolve(path))['model_args']


def stage(ckpt):
    """Return 'step 1,200, val loss 1.42' of a checkpoint, for notices."""
    known = ckpt['iter_num'] or math.isfinite(ckpt['best_val_loss'])
    return f'step {ckpt["iter_num"]:,}, val loss {ckpt["best_val_loss"]:.4f}' if known else 'pretrained'


# ---------------------------------------------------------------------------------------------------------------------
# the log

def set_aside(out_dir):
    """Move the files of an earlier run to out_dir/previous-1, or the next number; returns that folder, or None."""
    out_dir = Path(out_dir)
    names = [name for name in ('ckpt.pt', 'best.pt', 'log.jsonl') if (out_dir / name).exists()]
    names += [path.name for path in older_states(out_dir)]
    if not names:
        return None
    names += [name for name in ('loss.png', 'tensorboard') if (out_dir / name).exists()]
    number = next(n for n in itertools.count(1) if not (out_dir / f'previous-{n}').exists())
    previous = out_dir / f'previous-{number}'
    try:
        previous.mkdir()
        for name in names:
            os.replace(out_dir / name, previous / name)
    except OSError as error:
        raise UserError(f'cannot move the run that is in {out_dir} to {previous}: {error.strerror}; choose another '
                        f'out_dir') from None
    return previous


def append_log(out_dir, record):
    """Add to log.jsonl; floats that JSON has no word for become null. A full disk costs the line, not the run."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    path = Path(out_dir) / 'log.jsonl'
    size = os.path.getsize(path) if path.exists() else 0
    try:
        with open(path, 'ab') as f:
            f.write(json.dumps(plain).encode() + b'\n')
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)   # half a line would spoil the next one
        print(f'cannot write to {path}: {error.strerror}', file=sys.stderr)


def rewind_log(out_dir, step):
    """Drop from log.jsonl what a run wrote after the checkpoint of step, since it will be written again: losses of that
    step and later ones, evaluations of later ones, and a line that was cut off."""
    path = Path(out_dir) / 'log.jsonl'
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
            if record.get('iter', -1) < step and record.get('step', -1) <= step and line.endswith(b'\n'):
                kept.append(line)
        except (ValueError, AttributeError, TypeError):   # what a power cut left
            pass
    try:
        write_atomically(path, b''.join(kept))
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}; it is as it was, make room') from None
