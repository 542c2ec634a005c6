"""
Files from elsewhere: of the Hugging Face hub by its own library, and tiny Shakespeare by its URL.

The library's cache, token (`hf auth login` or HF_TOKEN), mirror (HF_ENDPOINT) and offline switch (HF_HUB_OFFLINE=1)
count. What the library does not resume, and a plain URL, starts again after an interruption.
"""

import contextlib
import hashlib
import os
import re
import sys
from pathlib import Path

from flatgpt.errors import UserError
from flatgpt.tokenizer import read_text

ALIASES = {name: f'openai-community/{name}' for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')}
# {folder that a recipe starts from: the repository that it is a download of}
FOLDERS = {'smollm2': 'HuggingFaceTB/SmolLM2-135M', 'smollm2-instruct': 'HuggingFaceTB/SmolLM2-135M-Instruct'}
SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def is_name(text: str) -> bool:
    """Whether a text names a repository of the hub, 'owner/name' or an alias such as 'gpt2', with '@revision' or
    without. What exists here, or would be in a folder that exists here, is a path."""
    name, at, revision = str(text).partition('@')
    if os.path.exists(text) or name.endswith(('.pt', '.json', '.safetensors')) or (at and not revision):
        return False
    looks_like_one = re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name) is not None
    return name in ALIASES or (looks_like_one and not os.path.exists(name.split('/')[0]))


def snapshot(name: str, *patterns: str) -> Path:
    """The folder, in the cache, of a model's repository, with the files that match patterns. Without network it has
    what the cache has. name: 'owner/name[@revision]' or an alias. Raises UserError."""
    from huggingface_hub import errors, snapshot_download

    repo, _, revision = name.partition('@')
    repo = ALIASES.get(repo, repo)
    options = {'repo_id': repo, 'revision': revision or 'main', 'ignore_patterns': '*/*'}
    with one_line_errors(repo, '' if repo in ALIASES.values() else f'there is no folder {name} here, and '):
        try:
            return Path(snapshot_download(**options, allow_patterns=patterns))
        except errors.LocalEntryNotFoundError:   # no network, and not all files are here
            return Path(snapshot_download(**options, allow_patterns='config.json', local_files_only=True))


def dataset_files(repo: str, folder: str, revision: str = 'main') -> list[dict]:
    """[{'path', 'size', 'sha256'}] of the .parquet files of a dataset on the hub below a folder, by path; sha256 may be
    None. Raises UserError, also if there are none."""
    from huggingface_hub import HfApi

    with one_line_errors(repo):
        entries = list(HfApi().list_repo_tree(repo, folder, recursive=True, revision=revision, repo_type='dataset'))
    files = [{'path': entry.path, 'size': entry.size, 'sha256': entry.lfs and entry.lfs.sha256}
             for entry in entries if hasattr(entry, 'size') and entry.path.endswith('.parquet')]
    if not files:
        raise UserError(f'{repo} has no .parquet in {folder!r} of revision {revision}: expected another path')
    return sorted(files, key=lambda file: file['path'])


def dataset_file(repo: str, revision: str, file: dict, folder: Path) -> Path:
    """The path of a file of dataset_files() in a local folder, downloaded and verified. Raises UserError."""
    from huggingface_hub import hf_hub_download

    with one_line_errors(repo):
        path = Path(hf_hub_download(repo, file['path'], repo_type='dataset', revision=revision, local_dir=folder))
    if file['sha256'] and sha256_of(path) != file['sha256']:
        path.unlink()
        raise UserError(f'{repo}/{file["path"]}: the sha256 is not {file["sha256"][:16]}...: removed, try again')
    return path


@contextlib.contextmanager
def one_line_errors(repo, before=''):
    """Turn what huggingface_hub raises in the block into a UserError."""
    from huggingface_hub import constants, errors

    place = f'{constants.ENDPOINT}/{repo}'
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):   # a gated one is a repository not found
        raise UserError(f'{before}no {place} that you can read: check name and revision; if it is gated or private, '
                        f'accept its terms there and set HF_TOKEN') from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(f'{before}{repo} is not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot '
                        f'be reached or HF_HUB_OFFLINE is set; without network give a folder that has its config.json, '
                        f'model.safetensors and tokenizer.json') from None
    except Exception as error:   # its HTTP client is another one in each major version
        if isinstance(error, OSError) and error.errno:
            raise UserError(f'cannot use {error.filename or constants.HF_HUB_CACHE}: {error.strerror}; HF_HOME says '
                            f'where the cache is') from None
        raise UserError(f'cannot get {place}: {type(error).__name__} {" ".join(str(error).split())[:200]}') from None


def sha256_of(path) -> str:
    """The sha256 of a file, as 64 hex digits."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def tiny_shakespeare(given: str | None, path: Path) -> tuple[str, dict]:
    """(text, source for meta.json) of a given file, or of tiny Shakespeare, which is downloaded to path if it is not
    there. A notice tells when it is another text. Raises UserError."""
    if not given and not path.exists():
        download(SHAKESPEARE, path, SHAKESPEARE_SHA256)
    text, digest = read_text(given or path), sha256_of(given or path)
    known = digest == SHAKESPEARE_SHA256
    if not known:
        print(f'{given or path} is not tiny Shakespeare (sha256 {digest[:16]}...): used as it is', file=sys.stderr)
    return text, {'path': Path(given or path).name, 'url': SHAKESPEARE if known else None, 'sha256': digest}


def download(url: str, path: Path, sha256: str):
    """Download a small file to path, where it appears whole and verified or not at all. Raises UserError."""
    import requests

    new = path.with_name(f'{path.name}.part')
    try:
        answer = requests.get(url, timeout=20)
        answer.raise_for_status()
        if hashlib.sha256(answer.content).hexdigest() != sha256:
            raise UserError(f'{url}: the sha256 is not {sha256[:16]}...: nothing is kept')
        new.write_bytes(answer.content)
        os.replace(new, path)
    except requests.RequestException as error:
        raise UserError(f'cannot download {url} ({type(error).__name__}); without network give --input=PATH or put it '
                        f'at {path}, or use the dataset that needs none: python data/python_char/prepare.py') from None
    except OSError as error:
        raise UserError(f'cannot write {new}: {error.strerror}') from None
