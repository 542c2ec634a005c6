"""
Rewards: how good an answer to a question is, as a number that a function computes. grpo.py learns from them, --check
of eval.py counts with them.

    'arithmetic', 'sql', ...     a kind of question of flatgpt/tasks.py: 1 for a right answer, else 0
    'rewards.py:correct'         the function correct(question, answer) -> float of your file rewards.py

A question is a dictionary: the record of a file, with what is asked in "messages", "prompt" or "text" and anything else
that the function needs. An answer is a text. Your file is executed, as any program that you start: it is not
restricted. An answer is only data to it; what it does with an answer, such as running code, is what it must restrict.
"""

import itertools
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flatgpt import corpus, tasks
from flatgpt.conversation import chat_template_of, messages_from
from flatgpt.errors import UsageError, UserError, do_you_mean, nothing_at

Reward = Callable[[dict, str], float]


# ---------------------------------------------------------------------------------------------------------------------
# reward functions

def load(name: str) -> Reward:
    """Return the function, (question, answer) -> float, that a name means. It raises UserError, with the question and
    the answer, if the user's function fails or returns anything but a finite number. UsageError, UserError for a name
    that means none."""
    if name in tasks.KINDS:
        return is_right
    path, _, function = name.rpartition(':')
    if not path:
        raise UsageError(f'reward={name!r}: expected FILE.py:FUNCTION or one of {", ".join(tasks.KINDS)}'
                         f'{do_you_mean(name, tasks.KINDS)}')
    wanted = Path(path).expanduser()
    if not wanted.is_file():
        raise UserError(f'reward={name!r}: {nothing_at(str(wanted))}')
    try:
        found = runpy.run_path(str(wanted))
    except Exception as error:   # it is the user's code
        raise UserError(f'{wanted} fails: {type(error).__name__}: {error}') from None
    if not callable(found.get(function)):
        raise UserError(f'{wanted} has no function {function!r}: expected {function}(question, answer) -> float'
                        f'{do_you_mean(function, found)}')
    return checked(found[function], name)


def is_right(question: dict, answer: str) -> float:
    """Return 1.0 if an answer to a question of flatgpt/tasks.py is right, else 0.0."""
    return float(tasks.is_correct(tasks.Question(*map(question.get, tasks.Question._fields)), answer))


def checked(user_function: Callable, name: str) -> Reward:
    """Return a user's function with its mistakes as UserErrors."""
    def reward(question, answer):
        try:
            value = user_function(dict(question), answer)
            number = float(value) if hasattr(value, '__float__') else math.nan   # a text has none
            problem = f'returns {value!r:.60}, expected a finite number'
        except Exception as error:   # it is the user's code
            number = math.nan
            problem = f'fails: {type(error).__name__}: {error}'
        if math.isfinite(number):
            return number
        raise UserError(f'reward={name!r} {problem}; question {asked(question)!r:.200}, answer {answer!r:.200}')

    return reward


# ---------------------------------------------------------------------------------------------------------------------
# questions

def generate(kind: str, seed, n: int, held_out: bool) -> list[dict]:
    """Return n questions of a kind of flatgpt/tasks.py, every second one in Chinese: a pure function of the arguments.
    held_out: whether they are those that are never learned."""
    streams = [tasks.questions(kind, language, seed, held_out) for language in tasks.LANGUAGES]
    turns = itertools.chain.from_iterable(zip(*streams))
    return [question._asdict() for question in itertools.islice(turns, n)]


