"""
Tiny Shakespeare, 1.1 MB of plays, as characters.

    python data/shakespeare_char/prepare.py                 downloads the text
    python data/shakespeare_char/prepare.py --input=PATH    uses a local file
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the project, for the imports below

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
input: str | None = None   # a text file, None: input.txt beside this script, downloaded if it is missing
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

from flatgpt.dataset import write
from flatgpt.hub import tiny_shakespeare
from flatgpt.tokenizer import CharTokenizer

folder = Path(__file__).resolve().parent
text, source = tiny_shakespeare(input, folder / 'input.txt')
tok = CharTokenizer.of(text)
print(f'{len(text):,} characters, {tok.vocab_size} distinct: {tok.chars!r}')
ids = tok.encode(text)
cut = len(text) * 9 // 10   # the last tenth is for validation
write(folder, {'train': ids[:cut], 'val': ids[cut:]}, tok, source)
