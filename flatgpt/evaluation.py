"""
Three questions to a model: how likely is a continuation, what does each token of a text cost, what would it write.

They are the three on which EleutherAI's lm-evaluation-harness rests (Gao et al., 2021), and the answers are the same.
Batches are made of all rows before they are shared among the processes, so that a row has the same company, and the
same result to the last bit, however many processes there are.
"""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from flatgpt import corpus
from flatgpt.answers import Answer, cut_notice, grow
from flatgpt.errors import UserError
from flatgpt.tokenizer import EOT, id_type

SEPARATOR = '\n\n'      # between the examples of a few-shot prompt
LOGITS = 2**27          # so many are computed at once: 512 MB
HAN = '[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]'
UNSPACED = f'(?:{HAN}|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff])'   # and Thai, Lao, Burmese, Khmer, kana


# ---------------------------------------------------------------------------------------------------------------------
# the cost of tokens

def share(rt, lengths: Sequence[int], batch_size: int, what: str) -> tqdm:
    """The batches of this process, lists of row numbers, behind a progress bar: rows of similar length together, the
    longest first, so that memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return tqdm(batches[rt.rank::rt.world_size], desc=what, leave=False, disable=None if rt.master else True)


@torch.inference_mode()
def costs(model, rt, rows: Sequence[tuple], batch_size: int, what: str) -> torch.Tensor:
    """What the last tokens of each row cost, given those before them: a float64 tensor, (rows, 3), of the sum of their
    -log p in nats, the sum of its squares, and how many of them are not the likeliest token.

    rows: [(ids, scored)], arrays of 2 to block_size + 1 token ids, and of booleans that say which of the last
    len(scored) < len(ids) tokens count. Raises UserError if the model gives NaN or infinity.
    """
    hidden = torch.compile(model.hidden_states, dynamic=True) if rt.compile else model.hidden_states
    found = torch.zeros(len(rows), 3, dtype=torch.float64)
    for batch in share(rt, [len(ids) for ids, _ in rows], batch_size, what):
        T = max(len(rows[i][0]) for i in batch) - 1
        idx = torch.zeros(len(batch), T, dtype=torch.long)   # filled up on the right, which causal attention ignores
        targets = torch.full_like(idx, -1)
        for k, i in enumerate(batch):
            ids, scored = rows[i]
            end, n = len(ids) - 1, len(scored)
            idx[k, :end] = torch.from_numpy(ids[:-1].astype(np.int64))
            targets[k, end - n:end] = torch.from_numpy(np.where(scored, ids[-n:].astype(np.int64), -1))
        counted = targets >= 0
        x = hidden(idx.to(rt.device))[counted.to(rt.device)]                          # (N, C)
        per_token = []
        n = max(LOGITS // model.config.vocab_size, 1)
        for part, y in zip(x.split(n), targets[counted].to(rt.device).split(n)):
            logits = model.compute_logits(part).float()                               # (n, V)
            nll = F.cross_entropy(logits, y, reduction='none').cpu().double()
            missed = (logits.argmax(dim=-1) != y).cpu().double()
            per_token.append(torch.stack((nll, nll.square(), missed), dim=1))         # (n, 3)
        per_token = torch.cat(per_token)
        if not per_token.isfinite().all():
            raise UserError('the model gives NaN or infinite logits: its training went wrong, or use --dtype=float32')
        per_row = torch.zeros(len(batch), 3, dtype=torch.float64)
        found[batch] = per_row.index_add(0, counted.nonzero()[:, 0], per_token)
    return rt.sum(found)


def windows(n: int, size: int, stride: int) -> list[tuple[int, int, int]]:
    """[(begin, first, end)] for a text of n tokens: of tokens begin to end, those from first on are scored, so that
    each but the text's first is scored once. The windows are those of the sliding-window recipe of Hugging Face's
    documentation: size tokens, one every stride. Where the stride is the size, that recipe leaves out the first
    token of each; here such a window begins one token earlier."""
    found = []
    first = 1
    for begin in range(0, n, stride):
        end = min(begin + size, n)
        if end > first:
            found.append((min(begin, first - 1), first, end))
        first = max(first, end)
    return found


def encode_documents(path: str, tok, limit: int | None = None, template: str = '') -> np.ndarray:
    """Token ids of the documents in a file, as training data has them, after the end of another text: all but the first
    are to be scored. Names of the end of a text in a .txt end documents; a line break is between documents if the
    tokenizer has no token for it. limit: if given, how many ids; not much more of the file is read. template: see
    corpus.Corpus."""
    parts = [tok.encode_prompt('')] if tok.eot is not None and not tok.begin else []
    line_break = '\n' if tok.eot is None and not tok.unknown('\n') else ''
    documents = corpus.Corpus([path], template=template, options=False, border=tok.border, separator=EOT)
    for piece in documents.pieces(0):
        if piece.start == 0 and piece.last and not piece.text:   # an empty document
            continue
        is_first = piece.start == 0
        text = line_break + piece.text if is_first and parts else piece.text
        with naming(path):
            parts.append(tok.encode_texts([text], end=piece.last, begin=is_first))
        if limit is not None and sum(map(len, parts)) > limit + 1:
            break
    ids = np.concatenate([np.empty(0, id_type(tok.vocab_size)), *parts])
    return ids if tok.eot is None else ids[:-1]   # what follows the last document is not known


def rolling_loss(model, rt, ids: np.ndarray, stride: int, batch_size: int,
                 learnt: np.ndarray | None = None, begins: Sequence[int] = (0,)) -> tuple[float, float, int]:
    """The cost of every token of ids but the first, given those before it: at least block_size - stride of them, or
    all there are. learnt: booleans, whether each of ids is scored; None: all. begins: where texts begin that know
    nothing of each other. Returns the mean in nats, its standard error, as if tokens were independent, and their
    number."""
    if learnt is None:
        learnt = np.ones(len(ids), bool)
    rows = []
    for start, stop in itertools.pairwise([*begins, len(ids)]):
        for begin, first, end in windows(stop - start, model.config.block_size, stride):
            scored = learnt[start + first:start + end]
            if scored.any():
                rows.append((ids[start + begin:start + end], scored))
    total, squares, _ = costs(model, rt, rows, batch_size, 'loss').sum(dim=0).tolist()
    n = int(learnt[1:].sum())
    variance = max(squares - total**2 / n, 0) / max(n - 1, 1)
    return total / n, math.sqrt(variance / n), n


def encode_pair(tok, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a context and of its continuation, which begins at the first token that depends on it; spaces at
    the end of the context belong to it, because words are encoded with the space before them. An empty context
    becomes the end of a text before it."""
    bare = context.rstrip()
    alone = tok.encode_prompt(bare)
    whole = tok.encode_prompt(context + continuation)
    n = min(len(alone), len(whole))
    same = int((alone[:n] == whole[:n]).cumprod().sum())
    if same == 0 or not (bare or tok.begin):
        return tok.encode_prompt(''), whole
    return whole[:same], whole[same:]


