"""At the keyboard: all scripts under terminals that cannot show every character, in a home folder with a blank and
Chinese characters, from a folder that cannot be written to, with names that are invalid UTF-8; line editing."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests
from conftest import ROOT, TINY, can, killed_after, needs, wait_until
from in_process import call

TEXT = '人之初，性本善。性相近，习相远。苟不教，性乃迁。教之道，贵以专。😀\n' * 60
SHOWN = {'utf-8': '人之初', 'cp1252': r'\u4eba\u4e4b\u521d', 'ascii': r'\u4eba\u4e4b\u521d', 'gbk': '人之初'}
ASKED = '"\\u4eba\\u4e4b\\u521d"\n'   # what chat.py reads with --json
READ_ONLY = '/proc' if can('linux') else ROOT
anywhere = pytest.mark.parametrize('encoding', ['cp1252', *(pytest.param(name, marks=pytest.mark.full)
                                                            for name in ('utf-8', 'ascii', 'gbk'))])
ALIGN = ['--max_iters=1', '--batch_size=2', '--block_size=64', '--warmup_iters=0', '--device=cpu', '--dtype=float32']
DPO = ['dpo.py', '--eval_pairs=2', *ALIGN]
GRPO = ['grpo.py', '--num_val=2', '--group_size=2', '--max_new_tokens=4', *ALIGN]
BENCH = ['bench.py', '--mode=data', '--block_size=16', '--batch_size=2', '--steps=1', '--warmup_steps=0']


def write_lines(path, records):
    path.write_text(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records), encoding='utf-8')


def at(home, command, **more):
    """The CompletedProcess of a command, [script, arguments], of a person whose home folder this is."""
    script, *args = command
    return call(script, *(str(arg).replace('HOME', str(home)) for arg in args), **{'HOME': str(home), **more})


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A home folder with a text, a dataset of it, a model trained on it, a chat model, and what it is aligned with."""
    home = tmp_path_factory.mktemp('home') / '张 三'
    home.mkdir()
    for name, content in (('text.txt', TEXT), ('人之初.txt', '人之初\n' * 20), ('tiny.py', TINY),
                          ('奖励.py', 'def one(question, answer):\n    return 1.0\n')):
        (home / name).write_text(content, encoding='utf-8')
    talks = [[{'role': 'user', 'content': f'人之初 {i}?'}, {'role': 'assistant', 'content': f'性本善 {i}'}]
             for i in range(20)]
    write_lines(home / '对话.jsonl', [{'messages': talk} for talk in talks])
    write_lines(home / '偏好.jsonl', [{'prompt': talk[0]['content'], 'chosen': '性本善', 'rejected': '善'}
                                    for talk in talks])
    for command in (
            ['data/text/prepare.py', '--input=~/text.txt', '--name=~/数据 集/诗', '--tokenizer=char'],
            ['train.py', 'HOME/tiny.py', '--dataset=~/数据 集/诗', '--out_dir=~/输出 x', '--max_iters=3'],
            ['data/chat/prepare.py', '--input=~/对话.jsonl', '--name=~/数据 集/对话', '--tokenizer=bpe:300'],
            ['train.py', 'HOME/tiny.py', '--dataset=~/数据 集/对话', '--out_dir=~/聊天 x', '--max_iters=1',
             '--block_size=64']):
        done = at(home, command)
        assert done.returncode == 0, done.stderr
    assert (home / '输出 x/ckpt.pt').exists() and not (ROOT / '~').exists()
    return home


