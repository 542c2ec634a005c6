"""
The whole model: configuration, positions, attention, blocks, loss, initialisation, FLOPs, and a plain generate().

The architecture is GPT-2's (Radford et al., 2019): pre-norm blocks of causal self-attention and a GELU MLP, learned
positions, and one matrix that both embeds tokens and gives the logits. Modules and parameters have GPT-2's names.
Everything newer is a field of GPTConfig. flatgpt/engine.py generates fast, with a KV cache.

Letters of the shape comments:
B batch · T time (tokens) · S time of the keys · C width, n_embd · H heads, n_head · K heads of keys and values
D width of a head · V vocabulary · L layers
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

ROPE_SCALINGS = {'linear': 1, 'dynamic': 2, 'llama3': 4}   # how many numbers each method has
NEW_DOCUMENT = -2   # as a target: the next token begins another document
NANOGPT_FIELDS = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
ALLOWED = {   # fields of GPTConfig that have one of a few values
    'attention': ('auto', 'sdpa', 'math'),
    'gelu': ('tanh', 'erf'),
    'pos': ('learned', 'rope', 'alibi'),
    'norm': ('layernorm', 'rmsnorm'),
    'mlp': ('gelu', 'relu2', 'swiglu'),
}


@dataclass
class GPTConfig:
    """Everything that defines a model. Raises ValueError for an impossible value: what is wrong, what is expected."""
    vocab_size: int = 50304     # GPT-2's 50,257 ids, padded to a multiple of 64: matrix products are faster then
    block_size: int = 1024      # longest context, in tokens
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    bias: bool = True           # biases in Linear and LayerNorm, as in GPT-2; without them a model is a little faster
    dropout: float = 0.0        # of embeddings, attention weights and block outputs
    gelu: str = 'tanh'          # 'tanh' (the approximation that GPT-2 was trained with), 'erf' (exact, as in nanoGPT)
    attention: str = 'auto'     # 'sdpa' (torch's fused kernels), 'math' (written out), 'auto' (the faster of the two)
    pos: str = 'learned'        # 'learned' (a table), 'rope' (rotates queries and keys), 'alibi' (penalises distance)
    norm: str = 'layernorm'     # 'layernorm', 'rmsnorm' (does not subtract the mean)
    mlp: str = 'gelu'           # 'gelu', 'relu2' (ReLU squared), 'swiglu' (gated, 2/3 as wide)
    qk_norm: bool = False       # normalise queries and keys, which allows a higher learning rate
    n_kv_head: int | None = None        # heads of keys and values, each shared by several query heads; None: n_head
    head_dim: int | None = None         # width of a head; None: n_embd / n_head
    n_inner: int | None = None          # width inside the MLP; None: 4 n_embd, for 'swiglu' 8/3 n_embd, times 64
    norm_eps: float | None = None       # keeps norms from dividing by zero; None: 1e-5, for 'rmsnorm' 1e-6
    rope_base: float = 10_000.0         # a larger base rotates slower, for longer contexts
    rope_scaling: tuple | None = None   # stretch RoPE for a longer context, see rope_angles()
    window: int | None = None   # how many tokens back attention reaches, the token itself included; None: all
    tie_weights: bool = True    # one matrix for the embedding and the head
    softcap: float | None = None        # limit logits to ± this value, with tanh
    layer_scale: float | None = None    # initial gain, per channel, of each block's output; None: no gains
    zero_init: bool = False     # block outputs, and an untied head, are initialised to zero
    loss_chunks: int = 1        # compute logits and loss in this many pieces and keep none of them, to save memory

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in ALLOWED:
                self.expect(name, value in ALLOWED[name], f'one of {", ".join(map(repr, ALLOWED[name]))}')
            elif name == 'dropout':
                self.expect(name, 0 <= value < 1, 'a probability below 1, such as 0.1')
            elif field.type in (int, int | None):
                self.expect(name, value is None or value >= 1, '1 or more')
            elif field.type in (float, float | None):
                self.expect(name, value is None or 0 < value < math.inf, 'a finite number above 0')
        multiple = math.ceil(self.n_embd / self.n_head) * self.n_head
        self.expect('n_embd', self.head_dim is not None or self.n_embd == multiple,
                    f'a multiple of n_head={self.n_head}, such as {multiple}')
        self.expect('n_kv_head', self.n_head % (self.n_kv_head or 1) == 0, f'a divisor of n_head={self.n_head}')
        self.expect('pos', self.pos != 'rope' or self.head_width % 2 == 0,
                    f'an even n_embd / n_head, because RoPE rotates pairs of channels, not {self.head_width}')
        if self.rope_scaling is not None:
            if not isinstance(self.rope_scaling[0], str):   # how earlier versions stored the method of Llama 3
                self.rope_scaling = ('llama3', *self.rope_scaling)
            self.rope_scaling = tuple(self.rope_scaling)
            method, *numbers = self.rope_scaling
            valid = len(numbers) == ROPE_SCALINGS.get(method) and all(0 < number < math.inf for number in numbers)
            expected = "('linear', factor), ('dynamic', factor, context) or ('llama3', factor, low, high, context)"
            self.expect('rope_scaling', valid, expected)

    def expect(self, name, holds, expected):
        """Raise ValueError with the value of a field and what is expected, unless a condition holds."""
        if not holds:
            raise ValueError(f'{name}={getattr(self, name)!r}: expected {expected}')

    @property
    def head_width(self):
        """Width of a head, D."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner_width(self):
        """Width inside the MLP. A gated MLP has a third matrix, so by default it is 2/3 as wide, rounded up to 64."""
        default = math.ceil(8 * self.n_embd / (3 * 64)) * 64 if self.mlp == 'swiglu' else 4 * self.n_embd
        return self.n_inner or default

    def to_dict(self):
        """The fields that a checkpoint stores: nanoGPT's, so that nanoGPT can read it, and newer ones that differ from
        their default; without attention and loss_chunks, which belong to the machine and not to the model."""
        changed = {name for name, value in vars(self).items() if value != getattr(GPTConfig, name)}
        stored = changed.difference(('attention', 'loss_chunks')).union(NANOGPT_FIELDS)
        return {name: value for name, value in vars(self).items() if name in stored}


