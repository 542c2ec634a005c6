"""
Checkpoints: files that hold a model, the state of its run and its tokenizer, and models out of them.

A file holds plain tensors and plain data. It is written whole or not at all, and reading it executes nothing. The
checkpoint of an adapter holds the adapter alone, with the name and the fingerprint of its base. nanoGPT's ckpt.pt is
read too, and nanoGPT reads ours. A Hugging Face folder, or a name on the hub, counts as a checkpoint as well.
"""

import contextlib
import hashlib
import math
import os
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import torch

from flatgpt import architectures, encodings, hub, lora, pretrained, tokenizer
from flatgpt.dataset import atomic_file, find, read_meta
from flatgpt.errors import UserError, nothing_at
from flatgpt.machine import SkipInit
from model import GPT, NANOGPT_FIELDS, GPTConfig

VERSION = 1
# What a checkpoint of nanoGPT or build-nanogpt may name besides tensors and plain data: numbers of numpy, and a
# configuration, which is read as a bag of values
SAFE = [*((np.float64(0).__reduce__()[0], f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')), np.dtype,
        *(type(np.dtype(name)) for name in ('float64', 'float32', 'int64', 'int32', 'bool')),
        *((types.SimpleNamespace, f'{module}.GPTConfig') for module in ('__main__', 'train_gpt2', 'model'))]


# ---------------------------------------------------------------------------------------------------------------------
# files

def state_of(model: GPT, optimizer, scaler, description: dict, config: dict, progress, machine: tuple,
             base: dict | None = None, adapter: dict | None = None) -> dict:
    """Return the state of a run, a dictionary to save, from which the run can be resumed. Tensors are not copied.

    description: the tokenizer, as to_dict() gives it. config: {option: value}. progress: a start.Progress. machine:
    (device type, dtype). adapter: the arguments of lora.put() if only an adapter is trained; then its weights alone are
    in the state, and base is what base_of() gives.
    """
    plain = vars(progress).copy()
    plain['iter_num'] = plain.pop('step')   # as nanoGPT calls it
    if adapter:
        weights = {'model': lora.adapters(model), 'base': base, 'lora': adapter}
    else:
        weights = {'model': model.state_dict(keep_vars=True)}   # tied weights stay one tensor
    return {'version': VERSION, 'model_args': model.config.to_dict(), **weights,
            'tokenizer': encodings.portable(description), 'config': dict(config), 'optimizer': optimizer.state_dict(),
            'scaler': scaler.state_dict(), 'machine': machine, **plain}


def save(path, state: dict):
    """Write a dictionary of tensors and plain data to path. UserError says why that failed; then the old file stays."""
    try:
        with atomic_file(path) as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as error:   # torch's writer turns a full disk into a RuntimeError
        reason = getattr(error, 'strerror', None) or 'the disk is full or there is a limit on file sizes'
        earlier = 'the one before it is intact' if os.path.exists(path) else 'there is none yet'
        raise UserError(f'cannot write {path}: {reason}; {earlier}; make room') from None


def older_states(out_dir) -> list[Path]:
    """Return the files ckpt-<step>.pt in a folder, the latest last."""
    found = [path for path in Path(out_dir).glob('ckpt-*.pt') if re.fullmatch(r'ckpt-\d+\.pt', path.name)]
    return sorted(found, key=os.path.getmtime)


def load(path) -> dict:
    """Return a checkpoint, on the CPU, in one form whoever wrote it: 'model', 'model_args', 'iter_num',
    'best_val_loss', 'config', and what else it has. UserError if it is anything else, or damaged."""
    path = Path(path)
    if (path / 'config.json').exists():
        ckpt = pretrained.load(path)
    else:
        ckpt = load_peft(path) if path.is_dir() else read(path)
    if isinstance(ckpt.get('config'), types.SimpleNamespace):   # build-nanogpt's, whose model is GPT-2 exactly
        ckpt |= {'model_args': {'dropout': 0.0, 'bias': True, 'gelu': 'tanh', **vars(ckpt['config'])}, 'config': {},
                 'iter_num': ckpt.get('step', 0), 'best_val_loss': ckpt.get('val_loss', math.inf)}
    if 'version' not in ckpt and not path.is_dir():   # nanoGPT's
        ckpt['model'] = {re.sub(pretrained.WRAPPERS, '', name): p for name, p in ckpt['model'].items()
                         if not re.search(architectures.BUFFERS, name)}
        ckpt['model_args'] = {**GPTConfig(gelu='erf').to_dict(), **ckpt['model_args']}
        ckpt['best_val_loss'] = float(ckpt.get('best_val_loss', math.inf))
        if ckpt.get('config', {}).get('decay_lr') is False:   # neither warmup nor decay
            ckpt['config'] |= {'schedule': 'constant', 'warmup_iters': 0}
    missing = [name for name in NANOGPT_FIELDS if name not in ckpt['model_args']]
    if missing:
        raise UserError(f'{path} does not say the {", ".join(missing)} of its model: it is damaged')
    return {'iter_num': 0, 'best_val_loss': math.inf, 'config': {}, **ckpt}


def read(path: Path) -> dict:
    """Return the content of a checkpoint file. Its checksums are verified, and nothing in it is executed."""
    try:
        if zipfile.is_zipfile(path):   # else torch's format before 1.6, which has no checksums
            with zipfile.ZipFile(path) as records:
                as_folder = any(record.external_attr & 0x10 for record in records.infolist())   # torch reads nothing
                if records.testzip() or as_folder:
                    raise ValueError('checksum')
        with torch.serialization.safe_globals(SAFE):
            ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f'cannot read the checkpoint {path}: {error.strerror}') from None
    except Exception as error:   # a damaged or hostile file may raise anything
        raise UserError(f'cannot load {path}: {pretrained.describe_file(path, error)}; {instead_of(path)}') from None
    described = isinstance(ckpt, dict) and isinstance(ckpt.get('model_args', ckpt.get('config')),
                                                      (dict, types.SimpleNamespace))
    if not described or not isinstance(ckpt.get('model'), dict):
        raise UserError(f"{path} is no checkpoint of flatgpt or nanoGPT: it has no 'model' and 'model_args'")
    if ckpt.get('version', VERSION) != VERSION:
        raise UserError(f'{path} has version {ckpt["version"]}, this flatgpt reads {VERSION}: use the newer flatgpt')
    return ckpt


def instead_of(path: Path) -> str:
    """Return what the user can do without a checkpoint that cannot be read."""
    older = [other.name for other in older_states(path.parent) if other != path]
    if older:
        return f'to go on from an earlier state, copy {older[-1]} over {path.name}'
    if path.name != 'best.pt' and (path.parent / 'best.pt').exists():
        return f'start from the best weights with --init_from={path.parent / "best.pt"}'
    return 'use another checkpoint'


# ---------------------------------------------------------------------------------------------------------------------
# where a model is

def resolve(name) -> Path:
    """Return the file or Hugging Face folder of the model that a name means: a file, a folder that in_folder() reads,
    or a repository on the hub, which is downloaded."""
    if str(name) in hub.FOLDERS and not os.path.exists(name):
        raise UserError(f'there is no folder {name} here: hf download {hub.FOLDERS[str(name)]} --local-dir {name}')
    return pretrained.fetch(str(name)) if hub.is_name(name) else in_folder(name)


def in_folder(path) -> Path:
    """Return where the model in a folder is: in best.pt, else in ckpt.pt, else the folder itself if it is one of
    Hugging Face or PEFT. Of a file in such a folder it is the folder; another file is returned as it is."""
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f'{nothing_at(path)}; train into it first, or give --out_dir or --init_from')
    folder = path if os.path.isdir(path) else path.parent
    described = any((folder / name).exists() for name in ('config.json', 'adapter_config.json'))
    if path.suffix == '.safetensors' and not described:
        raise UserError(f'{path} has weights alone: get the config.json of its model, too, and give their folder')
    if path != folder:
        is_part = described and path.suffix in ('.safetensors', '.bin', '.json')
        return folder if is_part else path
    for name in ('best.pt', 'ckpt.pt'):
        if (path / name).exists():
            return path / name
    if described:
        return path
    earlier = sorted(path.glob('previous-*/*.pt'), key=os.path.getmtime)
    advice = f'the run that was there is in {earlier[-1].parent}' if earlier else 'train into it first'
    raise UserError(f'no best.pt, ckpt.pt or config.json in {path}: {advice}, or give another folder')


