"""
serve.py with the programs that people run against it: the load test, and lm-eval.
"""

import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import requests
from conftest import ROOT, needs, started
from in_process import call
from test_chat import write_model

pytest.importorskip('uvicorn')
pytestmark = pytest.mark.full


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('clients') / 'out')


@contextlib.contextmanager
def served(folder):
    """The process of serve.py with this model, and its address."""
    command = [ROOT / 'serve.py', f'--out_dir={folder}', '--port=0', '--device=cpu', '--dtype=float32']
    with started(*command) as process:
        line = ''
        while 'running on' not in line:
            line = process.stderr.readline()
            assert line
        yield process, line.split('running on ')[1].split(' ')[0]


def load(url, *args):
    command = [sys.executable, '-m', 'tests.load', f'--url={url}', '--longest_prompt=60', '--longest_answer=30', *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_many_clients_of_whom_some_leave_lose_nothing_and_get_their_own_answers(folder):
    with served(folder) as (process, url):
        done = load(url, '--requests=100', '--alone=100', f'--pid={process.pid}')
    assert done.returncode == 0, done.stdout + done.stderr
    left, compared = re.search(r'(\d+) left early, 0 lost; 0 of (\d+) are not', done.stdout).groups()
    assert int(left) > 3 and int(left) + int(compared) == 100
    start, end = re.search(r'memory: (\d+) MB at the start.* (\d+) at the end', done.stdout).groups()
    assert int(end) < int(start) * 1.5


def test_a_load_test_tells_answers_that_depend_on_neighbours_or_never_end():
    class Liar(http.server.BaseHTTPRequestHandler):
        """Answers each request in another way, and every seventh without an end."""
        number = 0

        def do_GET(self):
            self.reply(b'x{kind="generated"} 5')

        def do_POST(self):
            self.rfile.read(int(self.headers['Content-Length']))
            Liar.number += 1
            choice = {'text': str(Liar.number), 'finish_reason': 'stop' if Liar.number % 7 else None}
            self.reply(f'data: {json.dumps({"choices": [choice]})}\n\n'.encode())

        def reply(self, content):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Liar) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = load(f'http://127.0.0.1:{server.server_port}', '--requests=20', '--leaving=0', '--alone=20')
        server.shutdown()
    assert done.returncode == 1, done.stderr
    lost, mixed_up = re.search(r'(\d+) lost; (\d+) of 20 are not', done.stdout).groups()
    assert int(lost) in (2, 3) and int(mixed_up) >= 20 - 3


@needs('linux')
def test_sigterm_lets_the_answers_that_run_end(folder):
    body = {'prompt': 'red', 'n': 16, 'max_tokens': 80, 'temperature': 1.5, 'stream': True, 'seed': 1}
    with served(folder) as (process, url):
        with requests.post(f'{url}/v1/completions', json=body, stream=True, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith(b'data: {')
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == b'data: [DONE]'
        assert sum(json.loads(line[6:])['choices'][0]['finish_reason'] is not None for line in rest[:-1]) >= 15
        assert process.wait(60) == 0


def test_lm_eval_measures_over_http_what_eval_measures(folder, tmp_path):
    pytest.importorskip('lm_eval', reason='needs lm-eval')
    pytest.importorskip('tenacity', reason='needs lm-eval[api]')
    items = [{'context': f'What is {fruit}?', 'choices': ['red', 'It is three.', 'an apple'], 'gold': i % 3}
             for i, fruit in enumerate(['red', 'one', 'two', 'the sum', 'the apple', 'a fruit'])]
    (tmp_path / 'made.jsonl').write_text('\n'.join(map(json.dumps, items)))
    (tmp_path / 'made.yaml').write_text(
        f'task: made\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/made.jsonl}}}}\n'
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{context}}"\ndoc_to_choice: choices\n'
        'doc_to_target: gold\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n'
        '  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n')
    done = call('export.py', f'--out_dir={folder}', f'--to={tmp_path / "exported"}')   # for lm-eval's tokenizer
    assert done.returncode == 0, done.stderr
    with served(folder) as (_, url):
        model = f'model=out,base_url={url}/v1/completions,tokenizer={tmp_path / "exported"},tokenized_requests=True'
        done = subprocess.run(
            [sys.executable, '-m', 'lm_eval', '--model', 'local-completions', '--model_args', model, '--tasks', 'made',
             '--include_path', tmp_path, '--output_path', tmp_path / 'report'], capture_output=True, text=True,
            env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_CACHE': str(tmp_path / 'cache')}, timeout=300)
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / 'report').rglob('results_*.json')
    theirs = json.loads(path.read_text())['results']['made']
    done = call('eval.py', f'--out_dir={folder}', f'--choices={tmp_path / "made.jsonl"}', '--device=cpu')
    ours = json.loads(done.stdout)['choices']
    assert (theirs['acc,none'], theirs['acc_norm,none']) == pytest.approx((ours['acc'], ours['acc_norm']))
