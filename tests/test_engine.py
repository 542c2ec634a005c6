"""Generation with a KV cache: compared with the plain loop, for every architecture; full contexts; streams."""

import gc
import math
import weakref

import pytest
import torch
from conftest import needs
from test_model import ALL, CASES, FEW, METHODS, full, logits_of, make, tokens, with_each

from flatgpt import engine, machine
from flatgpt.engine import (
    KVCache,
    cache_bytes,
    generate,
    penalize_repetition,
    random_uniform,
    sample_token,
    take_cache,
)
from flatgpt.errors import UserError
from model import GPT, GPTConfig


def generated(model, idx, n, **options):
    """The new tokens, (B, n)."""
    return torch.stack([token for token, _ in generate(model, idx, n, **options)], dim=1)


def record_steps(model, record):
    """Have a model call record(idx, kv_cache, logits) after each step of generate()."""
    step = model.next_logits

    def recorded(idx, kv_cache):
        logits = step(idx, kv_cache)
        record(idx, kv_cache, logits)
        return logits

    model.next_logits = recorded


@pytest.fixture(scope='module')
def model():
    return make(torch.float32)


def by_plain_loop(model, prompts, n):
    """The likeliest continuation of each prompt, (len(prompts), n) as lists, by the plain loop of model.py. Prompts of
    one length are one batch."""
    found = {}
    for length in sorted({len(ids) for ids in prompts}):
        rows = [k for k, ids in enumerate(prompts) if len(ids) == length]
        text = model.generate(torch.stack([prompts[k] for k in rows]), n, temperature=0)
        found |= zip(rows, text[:, length:].tolist())
    return [found[k] for k in range(len(prompts))]


RAGGED = [3, 7, 1, 6, 2]   # lengths of prompts in one batch


def prompts_of(lengths):
    return [tokens(1, n, seed=n)[0] for n in lengths]


@with_each(ALL, fast=FEW)
def test_greedy_text_with_the_cache_is_that_of_the_plain_loop(changes):
    model = make(torch.float32, **changes)
    for prompts in (prompts_of([3]), prompts_of(RAGGED), list(tokens(5, 4)), list(tokens(1, 4).expand(3, -1))):
        n = model.config.block_size - max(map(len, prompts))   # until the context is full
        expected = by_plain_loop(model, prompts, n)
        for static in (False, True):
            assert generated(model, prompts, n, temperature=0, static_cache=static).tolist() == expected, static


@with_each(ALL, fast=FEW)
def test_logits_with_the_cache_are_those_of_the_whole_context(changes):
    model = make(torch.float64, **changes)
    prompts = prompts_of(RAGGED)
    steps = []
    record_steps(model, lambda idx, kv_cache, logits: steps.append(logits))
    drawn = generated(model, prompts, 5, seed=3)
    for row, ids in enumerate(prompts):
        whole = logits_of(model, torch.cat((ids, drawn[row]))[None])[0]
        for i, logits in enumerate(steps):
            torch.testing.assert_close(logits[row], whole[len(ids) + i - 1], atol=1e-6, rtol=1e-6)


LONG = [1, 11, 12, 15, 4]   # shorter than the context of 12, and longer


@with_each(ALL, fast=['gpt2', 'mixture 0'])
def test_in_a_full_context_an_exact_window_encodes_the_last_block_size_tokens(changes):
    model, prompts = make(torch.float32, **changes), prompts_of(LONG)
    assert generated(model, prompts, 14, temperature=0, exact_window=True).tolist() == by_plain_loop(model, prompts, 14)


@pytest.mark.parametrize('changes', [{}, {'pos': 'rope'}, full({'pos': 'alibi'}), {'window': 5}, {'block_size': 1},
                                     full({'pos': 'rope', 'window': 20}), full({'block_size': 3})], ids=str)