# Fields that belong together: GPT-2, Llama 2 (Touvron et al., 2023), Qwen3 (Yang et al., 2025), and those with which
# public speed runs reach a loss soonest (github.com/KellerJordan/modded-nanogpt)
GPT2 = {'pos': 'learned', 'norm': 'layernorm', 'mlp': 'gelu', 'qk_norm': False, 'tie_weights': True, 'softcap': None,
        'zero_init': False}
LLAMA = {**GPT2, 'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'tie_weights': False}
QWEN3 = {**LLAMA, 'qk_norm': True, 'tie_weights': True}
SPEEDRUN = {**GPT2, 'pos': 'rope', 'mlp': 'relu2', 'qk_norm': True, 'tie_weights': False, 'softcap': 15.0,
            'zero_init': True}
ARCHS = {'gpt2': GPT2, 'llama': LLAMA, 'qwen3': QWEN3, 'speedrun': SPEEDRUN}


# ---------------------------------------------------------------------------------------------------------------------
# positions, masks, attention

def rope_angles(positions, D, base, scaling=None):
    """Cosines and sines, (T, D) each in float32, of the rotary angles of positions, (T,) (Su et al., 2021). From one
    position to the next, the pair of channels i and i + D / 2 rotates by base^(-2i / D); the first sine is negative.

    scaling: ('linear', factor) slows all pairs down (Chen et al., 2023). ('dynamic', factor, context): a larger base
    once the text is longer than context tokens. ('llama3', factor, low, high, context) (Grattafiori et al., 2024):
    pairs that make fewer than low turns within context tokens are slowed down, those with more than high are not, those
    between partly.
    """
    method, *numbers = scaling or [None]
    if method == 'dynamic':
        factor, context = numbers
        stretch = ((positions[-1] + 1) / context).clamp(min=1)
        base = base * (factor * stretch - factor + 1) ** (D / (D - 2))
    speed = base ** (-torch.arange(0, D, 2, device=positions.device).float() / D)     # (D / 2,)
    if method == 'linear':
        speed = speed / numbers[0]
    elif method == 'llama3':
        factor, low, high, context = numbers
        turns = context * speed / (2 * math.pi)
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)   # share of the speed that stays as it is
        speed = speed * (unscaled + (1 - unscaled) / factor)
    angle = positions.float()[..., None] * speed                                      # (T, D / 2)
    if positions.dim() == 2:
        angle = angle[:, None]                                                        # (B, 1, T, D / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x, angles):
    """Rotate queries or keys, (..., T, D), by the angles of their positions, from rope_angles()."""
    cos, sin = (part.to(x.dtype) for part in angles)                                  # (T, D) each
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin   # the roll swaps the channels of each pair


