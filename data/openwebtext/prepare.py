"""
OpenWebText, the open counterpart of GPT-2's training text, in GPT-2's encoding: 8 million documents, 9 billion tokens,
18 GB of ids.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --shards=1 --name=/big/disk/openwebtext    a part of it, in another folder

The .parquet files come from the Hugging Face hub one by one. Each is verified, encoded on all cores while the next one
is downloaded, and then removed. After an interruption, the same command continues. It needs pyarrow. The environment
variables HF_ENDPOINT and HF_TOKEN set another hub and your access token.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the project, for the imports below

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
name: str | None = None             # a path for the dataset, None: this folder
repo = 'Skylion007/openwebtext'     # a dataset on the hub
path = 'plain_text'                 # the folder of its .parquet files
revision = 'refs/convert/parquet'   # the branch on which the hub keeps every dataset as .parquet
column = 'text'                     # the column of the text
shards: int | None = None           # use only the first files, so many, None: all
tokenizer = 'gpt2'                  # a tiktoken name, or that of a model: a file, a folder, a name on the hub
val_fraction = 0.0005               # the share of the documents that are for validation
seed = 1337                         # which documents are for validation
threads: int | None = None          # that encode, None: one per core
save_mb = 1000.0                    # megabytes of text between two points where a killed run continues
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

from flatgpt import ingest

ingest.build_from_hub(Path(__file__).resolve().parent, config)