@pytest.mark.parametrize('static', [False, full(True)], ids=['growing', 'static'])
def test_in_a_full_context_the_newer_half_is_encoded_again(changes, static):
    """Each row slides when it alone would have, whatever the others are."""
    model = make(torch.float32, **changes)
    size, prompts = model.config.block_size, prompts_of(LONG)
    expected = []
    for ids in prompts:
        text, context = ids.tolist(), min(len(ids), size)
        for _ in range(20):
            if context > size:
                context = max(size // 2, 1)
            text.append(logits_of(model, torch.tensor([text[-context:]]))[0, -1].argmax().item())
            context += 1
        expected.append(text[len(ids):])
    assert generated(model, prompts, 20, temperature=0, static_cache=static).tolist() == expected


@pytest.mark.parametrize('exact_window', [False, True])
def test_the_ids_that_begin_a_text_stay_when_its_beginning_is_dropped(exact_window):
    """Each row as it would alone: begin, then the newest tokens; a row that still fits is not changed."""
    model, begin = make(torch.float32), (3, 5)
    size, prompts = model.config.block_size, [torch.cat((torch.tensor(begin), ids)) for ids in prompts_of(LONG)]
    expected = []
    for ids in prompts:
        text, context = ids.tolist(), min(len(ids), size)
        for _ in range(20):
            if context > size:
                context = size if exact_window else size // 2
            seen = text[-context:]
            if context < len(text):
                seen = [*begin, *seen[len(begin):]]
            text.append(logits_of(model, torch.tensor([seen]))[0, -1].argmax().item())
            context += 1
        expected.append(text[len(ids):])
    found = generated(model, prompts, 20, temperature=0, begin=begin, exact_window=exact_window)
    assert found.tolist() == expected
    assert found.tolist() != generated(model, prompts, 20, temperature=0, exact_window=exact_window).tolist()


@pytest.mark.parametrize('pos', ['rope', full('alibi')])
@pytest.mark.parametrize('window', [full(1), full(2), 5, full(12)])
def test_a_window_over_relative_positions_evicts_without_end(pos, window):
    """As the same model with a context that all of the text fits into."""
    model = make(torch.float32, pos=pos, window=window)
    longer = make(torch.float32, pos=pos, window=window, block_size=100)
    longer.load_state_dict(model.state_dict())
    prompts = prompts_of(RAGGED)
    expected = by_plain_loop(longer, prompts, 40)
    lengths = []
    record_steps(model, lambda idx, kv_cache, logits: lengths.append(idx.size(1)))
    for static in (False, True):
        assert generated(model, prompts, 40, temperature=0, static_cache=static).tolist() == expected
    assert lengths == ([max(RAGGED)] + [1] * 39) * 2


def test_a_token_is_encoded_once(model):
    calls = []
    record_steps(model, lambda idx, kv_cache, logits: calls.append(tuple(idx.shape)))
    generated(model, tokens(1, 4).expand(3, -1), 20)
    del model.next_logits
    # the prompt once for all rows, then token by token; at the border of 12, and again 6 later, the newer half
    assert calls == [(1, 4), *[(3, 1)] * 8, (3, 6), *[(3, 1)] * 6, (3, 6), *[(3, 1)] * 3]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_cache_is_allocated_once_and_has_the_dtype_of_the_activations(dtype):
    model, seen = make(dtype, n_kv_head=2), []
    record_steps(model, lambda idx, kv_cache, logits: seen.append((kv_cache.keys[1], kv_cache.values[0])))
    generated(model, tokens(3, 2), 25)
    assert len({(keys.data_ptr(), values.data_ptr()) for keys, values in seen}) == 1
    assert seen[0][0].shape == seen[0][1].shape == (3, 2, 12, 4)
    assert seen[0][0].dtype == dtype


@pytest.mark.parametrize('options', [{}, {'temperature': 0.7, 'top_k': 4}, {'top_p': 0.6, 'min_p': 0.05}])
def test_generation_samples_each_token_with_its_own_random_number(model, options):
    text = tokens(1, 6)
    uniform = random_uniform(3, 2, 6)
    for i in range(6):
        token = sample_token(logits_of(model, text)[:, -1], uniform[i:i + 1], **options)
        text = torch.cat((text, token[None]), dim=1)
    assert generated(model, tokens(1, 6), 6, seed=3, first_row=2, **options).tolist() == text[:, 6:].tolist()


@pytest.mark.full
def test_greedy_tokens_are_those_of_hugging_face_with_the_same_weights():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf_model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4,
                                          bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for p in hf_model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    model = GPT(GPTConfig(97, 64, 3, 32, 4)).eval()
    matrices = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')   # which are transposed there
    model.load_state_dict({name: p.T if name.endswith(matrices) else p for name, p in hf_model.state_dict().items()})
    idx = tokens(3, 7, vocab=97)
    text = hf_model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=57, do_sample=False)
    assert len(set(text[0].tolist())) > 5
    assert generated(model, idx, 57, temperature=0).tolist() == text[:, 7:].tolist()


