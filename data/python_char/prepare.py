"""
The source code of Python's standard library, as characters: a dataset that every machine already has.

    python data/python_char/prepare.py

It takes the .py files that came with the interpreter which runs this script, in an order that is random but the same
everywhere: by the sha256 of their path. Left out are tests, tables, tools of their own, and what some systems package
apart, so that one version of Python gives one text. Four blanks of indentation become one tab, six at most, and
any other blanks in a row at most two, since a small model loses count of them and has better uses for its context;
characters that occur fewer than a hundred times are dropped.
"""

import hashlib
import platform
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the parts lie two folders up

from configurator import UserError, configure
from dataset import write
from tokenizer import CharTokenizer

LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__', '__phello__', 'encodings',
            'ensurepip', 'idlelib', 'lib2to3', 'distutils', 'pydoc_data', 'tkinter', 'turtledemo', 'venv'}

BUILT = ('_sysconfig', 'config-', 'sitecustomize', 'usercustomize')   # what differs from one build to the next

# ---------------------------------------------------------------------------------------------------------------------
min_count = 100   # a character that occurs less often is dropped
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

library = Path(sysconfig.get_path('stdlib'))
names = [path.relative_to(library).as_posix() for path in library.rglob('*.py')]
names = [name for name in names if not LEFT_OUT & set(name.split('/')) and not name.startswith(BUILT)]
names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
text = '\n\n'.join((library / name).read_text(encoding='utf-8', errors='ignore') for name in names)
text = re.sub('^(?: {4})+', lambda blanks: '\t' * min(len(blanks[0]) // 4, 6), text, flags=re.MULTILINE)
text = re.sub(' {3,}', '  ', text)
if len(text) < 4_000_000:
    raise UserError(f'{library} has only {len(text):,} characters of Python: install the complete standard library')

kept = {char for char, count in Counter(text).items() if count >= min_count}
dropped = len(set(text) - kept)
text = ''.join(char for char in text if char in kept)
tok = CharTokenizer.of(text)
print(f'{len(names):,} files of Python {platform.python_version()}, {len(text):,} characters, '
      f'{tok.vocab_size} distinct, {dropped} rare ones dropped: {tok.chars!r}')
ids = tok.encode(text)
cut = len(text) * 9 // 10   # the last tenth is for validation
write(Path(__file__).resolve().parent, {'train': ids[:cut], 'val': ids[cut:]}, tok,
      {'text': f'the standard library of Python {platform.python_version()}',
       'sha256': hashlib.sha256(text.encode()).hexdigest()})
