"""
serve.py's endpoints: forms of OpenAI, limits, neighbours that do not disturb, clients that leave.
"""

import contextlib
import http.client
import json
import random
import socket
import threading
import time

import pytest
import torch
from conftest import wait_until
from hypothesis import given
from hypothesis import strategies as st
from properties import quick

from flatgpt import engine
from flatgpt.answers import Answer
from flatgpt.conversation import CHATML, ChatTemplate
from flatgpt.serving import Limits, Server
from flatgpt.tokenizer import CharTokenizer
from model import GPT, GPTConfig

pytest.importorskip('starlette')
CHARS = '\n abcdefghijklmnopqrstuvwxyz<|>_好'


class Tokenizer(CharTokenizer):   # whose end is '|'
    ends = (CHARS.index('|'),)


TOK = Tokenizer(CHARS)


def make_model(scale=4.0):
    torch.manual_seed(1)
    model = GPT(GPTConfig(len(CHARS), 120, n_layer=1, n_head=2, n_embd=16)).eval()
    for p in model.parameters():
        p.data.mul_(scale)
    return model


class Running:
    """A server in a thread of its own, on a free port of this machine."""

    def __init__(self, limits=None, api_key='', template=CHATML):
        import uvicorn

        self.model = make_model()
        chat = ChatTemplate(template) if template else None
        self.server = Server(self.model, TOK, chat, 'tiny', limits or Limits(), api_key)
        config = uvicorn.Config(self.server.app(), host='127.0.0.1', port=0, log_level='error')
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.decoding = threading.Thread(target=self.server.worker.run, daemon=True)
        self.thread.start()
        self.decoding.start()
        wait_until(lambda: self.uvicorn.started)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}'

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join(10)
        self.server.worker.stop()
        self.decoding.join(10)

    def post(self, path, body, **headers):
        import requests
        content = body if isinstance(body, bytes) else json.dumps(body)
        return requests.post(self.url + path, data=content, headers=headers, timeout=60)

    def get(self, path, **headers):
        import requests
        return requests.get(self.url + path, headers=headers, timeout=60)


@pytest.fixture(scope='module')
def running():
    server = Running(Limits(rows=4, queue=1000, tokens=60))
    yield server
    server.close()


@contextlib.contextmanager
def a_server(**options):
    server = Running(**options)
    try:
        yield server
    finally:
        server.close()


def alone(model, prompt, number, stops=(), **controls):
    """The text of the answer to a prompt, by generate()."""
    ids = torch.from_numpy(TOK.encode(prompt).astype('int64'))
    answer = Answer(TOK, ids.numpy(), number, stops)
    for token, log_prob in engine.generate(model, [ids], number, log_probs=True, **controls):
        answer.add(token.item(), log_prob.item())
    return answer


def test_a_completion_is_the_text_that_generate_gives(running):
    body = {'prompt': 'abc', 'max_tokens': 20, 'temperature': 0.8, 'seed': 5, 'top_p': 0.9, 'logprobs': 2}
    got = running.post('/v1/completions', body).json()
    expected = alone(running.model, 'abc', 20, temperature=0.8, seed=5, top_p=0.9)
    [choice] = got['choices']
    assert choice['text'] == expected.text
    assert choice['finish_reason'] == expected.finish
    assert choice['logprobs']['tokens'] == [TOK.decode([i]) for i in expected.ids]
    assert sum(choice['logprobs']['token_logprobs']) == pytest.approx(expected.log_prob, abs=1e-3)
    assert all(len(top) == 2 for top in choice['logprobs']['top_logprobs'])
    assert got['usage'] == {'prompt_tokens': 3, 'completion_tokens': len(expected.ids),
                            'total_tokens': 3 + len(expected.ids)}
    assert (got['object'], got['model']) == ('text_completion', 'tiny')


def test_several_prompts_and_answers_come_in_order(running):
    body = {'prompt': ['abc', 'xyz'], 'n': 2, 'max_tokens': 9, 'seed': 3}
    choices = running.post('/v1/completions', body).json()['choices']
    assert [choice['index'] for choice in choices] == [0, 1, 2, 3]
    for prompt, row, choice in (('abc', 0, choices[0]), ('abc', 1, choices[1]), ('xyz', 0, choices[2])):
        assert choice['text'] == alone(running.model, prompt, 9, seed=3, first_row=row).text


