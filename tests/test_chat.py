"""
chat.py, serve.py and data/chat/prepare.py as a person runs them, with a tiny model that has random weights.
"""

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, assert_one_line, needs, started
from in_process import call

from flatgpt import checkpoint, evaluation, tokenizer
from flatgpt.conversation import add_chatml, chat_template_of
from flatgpt.dataset import BEGINS, Dataset
from model import GPT, GPTConfig

WORDS = ['What is the sum of one and two? It is three. Which fruit is red? The apple is red. 你好！'] * 3
FAST = ('--device=cpu', '--dtype=float32')


def write_model(folder, template=True):
    """A model of random weights in folder, with a tokenizer that has ChatML's tokens."""
    tok = tokenizer.load('bpe:300', WORDS, special=('<|im_start|>', '<|im_end|>'))
    if template:
        add_chatml(tok)
    torch.manual_seed(1)
    model = GPT(GPTConfig(tok.vocab_size, 96, n_layer=1, n_head=2, n_embd=16))
    for p in model.parameters():
        p.data.mul_(8)
    folder.mkdir()
    checkpoint.save(folder / 'best.pt', {
        'model': model.state_dict(), 'model_args': model.config.to_dict(), 'iter_num': 3, 'best_val_loss': 1.0,
        'config': {}, 'tokenizer': tok.to_dict()})
    return folder


@pytest.fixture(scope='module')
def talker(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('chat') / 'out')


@pytest.fixture
def chat(talker, monkeypatch):
    """Runs chat.py here with these lines as stdin; its CompletedProcess."""
    def with_stdin(content, *args, status=0):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content.encode()), encoding='utf-8'))
        done = call('chat.py', f'--out_dir={talker}', '--max_new_tokens=8', *FAST, *args)
        assert done.returncode == status, done.stderr
        assert 'Traceback' not in done.stderr
        return done
    return with_stdin


# ---------------------------------------------------------------------------------------------------------------------
# chat.py

def test_a_piped_conversation_is_answered_turn_by_turn(talker):
    done = subprocess.run([sys.executable, ROOT / 'chat.py', f'--out_dir={talker}', '--max_new_tokens=8', *FAST],
                          input='What is red?\n\nAnd 你好？\n', capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    assert f'{talker / "best.pt"}, step 3' in done.stderr
    assert len(done.stdout) > 4


def test_answers_in_json_depend_on_the_seed_and_on_what_was_said_before(chat):
    def answers(*lines, seed=1):
        return [json.loads(line) for line in chat('\n'.join(lines), '--json', f'--seed={seed}').stdout.splitlines()]

    both = answers('"one"', '{"content": "two"}')
    assert [set(answer) for answer in both] == [{'content', 'tokens', 'finish_reason'}] * 2
    assert all(len(answer['tokens']) <= 8 and answer['finish_reason'] in ('stop', 'length') for answer in both)
    assert answers('"one"')[0] == both[0] != answers('"one"', seed=2)[0]
    assert answers('"three"', '"two"')[1] != both[1]


def test_the_oldest_turns_are_dropped_when_the_context_is_full(chat):
    done = chat('one red apple\n' * 6, '--system=kind')
    assert 'the context of 96 tokens is full: the 2 oldest messages are dropped' in done.stderr


@pytest.mark.parametrize('content, args, status, words', [
    ('red ' * 200, [], 1, ['tokens: expected fewer than the context of 96']),
    ('{bad', ['--json'], 1, ['no JSON']), ('[1]', ['--json'], 1, ['expected a JSON string']),
    ('{"content": 5}', ['--json'], 1, ['expected a JSON string']), ('" "', ['--json'], 1, ['your message', 'empty']),
    ('hi', ['--temperature=-1'], 2, ['temperature']), ('hi', ['--max_new_tokens=0'], 2, ['max_new_tokens=0']),
    ('hi', ['--quantize=int4'], 2, ['quantize']), ('hi', ['--init_from=missing-model'], 1, ['missing-model']),
])
def test_what_chat_refuses_is_one_line(chat, content, args, status, words):
    done = chat(content, *args, status=status)
    last = done.stderr.splitlines()[-1]
    assert all(word in last for word in words), done.stderr


def test_a_model_without_a_template_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(''))
    base = write_model(tmp_path / 'base', template=False)
    assert_one_line(call('chat.py', f'--out_dir={base}', *FAST), 1, 'has no chat template')
    talks = write_talks(tmp_path / 'talks.jsonl', 'messages')
    done = call('data/chat/prepare.py', f'--name={tmp_path / "made"}', f'--input={talks}', f'--tokenizer={base}')
    assert_one_line(done, 1, 'has no chat template')