def test_repetition_is_penalized_for_prompt_and_text(model):
    text = tokens(1, 4)
    for _ in range(8):
        seen = torch.zeros(1, 23, dtype=torch.bool)
        seen[0, text[0]] = True
        logits = penalize_repetition(logits_of(model, text)[:, -1], seen, 1.7)
        text = torch.cat((text, logits.argmax(-1)[None]), dim=1)
    assert generated(model, tokens(1, 4), 8, temperature=0, repetition_penalty=1.7).tolist() == text[:, 4:].tolist()


def test_the_first_token_is_another_than_those_of_the_prompt_by_a_high_penalty(model):
    prompts = [ids for ids in tokens(40, 12) if logits_of(model, ids[None])[0, -1].argmax() in ids]
    assert len(prompts) > 1
    first = generated(model, prompts, 1, temperature=0, repetition_penalty=100)[:, 0]
    assert not any(token in ids for token, ids in zip(first, prompts))


def test_log_probabilities_are_the_models_own(model):
    assert all(log_prob is None for _, log_prob in generate(model, tokens(2, 3), 2))
    pairs = list(generate(model, tokens(2, 3), 6, temperature=0.5, top_k=3, log_probs=True))
    text = torch.cat((tokens(2, 3), torch.stack([token for token, _ in pairs], dim=1)), dim=1)
    p = logits_of(model, text[:, :-1]).log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.stack([log_prob for _, log_prob in pairs], dim=1), p[:, 2:], atol=1e-5, rtol=1e-5)


def test_an_empty_prompt_and_a_control_out_of_range_are_errors(model):
    with pytest.raises(ValueError, match='empty prompt'):
        next(generate(model, [torch.tensor([1]), torch.tensor([], dtype=torch.long)], 3))
    with pytest.raises(ValueError, match='top_k=0'):
        next(generate(model, tokens(), 3, top_k=0))


def test_a_sample_does_not_depend_on_how_many_are_sampled(model):
    by_count = {num: generated(model, tokens(1, 4).expand(num, -1), 20, seed=5).tolist() for num in (1, 3, 8)}
    assert by_count[1] == by_count[8][:1]
    assert by_count[3] == by_count[8][:3]
    assert len(set(map(tuple, by_count[8]))) == 8


def test_the_seed_decides_the_tokens_and_nothing_else_does(model):
    torch.manual_seed(1)
    first = generated(model, tokens(), 20, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(generated(model, tokens(), 20, seed=5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generated(model, tokens(), 20, seed=6), first)


def test_more_new_tokens_begin_like_fewer(model):
    assert torch.equal(generated(model, tokens(), 20)[:, :7], generated(model, tokens(), 7))


def test_top_k_of_one_is_greedy(model):
    assert torch.equal(generated(model, tokens(), 20, top_k=1), generated(model, tokens(), 20, temperature=0))


@pytest.mark.parametrize('options', [{}, {'temperature': 0}, {'top_k': 5}, {'temperature': 100.0}])
def test_padding_of_the_vocabulary_is_never_sampled(options):
    model = make(torch.float32)
    model.transformer.wte.weight.data[20:] *= 50   # which makes the padding loud
    assert (generated(model, tokens(8, 4), 40, **options) >= 20).any()
    assert (generated(model, tokens(8, 4), 40, **options, vocab_size=20) < 20).all()


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    model = make(torch.float32)
    model.transformer.ln_f.bias.data[3] = value
    with pytest.raises(UserError, match='NaN or infinite'):
        list(generate(model, tokens(), 3))


def test_no_new_tokens_are_none(model):
    assert list(generate(model, tokens(), 0)) == []


def test_tokens_come_one_by_one_as_they_are_made(model):
    calls = []
    hook = model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    stream = generate(model, tokens(), 5)
    assert next(stream)[0].shape == (2,)
    assert len(calls) == 1
    hook.remove()


def test_generation_keeps_no_graph(model):
    logits = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    assert not next(generate(model, tokens(), 1))[0].requires_grad
    hook.remove()
    assert not logits[0].requires_grad


def test_each_method_of_attention_gives_the_same_text():
    texts = [generated(make(torch.float32, attention=method), tokens(), 20, seed=1).tolist() for method in METHODS]
    assert texts[0] == texts[1] == texts[2]


# ---------------------------------------------------------------------------------------------------------------------
# the static cache: as large as the work, of few sizes, at one address

@pytest.mark.parametrize(('needed', 'block_size', 'columns'), [
    (1, 1024, 128), (128, 1024, 128), (129, 1024, 256), (256, 1024, 256), (257, 1024, 512), (1000, 1024, 1024),
    (1024, 1024, 1024), (600, 1000, 1000), (30, 48, 48), (1, 1, 1), (51, 131_072, 128), (70_000, 131_072, 131_072),
])
def test_a_static_cache_has_columns_for_the_work_rounded_up_to_a_power_of_two(needed, block_size, columns):
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=1, block_size=block_size, n_layer=1, n_head=1, n_embd=1, pos='alibi'))
    assert take_cache(model, 1, needed, static=True).capacity == columns


