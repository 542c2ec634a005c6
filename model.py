"""
The GPT: configuration, modules, forward pass, initialisation, arithmetic (parameters, FLOPs) and generation.

The architecture is GPT-2's (Radford et al., 2019): pre-norm blocks of causal self-attention and a GELU MLP, learned
positions, and one matrix that both embeds tokens and scores the next one. Modules and parameters carry GPT-2's names.

Letters of the shape comments:
B batch · T time · C width, n_embd · H heads, n_head · D width of a head, C / H · V vocabulary · L layers
"""

import math
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

NANOGPT_FIELDS = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')


@dataclass
class GPTConfig:
    """All that defines a model. A value that cannot be raises ValueError: what was given, what is expected."""
    vocab_size: int = 50304     # GPT-2's 50,257 ids, padded to a multiple of 64, which matrix kernels like
    block_size: int = 1024      # longest context, in tokens
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    bias: bool = True           # in Linear and LayerNorm, as in GPT-2; a model without is a little faster and no worse
    dropout: float = 0.0        # of embeddings, attention weights, and what a block adds
    gelu: str = 'tanh'          # the approximation that GPT-2 was trained with, or 'erf', the exact one (nanoGPT)
    attention: str = 'auto'     # 'sdpa' (torch's fused kernels), 'math' (written out) or 'auto' (the faster one here)

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: expected 1 or more')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} does not divide among n_head={self.n_head} heads: '
                             f'make it a multiple of n_head, such as {-(-self.n_embd // self.n_head) * self.n_head}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: expected a probability below 1, such as 0.1')
        for name, known in (('attention', ATTEND), ('gelu', GELU)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r}: expected one of {", ".join(map(repr, known))}')

    def to_dict(self):
        """What a checkpoint keeps: nanoGPT's fields, so that nanoGPT reads it too, and any newer one that is not at its
        default. How attention is computed belongs to the machine, not to the model."""
        default = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if k in NANOGPT_FIELDS or k != 'attention' and v != default[k]}


# ---------------------------------------------------------------------------------------------------------------------
# attention: three ways to the same result

def attend_math(q, k, v, dropout):
    """softmax(q kᵀ / √D) v, each position looking at itself and what came before (Vaswani et al., 2017, eq. 1).

    q, k, v and the result: (B, H, T, D). dropout: probability of dropping a weight. Written out, this is the reference
    for every other way.
    """
    T, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)                                   # (B, H, T, T), query by key
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(diagonal=1)     # key comes after query
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)                   # each row sums to one
    return F.dropout(weights, dropout) @ v                                            # (B, H, T, D)


