"""
The output folder on disk, and models out of it.

    out_dir/ckpt.pt      everything that a run needs to go on: weights, optimizer, step, ...
    out_dir/best.pt      the weights at the lowest validation loss
    out_dir/log.jsonl    one JSON object per log line

Files are plain tensors and plain data, written whole or not at all, and read without executing anything in them.
nanoGPT's ckpt.pt is read too, and reads ours.
"""

import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import torch

import tokenizer
from configurator import UserError
from dataset import find, read_meta, replace
from model import GPT, NANOGPT_FIELDS, GPTConfig

VERSION = 1


def make_folder(folder):
    """Make sure that out_dir is there and can be written to; UserError otherwise."""
    probe = Path(folder) / f'.probe-{os.getpid()}'
    try:
        os.makedirs(folder, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f'cannot write to out_dir={str(folder)!r}: {error.strerror}; choose another') from None


def save(path, state):
    """Write a dictionary of tensors and plain data to path: whole, or UserError says why and the old file stays."""
    path = Path(path)
    new = path.with_name(path.name + '.tmp')
    try:
        with open(new, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:   # torch's writer turns a full disk into a RuntimeError
        reason = getattr(error, 'strerror', None) or 'the disk is full or there is a limit on file sizes'
        kept = 'the one before it is intact' if path.exists() else 'there is none yet'
        raise UserError(f'cannot write {path}: {reason}; {kept}; make room') from None
    finally:
        new.unlink(missing_ok=True)


def load(path):
    """The checkpoint in a file, on the CPU, in one form whoever wrote it: a dictionary with 'model', 'model_args' and
    what else it holds. UserError if the file is anything else; nothing in it is executed."""
    path = Path(path)
    try:
        open(path, 'rb').close()
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read the checkpoint {path}: {getattr(error, "strerror", error)}') from None
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:   # a damaged or hostile file may raise anything
        code = re.search(r'GLOBAL ([\w.]+)', str(error))
        what = f'it carries code ({code[1]}), which is not run' if code else 'it is cut off, damaged or no checkpoint'
        raise UserError(f'cannot load {path}: {what}; use best.pt or another checkpoint') from None
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
    return {'iter_num': 0, 'best_val_loss': math.inf, 'config': {}, **ckpt}


def resolve(path):
    """The file that a path means: itself, or in a folder best.pt, else ckpt.pt."""
    path = Path(path)
    if not os.path.exists(path) and re.fullmatch(r'gpt2(-medium|-large|-xl)?', str(path)):
        raise UserError(f'cannot load the pretrained weights {path} yet: give a checkpoint file or a folder with one')
    if not os.path.isdir(path):
        return path
    for name in ('best.pt', 'ckpt.pt'):
        if (path / name).exists():
            return path / name
    raise UserError(f'no best.pt and no ckpt.pt in {path}: train into it first, or give another folder')


def build(ckpt, path, **overrides):
    """The model of a loaded checkpoint, its configuration changed by overrides. Raises UserError if it does not fit."""
    try:
        model = GPT(GPTConfig(**{**ckpt['model_args'], **overrides}))
        model.load_state_dict(ckpt['model'])
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{path}: the weights do not fit the configuration they came with: {reason}') from None
    return model


def load_model(path, tokenizer_of=None, **overrides):
    """(model in eval mode, tokenizer, checkpoint) of a file or folder. nanoGPT's checkpoints carry no tokenizer: theirs
    is that of the dataset tokenizer_of, or GPT-2's if the vocabulary has its size."""
    path = resolve(path)
    ckpt = load(path)
    model = build(ckpt, path, **overrides).eval()
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


# ---------------------------------------------------------------------------------------------------------------------
# the log

def set_aside(out_dir):
    """Move the files of an earlier run to out_dir/previous-1, or the next number; returns that folder, or None."""
    out_dir = Path(out_dir)
    names = [name for name in ('ckpt.pt', 'best.pt', 'log.jsonl') if (out_dir / name).exists()]
    if not names:
        return None
    number = next(n for n in itertools.count(1) if not (out_dir / f'previous-{n}').exists())
    previous = out_dir / f'previous-{number}'
    previous.mkdir()
    for name in names:
        os.replace(out_dir / name, previous / name)
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
        if path.exists():
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
        replace(path, b''.join(kept))
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}; it is as it was, make room') from None
