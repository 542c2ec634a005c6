"""Reward functions, their questions, and what a hostile answer can do: nothing."""

import itertools
import json
import os
import time

import numpy as np
import pytest

from flatgpt import queries, rewards, tasks
from flatgpt.errors import UsageError, UserError
from flatgpt.tokenizer import BpeTokenizer, CharTokenizer

QUESTION = {'kind': 'arithmetic', 'language': 'en', 'text': 'What is 1 + 2?', 'answer': '1 + 2 = 3.', 'result': '3',
            'key': '1 + 2'}


def function(tmp_path, body, name='correct'):
    """The name of a reward function with this body."""
    path = tmp_path / 'rewards.py'
    path.write_text(f'import math\n\n\ndef {name}(question, answer):\n    {body}\n')
    return f'{path}:{name}'


# ---------------------------------------------------------------------------------------------------------------------
# functions

def test_the_name_of_a_kind_of_question_means_its_checker():
    reward = rewards.load('arithmetic')
    assert reward(QUESTION, 'It is 3.') == 1.0 and reward(QUESTION, '3 or 4') == 0.0
    query = {**QUESTION, 'kind': 'sql', 'result': 'SELECT MAX(price) FROM fruit;'}
    assert rewards.load('sql')(query, 'select max(price) from fruit') == 1.0


@pytest.mark.parametrize('body, value', [
    ('return len(answer) / 10', 0.4), ("return question['result'] in answer", 1.0), ('return -2', -2.0),
    ('import numpy; return numpy.float32(0.5)', 0.5), ('import torch; return torch.tensor(1.5)', 1.5)])
def test_a_function_of_a_file_gets_the_question_and_the_answer(tmp_path, body, value):
    number = rewards.load(function(tmp_path, body))(QUESTION, 'a 3!')
    assert number == value and type(number) is float


def test_a_function_cannot_change_the_question(tmp_path):
    asked = dict(QUESTION)
    rewards.load(function(tmp_path, 'question.clear(); return 1'))(asked, '')
    assert asked == QUESTION


@pytest.mark.parametrize('body, problem', [
    ('return 1 / 0', 'fails: ZeroDivisionError: division by zero'), ('return math.nan', 'returns nan'),
    ('return math.inf', 'returns inf'), ("return '1.0'", "returns '1.0'"), ('return None', 'returns None'),
    ('return [1.0]', 'returns [1.0]'), ("return question['missing']", "fails: KeyError: 'missing'")])
def test_a_reward_that_is_no_number_is_one_line_with_the_question_and_the_answer(tmp_path, body, problem):
    with pytest.raises(UserError) as error:
        rewards.load(function(tmp_path, body))(QUESTION, 'an\nanswer')
    line = str(error.value)
    assert problem in line and "question 'What is 1 + 2?', answer 'an\\nanswer'" in line and '\n' not in line


@pytest.mark.parametrize('name, error, words', [
    ('arithmetik', UsageError, "reward='arithmetik': expected FILE.py:FUNCTION or one of arithmetic, "),
    ('{folder}/no.py:f', UserError, 'there is no {folder}/no.py'),
    ('{folder}/text.txt:f', UserError, 'text.txt fails: SyntaxError: '),
    ('{folder}/broken.py:f', UserError, 'broken.py fails: NameError: '),
    ('{folder}/good.py:corect', UserError, "good.py has no function 'corect': expected corect(question, answer) -> "
                                           'float; do you mean correct?'),
    ('{folder}/good.py:number', UserError, "has no function 'number'")])
def test_a_name_without_a_function_is_refused(tmp_path, name, error, words):
    (tmp_path / 'text.txt').write_text('some text')
    (tmp_path / 'broken.py').write_text('nothing')
    (tmp_path / 'good.py').write_text('number = 3\ncorrect = max\n')
    with pytest.raises(error) as raised:
        rewards.load(name.format(folder=tmp_path))
    assert words.format(folder=tmp_path) in str(raised.value)
    assert 'arithmetik' not in name or str(raised.value).endswith('do you mean arithmetic?')


# ---------------------------------------------------------------------------------------------------------------------
# hostile answers

@pytest.mark.parametrize('query', [
    "ATTACH 'stolen.db' AS x", 'PRAGMA journal_mode = DELETE', 'PRAGMA temp_store_directory = "/"',
    "VACUUM INTO 'x.db'",
    'WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c',
    'SELECT a.name FROM fruit a, fruit b, fruit c, fruit d, fruit e, fruit f',   # 4 · 10^9 rows
    'SELECT COUNT(*) FROM fruit a, fruit b, fruit c, fruit d, fruit e, fruit f',
    'SELECT a.price FROM fruit a, fruit b, fruit c, fruit d, fruit e ORDER BY a.price + b.price',
    'CREATE TABLE x (y)', 'DROP TABLE fruit', "SELECT load_extension('x.so')", "SELECT readfile('/etc/passwd')"])
