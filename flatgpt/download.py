"""
Files over http(s), safely: a progress bar, time-outs, resumed after an interruption, verified before they are used.
"""

import contextlib
import email.utils
import hashlib
import json
import os
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

from tqdm import tqdm

from flatgpt.errors import UserError
from flatgpt.tokenizer import read_text


def sha256_of(path):
    """The sha256 of a file, as 64 hex digits."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def git_sha1_of(path):
    """The name that git has for the content of a file: the sha1 of its length and its bytes, as 40 hex digits."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@contextlib.contextmanager
def alone(path):
    """Wait until no other process on this machine is in such a block for this path."""
    lock = Path(f'{path}.lock')
    with open(lock, 'w') as f:
        with contextlib.suppress(ImportError, OSError):   # Windows, or a file system without locks
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


LONGEST_WAIT = 300   # seconds, whatever a server asks for
PATIENT = 8          # attempts, for what takes hours in all


def download(url, path, digest=None, attempts=3, timeout=20, size=None, headers=None, title=None):
    """Fetch url into path, where it appears whole or not at all.

    What has arrived is in path.part, from where the next attempt, or the next call, goes on. digest (sha256, or git's
    sha1) and size (bytes): what is expected, checked when given. timeout: seconds without a byte before an attempt is
    given up. A server that has too much to do is asked again when it says. headers: {name: value} to send along. title:
    of the progress bar. Returns the addresses that the answer links to, by their relation. Raises UserError.
    """
    import requests

    path, part, title = Path(path), Path(f'{path}.part'), title or Path(path).name
    wait, reason, links = 0, '', {}
    digest_of = git_sha1_of if digest and len(digest) == 40 else sha256_of
    for attempt in range(attempts):
        if attempt:
            wait = max(attempt, wait)
            print(f'{title}: {reason}, once more in {wait:.0f} s', file=sys.stderr)
            time.sleep(wait)
        try:
            links = fetch_rest(requests, url, part, timeout, size, headers or {}, title)
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else None
            wait = retry_after(error.response)
            reason = f'status {status} {error.response.reason}' if status else type(error).__name__
            if status == 416:   # nothing there beyond what we have: it is whole, or not a beginning of this file
                if digest and part.exists() and digest_of(part) == digest:
                    break
                part.unlink(missing_ok=True)
            elif status is not None and 400 <= status < 500 and status != 429 or attempt == attempts - 1:
                raise UserError(f'cannot download {url}: {reason}') from None
        except OSError as error:
            raise UserError(f'cannot write {part}: {error.strerror}') from None
    else:
        raise UserError(f'cannot download {url}: the server does not let it be resumed')
    if size is not None and part.stat().st_size != size:
        there = part.stat().st_size
        part.unlink()
        raise UserError(f'{url} is not what it should be, it has {there:,} bytes instead of {size:,}: thrown away')
    if digest and digest_of(part) != digest:
        part.unlink()
        raise UserError(f'{url} is not what it should be, its digest is not {digest[:16]}...: thrown away')
    os.replace(part, path)
    return links


def retry_after(answer):
    """The seconds that an answer asks one to wait, in either of its two forms, 0 if it does not."""
    asked = answer.headers.get('Retry-After', '') if answer is not None else ''
    try:
        wait = float(asked) if asked.isdecimal() else email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0
    return min(max(wait, 0), LONGEST_WAIT)


def fetch_rest(requests, url, part, timeout, expected, more, title):
    """Append to the file part what it lacks of url, or all of it if the server cannot resume. Returns {relation: url}
    of the links of the answer."""
    have = part.stat().st_size if part.exists() else 0
    headers = {**more, 'Accept-Encoding': 'identity', **({'Range': f'bytes={have}-'} if have else {})}   # bytes as are
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        answer.raise_for_status()
        have = have if answer.status_code == 206 else 0
        size = int(answer.headers.get('Content-Length', 0)) + have
        if expected is not None and size > expected:   # before hours have gone into it
            part.unlink(missing_ok=True)
            raise UserError(f'{url} is not what it should be, it has {size:,} bytes instead of {expected:,}')
        with open(part, 'ab' if have else 'wb') as f, tqdm(
            desc=title, total=size or None, initial=have, unit='B', unit_scale=True, leave=False, disable=None
        ) as bar:
            for chunk in answer.iter_content(1 << 16):
                f.write(chunk)
                bar.update(len(chunk))
        return {relation: link['url'] for relation, link in answer.links.items()}


def text_of(given, path, url, sha256):
    """(text, where it came from) for a dataset of one text: of the file `given`, else of the file at path, which is
    downloaded from url if it is not there. A text other than the known one is used, and said to be another."""
    source = given or path
    if not given and not path.exists():
        try:
            download(url, path, sha256)
        except UserError as error:
            raise UserError(f'{error}; without network, get the text some other way and give --input=PATH or put it at '
                            f'{path}, or use the dataset that needs none: python data/python_char/prepare.py') from None
    text, digest = read_text(source), sha256_of(source)
    if digest != sha256:
        print(f'{source} is not the text of {url} (its sha256 is {digest[:16]}...), taken as it is', file=sys.stderr)
    return text, {'path': Path(source).name, 'url': url if digest == sha256 else None, 'sha256': digest}


# ---------------------------------------------------------------------------------------------------------------------
# the Hugging Face hub: datasets as files, no code of theirs

def hub():
    """(address, headers) of the hub: HF_ENDPOINT and HF_TOKEN of the environment, if they are set."""
    token = os.environ.get('HF_TOKEN')
    return (os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/'), \
        {'Authorization': f'Bearer {token}'} if token else {}


def hub_files(repo, folder, revision='main', suffix='.parquet'):
    """[{'path', 'size', 'sha256', 'url'}] of the files of a dataset of the hub in a folder or below it, by path.
    UserError if it cannot be asked, or has none of that suffix."""
    endpoint, headers = hub()
    revision = urllib.parse.quote(revision, safe='')
    url, entries = f'{endpoint}/api/datasets/{repo}/tree/{revision}/{folder}?recursive=1', []
    with tempfile.TemporaryDirectory() as temporary:
        while url:   # page by page
            links = download(url, Path(temporary) / 'tree.json', attempts=PATIENT, headers=headers)
            try:
                page = json.loads((Path(temporary) / 'tree.json').read_bytes())
                entries += [(entry['path'], entry['size'], entry.get('lfs', {}).get('oid')) for entry in page
                            if entry['type'] == 'file' and entry['path'].endswith(suffix)]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f'{url}: expected a list of files, is HF_ENDPOINT={endpoint} right?') from None
            url = links.get('next')
            if url and not url.startswith(f'{endpoint}/'):   # where HF_TOKEN does not belong
                raise UserError(f'{endpoint} sends on to {url}: is HF_ENDPOINT right?')
    if not entries:
        raise UserError(f'{repo} has no {suffix} in {folder!r}: look at {endpoint}/datasets/{repo}/tree/{revision}')
    return [{'path': path, 'size': size, 'sha256': sha256,
             'url': f'{endpoint}/datasets/{repo}/resolve/{revision}/{urllib.parse.quote(path)}'}
            for path, size, sha256 in sorted(entries)]
