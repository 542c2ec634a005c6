"""
How good a model is: the exact loss of a text, multiple choice, last words, and answers compared with references.

    python eval.py --out_dir=out-python-char --data=python_char             the whole of val.bin
    python eval.py --init_from=gpt2 --data=my.txt --stride=64               a text, each token after 960 others or more
    python eval.py --init_from=gpt2 --choices=hellaswag_val.jsonl           as it is published, 10,042 questions
    python eval.py --init_from=gpt2 --last_word=lambada_test.jsonl
    python eval.py --init_from=gpt2 --choices=assets/sentiment.jsonl --shots=4
    python eval.py --out_dir=out-x --generate=questions.jsonl --max_new_tokens=50 --stop="Q:"
    torchrun --standalone --nproc_per_node=2 eval.py --out_dir=out-python-char --data=python_char

The fifth classifies sentiment by asking which of two words is likelier after a review. Several can be asked in one run.
Prints a table on stderr, and on stdout one JSON object, the same for any number of processes. The first token of a text
is scored after the end-of-text token, if the model has one; that of a .bin, which has nothing before it, is not scored.
Of a dataset with a mask, such as data/sql, only what was to be learnt is scored.
"""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np

from configurator import configure
from flatgpt import checkpoint, engine, evaluation, runtime, tokenizer, validate
from flatgpt.dataset import Dataset, open_ids, read_meta
from flatgpt.errors import UsageError, UserError

# ---------------------------------------------------------------------------------------------------------------------
# the model
out_dir = 'out'                       # folder of the model: its best.pt, or else its ckpt.pt
init_from = 'resume'                  # 'resume' (the model in out_dir), a path, 'gpt2', 'owner/name' on the hub
tokenizer_of: str | None = None       # for a checkpoint of nanoGPT, which has none: the dataset it was trained on
# what to ask, one or several
data: str | None = None               # loss: a dataset's name or folder, a .bin of token ids, or a text file in UTF-8
choices: str | None = None            # accuracy: .jsonl of {"context", "choices", "gold"}, or HellaSwag's
last_word: str | None = None          # accuracy, perplexity: .jsonl of {"text"}, all but its last word is given
generate: str | None = None           # BLEU, chrF, ROUGE: .jsonl of {"prompt", "reference"}
# how
split = 'val'                         # of a dataset: 'train', 'val'
stride: int | None = None             # tokens from one window to the next, up to block_size (fastest); None: half of it
shots = 0                             # examples with answers before a question of choices or generate, out of its file
delimiter = ' '                       # what joins a context or a prompt to its answer; empty: nothing
max_new_tokens = 64                   # to generate, at most
stop = ''                             # text before which an answer ends; several as a JSON list: '["\n", "Q:"]'
limit: int | None = None              # take only so many tokens of data, and the first so many lines of a .jsonl
seed = 1337                           # of the choice of examples
# machine
batch_size = 16                       # windows, answers or prompts at once
device = 'auto'                       # 'cuda', 'cuda:1', 'mps', 'cpu', 'auto' (the first of them that is there)
dtype = 'float32'                     # 'float32', 'bfloat16' or 'float16' (less exact), 'auto' (bfloat16 if native)
compile: str | bool = False           # torch.compile: True, False, 'auto' (where it is a GPU)
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

# refusals

validate.eval_options(config)
stops = engine.parse_stops(stop)
if generate:
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError(f'eval.py needs sacrebleu and rouge-score to compare texts (no {error.name} here): '
                        f'pip install sacrebleu rouge-score') from None

# questions, before the model is loaded, so that a wrong line is found at once

asked = {'choices': choices and evaluation.read_items(choices, evaluation.multiple_choice),
         'last_word': last_word and evaluation.read_items(last_word, evaluation.last_word),
         'generate': generate and evaluation.read_items(generate, evaluation.to_continue)}

# model

