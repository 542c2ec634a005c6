"""Downloads, from a server on this machine that misbehaves as it is told."""

import email.utils
import gzip
import hashlib
import json
import os
import random
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import needs

from flatgpt import download as module
from flatgpt.download import download, sha256_of, text_of
from flatgpt.errors import UserError

TEXT = ''.join(f'line {i}: {i * i}\n' for i in range(20_000)).encode()   # several chunks
SHA256 = hashlib.sha256(TEXT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` at every address, or if there are `files`, {address: content or (content, headers)}, those.
    `faults` holds what to do wrong, one for each coming request: a status, (status, headers), 'cut' (the connection
    ends after half of what was asked for), 'stall' (it stays open, but nothing more comes)."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.content, self.faults, self.resumable, self.packs = TEXT, [], True, False
        self.files, self.paths, self.tokens = None, [], set()
        self.asked = []   # the Range header of each request, or None
        self.sent = []    # up to which byte each was answered
        self.over, self.waited_out = threading.Event(), False

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}/text'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get('Range')
        server.asked.append(wanted)
        fault = server.faults.pop(0) if server.faults else None
        server.paths.append(self.path)
        server.tokens.add(self.headers.get('Authorization'))
        more = {}
        if isinstance(fault, tuple):
            self.send_response(fault[0])
            for name, value in fault[1].items():
                self.send_header(name, value)
            self.send_header('Content-Length', '0')
            return self.end_headers()
        if isinstance(fault, int):
            return self.send_error(fault)
        content, packed = server.content, server.packs and 'gzip' in self.headers.get('Accept-Encoding', '')
        if server.files is not None:
            if self.path not in server.files:
                return self.send_error(404)
            content = server.files[self.path]
            content, more = content if isinstance(content, tuple) else (content, {})
        if packed:
            content = gzip.compress(content, mtime=0)
        start = int(re.fullmatch(r'bytes=(\d+)-', wanted)[1]) if wanted and server.resumable else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if packed:
            self.send_header('Content-Encoding', 'gzip')
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        for name, value in more.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        end = (start + len(content)) // 2 if fault in ('cut', 'stall') else len(content)
        server.sent.append(end)
        self.wfile.write(content[start:end])
        if fault == 'stall':
            server.waited_out = not server.over.wait(5)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '*')
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses between attempts, which are not made."""
    made = []
    monkeypatch.setattr(module.time, 'sleep', made.append)
    return made


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'text.txt'


def whole(path, content=TEXT):
    """Whether path holds the content and there is no other file beside it."""
    return path.read_bytes() == content and os.listdir(path.parent) == [path.name]


def nothing(path):
    return os.listdir(path.parent) == []


def resumed(server, requests):
    """Whether there were so many requests, each for what the one before it left out, give or take a chunk."""
    starts = [int(asked[6:-1]) for asked in server.asked[1:]]
    return server.asked[0] is None and len(server.asked) == requests and \
        all(end - 2 ** 16 < start <= end for start, end in zip(starts, server.sent))


# ---------------------------------------------------------------------------------------------------------------------
# a server that works, and one that recovers

@pytest.mark.parametrize('known', [True, False], ids=['digest', 'no digest'])
@pytest.mark.parametrize('content', [TEXT, b''], ids=['text', 'nothing'])
def test_a_file_arrives_whole(server, path, content, known):
    server.content = content
    download(server.url, path, hashlib.sha256(content).hexdigest() if known else None)
    assert whole(path, content)
    assert server.asked == [None]


def test_a_file_that_is_there_is_replaced(server, path):
    path.write_text('old')
    download(server.url, str(path), SHA256)
    assert whole(path)


def test_a_cut_connection_is_taken_up_where_it_ended(server, path, pauses):
    server.faults = ['cut', 'cut']
    download(server.url, path, SHA256)
    assert resumed(server, 3)
    assert whole(path)
    assert pauses == [1, 2]


def test_the_next_call_goes_on_where_the_last_one_gave_up(server, path):
    server.faults = ['cut', 500, 500]
    with pytest.raises(UserError, match='status 500'):
        download(server.url, path, SHA256)
    assert os.listdir(path.parent) == ['text.txt.part']   # the file itself appears only when it is whole
    download(server.url, path, SHA256)
    assert server.asked[1] == server.asked[2] == server.asked[3]
    assert 0 <= server.sent[0] - int(server.asked[3][6:-1]) < 2 ** 16
    assert whole(path)


def test_a_server_that_cannot_resume_sends_all_again(server, path):
    server.faults, server.resumable = ['cut'], False
    download(server.url, path, SHA256)
    assert resumed(server, 2)
    assert whole(path)


def test_a_server_that_compresses_for_whoever_allows_it_can_be_resumed(server, path):
    """A range counts the bytes that travel, so what travels must be the bytes of the file."""
    server.content = random.Random(0).randbytes(200_000).hex().encode()   # little shorter when compressed
    server.faults, server.packs = ['cut'], True
    download(server.url, path)
    assert whole(path, server.content)


@pytest.mark.parametrize('status', [500, 502, 503, 429])
def test_a_passing_trouble_of_the_server_is_waited_out_and_told(server, path, pauses, status, capsys):
    server.faults = [status, status]
    download(server.url, path, SHA256)
    assert whole(path)
    assert len(server.asked) == 3
    assert pauses == [1, 2]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all(f'text.txt: status {status} ' in line for line in told)
    assert told[1].endswith('once more in 2 s')


@pytest.mark.parametrize('left, sha256', [(TEXT + b'more', SHA256), (b'x' * 10 * len(TEXT), SHA256), (TEXT, None)],
                         ids=['more', 'much more', 'all but nobody knows'])
def test_a_remainder_that_has_no_rest_is_fetched_anew(server, path, left, sha256):
    path.with_name('text.txt.part').write_bytes(left)
    download(server.url, path, sha256)
    assert server.asked == [f'bytes={len(left)}-', None]
    assert whole(path)


def test_a_remainder_that_is_the_whole_file_is_not_fetched_again(server, path):
    path.with_name('text.txt.part').write_bytes(TEXT)
    download(server.url, path, SHA256)
    assert server.asked == [f'bytes={len(TEXT)}-']
    assert whole(path)


def test_a_remainder_of_another_file_is_found_out_and_does_not_stay(server, path):
    path.with_name('text.txt.part').write_bytes(b'something else')
    with pytest.raises(UserError, match='its digest is not'):
        download(server.url, path, SHA256)
    assert nothing(path)
    download(server.url, path, SHA256)
    assert whole(path)


# ---------------------------------------------------------------------------------------------------------------------
# a server that does not

@pytest.mark.parametrize(('status', 'reason'), [(404, 'Not Found'), (403, 'Forbidden'), (410, 'Gone')])
def test_a_file_that_is_not_there_is_not_asked_for_again(server, path, status, reason):
    server.faults = [status] * 3
    with pytest.raises(UserError) as refusal:
        download(server.url, path, SHA256)
    assert str(refusal.value) == f'cannot download {server.url}: status {status} {reason}'
    assert len(server.asked) == 1
    assert nothing(path)


def test_a_server_in_lasting_trouble_is_given_up(server, path):
    server.faults = [503] * 9
    with pytest.raises(UserError, match='status 503'):
        download(server.url, path, SHA256, attempts=4)
    assert len(server.asked) == 4
    assert nothing(path)


@pytest.mark.parametrize('begun', [True, False])
def test_a_server_that_never_finds_the_range_is_given_up(server, path, begun):
    if begun:
        path.with_name('text.txt.part').write_bytes(TEXT[:100])
    server.faults = [416] * 9
    with pytest.raises(UserError, match='cannot download'):
        download(server.url, path, SHA256)
    assert len(server.asked) <= 3
    assert nothing(path)


@pytest.mark.parametrize('content', [TEXT[:-1], TEXT + b'\n', b'<html>log in first</html>'],
                         ids=['shorter', 'longer', 'page'])
def test_another_content_is_refused_and_thrown_away(server, path, content):
    server.content = content
    with pytest.raises(UserError) as refusal:
        download(server.url, path, SHA256)
    assert server.url in str(refusal.value) and SHA256[:16] in str(refusal.value)
    assert nothing(path)


def test_another_content_leaves_the_file_that_was_there(server, path):
    path.write_bytes(b'old')
    server.content = b'new'
    with pytest.raises(UserError):
        download(server.url, path, SHA256)
    assert whole(path, b'old')


def test_a_server_that_falls_silent_is_left_after_the_timeout_and_asked_again(server, path):
    server.faults = ['stall']
    download(server.url, path, SHA256, timeout=0.1)
    assert not server.waited_out
    assert resumed(server, 2)
    assert whole(path)


def test_a_server_that_stays_silent_is_given_up(server, path):
    server.faults = ['stall', 'stall']
    with pytest.raises(UserError, match='cannot download'):
        download(server.url, path, SHA256, attempts=2, timeout=0.1)
    assert not server.waited_out
    assert os.listdir(path.parent) == ['text.txt.part']


@pytest.fixture
def nobody(monkeypatch):
    """An address at which nobody listens."""
    monkeypatch.setenv('NO_PROXY', '*')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))   # and, without listen(), refuses
        yield f'http://127.0.0.1:{s.getsockname()[1]}/text'


def test_nobody_there_is_one_line(nobody, path, pauses):
    with pytest.raises(UserError) as refusal:
        download(nobody, path)
    assert str(refusal.value) == f'cannot download {nobody}: ConnectionError'
    assert pauses == [1, 2]
    assert nothing(path)


@pytest.mark.parametrize('url', ['text', 'ftp://127.0.0.1/text', 'http://'])
def test_an_address_that_is_none_is_one_line(path, url):
    with pytest.raises(UserError, match='cannot download'):
        download(url, path)
    assert nothing(path)


def test_a_folder_that_is_not_there_is_one_line(server, tmp_path):
    with pytest.raises(UserError) as refusal:
        download(server.url, tmp_path / 'nowhere' / 'text.txt')
    assert str(refusal.value) == f'cannot write {tmp_path / "nowhere" / "text.txt.part"}: No such file or directory'
    assert len(server.asked) == 1   # trying again would not help


@needs('full_disk')
def test_a_full_disk_is_one_line(server, path):
    path.with_name('text.txt.part').symlink_to('/dev/full')
    with pytest.raises(UserError) as refusal:
        download(server.url, path)
    assert str(refusal.value) == f'cannot write {path}.part: No space left on device'
    assert not path.exists()


# ---------------------------------------------------------------------------------------------------------------------
# sizes, and servers that say when to come back

def test_a_file_of_the_expected_size_arrives(server, path):
    server.faults = ['cut']
    download(server.url, path, SHA256, size=len(TEXT))
    assert whole(path)


@pytest.mark.parametrize(('content', 'left'), [(TEXT[:-1], b''), (TEXT + b'x', b''), (TEXT[:-1], TEXT[:100])],
                         ids=['shorter', 'longer', 'begun'])
def test_a_file_of_another_size_is_refused_and_thrown_away(server, path, content, left):
    server.content = content
    if left:
        path.with_name('text.txt.part').write_bytes(left)
    with pytest.raises(UserError) as refusal:
        download(server.url, path, size=len(TEXT))
    assert f'it has {len(content):,} bytes instead of {len(TEXT):,}' in str(refusal.value)
    assert nothing(path)


@pytest.mark.parametrize(('asked', 'waited'), [('7', 7), ('0', 1), ('99999', 300), ('soon', 1), ('-5', 1),
                                               ('Wed, 21 Oct 2015 07:28:00 GMT', 1), ('', 1)])
@pytest.mark.parametrize('status', [429, 503])
def test_a_server_is_asked_again_when_it_says_within_reason(server, path, pauses, status, asked, waited):
    server.faults = [(status, {'Retry-After': asked})]
    download(server.url, path, SHA256)
    assert whole(path) and pauses == [waited]


def test_a_server_may_say_the_time_of_day(server, path, pauses):
    server.faults = [(429, {'Retry-After': email.utils.formatdate(time.time() + 60, usegmt=True)})]
    download(server.url, path, SHA256)
    assert whole(path) and 50 < pauses[0] <= 60


# ---------------------------------------------------------------------------------------------------------------------
# the hub

TREE = '/api/datasets/some/data/tree/main/sample?recursive=1'


def entry(path, size=3, **more):
    return {'type': 'file', 'path': path, 'size': size, 'oid': 'x', **more}


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}/')
    monkeypatch.delenv('HF_TOKEN', raising=False)
    return server


def test_files_of_the_hub_are_listed_page_by_page_in_order_with_size_and_digest(hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    one = [entry('sample/b c.parquet', 7, lfs={'oid': 'ab', 'size': 7}), entry('sample/x.json'),
           {'type': 'directory', 'path': 'sample/d.parquet', 'size': 0}]
    link = f'<http://127.0.0.1:{hub.server_port}/page2>; rel="next"'
    hub.files = {TREE: (json.dumps(one).encode(), {'Link': link}),
                 '/page2': json.dumps([entry('sample/a.parquet', 9)]).encode()}
    hub.faults = [429, 'cut']
    at = f'http://127.0.0.1:{hub.server_port}/datasets/some/data/resolve/main/sample'
    assert module.hub_files('some/data', 'sample') == [
        {'path': 'sample/a.parquet', 'size': 9, 'sha256': None, 'url': f'{at}/a.parquet'},
        {'path': 'sample/b c.parquet', 'size': 7, 'sha256': 'ab', 'url': f'{at}/b%20c.parquet'}]
    assert hub.tokens == {'Bearer hf_secret'}


def test_another_branch_of_the_hub_is_one_word_of_the_address(hub):
    hub.files = {TREE.replace('main', 'refs%2Fconvert%2Fparquet'): json.dumps([entry('sample/a.parquet')]).encode()}
    (file,) = module.hub_files('some/data', 'sample', 'refs/convert/parquet')
    assert '/resolve/refs%2Fconvert%2Fparquet/sample/' in file['url'] and hub.tokens == {None}


@pytest.mark.parametrize(('files', 'words'), [
    ({}, 'status 404'), ({TREE: b'<html>'}, 'expected a list of files'), ({TREE: b'[7]'}, 'expected a list of files'),
    ({TREE: b'{"error": "x"}'}, 'expected a list of files'), ({TREE: b'[]'}, "has no .parquet in 'sample'"),
    ({TREE: (json.dumps([]).encode(), {'Link': '<http://elsewhere.example/x>; rel="next"'})}, 'sends on to'),
])
def test_a_hub_that_has_no_list_of_files_is_refused(hub, files, words):
    hub.files = files
    with pytest.raises(UserError, match=words) as refusal:
        module.hub_files('some/data', 'sample')
    assert '\n' not in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# the text of a dataset

def test_digest_of_a_file_is_that_of_its_bytes(path):
    path.write_bytes(TEXT)
    assert sha256_of(path) == SHA256


KNOWN = {'path': 'text.txt', 'sha256': SHA256}


def test_text_is_downloaded_once_and_then_taken_from_its_place(server, path, capsys):
    for _ in range(2):
        assert text_of(None, path, server.url, SHA256) == (TEXT.decode(), {**KNOWN, 'url': server.url})
    assert server.asked == [None]
    assert capsys.readouterr() == ('', '')


def test_a_given_file_is_taken_without_a_download(server, path, tmp_path, capsys):
    given = tmp_path / 'mine.txt'
    given.write_bytes(TEXT)
    expected = (TEXT.decode(), {'path': 'mine.txt', 'url': server.url, 'sha256': SHA256})
    assert text_of(str(given), path, server.url, SHA256) == expected
    path.write_text('what is in place does not matter then')
    assert text_of(str(given), path, server.url, SHA256) == expected
    assert server.asked == []
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('where', ['given', 'in place'])
def test_another_text_is_taken_as_it_is_with_a_notice(nobody, path, tmp_path, capsys, where):
    file = path if where == 'in place' else tmp_path / 'mine.txt'
    file.write_bytes('Wörter\r\n'.encode())
    digest = hashlib.sha256('Wörter\r\n'.encode()).hexdigest()
    text, source = text_of(None if where == 'in place' else str(file), path, nobody, SHA256)
    assert text == 'Wörter\r\n'
    assert source == {'path': file.name, 'url': None, 'sha256': digest}
    out, err = capsys.readouterr()
    assert out == ''
    assert str(file) in err and nobody in err and digest[:16] in err and err.count('\n') == 1


def test_without_network_the_error_names_three_ways_out(nobody, path):
    with pytest.raises(UserError) as refusal:
        text_of(None, path, nobody, SHA256)
    message = str(refusal.value)
    for word in (nobody, '--input=PATH', str(path), 'python data/python_char/prepare.py'):
        assert word in message
    assert '\n' not in message
    assert refusal.value.status == 1


@pytest.mark.parametrize(('content', 'word'), [(None, 'No such file'), (b'\xff\xfe', 'not UTF-8')])
def test_a_given_file_that_cannot_be_read_is_one_line(nobody, path, tmp_path, content, word):
    given = tmp_path / 'mine.txt'
    if content:
        given.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        text_of(str(given), path, nobody, SHA256)
    assert str(given) in str(refusal.value) and word in str(refusal.value)