def make_attn_mask(query, key, n_head, pos, window, padding=None, documents=None):
    """Additive attention mask, (H or 1, T, S), for queries at positions query, (T,), and keys at positions key, (S,).
    None if it would be plain causal, which attend() does without a mask. What differs between rows, of which query may
    be one, (B, T), makes it (B, H or 1, T, S).

    -inf forbids: keys after the query, keys window or more positions back (Child et al., 2019), the first `padding`,
    (B,), keys of a row, and keys of another document: documents, (B, T), has the number of each token's. ALiBi
    subtracts slope times distance, with slopes 2^(-8h / H) for h = 1 ... H (Press et al., 2022).
    """
    T, S = query.size(-1), len(key)
    limited = window is not None and window < S
    same_rows = query.dim() == 1 and padding is None and documents is None
    if pos != 'alibi' and not limited and same_rows and T in (1, S):
        return None
    distance = query[..., None] - key                                                 # (T, S) or (B, T, S)
    if query.dim() == 2:
        distance = distance[:, None]                                                  # (B, 1, T, S)
    forbidden = (distance < 0) | (distance >= (window or math.inf))
    if documents is not None:
        forbidden = forbidden | (documents[:, None, :, None] != documents[:, None, None, :])   # (B, 1, T, T)
    if padding is not None:   # a padding token may attend to itself: a row of weights needs a sum
        forbidden = forbidden | ((key < padding[:, None, None, None]) & (distance != 0))   # (B, 1, T, S)
    slopes = key.new_zeros(1)
    if pos == 'alibi':
        slopes = 2 ** (-8 / n_head * torch.arange(1, n_head + 1, device=key.device))  # (H,)
    return (-slopes[:, None, None].float() * distance).masked_fill(forbidden, -math.inf)


def attend_math(q, k, v, dropout_p=0.0, attn_mask=None):
    """softmax(q kᵀ / √D + attn_mask) v, written out (Vaswani et al., 2017, eq. 1): the reference for fused kernels.

    q and the result: (B, H, T, D). k, v: (B, K, S, D), each head for H / K heads of q. dropout_p: of the weights.
    attn_mask: from make_attn_mask(). None: causal, with S = T, or with T = 1 and the query in the last position.
    """
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    q = (q / math.sqrt(D)).reshape(B, K, -1, D)                                       # (B, K, H / K · T, D)
    if T > 1:
        scores = q @ k.mT                                                             # (B, K, H / K · T, S)
    else:   # q kᵀ = (k qᵀ)ᵀ, and in this order k, a slice of the KV cache, is not copied
        scores = (k @ q.mT).mT
    scores = scores.reshape(B, H, T, S)                                               # query by key
    if attn_mask is None and T > 1:
        attn_mask = torch.full((T, T), -math.inf, device=q.device).triu(diagonal=1)   # no query sees a later key
    if attn_mask is not None:
        scores = scores + attn_mask.to(q.dtype)
    weights = dropout(scores.softmax(dim=-1, dtype=scores.dtype), dropout_p)          # each row sums to one
    return (weights.reshape(B, K, -1, S) @ v).view(B, H, T, D)


def attend(q, k, v, dropout_p=0.0, attn_mask=None, attention='auto'):
    """What attend_math() returns, by 'math', by 'sdpa' (torch's fused kernels, which never store the (T, S) weights:
    Dao et al., 2022), or by 'auto', the faster of the two: on a CPU the kernels have no dropout and a slow backward
    pass in bfloat16, and for one query on a GPU cuDNN would plan anew for each number of keys."""
    B, H, T, D = q.shape
    K = k.size(1)
    if attention == 'auto':
        slow_on_cpu = dropout_p > 0 or (T <= 512 and q.dtype != torch.float32)
        attention = 'math' if (slow_on_cpu if q.device.type == 'cpu' else T == 1) else 'sdpa'
    if attention == 'math':
        return attend_math(q, k, v, dropout_p, attn_mask)
    attn_mask = None if attn_mask is None else attn_mask.to(q.dtype)
    if T == 1 and (attn_mask is None or attn_mask.size(-3) == 1):   # heads that share keys are like positions
        q = q.view(B, K, H // K, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=dropout_p).view(B, H, 1, D)
    if K < H:   # not every kernel can share heads
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))                   # (B, H, S, D)
    causal = attn_mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=dropout_p, is_causal=causal)


