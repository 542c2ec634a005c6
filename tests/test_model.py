"""The model: compared with a second implementation in numpy, with closed forms, by invariants; nanoGPT's methods."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flatgpt import lora, optim, pretrained, tokenizer
from model import (
    ALLOWED,
    ARCHS,
    GPT,
    NANOGPT_FIELDS,
    GPTConfig,
    apply_rope,
    attend,
    attend_math,
    dropout,
    rope_angles,
)

SHAPE = {'vocab_size': 23, 'block_size': 12, 'n_layer': 2, 'n_embd': 16, 'n_head': 4}
METHODS = ALLOWED['attention']


def full(value):
    """A value of a parameter whose tests belong to the full tier."""
    return pytest.param(value, marks=pytest.mark.full)


# Each switch alone on top of GPT-2, at each of its values that takes another path; the context is 12 tokens
SWITCHES = {
    'rope': {'pos': 'rope'}, 'alibi': {'pos': 'alibi'}, 'alibi, 6 heads': {'pos': 'alibi', 'n_head': 6, 'n_embd': 24},
    'rmsnorm': {'norm': 'rmsnorm'}, 'qk_norm': {'qk_norm': True},
    'relu2': {'mlp': 'relu2'}, 'swiglu': {'mlp': 'swiglu'},
    **{f'n_kv_head {n}': {'n_kv_head': n} for n in (1, 2, 4)},
    **{f'window {n}': {'window': n} for n in (1, 5, 11, 12, 20)},
    'untied': {'tie_weights': False}, 'softcap': {'softcap': 2.0}, 'layer_scale': {'layer_scale': 0.1},
    'head_dim': {'head_dim': 6}, 'n_inner': {'n_inner': 48}, 'n_inner, gated': {'n_inner': 48, 'mlp': 'swiglu'},
    'norm_eps': {'norm_eps': 0.1}, 'norm_eps, rmsnorm': {'norm_eps': 0.1, 'norm': 'rmsnorm', 'qk_norm': True},
    'rope_base': {'pos': 'rope', 'rope_base': 100.0},
    'rope_scaling': {'pos': 'rope', 'rope_scaling': ('llama3', 8.0, 0.5, 20.0, 64.0)},
    'rope linear': {'pos': 'rope', 'rope_scaling': ('linear', 4.0)},
    'zero_init': {'zero_init': True}, 'zero_init, untied': {'zero_init': True, 'tie_weights': False},
}
CASES = {**ARCHS, **SWITCHES}
VALUES = {
    'bias': [True, False], 'gelu': ['tanh', 'erf'], 'mlp': ['gelu', 'relu2', 'swiglu'],
    'pos': ['learned', 'rope', 'alibi'], 'norm': ['layernorm', 'rmsnorm'], 'qk_norm': [True, False],
    'n_head': [2, 4, 8], 'n_kv_head': [None, 1, 2], 'window': [None, 1, 5, 12],
    'head_dim': [None, 6], 'n_inner': [None, 24], 'norm_eps': [None, 0.1], 'rope_base': [10_000.0, 100.0],
    'rope_scaling': [None, ('llama3', 8.0, 0.5, 20.0, 64.0)],
    'tie_weights': [True, False], 'softcap': [None, 2.0], 'layer_scale': [None, 0.1], 'zero_init': [True, False],
}


def mixture(seed):
    source = random.Random(seed)
    return {name: source.choice(values) for name, values in VALUES.items()}


MIXED = {f'mixture {seed}': mixture(seed) for seed in range(12)}
ALL = {**CASES, **MIXED}
EACH = [*CASES, *list(MIXED)[:4]]   # each switch once, and four mixtures
FEW = [*ARCHS, 'alibi', 'n_kv_head 2', 'window 5', *list(MIXED)[:4]]   # one of each path through the code


def with_each(cases, fast=None):
    """One test for each configuration. If fast is given, those whose names are not in it belong to the full tier."""
    return pytest.mark.parametrize('changes', [
        pytest.param(changes, id=name, marks=[] if fast is None or name in fast else [pytest.mark.full])
        for name, changes in cases.items()])


def make(dtype=torch.float64, spread=0.3, **changes):
    """A model in which every parameter, biases and norms included, is at random and matters."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SHAPE, **changes})).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=spread)
    return model.eval()


def tokens(rows=2, length=12, vocab=23, seed=0):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, idx):
    """Logits at every position."""
    return model(idx, idx)[0].detach()


# ---------------------------------------------------------------------------------------------------------------------
# the whole model