@needs('linux')
def test_commands_in_a_terminal(talker, tmp_path):
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, ROOT / 'chat.py', f'--out_dir={talker}', '--max_new_tokens=5', '--temperature=2', *FAST]
    lines = ['red', '/reset', 'red', '/save talk.json', '/save ~/at home.json', '/system kind', '/load talk.json',
             '/load ~/marked.json', '/load missing.json', '/help', '/save', '/quit']
    marked = [{'role': 'user', 'content': 'marked'}, {'role': 'assistant', 'content': 'red'}]
    (tmp_path / 'marked.json').write_text('\ufeff' + json.dumps({'messages': marked}), encoding='utf-8')
    os.write(master, '\n'.join([*lines, '']).encode())
    done = subprocess.run(command, stdin=slave, capture_output=True, text=True, cwd=tmp_path, timeout=100,
                          env={**os.environ, 'HOME': str(tmp_path)})
    os.close(master)
    os.close(slave)
    assert done.returncode == 0, done.stderr
    first, again, *_ = done.stdout.replace('> ', '').splitlines()
    assert first == again   # a conversation that begins anew has the random numbers of the first
    saved = json.loads((tmp_path / 'talk.json').read_text(encoding='utf-8'))['messages']
    assert [message['role'] for message in saved] == ['user', 'assistant'] and saved[0]['content'] == 'red'
    assert (tmp_path / 'at home.json').read_bytes() == (tmp_path / 'talk.json').read_bytes()
    for words in ('2 messages in talk.json', 'user: red', 'user: marked', 'missing.json', '/system TEXT',
                  '/save: name a file'):
        assert words in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# serve.py

@needs('linux')
@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_server_answers_and_ends_with_status_0_when_it_is_told_to(talker, number):
    pytest.importorskip('uvicorn')
    args = f'--out_dir={talker}', '--port=0', '--api_key=secret', '--name=out\udcff', *FAST
    with started(ROOT / 'serve.py', *args) as process:
        log = []
        while 'running on' not in (log or [''])[-1]:
            log.append(process.stderr.readline())
            assert log[-1], log
        url = log[-1].split('running on ')[1].split(' ')[0]
        assert requests.get(f'{url}/health', timeout=60).json() == {'status': 'ok'}
        body = {'messages': [{'role': 'user', 'content': 'red'}], 'max_tokens': 5, 'seed': 1}
        assert requests.post(f'{url}/v1/chat/completions', json=body, timeout=60).status_code == 401
        headers = {'Authorization': 'Bearer secret'}
        answer = requests.post(f'{url}/v1/chat/completions', json=body, headers=headers, timeout=60).json()
        assert answer['usage']['completion_tokens'] <= 5 and answer['model'] == 'out\ufffd'   # a byte that is no UTF-8
        assert '<html' in requests.get(url, timeout=60).text
        process.send_signal(number)
        assert process.wait(60) == 0


@pytest.mark.parametrize('args, status, words', [
    (['--port=99999'], 2, ['port=99999']), (['--rows=0'], 2, ['rows=0']), (['--max_seconds=-1'], 2, ['max_seconds']),
    (['--quantize=int4'], 2, ['quantize']), (['--out_dir=missing'], 1, ['missing']),
])
def test_what_serve_refuses_is_one_line(args, status, words):
    assert_one_line(call('serve.py', *FAST, *args), status, *words)


def test_without_its_packages_serve_names_them(monkeypatch):
    monkeypatch.setitem(sys.modules, 'uvicorn', None)
    assert_one_line(call('serve.py'), 1, 'pip install starlette uvicorn')


# ---------------------------------------------------------------------------------------------------------------------
# data/chat/prepare.py

def prepare(folder, *args, status=0):
    done = call('data/chat/prepare.py', f'--name={folder}', *args)
    assert done.returncode == status, done.stderr
    return done


