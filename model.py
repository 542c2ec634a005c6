"""
The GPT: configuration, modules, forward pass, initialisation, arithmetic (parameters, FLOPs) and generation.

The architecture is GPT-2's (Radford et al., 2019): pre-norm blocks of causal self-attention and a GELU MLP, learned
positions, and one matrix that both embeds tokens and scores the next one. Modules and parameters carry GPT-2's names.
What has come since is a switch of GPTConfig; ARCHS names sets of switches that belong together.

Letters of the shape comments:
B batch · T time · C width, n_embd · H heads, n_head · K heads of keys and values, n_kv_head · D width of a head, C / H
V vocabulary · L layers
"""

import math
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
    pos: str = 'learned'        # 'learned' (a table), 'rope' (turns queries and keys), 'alibi' (favours what is near)
    norm: str = 'layernorm'     # 'layernorm', 'rmsnorm' (does not centre)
    mlp: str = 'gelu'           # 'gelu', 'relu2' (ReLU squared), 'swiglu' (gated, 2/3 as wide)
    qk_norm: bool = False       # norm queries and keys, which lets the learning rate be higher
    n_kv_head: int | None = None        # heads of keys and values, each shared by several of queries; None: n_head
    window: int | None = None   # how many tokens back attention reaches, itself included; None: all
    tie_weights: bool = True    # one matrix for embedding and head
    softcap: float | None = None        # logits stay within ± this, by tanh
    layer_scale: float | None = None    # initial gain, per channel, of what a block adds; None: no gains
    zero_init: bool = False     # what a block adds, and an untied head, begin at zero
    loss_chunks: int = 1        # logits and loss in so many pieces, none of which is kept

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'window', 'loss_chunks'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: expected 1 or more')
        for name in ('softcap', 'layer_scale'):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f'{name}={getattr(self, name)}: expected a finite number above 0')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} does not divide among n_head={self.n_head} heads: '
                             f'make it a multiple of n_head, such as {-(-self.n_embd // self.n_head) * self.n_head}')
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} heads cannot share n_kv_head={self.n_kv_head} evenly: '
                             f'make n_kv_head a divisor of n_head')
        if self.pos == 'rope' and self.n_embd // self.n_head % 2:
            raise ValueError(f"pos='rope' turns pairs of channels: n_embd / n_head = {self.n_embd // self.n_head} "
                             f"must be even")
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: expected a probability below 1, such as 0.1')
        for name, known in (('attention', ATTEND), ('gelu', GELU), ('pos', POS), ('norm', NORM), ('mlp', MLPS)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r}: expected one of {", ".join(map(repr, known))}')

    def to_dict(self):
        """What a checkpoint keeps: nanoGPT's fields, so that nanoGPT reads it too, and any newer one that is not at its
        default. How attention and loss are computed belongs to the machine, not to the model."""
        default = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if k in NANOGPT_FIELDS
                or k not in ('attention', 'loss_chunks') and v != default[k]}


# Switches that belong together: GPT-2's (Radford et al., 2019), Llama 2's (Touvron et al., 2023), Qwen3's (Yang et al.,
# 2025), and those with which public speed runs reach a loss soonest (github.com/KellerJordan/modded-nanogpt)
GPT2 = {'pos': 'learned', 'norm': 'layernorm', 'mlp': 'gelu', 'qk_norm': False, 'tie_weights': True, 'softcap': None,
        'zero_init': False}