@pytest.mark.parametrize(('lengths', 'n', 'columns'), [([3], 20, 128), ([100, 3], 28, 128), ([100, 3], 29, 256),
                                                       ([250], 60, 300), ([400], 5, 300)])
def test_the_static_cache_of_a_long_context_is_as_large_as_prompt_and_new_tokens(lengths, n, columns):
    model = make(torch.float32, block_size=300, n_layer=1, n_kv_head=2)
    next(generate(model, prompts_of(lengths), n, static_cache=True))
    spare = engine.spare_caches[model]
    assert spare.keys[0].shape == spare.values[0].shape == (len(lengths), 2, columns, 4)


@pytest.mark.parametrize('changes', [{}, {'pos': 'rope', 'window': 150}, full({'pos': 'alibi'})], ids=str)
@pytest.mark.parametrize('lengths', [[126, 5], [2, 255, 90], [290, 7], [330]], ids=str)
def test_text_with_the_static_cache_is_that_with_the_growing_one(changes, lengths):
    """From one size to the next, and in a full context, where the newer half is encoded again or a window evicts."""
    model = make(torch.float32, block_size=300, n_layer=1, **changes)
    for n in (2, 3, 30):
        prompts = prompts_of(lengths)
        assert torch.equal(generated(model, prompts, n, temperature=0, static_cache=True),
                           generated(model, prompts, n, temperature=0))


def test_calls_of_one_size_share_a_static_cache_that_holds_nothing_of_the_last_text():
    model = make(torch.float32, block_size=300, n_layer=1)
    addresses = []
    for lengths, n in (([3, 9], 20), ([60, 61], 67), ([1, 1], 5)):
        for _ in range(2):
            text = generated(model, prompts_of(lengths), n, seed=1, static_cache=True)
            assert torch.equal(text, generated(model, prompts_of(lengths), n, seed=1))
            spare = engine.spare_caches[model]
            addresses.append((spare.keys[0].data_ptr(), spare.values[0].data_ptr()))
            with torch.inference_mode():
                for tensor in (*spare.keys, *spare.values):
                    tensor.fill_(math.nan)   # which a model that failed may leave
    assert len(set(addresses)) == 1
    generated(model, prompts_of([3]), 20, static_cache=True)   # other shapes have a cache of their own
    assert engine.spare_caches[model].keys[0].shape != spare.keys[0].shape


def test_two_texts_at_a_time_do_not_share_a_static_cache():
    model = make(torch.float32, n_layer=1)
    prompts = [prompts_of([3]), prompts_of([4])]
    alone = [generated(model, prompt, 12, seed=2) for prompt in prompts]
    generated(model, prompts[0], 12, static_cache=True)
    streams = [generate(model, prompt, 12, seed=2, static_cache=True) for prompt in prompts]
    in_turn = torch.stack([torch.stack((one, other)) for (one, _), (other, _) in zip(*streams)], dim=-1)
    assert torch.equal(in_turn[0], alone[0]) and torch.equal(in_turn[1], alone[1])