def gpt_in_numpy(weights, ids, c):
    """Logits of one sequence of ids: GPT-2 and all that may differ from it, read off the papers, one head and one
    position at a time."""
    P = {name.removeprefix('transformer.'): p.numpy() for name, p in weights.items()}
    T, H, K, D = len(ids), c.n_head, c.n_kv_head or c.n_head, c.head_dim or c.n_embd // c.n_head

    def linear(x, name):
        return x @ P[f'{name}.weight'].T + P.get(f'{name}.bias', 0)

    def norm(x, name):
        if c.norm == 'rmsnorm':
            return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + (c.norm_eps or 1e-6)) * P[f'{name}.weight']
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + (c.norm_eps or 1e-5)) * P[f'{name}.weight'] \
            + P.get(f'{name}.bias', 0)

    def activation(x):
        if c.mlp == 'relu2':
            return np.where(x > 0, x * x, 0)
        if c.mlp == 'swiglu':
            gate, value = np.split(x, 2, axis=-1)
            return gate / (1 + np.exp(-gate)) * value
        if c.gelu == 'tanh':
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def rotated(x):   # pairs of channels as complex numbers
        if c.pos != 'rope':
            return x
        speed = [c.rope_base ** (-i / D) for i in range(0, D, 2)]
        if c.rope_scaling and c.rope_scaling[0] == 'linear':
            speed = [s / c.rope_scaling[1] for s in speed]
        elif c.rope_scaling and c.rope_scaling[0] == 'dynamic':
            _, factor, context = c.rope_scaling
            base = c.rope_base * max(factor * T / context - (factor - 1), 1) ** (D / (D - 2))
            speed = [base ** (-i / D) for i in range(0, D, 2)]
        elif c.rope_scaling:
            _, factor, low, high, context = c.rope_scaling
            turns = [context * s / (2 * math.pi) for s in speed]
            share = [min(max((n - low) / (high - low), 0), 1) for n in turns]   # of the speed as it was
            speed = [s * unscaled + s / factor * (1 - unscaled) for s, unscaled in zip(speed, share)]
        z = (x[:, :D // 2] + 1j * x[:, D // 2:]) * np.exp(1j * np.outer(np.arange(T), speed))
        return np.concatenate((z.real, z.imag), axis=1)

    x = np.array([P['wte.weight'][token] for token in ids])
    if c.pos == 'learned':
        x = x + P['wpe.weight'][:T]
    for layer in range(c.n_layer):
        qkv = linear(norm(x, f'h.{layer}.ln_1'), f'h.{layer}.attn.c_attn')
        mixed = np.zeros((T, H * D))
        for head in range(H):
            shared = head * K // H   # the first H / K heads of queries share the first of keys, and so on
            q, k, v = (qkv[:, n * D:(n + 1) * D] for n in (head, H + shared, H + K + shared))
            if c.qk_norm:
                q, k = (norm(part, f'h.{layer}.attn.{name}_norm') for part, name in ((q, 'q'), (k, 'k')))
            q, k, slope = rotated(q), rotated(k), 2 ** (-8 * (head + 1) / H) if c.pos == 'alibi' else 0
            for t in range(T):
                seen = [s for s in range(t + 1) if t - s < (c.window or T)]
                weight = np.exp([q[t] @ k[s] / math.sqrt(D) - slope * (t - s) for s in seen])
                mixed[t, head * D:(head + 1) * D] = weight @ v[seen] / weight.sum()
        x = x + linear(mixed, f'h.{layer}.attn.c_proj') * P.get(f'h.{layer}.scale_1.weight', 1)
        inner = activation(linear(norm(x, f'h.{layer}.ln_2'), f'h.{layer}.mlp.c_fc'))
        x = x + linear(inner, f'h.{layer}.mlp.c_proj') * P.get(f'h.{layer}.scale_2.weight', 1)
    logits = norm(x, 'ln_f') @ P['wte.weight' if c.tie_weights else 'lm_head.weight'].T
    return c.softcap * np.tanh(logits / c.softcap) if c.softcap else logits


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('gelu', ['tanh', 'erf'])
@pytest.mark.parametrize('attention', ['math', full('sdpa')])
def test_logits_equal_those_of_a_second_gpt2_in_numpy(attention, gelu, bias):
    model, idx = make(attention=attention, gelu=gelu, bias=bias), tokens()
    expected = [gpt_in_numpy(model.state_dict(), row, model.config) for row in idx.tolist()]
    np.testing.assert_allclose(logits_of(model, idx).numpy(), expected, rtol=0, atol=1e-10)


@with_each(ALL, fast=EACH)
@pytest.mark.parametrize('attention', ['math', full('sdpa')])
def test_logits_with_every_switch_equal_those_of_the_second_model_in_numpy(attention, changes):
    """Angles and slopes are kept in float32: off by up to 12 * 2**-24, 7e-7, at this context. All else is float64."""
    model, idx = make(attention=attention, **changes), tokens()
    expected = [gpt_in_numpy(model.state_dict(), row, model.config) for row in idx.tolist()]
    atol = 1e-10 if model.config.pos == 'learned' else 2e-6
    np.testing.assert_allclose(logits_of(model, idx).numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize('context', [5, 12, 100])
def test_dynamic_rope_has_a_larger_base_in_texts_beyond_its_context(context):
    model, idx = make(pos='rope', rope_scaling=('dynamic', 2.0, context)), tokens()
    expected = [gpt_in_numpy(model.state_dict(), row, model.config) for row in idx.tolist()]
    np.testing.assert_allclose(logits_of(model, idx).numpy(), expected, rtol=0, atol=2e-6)
    plain = logits_of(make(pos='rope'), idx)
    assert torch.equal(logits_of(model, idx), plain) == (context >= 12)


def test_without_targets_the_last_logits_come_alone():
    model, idx = make(), tokens()
    logits, loss = model(idx)
    assert loss is None
    assert logits.shape == (2, 1, 23)
    torch.testing.assert_close(logits, model(idx, idx)[0][:, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_loss_is_the_mean_of_minus_log_softmax_over_targets_that_are_not_minus_one(dtype):
    model, idx, targets = make(dtype), tokens(), tokens(seed=1)
    targets[0, 3:] = -1
    logits, loss = model(idx, targets)
    z = logits.detach().double().numpy()
    losses = [np.log(np.exp(z[b, t]).sum()) - z[b, t, targets[b, t]]
              for b in range(2) for t in range(12) if targets[b, t] >= 0]
    assert len(losses) == 15
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_targets_of_minus_one_send_no_gradient():
    def gradient(first):
        model, targets = make(), tokens(seed=1)
        targets[1] = -1
        idx = tokens()
        idx[1] = first   # what stands in the row without targets must not matter
        model(idx, targets)[1].backward()
        return model.transformer.h[0].attn.c_attn.weight.grad

    torch.testing.assert_close(gradient(0), gradient(7), rtol=0, atol=1e-12)


def test_more_tokens_than_the_context_are_a_programming_error():
    with pytest.raises(AssertionError, match='13 tokens in a context of 12'):
        make()(tokens(length=13))


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, bias=False))
    optimizer = optim.adamw(model, 1e-2, (0.9, 0.95), 0.1)
    idx, targets = tokens(rows=4), tokens(rows=4, seed=1)
    for _ in range(60):
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# attention

def qkv(T=12, dtype=torch.float32, D=8):
    source = torch.Generator().manual_seed(2)
    return [torch.randn(2, 3, T, D, generator=source).to(dtype) for _ in range(3)]


def test_written_out_attention_equals_a_loop_over_positions():
    q, k, v = qkv(dtype=torch.float64)
    out = attend_math(q, k, v)
    for b, h, t in np.ndindex(2, 3, 12):
        likeness = [math.exp(sum(q[b, h, t, d].item() * k[b, h, s, d].item() for d in range(8)) / 8 ** 0.5)
                    for s in range(t + 1)]
        seen = sum(w / sum(likeness) * v[b, h, s] for s, w in enumerate(likeness))
        torch.testing.assert_close(out[b, h, t], seen, rtol=0, atol=1e-12)


@pytest.mark.parametrize('method', ['sdpa', 'auto'])
@pytest.mark.parametrize('T', [1, 12, full(513)])   # 'auto' chooses by length, too
@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_methods_of_attention_agree_in_results_and_gradients(method, T, dtype, bound):
    """The bound is on the largest error as a share of the largest value. bfloat16 has 8 bits: 2**-8 is 0.4 %. With one
    token, queries and keys have a gradient of zero, and a kernel may leave a rounding error of values near 1."""
    def results(method, dtype):
        inputs = [x.requires_grad_() for x in qkv(T, dtype)]
        out = attend(*inputs, attention=method)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return [out.detach(), *(x.grad for x in inputs)]

    reference = results('math', torch.float32)
    for result, exact in zip(results(method, dtype), reference, strict=True):
        assert result.dtype == dtype
        assert (result - exact).abs().max() <= bound * exact.abs().max() + 1e-6


@pytest.mark.parametrize('masks', [None, (1, 1), (2, 1), (1, 6), (2, 6)], ids=str)   # rows and heads of their own
@pytest.mark.parametrize('K', [1, 3, 6])
def test_one_query_gets_the_same_of_heads_that_share_keys(masks, K):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, K, 20, 8)[:, :, :9], torch.randn(2, K, 20, 8)[:, :, :9]
    attn_mask = None if masks is None else torch.randn(*masks, 1, 9).masked_fill(torch.arange(9) < 4, -math.inf)
    for attention in ('sdpa', 'auto'):
        torch.testing.assert_close(attend(q, k, v, 0.0, attn_mask, attention), attend_math(q, k, v, 0.0, attn_mask))


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_models_with_either_attention_agree_in_loss_and_gradients(dtype, bound):
    def results(attention, dtype):
        model = make(torch.float32, 0.05, attention=attention)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = model(tokens(), tokens(seed=1))[1]
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    for result, exact in zip(results('sdpa', dtype), results('math', torch.float32), strict=True):
        assert (result - exact).norm() <= bound * exact.norm() + 1e-7


@with_each(ALL, fast=FEW)
def test_models_with_sdpa_and_written_out_attention_agree_in_logits_and_gradients(changes):
    def results(attention):
        model = make(block_size=130, attention=attention, **changes)
        logits, loss = model(tokens(length=130), tokens(length=130, seed=1))
        loss.backward()
        return [logits.detach(), *(p.grad for p in model.parameters())]

    for result, exact in zip(results('sdpa'), results('math'), strict=True):
        # the losses are float32, in which gradients of mean zero keep an absolute error
        assert (result - exact).norm() <= 1e-6 * exact.norm() + 1e-9


@pytest.fixture
def every_warning():
    """Warnings that torch gives once in a process are given each time, so that none hides behind an earlier test."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures('every_warning')
@pytest.mark.parametrize('casting', ['weights', 'autocast'])
@with_each(CASES, fast=['gpt2', 'llama', 'speedrun', 'alibi', 'window 5'])
def test_logits_in_bfloat16_are_near_those_in_float32(changes, casting):
    """The bound is on the size of the error as a share of that of the logits: a few roundings of 2**-9 per layer."""
    exact = logits_of(make(torch.float32, 0.1, attention='math', **changes), tokens())
    for attention in ('math', 'sdpa'):
        model = make(torch.float32, 0.1, attention=attention, **changes)
        if casting == 'weights':
            model.to(torch.bfloat16)
        with torch.autocast('cpu', torch.bfloat16, enabled=casting == 'autocast'):
            logits = logits_of(model, tokens())
        assert logits.dtype == torch.bfloat16
        assert (logits - exact).norm() <= 0.02 * exact.norm(), attention


@pytest.mark.parametrize('D', [2, 8, 64])
def test_scores_of_rotated_queries_and_keys_depend_on_their_distance_only(D):
    """One query and one key at each of 300 positions. The bound is that of angles in float32, 300 * 2**-24 of a score
    of size D."""
    q, k = torch.randn(2, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(D))
    angles = rope_angles(torch.arange(300), D, 10_000)
    scores = apply_rope(q.expand(300, D), angles) @ apply_rope(k.expand(300, D), angles).T   # query by key
    assert (scores[1:, 1:] - scores[:-1, :-1]).abs().max() < 4e-5 * D
    assert (scores[200:, 200:] - scores[:100, :100]).abs().max() < 4e-5 * D
    torch.testing.assert_close(scores.diagonal(), (q @ k.T).expand(1, 300)[0], rtol=0, atol=1e-6 * D)
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-3   # and on the distance they do depend


def test_rope_rotates_the_first_pair_by_one_radian_per_position_and_keeps_lengths():
    x = torch.randn(2, 50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = apply_rope(x, rope_angles(torch.arange(50), 6, 10_000))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-6)
    assert torch.equal(rotated[:, 0], x[:, 0])   # position 0 stays as it is
    t = torch.arange(50, dtype=torch.float64)
    first = x[..., 0] * t.cos() - x[..., 3] * t.sin(), x[..., 3] * t.cos() + x[..., 0] * t.sin()
    torch.testing.assert_close(rotated[..., [0, 3]], torch.stack(first, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize('window', [1, 5, full(11), full(12), full(20)])
@pytest.mark.parametrize('pos', ['learned', full('rope'), full('alibi')])
@pytest.mark.parametrize('attention', ['math', full('sdpa')])
def test_one_layer_sees_no_token_that_is_a_window_or_more_back(attention, pos, window):
    model, idx = make(attention=attention, pos=pos, window=window, n_layer=1), tokens(rows=1).repeat(12, 1)
    other = (idx + torch.eye(12, dtype=torch.long)) % 23   # row t has another token at t
    moved = (logits_of(model, other)[:, -1] != logits_of(model, idx)[:, -1]).any(dim=-1)
    assert moved.tolist() == [11 - t < window for t in range(12)]


@with_each(ALL, fast=FEW)
def test_a_token_moves_its_own_logits_and_those_within_reach_after_it(changes):
    """The reach of two layers is twice that of one, itself not counted."""
    model, idx = make(**changes), tokens(rows=1).repeat(12, 1)
    other = (idx + torch.eye(12, dtype=torch.long)) % 23
    moved = (logits_of(model, other) != logits_of(model, idx)).any(dim=-1)   # (12, 12), token by position
    reach = 2 * ((model.config.window or 12) - 1)
    assert moved.tolist() == [[0 <= position - t <= reach for position in range(12)] for t in range(12)]


@pytest.mark.parametrize('attention', METHODS)
def test_a_token_moves_no_logit_before_it(attention):
    model, idx = make(torch.float32, attention=attention), tokens(rows=1).repeat(12, 1)
    other = (idx + torch.eye(12, dtype=torch.long)) % 23   # row t has another token at t
    before, after = logits_of(model, idx), logits_of(model, other)
    for t in range(12):
        assert torch.equal(before[t, :t], after[t, :t])
        assert (before[t, t:] != after[t, t:]).any(dim=-1).all()   # and moves all from there on


# ---------------------------------------------------------------------------------------------------------------------
# the head and what blocks add

@pytest.mark.parametrize('cap', [0.5, 15.0])
def test_softcap_bounds_logits_and_keeps_their_order(cap):
    capped, plain = (make(softcap=softcap) for softcap in (cap, None))
    for model in (capped, plain):
        model.transformer.wte.weight.data *= 4
    logits, free = logits_of(capped, tokens()), logits_of(plain, tokens())
    assert logits.abs().max() <= cap < free.abs().max()
    assert logits.abs().max() > 0.6 * cap
    assert logits.gather(-1, free.argsort(dim=-1)).diff().min() >= 0
    assert capped(tokens())[0].abs().max() <= cap   # the last position alone, too


def fresh_hidden(dtype=torch.float64, **changes):
    """What a new model makes of tokens, and what it would without its blocks."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes})).to(dtype)
    x = model.transformer.wte(tokens())
    if model.config.pos == 'learned':
        x = x + model.transformer.wpe.weight
    return model.hidden_states(tokens()), model.transformer.ln_f(x)


@pytest.mark.parametrize('others', [*ARCHS.values(), {'pos': 'alibi', 'layer_scale': 0.1}],
                         ids=[*ARCHS, 'alibi, layer_scale'])
def test_blocks_that_begin_at_zero_are_the_identity(others):
    assert torch.equal(*fresh_hidden(**{**others, 'zero_init': True}))
    assert (torch.sub(*fresh_hidden(**{**others, 'zero_init': False}))).abs().max() > 1e-4


@with_each({'speedrun': ARCHS['speedrun'], 'zero_init, untied': SWITCHES['zero_init, untied']})
def test_an_untied_head_that_begins_at_zero_guesses_evenly(changes):
    logits, loss = GPT(GPTConfig(**SHAPE, **changes))(tokens(), tokens(seed=1))
    assert not logits.any()
    assert loss.item() == pytest.approx(math.log(23), rel=1e-7)


def test_small_gains_make_blocks_nearly_the_identity():
    assert 0 < torch.sub(*fresh_hidden(layer_scale=1e-8)).abs().max() < 1e-7
    assert torch.sub(*fresh_hidden()).abs().max() > 1e-3


def test_an_untied_head_is_a_matrix_of_its_own():
    model = make(tie_weights=False)
    table, head = model.transformer.wte.weight, model.lm_head.weight
    assert head.data_ptr() != table.data_ptr() and not torch.equal(head, table)
    assert {id(table), id(head)} <= {id(p) for p in model.parameters()}
    model(tokens(), tokens(seed=1))[1].backward()
    seen = torch.zeros(23, dtype=torch.bool).index_fill(0, tokens().flatten(), True)
    assert torch.equal(table.grad.any(dim=1), seen)   # an id that is not read sends the table nothing
    assert head.grad.any(dim=1).all()


@with_each(ALL, fast=FEW)
def test_every_parameter_gets_a_gradient(changes):
    model = make(**{**changes, 'window': changes.get('window') if changes.get('window') != 1 else None})
    model(tokens(), tokens(seed=1))[1].backward()
    for name, p in model.named_parameters():   # with a window of 1 queries and keys decide nothing
        assert p.grad is not None and p.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize('changes', [{}, {'layer_scale': 0.1, 'qk_norm': True}])
def test_at_the_first_step_zeros_hide_what_is_before_them_inside_their_blocks(changes):
    """A gradient goes back through c_proj, at zero, to nothing; a gain learns nothing from an output of zero. The
    residual stream passes by, so the tables and c_proj itself do learn."""
    model = GPT(GPTConfig(**SHAPE, **changes, zero_init=True))
    model(tokens(), tokens(seed=1))[1].backward()
    still = {name for name, p in model.named_parameters() if not p.grad.any()}
    hidden = ('ln_1', 'ln_2', 'c_attn', 'q_norm', 'k_norm', 'c_fc', 'scale_1', 'scale_2')
    assert still == {name for name, p in model.named_parameters() if name.split('.')[-2] in hidden}


def test_at_the_first_step_a_head_of_zeros_hides_all_but_itself():
    model = GPT(GPTConfig(**SHAPE, **ARCHS['speedrun']))
    model(tokens(), tokens(seed=1))[1].backward()
    assert [name for name, p in model.named_parameters() if p.grad.any()] == ['lm_head.weight']


# ---------------------------------------------------------------------------------------------------------------------
# dropout

def only_dropout_at(site, **changes):
    """A model in training mode of which only one of its sites drops anything."""
    model = make(dropout=0.5, **changes).train()
    model.dropout_p = 0.5 if site == 'embeddings' else 0.0
    for block in model.transformer.h:
        block.attn.dropout_p = 0.5 if site == 'attention weights' else 0.0
        block.dropout_p = 0.5 if site.startswith('output') else 0.0
        for part in (block.attn, block.mlp):
            if site.startswith('output') and not site.endswith(type(part).__name__):
                part.c_proj.weight.data.zero_()
                part.c_proj.bias.data.zero_()   # nothing comes out, so nothing can be dropped
    return model


@pytest.mark.parametrize(('site', 'attention'), [
    ('embeddings', 'auto'), ('output of CausalSelfAttention', 'auto'), ('output of MLP', 'auto'),
    *(('attention weights', method) for method in METHODS)])
def test_dropout_acts_in_training_and_not_in_evaluation(site, attention):
    model, idx = only_dropout_at(site, attention=attention), tokens()
    assert not torch.equal(logits_of(model, idx), logits_of(model, idx))
    model.eval()
    assert torch.equal(logits_of(model, idx), logits_of(model, idx))


@pytest.mark.parametrize('attention', METHODS)
def test_dropped_attention_weights_keep_the_mean(attention):
    torch.manual_seed(0)
    q = k = torch.zeros(4000, 1, 8, 1)   # all weights of the last position are 1/8
    share = attend(q, k, torch.ones(4000, 1, 8, 1), 0.25, attention=attention)[:, 0, -1, 0] * 8 * 0.75   # how many stay
    assert torch.equal(share.round(), share.round().clamp(0, 8))
    torch.testing.assert_close(share, share.round(), rtol=0, atol=1e-4)
    assert share.mean().item() == pytest.approx(6, abs=0.1)   # 4 standard errors


def test_no_dropout_is_drawn_when_it_is_zero():
    model = make().train()
    state = torch.get_rng_state()
    logits_of(model, tokens())
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# configuration and initialisation

@pytest.mark.parametrize(('changes', 'words'), [
    ({'n_embd': 30}, ['n_embd=30', 'n_head=4', 'such as 32']),
    ({'dropout': 1.0}, ['dropout=1.0', 'such as 0.1']),
    ({'dropout': -0.1}, ['dropout=-0.1', 'such as 0.1']),
    ({'dropout': math.nan}, ['dropout=nan', 'such as 0.1']),
    ({'attention': 'flash'}, ["attention='flash'", "'auto', 'sdpa', 'math'"]),
    ({'gelu': 'exact'}, ["gelu='exact'", "'tanh', 'erf'"]),
    *(({name: 0}, [f'{name}=0', 'expected 1 or more']) for name in SHAPE),
    ({'n_head': -4}, ['n_head=-4', 'expected 1 or more']),
    ({'pos': 'rotary'}, ["pos='rotary'", "'learned', 'rope', 'alibi'"]),
    ({'norm': 'batchnorm'}, ["norm='batchnorm'", "'layernorm', 'rmsnorm'"]),
    ({'mlp': 'silu'}, ["mlp='silu'", "'gelu', 'relu2', 'swiglu'"]),
    ({'pos': None}, ['pos=None', 'expected one of']),
    *(({name: 0}, [f'{name}=0', 'expected 1 or more']) for name in ('n_kv_head', 'window', 'head_dim', 'n_inner')),
    ({'n_kv_head': 3}, ['n_head=4', 'n_kv_head=3', 'a divisor of n_head']),
    ({'n_kv_head': 8}, ['n_head=4', 'n_kv_head=8', 'a divisor of n_head']),
    ({'pos': 'rope', 'n_embd': 20}, ["pos='rope'", 'an even n_embd / n_head', 'not 5']),
    ({'rope_scaling': (8, 1, 4)}, ["rope_scaling=('llama3', 8, 1, 4)", 'factor']),
    ({'rope_scaling': ('linear', 0)}, ["rope_scaling=('linear', 0)", 'factor']),
    ({'rope_scaling': ('dynamic', 2)}, ["rope_scaling=('dynamic', 2)", 'factor']),
    ({'rope_scaling': ('yarn', 1, 2, 3)}, ["rope_scaling=('yarn', 1, 2, 3)", 'factor']),
    ({'rope_scaling': ('yarn', 2.0)}, ["rope_scaling=('yarn', 2.0)", "'linear'", "'dynamic'"]),
    ({'rope_scaling': ('llama3', 8, 1, 4, 0)}, ["rope_scaling=('llama3', 8, 1, 4, 0)", 'factor']),
    *(({'softcap': value}, [f'softcap={value}', 'expected', '0']) for value in (0, -1.0, math.nan, math.inf)),
    *(({name: 0.0}, [f'{name}=0.0', 'expected', '0']) for name in ('layer_scale', 'norm_eps', 'rope_base')),
])
def test_an_impossible_configuration_is_an_error_with_value_and_remedy(changes, words):
    with pytest.raises(ValueError) as refusal:
        GPTConfig(**{**SHAPE, **changes})
    for word in words:
        assert word in str(refusal.value)


def test_to_dict_has_nanogpts_fields_and_those_that_are_not_default():
    old = {**SHAPE, 'dropout': 0.1, 'bias': False}
    assert GPTConfig(**old, attention='math').to_dict() == old
    assert GPTConfig(**old, gelu='erf').to_dict() == {**old, 'gelu': 'erf'}
    assert GPTConfig(**GPTConfig(**old, gelu='erf').to_dict()) == GPTConfig(**old, gelu='erf')


@with_each(ALL, fast=EACH)
def test_to_dict_of_a_configuration_makes_the_same_configuration_again(changes):
    config = GPTConfig(**{**SHAPE, **changes})
    stored = json.loads(json.dumps(config.to_dict()))
    assert GPTConfig(**stored) == config
    assert set(stored) == set(NANOGPT_FIELDS) | {name for name, value in changes.items()
                                                 if value != getattr(GPTConfig(), name)}
    GPT(GPTConfig(**stored)).load_state_dict(make(**changes).state_dict())


def test_the_defaults_are_gpt2():
    assert GPTConfig(**ARCHS['gpt2']) == GPTConfig()


@pytest.fixture(scope='module')
def fresh():
    """A new model, wide enough for statistics."""
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=512, block_size=64, n_layer=3, n_embd=128, n_head=4))