LLAMA = {**GPT2, 'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'tie_weights': False}
ARCHS = {'gpt2': GPT2, 'llama': LLAMA, 'qwen3': {**LLAMA, 'qk_norm': True, 'tie_weights': True},
         'speedrun': {**GPT2, 'pos': 'rope', 'mlp': 'relu2', 'qk_norm': True, 'tie_weights': False, 'softcap': 15.0,
                      'zero_init': True}}


def switches(arch, **changes):
    """The fields of GPTConfig that an architecture sets, and those of changes that are not None. Raises ValueError."""
    if arch not in ARCHS:
        raise ValueError(f'arch={arch!r}: expected one of {", ".join(map(repr, ARCHS))}')
    return {**ARCHS[arch], **{name: value for name, value in changes.items() if value is not None}}


# ---------------------------------------------------------------------------------------------------------------------
# positions

def rope(T, D, device, base=10_000):
    """The angles by which rotary positions turn pairs of channels (Su et al., 2021): cosines, sines, (T, D / 2) each,
    in float32. Pair i turns by base^(-2i / D) from one position to the next."""
    speed = base ** (-torch.arange(0, D, 2, device=device).float() / D)               # (D / 2,)
    angle = torch.arange(T, device=device).float()[:, None] * speed                   # (T, D / 2)
    return angle.cos(), angle.sin()


def rotate(x, angles):
    """Turn queries or keys, (..., T, D), each position by its angles; channel i is paired with channel i + D / 2."""
    cos, sin = (part.to(x.dtype) for part in angles)
    first, second = x.chunk(2, dim=-1)                                                # (..., T, D / 2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def score_bias(T, n_head, pos, window, device):
    """What is added to the scores of attention, query by key: (H or 1, T, T); None if that is only causality.

    'alibi' takes off slope times distance, with slopes 2^(-8h / H) for h = 1 ... H (Press et al., 2022); a window
    forbids keys that lie window or more positions back (Child et al., 2019); the future is always forbidden.
    """
    if pos != 'alibi' and (window is None or window >= T):
        return None
    place = torch.arange(T, device=device)
    distance = place[:, None] - place                                                 # (T, T)
    slope = 2 ** (-8 / n_head * torch.arange(1, n_head + 1, device=device)) if pos == 'alibi' else place.new_zeros(1)
    forbidden = (distance < 0) | (distance >= (window or T))
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


class Dropout(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return drop(x, self.p) if self.training else x


# ---------------------------------------------------------------------------------------------------------------------
# attention: three ways to the same result

def attend_math(q, k, v, dropout, bias=None):
    """softmax(q kᵀ / √D) v, each position looking at itself and what came before (Vaswani et al., 2017, eq. 1).

    q, k, v and the result: (B, H, T, D). dropout: probability of dropping a weight. bias: that of score_bias(). Written
    out, this is the reference for every other way.
    """
    T, D = q.shape[-2:]
    if bias is None:
        bias = torch.full((T, T), -math.inf, device=q.device).triu(diagonal=1)        # no key after the query
    scores = (q / math.sqrt(D)) @ k.transpose(-2, -1) + bias.to(q.dtype)              # (B, H, T, T), query by key
    weights = scores.softmax(dim=-1, dtype=scores.dtype)                              # each row sums to one
    return drop(weights, dropout) @ v                                                 # (B, H, T, D)


def attend_sdpa(q, k, v, dropout, bias=None):
    """The same by torch's fused kernels, which never hold the (T, T) weights (Dao et al., 2022)."""
    bias = bias if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, is_causal=bias is None)


def attend_auto(q, k, v, dropout, bias=None):
    """The faster of the two: on a CPU the fused kernel knows no dropout, and its backward pass in bfloat16 takes twice
    the time of plain matrix products, whose memory is no concern while T is short."""
    plain = q.device.type == 'cpu' and (dropout > 0 or q.size(-2) <= 512 and q.dtype != torch.float32)
    return attend_math(q, k, v, dropout, bias) if plain else attend_sdpa(q, k, v, dropout, bias)


ATTEND = {'auto': attend_auto, 'sdpa': attend_sdpa, 'math': attend_math}


class RMSNorm(nn.RMSNorm):
    """x over its root mean square, times a weight (Zhang & Sennrich, 2019). torch's, which is slow and warns when x is
    in bfloat16 and the weight is not."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C, H, K = config.n_embd, config.n_head, config.n_kv_head or config.n_head
        self.heads, self.dropout, self.attend = (H, K, K), config.dropout, ATTEND[config.attention]
        self.c_attn = nn.Linear(C, (H + K + K) * C // H, bias=config.bias)            # queries, keys, values in one
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        norm = NORM[config.norm] if config.qk_norm else nn.Identity                   # Dehghani et al., 2023
        self.q_norm, self.k_norm = norm(C // H, False), norm(C // H, False)

    def forward(self, x, angles=None, bias=None):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, sum(self.heads), -1).transpose(1, 2)        # (B, H + K + K, T, D)
        q, k, v = heads.split(self.heads, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(torch.cat((q, k), dim=1), angles).split(self.heads[:2], dim=1)
        if k.size(1) < q.size(1):   # groups of queries share keys and values (Ainslie et al., 2023)
            k, v = (part.repeat_interleave(q.size(1) // k.size(1), dim=1) for part in (k, v))
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, bias)        # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))                        # heads side by side again


# ---------------------------------------------------------------------------------------------------------------------
# the rest of the model

GELU = {'tanh': 'tanh', 'erf': 'none'}   # our name -> torch's
NORM = {'layernorm': lambda width, bias: nn.LayerNorm(width, bias=bias),
        'rmsnorm': lambda width, bias: RMSNorm(width, eps=1e-6)}


class ReLU2(nn.Module):
    """The square of what is above zero (So et al., 2021)."""

    def forward(self, x):
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """One half of the channels, times the SiLU of the other (Shazeer, 2020)."""

    def forward(self, x):
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


MLPS = {'gelu': lambda config: nn.GELU(approximate=GELU[config.gelu]),
        'relu2': lambda config: ReLU2(),
        'swiglu': lambda config: SwiGLU()}


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C, gated = config.n_embd, config.mlp == 'swiglu'
        width = -(-8 * C // (3 * 64)) * 64 if gated else 4 * C   # a gate is a third matrix: 2/3 as wide, times 64
        self.c_fc = nn.Linear(C, width * (1 + gated), bias=config.bias)
        self.act = MLPS[config.mlp](config)
        self.c_proj = nn.Linear(width, C, bias=config.bias)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class LayerScale(nn.Module):
    """A learned gain per channel (Touvron et al., 2021)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.full((config.n_embd,), config.layer_scale))

    def forward(self, x):
        return x * self.weight


