"""What a GPU will do with the model, rehearsed without one: on the device 'meta', whose tensors have shapes but no
numbers, nothing meets what was left on the CPU, and the host does not wait more often than it must; and what
torch.compile will make one graph of is one graph."""

import functools

import pytest
import torch
from one_device import OneDevice, no_fused_adamw

from flatgpt import optim
from flatgpt.engine import decode_step, generate
from flatgpt.runtime import Runtime
from model import ARCHS, GPT, GPTConfig

META = torch.device('meta')
SHAPE = {'vocab_size': 23, 'block_size': 48, 'n_layer': 2, 'n_embd': 16, 'n_head': 4}
SWITCHES = {'gpt2': {}, 'qwen3': {**ARCHS['qwen3'], 'n_kv_head': 2}, 'speedrun': ARCHS['speedrun'],
            'alibi': {'pos': 'alibi', 'attention': 'math'}, 'window': {'pos': 'rope', 'window': 5}}
with_each = pytest.mark.parametrize('changes', SWITCHES.values(), ids=list(SWITCHES))


def a_model(**changes):
    return GPT(GPTConfig(**{**SHAPE, **changes})).to(META)


def test_the_rehearsal_finds_a_tensor_that_was_left_behind():
    with OneDevice(META) as mode:
        x = torch.zeros(3, device=META) + torch.tensor(1.0)
        x.copy_(torch.zeros(3))
        assert (mode.operators, mode.reads) == (2, 0)   # + and copy_
        assert x.sum().item() == 1 and mode.reads == 1
        with pytest.raises(AssertionError, match='aten.add.Tensor gets tensors on meta and others'):
            x + torch.zeros(3)


@with_each
def test_a_training_step_stays_on_the_device_and_never_waits(monkeypatch, changes):
    no_fused_adamw(monkeypatch)
    rt, model = Runtime(META, torch.float32, False, 0, 1), a_model(dropout=0.1, loss_chunks=2, **changes)
    optimizer = 'muon' if changes == ARCHS['speedrun'] else 'adamw'
    opt = optim.build(optimizer, model, 1e-3, (0.9, 0.95), 0.1, torch.bfloat16)
    idx = torch.zeros(3, 48, dtype=torch.long, device=META)
    with OneDevice(META) as mode:
        for _ in range(2):
            model(idx, idx)[1].backward()
            rt.clip_gradients(model, 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
    assert mode.operators > 300 and mode.reads == 0
    assert {p.device for p in model.parameters()} == {META}


@pytest.mark.parametrize('name, static', [
    ('qwen3', True), ('alibi', False), pytest.param('gpt2', False, marks=pytest.mark.full),
    pytest.param('window', True, marks=pytest.mark.full)])
def test_decoding_stays_on_the_device_and_waits_for_it_every_32_tokens(name, static):
    model = a_model(n_layer=1, block_size=20, **SWITCHES[name]).to(torch.bfloat16).eval()
    prompts = [torch.zeros(n, dtype=torch.long) for n in (3, 7, 1)]
    with OneDevice(META) as mode:
        steps = list(generate(model, prompts, 30, 0.8, 5, 0.9, 0.1, 1.2, vocab_size=20, static_cache=static,
                              log_probs=True))
    assert mode.operators > 30 * 50
    assert mode.reads == 3   # after the first token, at column 32, after the last token
    assert all(part.shape == (3,) and part.device == META for step in steps for part in step)


# ---------------------------------------------------------------------------------------------------------------------
# one graph: what breaks it in two is slow, and nothing says so

with_each_way = pytest.mark.parametrize('name', ['qwen3', *(pytest.param(name, marks=pytest.mark.full)
                                                            for name in SWITCHES if name != 'qwen3')])


@pytest.fixture
def graphs():
    """A function that returns how many graphs torch.compile has made in this test."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield lambda: counters['stats']['unique_graphs']
    torch.compiler.reset()


@with_each_way
def test_a_training_step_is_one_graph(graphs, name):
    model = GPT(GPTConfig(**{**SHAPE, 'dropout': 0.1, **SWITCHES[name]}))
    fast = torch.compile(model, backend='eager', fullgraph=True)
    idx = torch.zeros(3, 48, dtype=torch.long)
    for _ in range(2):
        fast(idx, idx)[1].backward()
    assert graphs() == 1


@with_each_way
def test_all_steps_of_decoding_are_one_graph(graphs, name):
    model = GPT(GPTConfig(**{**SHAPE, **SWITCHES[name]})).eval()
    eager = functools.partial(decode_step, model)
    fast = torch.compile(eager, backend='eager', fullgraph=True)
    model.decode_step = lambda idx, cache, *rest: (fast if cache.length and idx.size(1) == 1 else eager)(
        idx, cache, *rest)
    for seed in range(2):
        prompts = [torch.full((n,), seed) for n in (3, 7, 1)]
        assert len(list(generate(model, prompts, 20, seed=seed, static_cache=True))) == 20
    assert graphs() == 1