def attend_sdpa(q, k, v, dropout):
    """The same by torch's fused kernels, which never hold the (T, T) weights (Dao et al., 2022)."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def attend_auto(q, k, v, dropout):
    """The faster of the two: on a CPU the fused kernel knows no dropout, and its backward pass in bfloat16 is slower
    than plain matrix products while T is short."""
    plain = q.device.type == 'cpu' and (dropout > 0 or q.size(-2) <= 128 and q.dtype != torch.float32)
    return attend_math(q, k, v, dropout) if plain else attend_sdpa(q, k, v, dropout)


ATTEND = {'auto': attend_auto, 'sdpa': attend_sdpa, 'math': attend_math}


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout, self.attend = config.n_head, config.dropout, ATTEND[config.attention]
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)   # queries, keys, values in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)   # 3 of (B, H, T, D)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0)              # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))                        # heads side by side again


# ---------------------------------------------------------------------------------------------------------------------
# the rest of the model

GELU = {'tanh': 'tanh', 'erf': 'none'}   # our name -> torch's


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=GELU[config.gelu])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention moves information between positions, the MLP works on each; both add to the residual stream x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.ln_1(x)))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            'wpe': nn.Embedding(config.block_size, config.n_embd),
            'drop': nn.Dropout(config.dropout),
            'h': nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            'ln_f': nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight   # one matrix both ways (Press & Wolf, 2017)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation, by name, so that a parameter nobody thought of is an error and not a surprise."""
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))   # 2L of these add up in the residual stream
            elif name.endswith(('wte.weight', 'wpe.weight', 'c_attn.weight', 'c_fc.weight')):
                p.normal_(std=0.02)
            elif name.endswith(('ln_1.weight', 'ln_2.weight', 'ln_f.weight')):
                p.fill_(1.0)
            elif name.endswith('.bias'):
                p.zero_()
            else:
                raise NotImplementedError(f'no initialisation for {name}')

    def hidden(self, idx):
        """The residual stream after the last norm, (B, T, C), of token ids idx, (B, T)."""
        T = idx.size(1)
        assert T <= self.config.block_size, f'{T} tokens in a context of {self.config.block_size}'
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:T]    # (B, T, C) + (T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Logits and loss of token ids idx, (B, T).

        With targets, (B, T), the ids one step ahead: all logits, (B, T, V), and the mean cross-entropy in nats over the
        targets that are not -1. Without: the last position's logits, (B, 1, V), and None.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    def crop_block_size(self, block_size):
        """Shorten the context to block_size tokens by dropping the positions beyond, to finetune in less memory."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size={block_size}: this model has {self.config.block_size} positions, '
                             f'which can be cut but not grown')
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())
        self.config.block_size = wpe.num_embeddings = block_size

    def get_num_params(self, non_embedding=True):
        """Number of parameters; without the position table by default. The token table counts: it is also the head."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def flops_per_token(self):
        """FLOPs per token of a training step, forward and backward: 6 N + 12 L C T (Chowdhery et al., 2022, app. B).

        N is get_num_params(). A multiply-add counts two, the backward pass twice the forward, recomputation nothing,
        and attention as if it were not causal: the convention of most published MFU figures, nanoGPT's among them.
        """
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=0, vocab_size=None):
        """Continue token ids idx, (B, T), one token per row at a time: yields max_new_tokens tensors of shape (B,).

        temperature divides the logits, 0 takes the likeliest token; top_k keeps the k likeliest; ids from vocab_size on
        (the padding of the table) are never drawn. Row k draws from a stream of its own, a function of (seed, k).
        Put the model in eval mode first. Raises ValueError when the logits are not finite.
        """
        chance = torch.stack([uniform(seed, row, max_new_tokens) for row in range(len(idx))]).to(idx.device)
        for i in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])                        # (B, 1, V)
            logits = logits[:, -1, :vocab_size].float()                               # (B, V)
            if not logits.isfinite().all():
                raise ValueError('the model gives NaN or infinite logits: its training went wrong')
            token = draw(logits, chance[:, i], temperature, top_k)                    # (B,)
            yield token
            idx = torch.cat((idx, token[:, None]), dim=1)


def uniform(seed, row, n):
    """n numbers in (0, 1] as a pure function of (seed, row), by a counter-based generator (Salmon et al., 2011)."""
    key = np.array([seed % 2**64, row], dtype=np.uint64)
    bits = np.random.Philox(key=key).random_raw(n) >> 40                              # 24 bits, exact in float32
    return torch.from_numpy((bits.astype(np.float32) + 1) / 2**24)


def draw(logits, chance, temperature=1.0, top_k=None):
    """One token id per row, (B,), from logits, (B, V), and chance, (B,), uniform in (0, 1]: the first id at which the
    cumulated probability reaches chance, so that one random number decides one token."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-9)    # no overflow near 0
    if top_k is not None and top_k < logits.size(-1):
        best = logits.topk(top_k)                                                     # exactly k, also among equals
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    total = logits.softmax(dim=-1).cumsum(dim=-1)                                     # (B, V), rising to about one
    return (total < chance[:, None] * total[:, -1:]).sum(dim=-1)