# ---------------------------------------------------------------------------------------------------------------------
# the modules of a block

def dropout(x, p, training=True):
    """x with a random share p of its elements set to zero and the others divided by 1 - p (Srivastava et al., 2014); x
    itself if not training. On a CPU, torch draws these random numbers one by one, which takes longer than all matrix
    products of a small model: here each element gets 16 bits of numpy's SFC64, which is seeded by torch's generator.
    """
    if p == 0 or not training:
        return x
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.dropout(x, p)
    generator = np.random.SFC64(torch.randint(2**62, ()).item())
    words = generator.random_raw(math.ceil(x.numel() / 4))                            # 64 bits each
    bits = torch.from_numpy(words.view(np.int16)[:x.numel()]).view(x.shape)
    mask = bits >= round(p * 2**16) - 2**15   # not of those that become zero
    return x * mask.to(x.dtype).mul_(1 / (1 - p))


class RMSNorm(nn.RMSNorm):
    """x divided by its root mean square, times a weight (Zhang & Sennrich, 2019), cast to x's dtype: without that,
    torch's RMSNorm is slow and warns under autocast."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config, width, bias):
    """The norm that config.norm names, for vectors of a width."""
    if config.norm == 'rmsnorm':
        return RMSNorm(width, config.norm_eps or 1e-6)
    return nn.LayerNorm(width, config.norm_eps or 1e-5, bias=bias)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C, D = config.n_embd, config.head_width
        H, K = config.n_head, config.n_kv_head or config.n_head
        self.config = config
        self.layer = layer
        self.dropout_p = config.dropout
        self.c_attn = nn.Linear(C, (H + K + K) * D, bias=config.bias)                 # q, k and v in one
        self.c_proj = nn.Linear(H * D, C, bias=config.bias)
        if config.qk_norm:   # Dehghani et al., 2023
            self.q_norm = make_norm(config, D, False)
            self.k_norm = make_norm(config, D, False)

    def forward(self, x, angles=None, attn_mask=None, kv_cache=None):
        B, T, C = x.shape
        c = self.config
        H, K = c.n_head, c.n_kv_head or c.n_head   # K < H: queries share keys and values (Ainslie et al., 2023)
        heads = self.c_attn(x).view(B, T, H + K + K, -1).transpose(1, 2)              # (B, H + K + K, T, D)
        qk, v = heads.split((H + K, K), dim=1)
        if c.qk_norm:
            q, k = qk.split((H, K), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        if angles is not None:
            qk = apply_rope(qk, angles)
        q, k = qk.split((H, K), dim=1)
        if kv_cache is not None:
            k, v = kv_cache.update(self.layer, k, v)                                  # (B, K, S, D)
        y = attend(q, k, v, self.dropout_p if self.training else 0.0, attn_mask, c.attention)   # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))                       # heads side by side again


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.mlp
        self.gelu = 'none' if config.gelu == 'erf' else 'tanh'   # torch's names
        width = config.inner_width
        self.c_fc = nn.Linear(config.n_embd, 2 * width if config.mlp == 'swiglu' else width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.c_fc(x)
        if self.activation == 'swiglu':   # one half of the channels gates the other (Shazeer, 2020)
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        elif self.activation == 'relu2':   # So et al., 2021
            x = F.relu(x).square()
        else:
            x = F.gelu(x, approximate=self.gelu)
        return self.c_proj(x)


class LayerScale(nn.Module):
    """A learned gain per channel (Touvron et al., 2021)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.full((config.n_embd,), config.layer_scale))

    def forward(self, x):
        return x * self.weight


