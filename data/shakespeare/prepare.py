"""
Tiny Shakespeare, 1.1 MB of plays, in the byte-pair encoding of GPT-2, for finetuning.

    python data/shakespeare/prepare.py                 downloads the text
    python data/shakespeare/prepare.py --input=PATH    uses a local file
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
from flatgpt.tokenizer import TiktokenTokenizer

folder = Path(__file__).resolve().parent
text, source = tiny_shakespeare(input, folder / 'input.txt')
cut = len(text) * 9 // 10   # the last tenth is for validation
tok = TiktokenTokenizer('gpt2')
write(folder, {'train': tok.encode(text[:cut]), 'val': tok.encode(text[cut:])}, tok, source)
