"""
The GPT: configuration, modules, forward pass, initialisation, arithmetic (parameters, FLOPs) and generation.

The architecture is GPT-2's (Radford et al., 2019): pre-norm blocks of causal self-attention and a GELU MLP, learned
positions, and one matrix that both embeds tokens and scores the next one. Modules and parameters carry GPT-2's names.
What has come since is a switch of GPTConfig; ARCHS names sets of switches that belong together.

Letters of the shape comments:
B batch · T time · C width, n_embd · H heads, n_head · K heads of keys and values, n_kv_head · D width of a head
V vocabulary · L layers
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attention import ATTEND, POS, Cache, drop, rope, rotate, score_bias, static_columns
from sampling import check, draw, penalise, uniform

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
    head_dim: int | None = None         # width of a head, None: n_embd / n_head
    n_inner: int | None = None          # width inside the MLP, None: 4 n_embd; of 'swiglu' 2/3 of it, times 64
    norm_eps: float | None = None       # keeps norms from dividing by zero; None: 1e-5, of 'rmsnorm' 1e-6
    rope_base: float = 10_000.0         # how slowly the slowest channels turn
    rope_scaling: tuple | None = None   # stretch them for a longer context: (factor, low, high, context before)
    window: int | None = None   # how many tokens back attention reaches, itself included; None: all
    tie_weights: bool = True    # one matrix for embedding and head
    softcap: float | None = None        # logits stay within ± this, by tanh
    layer_scale: float | None = None    # initial gain, per channel, of what a block adds; None: no gains
    zero_init: bool = False     # what a block adds, and an untied head, begin at zero
    loss_chunks: int = 1        # logits and loss in so many pieces, none of which is kept

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'head_dim', 'n_inner',
                     'window', 'loss_chunks'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: expected 1 or more')
        for name in ('softcap', 'layer_scale', 'norm_eps', 'rope_base'):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f'{name}={getattr(self, name)}: expected a finite number above 0')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} does not divide among n_head={self.n_head} heads: '
                             f'make it a multiple of n_head, such as {-(-self.n_embd // self.n_head) * self.n_head}')
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} heads cannot share n_kv_head={self.n_kv_head} evenly: '
                             f'make n_kv_head a divisor of n_head')
        if self.pos == 'rope' and self.head_width % 2:
            raise ValueError(f"pos='rope' turns pairs of channels: n_embd / n_head = {self.head_width} must be even")
        if self.rope_scaling is not None:
            self.rope_scaling = tuple(self.rope_scaling)
            if len(self.rope_scaling) != 4 or not all(0 < x < math.inf for x in self.rope_scaling):
                raise ValueError(f'rope_scaling={self.rope_scaling}: expected (factor, low, high, context before)')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: expected a probability below 1, such as 0.1')
        for name, known in (('attention', ATTEND), ('gelu', GELU), ('pos', POS), ('norm', NORM), ('mlp', MLPS)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r}: expected one of {", ".join(map(repr, known))}')

    @property
    def head_width(self):
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner_width(self):
        gated = -(-8 * self.n_embd // (3 * 64)) * 64   # a gate is a third matrix: 2/3 as wide, times 64
        return self.n_inner or (gated if self.mlp == 'swiglu' else 4 * self.n_embd)

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
# the parts of a block

class Dropout(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return drop(x, self.p) if self.training else x


class RMSNorm(nn.RMSNorm):
    """x over its root mean square, times a weight (Zhang & Sennrich, 2019). torch's, which is slow and warns when x is
    in bfloat16 and the weight is not."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C, D, H, K = config.n_embd, config.head_width, config.n_head, config.n_kv_head or config.n_head
        self.heads, self.dropout, self.attend = (H, K, K), config.dropout, ATTEND[config.attention]
        self.c_attn = nn.Linear(C, (H + K + K) * D, bias=config.bias)                 # queries, keys, values in one
        self.c_proj = nn.Linear(H * D, C, bias=config.bias)
        norm = NORM[config.norm] if config.qk_norm else nn.Identity                   # Dehghani et al., 2023
        self.q_norm, self.k_norm = norm(D, False, config.norm_eps), norm(D, False, config.norm_eps)

    def forward(self, x, angles=None, bias=None, keep=None):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, sum(self.heads), -1).transpose(1, 2)        # (B, H + K + K, T, D)
        q, k, v = heads.split(self.heads, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(torch.cat((q, k), dim=1), angles).split(self.heads[:2], dim=1)
        if keep is not None:
            k, v = keep(k, v)                                                         # (B, K, S, D)
        if k.size(1) < q.size(1):   # groups of queries share keys and values (Ainslie et al., 2023)
            k, v = (part.repeat_interleave(q.size(1) // k.size(1), dim=1) for part in (k, v))
        y = self.attend(q, k, v, self.dropout if self.training else 0.0, bias)        # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))                       # heads side by side again


# ---------------------------------------------------------------------------------------------------------------------
# the rest of the model

GELU = {'tanh': 'tanh', 'erf': 'none'}   # our name -> torch's
NORM = {'layernorm': lambda width, bias, eps: nn.LayerNorm(width, eps or 1e-5, bias=bias),
        'rmsnorm': lambda width, bias, eps: RMSNorm(width, eps or 1e-6)}


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
        C, width, gated = config.n_embd, config.inner_width, config.mlp == 'swiglu'
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
        norm = lambda: NORM[config.norm](config.n_embd, config.bias, config.norm_eps)
        scale = LayerScale if config.layer_scale else nn.Identity
        self.ln_1, self.attn, self.scale_1 = norm(), CausalSelfAttention(config), scale(config)
        self.ln_2, self.mlp, self.scale_2 = norm(), MLP(config), scale(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x, angles=None, bias=None, keep=None):
        x = x + self.drop(self.scale_1(self.attn(self.ln_1(x), angles, bias, keep)))
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
            'ln_f': NORM[config.norm](config.n_embd, config.bias, config.norm_eps),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight   # one matrix both ways (Press & Wolf, 2017)
        self.spare_cache = None   # a static cache between two calls of generate()
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

    def hidden(self, idx, cache=None):
        """The residual stream after the last norm, (B, T, C), of token ids idx, (B, T); with a cache, of ids that come
        after those in it."""
        c, T = self.config, idx.size(1)
        assert T <= c.block_size, f'{T} tokens in a context of {c.block_size}'
        if cache:
            query, key, pad = cache.place(T)                                          # (T,), (S,), (B,) or None
        else:
            query = key = torch.arange(T, device=idx.device)
            pad = None
        x = self.transformer.wte(idx)                                                 # (B, T, C)
        if c.pos == 'learned':
            place = slice(T) if not cache else query if pad is None else (query - pad[:, None]).clamp(min=0)
            x = x + self.transformer.wpe.weight[place]                                # + (T, C) or (B, T, C)
        x = self.transformer.drop(x)
        angles = None
        if c.pos == 'rope':
            angles = rope(query + cache.gone if cache else query, c.head_width, c.rope_base, c.rope_scaling)
        bias = score_bias(query, key, c.n_head, c.pos, c.window, pad)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, angles, bias, cache and cache.keep(layer))
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
        return self.loss(x, targets)

    def loss(self, x, targets):
        """What forward() returns with targets, from hidden states x, (B, T, C)."""
        n, shape = self.config.loss_chunks, targets.shape
        x, targets = x.flatten(0, 1), targets.flatten()                               # (B · T, C), (B · T,)
        count = (targets != -1).sum().clamp(min=1)
        if n == 1:
            logits = self.score(x)
            total = F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction='sum')
            return logits.view(*shape, -1), total / count
        total = sum(checkpoint(self.surprise, *part, use_reentrant=False)   # computed again in the backward pass
                    for part in zip(x.chunk(n), targets.chunk(n)))
        return None, total / count

    def surprise(self, x, targets):
        """The sum of the cross-entropies of hidden states x, (N, C), with targets, (N,)."""
        return F.cross_entropy(self.score(x).float(), targets, ignore_index=-1, reduction='sum')

    def crop_block_size(self, block_size):
        """Shorten the context to block_size tokens by dropping the positions beyond, to finetune in less memory."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size={block_size}: this model has {self.config.block_size} positions, '
                             f'which can be cut but not grown')
        if block_size == self.config.block_size:
            return
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
        """FLOPs per token of a training step, forward and backward: 6 N + 12 L H D T (Chowdhery et al., 2022, app. B).

        N is get_num_params(), T the context or, if it is shorter, the window. A multiply-add counts two, the backward
        pass twice the forward, recomputation nothing, and attention as if it were not causal: the convention of most
        published MFU figures, nanoGPT's among them.
        """
        c = self.config
        context = min(c.window or c.block_size, c.block_size)
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_head * c.head_width * context

    def activation_bytes(self, rows, itemsize=2, checkpointing=False):
        """Bytes that the forward pass of a training step keeps for the backward pass, of rows of block_size tokens.

        The residual stream is in float32, what goes through matrix products in itemsize: 2 is autocast to bfloat16,
        whose copies of the weights are kept too. With checkpointing (runtime.recompute), blocks keep what enters them,
        and one at a time has all of its own again. For GPT-2's blocks without dropout, and fused attention, which keeps
        no scores; cf. Korthikanti et al., 2022, sec. 4. Raises ValueError for others.
        """
        c = self.config
        extras = (c.n_kv_head, c.head_dim, c.n_inner, c.window, c.softcap, c.layer_scale, c.qk_norm, c.loss_chunks > 1,
                  c.dropout)
        if any(extras) or (c.pos, c.norm, c.mlp) != ('learned', 'layernorm', 'gelu'):
            raise ValueError('activations are counted for the blocks of GPT-2 only, without dropout and loss_chunks')
        C, H, V = c.n_embd, c.n_head, c.vocab_size
        statistics = 4 * 2                                                  # of a norm: mean, deviation
        inside = 2 * (4 * C + statistics) + 14 * C * itemsize + 4 * H       # 2 normed, 3 qkv, 1 heads, 8 MLP; softmax
        ends = 4 * C + statistics + itemsize * C + 4 * V + 2 * 8            # last norm; head; log-probabilities; ids
        matrices = [p.numel() for p in self.transformer.h.parameters() if p.ndim == 2] * (not checkpointing)
        copies = itemsize * (sum(matrices) + C * V) if itemsize < 4 else 0
        return rows * c.block_size * (c.n_layer * (4 * C if checkpointing else inside) + ends) + copies

    def cache_bytes(self, tokens, itemsize=2):
        """Bytes of the keys and values of so many tokens, which decoding keeps."""
        c = self.config
        return 2 * c.n_layer * (c.n_kv_head or c.n_head) * c.head_width * tokens * itemsize

    def step(self, idx, cache):
        """Logits, (B, V), of what follows token ids idx, (B, T), which come after those in the cache."""
        return self.score(self.hidden(idx, cache)[:, -1])

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None,
                 repetition_penalty=1.0, seed=0, row=0, vocab_size=None, exact_window=False, static=False,
                 logprobs=False):
        """Continue B prompts, one token per row at a time: yields max_new_tokens tensors of shape (B,), with logprobs
        pairs of that and of the model's log-probabilities of these tokens, (B,).

        idx: token ids, (B, T), or B tensors of any length from 1. The controls are those of draw() and penalise(); ids
        from vocab_size on (the padding of the table) are never drawn. Row k draws from a stream of its own, a function
        of (seed, row + k).

        A model looks back block_size tokens at most. Once so many are in the cache, the older half is dropped and the
        rest is read anew, at new positions; with a window and relative positions nothing needs to be read anew.
        exact_window reads the last block_size tokens anew for each token. static keeps shapes fixed, see Cache.
        Put the model in eval mode first. Raises ValueError for an empty prompt, a control out of its range, and logits
        that are not finite.
        """
        check(temperature, top_k, top_p, min_p, repetition_penalty)
        if not all(len(ids) for ids in idx):
            raise ValueError('an empty prompt: expected at least one token id')
        c, B, device = self.config, len(idx), self.transformer.wte.weight.device
        start = max(len(ids) for ids in idx)
        text = torch.zeros(B, start + max_new_tokens, dtype=torch.long, device=device)   # padded on the left
        seen = torch.zeros(B, c.vocab_size, dtype=torch.bool, device=device)
        for k, ids in enumerate(idx):
            text[k, start - len(ids):start] = ids
            seen[k, ids.long()] = True
        chance = torch.stack([uniform(seed, row + k, max_new_tokens) for k in range(B)]).to(device)
        alike = all(torch.equal(ids, idx[0]) for ids in idx)
        lengths = [min(len(ids), c.block_size) for ids in idx]   # what each row looks back at
        kept = c.block_size if exact_window else max(c.block_size // 2, 1)   # of a context that has become too long
        endless = c.pos != 'learned' and (c.window or math.inf) <= c.block_size
        cache = self.take_cache(B, min(max(lengths) + max_new_tokens, c.block_size), static)
        try:
            for end in range(start, start + max_new_tokens):
                if end == start or exact_window or (cache.full and not endless):
                    lengths = [n if n <= c.block_size else kept for n in lengths]
                    cache.begin(lengths)
                    together = alike and end == start and not (static and max(lengths) == 1)
                    rows = 1 if together else B   # one reading serves rows that are alike
                    new = text[:rows, end - max(lengths):end]                         # (1 or B, T)
                else:
                    if cache.full:
                        cache.forget(c.window - 1)
                    new = text[:, end - 1:end].contiguous()                           # (B, 1)
                logits = self.step(new, cache).expand(B, -1)[:, :vocab_size].float()  # (B, V)
                cache.advance(new.size(1))
                # a GPU would have to wait for each answer
                ask = device.type == 'cpu' or end % 32 == 0 or end in (start, text.size(1) - 1)
                if ask and not logits.isfinite().all():
                    raise ValueError('the model gives NaN or infinite logits: its training went wrong')
                liked = logits
                if repetition_penalty != 1:
                    liked = penalise(logits, seen[:, :vocab_size], repetition_penalty)
                token = draw(liked, chance[:, end - start], temperature, top_k, top_p, min_p)   # (B,)
                text[:, end] = token
                seen.scatter_(1, token[:, None], True)
                lengths = [n + 1 for n in lengths]
                logprob = logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0] if logprobs else None
                yield (token, logprob) if logprobs else token
        finally:
            if static:
                self.spare_cache = cache

    def take_cache(self, rows, tokens, static):
        """An empty Cache for so many rows and tokens. A static one is that of an earlier generate() if it fits, because
        a CUDA graph holds the addresses of its keys and values; while it is in use nobody else gets it."""
        device, block_size = self.transformer.wte.weight.device, self.config.block_size
        if not static:
            return Cache(self.config, rows, tokens, device)
        columns = static_columns(tokens, block_size)
        cache, self.spare_cache = self.spare_cache, None
        if cache is None or (cache.rows, len(cache.columns), cache.columns.device) != (rows, columns, device):
            return Cache(self.config, rows, columns, device, static=True)
        cache.clear()
        return cache