def test_token_ids_are_a_prompt_too(running):
    texts = {json.dumps(running.post('/v1/completions', {
        'prompt': prompt, 'max_tokens': 9, 'temperature': 0}).json()['choices'][0]['text'])
        for prompt in ('abc', ['abc'], TOK.encode('abc').tolist(), [TOK.encode('abc').tolist()])}
    assert len(texts) == 1


def test_an_echo_has_the_log_probabilities_of_the_prompt(running):
    body = {'prompt': 'abcabc', 'max_tokens': 1, 'echo': True, 'logprobs': 1, 'temperature': 0}
    choice = running.post('/v1/completions', body).json()['choices'][0]
    ids = torch.from_numpy(TOK.encode('abcabc').astype('int64'))
    with torch.no_grad():
        logits = running.model.compute_logits(running.model.hidden_states(ids[None]))[0].log_softmax(dim=-1)
    expected = logits[:-1].gather(1, ids[1:, None])[:, 0].tolist()
    logprobs = choice['logprobs']
    assert choice['text'].startswith('abcabc')
    assert logprobs['token_logprobs'][0] is None
    assert logprobs['token_logprobs'][1:6] == pytest.approx(expected, abs=1e-4)
    assert logprobs['text_offset'] == [0, 1, 2, 3, 4, 5, 6]
    assert len(logprobs['tokens']) == len(logprobs['top_logprobs']) == 7
    nothing = running.post('/v1/completions', {**body, 'max_tokens': 0}).json()
    assert nothing['choices'][0]['text'] == 'abcabc'
    assert nothing['usage']['completion_tokens'] == 0


def test_the_offsets_of_a_stream_go_on_from_piece_to_piece(running):
    body = {'prompt': 'abcabc', 'max_tokens': 9, 'echo': True, 'logprobs': 1, 'n': 2, 'seed': 1}
    whole = running.post('/v1/completions', body).json()['choices']
    offsets = {0: [], 1: []}
    for chunk in events_of(running.post('/v1/completions', {**body, 'stream': True})):
        [choice] = chunk['choices']
        offsets[choice['index']] += choice['logprobs']['text_offset']
    assert [offsets[0], offsets[1]] == [choice['logprobs']['text_offset'] for choice in whole]
    assert len(offsets[0]) > 8 and offsets[0] == sorted(offsets[0]) and offsets[0][0] == 0


def events_of(response):
    lines = response.content.decode().split('\n\n')
    assert lines.pop() == ''
    assert lines.pop() == 'data: [DONE]'
    return [json.loads(line.removeprefix('data: ')) for line in lines]


@pytest.mark.parametrize('path, asked', [
    ('/v1/completions', {'prompt': 'abc'}),
    ('/v1/chat/completions', {'messages': [{'role': 'user', 'content': 'abc'}]})])
def test_a_stream_adds_up_to_the_whole(running, path, asked):
    body = {**asked, 'max_tokens': 30, 'seed': 4, 'n': 3, 'stop': ['zz', 'q']}
    whole = running.post(path, body).json()
    events = events_of(running.post(path, {**body, 'stream': True, 'stream_options': {'include_usage': True}}))
    assert events[-1]['usage'] == whole['usage'] and events[-1]['choices'] == []
    texts = [''] * 3
    finish = [None] * 3
    for chunk in events[:-1]:
        [choice] = chunk['choices']
        texts[choice['index']] += choice['delta'].get('content', '') if 'chat' in path else choice['text']
        finish[choice['index']] = choice['finish_reason'] or finish[choice['index']]
    assert finish == [choice['finish_reason'] for choice in whole['choices']]
    expected = [choice['message']['content'] if 'chat' in path else choice['text'] for choice in whole['choices']]
    assert texts == expected
    assert not any('zz' in text or 'q' in text for text in texts)
    assert len({chunk['id'] for chunk in events}) == 1