path = checkpoint.model_path(out_dir, init_from)
model, tok, ckpt = checkpoint.load_model(path, tokenizer_of)
block_size = model.config.block_size
if stride is None:
    stride = max(block_size // 2, 1)
if stride > block_size:
    raise UsageError(f'stride={stride}: expected at most the block_size of {path}, {block_size}')
rt = runtime.setup(device, dtype, compile, seed)
say = print if rt.master else lambda *args, **kwargs: None   # one process talks
about = {'model': str(path), 'step': ckpt['iter_num'], 'dtype': str(rt.dtype)[6:]}
say(f'{path}, {checkpoint.stage(ckpt)}; {rt.describe()}', file=sys.stderr)
model.to(rt.device, rt.dtype)
ckpt = None
if rt.compile:
    rt.compile_step(model)
report = {}   # {what was asked: {figure: value}}, where figure_stderr is the standard error of figure


# loss of a text: the cost of its tokens, all that are scored exactly once

def read_ids(name):
    """Token ids of which all but the first are to be scored, what they are called, and which of them were to be learnt,
    None: all."""
    learnt = None
    if os.path.isfile(name) and name.endswith('.bin'):
        meta = Path(name).with_name('meta.json').exists() and read_meta(Path(name).parent)
        ids = open_ids(name, meta['dtype'] if meta else tokenizer.id_type(tok.vocab_size))
        made_with = meta['tokenizer'] if meta else tok.to_dict()
        if meta and meta['mask']:
            learnt = open_ids(Path(name).with_suffix('.mask'), np.dtype(np.uint8), len(ids)).astype(bool)
    elif os.path.isfile(name) or name.endswith('.txt'):
        text = tokenizer.read_text(name)
        with evaluation.naming(name):
            ids = tok.encode(text)
        return np.concatenate((tok.encode_prompt(''), ids)) if tok.eot is not None else ids, name, None
    else:
        dataset = Dataset(name)
        ids, made_with, name = dataset.data[split], dataset.tokenizer, f'{dataset.folder}/{split}.bin'
        if dataset.mask:
            learnt = dataset.mask[split].astype(bool)
    start = ids[:1000]
    if len(ids) and ids.max() >= tok.vocab_size or (
            made_with != tok.to_dict() and tokenizer.from_dict(made_with).decode(start) != tok.decode(start)):
        raise UserError(f'{name} was made with another tokenizer than the model: give its text instead, or a dataset '
                        f'that the model can read')
    return ids, name, learnt


if data:
    ids, where, learnt = read_ids(data)
    ids = ids[:limit and limit + 1]
    learnt = np.ones(len(ids), bool) if learnt is None else learnt[:len(ids)]
    if not learnt[1:].any():
        raise UserError(f'{where} has no token to score: expected two, or one of text if the model knows ends of texts')
    loss, error, n = evaluation.rolling_loss(model, rt, ids, stride, batch_size, learnt)
    n_chars, n_bytes = tok.count(ids[1:][learnt[1:]])
    bits = loss / math.log(2)
    report['data'] = {'of': where, 'tokens': n, 'bytes': n_bytes, 'characters': n_chars, 'stride': stride,
                      'loss': loss, 'loss_stderr': error, 'perplexity': evaluation.perplexity(loss),
                      'bits_per_token': bits, 'bits_per_token_stderr': error / math.log(2),
                      'bits_per_byte': n_bytes and bits * n / n_bytes,
                      'bits_per_character': n_chars and bits * n / n_chars}


# questions: which answer is the likeliest, is the last word what the model would say, what would it write?

def contexts(name, shots=0):
    """[(item, its context)] of what was asked, the context after so many examples with their answers."""
    items = asked[name]
    return [(item, evaluation.with_examples(items, i, shots, delimiter, seed)) for i, item in enumerate(items[:limit])]


def encoded(texts, delimiter):
    """Token ids of each context with each of its answers."""
    pairs = []
    for item, context in texts:
        with evaluation.naming(item.where):
            pairs += [evaluation.encode_pair(tok, context, delimiter + answer) for answer in item.answers]
    return pairs


if choices:
    texts = contexts('choices', shots)
    logprobs, _ = evaluation.loglikelihood(model, rt, encoded(texts, delimiter), batch_size, 'choices')
    right = evaluation.right_choices([item for item, _ in texts], logprobs)
    chance = [1 / len(item.answers) for item, _ in texts]
    report['choices'] = {'of': choices, 'n': len(texts), 'shots': shots, **evaluation.summary(right),
                         'chance': sum(chance) / len(chance)}

if last_word:
    texts = contexts('last_word')
    logprobs, greedy = evaluation.loglikelihood(model, rt, encoded(texts, ' '), batch_size, 'last word')
    found = evaluation.summary({'acc': greedy, 'loss': -logprobs})
    perplexity = evaluation.perplexity(found['loss'])
    report['last_word'] = {'of': last_word, 'n': len(texts), **found, 'perplexity': perplexity}

if generate:
    texts, prompts = contexts('generate', shots), []
    for item, context in texts:
        with evaluation.naming(item.where):
            prompts.append(tok.encode_prompt(context))
    stops += [evaluation.SEPARATOR] * (shots > 0)   # where the next example would begin
    answers = evaluation.generate_until(model, tok, rt, prompts, max_new_tokens, stops, batch_size)
    answers = [answer.strip() for answer in answers]
    references = [item.answers[0].strip() for item, _ in texts]
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    rouge = rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL'])
    scores = [rouge.score(reference, answer) for reference, answer in zip(references, answers)]
    f1 = {name: [score[name].fmeasure for score in scores] for name in scores[0]}
    report['generate'] = {'of': generate, 'n': len(texts), 'shots': shots,
                          'bleu': bleu.corpus_score(answers, [references]).score,
                          'chrf': chrf.corpus_score(answers, [references]).score, **evaluation.summary(f1),
                          'bleu_signature': str(bleu.get_signature()), 'chrf_signature': str(chrf.get_signature())}

# a table for people, an object for programs

for name, found in report.items():
    say(f'\n{name}', file=sys.stderr)
    for figure, value in found.items():
        if not figure.endswith('_stderr'):
            text = f'{value:,.4f}' if isinstance(value, float) else f'{value:,}' if isinstance(value, int) else value
            error = f' ± {found[f"{figure}_stderr"]:.4f}' if f'{figure}_stderr' in found else ''
            say(f'  {figure:<20} {text}{error}', file=sys.stderr)
say(json.dumps({**about, **report}))
rt.close()
