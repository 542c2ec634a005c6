"""
Three questions to a model: how likely is a continuation, what does each token of a text cost, what would it write.

They are the three on which EleutherAI's lm-evaluation-harness rests (Gao et al., 2021), and the answers are the same.
Batches are made of all rows first and shared out to the processes then, so that a row has the same company, and the
same result to the last bit, however many processes there are.
"""

import contextlib
import json
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from flatgpt import engine, tokenizer
from flatgpt.errors import UserError

SEPARATOR = '\n\n'      # between the examples of a few-shot prompt
LOGITS = 2**27          # so many are computed at once: 512 MB


# ---------------------------------------------------------------------------------------------------------------------
# the cost of tokens

def share(rt, lengths, batch_size, what):
    """The batches of this process, lists of row numbers, behind a progress bar: rows of similar length together, the
    longest first, so that memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return tqdm(batches[rt.rank::rt.world_size], desc=what, leave=False, disable=None if rt.master else True)


@torch.inference_mode()
def costs(model, rt, rows, batch_size, what):
    """What the last tokens of each row cost, given those before them: a float64 tensor, (rows, 3), of the sum of their
    -log p in nats, the sum of its squares, and how many of them are not the likeliest token.

    rows: [(ids, n)], arrays of 2 to block_size + 1 token ids of which the last n < len(ids) are scored, or
    [(ids, n, learnt)] with n booleans that say which of those. Raises UserError if the model gives NaN or infinity.
    """
    hidden = torch.compile(model.hidden_states, dynamic=True) if rt.compile else model.hidden_states
    found = torch.zeros(len(rows), 3, dtype=torch.float64)
    for batch in share(rt, [len(ids) for ids, *_ in rows], batch_size, what):
        T = max(len(rows[i][0]) for i in batch) - 1
        idx = torch.zeros(len(batch), T, dtype=torch.long)   # filled up on the right, which causal attention ignores
        targets = torch.full_like(idx, -1)
        for k, i in enumerate(batch):
            ids, n, *learnt = rows[i]
            ids = torch.from_numpy(ids.astype(np.int64))
            idx[k, :len(ids) - 1] = ids[:-1]
            targets[k, len(ids) - 1 - n:len(ids) - 1] = ids[-n:]
            if learnt:
                targets[k, len(ids) - 1 - n:len(ids) - 1][torch.from_numpy(~learnt[0])] = -1
        scored = targets >= 0
        x = hidden(idx.to(rt.device))[scored.to(rt.device)]                           # (N, C)
        nll, missed = [], []
        n = max(LOGITS // model.config.vocab_size, 1)
        for part, y in zip(x.split(n), targets[scored].to(rt.device).split(n)):
            logits = model.compute_logits(part).float()                                      # (n, V)
            nll.append(F.cross_entropy(logits, y, reduction='none').cpu().double())
            missed.append((logits.argmax(dim=-1) != y).cpu().double())
        nll = torch.cat(nll)
        if not nll.isfinite().all():
            raise UserError('the model gives NaN or infinite logits: its training went wrong, or use --dtype=float32')
        per_token = torch.stack((nll, nll.square(), torch.cat(missed)), dim=1)        # (N, 3)
        found[batch] = torch.zeros(len(batch), 3, dtype=torch.float64).index_add(0, scored.nonzero()[:, 0], per_token)
    return rt.sum(found)


def windows(n, size, stride):
    """[(begin, first, end)] for a text of n tokens: of tokens begin to end, those from first on are scored, so that
    each but the text's first is scored once. The windows are those of the sliding-window recipe of Hugging Face's
    documentation: size tokens, one every stride. Where the stride is the size, that recipe leaves out the first
    token of each; here such a window begins one token earlier."""
    found, first = [], 1
    for begin in range(0, n, stride):
        end = min(begin + size, n)
        if end > first:
            found.append((min(begin, first - 1), first, end))
        first = max(first, end)
    return found


def rolling_loss(model, rt, ids, stride, batch_size, learnt=None):
    """The cost of every token of ids but the first, given those before it: at least block_size - stride of them, or
    all there are. learnt: if given, booleans, whether each of ids is scored. Returns the mean in nats, its standard
    error, as if tokens were independent, and their number."""
    learnt = np.ones(len(ids), bool) if learnt is None else learnt
    spans = windows(len(ids), model.config.block_size, stride)
    rows = [(ids[begin:end], end - first, learnt[first:end]) for begin, first, end in spans]
    total, squares, _ = costs(model, rt, rows, batch_size, 'loss').sum(dim=0).tolist()
    n = int(learnt[1:].sum())
    variance = max(squares - total**2 / n, 0) / max(n - 1, 1)
    return total / n, math.sqrt(variance / n), n


def encode_pair(tok, context, continuation):
    """Token ids of a context and of its continuation, which begins at the first token that depends on it; blanks at
    the end of the context belong to it, because words are encoded with the space before them. An empty context
    becomes the end of a text before it."""
    bare = context.rstrip()
    alone, whole = tok.encode_prompt(bare), tok.encode_prompt(context + continuation)
    n = min(len(alone), len(whole))
    same = int((alone[:n] == whole[:n]).cumprod().sum())
    if same == 0 or not (bare or tok.begin):
        return tok.encode_prompt(''), whole
    return whole[:same], whole[same:]


def loglikelihood(model, rt, pairs, batch_size, what):
    """For pairs of token ids, of a context and its continuation: the log-probability of each continuation in nats, and
    whether each of its tokens is the likeliest one; two arrays. What does not fit into block_size is cut off the
    context on the left; a continuation that is longer still is scored in halves of block_size."""
    size, rows, owner = model.config.block_size, [], []
    for i, (context, continuation) in enumerate(pairs):
        ids, first = np.concatenate((context, continuation)), len(context)
        step = size if len(continuation) <= size else max(size // 2, 1)
        for start in range(first, len(ids), step):
            end = min(start + step, len(ids))
            rows.append((ids[max(end - size - 1, 0):end], end - start))
            owner.append(i)
    found = torch.zeros(len(pairs), 3, dtype=torch.float64)
    found.index_add_(0, torch.tensor(owner), costs(model, rt, rows, batch_size, what))
    return -found[:, 0].numpy(), (found[:, 2] == 0).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# what it would write

def generate_until(model, tok, rt, prompts, max_new_tokens, stops, batch_size):
    """The text that a model writes after each prompt, an array of token ids, always taking the likeliest token: until
    one of the texts in stops, which is left out, the end-of-text token, or max_new_tokens."""
    starts = [torch.from_numpy(ids.astype(np.int64)) for ids in prompts]
    made = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long)                # id + 1, 0 where there is none
    for batch in share(rt, [len(ids) for ids in prompts], batch_size, 'generate'):
        tokens = engine.generate(model, [starts[i] for i in batch], max_new_tokens, temperature=0,
                                 vocab_size=tok.vocab_size, static_cache=rt.compile)
        try:
            for n, (drawn, _) in enumerate(tokens):
                made[batch, n] = drawn.cpu() + 1
                if all(until(tok, made[i], stops)[1] for i in batch):
                    break
        except ValueError as error:
            raise UserError(error) from None
    return [until(tok, ids, stops)[0] for ids in rt.sum(made)]


def until(tok, made, stops):
    """The text of what was made up to a stop, and whether there is one."""
    ids = (made[made > 0] - 1).tolist()
    n = ids.index(tok.eot) if tok.eot in ids else len(ids)
    text = tok.decode(ids[:n])
    ends = [place for place in map(text.find, stops) if place >= 0]
    return text[:min(ends, default=len(text))], bool(ends) or n < len(ids)


# ---------------------------------------------------------------------------------------------------------------------
# questions

@dataclass
class Item:
    """A line of a JSONL file: what is asked, the answers to choose from, and the number of the right one."""
    where: str              # file and line, for error messages
    context: str
    answers: list
    gold: int = 0


@contextlib.contextmanager
def naming(where):
    """Put a place before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


