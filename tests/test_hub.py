"""Files of the hub, from a server on this machine that misbehaves: found in the cache, fetched, verified, resumed."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from flatgpt import download, hub
from flatgpt.errors import UserError

COMMIT = 'c' * 40
WEIGHTS = b'weights ' * 50_000


class Hub(ThreadingHTTPServer):
    """Serves {repository: {file: content}} as the hub does. faults: what to do wrong, one for each coming GET: a
    status, 'cut' (the connection ends half way), 'wrong' (other bytes)."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repos = {'owner/name': {'config.json': b'{}', 'big.safetensors': WEIGHTS}}
        self.faults, self.asked, self.private, self.renamed = [], [], set(), {}

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'


class Handler(BaseHTTPRequestHandler):
    def content(self):
        server = self.server
        server.asked.append((self.command, self.path, self.headers.get('Authorization')))
        repo, revision, file = re.fullmatch(r'/(?:datasets/)?(.+)/resolve/([^/]+)/(.+)', self.path).groups()
        if repo in server.renamed:
            self.answer(307, {'Location': self.path.replace(repo, server.renamed[repo], 1)})
        elif repo in server.private and not self.headers.get('Authorization'):
            self.answer(401, {'X-Error-Code': 'GatedRepo'})
        elif repo not in server.repos:
            self.answer(404, {'X-Error-Code': 'RepoNotFound'})
        elif revision not in ('main', 'v1', COMMIT):
            self.answer(404, {'X-Error-Code': 'RevisionNotFound'})
        elif file not in server.repos[repo]:
            self.answer(404, {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': COMMIT})
        else:
            return file, server.repos[repo][file]
        return None, None

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in {'Content-Length': 0, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def do_HEAD(self):
        file, content = self.content()
        if file and file.endswith('.safetensors'):   # large files lie elsewhere
            digest = hashlib.sha256(content).hexdigest()
            self.answer(302, {'X-Repo-Commit': COMMIT, 'X-Linked-Etag': f'"{digest}"', 'ETag': '"x"',
                              'X-Linked-Size': len(content),
                              'Location': f'http://localhost:{self.server.server_port}{self.path}'})
        elif file:
            digest = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
            self.answer(200, {'X-Repo-Commit': COMMIT, 'ETag': f'"{digest}"', 'Content-Length': len(content)})

    def do_GET(self):
        file, content = self.content()
        if not file:
            return
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            return self.answer(fault, {})
        start = int(re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', 'bytes=0-'))[1])
        content = content[::-1] if fault == 'wrong' else content
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:(start + len(content)) // 2 if fault == 'cut' else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    for name in ('HF_TOKEN', 'HF_TOKEN_PATH', 'HF_HUB_CACHE', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download.time, 'sleep', lambda seconds: None)
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_is_fetched_once_and_is_where_the_hubs_own_tools_look_for_it(server, tmp_path):
    from huggingface_hub import try_to_load_from_cache
    for file, content in server.repos['owner/name'].items():
        path = hub.fetch('owner/name', file)
        assert path.read_bytes() == content and path.is_symlink()
        assert str(path) == try_to_load_from_cache('owner/name', file, cache_dir=tmp_path / 'home' / 'hub')
    asked = len(server.asked)
    assert hub.fetch('owner/name', 'big.safetensors').read_bytes() == WEIGHTS
    assert len(server.asked) == asked
    assert (tmp_path / 'home/hub/models--owner--name/refs/main').read_text() == COMMIT


def test_what_the_hubs_own_tools_have_fetched_is_found(server, tmp_path):
    code = ('import sys; from huggingface_hub import hf_hub_download as get; '
            'get("owner/name", "config.json"); get("owner/name", "big.safetensors")')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={
        **os.environ, 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1'}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    server.asked.clear()
    assert hub.fetch('owner/name', 'big.safetensors').read_bytes() == WEIGHTS
    assert server.asked == []


def test_a_file_that_a_repository_has_not_is_asked_for_once(server):
    assert hub.fetch('owner/name', 'tokenizer.json') is None
    asked = len(server.asked)
    assert hub.fetch('owner/name', 'tokenizer.json') is None
    assert len(server.asked) == asked


def test_a_cut_download_is_taken_up_where_it_ended_by_the_next_call_too(server):
    server.faults = ['cut', 500, 500]
    with pytest.raises(UserError, match='status 500'):
        hub.fetch('owner/name', 'big.safetensors')
    server.faults = ['cut']
    assert hub.fetch('owner/name', 'big.safetensors').read_bytes() == WEIGHTS


@pytest.mark.parametrize('file', ['config.json', 'big.safetensors'])
def test_other_bytes_than_the_hub_announced_are_thrown_away(server, tmp_path, file):
    server.repos['owner/name']['config.json'] = b'{"a": 1}'
    server.faults = ['wrong']
    with pytest.raises(UserError, match='not what it should be, its digest'):
        hub.fetch('owner/name', file)
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and path.stat().st_size > 100]
    assert hub.fetch('owner/name', file).read_bytes() == server.repos['owner/name'][file]


def test_an_alias_a_revision_and_a_new_name_are_followed(server):
    server.repos['openai-community/gpt2'] = {'config.json': b'{"n": 2}'}
    server.renamed['old/name'] = 'owner/name'
    assert hub.fetch('gpt2', 'config.json').read_bytes() == b'{"n": 2}'
    assert hub.fetch('owner/name@v1', 'config.json').read_bytes() == b'{}'
    assert hub.fetch('old/name', 'config.json').read_bytes() == b'{}'


def test_a_commit_needs_no_ref(server, tmp_path):
    path = hub.fetch(f'owner/name@{COMMIT}', 'config.json')
    assert path.read_bytes() == b'{}' and not list((tmp_path / 'home').rglob('refs/*'))
    server.asked.clear()
    assert hub.fetch(f'owner/name@{COMMIT}', 'config.json') == path and server.asked == []


def test_a_dataset_is_beside_models(server, tmp_path):
    path = hub.fetch('owner/name', 'config.json', kind='datasets')
    assert path.read_bytes() == b'{}' and 'datasets--owner--name' in str(path)
    assert server.asked[0][1].startswith('/datasets/owner/name/resolve/main/')


@pytest.mark.parametrize('how', ['variable', 'file'])
def test_a_token_opens_what_is_private(server, monkeypatch, tmp_path, how):
    server.private.add('owner/name')
    with pytest.raises(UserError, match=r'has no owner/name at main, or not for everyone: .* HF_TOKEN'):
        hub.fetch('owner/name', 'config.json')
    if how == 'variable':
        monkeypatch.setenv('HF_TOKEN', 'secret')
    else:
        (tmp_path / 'home').mkdir(exist_ok=True)
        (tmp_path / 'home' / 'token').write_text('secret\n')
    assert hub.fetch('owner/name', 'config.json').read_bytes() == b'{}'
    assert server.asked[-1][2] == 'Bearer secret'


@pytest.mark.parametrize('name', ['nobody/nothing', 'owner/name@v9'])
def test_a_repository_or_revision_that_is_not_there_is_one_line(server, name):
    with pytest.raises(UserError, match=f'has no {name.replace("@", " at ")}.*check the name'):
        hub.fetch(name, 'config.json')


def test_offline_the_cache_alone_is_asked(server, monkeypatch):
    path = hub.fetch('owner/name', 'config.json')
    server.asked.clear()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert hub.fetch('owner/name', 'config.json') == path
    with pytest.raises(UserError, match=r'big\.safetensors is not in .*HF_HUB_OFFLINE'):
        hub.fetch('owner/name', 'big.safetensors')
    assert server.asked == []


def test_without_network_the_line_says_what_to_put_where(server, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')   # discard: nobody listens
    with pytest.raises(UserError, match=r'cannot reach openai-community/gpt2 .*\(ConnectionError\).*put its '
                                        r'config\.json, model\.safetensors and tokenizer\.json into a folder'):
        hub.fetch('gpt2', 'config.json')


def test_a_server_that_is_no_hub_is_one_line(server, monkeypatch):
    monkeypatch.setattr(Handler, 'do_HEAD', lambda self: self.answer(200, {}))
    with pytest.raises(UserError, match=r'cannot reach owner/name .*\(KeyError\)'):
        hub.fetch('owner/name', 'config.json')
    monkeypatch.setattr(Handler, 'do_HEAD', lambda self: self.answer(503, {}))
    with pytest.raises(UserError, match='status 503'):
        hub.fetch('owner/name', 'config.json')


def test_a_cache_that_cannot_be_written_is_one_line(server, monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'file'))
    with pytest.raises(UserError, match='cannot write to the cache .*HF_HOME'):
        hub.fetch('owner/name', 'config.json')


def test_where_there_are_no_links_the_file_itself_is_put_there(server, monkeypatch):
    def refuse(*args):
        raise OSError(1, 'no links here')

    monkeypatch.setattr(hub.os, 'symlink', refuse)
    path = hub.fetch('owner/name', 'config.json')
    assert path.read_bytes() == b'{}' and not path.is_symlink()


@pytest.mark.parametrize(('text', 'is_one'), [
    ('gpt2', True), ('gpt2-xl', True), ('gpt2@v1', True), ('owner/name', True), ('Qwen/Qwen3-0.6B@main', True),
    ('gpt3', False), ('here/ckpt.pt', False), ('there/ckpt.pt', False), ('gpt2@', False), ('a/b/c', False),
    ('./owner/name', False), ('/owner/name', False), ('../name', False), ('out', False), ('', False),
    ('owner/', False)])
def test_a_name_on_the_hub_is_told_from_a_path(text, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    assert hub.is_name(text) == is_one


def test_the_environment_says_where_the_cache_is(monkeypatch):
    for name in ('HF_HOME', 'HF_HUB_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', '/home/me')
    assert str(hub.cache()) == '/home/me/.cache/huggingface/hub'
    monkeypatch.setenv('XDG_CACHE_HOME', '/x')
    assert str(hub.cache()) == '/x/huggingface/hub'
    monkeypatch.setenv('HF_HOME', '/h')
    assert str(hub.cache()) == '/h/hub'
    monkeypatch.setenv('HF_HUB_CACHE', '/c')
    assert str(hub.cache()) == '/c'
