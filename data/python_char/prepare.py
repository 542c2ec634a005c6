"""
The source code of Python's standard library, as characters: a dataset that needs no download.

    python data/python_char/prepare.py

It takes the .py files of the interpreter that runs this script, in an order that is random but the same everywhere: by
the sha256 of their path. Tests, tables, tools with a folder of their own and what some systems package separately are
left out, so that one version of Python gives one text. Four spaces of indentation become one tab, six tabs at most, and
other runs of spaces become at most two: a small model miscounts them and has better uses for its context. Characters
that occur fewer than a hundred times are dropped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the project, for the imports below

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
min_count = 100   # a character that occurs less often is dropped
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

import hashlib
import platform
import re
import sysconfig
from collections import Counter

from flatgpt.dataset import write
from flatgpt.errors import UserError
from flatgpt.tokenizer import CharTokenizer

LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__', '__phello__', 'encodings',
            'ensurepip', 'idlelib', 'lib2to3', 'distutils', 'pydoc_data', 'tkinter', 'turtledemo', 'venv'}

BUILT = ('_sysconfig', 'config-', 'sitecustomize', 'usercustomize')   # what differs from one build to the next

library = Path(sysconfig.get_path('stdlib'))
names = [path.relative_to(library).as_posix() for path in library.rglob('*.py')]
names = [name for name in names if not LEFT_OUT & set(name.split('/')) and not name.startswith(BUILT)]
names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
text = '\n\n'.join((library / name).read_text(encoding='utf-8', errors='ignore') for name in names)
text = re.sub('^(?: {4})+', lambda spaces: '\t' * min(len(spaces[0]) // 4, 6), text, flags=re.MULTILINE)
text = re.sub(' {3,}', '  ', text)
if len(text) < 4_000_000:
    raise UserError(f'{library} has only {len(text):,} characters of Python: install the complete standard library')

frequent = {char for char, count in Counter(text).items() if count >= min_count}
dropped = len(set(text) - frequent)
text = ''.join(char for char in text if char in frequent)
tok = CharTokenizer.of(text)
print(f'{len(names):,} files of Python {platform.python_version()}, {len(text):,} characters, '
      f'{tok.vocab_size} distinct, {dropped} rare ones dropped: {tok.chars!r}')
ids = tok.encode(text)
cut = len(text) * 9 // 10   # the last tenth is for validation
write(Path(__file__).resolve().parent, {'train': ids[:cut], 'val': ids[cut:]}, tok,
      {'text': f'the standard library of Python {platform.python_version()}',
       'sha256': hashlib.sha256(text.encode()).hexdigest()})
