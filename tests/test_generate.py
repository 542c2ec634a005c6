"""Generation: the cache against a loop that reads everything anew, for every architecture; borders; streams."""

import math

import pytest
import torch
from conftest import needs
from test_model import ALL, FEW, WAYS, full, logits_of, make, tokens, with_each

import runtime
from attention import static_columns
from model import GPT, GPTConfig
from sampling import draw, penalise, uniform


def generated(model, idx, n, **options):
    """The new tokens, (B, n)."""
    return torch.stack(list(model.generate(idx, n, **options)), dim=1)


@pytest.fixture(scope='module')
def talker():
    return make(torch.float32)


def by_hand(model, prompts, n):
    """The likeliest continuation of each prompt, (len(prompts), n) as lists, all of the context read anew for each
    token. Prompts of one length are read together."""
    found = {}
    for length in sorted({len(ids) for ids in prompts}):
        rows = [k for k, ids in enumerate(prompts) if len(ids) == length]
        text = torch.stack([prompts[k] for k in rows])
        for _ in range(n):
            logits = logits_of(model, text[:, -model.config.block_size:])
            text = torch.cat((text, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        found |= zip(rows, text[:, length:].tolist())
    return [found[k] for k in range(len(prompts))]


RAGGED = [3, 7, 1, 6, 2]   # lengths of prompts in one batch


def prompts_of(lengths):
    return [tokens(1, n, seed=n)[0] for n in lengths]


@with_each(ALL, fast=FEW)
def test_greedy_text_with_the_cache_is_that_of_a_loop_without(changes):
    model = make(torch.float32, **changes)
    for prompts in (prompts_of([3]), prompts_of(RAGGED), list(tokens(5, 4)), list(tokens(1, 4).expand(3, -1))):
        n = model.config.block_size - max(map(len, prompts))   # up to the border, where the last token is drawn
        expected = by_hand(model, prompts, n)
        for static in (False, True):
            assert generated(model, prompts, n, temperature=0, static=static).tolist() == expected, static


@with_each(ALL, fast=FEW)
def test_logits_with_the_cache_are_those_of_the_whole_context(changes):
    model = make(torch.float64, **changes)
    prompts = prompts_of(RAGGED)
    seen, step = [], model.step
    model.step = lambda idx, cache: seen.append(step(idx, cache)) or seen[-1]
    drawn = generated(model, prompts, 5, seed=3)
    for row, ids in enumerate(prompts):
        whole = logits_of(model, torch.cat((ids, drawn[row]))[None])[0]
        for i, logits in enumerate(seen):
            torch.testing.assert_close(logits[row], whole[len(ids) + i - 1], atol=1e-6, rtol=1e-6)


LONG = [1, 11, 12, 15, 4]   # shorter than the context of 12, and beyond it


@with_each(ALL, fast=['gpt2', 'mixture 0'])
def test_past_the_border_an_exact_window_reads_the_last_block_size_tokens(changes):
    model, prompts = make(torch.float32, **changes), prompts_of(LONG)
    assert generated(model, prompts, 14, temperature=0, exact_window=True).tolist() == by_hand(model, prompts, 14)


@pytest.mark.parametrize('changes', [{}, {'pos': 'rope'}, full({'pos': 'alibi'}), {'window': 5}, {'block_size': 1},
                                     full({'pos': 'rope', 'window': 20}), full({'block_size': 3})], ids=str)
@pytest.mark.parametrize('static', [False, full(True)], ids=['growing', 'static'])
def test_past_the_border_the_newer_half_is_read_anew(changes, static):
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
    assert generated(model, prompts, 20, temperature=0, static=static).tolist() == expected


@pytest.mark.parametrize('pos', ['rope', full('alibi')])
@pytest.mark.parametrize('window', [full(1), full(2), 5, full(12)])
def test_a_window_over_relative_positions_slides_on_without_end(pos, window):
    """As the same model with a context that all of the text fits into."""
    model = make(torch.float32, pos=pos, window=window)
    longer = make(torch.float32, pos=pos, window=window, block_size=100)
    longer.load_state_dict(model.state_dict())
    prompts = prompts_of(RAGGED)
    expected = by_hand(longer, prompts, 40)
    step = model.step
    for static in (False, True):
        calls = []
        model.step = lambda idx, cache, calls=calls: calls.append(idx.size(1)) or step(idx, cache)
        assert generated(model, prompts, 40, temperature=0, static=static).tolist() == expected
        assert calls == [max(RAGGED)] + [1] * 39


def test_a_token_is_read_once(talker):
    calls, step = [], talker.step
    talker.step = lambda idx, cache: calls.append(tuple(idx.shape)) or step(idx, cache)
    generated(talker, tokens(1, 4).expand(3, -1), 20)
    del talker.step
    # the prompt once for all rows, then token by token; at the border of 12, and again 6 later, the newer half
    assert calls == [(1, 4), *[(3, 1)] * 8, (3, 6), *[(3, 1)] * 6, (3, 6), *[(3, 1)] * 3]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_cache_is_allocated_once_and_has_the_type_of_the_activations(dtype):
    model, seen = make(dtype, n_kv_head=2), []
    step = model.step

    def recorded(idx, cache):
        logits = step(idx, cache)
        seen.append((cache.keys[1], cache.values[0]))
        return logits

    model.step = recorded
    generated(model, tokens(3, 2), 25)
    assert len({(keys.data_ptr(), values.data_ptr()) for keys, values in seen}) == 1
    assert seen[0][0].shape == seen[0][1].shape == (3, 2, 12, 4)
    assert seen[0][0].dtype == dtype


@pytest.mark.parametrize('options', [{}, {'temperature': 0.7, 'top_k': 4}, {'top_p': 0.6, 'min_p': 0.05}])
def test_generation_draws_each_token_with_its_own_chance(talker, options):
    text = tokens(1, 6)
    chance = uniform(3, 2, 6)
    for i in range(6):
        text = torch.cat((text, draw(logits_of(talker, text)[:, -1], chance[i:i + 1], **options)[None]), dim=1)
    assert generated(talker, tokens(1, 6), 6, seed=3, row=2, **options).tolist() == text[:, 6:].tolist()


@pytest.mark.full
def test_greedy_tokens_are_those_of_hugging_face_with_the_same_weights():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4,
                                        bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    ours = GPT(GPTConfig(97, 64, 3, 32, 4)).eval()
    matrices = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')   # which lie the other way there
    ours.load_state_dict({name: p.T if name.endswith(matrices) else p for name, p in theirs.state_dict().items()})
    idx = tokens(3, 7, vocab=97)
    text = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=57, do_sample=False)
    assert len(set(text[0].tolist())) > 5
    assert generated(ours, idx, 57, temperature=0).tolist() == text[:, 7:].tolist()


def test_repetition_is_penalised_for_prompt_and_text(talker):
    text = tokens(1, 4)
    for _ in range(8):
        seen = torch.zeros(1, 23, dtype=torch.bool)
        seen[0, text[0]] = True
        text = torch.cat((text, penalise(logits_of(talker, text)[:, -1], seen, 1.7).argmax(-1)[None]), dim=1)
    assert generated(talker, tokens(1, 4), 8, temperature=0, repetition_penalty=1.7).tolist() == text[:, 4:].tolist()


def test_log_probabilities_are_the_models_own(talker):
    pairs = list(talker.generate(tokens(2, 3), 6, temperature=0.5, top_k=3, logprobs=True))
    text = torch.cat((tokens(2, 3), torch.stack([token for token, _ in pairs], dim=1)), dim=1)
    p = logits_of(talker, text[:, :-1]).log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.stack([logprob for _, logprob in pairs], dim=1), p[:, 2:], atol=1e-5, rtol=1e-5)