def model_path(out_dir, init_from) -> Path:
    """Return where the model is that a script's options name: in out_dir if init_from is 'resume', else init_from."""
    return in_folder(out_dir) if init_from == 'resume' else resolve(init_from)


# ---------------------------------------------------------------------------------------------------------------------
# models

def build(ckpt: dict, path, merged=False, **overrides) -> GPT:
    """Return the model of a loaded checkpoint, with fields of its configuration changed by overrides. merged: make an
    adapter part of the matrices that it is on. UserError if something does not fit."""
    if 'base' in ckpt:
        model = build_adapted(ckpt, path, **overrides)
        return lora.merge(model) if merged else model
    try:
        with torch.device('meta'), SkipInit():   # no memory, and no initialisation that would be overwritten
            model = GPT(GPTConfig(**{**ckpt['model_args'], **overrides}))
        weights = {name: p.to(torch.float32).contiguous() for name, p in ckpt['model'].items()}
        model.load_state_dict(weights, assign=True)   # what torch has read is not copied
        if model.config.tie_weights:
            model.lm_head.weight = model.transformer.wte.weight
        model.requires_grad_()
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{path}: the weights do not fit the configuration they came with: {reason}') from None
    return model


def build_adapted(ckpt: dict, path, **overrides) -> GPT:
    """Return the model of an adapter: its base, with the adapter on it."""
    try:
        model = build_base(ckpt['base'], path, **overrides)
        model.crop_block_size(ckpt['model_args']['block_size'])
        lora.put(model, **ckpt['lora'])
        if ckpt['model'].keys() != lora.adapters(model).keys():
            raise KeyError
        model.load_state_dict(ckpt['model'], strict=False)
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f'{path} is an adapter that does not fit its own description: it is damaged') from None
    return model


