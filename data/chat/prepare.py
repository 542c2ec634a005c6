"""
Conversations as a dataset, of which a model learns the assistant's answers.

    python data/chat/prepare.py                                               made up, English and Chinese, no download
    python data/chat/prepare.py --input=talks.jsonl --tokenizer=bpe:5000      your own, for a model from scratch
    python data/chat/prepare.py --input=talks.jsonl --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct --name=talks
    python train.py config/chat_tiny.py

Each record of a file is a conversation, as {"messages": [{"role", "content"}]}, ShareGPT's or minimind's
{"conversations": ...}, or Alpaca's {"instruction", "input", "output"}. The chat template is that of the model whose
tokenizer is named, else ChatML. A mask marks the tokens to learn and where conversations begin; each row of a batch
begins at such a place. Questions that are not learned are in questions.jsonl.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the project, for the imports below

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
input = ''                 # comma-separated files, globs and folders of conversations; '': generate them
name = 'chat'              # the dataset: a folder in data/, or a path, which has a slash
tokenizer = 'bpe:1024'     # 'bpe:5000' (trained here), or that of a model with a chat template: a folder, owner/name
num_generated = 60000      # conversations to generate
num_questions = 50         # held-out questions of each kind and language, in questions.jsonl
val_fraction = 0.02        # the share of conversations that is for validation
max_tokens = 0             # leave out conversations of more tokens; 0: none is left out
seed = 1337                # which are for validation, and what is generated
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import hashlib
import itertools
import json
import random
import re

import numpy as np
from tqdm import tqdm

from flatgpt import checkpoint, tasks, validate
from flatgpt.conversation import add_chatml, chat_template_of, messages_of
from flatgpt.corpus import find_files, read_records
from flatgpt.dataset import BEGINS, SPLITS, write
from flatgpt.encodings import trained_size
from flatgpt.errors import UserError
from flatgpt.tokenizer import load

TO_TOKENIZE = 10000   # conversations on which a tokenizer is trained

validate.at_least(10, config, 'num_generated')
validate.at_least(0, config, 'max_tokens', 'num_questions')
validate.share(config, 'val_fraction')

# conversations: {'train': [messages], 'val': [messages]}

generator = random.Random(seed)
if input:
    records = (record for path in find_files(input) for record in read_records(path))
    everything = [messages_of(record.value, record.where) for record in records]
    generator.shuffle(everything)
    num_val = max(int(len(everything) * val_fraction), 1)
    if len(everything) < 2:
        raise UserError(f'{input} has {len(everything)} conversations: expected two or more')
    conversations = {'val': everything[:num_val], 'train': everything[num_val:]}
else:
    streams = {(kind, language, held_out): tasks.questions(kind, language, seed, held_out)
               for kind, language, held_out in itertools.product(tasks.KINDS, tasks.LANGUAGES, (False, True))}
    num_val = max(int(num_generated * val_fraction), 1)
    conversations = {}
    for split, number in (('val', num_val), ('train', num_generated - num_val)):
        def question(kind, language, held_out=split == 'val'):
            return next(streams[kind, language, held_out])

        conversations[split] = [tasks.conversation(generator, question) for _ in range(number)]

# tokenizer and template

if trained_size(tokenizer) is not None:
    texts = (f'{message["role"]}\n{message["content"]}' for messages in conversations['train'][:TO_TOKENIZE]
             for message in messages)
    without_digits = (part for text in texts for part in re.split(r'\d', text))   # each digit stays a token
    tok = load(tokenizer, without_digits, special=('<|im_start|>', '<|im_end|>'))
    template = add_chatml(tok)
else:
    tok = checkpoint.load_tokenizer(tokenizer)
    template = chat_template_of(tok)
    if template is None:
        raise UserError(f'tokenizer={tokenizer!r} has no chat template: name an instruct model, or bpe:5000 to train '
                        f'one')

# ids and masks

splits = {}
masks = {}
left_out = 0
for split in SPLITS:
    ids = []
    mask = []
    for messages in tqdm(conversations[split], desc=split, unit=' conversations', leave=False, disable=None):
        tokens, learned = template.training_ids(tok, messages)
        if max_tokens and len(tokens) > max_tokens:
            left_out += 1
            continue
        learned = learned.astype(np.uint8)
        learned[0] = BEGINS
        ids.append(tokens)
        mask.append(learned)
    if not ids:
        raise UserError(f'no conversation for {split} has at most max_tokens={max_tokens} tokens: raise it')
    splits[split] = np.concatenate(ids)
    masks[split] = np.concatenate(mask)

# files

folder = Path(name) if '/' in name else Path(__file__).resolve().parents[1] / name
source = {'path': input or 'generated',
          'conversations': {split: int((masks[split] == BEGINS).sum()) for split in SPLITS},
          'sha256': hashlib.sha256(json.dumps(conversations).encode()).hexdigest()}
write(folder, splits, tok, source, masks)
if left_out:
    print(f'left out: {left_out:,} conversations of more than {max_tokens:,} tokens')
if not input:
    path = folder / 'questions.jsonl'
    with open(path, 'w', encoding='utf-8') as file:
        for kind, language in itertools.product(tasks.KINDS, tasks.LANGUAGES):
            number = 0 if kind in tasks.NEVER_HELD_OUT else num_questions
            for question in itertools.islice(streams[kind, language, True], number):
                prompt = template.render([{'role': 'user', 'content': question.text}], add_generation_prompt=True)
                file.write(json.dumps({'prompt': prompt, **question._asdict()}, ensure_ascii=False) + '\n')
    print(f'questions that are not learned: {path}')
