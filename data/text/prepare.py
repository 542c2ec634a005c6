"""
Your own text as a dataset: files, folders and globs of .txt, .md, .py, .jsonl and .parquet, also packed as .gz or .zst.

    python data/text/prepare.py --input=book.txt --name=book --tokenizer=char
    python data/text/prepare.py --input="notes,src/**/*.c" --name=my_text --tokenizer=bpe:5000 --deduplicate
    python data/text/prepare.py --input=dump.jsonl.zst --field=body --name=/big/disk/dump --tokenizer=gpt2
    python data/text/prepare.py --inspect="你好 world!" --tokenizer=char,gpt2,data/my_text/tokenizer.json
    python train.py --dataset=my_text

A text file is one document, so are a line of .jsonl and a row of .parquet. Each is for training or for validation as a
whole, by its hash, and the end-of-text token stands behind it; a tokenizer without one has a line break between two of
them. Of a single document the end is for validation. The same options give the same bytes. If it is killed, the same
command goes on. stdout has the report, which meta.json has, too.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the parts lie two folders up

import ingest
import tokenizer as tokenizers
from configurator import UsageError, configure
from corpus import Corpus, find_files

# ---------------------------------------------------------------------------------------------------------------------
# what to read
input = ''                       # files, folders and globs, parted by commas; a folder: all known files in and below it
name = ''                        # the dataset: a folder in data/, or a path, which has a slash
field = 'text'                   # what holds the text of a line of .jsonl
column = 'text'                  # what holds the texts of a .parquet
errors = 'strict'                # what is no UTF-8 text: 'strict' (stop), 'replace' (by U+FFFD), 'skip' (the document)
deduplicate = False              # leave out documents that are equal to one before
val_fraction = 0.1               # how many of the documents are for validation
seed = 1337                      # which ones, and what a vocabulary is trained on if there is more than train_mb
# how to encode
tokenizer = 'gpt2'               # 'char', 'bpe:5000' (trained here), the path of a tokenizer.json, a name of tiktoken's
min_frequency = 2                # bpe:N: how often a pair must occur to become a token
special = ''                     # bpe:N: further special tokens, parted by commas, such as '<pad>,<bos>,<eos>,<unk>'
train_mb = 100.0                 # bpe:N: train on an even sample of so many megabytes; Chinese counts thirtyfold
# what to show
inspect: str | None = None       # a text: show how each of the tokenizers, parted by commas, cuts it; write nothing
color: bool | str = 'auto'       # colour its pieces: True, False, 'auto' (in a terminal)
compare = ''                     # other tokenizers, parted by commas: their bytes per token on 20 MB of the same text
rate = False                     # how fast one thread alone encodes, beside how fast all of it was
# machine
threads: int | None = None       # that tokenize, None: one per core; each has its copy of the encoding
save_mb = 64.0                   # megabytes of text between two points from where a killed run goes on
max_file_gb = 4.0                # of ids in one file; what is more goes into the next one
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

# refusals

if errors not in ('strict', 'replace', 'skip'):
    raise UsageError(f"errors={errors!r}: expected 'strict', 'replace' or 'skip'")
ingest.check_options(val_fraction, seed, min_frequency=min_frequency, threads=threads, train_mb=train_mb,
                     save_mb=save_mb, max_file_gb=max_file_gb)
if [spec for spec in compare.split(',') if spec == 'char' or spec.startswith('bpe:')]:
    raise UsageError(f'compare={compare!r}: expected names of tiktoken or paths of tokenizer.json, parted by commas')
if color not in (True, False, 'auto'):
    raise UsageError(f"color={color!r}: expected 'auto', True or False")

# how encodings compare on a text

if inspect is not None:
    colors = sys.stdout.isatty() if color == 'auto' else color
    for spec in tokenizer.split(','):
        if spec.startswith('bpe:'):
            raise UsageError(f'tokenizer={spec!r}: to inspect, give the tokenizer.json of a dataset made with it')
        ids = (tok := tokenizers.make(spec, [inspect])).encode(inspect)
        size = len(inspect.encode(errors='replace'))
        print(f'{spec}: {len(ids):,} tokens of {tok.vocab_size:,}, {size / max(len(ids), 1):.2f} bytes per token')
        pieces = [''.join(char if char.isprintable() else char.encode('unicode_escape').decode()
                          for char in tok.token_bytes(i).decode(errors='backslashreplace')) for i in ids.tolist()]
        if colors:   # two backgrounds by turns, so that blanks show
            print(''.join(f'\x1b[30;{43 + 3 * (i % 2)}m{piece}' for i, piece in enumerate(pieces)) + '\x1b[0m')
        else:
            print('|'.join(pieces))
    raise SystemExit(0)

# where it goes

folder = Path(name) if '/' in name else Path(__file__).resolve().parents[1] / name
if not name or not (folder.name and '/' in name or name.replace('_', '').replace('-', '').isalnum()):
    raise UsageError(f'name={name!r}: expected letters, digits, - and _ for a folder in data/, or a path with a slash')
if (folder / 'prepare.py').exists():
    raise UsageError(f'name={name!r}: data/{folder.name} has a prepare.py of its own, choose another name')

# text to ids

corpus = Corpus(find_files(input), field, column, errors)
others = {spec: tokenizers.make(spec) for spec in compare.split(',') if spec}
t0 = time.perf_counter()
tok, report = ingest.build(folder, corpus, tokenizer, val_fraction, seed, deduplicate, min_frequency,
                           [token for token in special.split(',') if token], int(train_mb * 1e6), threads,
                           int(save_mb * 1e6), int(max_file_gb * 1e9), {'input': input})
dt, size = time.perf_counter() - t0, sum(report['bytes'].values())
print(f'{folder}:')
print('\n'.join(ingest.report_lines(report, tok)))
if others:
    for spec, ratio in ingest.compare(corpus, {tokenizer: tok, **others}, seed=seed).items():
        print(f'{spec}: {ratio:.3f} bytes per token')
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    memory = f', {peak / 1e6:,.0f} MB of memory'
except ImportError:   # Windows
    memory = ''
print(f'{size / 1e6:,.1f} MB in {dt:.1f} s, {size / dt / 1e6:,.1f} MB/s{memory}', file=sys.stderr)
if rate:
    alone = ingest.rate(corpus, tok)
    print(f'one thread alone, encoding only: {alone / 1e6:,.1f} MB/s; all of it was {size / dt / alone:.2f} times as '
          f'fast', file=sys.stderr)