def test_a_stream_that_is_closed_early_gives_its_static_cache_back():
    model = make(torch.float32, n_layer=1)
    stream = generate(model, tokens(), 12, static_cache=True)
    next(stream)
    assert model not in engine.spare_caches
    stream.close()
    address = engine.spare_caches[model].keys[0].data_ptr()
    generated(model, tokens(), 12, static_cache=True)
    assert engine.spare_caches[model].keys[0].data_ptr() == address
    generated(model.to(torch.bfloat16), tokens(), 12, static_cache=True)   # and follows the model to another dtype
    assert engine.spare_caches[model].keys[0].dtype == torch.bfloat16


def test_a_static_cache_lives_no_longer_than_its_model():
    model = make(torch.float32, n_layer=1)
    generated(model, tokens(), 3, static_cache=True)
    cache = weakref.ref(engine.spare_caches[model])
    del model
    gc.collect()
    assert cache() is None


def test_equal_prompts_are_encoded_once_with_a_static_cache_too(model):
    calls = []
    record_steps(model, lambda idx, kv_cache, logits: calls.append(tuple(idx.shape)))
    for length in (4, 1):
        generated(model, tokens(1, length).expand(3, -1), 3, static_cache=True)
    del model.next_logits
    assert calls == [(1, 4), (3, 1), (3, 1), *[(3, 1)] * 3]   # a prompt of one token looks like any step


@pytest.mark.full
@needs('c_compiler')
@pytest.mark.filterwarnings('ignore')   # of torch's own modules
def test_a_compiled_step_serves_all_prompts_of_a_size(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', '')
    monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
    machine.set_compile_cache()
    torch._dynamo.reset()
    counters.clear()
    model, plain = (make(torch.float32, block_size=1024, pos='rope', n_kv_head=2) for _ in range(2))
    engine.compile_step(model)
    graphs = []
    for lengths, n in (([5, 9], 20), ([30, 3], 9), ([60, 61], 67), ([100, 90], 60), ([40, 130], 9), ([300, 2], 9)):
        prompts = prompts_of(lengths)
        assert torch.equal(generated(model, prompts, n, temperature=0, static_cache=True),
                           generated(plain, prompts, n, temperature=0))
        graphs.append(counters['stats']['unique_graphs'])
    assert graphs == [1, 1, 1, 2, 2, 2]   # for 128 columns; for any number of them
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------------------
# the KV cache alone

@pytest.mark.parametrize('itemsize, dtype', [(2, torch.bfloat16), (4, torch.float32)])
@with_each({name: CASES[name] for name in ('gpt2', 'n_kv_head 1', 'n_kv_head 2')})
def test_the_cache_has_as_many_bytes_as_cache_bytes_says(changes, itemsize, dtype):
    model = make(dtype, **changes)
    kv_cache = KVCache(model.config, 2, 12, torch.device('cpu'))
    kv_cache.reset([12, 12])
    model.next_logits(tokens(), kv_cache)
    stored = sum(part.nbytes for part in (*kv_cache.keys, *kv_cache.values))
    assert cache_bytes(model.config, 2 * 12, itemsize) == stored


@pytest.mark.parametrize('static', [False, True])
def test_update_returns_what_was_stored_and_evict_drops_the_oldest(static):
    model = make(torch.float32, n_layer=1, n_head=1, n_embd=2)
    kv_cache = KVCache(model.config, 1, 6, torch.device('cpu'), static)
    kv_cache.reset([4])
    stored = torch.arange(12.0).view(1, 1, 6, 2)                                      # (B, K, columns, D)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        query, key, _ = kv_cache.columns_of(end - start)
        assert query.tolist() == list(range(start, end))
        keys, values = kv_cache.update(0, stored[:, :, start:end], -stored[:, :, start:end])
        kv_cache.advance(end - start)
        assert torch.equal(keys[:, :, :end], stored[:, :, :end]) and torch.equal(values, -keys)
        assert keys.size(2) == (6 if static and start else end) and key.tolist()[:end] == list(range(end))
    assert kv_cache.length == kv_cache.capacity
    kv_cache.evict(2)
    assert (kv_cache.length, kv_cache.evicted) == (2, 4)
    assert torch.equal(kv_cache.keys[0][:, :, :2], stored[:, :, 4:])
    kv_cache.reset([1])
    assert (kv_cache.length, kv_cache.evicted) == (0, 0)
