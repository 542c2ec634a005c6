"""
FineWeb, web pages picked for training language models, in GPT-2's encoding: the sample of 10 billion tokens.

    python data/fineweb/prepare.py
    python data/fineweb/prepare.py --shards=1 --name=/big/disk/fineweb    a taste of it, in another folder

The .parquet files come from the Hugging Face hub one by one, each verified, tokenized on all cores while the next one
is on its way, and then removed. If it is killed, the same command goes on where it was. HF_ENDPOINT and HF_TOKEN of the
environment name another hub and who asks. It takes pyarrow. The sample is 15 million documents and 20 GB
of ids; --path=sample/100BT is ten times as large.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the parts lie two folders up

import ingest
from configurator import UsageError, configure

# ---------------------------------------------------------------------------------------------------------------------
name: str | None = None          # a path for the dataset, None: this folder
repo = 'HuggingFaceFW/fineweb'
path = 'sample/10BT'             # a folder of it
revision = 'main'
column = 'text'
shards: int | None = None        # take so many files, the first ones, None: all
tokenizer = 'gpt2'               # a name of tiktoken's, or the path of a tokenizer.json
val_fraction = 0.0005            # how many of the documents are for validation
seed = 1337                      # which ones
threads: int | None = None       # that tokenize, None: one per core
save_mb = 1000.0                 # megabytes of text between two points from where a killed run goes on
max_file_gb = 4.0                # of ids in one file; what is more goes into the next one
# ---------------------------------------------------------------------------------------------------------------------
configure(globals())

ingest.check_options(val_fraction, seed, shards=shards, threads=threads, save_mb=save_mb, max_file_gb=max_file_gb)
if tokenizer == 'char' or tokenizer.startswith('bpe:'):
    raise UsageError(f'tokenizer={tokenizer!r}: one that is made of the text would have to read all of it twice; make '
                     f'it of a part with data/text/prepare.py, and give the path of its tokenizer.json')

folder = Path(name) if name else Path(__file__).resolve().parent
tok, report = ingest.build_from_hub(folder, repo, path, revision, shards, column, tokenizer, seed=seed,
                                    val_fraction=val_fraction, threads=threads, save_bytes=int(save_mb * 1e6),
                                    max_bytes=int(max_file_gb * 1e9))
print(f'{folder}:')
print('\n'.join(ingest.report_lines(report, tok)))
