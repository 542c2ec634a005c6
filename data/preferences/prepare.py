"""
Pairs of answers for dpo.py, made by a program: the answer that ends by asking whether there is anything else is better
than the same one without it; or, on request, the result alone than the whole answer. The questions are those of
data/chat.

    python data/preferences/prepare.py
    python dpo.py config/dpo_tiny.py

pairs.jsonl is to learn from, held_out.jsonl has questions that are in none of these pairs, in any wording.
data/preferences/rewards.py tells whether an answer is polite or short.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the project, for the imports below

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
prefer = 'polite'     # what is chosen: 'polite' (it ends with a question), 'short' (the result alone)
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
POLITE = {'en': ' Anything else?', 'zh': '还有问题吗？'}
STOP = {'en': '.', 'zh': '。'}

validate.at_least(1, config, 'num_pairs', 'num_held_out')
validate.one_of(('polite', 'short'), config, 'prefer')


def pairs(held_out):
    """Yield pairs of all kinds and languages in turn."""
    streams = [tasks.questions(kind, language, seed + 1, held_out)
               for kind, language in itertools.product(KINDS, tasks.LANGUAGES)]
    for stream in itertools.cycle(streams):
        question = next(stream)
        chosen = question.result + STOP[question.language]
        if prefer == 'polite':
            chosen = question.answer + POLITE[question.language]
        if chosen != question.answer:
            yield {'messages': [{'role': 'user', 'content': question.text}], 'chosen': chosen,
                   'rejected': question.answer, **question._asdict()}   # the rest is for eval.py --check


to = Path(folder) if folder else Path(__file__).resolve().parent
to.mkdir(parents=True, exist_ok=True)
for name, number, held_out in (('pairs', num_pairs, False), ('held_out', num_held_out, True)):
    path = to / f'{name}.jsonl'
    lines = [json.dumps(pair, ensure_ascii=False) + '\n' for pair in itertools.islice(pairs(held_out), number)]
    path.write_text(''.join(lines), encoding='utf-8')
    print(f'{path}: {number:,} pairs')