def test_an_empty_prompt_and_a_control_out_of_range_are_errors(talker):
    with pytest.raises(ValueError, match='empty prompt'):
        next(talker.generate([torch.tensor([1]), torch.tensor([], dtype=torch.long)], 3))
    with pytest.raises(ValueError, match='top_k=0'):
        next(talker.generate(tokens(), 3, top_k=0))


def test_a_sample_does_not_depend_on_how_many_are_drawn(talker):
    by_count = {num: generated(talker, tokens(1, 4).expand(num, -1), 20, seed=5).tolist() for num in (1, 3, 8)}
    assert by_count[1] == by_count[8][:1]
    assert by_count[3] == by_count[8][:3]
    assert len(set(map(tuple, by_count[8]))) == 8


def test_the_seed_decides_the_tokens_and_nothing_else_does(talker):
    torch.manual_seed(1)
    first = generated(talker, tokens(), 20, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(generated(talker, tokens(), 20, seed=5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generated(talker, tokens(), 20, seed=6), first)


def test_more_new_tokens_begin_like_fewer(talker):
    assert torch.equal(generated(talker, tokens(), 20)[:, :7], generated(talker, tokens(), 7))


def test_top_k_of_one_is_greedy(talker):
    assert torch.equal(generated(talker, tokens(), 20, top_k=1), generated(talker, tokens(), 20, temperature=0))


@pytest.mark.parametrize('options', [{}, {'temperature': 0}, {'top_k': 5}, {'temperature': 100.0}])
def test_padding_of_the_vocabulary_is_never_drawn(options):
    model = make(torch.float32)
    model.transformer.wte.weight.data[20:] *= 50   # which makes the padding loud
    assert (generated(model, tokens(8, 4), 40, **options) >= 20).any()
    assert (generated(model, tokens(8, 4), 40, **options, vocab_size=20) < 20).all()


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    model = make(torch.float32)
    model.transformer.ln_f.bias.data[3] = value
    with pytest.raises(ValueError, match='NaN or infinite'):
        list(model.generate(tokens(), 3))


def test_no_new_tokens_are_none(talker):
    assert list(talker.generate(tokens(), 0)) == []


def test_tokens_come_one_by_one_as_they_are_made(talker):
    calls = []
    hook = talker.lm_head.register_forward_hook(lambda *args: calls.append(1))
    stream = talker.generate(tokens(), 5)
    assert next(stream).shape == (2,)
    assert len(calls) == 1
    hook.remove()


def test_generation_keeps_no_graph(talker):
    assert not next(talker.generate(tokens(), 1)).requires_grad
    logits = []
    hook = talker.lm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    next(talker.generate(tokens(), 1))
    hook.remove()
    assert not logits[0].requires_grad


def test_sdpa_and_written_out_attention_say_the_same():
    said = [generated(make(torch.float32, attention=way), tokens(), 20, seed=1).tolist() for way in WAYS]
    assert said[0] == said[1] == said[2]


# ---------------------------------------------------------------------------------------------------------------------
# the static cache: as large as the work, of few sizes, in one place

@pytest.mark.parametrize(('needed', 'block_size', 'columns'), [
    (1, 1024, 128), (128, 1024, 128), (129, 1024, 256), (256, 1024, 256), (257, 1024, 512), (1000, 1024, 1024),
    (1024, 1024, 1024), (600, 1000, 1000), (30, 48, 48), (1, 1, 1), (51, 131_072, 128), (70_000, 131_072, 131_072),
])
def test_a_static_cache_has_columns_for_the_work_rounded_up_to_a_power_of_two(needed, block_size, columns):
    assert static_columns(needed, block_size) == columns


@pytest.mark.parametrize(('lengths', 'n', 'columns'), [([3], 20, 128), ([100, 3], 28, 128), ([100, 3], 29, 256),
                                                       ([250], 60, 300), ([400], 5, 300)])
def test_the_static_cache_of_a_long_context_is_as_large_as_prompt_and_new_tokens(lengths, n, columns):
    model = make(torch.float32, block_size=300, n_layer=1, n_kv_head=2)
    next(model.generate(prompts_of(lengths), n, static=True))
    assert model.spare_cache.keys[0].shape == model.spare_cache.values[0].shape == (len(lengths), 2, columns, 4)


@pytest.mark.parametrize('changes', [{}, {'pos': 'rope', 'window': 150}, full({'pos': 'alibi'})], ids=str)
@pytest.mark.parametrize('lengths', [[126, 5], [2, 255, 90], [290, 7], [330]], ids=str)
def test_text_with_the_static_cache_is_that_with_the_growing_one(changes, lengths):
    """From one size to the next, and past the context of 300, where the cache is read anew or slides."""
    model = make(torch.float32, block_size=300, n_layer=1, **changes)
    for n in (2, 3, 30):
        prompts = prompts_of(lengths)
        assert torch.equal(generated(model, prompts, n, temperature=0, static=True),
                           generated(model, prompts, n, temperature=0))


def test_calls_of_one_size_share_a_static_cache_that_holds_nothing_of_the_last_text():
    model = make(torch.float32, block_size=300, n_layer=1)
    places = []
    for lengths, n in (([3, 9], 20), ([60, 61], 67), ([1, 1], 5)):
        for _ in range(2):
            text = generated(model, prompts_of(lengths), n, seed=1, static=True)
            assert torch.equal(text, generated(model, prompts_of(lengths), n, seed=1))
            places.append((model.spare_cache.keys[0].data_ptr(), model.spare_cache.values[0].data_ptr()))
            with torch.inference_mode():
                for tensor in (*model.spare_cache.keys, *model.spare_cache.values):
                    tensor.fill_(math.nan)   # which a model that failed may leave
    assert len(set(places)) == 1
    shape = model.spare_cache.keys[0].shape
    generated(model, prompts_of([3]), 20, static=True)   # other shapes have one of their own
    assert model.spare_cache.keys[0].shape != shape


def test_two_texts_at_a_time_do_not_share_a_static_cache():
    model = make(torch.float32, n_layer=1)
    prompts = [prompts_of([3]), prompts_of([4])]
    alone = [generated(model, prompt, 12, seed=2) for prompt in prompts]
    generated(model, prompts[0], 12, static=True)
    streams = [model.generate(prompt, 12, seed=2, static=True) for prompt in prompts]
    together = torch.stack([torch.stack(pair) for pair in zip(*streams)], dim=-1)
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])