def test_the_four_numbers_of_earlier_checkpoints_are_those_of_llama_3():
    assert GPTConfig(pos='rope', rope_scaling=[8.0, 1.0, 4.0, 8192]).rope_scaling == ('llama3', 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(('ending', 'count', 'std'), [
    ('wte.weight', 1, 0.02), ('wpe.weight', 1, 0.02), ('attn.c_attn.weight', 3, 0.02), ('mlp.c_fc.weight', 3, 0.02),
    ('attn.c_proj.weight', 3, 0.02 / 6 ** 0.5), ('mlp.c_proj.weight', 3, 0.02 / 6 ** 0.5),   # 3 layers add 2 each
])
def test_matrices_are_normal_with_the_documented_standard_deviation(fresh, ending, count, std):
    found = [p.detach().double() for name, p in fresh.named_parameters() if name.endswith(ending)]
    assert len(found) == count
    for p in found:
        n = p.numel()
        assert abs(p.mean().item()) < 5 * std / n ** 0.5
        assert p.std().item() == pytest.approx(std, rel=5 / (2 * n) ** 0.5)
        assert ((p / std) ** 4).mean().item() == pytest.approx(3, rel=5 * (96 / n) ** 0.5 / 3)   # a uniform has 1.8


def test_vectors_begin_at_zero_and_norms_at_one(fresh):
    vectors = {name: p for name, p in fresh.named_parameters() if p.dim() == 1}
    assert len(vectors) == 3 * 8 + 2
    for name, p in vectors.items():
        assert torch.equal(p, torch.zeros_like(p) if name.endswith('bias') else torch.ones_like(p)), name


@with_each(ALL, fast=EACH)
def test_every_field_initialises_its_parameters_as_documented(changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    for name, p in model.named_parameters():
        module, zero = name.split('.')[-2], model.config.zero_init
        if module.startswith('scale'):
            assert torch.equal(p, torch.full((model.config.n_embd,), 0.1)), name
        elif p.dim() == 1:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith('bias') else torch.ones_like(p)), name
        elif module in ('c_proj', 'lm_head') and zero:
            assert not p.any(), name
        else:
            std = 0.01 if module == 'c_proj' else 0.02   # of 2 layers
            assert p.std().item() == pytest.approx(std, rel=5 / (2 * p.numel()) ** 0.5), name


def test_initial_loss_is_that_of_a_guess(fresh):
    loss = fresh(tokens(8, 64, 512), tokens(8, 64, 512, seed=1))[1]
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)