def base_of(name, path, out_dir) -> dict:
    """Return what an adapter in out_dir stores about its base: how the user named it, where it lies as seen from
    out_dir, and its fingerprint. A file, which another run may replace, is kept in out_dir as base.pt."""
    name = str(name) if hub.is_name(name) else os.path.abspath(path)
    relative = os.path.relpath(path, out_dir) if os.path.isdir(path) else 'base.pt'
    return {'path': name, 'relative': relative, 'fingerprint': fingerprint(path)}


def load_peft(folder: Path) -> dict:
    """Return the checkpoint of a folder of PEFT: its base, with the adapter merged into it."""
    name = str(pretrained.read_json(folder / 'adapter_config.json').get('base_model_name_or_path'))
    found = [base for base in (name, str(folder / name)) if os.path.exists(base) or hub.is_name(base)]
    if not found:
        raise UserError(f'{folder} is an adapter for {name}, which is neither here nor a name on the hub: put it '
                        f'there, or write where it is into base_model_name_or_path of its adapter_config.json')
    path = resolve(found[0])
    ckpt = load(path)
    if 'base' in ckpt:
        raise UserError(f'{folder} is an adapter for {path}, which is an adapter itself: export that one merged first')
    lora.merge_peft(folder, ckpt['model'], GPTConfig(**ckpt['model_args']))
    return {**ckpt, 'iter_num': 0, 'best_val_loss': math.inf}


def build_base(base: dict, path, **overrides) -> GPT:
    """Return the base of the adapter at path: from where it was, or from where it lies as seen from the adapter."""
    candidates = [base['path'], os.path.join(Path(path).parent, base['relative'])]
    existing = [name for name in candidates if os.path.exists(name) or hub.is_name(name)]
    if not existing:
        raise UserError(f'{path} is an adapter for {base["path"]}, which is gone: put it back')
    for found in map(resolve, existing):
        if 'fingerprint' not in base:   # an adapter of an earlier version
            model = build(load(found), found, **overrides)
            if digest(model) == base['sha256']:
                return model
        elif fingerprint(found) == base['fingerprint']:
            return build(load(found), found, **overrides)
    raise UserError(f'{path} is an adapter for other weights than those in {found}, which have changed: get the former '
                    f'back')