def read_items(path, parse):
    """The items in a JSONL file, each made by parse(record). Whatever is wrong is a UserError that names the line."""
    items = []
    for number, line in enumerate(tokenizer.read_text(path).removeprefix('\ufeff').split('\n'), 1):
        if not line.strip():
            continue
        with naming(f'{path}, line {number}'):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f'no JSON ({" ".join(str(error).split())[:80]})') from None
            if not isinstance(record, dict):
                raise UserError(f'expected an object, {{...}}, not {line.strip()[:40]}')
            items.append(Item(f'{path}, line {number}', *parse(record)))
    if not items:
        raise UserError(f'{path} is empty: expected one JSON object per line')
    return items


def field(record, name, kind=str):
    """A field of a record; UserError if it is missing, of another type, or empty where text is expected."""
    if name not in record:
        raise UserError(f'no "{name}"; it has {", ".join(map(repr, record)) or "nothing"}')
    value = record[name]
    words = {str: 'a text', list: 'a list of two or more texts', int: 'a whole number'}[kind]
    good = isinstance(value, kind) and not isinstance(value, bool)
    if kind is list:
        good = good and len(value) > 1 and all(isinstance(text, str) and text for text in value)
    if not good:
        raise UserError(f'"{name}" is {json.dumps(value)[:60]}: expected {words}')
    return value


