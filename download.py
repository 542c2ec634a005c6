"""
One file over http(s), safely: a progress bar, time-outs, resumed after an interruption, verified before it is used.
"""

import hashlib
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from configurator import UserError
from tokenizer import read_text


def sha256_of(path):
    """The sha256 of a file, as 64 hex digits."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def download(url, path, sha256=None, attempts=3, timeout=20):
    """Fetch url into path, where it appears whole or not at all.

    What has arrived lies in path.part, from where the next attempt, or the next call, goes on. sha256: the expected
    digest, checked when given. timeout: seconds without a byte before an attempt is given up. Raises UserError.
    """
    import requests

    path, part = Path(path), Path(f'{path}.part')
    for attempt in range(attempts):
        if attempt:
            time.sleep(attempt)
        try:
            fetch_rest(requests, url, part, timeout)
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else None
            if status == 416:   # nothing there beyond what we have: it is whole, or not a beginning of this file
                if sha256 and part.exists() and sha256_of(part) == sha256:
                    break
                part.unlink(missing_ok=True)
            elif status is not None and 400 <= status < 500 and status != 429 or attempt == attempts - 1:
                reason = f'status {status} {error.response.reason}' if status else type(error).__name__
                raise UserError(f'cannot download {url}: {reason}') from None
        except OSError as error:
            raise UserError(f'cannot write {part}: {error.strerror}') from None
    else:
        raise UserError(f'cannot download {url}: the server does not let it be resumed')
    if sha256 and sha256_of(part) != sha256:
        part.unlink()
        raise UserError(f'{url} is not what it should be, its sha256 is not {sha256[:16]}...: thrown away')
    os.replace(part, path)


def fetch_rest(requests, url, part, timeout):
    """Append to the file part what it lacks of url, or all of it if the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    headers = {'Accept-Encoding': 'identity', **({'Range': f'bytes={have}-'} if have else {})}   # bytes as they are
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        answer.raise_for_status()
        have = have if answer.status_code == 206 else 0
        size = int(answer.headers.get('Content-Length', 0)) + have
        with open(part, 'ab' if have else 'wb') as f, tqdm(
            desc=part.stem, total=size or None, initial=have, unit='B', unit_scale=True, leave=False, disable=None
        ) as bar:
            for chunk in answer.iter_content(1 << 16):
                f.write(chunk)
                bar.update(len(chunk))


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