def fingerprint(path) -> str:
    """Return a text that tells the weights in a file or a Hugging Face folder from others: the sha256 of the sizes of
    its files and of a thousand blocks spread over each. Large models need no more time than small ones."""
    path = Path(path)
    total = hashlib.sha256()
    for file in sorted([*path.glob('*.safetensors'), *path.glob('*.bin')]) if path.is_dir() else [path]:
        size = file.stat().st_size
        total.update(str(size).encode())
        with open(file, 'rb') as f:
            for start in range(0, size, max(size // 1000, 4096)):
                f.seek(start)
                total.update(f.read(4096))
    return total.hexdigest()


def digest(model: GPT) -> str:
    """Return the sha256 of the parameters of a model, by which earlier versions named the base of an adapter."""
    total = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        total.update(name.encode())
        total.update(p.detach().float().contiguous().cpu().numpy())
    return total.hexdigest()


def load_model(path, tokenizer_of=None, merged=True, **overrides) -> tuple:
    """Return (model in eval mode, tokenizer, checkpoint) of what resolve() finds, with an adapter merged or not.
    tokenizer_of: see make_tokenizer()."""
    path = resolve(path)
    ckpt = load(path)
    model = build(ckpt, path, merged, **overrides).eval()
    return model, make_tokenizer(ckpt, path, tokenizer_of), ckpt


def make_tokenizer(ckpt: dict, path, tokenizer_of: str | None = None) -> tokenizer.Tokenizer:
    """Return the tokenizer of the checkpoint at path. If it has none, as nanoGPT's, that of the dataset tokenizer_of
    or, with a notice, of the dataset that its config names, or GPT-2's, where the vocabulary has the size of the
    model's. UserError if there is none, or if the model has fewer tokens."""
    vocab_size = ckpt['model_args']['vocab_size']
    description = ckpt.get('tokenizer')
    if tokenizer_of and not description:
        description = read_meta(find(tokenizer_of))['tokenizer']
    dataset = ckpt['config'].get('dataset')
    if dataset and not description:
        with contextlib.suppress(UserError):   # the dataset is not here
            meta = read_meta(find(dataset))
            if vocab_size in (meta['vocab_size'], 64 * math.ceil(meta['vocab_size'] / 64)):
                print(f'{path} has no tokenizer: that of the dataset {dataset!r}, which it names, is used',
                      file=sys.stderr)
                description = meta['tokenizer']
    if vocab_size in (50257, 50304) and not description:
        print(f"{path} has no tokenizer: GPT-2's is used, which knows as many tokens", file=sys.stderr)
        description = {'kind': 'tiktoken', 'name': 'gpt2'}
    if not description:
        raise UserError(f'{path} carries no tokenizer: name its dataset, as in --tokenizer_of=shakespeare_char')
    tok = tokenizer.from_dict(description)
    if tok.vocab_size > vocab_size:
        raise UserError(f'{path} knows {vocab_size:,} tokens and its tokenizer {tok.vocab_size:,}: they do not belong '
                        f'together')
    return tok


def load_tokenizer(spec: str, *how):
    """Return the tokenizer that a user names: what tokenizer.load() knows (how: its other arguments), or that of a
    folder of Hugging Face, of a run or of a dataset, of a checkpoint, or of a name on the hub, whose weights are not
    downloaded. Raises UserError."""
    import tiktoken

    if spec in ('', 'char', *tiktoken.list_encoding_names()) or spec.startswith('bpe:'):
        return tokenizer.load(spec, *how)
    path = Path(spec).expanduser()
    if path.name == 'tokenizer.json' and path.exists():   # what ends a text is in other files of the folder
        path = path.parent
    if not (path.is_dir() or path.suffix == '.pt' or hub.is_name(spec)):
        return tokenizer.load(str(path))
    if hub.is_name(spec):
        path = pretrained.fetch_config(spec)
    tok = pretrained.tokenizer_in(path) if path.is_dir() else None
    if tok is None and (path / 'meta.json').exists():
        tok = tokenizer.from_dict(read_meta(path)['tokenizer'])
    if tok is None:
        description = load(resolve(path)).get('tokenizer')
        if description is None:
            raise UserError(f'{path} carries no tokenizer: name another model, or an encoding of tiktoken')
        tok = tokenizer.from_dict(description)
    return tok


def fields(path) -> dict:
    """Return the fields of GPTConfig, {name: value}, of what resolve() would find. Of a model on the hub only its
    config.json is downloaded."""
    if hub.is_name(path):
        config = pretrained.read_json(pretrained.fetch_config(str(path)) / 'config.json')
        return architectures.config_from_hf(config, path)
    return load(resolve(path))['model_args']


def stage(ckpt: dict) -> str:
    """Return 'step 1,200, val loss 1.42' of a checkpoint, for notices."""
    known = ckpt['iter_num'] or math.isfinite(ckpt['best_val_loss'])
    return f'step {ckpt["iter_num"]:,}, val loss {ckpt["best_val_loss"]:.4f}' if known else 'pretrained'