def test_head_and_token_table_are_one_matrix():
    model = make()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [name for name, _ in model.named_parameters() if 'wte' in name or 'lm_head' in name] == \
        ['transformer.wte.weight']
    model(tokens(), tokens(seed=1))[1].backward()
    unseen = sorted(set(range(23)) - set(tokens().flatten().tolist()))
    assert model.transformer.wte.weight.grad[unseen].abs().sum(dim=1).min() > 0   # as a head, each id gets gradient


# ---------------------------------------------------------------------------------------------------------------------
# arithmetic

def on_paper(**shape):
    """A model that has shapes and no numbers."""
    with torch.device('meta'):
        return GPT(GPTConfig(**shape))


@pytest.mark.parametrize(('n_layer', 'n_embd', 'n_head', 'published'), [
    (12, 768, 12, 124_439_808), (24, 1024, 16, 354_823_168), (36, 1280, 20, 774_030_080), (48, 1600, 25, 1_557_611_200),
])
def test_parameters_of_gpt2_are_as_many_as_published(n_layer, n_embd, n_head, published):
    model = on_paper(vocab_size=50257, n_layer=n_layer, n_embd=n_embd, n_head=n_head)
    assert model.get_num_params(non_embedding=False) == published
    assert model.get_num_params() == published - 1024 * n_embd


