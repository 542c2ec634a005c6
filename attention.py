"""
What attention is made of: positions, two ways to the same sum, and the memory of what was read.

Letters of the shape comments:
B batch · T time, of the queries · S time, of the keys · H heads · K heads of keys and values · D width of a head
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# positions

def rope(place, D, base, scaling=None):
    """The angles by which rotary positions, (T,), turn pairs of channels (Su et al., 2021): cosines, sines, (T, D / 2)
    each, in float32. Pair i turns by base^(-2i / D) from one position to the next.

    scaling: (factor, low, high, context), as in Llama 3.1 (Grattafiori et al., 2024): pairs that make fewer than low
    turns in a context are slowed down by factor, those that make more than high are not, those between in part.
    """
    speed = base ** (-torch.arange(0, D, 2, device=place.device).float() / D)         # (D / 2,)
    if scaling:
        factor, low, high, context = scaling
        kept = ((context * speed / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / factor)
    angle = place.float()[:, None] * speed                                            # (T, D / 2)
    return angle.cos(), angle.sin()


def rotate(x, angles):
    """Turn queries or keys, (..., T, D), each position by its angles; channel i is paired with channel i + D / 2."""
    cos, sin = (part.to(x.dtype) for part in angles)
    first, second = x.chunk(2, dim=-1)                                                # (..., T, D / 2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def score_bias(query, key, n_head, pos, window, pad=None):
    """What is added to the scores of attention between positions query, (T,), and key, (S,): (H or 1, T, S); None if
    that is only causality, the keys being those up to the last query.

    'alibi' takes off slope times distance, with slopes 2^(-8h / H) for h = 1 ... H (Press et al., 2022); a window
    forbids keys that lie window or more positions back (Child et al., 2019); the future is always forbidden. pad, (B,),
    forbids that many positions at the start of each row, and makes the result (B, H or 1, T, S).
    """
    T, S = len(query), len(key)
    if pos != 'alibi' and (window is None or window >= S) and pad is None and T in (1, S):
        return None
    distance = query[:, None] - key                                                   # (T, S)
    forbidden = (distance < 0) | (distance >= (window or math.inf))
    if pad is not None:   # but for itself, since a row of weights must have a sum
        forbidden = forbidden | (key < pad[:, None, None, None]) & (distance != 0)    # (B, 1, T, S)
    slope = 2 ** (-8 / n_head * torch.arange(1, n_head + 1, device=key.device)) if pos == 'alibi' else key.new_zeros(1)
    return (-slope[:, None, None].float() * distance).masked_fill(forbidden, -math.inf)


POS = ('learned', 'rope', 'alibi')


# ---------------------------------------------------------------------------------------------------------------------
# dropout

def drop(x, p):
    """x with a share p of its elements zeroed, and the rest scaled up to the same mean (Srivastava et al., 2014).

    On a CPU, torch draws these random numbers one by one, which takes longer than all matrix products of a small model;
    here they are 16 bits each of a generator (SFC64) that torch's seeds.
    """
    if p == 0 or x.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.dropout(x, p)
    source = np.random.SFC64(torch.randint(2**62, ()).item())
    bits = torch.from_numpy(source.random_raw(-(-x.numel() // 4)).view(np.int16)[:x.numel()])
    kept = bits.view(x.shape) >= round(p * 2**16) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - p))


# ---------------------------------------------------------------------------------------------------------------------
# attention: two ways to the same result, and the choice between them

def attend_math(q, k, v, dropout, bias=None):
    """softmax(q kᵀ / √D) v, each position looking at itself and what came before (Vaswani et al., 2017, eq. 1).

    q and the result: (B, H, T, D); k, v: (B, H, S, D), where without a bias S = T, or T = 1 and the query is the last.
    dropout: probability of dropping a weight. bias: that of score_bias(). Written out, this is the reference for every
    other way.
    """
    T, D = q.shape[-2:]
    q = q / math.sqrt(D)
    if T > 1:
        scores = q @ k.mT                                                             # (B, H, T, S), query by key
    else:   # the same in an order that copies nothing when k is a part of something longer
        scores = (k @ q.mT).mT                                                        # (B, H, 1, S)
    if bias is None and T > 1:
        bias = torch.full((T, T), -math.inf, device=q.device).triu(diagonal=1)        # no key after the query
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    weights = scores.softmax(dim=-1, dtype=scores.dtype)                              # each row sums to one
    return drop(weights, dropout) @ v                                                 # (B, H, T, D)


def attend_sdpa(q, k, v, dropout, bias=None):
    """The same by torch's fused kernels, which never hold the (T, T) weights (Dao et al., 2022)."""
    bias = bias if bias is None else bias.to(q.dtype)
    causal = bias is None and q.size(-2) > 1
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, is_causal=causal)


