"""
Your own text as a dataset: .txt, .md, .py, .jsonl, .ndjson, .json, .csv, .tsv and .parquet files, also compressed as
.gz or .zst.

    python data/text/prepare.py --input=book.txt --name=book --tokenizer=char
    python data/text/prepare.py --input="notes,src/**/*.c" --name=my_text --tokenizer=bpe:5000 --deduplicate
    python data/text/prepare.py --input=dump.jsonl.zst --field=body --name=/big/disk/dump --tokenizer=gpt2
    python data/text/prepare.py --input="poems/*.json" --template="{title}\\n{lines}" --name=poems --tokenizer=bpe:5000
    python data/text/prepare.py --inspect="你好 world!" --tokenizer=char,gpt2,data/my_text/tokenizer.json
    python train.py --dataset=my_text

A document is a text file, or a record: a line of .jsonl, an entry of the list in a .json, a row of .csv, .tsv or
.parquet. In a .txt, a separator ends a document too. Each document is for training or for validation as a whole, by its
hash. If there are so few that fewer than ten may be for validation, it is the end of the text instead. An end-of-text
token follows each document; a tokenizer that has none puts a line break between documents. The same options give the
same bytes. After an interruption, the same command continues. The report on stdout is in meta.json too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the project, for the imports below

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
# what to read
input = ''                       # comma-separated files, globs (** descends) and folders (.json, .csv, .tsv: by glob)
name = ''                        # the dataset: a folder in data/, or a path, which has a slash
field = 'text'                   # the key of the text in a record; a list of texts is one per line
column = 'text'                  # the column of the text in a .parquet
template = ''                    # the text of a record made of several fields: '{title}\n{text}'
separator = '<|endoftext|>'      # what ends a document in a .txt; empty: nothing does
errors = 'strict'                # invalid UTF-8: 'strict' (stop), 'replace' (by U+FFFD), 'skip' (the document)
deduplicate = False              # leave out documents that are equal to an earlier one
val_fraction = 0.1               # the share of validation
seed = 1337                      # which documents are for validation, and which text a vocabulary is trained on
# how to encode
tokenizer = 'gpt2'               # 'char', 'bpe:5000' (trained here), a tiktoken name, or a file or folder of a model
min_frequency = 2                # bpe:N: how often a pair must occur to become a token
special = ''                     # bpe:N: further special tokens, comma-separated, such as '<pad>,<bos>,<eos>,<unk>'
train_mb = 100.0                 # bpe:N: megabytes of text to train on, an even sample; Chinese counts thirtyfold
# what to show
inspect: str | None = None       # a text: show how each of the comma-separated tokenizers cuts it, and write nothing
color: bool | str = 'auto'       # colour its pieces: True, False, 'auto' (in a terminal)
compare = ''                     # other tokenizers, comma-separated: show their bytes per token on 20 MB of the text
# machine
threads: int | None = None       # that encode, None: one per core; each has its copy of the encoding
save_mb = 64.0                   # megabytes of text between two points where a killed run continues
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

import time

from flatgpt import checkpoint, ingest
from flatgpt.corpus import Corpus, find_files
from flatgpt.errors import UsageError

# check the options

if errors not in ('strict', 'replace', 'skip'):
    raise UsageError(f"errors={errors!r}: expected 'strict', 'replace' or 'skip'")
special_tokens = tuple(token for token in special.split(',') if token)
options = ingest.Options(tokenizer, val_fraction, seed, deduplicate, min_frequency, special_tokens, train_mb, threads,
                         save_mb)
if any(spec == 'char' or spec.startswith('bpe:') for spec in compare.split(',')):
    raise UsageError(f'compare={compare!r}: expected comma-separated tiktoken names, or files or folders of models')
if color not in (True, False, 'auto'):
    raise UsageError(f"color={color!r}: expected 'auto', True or False")

# show how tokenizers cut a text

if inspect is not None:
    colored = sys.stdout.isatty() if color == 'auto' else color
    for spec in tokenizer.split(','):
        if spec.startswith('bpe:'):
            raise UsageError(f'tokenizer={spec!r}: to inspect, give the tokenizer.json of a dataset made with it')
        tok = checkpoint.load_tokenizer(spec, [inspect])
        ids = tok.encode(inspect)
        size = len(inspect.encode(errors='replace'))
        print(f'{spec}: {len(ids):,} tokens, {size / max(len(ids), 1):.2f} bytes per token; vocabulary of '
              f'{tok.vocab_size:,}')
        pieces = []
        for i in ids.tolist():
            text = tok.token_bytes(i).decode(errors='backslashreplace')
            pieces.append(''.join(char if char.isprintable() else char.encode('unicode_escape').decode()
                                  for char in text))
        if colored:   # two backgrounds in turn, so that spaces show
            print(''.join(f'\x1b[30;{43 + 3 * (i % 2)}m{piece}' for i, piece in enumerate(pieces)) + '\x1b[0m')
        else:
            print('|'.join(pieces))
    raise SystemExit(0)

# find the folder

folder = Path(name) if '/' in name else Path(__file__).resolve().parents[1] / name
is_path = '/' in name and folder.name != ''
if not is_path and not name.replace('_', '').replace('-', '').isalnum():
    raise UsageError(f'name={name!r}: expected letters, digits, - and _ for a folder in data/, or a path with a slash')
if (folder / 'prepare.py').exists():
    raise UsageError(f'name={name!r}: data/{folder.name} has a prepare.py of its own, choose another name')

# write the dataset

corpus = Corpus(find_files(input), field=field, column=column, errors=errors, template=template, separator=separator)
others = {spec: checkpoint.load_tokenizer(spec) for spec in compare.split(',') if spec}
start = time.perf_counter()
tok, report = ingest.build(folder, corpus, options, {'input': input})
seconds = time.perf_counter() - start
size = sum(report['bytes'].values())
print(f'{folder}:', *ingest.report_lines(report, tok), sep='\n')
print(f'{size / 1e6:,.1f} MB in {seconds:.1f} s, {size / seconds / 1e6:,.1f} MB/s', file=sys.stderr)

# compare tokenizers on about 20 MB of the text

if others:
    texts = list(ingest.sample(corpus, 20e6 / size, seed, 'reading a sample'))
    num_bytes = sum(len(text.encode()) for text in texts)
    for spec, other in {tokenizer: tok, **others}.items():
        num_tokens = sum(len(other.encode(text)) for text in texts)
        print(f'{spec}: {num_bytes / max(num_tokens, 1):.3f} bytes per token')
