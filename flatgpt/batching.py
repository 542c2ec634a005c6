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
    """A prompt to continue in a Batch: its token ids, how many tokens to make at most, and the sampling controls, which
    are those of generate(). top_log_probs: for how many of the likeliest tokens the log-probabilities are wanted."""
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


class Step(NamedTuple):
    """What one step gives a request: a token id, its log-probability in nats, and the likeliest (id, log-probability)
    pairs, as many as it asked for. token is None if the model gave NaN or infinite logits: remove the request."""
    request: Request
    token: int | None
    log_prob: float
    top: list[tuple[int, float]]


class Sampler:
    """Samples the tokens of one request, in their order. tokens: those so far."""

    def __init__(self, request: Request, config, device: torch.device):
        room = config.block_size - len(request.ids)
        if room < 1:
            raise ValueError(f'{len(request.ids)} tokens in a context of {config.block_size}: expected fewer')
        self.request = request
        self.uniform = engine.random_uniform(request.seed, request.row, min(request.max_new_tokens, room)).to(device)
        self.seen = torch.zeros(1, config.vocab_size, dtype=torch.bool, device=device)
        self.seen[0, request.ids.long()] = True
        self.tokens = []

    @property
    def finished(self) -> bool:
        """Whether the request has all tokens that it may have."""
        return len(self.tokens) >= len(self.uniform)

    def next(self, logits: torch.Tensor) -> Step:
        """The next token, from logits, (1, V)."""
        request = self.request
        if not engine.all_finite(logits):
            return Step(request, None, math.nan, [])
        penalized = logits
        if request.repetition_penalty != 1:
            penalized = engine.penalize_repetition(logits, self.seen[:, :logits.size(1)], request.repetition_penalty)
        uniform = self.uniform[len(self.tokens)][None]
        controls = request.temperature, request.top_k, request.top_p, request.min_p
        token = engine.sample_token(penalized, uniform, *controls).item()
        log_probs = logits[0].log_softmax(dim=-1)
        top = []
        if request.top_log_probs:
            values, ids = log_probs.topk(min(request.top_log_probs, len(log_probs)))
            top = list(zip(ids.tolist(), values.tolist()))
        self.seen[0, token] = True
        self.tokens.append(token)
        return Step(request, token, log_probs[token].item(), top)


