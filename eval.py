"""
How good a model is: the exact loss of a text, multiple choice, last words, and answers compared with references.

    python eval.py --out_dir=out-python-char --data=python_char
    python eval.py --init_from=gpt2 --data=my.txt --stride=64
    python eval.py --init_from=gpt2 --choices=assets/sentiment.jsonl --shots=4
    python eval.py --init_from=gpt2 --last_word=lambada_test.jsonl
    python eval.py --out_dir=out-x --generate=questions.jsonl --max_new_tokens=50 --stop="Q:"
    python eval.py --out_dir=out-chat-tiny --questions=data/chat/questions.jsonl
    python eval.py --out_dir=out-chat-tiny --check=arithmetic --num_samples=8 --temperature=1
    torchrun --standalone --nproc_per_node=2 eval.py --out_dir=out-python-char --data=python_char

A table goes to stderr, one JSON object to stdout. What the figures mean: docs/evaluation.md.
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
# the model
out_dir = 'out'                       # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                  # 'resume' (the model in out_dir), a path, 'gpt2', 'owner/name' on the hub
tokenizer_of: str | None = None       # for a checkpoint of nanoGPT, which has none: the dataset it was trained on
# what to ask, one or several
data: str | None = None               # loss: a dataset's name or folder, a .bin of token ids, or a file of texts
choices: str | None = None            # accuracy: .jsonl of {"context", "choices", "gold"}, or HellaSwag's
last_word: str | None = None          # accuracy, perplexity: .jsonl of {"text"}, all but its last word is given
generate: str | None = None           # BLEU, chrF, ROUGE: .jsonl of {"prompt", "reference"}
questions: str | None = None          # accuracy: .jsonl of questions, as data/chat/prepare.py makes it, or a kind
check: str | None = None              # how answers are checked: 'arithmetic', 'sql', 'FILE.py:FUNCTION'; None: by kind
# how
split = 'val'                         # split of a dataset: 'train', 'val'
template = ''                         # text of a record in data, such as '{title}\n{text}'; empty: what is under "text"
block_size: int | None = None         # tokens of a window; None: the context of the model
stride: int | None = None             # tokens from one window to the next, up to block_size (fastest); None: half of it
shots = 0                             # examples with answers before a question of choices or generate, out of its file
delimiter = ' '                       # what joins a context or a prompt to its answer; empty: nothing
max_new_tokens = 64                   # length of a generated answer at most
num_samples = 1                       # answers to each of the questions; several also give pass@k
temperature = 0.0                     # of these answers: 0 takes the likeliest tokens, 1 samples as the model predicts
stop = ''                             # text before which an answer ends; several as a JSON list: '["\n", "Q:"]'
limit: int | None = None              # take only so many tokens of data, and the first so many lines of a .jsonl
seed = 1337                           # of the choice of examples for --shots, and of samples
# machine
batch_size = 16                       # windows, answers or prompts at once
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is there)
dtype = 'float32'                     # 'float32', 'bfloat16' or 'float16' (less exact), 'auto' (bfloat16 if native)
compile: str | bool = False           # torch.compile: True, False, 'auto' (where it is a GPU)
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import json
import math
from pathlib import Path

import numpy as np

from flatgpt import checkpoint, corpus, engine, evaluation, rewards, runtime, tokenizer, validate
from flatgpt.answers import parse_stops
from flatgpt.dataset import SPLITS, Dataset, open_ids
from flatgpt.errors import UsageError, UserError

# refusals

if not (data or choices or last_word or generate or questions or check):
    trained_on = checkpoint.load(checkpoint.model_path(out_dir, init_from))['config'].get('dataset', 'DATASET')
    raise UsageError(f'nothing to do: give --data={trained_on}, --choices, --last_word, --generate, --questions or '
                     f'--check')
validate.eval_options(config)
stops = parse_stops(stop)
if generate:
    evaluation.compare_texts([''], [''])   # tells what is not installed

# questions, before the model is loaded, so that a wrong line is found at once

if choices:
    choice_items = evaluation.read_items(choices, evaluation.multiple_choice)
if last_word:
    word_items = evaluation.read_items(last_word, evaluation.last_word)
if generate:
    generate_items = evaluation.read_items(generate, evaluation.to_continue)
if questions or check:
    reward_of = rewards.load(check) if check else rewards.is_right
    asked = rewards.to_ask(questions, check, limit)

# model

path = checkpoint.model_path(out_dir, init_from)
model, tok, ckpt = checkpoint.load_model(path, tokenizer_of)
if block_size is not None:
    validate.set_context(model, block_size)
block_size = model.config.block_size
if stride is None:
    stride = max(block_size // 2, 1)
if stride > block_size:
    raise UsageError(f'stride={stride}: expected at most block_size={block_size}')
rt = runtime.setup(device, dtype, compile, seed)
rt.notice(f'{path}, {checkpoint.stage(ckpt)}; {rt.describe()}')
about = {'model': str(path), 'step': ckpt['iter_num'], 'dtype': str(rt.dtype).removeprefix('torch.')}
report = {}   # {measurement: {figure: value}}; figure_stderr is the standard error of figure
model.to(rt.device, rt.dtype)
del ckpt   # its memory
if rt.compile:
    engine.compile_step(model)

# loss of a text


def read_ids(name):
    """(ids, learnt, begins, where): token ids of which all but the first are to be scored, booleans that say which of
    them were to be learnt, where texts begin that know nothing of each other, and the file that they are from."""
    path = Path(name)
    learnt = None
    begins = np.array([0])
    made_with = tok
    where = name
    if path.suffix != '.bin' and (path.is_file() or corpus.text_suffix(path) in corpus.SUFFIXES + corpus.TABLES):
        ids = evaluation.encode_documents(name, tok, limit, template)
    elif path.is_file() and not path.with_name('meta.json').exists():   # bare ids
        ids = open_ids(name, tokenizer.id_type(tok.vocab_size))
    else:
        part = path.stem if path.is_file() else split
        if part not in SPLITS:
            raise UserError(f'{name} is a part of a dataset: give the folder, or its train.bin or val.bin')
        dataset = Dataset(str(path.absolute().parent) if path.is_file() else name)
        where = f'{dataset.folder}/{part}.bin'
        ids = dataset.data[part]
        made_with = dataset.tokenizer
        if dataset.mask:
            learnt = dataset.mask[part] == 1
            begins = dataset.begins.get(part, begins)
    ids = ids[:limit and limit + 1]
    begins = begins[begins < len(ids)]
    if (len(ids) and ids.max() >= tok.vocab_size) or not tokenizer.same(made_with, tok):
        raise UserError(f'{where} was made with another tokenizer than the model: give its text instead, or a dataset '
                        f'that the model can read')
    return ids, np.ones(len(ids), bool) if learnt is None else learnt[:len(ids)], begins, where


if data:
    ids, learnt, begins, where = read_ids(data)
    if not learnt[1:].any():
        raise UserError(f'{where} has no token to score: expected two, or one of text if the model knows ends of texts')
    loss, error, n = evaluation.rolling_loss(model, rt, ids, stride, batch_size, learnt, begins)
    n_chars, n_bytes = tok.count(ids[1:][learnt[1:]])   # 0 if all of the text is special tokens
    bits = loss / math.log(2)
    report['data'] = {'of': where, 'tokens': n, 'bytes': n_bytes, 'characters': n_chars,
                      'block_size': block_size, 'stride': stride,
                      'loss': loss, 'loss_stderr': error, 'perplexity': evaluation.perplexity(loss),
                      'bits_per_token': bits, 'bits_per_token_stderr': error / math.log(2),
                      'bits_per_byte': n_bytes and bits * n / n_bytes,
                      'bits_per_character': n_chars and bits * n / n_chars}

# questions: which answer is the likeliest, is the last word what the model would say, what would it write?

if choices:
    items = evaluation.with_examples(choice_items, limit, shots, delimiter, seed)
    logprobs, _ = evaluation.loglikelihood(model, rt, evaluation.encode_answers(tok, items, delimiter), batch_size,
                                           'choices', tok.begin)
    right = evaluation.right_choices(items, logprobs)
    chance = sum(1 / len(item.answers) for item in items) / len(items)
    report['choices'] = {'of': choices, 'n': len(items), 'shots': shots, **evaluation.summary(right), 'chance': chance}

if last_word:
    items = word_items[:limit]
    logprobs, greedy = evaluation.loglikelihood(model, rt, evaluation.encode_answers(tok, items, ' '), batch_size,
                                                'last word', tok.begin)
    figures = evaluation.summary({'acc': greedy, 'loss': -logprobs})
    perplexity = evaluation.perplexity(figures['loss'])
    report['last_word'] = {'of': last_word, 'n': len(items), **figures, 'perplexity': perplexity}

if generate:
    items = evaluation.with_examples(generate_items, limit, shots, delimiter, seed)
    prompts = []
    for item in items:
        with evaluation.naming(item.where):
            prompts.append(tok.encode_prompt(item.context))
    if shots:
        stops.append(evaluation.SEPARATOR)   # where the next example would begin
    answers = evaluation.generate_until(model, tok, rt, prompts, max_new_tokens, stops, batch_size)
    answers = [answer.strip() for answer in answers]
    references = [item.answers[0].strip() for item in items]
    report['generate'] = {'of': generate, 'n': len(items), 'shots': shots,
                          **evaluation.compare_texts(answers, references)}

if questions or check:
    prompts = [rewards.prompt_ids(tok, question) for question in asked]
    values = []   # for each sample, the rewards of the answers
    for sample in range(num_samples):
        answers = evaluation.generate_until(model, tok, rt, prompts, max_new_tokens, stops, batch_size, temperature,
                                            seed, sample)
        values.append([reward_of(question, answer) for question, answer in zip(asked, answers)])
    report['questions'] = {'of': questions or check, 'n': len(asked), 'samples': num_samples,
                           **evaluation.summary(rewards.right_answers(asked, values))}

# a table for people, an object for programs

for measurement, figures in report.items():
    rt.notice(evaluation.table(measurement, figures))
rt.say(json.dumps({**about, **report}))
rt.close()
