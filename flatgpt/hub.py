"""
Files of the Hugging Face hub, in the cache that its own tools keep: found there, or fetched, verified and put there.

    ~/.cache/huggingface/hub/models--openai-community--gpt2/blobs/<digest>              the files
                                                            /snapshots/<commit>/<name>  links to them, by name
                                                            /refs/main                  a commit
"""

import contextlib
import os
import re
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from flatgpt.download import alone, download
from flatgpt.errors import UserError

ALIASES = {name: f'openai-community/{name}' for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')}


def is_name(text):
    """Whether a text names a repository, 'owner/name' or an alias, with '@revision' or without, and not a path: what
    has a folder here to be in is a path."""
    name, at, revision = str(text).partition('@')
    if os.path.exists(text) or name.endswith(('.pt', '.json', '.safetensors')) or at and not revision:
        return False
    return name in ALIASES or (re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name) is not None
                               and not os.path.exists(name.split('/')[0]))


def cache():
    """The folder of the cache, where the environment says that it is."""
    home = os.environ.get('HF_HOME') or os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'huggingface')
    return Path(os.environ.get('HF_HUB_CACHE') or os.path.join(home, 'hub')).expanduser()


def endpoint():
    return (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')


def identity():
    """The headers that say who asks: the token in HF_TOKEN, or the one that `hf auth login` has left, if any."""
    token, path = os.environ.get('HF_TOKEN'), os.environ.get('HF_TOKEN_PATH') or cache().parent / 'token'
    with contextlib.suppress(OSError):
        token = token or Path(path).expanduser().read_text(encoding='utf-8').strip()
    return {'Authorization': f'Bearer {token}'} if token else {}


def fetch(name, file, kind='models'):
    """The path of a file of a repository, None if the repository has no such file. What the cache has is not looked for
    anew; HF_HUB_OFFLINE=1 asks nobody else. Raises UserError."""
    repo, _, revision = name.partition('@')
    repo, revision = ALIASES.get(repo, repo), revision or 'main'
    folder = cache() / f'{kind}--{repo.replace("/", "--")}'
    ref = folder / 'refs' / revision
    commit = ref.read_text(encoding='utf-8').strip() if ref.exists() else revision
    if (folder / 'snapshots' / commit / file).exists():
        return folder / 'snapshots' / commit / file
    if (folder / '.no_exist' / commit / file).exists():
        return None
    if os.environ.get('HF_HUB_OFFLINE', '').upper() in ('1', 'TRUE', 'YES', 'ON'):
        raise UserError(f'{name}: {file} is not in {folder}, and HF_HUB_OFFLINE forbids to fetch it')
    commit, digest, url = ask(repo, file, commit if ref.exists() else revision, '' if kind == 'models' else f'{kind}/')
    path, blob = folder / 'snapshots' / commit / file, folder / 'blobs' / str(digest)
    try:
        for place in (path if digest else folder / '.no_exist' / commit / file, blob, ref):
            place.parent.mkdir(parents=True, exist_ok=True)
        if commit != revision:
            ref.write_text(commit, encoding='utf-8')
        if not digest:
            (folder / '.no_exist' / commit / file).touch()
            return None
        with alone(blob):   # of several processes one fetches, the others wait for it
            if not blob.exists():
                known = digest if re.fullmatch('[0-9a-f]{40}|[0-9a-f]{64}', digest) else None   # a mirror's own
                download(url, blob, known, headers=identity(), title=file)
            if not path.exists():
                link(blob, path)
    except OSError as error:
        raise UserError(f'cannot write to the cache {folder}: {error.strerror}; HF_HOME says where it is') from None
    return path


def ask(repo, file, revision, prefix):
    """(commit, digest, address) of a file on the hub; digest is None if the repository has no such file."""
    import requests

    url = f'{endpoint()}/{prefix}{repo}/resolve/{revision}/{file}'
    try:
        for _ in range(5):
            answer = requests.head(url, headers={'Accept-Encoding': 'identity', **identity()}, timeout=20)
            moved = answer.headers.get('Location', '')
            if not answer.is_redirect or urlsplit(urljoin(url, moved)).netloc != urlsplit(url).netloc:
                break   # here, or on a server for large files
            url = urljoin(url, moved)   # the repository has another name now
        if answer.status_code == 404 and answer.headers.get('X-Error-Code') == 'EntryNotFound':
            return answer.headers.get('X-Repo-Commit', revision), None, None
        if answer.status_code in (401, 403, 404):
            raise UserError(f'{endpoint()} has no {repo} at {revision}, or not for everyone: check the name, or set '
                            f'HF_TOKEN if it is private or gated')
        answer.raise_for_status()
        digest = (answer.headers.get('X-Linked-Etag') or answer.headers['ETag']).removeprefix('W/').strip('"')
        return answer.headers['X-Repo-Commit'], digest, url
    except (requests.RequestException, KeyError) as error:
        status = f'status {answer.status_code}' if isinstance(error, requests.HTTPError) else type(error).__name__
        raise UserError(f'cannot reach {repo} on {endpoint()} ({status}); without network, put its config.json, '
                        f'model.safetensors and tokenizer.json into a folder and give that folder') from None


def link(blob, path):
    """Let path be the blob, as the hub's own tools do: by a relative link, or where there are none by moving it."""
    try:
        os.symlink(os.path.relpath(blob, path.parent), path)
    except OSError:
        os.replace(blob, path)