def test_the_official_client_speaks_to_it(running):
    openai = pytest.importorskip('openai')
    client = openai.OpenAI(base_url=f'{running.url}/v1', api_key='any', max_retries=0)
    messages = [{'role': 'system', 'content': 'be kind'}, {'role': 'user', 'content': 'abc'}]
    asked = {'model': 'tiny', 'messages': messages, 'max_tokens': 12, 'seed': 7, 'temperature': 0.9}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, n=2, stop=['zz'])
    assert len(whole.choices) == 2
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3
    assert whole.choices[0].message.role == 'assistant'
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={'include_usage': True}))
    text = ''.join(piece.choices[0].delta.content or '' for piece in pieces if piece.choices)
    assert text == client.chat.completions.create(**asked).choices[0].message.content
    assert pieces[-1].usage.completion_tokens > 0
    done = client.completions.create(model='tiny', prompt='abc', max_tokens=5, echo=True, logprobs=2)
    assert done.choices[0].text.startswith('abc')
    assert [model.id for model in client.models.list()] == ['tiny']
    assert client.models.retrieve('tiny').id == 'tiny'
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve('gpt-4')
    with pytest.raises(openai.BadRequestError, match='tools is not supported'):
        client.chat.completions.create(**asked, tools=[{'type': 'function', 'function': {'name': 'f'}}])


USER = [{'role': 'user', 'content': 'abc'}]