def encode_answers(tok, items: Sequence['Item'], delimiter: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids, (context, answer), of each item with each of its answers. UserError names the item."""
    pairs = []
    for item in items:
        with naming(item.where):
            pairs += [encode_pair(tok, item.context, delimiter + answer) for answer in item.answers]
    return pairs


def loglikelihood(model, rt, pairs: Sequence[tuple], batch_size: int, what: str,
                  begin: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """For pairs of token ids, of a context and its continuation: the log-probability of each continuation in nats, and
    whether each of its tokens is the likeliest one; two arrays. What does not fit into block_size is cut off the
    context on the left, but for the ids in begin; a continuation that is longer still is scored in halves of
    block_size."""
    size = model.config.block_size
    notice_cut(model, rt, [len(context) + len(continuation) - 1 for context, continuation in pairs], begin)
    rows = []
    owner = []   # the number of the pair of each row
    for i, (context, continuation) in enumerate(pairs):
        ids = np.concatenate((context, continuation))
        step = size if len(continuation) <= size else max(size // 2, 1)
        for start in range(len(context), len(ids), step):
            end = min(start + step, len(ids))
            row = ids[max(end - size - 1, 0):end].copy()
            if end - len(row) > 0 and len(begin) < len(row) - (end - start):
                row[:len(begin)] = begin
            rows.append((row, np.ones(end - start, bool)))
            owner.append(i)
    found = torch.zeros(len(pairs), 3, dtype=torch.float64)
    found.index_add_(0, torch.tensor(owner), costs(model, rt, rows, batch_size, what))
    return -found[:, 0].numpy(), (found[:, 2] == 0).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# what it would write

def generate_until(model, tok, rt, prompts: Sequence[np.ndarray], max_new_tokens: int, stops: Sequence[str],
                   batch_size: int, temperature: float = 0.0, seed: int = 0, sample: int = 0) -> list[str]:
    """The text that a model writes after each prompt, an array of token ids, taking the likeliest tokens or sampling at
    a temperature: see Answer for where it ends. sample: the number of the text, each has other random numbers."""
    notice_cut(model, rt, [len(ids) for ids in prompts], tok.begin)
    made = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long)                # id + 1, 0 where there is none
    for batch in share(rt, [len(ids) for ids in prompts], batch_size, 'generate'):
        answers = [Answer(tok, prompts[i], max_new_tokens, stops) for i in batch]
        first_row = (sample * len(prompts) + batch[0]) * batch_size   # no two batches have a row in common
        for _ in grow(model, answers, temperature=temperature, static_cache=rt.compile, seed=seed, first_row=first_row):
            pass
        for i, answer in zip(batch, answers):
            made[i, :len(answer.ids)] = torch.tensor(answer.ids) + 1
    texts = []
    for prompt, row in zip(prompts, rt.sum(made)):   # from all processes
        answer = Answer(tok, prompt, max_new_tokens, stops)
        for token in row[row > 0].tolist():
            answer.add(token - 1)
        texts.append(answer.text)
    return texts


def notice_cut(model, rt, lengths: Sequence[int], begin: Sequence[int]):
    """Tell the user how many texts of these lengths are longer than the context, if any."""
    if line := cut_notice(model.config, lengths, begin):
        rt.notice(line)


# ---------------------------------------------------------------------------------------------------------------------
# questions

@dataclass
class Item:
    """A record of a file: what is asked, the answers to choose from, and the number of the right one."""
    where: str              # file and line, for error messages
    context: str
    answers: list[str]
    gold: int = 0


@contextlib.contextmanager
def naming(where: str):
    """A context that puts a file and line before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def read_items(path: str, parse: Callable[[dict], tuple]) -> list[Item]:
    """The items in a file of records, each made by parse(record). Whatever is wrong is a UserError that names the
    record."""
    items = []
    for where, record in corpus.read_records(path):
        with naming(where):
            if not isinstance(record, dict):
                raise UserError(f'expected an object, {{...}}, not {str(record).strip()[:40]}')
            items.append(Item(where, *parse(record)))
    if not items:
        raise UserError(f'{path} is empty: expected one object per line or row')
    return items


def field(record: dict, name: str, value_type: type = str):
    """A field of a record: a str, an int, or a list of two or more texts. UserError if it is anything else."""
    if name not in record:
        raise UserError(f'no "{name}"; it has {", ".join(map(repr, record)) or "nothing"}')
    value = record[name]
    good = isinstance(value, value_type) and not isinstance(value, bool)
    expected = {str: 'a text', int: 'a whole number', list: 'a list of two or more texts'}[value_type]
    if value_type is list:
        good = good and len(value) > 1 and all(isinstance(text, str) and text for text in value)
    if not good:
        raise UserError(f'"{name}" is {json.dumps(value)[:60]}: expected {expected}')
    return value


def multiple_choice(record: dict) -> tuple[str, list[str], int]:
    """(context, choices, gold) of {"context", "choices", "gold"}, or of a line of HellaSwag as it is published, cleaned
    up in the way that its published scores rest on (Zellers et al., 2019; lm-evaluation-harness)."""
    if 'endings' not in record:
        context, choices, name = field(record, 'context'), field(record, 'choices', list), 'gold'
    else:
        if 'ctx_a' in record:
            context = f'{field(record, "ctx_a")} {field(record, "ctx_b").capitalize()}'
        else:
            context = field(record, 'ctx')
        if 'activity_label' in record:
            context = f'{field(record, "activity_label")}: {context}'
        context, choices, name = tidy(context), [tidy(text) for text in field(record, 'endings', list)], 'label'
        label = record.get('label')
        if isinstance(label, str) and label.isdecimal():
            record = {**record, 'label': int(label)}
    gold = field(record, name, int)
    if not 0 <= gold < len(choices):
        raise UserError(f'"{name}" is {gold}: expected the number of a choice, 0 to {len(choices) - 1}')
    return context, choices, gold


def tidy(text: str) -> str:
    """A text of HellaSwag without the marks that WikiHow's pages have left in it."""
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


def last_word(record: dict) -> tuple[str, list[str]]:
    """(all but the last word, [the last word]) of {"text"}, as in LAMBADA (Paperno et al., 2016)."""
    context, _, word = field(record, 'text').rstrip().rpartition(' ')
    if not context.strip():
        raise UserError(f'"text" is {json.dumps(record["text"])[:60]}: expected two words or more')
    return context, [word]


def to_continue(record: dict) -> tuple[str, list[str]]:
    """(prompt, [reference]) of {"prompt", "reference"}."""
    return field(record, 'prompt'), [field(record, 'reference')]


def with_examples(items: Sequence[Item], limit: int | None, shots: int, delimiter: str, seed: int) -> list[Item]:
    """The first limit items, all if it is None, each with the right answers of so many others before its context. The
    others are drawn without repetition, as a function of (seed, number of the item), and never ask the same."""
    if not shots:
        return items[:limit]
    found = []
    for i, item in enumerate(items[:limit]):
        key = np.array([seed % 2**64, i], dtype=np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(len(items)), kind='stable')
        others = [items[j] for j in order if items[j].context != item.context]
        if len(others) < shots:
            raise UserError(f'{item.where}: shots={shots}, but the file has {len(others)} other questions')
        solved = [other.context + delimiter + other.answers[other.gold] for other in others[:shots]]
        found.append(replace(item, context=SEPARATOR.join([*solved, item.context])))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# figures

def right_choices(items: Sequence[Item], logprobs: np.ndarray) -> dict[str, list[bool]]:
    """Whether the likeliest answer of each item is the right one: as it is, per character and per byte, without what
    joins it to the context. The figures have the harness's names. logprobs: of all answers, one after the other."""
    right = {'acc': [], 'acc_norm': [], 'acc_bytes': []}
    start = 0
    for item in items:
        found = logprobs[start:start + len(item.answers)]
        start += len(item.answers)
        right['acc'].append(np.argmax(found) == item.gold)
        right['acc_norm'].append(np.argmax(found / [len(text) for text in item.answers]) == item.gold)
        right['acc_bytes'].append(np.argmax(found / [len(text.encode()) for text in item.answers]) == item.gold)
    return right


def summary(figures: dict[str, Sequence]) -> dict[str, float]:
    """{name: mean, name_stderr: its standard error} of {name: one number per item}; no error of a single item."""
    found = {}
    for name, values in figures.items():
        values = np.asarray(values, dtype=np.float64)
        found[name] = values.mean().item()
        if len(values) > 1:
            found[f'{name}_stderr'] = values.std(ddof=1).item() / math.sqrt(len(values))
    return found


def perplexity(loss: float) -> float | None:
    """e to the loss; None where that is beyond a float."""
    return math.exp(loss) if loss < 700 else None


def unicode_words(text: str) -> list[str]:
    """The words of a text in any script, in lower case; each character of a script without spaces is one."""
    return re.findall(f'{UNSPACED}|(?:(?!{UNSPACED})\\w)+', text.lower())


def compare_texts(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """BLEU and chrF of all answers by sacrebleu, the mean F1 of ROUGE by rouge-score, and how texts were cut into
    tokens: their usual English rules drop letters beyond ASCII, or find one word in a Chinese sentence, so for other
    texts ROUGE has unicode_words(), BLEU the rules for Chinese or single characters. UserError if a package is missing.
    """
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError(f'eval.py needs sacrebleu and rouge-score to compare texts (no {error.name} here): '
                        f'pip install sacrebleu rouge-score') from None
    text = ''.join(references)
    unspaced = re.findall(UNSPACED, text)
    tokenize = '13a'
    if len(unspaced) > 0.2 * len(re.findall(r'\w', text)):
        tokenize = 'zh' if all(re.fullmatch(HAN, char) for char in unspaced) else 'char'
    bleu, chrf = sacrebleu.BLEU(tokenize=tokenize), sacrebleu.CHRF()
    words = None if text.isascii() else SimpleNamespace(tokenize=unicode_words)
    rouge = rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL'], tokenizer=words)
    scores = [rouge.score(reference, answer) for reference, answer in zip(references, answers)]
    f1 = {name: [score[name].fmeasure for score in scores] for name in scores[0]}
    return {'bleu': bleu.corpus_score(answers, [references]).score,
            'chrf': chrf.corpus_score(answers, [references]).score, **summary(f1),
            'bleu_signature': str(bleu.get_signature()), 'chrf_signature': str(chrf.get_signature()),
            'rouge_words': 'ascii' if words is None else 'unicode'}


def table(measurement: str, figures: dict) -> str:
    """The figures of a measurement as lines of text, each with its standard error if there is one."""
    lines = ['', measurement]
    for name, value in figures.items():
        text = str(value)
        if isinstance(value, int):
            text = f'{value:,}'
        elif isinstance(value, float):
            text = f'{value:,.4f}'
        if f'{name}_stderr' in figures:
            text += f' ± {figures[f"{name}_stderr"]:.4f}'
        if not name.endswith('_stderr'):
            lines.append(f'  {name:<20} {text}')
    return '\n'.join(lines)