@pytest.mark.parametrize(('V', 'T', 'L', 'C', 'bias'), [
    (65, 64, 4, 128, True), (65, 256, 6, 384, False), (50304, 1024, 12, 768, False), (7, 1, 1, 4, True),
])
def test_parameters_and_flops_follow_their_closed_forms(V, T, L, C, bias):
    vectors = (1 + bias) * (2 * L + 1) * C + bias * L * (3 + 1 + 4 + 1) * C
    matrices = V * C + L * 12 * C * C
    model = on_paper(vocab_size=V, block_size=T, n_layer=L, n_embd=C, n_head=4, bias=bias)
    assert model.get_num_params(non_embedding=False) == matrices + vectors + T * C
    assert model.get_num_params() == matrices + vectors
    assert model.flops_per_token() == 6 * (matrices + vectors) + 12 * L * C * T


@pytest.mark.parametrize(('C', 'H', 'width'), [
    (384, 6, 1024), pytest.param(768, 12, 2048, marks=pytest.mark.full), (160, 2, 448)])   # 8/3 C, upwards
@pytest.mark.parametrize('n_kv_head', [None, full(1), 2])
@pytest.mark.parametrize('arch', ARCHS)
def test_parameters_and_flops_of_every_arch_follow_their_closed_forms(arch, n_kv_head, C, H, width):
    V, T, L, D = 50304, 256, 3, C // H
    attention = 2 * C * C + 2 * C * (n_kv_head or H) * D
    block, heads, positions = {'gpt2': (attention + 8 * C * C + 2 * C, 1, T * C),
                               'llama': (attention + 3 * C * width + 2 * C, 2, 0),
                               'qwen3': (attention + 3 * C * width + 2 * C + 2 * D, 1, 0),
                               'speedrun': (attention + 8 * C * C + 2 * C + 2 * D, 2, 0)}[arch]
    model = on_paper(block_size=T, n_layer=L, n_embd=C, n_head=H, n_kv_head=n_kv_head, bias=False, **ARCHS[arch])
    used = V * C + L * block + C
    assert model.get_num_params(non_embedding=False) == used + (heads - 1) * V * C + positions
    assert model.get_num_params() == used
    assert model.flops_per_token() == 6 * used + 12 * L * C * T


