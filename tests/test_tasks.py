"""
Questions that can be checked: their answers are right, the checks tell right from wrong, and queries are contained.
"""

import itertools
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import quick

from flatgpt import queries, tasks
from flatgpt.tasks import KINDS, LANGUAGES, Question

CASES = list(itertools.product(KINDS, LANGUAGES))


def some(kind, language, number=300, held_out=False):
    return list(itertools.islice(tasks.questions(kind, language, seed=0, held_out=held_out), number))


def alike(a, b):
    """Whether two results are of one sort: numbers, or of one list of names."""
    by_language = (tasks.DAYS, tasks.MONTHS, tasks.FRUIT, tasks.COLORS)
    lists = [names[language] for names in by_language for language in LANGUAGES]
    return (a.isdigit() and b.isdigit()) or any(a in names and b in names for names in lists)


@pytest.mark.parametrize('kind, language', CASES)
def test_the_good_answer_is_correct_and_one_with_another_result_is_not(kind, language):
    questions = some(kind, language, 40)
    for question, other in itertools.product(questions, questions):
        assert tasks.is_correct(question, question.answer)
        if other.result != question.result and alike(question.result, other.result):
            wrong = other.result.join(question.answer.rsplit(question.result, 1))
            assert not tasks.is_correct(question, wrong), (question, wrong)
    assert not any(tasks.is_correct(question, '') for question in questions)


@pytest.mark.parametrize('language', LANGUAGES)
def test_each_step_of_a_computation_has_the_same_value(language):
    for question in some('arithmetic', language):
        steps = question.answer.rstrip('.。').replace('×', '*').split(' = ')
        values = {eval(step) for step in steps}
        assert values == {int(question.result)}, question


def test_computations_ask_for_what_they_answer():
    for question in some('arithmetic', 'en'):
        numbers = [int(number) for number in re.findall(r'\d+', question.text)]
        if len(numbers) == 2 and '{' not in question.text:
            assert sorted(numbers) == sorted(int(n) for n in re.findall(r'\d+', question.answer)[:2])


@pytest.mark.parametrize('number, english, chinese', [
    (0, 'zero', '零'), (10, 'ten', '十'), (11, 'eleven', '十一'), (20, 'twenty', '二十'), (42, 'forty-two', '四十二'),
    (99, 'ninety-nine', '九十九'), (15, 'fifteen', '十五'), (70, 'seventy', '七十')])
def test_numbers_in_words(number, english, chinese):
    assert tasks.number_in_words(number, 'en') == english
    assert tasks.number_in_words(number, 'zh') == chinese


def test_different_numbers_have_different_words():
    for language in LANGUAGES:
        assert len({tasks.number_in_words(number, language) for number in range(100)}) == 100


@pytest.mark.parametrize('kind, language', CASES)
def test_what_is_held_out_is_never_learned_in_another_wording(kind, language):
    learned = {question.key for question in some(kind, language)}
    if kind == 'talk':
        assert learned and next(tasks.questions(kind, language, 0, held_out=True))   # the same ones
        return
    held_out = {question.key for question in some(kind, language, 100, held_out=True)}
    assert held_out and learned and not held_out & learned


def test_a_tenth_is_held_out():
    generator = random.Random(0)
    questions = [tasks.lookup(generator, 'en') for _ in range(3000)]
    assert 0.08 < sum(map(tasks.is_held_out, questions)) / 3000 < 0.12


