"""
Every file of a source tree, for a model that completes your own code.

    python data/my_code/prepare.py --input=~/project --tokenizer=out-python-char      to finetune a model of yours
    python data/my_code/prepare.py --input=~/project --tokenizer=gpt2                 or GPT-2
    python train.py config/finetune_code.py

Each file is for training or for validation as a whole, by the sha256 of its path in the tree. An end-of-text token, or
two line breaks, follow each. Files that are not UTF-8 are left out, and so is each character that the tokenizer lacks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the project, for the imports below

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
input = ''               # the tree; hidden files and folders of generated or installed code are left out
endings = '.py'          # comma-separated endings of the files to take, such as '.py,.c,.h'
tokenizer = 'gpt2'       # a tiktoken name, that of a model (a path, a name on the hub), or 'char': what occurs here
tabs: bool | str = 'auto'   # four spaces of indentation become a tab, as in data/python_char; 'auto': for characters
val_fraction = 0.1       # the share of the text for validation, in whole files: at least one, at most all but one
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import hashlib
import os
import re

import numpy as np

from flatgpt import checkpoint, validate
from flatgpt.dataset import write
from flatgpt.errors import UsageError, UserError, nothing_at
from flatgpt.tokenizer import CharTokenizer

LEFT_OUT = {'__pycache__', 'node_modules', 'site-packages', 'venv', 'build', 'dist', 'target', 'vendor'}

root = Path(input).expanduser()
if input and not root.exists():
    raise UsageError(f'{nothing_at(root)}: expected a folder with source code, as in --input=~/project')
if not input or not root.is_dir():
    raise UsageError(f'input={input!r}: expected a folder with source code, as in --input=~/project')
validate.share(config, 'val_fraction')
validate.one_of(('auto', True, False), config, 'tabs')
wanted = tuple(ending.strip() for ending in endings.split(',') if ending.strip())

# the files, in an order that is random but the same everywhere

names = []
for folder, subfolders, files in os.walk(root):
    subfolders[:] = sorted(name for name in subfolders if name not in LEFT_OUT and not name.startswith('.'))
    names += [(Path(folder) / file).relative_to(root).as_posix() for file in files
              if file.endswith(wanted) and not file.startswith('.')]
texts = {}
unreadable = []
for name in sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
    try:
        texts[name] = (root / name).read_text(encoding='utf-8-sig')
    except OSError as error:
        unreadable.append(f'{name}, {error.strerror}')
    except UnicodeDecodeError:
        unreadable.append(f'{name}, not UTF-8')
if len(texts) < 2:
    raise UserError(f'{root} has {len(texts)} readable files that end in {endings}: expected two or more, one of them '
                    f'for validation; give other endings or another tree')

# their ids

tok = None if tokenizer == 'char' else checkpoint.load_tokenizer(tokenizer)
of_characters = tok is None or isinstance(tok, CharTokenizer)
if tabs is True or (tabs == 'auto' and of_characters):
    texts = {name: re.sub('^(?: {4})+', lambda spaces: '\t' * (len(spaces[0]) // 4), text, flags=re.MULTILINE)
             for name, text in texts.items()}
if tok is None:
    tok = CharTokenizer.of(''.join(['\n', *texts.values()]))
unknown = tok.unknown(''.join(texts.values()))
num_characters = sum(map(len, texts.values()))
texts = {name: text.translate(dict.fromkeys(map(ord, unknown))) for name, text in texts.items()}
end = tok.encode('\n\n') if tok.eot is None else []
ids = [np.concatenate((tok.encode_document(text), end)).astype(np.uint32) for text in texts.values()]

# the first files are for validation, until they have enough text

total = sum(map(len, ids))
splits = {'train': [], 'val': []}
length = 0
for file_ids in ids:
    enough = length >= val_fraction * total or len(splits['val']) == len(ids) - 1
    splits['train' if splits['val'] and enough else 'val'].append(file_ids)
    length += len(file_ids)

share = sum(map(len, splits['val'])) / total
num_kept = sum(map(len, texts.values()))
print(f'{len(texts):,} files, {num_kept:,} characters, {share:.1%} of the tokens for validation')
if unreadable:
    print(f'left out: {len(unreadable):,} files, such as {unreadable[0]!r}')
if unknown:
    print(f'left out: {num_characters - num_kept:,} characters that the tokenizer lacks, such as {unknown[0]!r}')
write(Path(__file__).resolve().parent, {split: np.concatenate(parts) for split, parts in splits.items()}, tok,
      {'path': root.name, 'sha256': hashlib.sha256(os.fsencode('\0'.join([*texts, *texts.values()]))).hexdigest()})