@pytest.mark.parametrize(('changes', 'more'), [
    ({'mlp': 'swiglu'}, (16 + 1) * 64),   # a third matrix: 2/3 of 64, in steps of 64, is 64
    ({'n_kv_head': 1}, -(16 + 1) * 3 * 4 * 2),
    ({'norm': 'rmsnorm'}, -2 * 16), ({'qk_norm': True}, 2 * 4), ({'layer_scale': 0.1}, 2 * 16),
])
def test_a_switch_changes_a_block_by_so_many_parameters(changes, more):
    def of_a_block(**changes):
        one, two = (on_paper(**{**SHAPE, **changes, 'n_layer': n}).get_num_params() for n in (1, 2))
        return two - one

    assert of_a_block(**changes) == of_a_block() + more


@pytest.mark.parametrize('window', [1, 5, 12, 20])
def test_flops_count_the_window_or_the_context_whichever_is_shorter(window):
    plain, model = on_paper(**SHAPE), on_paper(**SHAPE, window=window)
    assert plain.flops_per_token() - model.flops_per_token() == 12 * 2 * 16 * (12 - min(window, 12))


@with_each(CASES, fast=FEW)
def test_flops_per_token_are_those_that_torch_counts(changes):
    """All but 6 for each bias and norm, which the formula counts as if it were a matrix: under 3 %
    here, less in wider models. Plus the scores outside a window, which are computed and not used."""
    model, idx = make(n_layer=3, attention='math', **{'n_embd': 64, **changes}), tokens()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    outside = 12 * 3 * model.config.n_embd * (12 - min(model.config.window or 12, 12))
    expected = (model.flops_per_token() - 6 * vectors + outside) * idx.numel()
    with FlopCounterMode(display=False) as counter:
        loss = model(idx, idx)[1]
        assert counter.get_total_flops() == pytest.approx(expected / 3, rel=1e-12)   # a third is the forward pass
        loss.backward()
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)
    assert 6 * vectors < (0.03 if model.config.n_embd == 64 else 0.05) * model.flops_per_token()