@pytest.mark.parametrize('path, body, param, message', [
    ('completions', b'{', None, 'not JSON'),
    ('completions', b'\xff\xfe', None, 'not JSON'),
    ('completions', b'[' * 100_000, None, 'not JSON'),
    ('completions', b'[]', None, 'expected a JSON object'),
    ('completions', b'{"prompt": "a", "temperature": NaN}', None, 'not JSON'),
    ('completions', b'{"prompt": "a", "temperature": 1e999}', None, 'not JSON'),
    ('completions', b'{"prompt": "\\ud800"}', None, 'not JSON'),
    ('chat/completions', b'{"messages": [{"role": "\\udfff", "content": "a"}]}', None, 'not JSON'),
    ('completions', {'prompt': 'a', 'max_tokens': 10**400}, 'max_tokens', 'between 0'),
    ('completions', {}, 'prompt', 'between 1 and'),
    ('completions', {'prompt': []}, 'prompt', 'between 1 and'),
    ('completions', {'prompt': [[]]}, 'prompt', 'token ids'),
    ('completions', {'prompt': [10**9]}, 'prompt', 'token ids'),
    ('completions', {'prompt': [True, False]}, 'prompt', 'token ids'),
    ('completions', {'prompt': 'ABC'}, 'prompt', 'never seen'),
    ('completions', {'prompt': 'a' * 200}, 'prompt', 'a context of 120'),
    ('completions', {'prompt': 'a', 'max_tokens': -1}, 'max_tokens', 'between 0'),
    ('completions', {'prompt': 'a', 'max_tokens': True}, 'max_tokens', 'wrong type'),
    ('completions', {'prompt': 'a', 'temperature': 99}, 'temperature', 'between 0 and 5'),
    ('completions', {'prompt': 'a', 'top_p': 'x'}, 'top_p', 'wrong type'),
    ('completions', {'prompt': 'a', 'n': 1000}, 'n', 'between 1 and 16'),
    ('completions', {'prompt': 'a', 'stop': ['x'] * 10_000}, 'stop', 'at most 16'),
    ('completions', {'prompt': 'a', 'stop': [1]}, 'stop', 'at most 16'),
    ('completions', {'prompt': 'a', 'suffix': 'b'}, 'suffix', 'not supported'),
    ('completions', {'prompt': 'a', 'logit_bias': {'1': 5}}, 'logit_bias', 'not supported'),
    ('completions', {'prompt': 'a', 'presence_penalty': 1}, 'presence_penalty', 'not supported'),
    ('completions', {'prompt': 'a', 'temprature': 1}, 'temprature', 'unknown parameter'),
    ('chat/completions', {}, 'messages', 'expected a list'),
    ('chat/completions', {'messages': []}, 'messages', 'it has no message'),
    ('chat/completions', {'messages': [{'role': 'robot', 'content': 'a'}]}, 'messages', 'robot'),
    ('chat/completions', {'messages': [*USER, *USER]}, 'messages', 'after the user'),
    ('chat/completions', {'messages': [{'role': 'user', 'content': ''}]}, 'messages', 'is empty'),
    ('chat/completions', {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'messages', 'image_url'),
    ('chat/completions', {'messages': USER, 'response_format': {'type': 'json_object'}}, 'response_format',
     'not supported'),
    ('chat/completions', {'messages': USER, 'logprobs': 5}, 'logprobs', 'wrong type'),
    ('chat/completions', {'messages': USER, 'top_logprobs': 5}, 'top_logprobs', 'needs logprobs'),
])
def test_a_bad_request_is_refused_in_openai_s_form(running, path, body, param, message):
    response = running.post(f'/v1/{path}', body)
    assert response.status_code == 400
    error = response.json()['error']
    assert error['type'] == 'invalid_request_error'
    assert error['param'] == param
    assert message in error['message']
    assert len(error['message']) < 300


def test_limits_and_unknown_paths_answer_in_the_same_form(running):
    assert running.post('/v1/completions', b' ' * (2 << 20)).status_code == 413
    assert running.get('/v1/nothing').json()['error']['message'] == 'GET /v1/nothing: Not Found'
    assert running.get('/v1/completions').status_code == 405
    assert running.get('/health').json() == {'status': 'ok'}


def send_raw(running, body, announced):
    """A connection on which `body` was sent as the beginning of a request of so many bytes."""
    connection = socket.create_connection(('127.0.0.1', running.port), timeout=10)
    head = f'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {announced}\r\n\r\n'
    connection.sendall(head.encode() + body)
    return connection


def answer_on(connection):
    """Status and code of the error that comes on a connection."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())['error']['code']


def test_a_body_of_100_megabytes_is_refused_before_it_has_come(running):
    with send_raw(running, b' ' * (1 << 20) + b' ', 100 * 10**6) as connection:
        assert answer_on(connection) == (413, 'request_too_large')


def test_half_a_request_disturbs_nobody_and_is_counted_when_its_client_leaves(running):
    left = 'flatgpt_requests_total{path="/v1/completions",status="499"} '
    before = running.get('/metrics').text.partition(left)[2].split()[:1]
    with send_raw(running, b'{"prompt": "a', 100):
        assert running.post('/v1/completions', {'prompt': 'a', 'max_tokens': 2}).status_code == 200
    wait_until(lambda: running.get('/metrics').text.partition(left)[2].split()[:1] != before, 10)


@pytest.mark.full
def test_a_request_that_does_not_arrive_in_time_is_refused():
    with a_server(limits=Limits(seconds=0.0)) as server, send_raw(server, b'{', 100) as connection:
        assert answer_on(connection) == (408, 'timeout')


def test_a_key_is_asked_for():
    with a_server(api_key='secret') as server:
        body = {'prompt': 'a', 'max_tokens': 2}
        for headers in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': 'Basic secret'}):
            refused = server.post('/v1/completions', body, **headers)
            assert refused.status_code == 401
            assert refused.json()['error']['code'] == 'invalid_api_key'
        assert server.get('/v1/models').status_code == 401
        assert server.post('/v1/completions', body, Authorization='Bearer secret').status_code == 200


def test_a_model_without_a_template_says_so():
    with a_server(template=None) as server:
        refused = server.post('/v1/chat/completions', {'messages': USER})
        assert (refused.status_code, refused.json()['error']['code']) == (400, 'no_chat_template')


def test_a_template_that_makes_nothing_is_an_error_of_the_request():
    with a_server(template='{# nothing #}') as server:
        refused = server.post('/v1/chat/completions', {'messages': USER})
        assert refused.status_code == 400 and 'a prompt of 0 tokens' in refused.json()['error']['message']


def test_a_full_queue_and_a_deadline_are_told():
    with a_server(limits=Limits(rows=1, queue=1, tokens=100)) as server:
        refused = server.post('/v1/completions', {'prompt': 'a', 'n': 2})
        assert refused.status_code == 429
        assert refused.headers['Retry-After'] == '1'
    with a_server(limits=Limits(rows=1, seconds=0.0)) as server:
        late = server.post('/v1/completions', {'prompt': 'a'})
        assert (late.status_code, late.json()['error']['code']) == (503, 'timeout')


def test_many_clients_of_whom_some_leave_get_what_each_gets_alone(running):
    import requests

    generator = random.Random(0)
    asked = [{'prompt': ''.join(generator.choices('abcdefgh', k=generator.randint(1, 30))), 'seed': i,
              'max_tokens': generator.randint(1, 50)} for i in range(40)]
    expected = [alone(running.model, body['prompt'], body['max_tokens'], seed=body['seed']).text for body in asked]
    got = [None] * len(asked)

    def client(i):
        if i % 10 == 9:
            with contextlib.suppress(requests.RequestException):
                requests.post(f'{running.url}/v1/completions', json={**asked[i], 'stream': True}, stream=True,
                              timeout=0.02)
            return
        got[i] = running.post('/v1/completions', asked[i]).json()['choices'][0]['text']

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, text in enumerate(got):
        assert text == expected[i] or i % 10 == 9
    wait_until(lambda: not running.server.worker.running, 10)


def test_prompts_are_encoded_one_at_a_time(running, monkeypatch):
    encode, inside, most = TOK.encode, [], []

    def slow_encode(*args, **options):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return encode(*args, **options)

    monkeypatch.setattr(TOK, 'encode', slow_encode)
    bodies = [('completions', {'prompt': 'abc'}), ('chat/completions', {'messages': USER})] * 3
    statuses = []
    threads = [threading.Thread(target=lambda path=path, body=body: statuses.append(
        running.post(f'/v1/{path}', {**body, 'max_tokens': 1}).status_code)) for path, body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 6 and max(most) == 1


def test_a_client_that_leaves_frees_its_place():
    import requests

    with a_server(limits=Limits(rows=1, tokens=10**6)) as server:
        server.model.config.block_size = 119
        with requests.post(f'{server.url}/v1/completions', json={'prompt': 'a', 'stream': True, 'temperature': 5.0},
                       stream=True, timeout=10) as response:
            next(response.iter_content(1))
        wait_until(lambda: not server.server.worker.running, 10)
        assert server.post('/v1/completions', {'prompt': 'a', 'max_tokens': 2}).status_code == 200


def test_metrics_count(running):
    before = running.get('/metrics').text
    running.post('/v1/completions', {'prompt': 'abc', 'max_tokens': 4, 'temperature': 0})
    running.post('/v1/completions', {'prompt': 7})
    after = running.get('/metrics').text

    def value(text, name):
        found = [line for line in text.splitlines() if line.startswith(name + ' ')]
        return float(found[0].split()[-1]) if found else 0

    ok = 'flatgpt_requests_total{path="/v1/completions",status="200"}'
    assert value(after, ok) == value(before, ok) + 1
    assert value(after, ok.replace('200', '400')) == value(before, ok.replace('200', '400')) + 1
    read = 'flatgpt_tokens_total{kind="prompt"}'
    assert value(after, read) == value(before, read) + 3
    assert value(after, 'flatgpt_first_token_seconds_count') == value(before, 'flatgpt_first_token_seconds_count') + 1
    seconds = 'flatgpt_first_token_seconds'
    assert value(after, f'{seconds}_bucket{{le="+Inf"}}') == value(after, f'{seconds}_count')


def test_the_page_can_load_and_call_nothing_else(running):
    page = running.get('/')
    assert page.headers['Content-Type'].startswith('text/html')
    assert "default-src 'none'" in page.headers['Content-Security-Policy']
    assert 'innerHTML' not in page.text
    assert not any(word in page.text for word in ('src="http', "src='http", '@import', 'document.write', 'eval('))


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                               st.text(max_size=6), inner, max_size=3),
                           max_leaves=6)


@pytest.mark.parametrize('path', ['completions', 'chat/completions'])
@quick
@given(st.dictionaries(
    st.sampled_from(['prompt', 'messages', 'max_tokens', 'n', 'stop', 'temperature', 'logprobs', 'echo', 'stream',
                     'seed', 'top_k', 'tools', 'x', 'stream_options', 'model']), json_values))
def test_anything_gets_an_answer_or_an_error_and_disturbs_nobody(running, path, body):
    response = running.post(f'/v1/{path}', {'max_tokens': 3, **body})
    assert response.status_code in (200, 400)
    if response.status_code == 400:
        assert response.json()['error']['message']
    assert running.decoding.is_alive()


@pytest.mark.parametrize('path', ['completions', 'chat/completions'])
@quick
@given(st.binary(max_size=60), st.integers(0, 100))
def test_bytes_that_are_no_request_are_refused(running, path, noise, at):
    body = json.dumps({'prompt': 'abc', 'max_tokens': 2}).encode()
    response = running.post(f'/v1/{path}', body[:at] + noise + body[at:])
    assert response.status_code in (200, 400)
    assert response.status_code == 200 or response.json()['error']['message']


def test_the_end_of_the_server_waits_for_what_runs():
    server = Running(Limits(rows=1))
    got = []
    body = {'prompt': 'a', 'temperature': 3.0}
    thread = threading.Thread(target=lambda: got.append(server.post('/v1/completions', body)))
    thread.start()
    wait_until(lambda: server.server.worker.running or got)
    server.close()
    thread.join(10)
    assert got[0].status_code == 200
    assert not server.decoding.is_alive()
