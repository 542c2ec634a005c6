"""
Fast generation: a KV cache, sampling controls, and generate(), which continues many prompts at once.

The text is the one that the plain loop GPT.generate() in model.py would give with the same random numbers: each row has
random numbers of its own, so a sample does not depend on which others are drawn with it.

Letters of the shape comments:
B rows · T new tokens · S tokens to attend to · K heads of keys and values · D width of a head · V vocabulary
"""

import functools
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from flatgpt.errors import UserError
from flatgpt.machine import works

SORTED_FIRST = 2048   # ids that are sorted first: nearly always enough for top_p

# ---------------------------------------------------------------------------------------------------------------------
# from logits to a token

def check_controls(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                   min_p: float | None = None, repetition_penalty: float = 1.0) -> None:
    """Raise ValueError if a sampling control is out of its range: its name, value and range."""
    if not temperature >= 0:   # neither is NaN
        raise ValueError(f'temperature={temperature}: expected 0 (the likeliest token) or more')
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k={top_k}: expected 1 or more, or None for all')
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f'top_p={top_p}: expected between 0 (the likeliest token) and 1 (all)')
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f'min_p={min_p}: expected between 0 (all) and 1 (the likeliest token)')
    if not 0.01 <= repetition_penalty <= 100:
        raise ValueError(f'repetition_penalty={repetition_penalty}: expected between 0.01 and 100; 1 does nothing')