def attend_auto(q, k, v, dropout, bias=None):
    """The faster of the two. On a CPU the fused kernel knows no dropout, and its backward pass in bfloat16 takes twice
    the time of plain matrix products, whose memory is small while T is. For one query, plain products are faster there,
    and on a GPU cuDNN would make a new plan for each number of keys."""
    T = q.size(-2)
    plain = T == 1 or q.device.type == 'cpu' and (dropout > 0 or T <= 512 and q.dtype != torch.float32)
    return attend_math(q, k, v, dropout, bias) if plain else attend_sdpa(q, k, v, dropout, bias)


ATTEND = {'auto': attend_auto, 'sdpa': attend_sdpa, 'math': attend_math}


# ---------------------------------------------------------------------------------------------------------------------
# memory

def static_columns(tokens, block_size):
    """Columns of a static cache for so many tokens: a power of two from 128 on, but at most block_size. So texts of
    many lengths share few shapes, each of which is compiled once."""
    return min(max(128, 1 << (tokens - 1).bit_length()), block_size)


class Cache:
    """Keys and values of the tokens that a model has read, so that it reads each only once: (B, K, columns, D) per
    layer, in the type of the activations. Rows shorter than others have padding on their left. With static, every
    step has the same shapes, as CUDA graphs want it: attention looks at all columns and is told which are empty."""

    def __init__(self, config, rows, columns, device, static=False):
        self.rows, self.static, self.columns = rows, static, torch.arange(columns, device=device)
        self.keys, self.values = [None] * config.n_layer, [None] * config.n_layer
        self.at = self.gone = 0                                # how many columns are filled; were forgotten
        self.now = torch.zeros(1, dtype=torch.long, device=device)   # at, for a step of static shapes
        self.pad, self.ragged = torch.zeros(rows, dtype=torch.long, device=device), False   # columns of padding, (B,)

    @property
    def full(self):
        return self.at == len(self.columns)

    def clear(self):
        """Zero all keys and values, so that nothing is left of an earlier text, be it NaN."""
        for tensor in (*self.keys, *self.values):
            if tensor is not None:
                tensor.zero_()

    def begin(self, lengths):
        """Forget everything, to read rows of these lengths."""
        self.at, self.gone, self.ragged = 0, 0, len(set(lengths)) > 1
        self.now.zero_()
        self.pad.copy_(torch.tensor([max(lengths) - n for n in lengths]))

    def advance(self, n):
        """So many columns more are filled now."""
        self.at += n
        self.now.fill_(self.at)

    def forget(self, n):
        """Forget all but the last n columns, whose positions stay what they were."""
        dropped = self.at - n
        for tensor in (*self.keys, *self.values):
            tensor[:, :, :n] = tensor[:, :, dropped:self.at].clone()
        self.at, self.gone = n, self.gone + dropped
        self.now.fill_(n)
        self.pad.sub_(dropped).clamp_(min=0)

    def place(self, T):
        """Of the next T tokens: their columns, (T,), those that they may look at, (S,), and the padding, if any."""
        if self.static and T == 1:
            return self.now, self.columns, self.pad
        new = self.at + T
        return self.columns[self.at:new], self.columns[:new], self.pad if self.ragged else None

    def keep(self, layer):
        """A function that adds the keys and values of new tokens, (1 or B, K, T, D), to a layer's and returns those of
        all columns that they may look at."""
        def add(k, v):
            if self.keys[layer] is None or self.keys[layer].dtype != k.dtype:
                shape = self.rows, k.size(1), len(self.columns), k.size(3)
                self.keys[layer], self.values[layer] = k.new_zeros(shape), k.new_zeros(shape)
                if self.static:   # or else CUDA graphs would copy them
                    torch._dynamo.mark_static_address(self.keys[layer])
                    torch._dynamo.mark_static_address(self.values[layer])
            keys, values = self.keys[layer], self.values[layer]
            if self.static and k.size(2) == 1:
                return keys.index_copy_(2, self.now, k), values.index_copy_(2, self.now, v)
            new = self.at + k.size(2)
            keys[:, :, self.at:new], values[:, :, self.at:new] = k, v
            return (k, v) if self.at == 0 else (keys[:, :, :new], values[:, :, :new])
        return add
