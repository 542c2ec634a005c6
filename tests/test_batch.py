"""
Continuous batching: each request gets what it would get alone, whoever joins and leaves meanwhile.
"""

import random

import pytest
import torch

from flatgpt import batching, engine
from flatgpt.batching import Batch, Request
from model import ARCHS, GPT, GPTConfig

SHAPE = {'vocab_size': 50, 'block_size': 48, 'n_layer': 2, 'n_head': 4, 'n_embd': 32}
MODELS = {**ARCHS, 'grouped heads': {**ARCHS['llama'], 'n_kv_head': 2}, 'alibi': {**ARCHS['gpt2'], 'pos': 'alibi'},
          'window': {**ARCHS['llama'], 'window': 9}}


def make_model(name):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, **MODELS[name])).eval()
    for p in model.parameters():   # so that the likeliest token is clear
        p.data.mul_(3)
    return model


def requests(number, seed=0):
    generator = random.Random(seed)
    made = []
    for row in range(number):
        ids = torch.tensor([generator.randrange(50) for _ in range(generator.randint(1, 20))])
        controls = generator.choice([{'temperature': 0.0}, {'top_k': 5}, {'top_p': 0.8, 'temperature': 0.7},
                                     {'min_p': 0.1, 'repetition_penalty': 1.3}])
        made.append(Request(ids, generator.randint(1, 40), seed=generator.randrange(1000), row=row, **controls))
    return made


def alone(model, request):
    """What generate() gives for a request, as far as its context reaches."""
    number = min(request.max_new_tokens, SHAPE['block_size'] - len(request.ids))
    steps = engine.generate(model, [request.ids], number, request.temperature, request.top_k, request.top_p,
                            request.min_p, request.repetition_penalty, request.seed, request.row, log_probs=True)
    return [(token.item(), log_prob.item()) for token, log_prob in steps]


@pytest.mark.parametrize('name', MODELS)
def test_a_request_gets_what_it_gets_alone_whoever_joins_and_leaves(name):
    model = make_model(name)
    waiting = requests(14)
    everything = list(waiting)
    generator = random.Random(1)
    batch = Batch(model, rows=4)
    got = {request: [] for request in everything}
    left = set()
    while waiting or batch.requests:
        steps = []
        while waiting and len(batch.requests) < 4 and generator.random() < 0.7:
            steps.append(batch.add(waiting.pop(0)))
        added = {step.request for step in steps}
        for step in steps:
            got[step.request].append((step.token, step.log_prob))
        for request in [request for request in batch.requests if request.finished]:
            batch.remove(request)
        for step in batch.step():
            got[step.request].append((step.token, step.log_prob))
        for request in list(batch.requests):
            leaves = generator.random() < 0.02 and request not in added
            if request.finished or leaves:
                if leaves and not request.finished:
                    left.add(request)
                batch.remove(request)
    for request in everything:
        expected = alone(model, request)
        if request in left:
            expected = expected[:len(got[request])]
        assert [token for token, _ in got[request]] == [token for token, _ in expected]
        assert [p for _, p in got[request]] == pytest.approx([p for _, p in expected], abs=1e-4)
    assert len(left) < len(everything)


def test_the_likeliest_tokens_come_with_their_log_probabilities():
    model = make_model('gpt2')
    ids = torch.tensor([3, 4])
    batch = Batch(model, rows=1)
    step = batch.add(Request(ids, 2, temperature=0.0, top_log_probs=3))
    expected = model(ids[None])[0][0, -1].log_softmax(dim=-1).topk(3)
    assert [i for i, _ in step.top] == expected.indices.tolist()
    assert [p for _, p in step.top] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert (step.token, step.log_prob) == step.top[0]
    assert batch.step()[0].top[0][0] == batch.requests[0].tokens[-1]


def test_ids_that_pad_the_vocabulary_are_never_sampled():
    model = make_model('gpt2')
    batch = Batch(model, rows=1, vocab_size=7)
    batch.add(Request(torch.tensor([1]), 30, temperature=5.0))
    assert all(step.token < 7 for _ in range(29) for step in batch.step())


def test_a_full_batch_a_full_context_and_an_empty_prompt_are_refused():
    model = make_model('gpt2')
    batch = Batch(model, rows=1)
    with pytest.raises(ValueError, match='48 tokens'):
        batch.add(Request(torch.zeros(48, dtype=torch.long), 1))
    batch.add(Request(torch.tensor([1]), 5))
    with pytest.raises(ValueError, match='1 requests'):
        batch.add(Request(torch.tensor([1]), 5))
    with pytest.raises(ValueError, match='empty prompt'):
        Request(torch.tensor([], dtype=torch.long), 5)
    with pytest.raises(ValueError, match='top_p'):
        Request(torch.tensor([1]), 5, top_p=2.0)


def test_a_row_of_nan_is_told_and_disturbs_no_other():
    model = make_model('gpt2')
    batch = Batch(model, rows=2)
    good, bad = Request(torch.tensor([1]), 5, seed=1), Request(torch.tensor([2]), 5)
    alone = Batch(model, rows=1)
    expected = [alone.add(good).token] + [alone.step()[0].token for _ in range(3)]
    steps = [batch.add(good)]
    batch.add(bad)
    with torch.inference_mode():
        batch.cache.layers[0][1, 1] = float('nan')
    found = {step.request: step.token for step in batch.step()}
    assert found[bad] is None
    steps = [steps[0].token, found[good]]
    batch.remove(bad)
    assert steps + [batch.step()[0].token for _ in range(2)] == expected


def test_what_leaves_frees_its_place_and_its_memory_is_used_again():
    model = make_model('gpt2')
    batch = Batch(model, rows=2)
    for _ in range(5):
        batch.add(Request(torch.tensor([1]), 40))
        batch.add(Request(torch.tensor([2, 3]), 40))
        for _ in range(30):
            batch.step()
        for request in list(batch.requests):
            batch.remove(request)
    assert batch.cache.layers[0].size(3) <= SHAPE['block_size']
    assert batch.cache.active == 0
    assert batch.step() == []


@pytest.mark.parametrize('name', MODELS)
def test_a_session_continues_a_text_as_if_it_were_new_and_encodes_only_what_is_new(name):
    model = make_model(name)
    session = batching.Session(model)
    encoded = []
    real = model.next_logits
    model.next_logits = lambda idx, cache: encoded.append(idx.size(1)) or real(idx, cache)
    ids = [1, 2, 3]
    for turn, (keep, new, number) in enumerate(
            [(3, [], 6), (9, [4, 5], 5), (16, [], 1), (6, [9, 9, 9], 9), (0, [7], 40)]):
        prompt = torch.tensor(ids[:keep] + new)
        request = Request(prompt, number, temperature=0.9, seed=turn, repetition_penalty=1.1)
        encoded.clear()
        got = [token for token, _ in session.generate(request)]
        assert encoded[0] == len(prompt) if turn in (0, 4) else encoded[0] < len(prompt) or len(new) == 3
        assert encoded[0] <= len(new) + 1 or turn == 0
        assert encoded[1:] == [1] * (len(got) - 1)
        assert got == [token for token, _ in alone(model, request)]
        ids = prompt.tolist() + got


def test_a_session_refuses_a_prompt_without_room():
    with pytest.raises(ValueError, match='48 tokens in a context of 48'):
        next(batching.Session(make_model('gpt2')).generate(Request(torch.zeros(48, dtype=torch.long), 1)))
