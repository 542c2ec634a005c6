"""
Questions and their answers in SQL, for a model that answers: it learns only the answers.

    python data/sql/prepare.py                                         generated examples, no download
    python data/sql/prepare.py --input=pairs.json                      your own, or Spider's
    python data/sql/prepare.py --input=pairs.jsonl --tokenizer=gpt2    to finetune GPT-2
    python train.py config/finetune_sql.py

A pair is a record with "question" and "sql" (or "query"), of a .json, .jsonl, .csv or .parquet. "context", such as the
tables, is put before the question. All pairs of a question are in the same split; a pair that occurs again is left out.
A mask beside the ids marks the answers. val_questions.jsonl has the questions for validation, as sample.py and eval.py
read them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the project, for the imports below

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
input: str | None = None   # a file of pairs, None: generate some
n_pairs = 20000            # how many to generate
tokenizer = 'char'         # 'char', or that of a model: a folder, a checkpoint, a name on the hub
val_fraction = 0.1         # the share of the questions that are for validation
seed = 1337                # which questions are for validation, and what is generated
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import hashlib
import json
import random

import numpy as np

from flatgpt import checkpoint, validate
from flatgpt.corpus import read_records
from flatgpt.dataset import write
from flatgpt.errors import UserError
from flatgpt.tokenizer import CharTokenizer, no_surrogates

validate.share(config, 'val_fraction')
validate.at_least(10, config, 'n_pairs')

# generated pairs: tables with columns of words and of numbers, and questions about them

TABLES = {'books': (['title', 'author', 'language'], ['year', 'price', 'pages']),
          'films': (['title', 'director', 'country'], ['year', 'length', 'rating']),
          'staff': (['name', 'city', 'team'], ['age', 'salary', 'years']),
          'trains': (['line', 'start', 'goal'], ['stops', 'minutes', 'price'])}
WORDS = ['Oslo', 'Lima', 'Kyoto', 'Accra', 'Turin', 'red', 'blue', 'green', 'north', 'south']
COMPARE = {'above': '>', 'below': '<', 'equal to': '='}


def generate_pair(generator):
    """(question, SQL), of one of five kinds."""
    table = generator.choice(list(TABLES))
    words, numbers = TABLES[table]
    word = generator.choice(words)
    number = generator.choice(numbers)
    other = generator.choice(numbers)
    value = generator.randint(1, 999)
    name = generator.choice(WORDS)
    said, sign = generator.choice(list(COMPARE.items()))
    return generator.choice([
        (f'which {table} have a {number} {said} {value}?', f'SELECT * FROM {table} WHERE {number} {sign} {value};'),
        (f'how many {table} have {name} as {word}?', f"SELECT COUNT(*) FROM {table} WHERE {word} = '{name}';"),
        (f'what is the average {number} of {table}, by {word}?',
         f'SELECT {word}, AVG({number}) FROM {table} GROUP BY {word};'),
        (f'show the {word} of the {value % 20 + 1} {table} with the highest {number}',
         f'SELECT {word} FROM {table} ORDER BY {number} DESC LIMIT {value % 20 + 1};'),
        (f'list {word} and {other} of {table} where {word} is {name} and {number} is {said} {value}',
         f"SELECT {word}, {other} FROM {table} WHERE {word} = '{name}' AND {number} {sign} {value};"),
    ])


def read_pairs(path):
    """[(question, SQL)] of a file of records. UserError names a pair that is invalid."""
    pairs = []
    for where, record in read_records(path):
        try:
            sql = record['sql'] if 'sql' in record else record['query']
            context = f'{record["context"].strip()}\n' if 'context' in record else ''
            pairs.append((no_surrogates(context + record['question'].strip()), no_surrogates(sql.strip())))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f'{where}: expected {{"question": "...", "sql": "..."}}') from None
    return pairs


generator = random.Random(seed)
pairs = read_pairs(input) if input else [generate_pair(generator) for _ in range(n_pairs)]
answers = {}   # {question: its SQLs}
for question, sql in pairs:
    answers.setdefault(question, {})[sql] = True
num_repeated = len(pairs) - sum(map(len, answers.values()))
questions = sorted(answers)
generator.shuffle(questions)
num_val = max(int(len(questions) * val_fraction), 1)
if len(questions) < 2:
    raise UserError(f'{input} has {len(questions)} distinct questions: expected two or more')

# text, ids and masks: an answer begins at the first token that is not one of its prompt

prompts = {split: [(f'question: {question}\nsql:', f' {sql}\n') for question in part for sql in answers[question]]
           for split, part in (('val', questions[:num_val]), ('train', questions[num_val:]))}
text = ''.join(prompt + answer for part in prompts.values() for prompt, answer in part)
tok = CharTokenizer.of(text) if tokenizer == 'char' else checkpoint.load_tokenizer(tokenizer)
splits = {'val': [], 'train': []}
masks = {'val': [], 'train': []}
for split, part in prompts.items():
    for prompt, answer in part:
        ids = tok.encode_document(prompt + answer)
        prompt_ids = tok.encode_prompt(prompt)[:len(ids)]
        in_prompt = (prompt_ids == ids[:len(prompt_ids)]).cumprod().sum()
        splits[split].append(ids)
        masks[split].append(np.arange(len(ids)) >= in_prompt)
folder = Path(__file__).resolve().parent
write(folder, {split: np.concatenate(parts) for split, parts in splits.items()}, tok,
      {'path': Path(input).name if input else 'made up', 'sha256': hashlib.sha256(text.encode()).hexdigest()},
      {split: np.concatenate(parts) for split, parts in masks.items()})
path = folder / 'val_questions.jsonl'
path.write_text(''.join(json.dumps({'prompt': prompt, 'reference': answer.strip()}, ensure_ascii=False) + '\n'
                        for prompt, answer in prompts['val']), encoding='utf-8')
print(f'{len(prompts["train"]):,} pairs to learn, {len(prompts["val"]):,} to ask in {path}')
if num_repeated:
    print(f'left out: {num_repeated:,} pairs that occur again')
