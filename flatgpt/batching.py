"""
Decoding for conversations and servers: Batch, in which requests join and leave at any token, and Session, a text that
grows turn by turn. Both give each request what engine.generate() gives it alone.

Letters of the shape comments:
B rows · T new tokens · S tokens to attend to · K heads of keys and values · D width of a head · V vocabulary
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from flatgpt import engine
from flatgpt.errors import UserError


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt to continue once, in a Batch or a Session: its token ids, how many tokens to make at most, and the
    sampling controls, which are those of generate(). top_log_probs: for how many of the likeliest tokens the
    log-probabilities are wanted. .tokens: those that were sampled."""
    ids: torch.Tensor
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    row: int = 0
    top_log_probs: int = 0

    def __post_init__(self):
        engine.check_controls(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        if len(self.ids) == 0:
            raise ValueError('an empty prompt: expected at least one token id')

    def begin(self, config, device: torch.device) -> None:
        """Get ready to sample. ValueError if the context of the model has no room."""
        room = config.block_size - len(self.ids)
        if room < 1:
            raise ValueError(f'{len(self.ids)} tokens in a context of {config.block_size}: expected fewer')
        self.uniform = engine.random_uniform(self.seed, self.row, min(self.max_new_tokens, room)).to(device)
        self.seen = torch.zeros(1, config.vocab_size, dtype=torch.bool, device=device)
        self.seen[0, self.ids.long()] = True
        self.tokens = []

    @property
    def finished(self) -> bool:
        """Whether it has all tokens that it may have."""
        return len(self.tokens) >= len(self.uniform)

    def sample(self, logits: torch.Tensor) -> 'Step':
        """The next token, from logits, (1, V)."""
        if not engine.all_finite(logits):
            return Step(self, None, math.nan, [])
        penalized = logits
        if self.repetition_penalty != 1:
            penalized = engine.penalize_repetition(logits, self.seen[:, :logits.size(1)], self.repetition_penalty)
        uniform = self.uniform[len(self.tokens)][None]
        token = engine.sample_token(penalized, uniform, self.temperature, self.top_k, self.top_p, self.min_p).item()
        log_probs = logits[0].log_softmax(dim=-1)
        top = []
        if self.top_log_probs:
            values, ids = log_probs.topk(min(self.top_log_probs, len(log_probs)))
            top = list(zip(ids.tolist(), values.tolist()))
        self.seen[0, token] = True
        self.tokens.append(token)
        return Step(self, token, log_probs[token].item(), top)


class Step(NamedTuple):
    """What one step gives a request: a token id, its log-probability in nats, and the likeliest (id, log-probability)
    pairs, as many as it asked for. token is None if the model gave NaN or infinite logits: remove the request."""
    request: Request
    token: int | None
    log_prob: float
    top: list[tuple[int, float]]


class BatchCache:
    """Keys and values of rows that begin and end at different times: row r has its tokens in the columns from 0 to
    lengths[r]. It has as many columns as the longest row needs, rounded up."""

    def __init__(self, config, rows: int, device: torch.device):
        self.block_size = config.block_size
        self.rows = rows
        self.device = device
        self.layers = []   # keys and values, (2, rows, K, columns, D)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)             # (rows,), tokens of each row
        self.active = 0    # rows in use: the first ones
        self.evicted = 0   # columns dropped before the first: none, a row ends where its context does

    def columns_of(self, T: int):
        """For the next token of each active row: its column, (B, 1), the columns of all keys, (S,), and no padding."""
        return self.lengths[:self.active, None], torch.arange(self.used, device=self.device), None

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of one token per active row, (B, K, 1, D); return those of all, (B, K, S, D)."""
        keys, values = self.layers[layer][:, :self.active]
        lengths = self.lengths[:self.active]
        keys[self.row_numbers, :, lengths] = k[:, :, 0]
        values[self.row_numbers, :, lengths] = v[:, :, 0]
        return keys[:, :, :self.used], values[:, :, :self.used]

    def prepare(self):
        """Make room for one more token in each active row."""
        self.row_numbers = torch.arange(self.active, device=self.device)
        self.used = int(self.lengths[:self.active].max()) + 1
        self.grow(self.used)

    def grow(self, columns: int):
        """Make room for so many columns: twice as many as before, or more."""
        if columns <= self.layers[-1].size(3):   # the last to grow, because memory may have been too small
            return
        enough = engine.rounded_columns(columns, self.block_size)
        for layer, tensor in enumerate(self.layers):
            larger = tensor.new_zeros(2, self.rows, tensor.size(2), enough, tensor.size(4))
            larger[..., :tensor.size(3), :] = tensor
            self.layers[layer] = larger

    def append(self, single: engine.KVCache):
        """Add a row: a KVCache that has encoded a prompt and has no more columns."""
        if not self.layers:   # the first row tells the shapes
            self.layers = [keys.new_zeros(2, self.rows, keys.size(1), 0, keys.size(3)) for keys in single.keys]
        self.grow(single.length)
        for layer, keys, values in zip(self.layers, single.keys, single.values):
            layer[0, self.active, :, :single.length] = keys[0]
            layer[1, self.active, :, :single.length] = values[0]
        self.lengths[self.active] = single.length
        self.active += 1

    def remove(self, row: int):
        """Remove a row; the last one takes its place."""
        self.active -= 1
        for layer in self.layers:
            layer[:, row] = layer[:, self.active]
        self.lengths[row] = self.lengths[self.active]


class Batch:
    """Requests that are decoded together, of which each may join and leave at any token (Yu et al., 2022). What a
    request gets does not depend on the others, but for rounding.

    model: in eval() mode. rows: how many requests fit. vocab_size: ids from there on are never sampled.
    """

    def __init__(self, model, rows: int, vocab_size: int | None = None):
        self.model = model
        self.vocab_size = vocab_size
        self.requests = []   # in the order of the rows of the cache
        self.cache = BatchCache(model.config, rows, model.transformer.wte.weight.device)

    @torch.inference_mode()
    def add(self, request: Request) -> Step:
        """Encode a request's prompt and sample its first token. The prompt must be shorter than the context."""
        if len(self.requests) >= self.cache.rows:
            raise ValueError(f'{len(self.requests)} requests: expected at most {self.cache.rows - 1}')
        device = self.cache.device
        request.begin(self.model.config, device)
        single = engine.KVCache(self.model.config, 1, len(request.ids), device)
        logits = self.model.next_logits(request.ids.to(device)[None], single)[:, :self.vocab_size].float()   # (1, V)
        single.advance(len(request.ids))
        self.cache.append(single)
        self.requests.append(request)
        return request.sample(logits)

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """One more token for each request."""
        if not self.requests:
            return []
        idx = torch.tensor([request.tokens[-1:] for request in self.requests], device=self.cache.device)   # (B, 1)
        self.cache.prepare()
        logits = self.model.next_logits(idx, self.cache)[:, :self.vocab_size].float()   # (B, V)
        self.cache.lengths[:self.cache.active] += 1
        return [request.sample(logits[row:row + 1]) for row, request in enumerate(self.requests)]

    @torch.inference_mode()
    def remove(self, request: Request) -> None:
        """Take a request out, whether it is finished or not."""
        row = self.requests.index(request)
        self.cache.remove(row)
        self.requests[row] = self.requests[-1]
        self.requests.pop()


class Session:
    """A text to which prompts and continuations are added in turn, as in a conversation: what was encoded before is not
    encoded again. model: in eval() mode. vocab_size: ids from there on are never sampled."""

    def __init__(self, model, vocab_size: int | None = None):
        self.model = model
        self.vocab_size = vocab_size
        self.device = model.transformer.wte.weight.device
        self.ids = []      # that the cache holds
        self.cache = None

    @torch.inference_mode()
    def generate(self, request: Request) -> Iterator[tuple[int, float]]:
        """Continue a request's prompt: yields (token id, its log-probability in nats), up to max_new_tokens times or to
        the end of the context. Of the prompt only what differs from the text so far is encoded."""
        request.begin(self.model.config, self.device)
        ids = request.ids.tolist()
        common = 0   # tokens to keep; of the prompt the last one is encoded in any case, for its logits
        while common < min(len(self.ids), len(ids) - 1) and self.ids[common] == ids[common]:
            common += 1
        self.make_room(len(ids) + len(request.uniform), common)
        new = ids[common:]
        while not request.finished:
            idx = torch.tensor([new], device=self.device)                             # (1, T)
            logits = self.model.next_logits(idx, self.cache)[:, :self.vocab_size].float()   # (1, V)
            self.cache.advance(len(new))
            self.ids += new
            step = request.sample(logits)
            if step.token is None:
                raise UserError('the model gives NaN or infinite logits: its training went wrong')
            new = [step.token]
            yield step.token, step.log_prob

    def make_room(self, columns: int, common: int):
        """Drop all but the first `common` tokens, and make the cache so many columns long, or longer."""
        self.ids = self.ids[:common]   # first: Ctrl-C may come at any line
        if self.cache is None or self.cache.capacity < columns:
            config = self.model.config
            larger = engine.KVCache(config, 1, engine.rounded_columns(columns, config.block_size), self.device)
            if self.cache is not None:
                for layer in range(config.n_layer):
                    larger.update(layer, self.cache.keys[layer][:, :, :common], self.cache.values[layer][:, :, :common])
            self.cache = larger
        self.cache.length = 0
        self.cache.advance(common)