def test_a_hostile_query_costs_its_time_limit_at_most_and_touches_nothing(query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(queries.run_sql, '__defaults__', (0.1, 1000))   # seconds, rows
    question = {**QUESTION, 'kind': 'sql', 'result': 'SELECT MAX(price) FROM fruit;'}
    before = queries.run_sql('SELECT * FROM fruit')
    begun = time.process_time()
    assert rewards.load('sql')(question, query) == 0.0
    assert time.process_time() - begun < 1
    assert os.listdir(tmp_path) == [] and queries.run_sql('SELECT * FROM fruit') == before


# ---------------------------------------------------------------------------------------------------------------------
# questions

def test_generated_questions_are_a_function_of_their_seed_in_both_languages_and_held_out_or_not():
    found = rewards.generate('arithmetic', 'a', 10, held_out=False)
    assert found == rewards.generate('arithmetic', 'a', 20, held_out=False)[:10]
    assert found != rewards.generate('arithmetic', 'b', 10, held_out=False)
    assert [question['language'] for question in found] == ['en', 'zh'] * 5
    assert not any(tasks.is_held_out(tasks.Question(**question)) for question in found)
    assert all(tasks.is_held_out(tasks.Question(**question)) for question in rewards.generate('sql', 0, 6, True))


def lines(tmp_path, *records):
    path = tmp_path / 'questions.jsonl'
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def test_questions_of_a_file_are_its_records(tmp_path):
    records = [{'prompt': 'a'}, {'text': 'b', 'more': [1]}, {'messages': [{'role': 'user', 'content': 'c'}]}]
    found = rewards.read(lines(tmp_path, *records), of_tasks=False)
    assert found == records and [rewards.asked(question) for question in found] == ['a', 'b', 'c']
    assert rewards.read(lines(tmp_path, QUESTION), of_tasks=True) == [QUESTION]


@pytest.mark.parametrize('record, of_tasks, words', [
    ([1], False, 'line 2: expected an object'), ({'q': 'a'}, False, 'line 2: expected "messages", "prompt" or "text"'),
    ({'prompt': 3}, False, 'line 2: expected "messages"'), ({'messages': []}, False, 'line 2: it has no message'),
    ({'messages': [{'role': 'user', 'content': ' '}]}, False, 'line 2: message 1, of the user, is empty'),
    ({'text': 'a'}, True, 'line 2: "kind" is None, expected a text'),
    ({**QUESTION, 'kind': 'riddles'}, True, "line 2: kind 'riddles'"),
    ({**QUESTION, 'language': 'fr'}, True, "language 'fr': expected one of")])
def test_a_wrong_question_is_named_by_its_line(tmp_path, record, of_tasks, words):
    with pytest.raises(UserError, match='questions.jsonl') as error:
        rewards.read(lines(tmp_path, QUESTION, record), of_tasks)
    assert words in str(error.value)


def test_no_question_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match='is empty'):
        rewards.read(lines(tmp_path), False)


def test_a_prompt_is_encoded_as_it_is_and_a_text_by_the_template_of_the_model():
    from flatgpt.conversation import add_chatml

    plain = CharTokenizer('abc?')
    assert plain.decode(rewards.prompt_ids(plain, {'text': 'abc?'})) == 'abc?'
    with pytest.raises(UserError, match='no chat template'):
        rewards.prompt_ids(plain, {'messages': [{'role': 'user', 'content': 'a'}]})
    tok = BpeTokenizer.train(['ab ab ab'], 270, special=('<|im_start|>', '<|im_end|>'))
    template = add_chatml(tok)
    expected = template.prompt_ids(tok, [{'role': 'user', 'content': 'ab?'}])
    for question in ({'text': 'ab?'}, {'messages': [{'role': 'user', 'content': 'ab?'}], 'text': 'no'}):
        assert np.array_equal(rewards.prompt_ids(tok, question), expected)
    rendered = '<|im_start|>user\nab?<|im_end|>\n<|im_start|>assistant\n'
    assert np.array_equal(rewards.prompt_ids(tok, {'prompt': rendered, 'text': 'no'}), expected)


# ---------------------------------------------------------------------------------------------------------------------
# figures

@pytest.mark.parametrize('n, right', [(5, 0), (5, 1), (5, 3), (6, 6), (1, 1)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_with_a_right_one(n, right):
    answers = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        chosen = list(itertools.combinations(answers, k))
        assert rewards.pass_at_k(n, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_right_answers_are_counted_by_kind_and_language_and_samples_give_pass_at_k():
    asked = [QUESTION, {**QUESTION, 'language': 'zh'}, QUESTION]
    values = [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]   # three samples
    assert rewards.right_answers(asked, values) == {
        'arithmetic en': [1.0, 1 / 3], 'arithmetic zh': [0.0], 'pass@1': [1.0, 0.0, pytest.approx(1 / 3)],
        'pass@2': [1.0, 0.0, pytest.approx(2 / 3)]}
    assert rewards.right_answers([{'text': 'a'}], [[0.5], [1.5]]) == {
        'right': [0.5], 'reward': [1.0], 'pass@1': [0.5], 'pass@2': [1.0]}


def test_what_is_asked_is_generated_or_read_and_then_of_the_kind_that_is_checked(tmp_path):
    query = {**QUESTION, 'kind': 'sql'}
    path = str(lines(tmp_path, QUESTION, query, query))
    assert rewards.to_ask(path, None, None) == [QUESTION, query, query]
    assert rewards.to_ask(path, 'sql', None) == [query, query] and rewards.to_ask(path, None, 1) == [QUESTION]
    assert rewards.to_ask(None, 'dates', 7) == rewards.generate('dates', 'val', 7, held_out=True)
    assert rewards.to_ask('dates', 'x.py:f', None) == rewards.generate('dates', 'val', 200, held_out=True)
    with pytest.raises(UserError, match='no question of kind units'):
        rewards.to_ask(path, 'units', None)
    with pytest.raises(UsageError, match="check='x.py:f' needs questions"):
        rewards.to_ask(None, 'x.py:f', None)
