"""Files of the hub, from a server on this machine that speaks the few routes that huggingface_hub asks for."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from flatgpt import hub
from flatgpt.errors import UserError

COMMIT = 'c' * 40
WEIGHTS = b'weights ' * 5_000


class Hub(ThreadingHTTPServer):
    """Serves {repository: {file: content}} as the hub does, models and datasets alike. faults: what to do wrong, one
    for each coming download: a status, 'cut' (the connection ends half way), 'wrong' (other bytes)."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repos = {'owner/name': {'config.json': b'{}', 'model.safetensors': WEIGHTS, 'sub/other.json': b'{}'}}
        self.faults, self.asked, self.gated, self.tokens = [], [], set(), set()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'

    def downloads(self):
        """The files that were asked for, in order."""
        return [path.split('/resolve/')[1].split('/', 1)[1] for command, path in self.asked
                if command == 'GET' and '/resolve/' in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def answer(self, status, content=b'', **headers):
        self.send_response(status)
        for name, value in {'Content-Length': len(content), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(content)

    def do_GET(self):
        server, path = self.server, urllib.parse.unquote(self.path.partition('?')[0])
        server.asked.append((self.command, self.path))
        server.tokens.add(self.headers.get('Authorization'))
        api = re.fullmatch(
            r'/api/(?:models|datasets)/([^/]+/[^/]+)/(revision|tree)/(refs/convert/parquet|[^/]+)(?:/(.*))?', path)
        file = re.fullmatch(r'(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        if path == '/text':
            return self.send_content(server.repos['text'])
        repo, revision = (api[1], api[3]) if api else (file[1], file[2]) if file else (None, None)
        if repo not in server.repos:
            return self.answer(404, X_Error_Code='RepoNotFound')
        if repo in server.gated and not self.headers.get('Authorization'):
            return self.answer(403, X_Error_Code='GatedRepo')
        if revision not in ('main', 'v1', 'refs/convert/parquet', COMMIT):
            return self.answer(404, X_Error_Code='RevisionNotFound')
        files = server.repos[repo]
        if api and api[2] == 'revision':
            return self.answer(200, json.dumps({'id': repo, 'sha': COMMIT, 'siblings': [
                {'rfilename': name} for name in files]}).encode(), Content_Type='application/json')
        if api:
            below = [name for name in files if name.startswith(f'{api[4]}/' if api[4] else '')]
            return self.answer(200, json.dumps([
                {'type': 'directory', 'path': 'x.parquet', 'oid': 'd'}, *({'type': 'file', 'path': name, 'oid': 'x',
                 'size': len(files[name]), **({'lfs': {'oid': hashlib.sha256(files[name]).hexdigest(), 'pointerSize': 9,
                                                       'size': len(files[name])}} if '.json' not in name else {})}
                for name in below)]).encode(), Content_Type='application/json')
        if file[3] not in files:
            return self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=COMMIT)
        self.send_content(files[file[3]], X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha256(files[file[3]]).hexdigest()}"')

    do_HEAD = do_GET

    def send_content(self, content, **headers):
        fault = None
        if self.command == 'GET' and self.server.faults:
            fault = self.server.faults.pop(0)
        if isinstance(fault, int):
            return self.answer(fault)
        if fault == 'cut':
            self.close_connection = True
            headers['Content-Length'] = len(content)
            content = content[:len(content) // 2]
        self.answer(200, content[::-1] if fault == 'wrong' else content, **headers)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub on this machine, and an empty cache; the library has read its environment when it was imported."""
    from huggingface_hub import constants, file_download

    server = Hub()
    begin_sessions()
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.delenv('HF_TOKEN', raising=False)
    for name, value in (('ENDPOINT', server.url), ('HF_HUB_CACHE', str(tmp_path / 'cache')), ('HF_HUB_OFFLINE', False),
                        ('HF_TOKEN_PATH', str(tmp_path / 'token')), ('HF_HUB_DISABLE_XET', True)):
        monkeypatch.setattr(constants, name, value)
    for module in constants, file_download:   # the second in versions before 1
        monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE',
                            server.url + '/{repo_id}/resolve/{revision}/{filename}', raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def begin_sessions():
    """Let versions of huggingface_hub before 1, which read the offline switch when a session begins, begin another."""
    from huggingface_hub import utils

    getattr(utils, 'reset_sessions', lambda: None)()


def cut_off(monkeypatch, how):
    """From now on the hub cannot be reached: 'offline', the switch says so; 'nobody', nobody listens there."""
    from huggingface_hub import constants

    begin_sessions()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', how == 'offline')
    if how == 'nobody':
        monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')


# ---------------------------------------------------------------------------------------------------------------------
# models

def test_files_that_match_are_fetched_once_into_the_cache_that_all_tools_share(server, tmp_path):
    folder = hub.snapshot('owner/name', '*.json')
    assert folder == tmp_path / 'cache' / 'models--owner--name' / 'snapshots' / COMMIT
    assert [path.name for path in folder.iterdir()] == ['config.json']
    assert hub.snapshot('owner/name', '*.json', 'model*.safetensors') == folder
    assert (folder / 'model.safetensors').read_bytes() == WEIGHTS
    hub.snapshot('owner/name', '*.json', 'model*.safetensors')
    assert sorted(server.downloads()) == ['config.json', 'model.safetensors']


def test_an_alias_and_a_revision_are_followed(server, tmp_path):
    server.repos['openai-community/gpt2'] = {'config.json': b'{"n": 2}'}
    assert (hub.snapshot('gpt2', '*.json') / 'config.json').read_bytes() == b'{"n": 2}'
    hub.snapshot('owner/name@v1', '*.json')
    assert (tmp_path / 'cache' / 'models--owner--name' / 'refs' / 'v1').read_text() == COMMIT


@pytest.mark.parametrize('how', ['variable', 'file'])
def test_a_token_opens_what_is_gated(server, monkeypatch, tmp_path, how):
    server.gated.add('owner/name')
    with pytest.raises(UserError, match='owner/name that you can read: .* accept its terms .*HF_TOKEN'):
        hub.snapshot('owner/name', '*.json')
    if how == 'variable':
        monkeypatch.setenv('HF_TOKEN', 'secret')
    else:
        (tmp_path / 'token').write_text('secret\n')
    assert (hub.snapshot('owner/name', '*.json') / 'config.json').exists()
    assert server.tokens == {None, 'Bearer secret'}


@pytest.mark.parametrize(('name', 'words'), [
    ('runs/model', 'there is no folder runs/model here, and no http://.*/runs/model that you can read: check name'),
    ('owner/name@v9', 'there is no folder owner/name@v9 here, and .*check name and revision'),
    ('gpt2', '^no http://.*/openai-community/gpt2 that'), ('owner/-name', 'cannot get .*HFValidationError')])
def test_a_repository_or_revision_that_is_not_there_is_one_line(server, name, words):
    with pytest.raises(UserError, match=words) as refusal:
        hub.snapshot(name, '*.json')
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize('how', ['offline', 'nobody'])
@pytest.mark.parametrize('listed', [True, False], ids=['by us', 'by other tools'])
def test_without_network_what_is_in_the_cache_decides(server, monkeypatch, how, listed, tmp_path):
    folder = hub.snapshot('owner/name', '*.json')
    if not listed:
        for path in (tmp_path / 'cache').rglob('trees/*'):
            path.unlink()
    cut_off(monkeypatch, how)
    assert hub.snapshot('owner/name', '*.json', '*.safetensors') == folder   # although the hub has weights
    for name, here in (('some/model', 'there is no folder some/model here, and '), ('gpt2', '')):
        with pytest.raises(UserError, match=f'^{here}.* is not in the cache .* HF_HUB_OFFLINE .*give a folder.*json$'):
            hub.snapshot(name, '*.json')


def test_a_cache_that_cannot_be_written_is_one_line(server, monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / 'file').touch()
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'file'))
    with pytest.raises(UserError, match='cannot use .*file.*: .*HF_HOME'):
        hub.snapshot('owner/name', '*.json')


def test_a_full_disk_is_one_line(server):
    with pytest.raises(UserError, match=r'^cannot use /x: No space left on device; HF_HOME'):
        with hub.one_line_errors('owner/name'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/x')


@pytest.mark.full
def test_the_environment_of_huggingface_counts(server, tmp_path):
    code = 'from flatgpt import hub; print(hub.snapshot("owner/name", "*.json"))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, env={
        **os.environ, 'HF_ENDPOINT': server.url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_OFFLINE': '0',
        'HF_TOKEN': 'secret'})
    assert done.stdout.startswith(str(tmp_path / 'home' / 'hub')), done.stderr
    assert 'Bearer secret' in server.tokens


@pytest.mark.parametrize(('text', 'is_one'), [
    ('gpt2', True), ('gpt2-xl', True), ('gpt2@v1', True), ('owner/name', True), ('Qwen/Qwen3-0.6B@main', True),
    ('gpt3', False), ('here/ckpt.pt', False), ('there/ckpt.pt', False), ('gpt2@', False), ('a/b/c', False),
    ('./owner/name', False), ('/owner/name', False), ('../name', False), ('out', False), ('', False),
    ('owner/', False), ('here/model', False)])
def test_a_name_on_the_hub_is_told_from_a_path(text, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    assert hub.is_name(text) == is_one


# ---------------------------------------------------------------------------------------------------------------------
# datasets

@pytest.fixture
def data(server):
    server.repos['some/data'] = {f'sample/{name}': content for name, content in (
        ('b c.parquet', b'second'), ('a.parquet', b'first'), ('x.json', b'{}'), ('more/d.parquet', b'third'))}
    server.repos['some/data']['other/e.parquet'] = b'no'
    return server


def test_files_of_a_dataset_are_listed_in_order_with_size_and_digest(data):
    digests = {word: hashlib.sha256(word).hexdigest() for word in (b'first', b'second', b'third')}
    for revision in ('main', 'refs/convert/parquet'):
        assert hub.dataset_files('some/data', 'sample', revision) == [
            {'path': 'sample/a.parquet', 'size': 5, 'sha256': digests[b'first']},
            {'path': 'sample/b c.parquet', 'size': 6, 'sha256': digests[b'second']},
            {'path': 'sample/more/d.parquet', 'size': 5, 'sha256': digests[b'third']}]
    data.repos['some/data']['empty/x.json'] = b'{}'
    with pytest.raises(UserError, match="some/data has no .parquet in 'empty' of revision main"):
        hub.dataset_files('some/data', 'empty')
    with pytest.raises(UserError, match='no .*other/data that you can read'):
        hub.dataset_files('other/data', 'sample')


def test_a_file_of_a_dataset_arrives_verified_in_the_folder(data, tmp_path):
    _, file, _ = hub.dataset_files('some/data', 'sample')
    for _ in range(2):
        path = hub.dataset_file('some/data', 'main', file, tmp_path)
        assert path == tmp_path / 'sample' / 'b c.parquet' and path.read_bytes() == b'second'
    assert len(data.downloads()) == 1
    path = hub.dataset_file('some/data', 'main', {'path': 'sample/x.json', 'sha256': None}, tmp_path)   # a small one
    assert path.read_bytes() == b'{}'


def test_other_bytes_than_announced_are_removed(data, tmp_path):
    file = hub.dataset_files('some/data', 'sample')[0]
    data.faults = ['wrong']
    with pytest.raises(UserError, match=r'some/data/sample/a\.parquet: the sha256 is not'):
        hub.dataset_file('some/data', 'main', file, tmp_path)
    assert not (tmp_path / 'sample' / 'a.parquet').exists()
    assert hub.dataset_file('some/data', 'main', file, tmp_path).read_bytes() == b'first'


# ---------------------------------------------------------------------------------------------------------------------
# plain URLs

TEXT = 'Größe 你好\n'.encode() * 100
SHA256 = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def path(server, monkeypatch, tmp_path):
    """Where tiny Shakespeare is to be, which the server has."""
    server.repos['text'] = TEXT
    monkeypatch.setattr(hub, 'SHAKESPEARE', f'{server.url}/text')
    monkeypatch.setattr(hub, 'SHAKESPEARE_SHA256', SHA256)
    (tmp_path / 'data').mkdir()
    return tmp_path / 'data' / 'input.txt'


def test_text_is_downloaded_once(server, path, capsys):
    for _ in range(2):
        assert hub.tiny_shakespeare(None, path) == (
            TEXT.decode(), {'path': 'input.txt', 'url': hub.SHAKESPEARE, 'sha256': SHA256})
    assert len(server.asked) == 1
    assert os.listdir(path.parent) == ['input.txt'] and capsys.readouterr() == ('', '')


@pytest.mark.parametrize(('faults', 'words'), [
    ([404], 'HTTPError'), ([503], 'HTTPError'), (['cut'], 'ChunkedEncodingError'),
    (['wrong'], 'the sha256 is not')])
def test_a_download_that_fails_leaves_nothing_and_names_the_ways_out(server, path, faults, words):
    server.faults = faults
    with pytest.raises(UserError, match=words) as refusal:
        hub.tiny_shakespeare(None, path)
    assert '\n' not in str(refusal.value) and os.listdir(path.parent) == []
    if words != 'the sha256 is not':
        for word in ('--input=PATH', str(path), 'python data/python_char/prepare.py'):
            assert word in str(refusal.value)


def test_a_folder_that_is_not_there_is_one_line(path):
    with pytest.raises(UserError, match=r'^cannot write .*nowhere/x\.part: No such file or directory$'):
        hub.tiny_shakespeare(None, path.parent / 'nowhere' / 'x')


@pytest.mark.parametrize('content', [TEXT, b'other'], ids=['known', 'other'])
@pytest.mark.parametrize('given', [True, False])
def test_a_text_that_is_here_is_used_and_another_one_told(server, path, tmp_path, given, content, capsys):
    file = tmp_path / 'mine.txt' if given else path
    file.write_bytes(content)
    text, source = hub.tiny_shakespeare(str(file) if given else None, path)
    digest = hashlib.sha256(content).hexdigest()
    known = content == TEXT
    assert text == content.decode() and server.asked == []
    assert source == {'path': file.name, 'url': hub.SHAKESPEARE if known else None, 'sha256': digest}
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == int(not known)
    assert known or (str(file) in err and digest[:16] in err)