WORK = {
    'sample': ['sample.py', '--out_dir=~/输出 x', '--start=人之初', '--num_samples=1', '--max_new_tokens=5'],
    'stream': ['sample.py', '--out_dir=~/输出 x', '--start=人之初', '--max_new_tokens=5', '--num_samples=1',
               '--stream=True'],
    'file': ['sample.py', '--out_dir=~/输出 x', '--prompts=~/人之初.txt', '--num_samples=1', '--max_new_tokens=5'],
    'json': ['sample.py', '--out_dir=~/输出 x', '--start=人之初', '--num_samples=1', '--max_new_tokens=40', '--json'],
    'eval': ['eval.py', '--out_dir=~/输出 x', '--data=~/人之初.txt'],
    'export': ['export.py', '--out_dir=~/输出 x', '--to=~/人之初'],
    'plot': ['plot.py', '--runs=~/输出 x'],
    'curves': ['plot.py', '--runs=~/输出 x', '--text'],
    'train': ['train.py', '--out_dir=~/输出 x', '--init_from=resume'],
    'prepare': ['data/text/prepare.py', '--input=~/人之初.txt', '--name=~/二', '--tokenizer=char'],
    'inspect': ['data/text/prepare.py', '--input=~/text.txt', '--inspect=人之初', '--tokenizer=char'],
    'preferences': ['data/preferences/prepare.py', '--folder=~/偏好', '--num_pairs=9', '--num_held_out=9'],
    'chat': ['chat.py', '--out_dir=~/聊天 x', '--max_new_tokens=9', '--json'],
    'dpo': [*DPO, '--init_from=~/聊天 x', '--pairs=~/偏好.jsonl', '--out_dir=~/输出 dpo'],
    'grpo': [*GRPO, '--init_from=~/聊天 x', '--questions=~/偏好.jsonl', '--reward=~/奖励.py:one',
             '--out_dir=~/输出 grpo'],
    'bench': [*BENCH, '--dataset=~/数据 集/诗'],
}


@anywhere
@pytest.mark.parametrize('work', WORK)
def test_every_script_works_in_any_home_and_escapes_what_a_terminal_cannot_show(home, encoding, work, monkeypatch):
    """From a folder that cannot be written to."""
    command = [arg.replace('--to=~/人之初', f'--to=~/人之初{encoding}') for arg in WORK[work]]   # to a new folder
    monkeypatch.setattr(sys, 'stdin', io.StringIO(ASKED))
    done = at(home, command, encoding=encoding, cwd=READ_ONLY)
    assert done.returncode == 0, done.stderr
    assert 'Glyph' not in done.stderr   # of a font without Chinese
    if work in ('json', 'eval'):
        assert '人之初' in str(json.loads(done.stdout))   # whatever characters the rest has
    elif work == 'chat':
        assert json.loads(done.stdout)['finish_reason']
    elif work in ('sample', 'stream', 'file', 'export'):
        assert SHOWN[encoding] in done.stdout


@anywhere
def test_a_server_works_there_too(home, encoding, monkeypatch):
    uvicorn = pytest.importorskip('uvicorn')
    run, answers = uvicorn.Server.run, []

    def run_and_ask(server):
        thread = threading.Thread(target=run, args=[server], daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        url = f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/chat/completions'
        body = {'messages': [{'role': 'user', 'content': '人之初'}], 'max_tokens': 5}
        answers.append(requests.post(url, json=body, timeout=60).json())
        server.should_exit = True
        thread.join(60)

    monkeypatch.setattr(uvicorn.Server, 'run', run_and_ask)
    done = at(home, ['serve.py', '--out_dir=~/聊天 x', '--port=0'], encoding=encoding, cwd=READ_ONLY)
    assert done.returncode == 0, done.stderr
    assert answers[0]['model'] == '聊天 x' and answers[0]['usage']['completion_tokens'] > 0


@pytest.mark.full
@pytest.mark.parametrize('work', WORK)
def test_every_script_works_as_a_process_in_a_locale_without_unicode(home, work):
    script, *args = [arg.replace('--to=~/人之初', '--to=~/locale') for arg in WORK[work]]
    done = subprocess.run([sys.executable, ROOT / script, *args], input=ASKED, cwd=READ_ONLY, capture_output=True,
                          text=True, encoding='cp1252', env={**os.environ, 'HOME': str(home), 'LC_ALL': 'C',
                                                             'PYTHONIOENCODING': 'cp1252'})
    assert done.returncode == 0, done.stderr


@anywhere
def test_a_refusal_is_one_line_on_any_terminal(home, encoding):
    done = at(home, ['sample.py', '--out_dir=~/输出 x', '--start=龍'], encoding=encoding)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith('sample.py: ')


@needs('linux')
@pytest.mark.parametrize('command', [
    ['train.py', 'HOME/tiny.py', '--dataset=~/数据 集/诗', '--out_dir=out'],
    ['export.py', '--out_dir=~/输出 x', '--to=model'], [*WORK['dpo'], '--out_dir=out'],
    [*WORK['grpo'], '--out_dir=out'], [*WORK['bench'], '--mode=train', '--profile=True', '--n_layer=1']],
    ids=lambda command: command[0])
def test_output_into_a_folder_that_cannot_be_written_to_is_refused_in_one_line(home, command):
    done = at(home, command, cwd='/proc')
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f'{command[0]}: cannot ')