def random_uniform(seed: int, row: int, n: int) -> torch.Tensor:
    """n random numbers in (0, 1], float32, (n,): a pure function of (seed, row), from a counter-based generator (Salmon
    et al., 2011)."""
    key = np.array([seed % 2**64, row], dtype=np.uint64)
    bits = np.random.Philox(key=key).random_raw(n) >> 40                              # 24 bits, exact in float32
    return torch.from_numpy((bits.astype(np.float32) + 1) / 2**24)


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits, (B, V), in which ids that were seen, (B, V) of bool, are less likely: positive logits are divided by the
    penalty, negative ones multiplied with it (Keskar et al., 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_token(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, min_p: float | None = None) -> torch.Tensor:
    """One token id per row, (B,), from logits, (B, V), and uniform random numbers in (0, 1], (B,).

    It is the first id at which the cumulative probability reaches the random number, so one number decides one token.
    temperature divides the logits; 0 takes the likeliest id. Then top_k keeps the k likeliest ids, exactly k also if
    some are equal (Fan et al., 2018); of these, top_p keeps the fewest whose probabilities add up to top_p or more
    (Holtzman et al., 2020), and min_p those that are at least min_p times as likely as the likeliest (Nguyen et al.,
    2025).
    """
    V = logits.size(-1)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-9)    # no overflow near 0
    ids = None
    if top_k is not None and top_k < V:
        logits, ids = logits.topk(top_k)                                              # (B, k), the likeliest first
    p = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        if ids is None:
            p, ids = likeliest_first(p, top_p)
        excluded = p.cumsum(dim=-1) - p >= top_p   # likelier ids alone are enough
        excluded[:, 0] = False
        p = p.masked_fill(excluded, 0)
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), 0)
    cumulative = p.cumsum(dim=-1)                                                     # (B, k), up to about one
    index = (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(dim=-1)          # (B,)
    return index if ids is None else ids.gather(-1, index[:, None])[:, 0]


def likeliest_first(p: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, (B, V), in descending order, and their ids, both (B, k): at least as many as add up to top_p. To
    sort all of them on a CPU takes longer than some models need for a token."""
    if p.device.type == 'cpu' and p.size(-1) > SORTED_FIRST:
        values, ids = p.topk(SORTED_FIRST)
        if bool((values.cumsum(dim=-1)[:, -1] >= top_p).all()):
            return values, ids
    return p.topk(p.size(-1))


# ---------------------------------------------------------------------------------------------------------------------
# the KV cache

class KVCache:
    """Keys and values of the tokens that a model has processed: one tensor each per layer, (B, K, columns, D), in the
    dtype of the activations. Rows that are shorter than others are padded on their left.

    static: each step of one token has the same shapes, as CUDA graphs need: attention gets all columns, and a mask says
    which are empty.
    """

    def __init__(self, config, rows: int, columns: int, device: torch.device, static: bool = False):
        self.rows = rows
        self.static = static
        self.capacity = columns
        self.columns = torch.arange(columns, device=device)
        self.keys = [None] * config.n_layer
        self.values = [None] * config.n_layer
        self.length = 0   # columns that are filled
        self.ragged = False
        self.padding = torch.zeros(rows, dtype=torch.long, device=device)             # (B,), columns of padding
        # tensors, because a compiled step is compiled again for each value of a number
        self.next_column = torch.zeros(1, dtype=torch.long, device=device)            # length
        self.evicted = torch.zeros(1, dtype=torch.long, device=device)                # columns dropped before the first
        self.fix_addresses(self.columns, self.padding, self.next_column, self.evicted)

    def fix_addresses(self, *tensors: torch.Tensor) -> None:
        """Tell CUDA graphs that tensors of a static cache stay where they are; they would copy them at each step."""
        if self.static:
            for tensor in tensors:
                torch._dynamo.mark_static_address(tensor)

    def reset(self, lengths: Sequence[int]) -> None:
        """Make the cache empty, for rows of these lengths. A static one is set to zero: attention multiplies columns
        that it masks by zero, and nothing of an earlier text may remain in them, not even NaN."""
        for tensor in (*self.keys, *self.values):
            if self.static and tensor is not None:
                tensor.zero_()
        self.length = 0
        self.ragged = len(set(lengths)) > 1
        self.padding.copy_(torch.tensor([max(lengths) - n for n in lengths]))
        self.next_column.zero_()
        self.evicted.zero_()

    def columns_of(self, T: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """For the next T tokens: their columns, (T,), the columns of all keys, (S,), and the padding, (B,) or None."""
        if self.static and T == 1:
            return self.next_column, self.columns, self.padding
        end = self.length + T
        return self.columns[self.length:end], self.columns[:end], self.padding if self.ragged else None

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of new tokens, (1 or B, K, T, D), in a layer; return those of all tokens to attend to,
        (1 or B, K, S, D)."""
        T = k.size(2)
        if self.keys[layer] is None or self.keys[layer].dtype != k.dtype:
            shape = self.rows, k.size(1), self.capacity, k.size(3)
            self.keys[layer] = k.new_zeros(shape)
            self.values[layer] = k.new_zeros(shape)
            self.fix_addresses(self.keys[layer], self.values[layer])
        keys, values = self.keys[layer], self.values[layer]
        if self.static and T == 1:
            return keys.index_copy_(2, self.next_column, k), values.index_copy_(2, self.next_column, v)
        end = self.length + T
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        if self.length == 0:
            return k, v
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, T: int) -> None:
        """Count the T tokens that every layer has stored."""
        self.length += T
        self.next_column.fill_(self.length)

    def evict(self, n: int) -> None:
        """Drop all but the last n columns. The tokens in them keep their positions."""
        dropped = self.length - n
        for tensor in (*self.keys, *self.values):
            tensor[:, :, :n] = tensor[:, :, dropped:self.length].clone()
        self.length = n
        self.next_column.fill_(n)
        self.evicted.add_(dropped)
        self.padding.sub_(dropped).clamp_(min=0)


def cache_bytes(config, num_tokens: int, itemsize: int = 2) -> int:
    """Bytes of the keys and values of num_tokens tokens, of itemsize bytes per number."""
    return 2 * config.n_layer * (config.n_kv_head or config.n_head) * config.head_width * num_tokens * itemsize


def rounded_columns(num_tokens: int, block_size: int) -> int:
    """Columns of a cache for num_tokens tokens: a power of two from 128 on, at most block_size. So texts of many
    lengths share few shapes, each of which is compiled once, and a cache that grows is seldom copied."""
    return min(max(128, 1 << (num_tokens - 1).bit_length()), block_size)


spare_caches = weakref.WeakKeyDictionary()   # model: its static cache between two calls of generate()


def take_cache(model, rows: int, num_tokens: int, static: bool) -> KVCache:
    """A KVCache for so many rows and tokens per row; reset it before use. A static one is that of an earlier generate()
    if it fits, because CUDA graphs hold the addresses of its tensors. While it is in use, nobody else gets it."""
    config, device = model.config, model.transformer.wte.weight.device
    if not static:
        return KVCache(config, rows, num_tokens, device)
    columns = rounded_columns(num_tokens, config.block_size)
    cache = spare_caches.pop(model, None)
    if cache is None or (cache.rows, cache.capacity, cache.columns.device) != (rows, columns, device):
        cache = KVCache(config, rows, columns, device, static=True)
    return cache


# ---------------------------------------------------------------------------------------------------------------------
# generation

def decode_step(model, idx: torch.Tensor, kv_cache: KVCache, uniform: torch.Tensor, vocab_size: int | None,
                temperature: float, top_k: int | None, top_p: float | None, min_p: float | None,
                repetition_penalty: float, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, (B, V) in float32, of the tokens that follow token ids idx, (1 or B, T), which continue those in the
    kv_cache; and the tokens, (B,), that random numbers, (B,), and the controls take of them."""
    logits = model.next_logits(idx, kv_cache).expand(len(uniform), -1)[:, :vocab_size].float()
    penalized = logits
    if repetition_penalty != 1:
        penalized = penalize_repetition(logits, seen[:, :vocab_size], repetition_penalty)
    return logits, sample_token(penalized, uniform, temperature, top_k, top_p, min_p)


def compile_step(model) -> None:
    """Compile decode_step() for one token after another: into a CUDA graph on a GPU, with packed weights on a CPU.
    Prompts are not compiled. If the first call fails, decoding continues without compilation."""
    eager = functools.partial(decode_step, model)
    gpu = model.transformer.wte.weight.device.type == 'cuda'
    fast = torch.compile(eager, **{'mode': 'reduce-overhead'} if gpu else {'options': {'freezing': True}})
    trials = []   # the result of the first call, which is repeated: the token goes into the same column again

    def step(idx, kv_cache, *rest):
        if kv_cache.length == 0 or idx.size(1) > 1:
            return eager(idx, kv_cache, *rest)
        if not trials:
            trials.append(works(lambda: fast(idx, kv_cache, *rest) is not None, 'torch.compile'))
        return fast(idx, kv_cache, *rest) if trials[0] else eager(idx, kv_cache, *rest)

    model.decode_step = step


@torch.inference_mode()
def generate(model, prompts: Sequence[torch.Tensor], max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             repetition_penalty: float = 1.0, seed: int = 0, first_row: int = 0, vocab_size: int | None = None,
             exact_window: bool = False, static_cache: bool = False, log_probs: bool = False,
             begin: Sequence[int] = ()) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Continue B prompts, one token per row at a time: yields, max_new_tokens times, (token ids, (B,); their
    log-probabilities, (B,), or None unless log_probs). These are in nats, the model's own, before any control.

    prompts: token ids, (B, T), or B tensors of any length from 1. The controls are those of sample_token() and
    penalize_repetition(). Ids from vocab_size on, which only pad the embedding table, are never sampled. Row k gets the
    random numbers of (seed, first_row + k).

    A model sees block_size tokens at most. When the cache is full, the older half of the text is dropped and the newer
    half is encoded again, at new positions; with a window and relative positions (rope, alibi), old tokens are evicted
    and nothing is encoded again. exact_window: encode the last block_size tokens again for each token, as
    GPT.generate() does. begin: ids that stay at the beginning of a context whose older tokens are dropped.
    static_cache: all steps have the same shapes, for compiled steps; see KVCache.

    Call model.eval() first. Raises ValueError for an empty prompt or a control out of range, UserError for logits that
    are not finite.
    """
    controls = (temperature, top_k, top_p, min_p, repetition_penalty)
    check_controls(*controls)
    if not all(len(ids) for ids in prompts):
        raise ValueError('an empty prompt: expected at least one token id')
    config, device, B = model.config, model.transformer.wte.weight.device, len(prompts)
    block_size = config.block_size
    start = max(len(ids) for ids in prompts)
    end = start + max_new_tokens
    text = torch.zeros(B, end, dtype=torch.long, device=device)                       # padded on the left
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(B, config.vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        text[row, start - len(ids):start] = ids
        if seen is not None:
            seen[row, ids.long()] = True
    uniform = [random_uniform(seed, first_row + row, max_new_tokens) for row in range(B)]
    uniform = torch.stack(uniform, dim=1).to(device)                                  # (max_new_tokens, B)

    step = getattr(model, 'decode_step', None) or functools.partial(decode_step, model)   # compiled, or not
    equal_prompts = all(torch.equal(ids, prompts[0]) for ids in prompts)
    contexts = [min(len(ids), block_size) for ids in prompts]   # how many tokens each row sees
    shortened = block_size if exact_window else max(block_size // 2, 1)   # of a context that has become too long
    evicts = config.pos != 'learned' and config.window is not None and config.window <= block_size
    kv_cache = take_cache(model, B, min(max(contexts) + max_new_tokens, block_size), static_cache)
    try:
        for now in range(start, end):   # the column of the token to sample
            full = kv_cache.length == kv_cache.capacity
            rows, T = B, 1
            idx = text[:, now - 1:now]
            if now == start or exact_window or (full and not evicts):   # encode whole contexts
                contexts = [n if n <= block_size else shortened for n in contexts]
                kv_cache.reset(contexts)
                T = max(contexts)
                if now == start and equal_prompts and not (static_cache and T == 1):
                    rows = 1   # once for all; but a static step of one token has the same shape always
                idx = text[:rows, now - T:now].clone()
                for row in range(rows):
                    first = T - contexts[row]
                    shortened_row = len(begin) < contexts[row] < len(prompts[row]) + now - start
                    if begin and shortened_row:
                        idx[row, first:first + len(begin)] = torch.tensor(begin, device=device)
            elif full:
                kv_cache.evict(config.window - 1)
            logits, token = step(idx.contiguous(), kv_cache, uniform[now - start], vocab_size, *controls, seen)
            kv_cache.advance(T)
            # not after each token, because a GPU would have to finish its work for it
            if device.type == 'cpu' or now % 32 == 0 or now in (start, end - 1):
                if not all_finite(logits):
                    raise UserError('the model gives NaN or infinite logits: its training went wrong')
            log_prob = logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0] if log_probs else None
            text[:, now] = token
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            contexts = [n + 1 for n in contexts]
            yield text[:, now], log_prob   # a CUDA graph overwrites its result in the next step
    finally:
        if static_cache:
            spare_caches[model] = kv_cache


def all_finite(logits: torch.Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite, in a single pass: NaN is both the smallest and the largest."""
    return bool(torch.stack(logits.aminmax()).isfinite().all())