def test_questions_depend_on_the_seed_alone():
    def first(seed):
        return list(itertools.islice(tasks.questions('lookup', 'zh', seed, False), 5))

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize('kind, result, answer, correct', [
    ('arithmetic', '85', '47 + 38 = 70 + 15 = 85.', True), ('arithmetic', '85', '85', True),
    ('arithmetic', '85', '85 - 3 = 82', False), ('arithmetic', '85', 'no idea', False),
    ('lookup', 'red', 'The apple is red.', True), ('lookup', 'red', 'The apple is red, no: blue.', False),
    ('lookup', 'kiwi', 'The kiwi costs 45.', True), ('lookup', '45', 'The kiwi costs 45.', True),
    ('lookup', '45', 'The kiwi costs 4.', False), ('dates', 'Sunday', '3 days after Thursday is Sunday.', True),
    ('dates', 'Sunday', '3 days before Sunday is Thursday.', False),
    ('unknown', 'do not know', 'I do not know.', True), ('unknown', 'do not know', 'Rain.', False),
    ('sql', 'SELECT MAX(price) FROM fruit;', 'select max(price) from fruit', True),
    ('sql', 'SELECT MAX(price) FROM fruit;', 'SELECT MIN(price) FROM fruit', False),
    ('sql', 'SELECT name FROM fruit ORDER BY price LIMIT 3;', 'SELECT name FROM fruit ORDER BY price LIMIT 4', False),
    ('sql', 'SELECT MAX(price) FROM fruit;', 'the highest price', False)])
def test_an_answer_is_judged_by_what_it_ends_with(kind, result, answer, correct):
    assert tasks.is_correct(Question(kind, 'en', '', '', result, ''), answer) == correct


@pytest.mark.parametrize('result, answer, correct', [
    ('1月', '12月之后是1月。', True), ('11月', '10月之后是11月。', True), ('1月', '10月之后是11月。', False)])
def test_a_month_in_another_is_not_taken_for_it(result, answer, correct):
    assert tasks.is_correct(Question('dates', 'zh', '', '', result, ''), answer) == correct


@pytest.mark.parametrize('query', [
    "ATTACH 'stolen.db' AS x", 'PRAGMA writable_schema = 1', 'DROP TABLE fruit', 'DELETE FROM fruit',
    "INSERT INTO fruit VALUES ('a', 'b', 1)", 'CREATE TABLE x (y)', 'VACUUM', 'BEGIN', "SELECT load_extension('x')",
    "SELECT hex(randomblob(999999999))", "SELECT printf('%.*c', 999999999, 'x')", 'SELECT 1; SELECT 2', '', '\0',
    'SELEC', 'SELECT a.name FROM fruit a, fruit b', 'SELECT * FROM missing', "SELECT '\ud800'",
    'SELECT 1' + '0' * 200_000])
def test_a_hostile_or_wrong_query_gives_nothing(query):
    assert not queries.run_sql(query) or query == ''


@pytest.mark.parametrize('query', [
    'WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c',
    'SELECT COUNT(*) FROM fruit a, fruit b, fruit c, fruit d, fruit e, fruit f, fruit g'])
def test_a_query_without_end_is_stopped(query):
    begun = time.perf_counter()
    assert queries.run_sql(query, seconds=0.1) is None
    assert time.perf_counter() - begun < 3


def test_a_query_that_reads_gives_its_rows():
    assert queries.run_sql('SELECT COUNT(*), MIN(name) FROM fruit WHERE price >= 0') == [(40, 'fruit 0')]
    for question in some('sql', 'en', 60):
        assert queries.run_sql(question.result) is not None


@pytest.mark.parametrize('language', LANGUAGES)
def test_a_table_can_be_asked_about_again_without_being_repeated(language):
    generator = random.Random(0)
    for question in some('lookup', language):
        again = tasks.lookup(generator, language, question)
        table = again.key.removesuffix(again.text)
        entries = dict(re.findall(rf'({"|".join(tasks.FRUIT[language])}) ?(\w+)', table))
        assert len(entries) >= 3 and question.text.startswith(table)
        asked = again.text.replace(again.result, '')   # of the entry, the text has what is not the result
        assert any((name in asked and again.result == value) or (value in asked and again.result == name)
                   for name, value in entries.items())
        assert tasks.is_correct(again, again.answer)


@quick
@given(st.integers(0, 10**6))
def test_a_conversation_is_one_that_can_be_learned(seed):
    from flatgpt.conversation import validate

    generator = random.Random(seed)
    messages = tasks.conversation(generator, lambda kind, language: KINDS[kind](generator, language))
    validate(messages)
    assert 2 <= len(messages) <= 6