@pytest.mark.parametrize('trained', ['all', 'c_proj', 'h.2', 'lm_head', 'ln_f', 'adapters'])
def test_flops_of_a_model_that_is_trained_in_part_are_near_those_that_torch_counts(trained):
    """A layer counts as a whole: it passes a gradient if anything in it or before it is trained."""
    model, idx = make(n_layer=3, attention='math', n_embd=64, tie_weights=False), tokens()
    if trained == 'adapters':
        lora.put(model, 2, 4.0, 0.0, 'attn|mlp')
    elif trained != 'all':
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert model.flops_per_token(idx.size(1)) * idx.numel() == pytest.approx(counter.get_total_flops(), rel=0.08)


# ---------------------------------------------------------------------------------------------------------------------
# a shorter context

def test_a_cropped_context_gives_the_same_logits():
    model = make()
    whole, positions = logits_of(model, tokens(length=5)), model.transformer.wpe.weight.detach().clone()
    model.crop_block_size(5)
    assert torch.equal(logits_of(model, tokens(length=5)), whole)
    assert model.config.block_size == model.transformer.wpe.num_embeddings == 5
    assert torch.equal(model.transformer.wpe.weight, positions[:5])
    assert model.transformer.wpe.weight.untyped_storage().nbytes() == 5 * 16 * 8   # the rest is not kept
    assert isinstance(model.transformer.wpe.weight, torch.nn.Parameter)
    with pytest.raises(AssertionError):
        model(tokens(length=6))
    GPT(model.config).load_state_dict(model.state_dict())


@with_each({name: changes for name, changes in ALL.items() if changes.get('pos', 'learned') != 'learned'}, fast=FEW)
def test_a_cropped_context_without_a_table_of_positions_gives_the_same_logits(changes):
    model = make(**changes)
    whole, weights = logits_of(model, tokens(length=5)), {**model.state_dict()}
    model.crop_block_size(5)
    assert torch.equal(logits_of(model, tokens(length=5)), whole)
    assert model.config.block_size == 5
    assert model.state_dict().keys() == weights.keys() and not any('wpe' in name for name in weights)
    with pytest.raises(AssertionError):
        model(tokens(length=6))
    GPT(model.config).load_state_dict(model.state_dict())


@pytest.mark.parametrize('changes', [{'pos': 'rope'}, {'pos': 'alibi'}, {'pos': 'rope', 'window': 5}], ids=str)
def test_a_context_without_a_table_of_positions_can_grow(changes):
    model, longer = make(**changes), make(**changes, block_size=30)
    model.crop_block_size(30)
    assert torch.equal(logits_of(model, tokens(length=30)), logits_of(longer, tokens(length=30)))