def test_a_text_that_is_given_up_gives_its_static_cache_back():
    model = make(torch.float32, n_layer=1)
    stream = model.generate(tokens(), 12, static=True)
    next(stream)
    assert model.spare_cache is None
    stream.close()
    place = model.spare_cache.keys[0].data_ptr()
    generated(model, tokens(), 12, static=True)
    assert model.spare_cache.keys[0].data_ptr() == place
    generated(model.to(torch.bfloat16), tokens(), 12, static=True)   # and follows the model to another type
    assert model.spare_cache.keys[0].dtype == torch.bfloat16


def test_rows_that_are_alike_share_the_reading_of_the_prompt_with_a_static_cache_too(talker):
    calls, step = [], talker.step
    talker.step = lambda idx, cache: calls.append(tuple(idx.shape)) or step(idx, cache)
    for length in (4, 1):
        generated(talker, tokens(1, length).expand(3, -1), 3, static=True)
    del talker.step
    assert calls == [(1, 4), (3, 1), (3, 1), *[(3, 1)] * 3]   # a prompt of one token looks like any step


@pytest.mark.full
@needs('c_compiler')
@pytest.mark.filterwarnings('ignore')   # of torch's own modules
def test_a_compiled_step_serves_all_prompts_of_a_size(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', '')
    monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
    runtime.keep_compiled_code()
    torch._dynamo.reset()
    counters.clear()
    model, plain = (make(torch.float32, block_size=1024, pos='rope', n_kv_head=2) for _ in range(2))
    runtime.Runtime(torch.device('cpu'), torch.float32, True, 0, 1).compile_step(model)
    graphs = []
    for lengths, n in (([5, 9], 20), ([30, 3], 9), ([60, 61], 67), ([100, 90], 60), ([40, 130], 9), ([300, 2], 9)):
        prompts = prompts_of(lengths)
        assert torch.equal(generated(model, prompts, n, temperature=0, static=True),
                           generated(plain, prompts, n, temperature=0))
        graphs.append(counters['stats']['unique_graphs'])
    assert graphs == [1, 1, 1, 2, 2, 2]   # for 128 columns; for any number of them
    torch._dynamo.reset()