def read(path: str, of_tasks: bool) -> list[dict]:
    """Return the questions in a file of records, such as .jsonl, each with "messages", "prompt" or "text". of_tasks:
    whether they need the other fields of tasks.Question. UserError names the line that is wrong."""
    questions = []
    for where, record in corpus.read_records(path):
        if not isinstance(record, dict):
            raise UserError(f'{where}: expected an object, {{...}}, not {record!r:.60}')
        for name in tasks.Question._fields if of_tasks else ():
            if not isinstance(record.get(name), str):
                raise UserError(f'{where}: "{name}" is {record.get(name)!r:.60}, expected a text: it has '
                                f'{", ".join(map(repr, record)) or "nothing"}')
        if of_tasks and (record['kind'] not in tasks.KINDS or record['language'] not in tasks.LANGUAGES):
            raise UserError(f'{where}: kind {record["kind"][:40]!r}, language {record["language"][:40]!r}: expected '
                            f'one of {", ".join(tasks.KINDS)}, and one of {", ".join(tasks.LANGUAGES)}')
        if 'messages' in record:
            messages_from(record['messages'], where, answered=False)
        elif not isinstance(record.get('prompt', record.get('text')), str):
            raise UserError(f'{where}: expected "messages", "prompt" or "text", found '
                            f'{", ".join(map(repr, record)) or "nothing"}')
        questions.append(record)
    if not questions:
        raise UserError(f'{path} is empty: expected one object per line or row')
    return questions


def to_ask(path: str | None, check: str | None, limit: int | None) -> list[dict]:
    """Return the questions that the options questions and check of eval.py mean, at most `limit` of them: those of a
    file, of one kind if check is a kind; or generated ones that are held out, by default 200."""
    kind = path if path in tasks.KINDS else check
    if path in tasks.KINDS or path is None:
        if kind not in tasks.KINDS:
            raise UsageError(f'check={check!r} needs questions: give --questions=FILE, or a kind such as '
                             f'--questions=arithmetic')
        return generate(kind, 'val', limit or 200, held_out=True)
    found = read(path, of_tasks=check is None or check in tasks.KINDS)
    found = [question for question in found if check not in tasks.KINDS or question['kind'] == check]
    if not found:
        raise UserError(f'{path} has no question of kind {check}')
    return found[:limit]


def asked(question: dict) -> str:
    """Return what a question asks, as text."""
    if 'messages' in question:
        return question['messages'][-1].get('content', '')
    return question.get('text', question.get('prompt', ''))


def prompt_ids(tok, question: dict) -> np.ndarray:
    """Return the token ids, (T,), of a question for a model: "prompt" as it is, special tokens and all; else "messages"
    or "text", which a user says, by the chat template of the model. Without a template, "text" as it is."""
    if 'prompt' in question:
        return tok.encode_prompt(question['prompt'])
    template = chat_template_of(tok)
    if template is None and 'messages' not in question:
        return tok.encode_prompt(question['text'])
    if template is None:
        raise UserError('the model has no chat template, which "messages" need: give questions with "prompt"')
    messages = question.get('messages') or [{'role': 'user', 'content': question['text']}]
    return template.prompt_ids(tok, messages_from(messages, answered=False))


# ---------------------------------------------------------------------------------------------------------------------
# figures

def right_answers(asked: Sequence[dict], values: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """The figures of questions that were answered once or several times, {name: one number per question}. values: for
    each sample, the rewards of the answers; 1 or more is right.

    The share of right answers by kind and language, where the questions have these, else 'right'; then 'reward', if the
    rewards are others than 0 and 1; then of several samples the chance that one of k is right: 'pass@2', 'pass@4', ...
    """
    found = {}
    n = len(values)
    right = [sum(value >= 1 for value in of_question) for of_question in zip(*values)]
    for question, number in zip(asked, right):
        name = f'{question["kind"]} {question["language"]}' if {'kind', 'language'} <= question.keys() else 'right'
        found.setdefault(name, []).append(number / n)
    if not set(itertools.chain(*values)) <= {0.0, 1.0}:
        found['reward'] = [sum(of_question) / n for of_question in zip(*values)]
    for k in (2**i for i in range(n.bit_length())):   # up to n
        found[f'pass@{k}'] = [pass_at_k(n, number, k) for number in right]
    return found


def pass_at_k(n: int, right: int, k: int) -> float:
    """The probability that at least one of k answers is right, estimated without bias from n >= k answers of which so
    many are right: 1 - C(n - right, k) / C(n, k) (Chen et al., 2021, section 2.1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)