class BatchCache:
    """Keys and values of rows that begin and end at different times: row r has its tokens in the columns from 0 to
    lengths[r]. It has as many columns as the longest row needs, rounded up."""

    def __init__(self, config, rows: int, device: torch.device):
        self.config = config
        self.rows = rows
        self.device = device
        self.keys = []     # one per layer, (rows, K, columns, D)
        self.values = []
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)             # (rows,), tokens of each row
        self.columns = 0
        self.active = 0    # rows in use: the first ones
        self.evicted = 0   # columns dropped before the first: none, a row ends where its context does

    def columns_of(self, T: int):
        """For the next token of each active row: its column, (B, 1), the columns of all keys, (S,), and no padding."""
        return self.lengths[:self.active, None], torch.arange(self.used, device=self.device), None

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of one token per active row, (B, K, 1, D); return those of all, (B, K, S, D)."""
        rows = torch.arange(self.active, device=self.device)
        keys, values = self.keys[layer], self.values[layer]
        keys[rows, :, self.lengths[:self.active]] = k[:, :, 0]
        values[rows, :, self.lengths[:self.active]] = v[:, :, 0]
        return keys[:self.active, :, :self.used], values[:self.active, :, :self.used]

    def prepare(self):
        """Make room for one more token in each active row."""
        self.used = int(self.lengths[:self.active].max()) + 1
        self.grow(self.used)

    def grow(self, columns: int):
        """Make room for so many columns: twice as many as before, or more."""
        if columns <= self.columns:
            return
        enough = engine.rounded_columns(columns, self.config.block_size)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                larger = tensor.new_zeros(self.rows, tensor.size(1), enough, tensor.size(3))
                larger[:, :, :tensor.size(2)] = tensor
                tensors[layer] = larger
        self.columns = enough   # now, because memory may have been too small

    def append(self, single: engine.KVCache):
        """Add a row: the first one of a KVCache that has encoded a prompt."""
        if self.columns == 0:   # the first row tells the shapes
            self.keys = [tensor.new_zeros(self.rows, tensor.size(1), 0, tensor.size(3)) for tensor in single.keys]
            self.values = [torch.zeros_like(tensor) for tensor in self.keys]
        self.grow(single.length)
        row = self.active
        for layer in range(self.config.n_layer):
            self.keys[layer][row, :, :single.length] = single.keys[layer][0, :, :single.length]
            self.values[layer][row, :, :single.length] = single.values[layer][0, :, :single.length]
        self.lengths[row] = single.length
        self.active += 1

    def remove(self, row: int):
        """Remove a row; the last one takes its place."""
        last = self.active - 1
        if row != last:
            for tensor in (*self.keys, *self.values):
                tensor[row] = tensor[last]
            self.lengths[row] = self.lengths[last]
        self.active = last


class Batch:
    """Requests that are decoded together, of which each may join and leave at any token (Yu et al., 2022). What a
    request gets does not depend on the others, but for rounding.

    model: in eval() mode. rows: how many requests fit. vocab_size: ids from there on are never sampled.
    """

    def __init__(self, model, rows: int, vocab_size: int | None = None):
        self.model = model
        self.rows = rows
        self.vocab_size = vocab_size
        self.requests = []   # in the order of the rows of the cache
        self.cache = BatchCache(model.config, rows, model.transformer.wte.weight.device)
        self.samplers = {}   # request: its Sampler

    @torch.inference_mode()
    def add(self, request: Request) -> Step:
        """Encode a request's prompt and sample its first token. The prompt must be shorter than the context."""
        if len(self.requests) >= self.rows:
            raise ValueError(f'{len(self.requests)} requests: expected at most {self.rows - 1}')
        device = self.cache.device
        sampler = Sampler(request, self.model.config, device)
        single = engine.KVCache(self.model.config, 1, len(request.ids), device)
        single.reset([len(request.ids)])
        logits = self.model.next_logits(request.ids.to(device)[None], single)[:, :self.vocab_size].float()   # (1, V)
        single.advance(len(request.ids))
        self.cache.append(single)
        self.requests.append(request)
        self.samplers[request] = sampler
        return sampler.next(logits)

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """One more token for each request."""
        if not self.requests:
            return []
        tokens = [self.samplers[request].tokens[-1] for request in self.requests]
        idx = torch.tensor(tokens, device=self.cache.device)[:, None]                 # (B, 1)
        self.cache.prepare()
        logits = self.model.next_logits(idx, self.cache)[:, :self.vocab_size].float()   # (B, V)
        self.cache.lengths[:self.cache.active] += 1
        return [self.samplers[request].next(logits[row:row + 1]) for row, request in enumerate(self.requests)]

    def finished(self, request: Request) -> bool:
        """Whether a request has all tokens that it may have."""
        return self.samplers[request].finished

    @torch.inference_mode()
    def remove(self, request: Request) -> None:
        """Take a request out, whether it is finished or not."""
        row = self.requests.index(request)
        self.cache.remove(row)
        self.requests[row] = self.requests[-1]
        self.requests.pop()
        del self.samplers[request]


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
        sampler = Sampler(request, self.model.config, self.device)
        ids = request.ids.tolist()
        common = 0   # tokens to keep; of the prompt the last one is encoded in any case, for its logits
        while common < min(len(self.ids), len(ids) - 1) and self.ids[common] == ids[common]:
            common += 1
        self.make_room(len(ids) + len(sampler.uniform), common)
        new = ids[common:]
        while not sampler.finished:
            idx = torch.tensor([new], device=self.device)                             # (1, T)
            logits = self.model.next_logits(idx, self.cache)[:, :self.vocab_size].float()   # (1, V)
            self.cache.advance(len(new))
            self.ids += new
            step = sampler.next(logits)
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
            larger.reset([0])
            if self.cache is not None:
                for layer in range(config.n_layer):
                    larger.update(layer, self.cache.keys[layer][:, :, :common], self.cache.values[layer][:, :, :common])
            self.cache = larger
        self.cache.length = 0
        self.cache.advance(common)
