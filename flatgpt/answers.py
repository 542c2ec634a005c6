"""
The text that a model writes after a prompt: Answer, which grows token by token and ends where it should, and notices of
what may surprise.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from flatgpt import engine
from flatgpt.errors import UsageError


def parse_stops(stop: str) -> list[str]:
    """The stop strings in the option `stop`: none if it is empty, one, or a JSON list of several. UsageError."""
    if not stop.startswith('['):
        return [stop] if stop else []
    with contextlib.suppress(ValueError, RecursionError):
        stops = json.loads(stop)
        if all(isinstance(text, str) and text for text in stops):
            return stops
    raise UsageError(f'stop={stop!r}: expected a text, or a JSON list of texts such as ["Q:", "A:"]')


class Answer:
    """The text after a prompt, an array of ids, token by token. It ends at an end token, at max_new_tokens, or before
    the first of the texts in stops; finish says why: 'stop', 'length', or None while it grows."""

    def __init__(self, tok, prompt: np.ndarray, max_new_tokens: int, stops: Sequence[str] = ()):
        self.tok = tok
        self.prompt_ids = torch.from_numpy(prompt.astype(np.int64))
        self.max_new_tokens = max_new_tokens
        self.stops = stops
        self.decode = tok.stream(prompt)   # holds back half a character
        self.text = ''
        self.ids = []
        self.log_prob = 0.0
        self.finish = None if max_new_tokens else 'length'
        self.shown = 0   # characters that new_text() has returned

    def add(self, token: int, log_prob: float = 0.0) -> None:
        """Append a token, unless the answer has ended."""
        if self.finish:
            return
        before = len(self.text)
        self.log_prob += log_prob
        self.ids.append(token)
        if token in self.tok.ends:
            self.finish = 'stop'
        else:
            self.text += self.decode(token)
        if len(self.ids) == self.max_new_tokens and not self.finish:
            self.finish = 'length'
        if self.finish:
            self.text += self.decode(None)
        found = [self.text.find(stop, max(before - len(stop), 0)) for stop in self.stops]
        found = [start for start in found if start >= 0]
        if found:
            self.text = self.text[:min(found)]
            self.finish = 'stop'

    def end(self, finish: str) -> None:
        """End the answer here, for this reason."""
        self.text += self.decode(None)
        self.finish = finish

    def new_text(self) -> str:
        """What can be shown and was not yet: nothing that may be the beginning of a stop string."""
        end = len(self.text)
        if not self.finish:
            beginnings = [n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
            end -= max(beginnings, default=0)
        new = self.text[self.shown:end]
        self.shown += len(new)
        return new


def grow(model, answers: Sequence[Answer], **options) -> Iterator[None]:
    """Append tokens to some answers, to all at once; yields after each token, until all have ended. The options are
    those of engine.generate()."""
    tok = answers[0].tok
    prompts = [answer.prompt_ids for answer in answers]
    max_new_tokens = max(answer.max_new_tokens for answer in answers)
    options |= {'vocab_size': tok.vocab_size, 'begin': tok.begin, 'log_probs': True}
    for tokens, log_probs in engine.generate(model, prompts, max_new_tokens, **options):
        for answer, token, log_prob in zip(answers, tokens.tolist(), log_probs.tolist()):
            answer.add(token, log_prob)
        yield
        if all(answer.finish for answer in answers):
            return


# ---------------------------------------------------------------------------------------------------------------------
# what may surprise

def cut_notice(config, lengths: Sequence[int], begin: Sequence[int] = ()) -> str:
    """What happens to texts of these lengths that do not fit into the context, in one line; '' if all fit. begin: the
    ids that stay."""
    longer = sum(n > config.block_size for n in lengths)
    if not longer:
        return ''
    kept = f', after the {len(begin)} that begin a text' if begin else ''
    return (f'{longer:,} of {len(lengths):,} prompts are longer than the context of {config.block_size:,} tokens, the '
            f'longest has {max(lengths):,}: only their ends are seen{kept}')


def memory_notice(model, rt, rows: int, num_tokens: int) -> str:
    """What is missing to hold the weights, unless they are there, and the KV cache of so many rows of num_tokens
    tokens, in one line; '' if the memory is enough or unknown."""
    itemsize = rt.dtype.itemsize
    needed = engine.cache_bytes(model.config, rows * min(num_tokens, model.config.block_size), itemsize)
    needed += rows * model.config.vocab_size * 5   # logits in float32, and which ids were seen
    if rt.device != model.lm_head.weight.device or rt.dtype != model.lm_head.weight.dtype:
        needed += model.get_num_params(non_embedding=False) * itemsize
    free = rt.free_memory()
    if free is None or needed <= free:
        return ''
    return (f'{needed / 1e9:,.1f} GB are needed for {rows:,} samples at once, {free / 1e9:,.1f} GB are free: lower '
            f'batch_size or max_new_tokens')


def template_notice(tok, prompt: str) -> str:
    """That a model has a chat template, in one line, if a prompt has none of its special tokens; else ''."""
    files = tok.files
    template = files.get('chat_template.jinja') or files.get('tokenizer_config.json', {}).get('chat_template')
    if not template or any(token in prompt for token in tok.added.values()):
        return ''
    return ('this model has a chat template, which is not used here: to talk to it, write its special tokens into the '
            'prompt, see docs/sampling.md')