@needs('linux')   # where a name is bytes
def test_names_that_are_invalid_utf_8_work_and_are_shown_escaped(home, monkeypatch):
    name = os.fsdecode(b'caf\xe9')
    for copy, original in (('txt', 'text.txt'), ('jsonl', '偏好.jsonl'), ('py', '奖励.py')):
        (home / f'{name}.{copy}').write_bytes((home / original).read_bytes())
    (home / f'chat-{name}').symlink_to(home / '聊天 x')
    for command in (
            ['data/text/prepare.py', f'--input=~/{name}.txt', f'--name=~/{name}', '--tokenizer=char'],
            ['train.py', 'HOME/tiny.py', f'--dataset=~/{name}', f'--out_dir=~/out-{name}', '--max_iters=1'],
            ['sample.py', f'--out_dir=~/out-{name}', '--num_samples=1', '--max_new_tokens=2', '--start=人'],
            ['eval.py', f'--out_dir=~/out-{name}', f'--data=~/{name}'],
            ['export.py', f'--out_dir=~/out-{name}', '--to=~/exported'],
            ['chat.py', f'--out_dir=~/chat-{name}', '--max_new_tokens=2', '--json'],
            [*DPO, f'--init_from=~/chat-{name}', f'--pairs=~/{name}.jsonl', f'--out_dir=~/dpo-{name}'],
            [*GRPO, f'--init_from=~/chat-{name}', f'--questions=~/{name}.jsonl', f'--reward=~/{name}.py:one',
             f'--out_dir=~/grpo-{name}'],
            [*BENCH, f'--dataset=~/{name}'],
            ['plot.py', f'--runs=~/out-{name}', '--text'], ['plot.py', f'--runs=~/out-{name}']):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(ASKED))
        done = at(home, command)
        assert done.returncode == 0, done.stderr
    assert r'caf\udce9' in done.stderr
    done = at(home, ['sample.py', f'--out_dir=~/nowhere-{name}'])
    assert done.returncode == 1 and r'nowhere-caf\udce9' in done.stderr


@pytest.mark.full
@needs('fork')
def test_prompts_are_typed_with_line_editing_and_a_history(trained):
    import pty
    pid, terminal = pty.fork()
    if not pid:
        script = str(ROOT / 'sample.py')
        os.execv(sys.executable, [sys.executable, script, f'--out_dir={trained}', '--max_new_tokens=3', '--top_k=1'])

    def until(end):
        """What the terminal shows up to some text."""
        shown = b''
        while not shown.endswith(end):
            shown += os.read(terminal, 1)
        return shown.decode(errors='replace').replace('\r', '')

    def asleep():
        """Whether the process waits for a key."""
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'S'

    with killed_after(60, pid):   # then the terminal cannot be read any more
        until(b'> ')
        os.write(terminal, b'4 tmies\x1b[D\x1b[D\x1b[D\x1b[D\x7f\x1b[C\x1b[C\x1b[Ci\n')   # to the left, and back
        until(b'\n')
        first = until(b'> ')
        os.write(terminal, b'\x1b[A\n')   # up
        until(b'\n')
        assert until(b'> ') == first
        os.write(terminal, b'half a li')
        until(b'half a li')
        wait_until(asleep)   # CPython keeps an interrupt that comes while readline is at work until the next key
        os.write(terminal, b'\x03')   # Ctrl-C drops the line
        until(b'> ')
        os.write(terminal, b'\xff\n')
        assert 'never seen' in until(b'> ')
        os.write(terminal, b'\x04')
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