def multiple_choice(record):
    """(context, choices, gold) of {"context", "choices", "gold"}, or of a line of HellaSwag as it is published, cleaned
    up in the way that its published scores rest on (Zellers et al., 2019; lm-evaluation-harness)."""
    if 'endings' in record:
        context = field(record, 'ctx') if 'ctx_a' not in record else ' '.join(
            (field(record, 'ctx_a'), field(record, 'ctx_b').capitalize()))
        label = record.get('label')
        record = {**record, 'label': int(label)} if isinstance(label, str) and label.isdecimal() else record
        title = f'{field(record, "activity_label")}: ' if 'activity_label' in record else ''
        context, gold, name = tidy(title + context), field(record, 'label', int), 'label'
        choices = [tidy(ending) for ending in field(record, 'endings', list)]
    else:
        context, choices = field(record, 'context'), field(record, 'choices', list)
        gold, name = field(record, 'gold', int), 'gold'
    if not 0 <= gold < len(choices):
        raise UserError(f'"{name}" is {gold}: expected the number of a choice, 0 to {len(choices) - 1}')
    return context, choices, gold


def tidy(text):
    """A text of HellaSwag without the marks that WikiHow's pages have left in it."""
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


def last_word(record):
    """(all but the last word, [the last word]) of {"text"}, as in LAMBADA (Paperno et al., 2016)."""
    context, _, word = field(record, 'text').rstrip().rpartition(' ')
    if not context.strip():
        raise UserError(f'"text" is {json.dumps(record["text"])[:60]}: expected two words or more')
    return context, [word]


def to_continue(record):
    """(prompt, [reference]) of {"prompt", "reference"}."""
    return field(record, 'prompt'), [field(record, 'reference')]


def with_examples(items, i, shots, delimiter, seed):
    """The context of an item after so many others with their right answers: drawn without repetition, as a function of
    (seed, i), and never one that asks the same."""
    raw = np.random.Philox(key=np.array([seed % 2**64, i], dtype=np.uint64)).random_raw(len(items)) if shots else []
    others = [items[j] for j in np.argsort(raw, kind='stable') if items[j].context != items[i].context]
    if len(others) < shots:
        raise UserError(f'{items[i].where}: shots={shots}, but the file has {len(others)} other questions')
    solved = [other.context + delimiter + other.answers[other.gold] for other in others[:shots]]
    return SEPARATOR.join([*solved, items[i].context])


# ---------------------------------------------------------------------------------------------------------------------
# figures

def right_choices(items, logprobs):
    """Whether the likeliest answer of each item is the right one, {figure: [bool]}: as it is, per character and per
    byte, without what joins it to the context. The figures have the harness's names. logprobs: of all answers."""
    right = {'acc': [], 'acc_norm': [], 'acc_bytes': []}
    for item in items:
        found, logprobs = logprobs[:len(item.answers)], logprobs[len(item.answers):]
        n_chars, n_bytes = [len(text) for text in item.answers], [len(text.encode()) for text in item.answers]
        for name, scale in zip(right, (1, n_chars, n_bytes)):
            right[name].append(np.argmax(found / scale) == item.gold)
    return right


def summary(figures):
    """{name: mean, name_stderr: its standard error} of {name: one number per item}; no error of a single item."""
    found = {}
    for name, values in figures.items():
        values = np.asarray(values, dtype=np.float64)
        found[name] = values.mean().item()
        if len(values) > 1:
            found[f'{name}_stderr'] = values.std(ddof=1).item() / math.sqrt(len(values))
    return found


def perplexity(loss):
    """e to the loss; None where that is beyond a float."""
    return math.exp(loss) if loss < 700 else None