@pytest.mark.parametrize('block_size', [13, 0, -1])
def test_a_table_of_positions_cannot_be_grown_or_emptied(block_size):
    model = make()
    with pytest.raises(ValueError, match=f'block_size={block_size}: this model has 12 positions'):
        model.crop_block_size(block_size)
    assert model.config.block_size == 12


# ---------------------------------------------------------------------------------------------------------------------
# dropout

@pytest.mark.parametrize('p', [0.0, 0.1, 0.2, 0.5, 0.9])
def test_dropout_zeroes_a_share_of_the_elements_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(401, 1003, requires_grad=True)   # no multiple of four elements
    y = dropout(x, p)
    assert all(value in (0.0, pytest.approx(1 / (1 - p))) for value in y.unique().tolist())
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=4e-3)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())   # the gradient passes where the value does


def test_dropout_is_a_function_of_torchs_seed_and_differs_at_each_call():
    x = torch.ones(1000)
    torch.manual_seed(5)
    one, two = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.5), one) and torch.equal(dropout(x, 0.5), two)
    both = ((one == 0) & (two == 0)).float().mean().item()
    assert both == pytest.approx(0.25, abs=0.05)   # independent


def test_neighbouring_elements_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(400_000), 0.2) == 0).float() - 0.2
    for distance in (1, 2, 3, 4, 64):
        assert abs((dropped[distance:] * dropped[:-distance]).mean().item()) < 2e-3, distance


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT's Python interface, used as its tutorials use it

@pytest.fixture(scope='module')
def gpt2_folder(tmp_path_factory):
    """A folder in the format of Hugging Face with a small GPT-2 that has random weights, and the model in it."""
    folder, model = tmp_path_factory.mktemp('hf') / 'gpt2', make(torch.float32, vocab_size=27)
    pretrained.save(folder, model, 'gpt2', torch.float32, tokenizer.CharTokenizer('abcdefghijklmnopqrstuvwxyz '))
    return folder, model


def test_from_pretrained_reads_a_local_folder(gpt2_folder):
    folder, expected = gpt2_folder
    model = GPT.from_pretrained(str(folder), dict(dropout=0.1))
    assert model.config.dropout == 0.1 and expected.config.dropout == 0.0
    assert torch.equal(logits_of(model.eval(), tokens()), logits_of(expected, tokens()))


def test_a_training_loop_of_a_tutorial_works_and_estimates_mfu():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=4, n_embd=16, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    losses = []
    for _ in range(20):
        logits, loss = model(tokens(rows=4), tokens(rows=4, seed=1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert logits.shape == (4, 12, 23)
    assert losses[-1] < losses[0] - 0.5
    assert model.estimate_mfu(4, 0.5) == model.flops_per_token() * 12 * 4 / 0.5 / 312e12
    assert model.estimate_mfu(fwdbwd_per_iter=4, dt=0.5, peak_flops=1e9) == model.flops_per_token() * 12 * 4 / 0.5 / 1e9


def test_configure_optimizers_decays_matrices_only():
    model = make(torch.float32)
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=3e-4, betas=(0.9, 0.99), device_type='cpu')
    decayed, plain = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.1, 0.0)
    assert (decayed['lr'], decayed['betas']) == (3e-4, (0.9, 0.99))
    assert {p for p in model.parameters() if p.dim() >= 2} == set(decayed['params'])
    assert {p for p in model.parameters() if p.dim() < 2} == set(plain['params'])


def test_generate_returns_the_prompt_and_new_ids_past_the_context_too():
    model = make(torch.float32)
    for T in (1, 4, 12, 15):
        idx = tokens(2, T)
        text = model.generate(idx, 10, temperature=0.8, top_k=5)
        assert text.shape == (2, T + 10) and text.dtype == torch.long
        assert torch.equal(text[:, :T], idx)
        assert 0 <= text.min() and text.max() < 23
    assert torch.equal(model.generate(idx, 0), idx)


@with_each(ALL, fast=FEW)
def test_generate_without_temperature_takes_the_likeliest_token_of_the_last_block_size(changes):
    model = make(torch.float32, **changes)
    text = model.generate(tokens(2, 5), 12, temperature=0)
    assert torch.equal(text, model.generate(tokens(2, 5), max_new_tokens=12, temperature=1.0, top_k=1))
    for t in range(5, 17):
        assert torch.equal(text[:, t], logits_of(model, text[:, max(t - 12, 0):t])[:, -1].argmax(dim=-1))


def test_generate_follows_the_softmax_of_the_top_k_and_the_temperature():
    model = make(torch.float32)
    logits = model(tokens(1, 4))[0][0, -1].detach() / 0.7
    logits[logits.argsort()[:-3]] = -math.inf
    torch.manual_seed(0)
    drawn = model.generate(tokens(1, 4).expand(4000, -1), 1, temperature=0.7, top_k=3)[:, -1]
    share = drawn.bincount(minlength=23) / 4000
    assert (share - logits.softmax(dim=-1)).abs().max() < 0.04   # 5 standard errors
    assert not share[logits == -math.inf].any()


def test_generate_keeps_no_graph_and_is_repeated_by_torchs_seed():
    model, texts = make(torch.float32), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(tokens(), 20, top_k=None))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert not model(texts[0][:, :12])[0].is_inference()   # what follows can still be trained


def test_crop_block_size_and_get_num_params_are_those_of_the_tutorials():
    model = make(torch.float32)
    n, non_embedding = model.get_num_params(non_embedding=False), model.get_num_params()
    assert n - non_embedding == 12 * 16
    model.crop_block_size(8)
    assert model.config.block_size == 8
    assert (model.get_num_params(False), model.get_num_params()) == (n - 4 * 16, non_embedding)
    assert model.generate(tokens(1, 8), 4).shape == (1, 12)