MADE_UP = ('--num_generated=60', '--tokenizer=bpe:400')


@pytest.fixture(scope='module')
def made_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp('chat') / 'made-up'
    prepare(folder, *MADE_UP)
    return folder


def test_a_dataset_has_conversations_whose_answers_are_marked(made_up):
    data = Dataset(str(made_up))
    tok = tokenizer.from_dict(data.tokenizer)
    assert chat_template_of(tok) is not None
    end = tok.ends[0]
    for split, number in (('train', 59), ('val', 1)):
        ids, mask = np.array(data.data[split]), np.array(data.mask[split])
        assert len(data.begins[split]) == number
        for begin in data.begins[split]:
            assert tok.decode(ids[begin:begin + 8]).startswith('<|im_start|>user\n')
        marked = tok.decode(ids[mask == 1]).split('<|im_end|>')
        assert marked.pop() == '' and all('<|im_start|>' not in text for text in marked)
        text = tok.decode(ids)
        assert marked == [turn.split('<|im_end|>')[0] for turn in text.split('<|im_start|>assistant\n')[1:]]
        assert (ids[mask == 1] == end).sum() == len(marked) >= number
    assert {len(tok.encode(str(number))) for number in range(10, 99)} == {2}   # each digit is a token


def test_the_questions_are_none_of_the_conversations_and_the_same_options_give_the_same_bytes(made_up, tmp_path):
    prepare(tmp_path / 'again', *MADE_UP)
    for name in ('train.bin', 'train.mask', 'val.bin', 'tokenizer.json', 'questions.jsonl'):
        assert (made_up / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()
    data = Dataset(str(made_up))
    text = tokenizer.from_dict(data.tokenizer).decode(data.data['train'])
    questions = [json.loads(line) for line in (made_up / 'questions.jsonl').read_text(encoding='utf-8').splitlines()]
    assert len({(question['kind'], question['language']) for question in questions}) == 12
    assert not any(f'user\n{question["text"]}<|im_end|>' in text for question in questions)
    prepare(tmp_path / 'other', *MADE_UP, '--seed=2')
    assert (tmp_path / 'other/train.bin').read_bytes() != (made_up / 'train.bin').read_bytes()


def test_the_right_answers_to_the_questions_are_counted_by_kind_and_language(made_up, talker, monkeypatch):
    asked = [json.loads(line) for line in (made_up / 'questions.jsonl').read_text(encoding='utf-8').splitlines()]
    said = [question['answer'] if question['language'] == 'en' else '?' for question in asked]
    monkeypatch.setattr(evaluation, 'generate_until', lambda *args: said)
    args = [f'--out_dir={talker}', f'--questions={made_up / "questions.jsonl"}', '--device=cpu']
    found = json.loads(call('eval.py', *args).stdout)['questions']
    assert found['n'] == len(asked)
    for kind in {question['kind'] for question in asked}:
        assert (found[f'{kind} en'], found[f'{kind} zh']) == (1, 0)


def test_the_questions_can_be_asked(made_up, talker, tmp_path):
    args = [f'--out_dir={talker}', '--max_new_tokens=3', '--limit=4', '--device=cpu']
    found = json.loads(call('eval.py', *args, f'--questions={made_up / "questions.jsonl"}').stdout)['questions']
    assert found['n'] == 4 and 0 <= found['arithmetic en'] <= 1
    line = json.loads((made_up / 'questions.jsonl').read_text(encoding='utf-8').splitlines()[0])
    (tmp_path / 'wrong.jsonl').write_text(json.dumps({**line, 'kind': 'riddles'}))
    assert_one_line(call('eval.py', *args, f'--questions={tmp_path / "wrong.jsonl"}'), 1, 'line 1', "kind 'riddles'")


FORMS = {
    'messages': lambda asked, said: {'messages': [{'role': 'user', 'content': asked},
                                                  {'role': 'assistant', 'content': said}]},
    'sharegpt': lambda asked, said: {'conversations': [{'from': 'human', 'value': asked},
                                                       {'from': 'gpt', 'value': said}]},
    'alpaca': lambda asked, said: {'instruction': asked, 'input': '', 'output': said},
}


def write_talks(path, form, number=10, long=0):
    """Conversations in a file, of which the first `long` are long."""
    records = [FORMS[form](f'Who is {i}?', f'It is {i}. ' * (40 if i < long else 1)) for i in range(number)]
    path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
    return path


def test_all_forms_of_files_give_the_same_dataset(tmp_path):
    for form in FORMS:
        prepare(tmp_path / form, f'--input={write_talks(tmp_path / f"{form}.jsonl", form)}', '--tokenizer=bpe:300')
    for name in ('train.bin', 'train.mask', 'val.bin', 'val.mask'):
        assert len({(tmp_path / form / name).read_bytes() for form in FORMS}) == 1


def test_the_template_of_a_model_is_used_and_too_long_conversations_are_left_out(talker, tmp_path):
    talks = write_talks(tmp_path / 'talks.jsonl', 'messages', 20, long=4)
    done = prepare(tmp_path / 'talks', f'--input={talks}', f'--tokenizer={talker}', '--max_tokens=60')
    assert 'left out: 4 conversations of more than 60 tokens' in done.stdout
    data = Dataset(str(tmp_path / 'talks'))
    assert data.tokenizer == checkpoint.load_model(talker)[1].to_dict()
    assert sum(map(len, data.begins.values())) == 16


@pytest.mark.parametrize('content, args, status, words', [
    ('{"messages": [{"role": "user", "content": "hi"}]}\n' * 3, [], 1, ['talks.jsonl', 'no message is of the assist']),
    ('{"text": "prose"}\n' * 3, [], 1, ['talks.jsonl', 'expected "messages"']),
    (json.dumps(FORMS['alpaca']('a', 'b')), [], 1, ['1 conversation', 'expected two or more']),
    (b'{"instruction": "a", "output": "\xff"}\n' * 3, [], 1, ['talks.jsonl', 'line 1', 'UTF-8']),
    (None, ['--max_tokens=3'], 1, ['max_tokens=3']),
    (None, ['--val_fraction=1'], 2, ['val_fraction']), (None, ['--num_generated=3'], 2, ['num_generated']),
])
def test_what_prepare_refuses_is_one_line_and_writes_nothing(tmp_path, content, args, status, words):
    path = write_talks(tmp_path / 'talks.jsonl', 'messages')
    if content:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = call('data/chat/prepare.py', f'--name={tmp_path / "made"}', f'--input={path}', '--tokenizer=bpe:300', *args)
    assert_one_line(done, status, *words)
    assert not (tmp_path / 'made').exists()


# ---------------------------------------------------------------------------------------------------------------------
# training on them

def test_conversations_of_which_many_are_longer_than_a_row_train_and_are_told(tmp_path):
    talks = write_talks(tmp_path / 'talks.jsonl', 'messages', 50, long=20)
    prepare(tmp_path / 'talks', f'--input={talks}', '--tokenizer=bpe:300')
    cut = Dataset(str(tmp_path / 'talks')).num_cut(48)
    assert cut >= 19
    done = call('train.py', f'--dataset={tmp_path / "talks"}', f'--out_dir={tmp_path / "out"}', '--block_size=48',
                '--batch_size=4', '--gradient_accumulation_steps=1', '--n_layer=1', '--n_head=2', '--n_embd=16',
                '--max_iters=30', '--eval_interval=15', '--eval_iters=2', '--warmup_iters=2', '--learning_rate=3e-2',
                '--schedule=linear', *FAST)
    assert done.returncode == 0, done.stderr
    assert f'{cut} of 49 conversations are longer than block_size=48' in done.stderr
    log = [json.loads(line) for line in (tmp_path / 'out/log.jsonl').read_text().splitlines()]
    losses = [entry['val_loss'] for entry in log if 'val_loss' in entry]
    assert losses[-1] < losses[0]   # nan is not
    done = call('eval.py', f'--out_dir={tmp_path / "out"}', f'--data={tmp_path / "talks"}', '--split=train',
                '--device=cpu')
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)['data']
    data = Dataset(str(tmp_path / 'talks'))
    assert report['tokens'] == (data.mask['train'] == 1).sum() and data.mask['train'][0] == BEGINS
    assert report['loss'] < losses[0]