class Block(nn.Module):
    """Attention moves information between positions, the MLP works on each; both add to the residual stream x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        norm = lambda: NORM[config.norm](config.n_embd, config.bias)
        scale = LayerScale if config.layer_scale else nn.Identity
        self.ln_1, self.attn, self.scale_1 = norm(), CausalSelfAttention(config), scale(config)
        self.ln_2, self.mlp, self.scale_2 = norm(), MLP(config), scale(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x, angles=None, bias=None):
        x = x + self.drop(self.scale_1(self.attn(self.ln_1(x), angles, bias)))
        x = x + self.drop(self.scale_2(self.mlp(self.ln_2(x))))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(config.vocab_size, config.n_embd),
            **({'wpe': nn.Embedding(config.block_size, config.n_embd)} if config.pos == 'learned' else {}),
            'drop': Dropout(config.dropout),
            'h': nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            'ln_f': NORM[config.norm](config.n_embd, config.bias),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight   # one matrix both ways (Press & Wolf, 2017)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation, by name, so that a parameter nobody thought of is an error and not a surprise."""
        for name, p in self.named_parameters():
            if self.config.zero_init and name.endswith(('c_proj.weight', 'lm_head.weight')):
                p.zero_()
            elif name.endswith('c_proj.weight'):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))   # 2L of these add up in the residual stream
            elif name.endswith(('wte.weight', 'wpe.weight', 'c_attn.weight', 'c_fc.weight', 'lm_head.weight')):
                p.normal_(std=0.02)
            elif name.endswith(('ln_1.weight', 'ln_2.weight', 'ln_f.weight', 'q_norm.weight', 'k_norm.weight')):
                p.fill_(1.0)
            elif name.endswith(('scale_1.weight', 'scale_2.weight')):
                p.fill_(self.config.layer_scale)
            elif name.endswith('.bias'):
                p.zero_()
            else:
                raise NotImplementedError(f'no initialisation for {name}')

    def hidden(self, idx):
        """The residual stream after the last norm, (B, T, C), of token ids idx, (B, T)."""
        c, T = self.config, idx.size(1)
        assert T <= c.block_size, f'{T} tokens in a context of {c.block_size}'
        x = self.transformer.wte(idx)                                                 # (B, T, C)
        if c.pos == 'learned':
            x = x + self.transformer.wpe.weight[:T]                                   # + (T, C)
        x = self.transformer.drop(x)
        angles = rope(T, c.n_embd // c.n_head, idx.device) if c.pos == 'rope' else None
        bias = score_bias(T, c.n_head, c.pos, c.window, idx.device)
        for block in self.transformer.h:
            x = block(x, angles, bias)
        return self.transformer.ln_f(x)

    def score(self, x):
        """Logits of the next token, (..., V), of hidden states x, (..., C)."""
        logits, cap = self.lm_head(x), self.config.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)              # Gemma 2, 2024

    def forward(self, idx, targets=None):
        """Logits and loss of token ids idx, (B, T).

        With targets, (B, T), the ids one step ahead: all logits, (B, T, V), and the mean cross-entropy in nats over the
        targets that are not -1. With loss_chunks, only the loss. Without targets: the last position's logits,
        (B, 1, V), and None.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.score(x[:, -1:]), None
        x, targets, n = x.flatten(0, 1), targets.flatten(), self.config.loss_chunks
        if n == 1:
            logits = self.score(x)
            loss = F.cross_entropy(logits.float(), targets, ignore_index=-1)
            return logits.view(*idx.shape, -1), loss
        total = sum(checkpoint(self.surprise, *part, use_reentrant=False)   # computed again in the backward pass
                    for part in zip(x.chunk(n), targets.chunk(n)))
        return None, total / (targets != -1).sum()

    def surprise(self, x, targets):
        """The sum of the cross-entropies of hidden states x, (N, C), with targets, (N,)."""
        return F.cross_entropy(self.score(x).float(), targets, ignore_index=-1, reduction='sum')

    def crop_block_size(self, block_size):
        """Shorten the context to block_size tokens by dropping the positions beyond, to finetune in less memory."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size={block_size}: this model has {self.config.block_size} positions, '
                             f'which can be cut but not grown')
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            wpe = self.transformer.wpe
            wpe.weight, wpe.num_embeddings = nn.Parameter(wpe.weight.detach()[:block_size].clone()), block_size

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without those that are only looked up: the position table, and the token
        table unless it is also the head."""
        total = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos == 'learned':
            total -= self.transformer.wpe.weight.numel()
        if non_embedding and not self.config.tie_weights:
            total -= self.transformer.wte.weight.numel()
        return total

    def flops_per_token(self):
        """FLOPs per token of a training step, forward and backward: 6 N + 12 L C T (Chowdhery et al., 2022, app. B).

        N is get_num_params(), T the context or, if it is shorter, the window. A multiply-add counts two, the backward
        pass twice the forward, recomputation nothing, and attention as if it were not causal: the convention of most
        published MFU figures, nanoGPT's among them.
        """
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * min(c.window or c.block_size, c.block_size)

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
