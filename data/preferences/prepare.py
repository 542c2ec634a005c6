"""
Pairs of answers for dpo.py, made by a program: the short answer is better than the one in a sentence or with its
working. The questions are those of data/chat.

    python data/preferences/prepare.py
    python dpo.py config/dpo_tiny.py

pairs.jsonl is to learn from, held_out.jsonl has questions that are in none of these pairs, in any wording.
data/preferences/short.py tells whether an answer is as short as the chosen one, and whether it is right.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the project, for the imports below

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
folder = ''           # where to write; '': beside this script
num_pairs = 4000      # pairs to learn from
num_held_out = 400    # pairs that are held out
seed = 1337           # which questions are asked
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import itertools
import json

from flatgpt import tasks, validate

KINDS = ('arithmetic', 'units', 'lookup', 'dates')   # whose answers have a short form

validate.at_least(1, config, 'num_pairs', 'num_held_out')


def pairs(held_out):
    """Yield pairs of all kinds and languages in turn: the result alone is chosen, the whole answer rejected."""
    streams = [tasks.questions(kind, language, seed + 1, held_out)
               for kind, language in itertools.product(KINDS, tasks.LANGUAGES)]
    for stream in itertools.cycle(streams):
        question = next(stream)
        stop = {'en': '.', 'zh': '。'}[question.language]
        if question.result + stop != question.answer:
            yield {'messages': [{'role': 'user', 'content': question.text}], 'chosen': question.result + stop,
                   'rejected': question.answer}


to = Path(folder) if folder else Path(__file__).resolve().parent
to.mkdir(parents=True, exist_ok=True)
for name, number, held_out in (('pairs', num_pairs, False), ('held_out', num_held_out, True)):
    path = to / f'{name}.jsonl'
    lines = [json.dumps(pair, ensure_ascii=False) + '\n' for pair in itertools.islice(pairs(held_out), number)]
    path.write_text(''.join(lines), encoding='utf-8')
    print(f'{path}: {number:,} pairs')