class Block(nn.Module):
    """Attention moves information between positions, the MLP works on each. Both add to the residual stream x."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.scale_1 = LayerScale(config) if config.layer_scale else nn.Identity()
        self.ln_2 = make_norm(config, config.n_embd, config.bias)
        self.mlp = MLP(config)
        self.scale_2 = LayerScale(config) if config.layer_scale else nn.Identity()
        self.dropout_p = config.dropout

    def forward(self, x, angles=None, attn_mask=None, kv_cache=None):
        y = self.scale_1(self.attn(self.ln_1(x), angles, attn_mask, kv_cache))
        x = x + dropout(y, self.dropout_p, self.training)
        y = self.scale_2(self.mlp(self.ln_2(x)))
        return x + dropout(y, self.dropout_p, self.training)


# ---------------------------------------------------------------------------------------------------------------------
# the model

class GPT(nn.Module):
    """Token ids in, logits of the next token out. Parameters carry the names of GPT-2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.dropout_p = config.dropout
        self.within_documents = False   # whether targets of NEW_DOCUMENT separate what attention must not mix
        self.transformer = nn.ModuleDict()
        self.transformer['wte'] = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == 'learned':
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer['h'] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer['ln_f'] = make_norm(config, config.n_embd, config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight   # one matrix for both (Press & Wolf, 2017)
        self.init_weights()

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """A GPT with the weights of 'gpt2', another name on the Hugging Face hub, a local folder, or a ckpt.pt. Raises
        UserError. override_args: fields of GPTConfig to change, such as {'dropout': 0.1}."""
        from flatgpt import checkpoint
        path = checkpoint.resolve(name)
        return checkpoint.build(checkpoint.load(path), path, **(override_args or {}))

    @torch.no_grad()
    def init_weights(self):
        """Initialise all matrices and biases as GPT-2 does; norms and gains are as their modules have made them."""
        for name, p in self.named_parameters():
            zero = self.config.zero_init and name.endswith(('c_proj.weight', 'lm_head.weight'))
            if zero or name.endswith('.bias'):
                p.zero_()
            elif name.endswith('c_proj.weight'):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))   # the residual stream adds up 2 L of these
            elif p.dim() == 2:
                p.normal_(std=0.02)

    def forward(self, idx, targets=None):
        """(logits, loss) of token ids idx, (B, T).

        With targets, (B, T), the ids one step ahead: logits of all positions, (B, T, V), or None if loss_chunks is
        above 1, and the mean cross-entropy in nats over the targets that are not -1.
        Without targets: the logits of the last position, (B, 1, V), and None."""
        if targets is None:
            return self.compute_logits(self.hidden_states(idx)[:, -1:]), None
        documents = None
        if self.within_documents:
            begins = F.pad(targets[:, :-1] == NEW_DOCUMENT, (1, 0))   # whether a token is the first of a document
            documents = begins.cumsum(dim=1)                                          # (B, T)
        return self.logits_and_loss(self.hidden_states(idx, documents=documents), targets)

    def hidden_states(self, idx, kv_cache=None, documents=None):
        """The residual stream after the last norm, (B, T, C), of token ids idx, (B, T). With a kv_cache, a KVCache of
        flatgpt/engine.py, idx continues the tokens that are in it. documents, (B, T), has the number of the document
        that each token belongs to: attention stays within it. None: it reaches all earlier tokens."""
        c = self.config
        T = idx.size(1)
        assert T <= c.block_size, f'{T} tokens in a context of {c.block_size}'
        if kv_cache is None:
            positions = query = key = torch.arange(T, device=idx.device)
            padding = None
        else:
            query, key, padding = kv_cache.columns_of(T)                              # (T,), (S,), (B,) or None
            positions = query + kv_cache.evicted
        x = self.transformer.wte(idx)                                                 # (B, T, C)
        angles = None
        if c.pos == 'learned' and documents is not None:   # each document begins at position 0
            earlier = (documents[:, :, None] == documents[:, None, :]).tril()         # (B, T, T)
            x = x + self.transformer.wpe(earlier.sum(dim=2) - 1)                      # + (B, T, C)
        elif c.pos == 'learned' and kv_cache is None:
            x = x + self.transformer.wpe.weight[:T]                                   # + (T, C)
        elif c.pos == 'learned':
            padding_left = 0 if padding is None else padding[:, None]
            x = x + self.transformer.wpe((query - padding_left).clamp(min=0))         # + (T, C) or (B, T, C)
        elif c.pos == 'rope':
            angles = rope_angles(positions, c.head_width, c.rope_base, c.rope_scaling)
        x = dropout(x, self.dropout_p, self.training)
        attn_mask = make_attn_mask(query, key, c.n_head, c.pos, c.window, padding, documents)
        for block in self.transformer.h:
            x = block(x, angles, attn_mask, kv_cache)
        return self.transformer.ln_f(x)

    def compute_logits(self, x):
        """Logits, (..., V), of the token that follows each hidden state x, (..., C)."""
        logits = self.lm_head(x)
        if self.config.softcap is not None:   # Gemma 2, 2024
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        return logits

    def next_logits(self, idx, kv_cache):
        """Logits, (B, V), of the token that follows token ids idx, (B, T), which continue those in the kv_cache."""
        return self.compute_logits(self.hidden_states(idx, kv_cache)[:, -1])

    def logits_and_loss(self, x, targets):
        """What forward() returns with targets, (B, T), from hidden states x, (B, T, C)."""
        count = (targets >= 0).sum().clamp(min=1)
        targets = targets.clamp(min=-1)
        n = self.config.loss_chunks
        if n == 1:
            logits, total = self.logits_and_sum(x, targets)
        else:   # in pieces, computed again in the backward pass, so that no logits are stored
            logits = None
            pieces = zip(x.flatten(0, 1).chunk(n), targets.flatten().chunk(n))
            total = sum(recompute(self.logits_and_sum, *piece, use_reentrant=False)[1] for piece in pieces)
        return logits, total / count

    def logits_and_sum(self, x, targets):
        """Logits, (..., V), of hidden states x, (..., C), and the sum of their cross-entropies with targets, (...)."""
        logits = self.compute_logits(x)
        flat = logits.flatten(0, -2).float()
        return logits, F.cross_entropy(flat, targets.flatten(), ignore_index=-1, reduction='sum')

    def crop_block_size(self, block_size):
        """Set the context to block_size tokens, for instance fewer, to finetune in less memory. It can be longer only
        without a table of positions. Raises ValueError."""
        longest = self.config.block_size if self.config.pos == 'learned' else math.inf
        if not 1 <= block_size <= longest:
            raise ValueError(f'block_size={block_size}: this model has {longest} positions, expected 1 or more of them')
        if self.config.pos == 'learned' and block_size < self.config.block_size:
            positions = self.transformer.wpe.weight.detach()[:block_size].clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(positions, freeze=False)
        self.config.block_size = block_size

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without those that are only looked up: the position table, and the token
        table unless it is also the head."""
        total = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos == 'learned':
            total -= self.transformer.wpe.weight.numel()
        if non_embedding and not self.config.tie_weights:
            total -= self.transformer.wte.weight.numel()
        return total

    def flops_per_token(self, T=None):
        """FLOPs per token of a training step, forward and backward, on rows of T tokens, by default block_size.

        6 N + 12 L H D T if all is trained (Chowdhery et al., 2022, app. B): N is get_num_params(), and T the window if
        that is shorter. A frozen parameter costs 4 instead of 6, or 2 if no gradient passes through its layer. A
        multiply-add counts as two, recomputation as nothing, and attention as if it were not causal, as in most
        published MFU figures, including nanoGPT's."""
        c = self.config
        T = min(T or c.block_size, c.window or c.block_size)
        embeddings = [p for name, p in self.named_parameters() if name.endswith(('wte.weight', 'wpe.weight'))]
        gradient_passes = any(p.requires_grad for p in embeddings)
        flops = 0
        for layer in (*self.transformer.h, self.transformer.ln_f, self.lm_head):
            n = sum(p.numel() for p in layer.parameters())
            n_trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
            attention = 4 * c.n_head * c.head_width * T if isinstance(layer, Block) else 0   # forward
            flops += 2 * n + attention
            gradient_passes = gradient_passes or n_trained > 0
            if gradient_passes:
                flops += 2 * n + 2 * n_trained + 2 * attention
        return flops

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilization: achieved FLOP/s divided by peak_flops, by default an A100's in bfloat16, of
        iterations that take dt seconds and train on fwdbwd_per_iter rows of block_size tokens."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type=None):
        """AdamW in which matrices decay, and biases and norms do not. device_type is not needed: parameters know it."""
        from flatgpt import optim
        return optim.adamw(self, learning_rate, betas, weight_decay)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Token ids, (B, T + max_new_tokens): idx, (B, T), and a sampled continuation of each row. Call eval() first.

        temperature divides the logits; 0 takes the likeliest token. top_k: sample among the k likeliest tokens only.
        Each token recomputes the whole context: the reference for flatgpt/engine.py, which has a KV cache."""
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size:]
            logits = self(context)[0][:, -1].float()                                  # (B, V)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)                           # (B, 1)
            else:
                logits = logits / temperature
                if top_k is not None:
                    likeliest = logits.topk(min(top_k, logits.size(-1))).values       # (B, k), in falling order
                    logits = logits.masked_fill(logits < likeliest[:, -1:], -math.inf)
                token = torch.multinomial(logits.softmax(dim=-1), num_samples=1)      # (B, 1)
            idx = torch.cat((idx, token), dim=1)
        return idx
