"""From logits to a token: compared with a reference that is written out, ties and rounding included; stop strings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import quick

from flatgpt import engine
from flatgpt.answers import parse_stops
from flatgpt.engine import check_controls, penalize_repetition, random_uniform, sample_token
from flatgpt.errors import UsageError

# ---------------------------------------------------------------------------------------------------------------------
# sampling one token

def counts_of(logits, n, **options):
    """How often each id is sampled for n random numbers on an even grid over (0, 1]."""
    grid = (torch.arange(n) + 0.5) / n
    return sample_token(logits.expand(n, -1), grid, **options).bincount(minlength=logits.numel()).double()


def some_logits(V=11):
    return torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    z = some_logits()
    p = (z.double() / temperature).exp()
    counts = counts_of(z, 4096, temperature=temperature)
    assert (counts - 4096 * p / p.sum()).abs().max() <= 1.01   # a grid of n can be off by one point


@pytest.mark.parametrize('top_k', [1, 2, 5, 10])
def test_samples_with_top_k_follow_the_softmax_of_the_likeliest(top_k):
    z = some_logits()
    p = z.double().exp()
    p[z.argsort()[:-top_k]] = 0
    assert (counts_of(z, 4096, top_k=top_k) - 4096 * p / p.sum()).abs().max() <= 1.01


def reference(logits, temperature, top_k, top_p, min_p):
    """The probabilities of sample_token(), one id at a time, in float64. Which of equal ids are excluded is open."""
    order = logits.topk(len(logits)).indices.tolist()
    scaled = [(logits[i].item() - logits[order[0]].item()) / temperature for i in order]
    weights = [math.exp(z) for z in scaled][:top_k or len(order)]
    weights = [p / sum(weights) for p in weights]
    before = 0.0
    for rank, p in enumerate(weights):
        if (rank and top_p is not None and before >= top_p) or (min_p is not None and p < min_p * weights[0]):
            weights[rank] = 0.0
        before += p
    result = torch.zeros(len(logits), dtype=torch.float64)
    result[order[:len(weights)]] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return result


@quick
@given(st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0]), min_size=2, max_size=12),
       st.sampled_from([0.3, 0.7, 1.0, 1.5]), st.none() | st.integers(1, 14),
       st.none() | st.sampled_from([0.0, 0.13, 0.37, 0.61, 0.89, 1.0]),
       st.none() | st.sampled_from([0.0, 0.07, 0.33, 1.0]))
def test_any_controls_sample_from_the_distribution_written_out(logits, temperature, top_k, top_p, min_p):
    z = torch.tensor(logits)
    p = reference(z, temperature, top_k, top_p, min_p)
    counts = counts_of(z, 2048, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    shares, expected = (sorted(zip(logits, of.tolist())) for of in (counts / 2048, p))
    assert max(abs(one - other) for (_, one), (_, other) in zip(shares, expected)) <= 1.1 / 2048, (shares, expected)


def test_top_p_of_zero_and_min_p_of_one_take_the_likeliest():
    z = some_logits()
    assert counts_of(z, 64, top_p=0.0)[z.argmax()] == counts_of(z, 64, min_p=1.0)[z.argmax()] == 64
    assert counts_of(torch.zeros(5), 64, top_p=0.0).max() == 64   # one among equals


def test_top_p_of_one_and_min_p_of_zero_are_no_limit():
    z = some_logits()
    assert torch.equal(counts_of(z, 512, top_p=1.0, min_p=0.0), counts_of(z, 512))


def test_only_the_likeliest_are_sorted_where_they_are_enough(monkeypatch):
    z = some_logits()
    expected = {top_p: counts_of(z, 512, top_p=top_p) for top_p in (0.3, 0.7, 0.999)}
    monkeypatch.setattr(engine, 'SORTED_FIRST', 4)
    for top_p, counts in expected.items():
        assert torch.equal(counts_of(z, 512, top_p=top_p), counts)
    assert [engine.likeliest_first(z.softmax(-1)[None], top_p)[0].size(1) for top_p in expected] == [4, 4, 11]


def test_each_row_has_its_own_limits():
    z = torch.tensor([[0.0, 5.0, 0.0, 0.0], [1.0, 1.1, 1.2, 1.3]])
    pairs = [sample_token(z, torch.full((2,), (i + 0.5) / 100), top_p=0.9).tolist() for i in range(100)]
    first, second = (set(ids) for ids in zip(*pairs))
    assert first == {1} and second == {0, 1, 2, 3}


def test_penalty_makes_what_was_seen_less_likely_whatever_its_sign():
    z = torch.tensor([[2.0, -2.0, 3.0, 0.5]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(z, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, 0.5]]
    assert torch.equal(penalize_repetition(z, seen, 1.0), z)


@pytest.mark.parametrize(('name', 'value'), [
    ('temperature', -0.1), ('temperature', math.nan), ('top_k', 0), ('top_k', -1), ('top_p', -0.1), ('top_p', 1.1),
    ('top_p', math.nan), ('min_p', 2.0), ('repetition_penalty', 0.0),
    ('repetition_penalty', 0.009), ('repetition_penalty', 100.5), ('repetition_penalty', math.inf),
])
def test_a_control_out_of_range_is_an_error_with_value_and_range(name, value):
    with pytest.raises(ValueError, match=f'^{name}={value}: expected '):
        check_controls(**{name: value})


def test_controls_at_the_ends_of_their_ranges_are_fine():
    check_controls(temperature=0, top_k=1, top_p=0.0, min_p=1.0, repetition_penalty=0.5)
    check_controls(temperature=1e9, top_k=10 ** 9, top_p=1.0, min_p=0.0, repetition_penalty=100)
    check_controls(repetition_penalty=0.01)


@pytest.mark.parametrize('top_k', [11, 12, 10 ** 9])
def test_top_k_of_the_whole_vocabulary_or_more_is_no_limit(top_k):
    assert torch.equal(counts_of(some_logits(), 512, top_k=top_k), counts_of(some_logits(), 512))


@pytest.mark.parametrize('top_k', [1, 3, 7])
def test_top_k_keeps_exactly_k_of_equals(top_k):
    counts = counts_of(torch.zeros(8), 840, top_k=top_k)
    assert sorted(counts.tolist()) == [0] * (8 - top_k) + [840 / top_k] * top_k


@pytest.mark.parametrize('temperature', [0.0, 1e-4, 1e-40])
def test_no_temperature_takes_the_likeliest(temperature):
    z = some_logits()
    assert counts_of(z, 64, temperature=temperature)[z.argmax()] == 64


@pytest.mark.parametrize('temperature', [1e-4, 1.0, 10.0])
@pytest.mark.parametrize('never', [-math.inf, -1e30], ids=['minus infinity', 'underflow'])
def test_an_id_of_probability_zero_is_never_sampled(never, temperature):
    z = torch.tensor([never, never, 0.1, never, 0.2, -0.1, never, 0.3, never])
    uniform = torch.tensor([1.0, 1 - 2 ** -24, 0.5, 2 ** -24])   # both ends, and the float32 next to 1
    for top_k in (None, 3):
        ids = sample_token(z.expand(4, -1), uniform, temperature=temperature, top_k=top_k)
        assert set(ids.tolist()) <= {2, 4, 5, 7}


@pytest.mark.parametrize(('uniform', 'token'), [(2 ** -24, 0), (0.25, 0), (0.26, 1), (0.5, 1), (1.0, 3)])
def test_the_random_number_counts_through_the_ids_in_their_order(uniform, token):
    assert sample_token(torch.zeros(1, 4), torch.tensor([uniform])).item() == token


@pytest.mark.parametrize('V', [3, 65, 1000])
def test_the_largest_random_number_gives_the_last_id_however_the_sum_is_rounded(V):
    """The sum of the probabilities is often a little more or less than one."""
    z = torch.randn(200, V, generator=torch.Generator().manual_seed(4)).clamp(-2, 2)
    sums = z.softmax(dim=-1).cumsum(dim=-1)[:, -1]
    assert sums.min() < 1 < sums.max()
    assert torch.equal(sample_token(z, torch.ones(200)), torch.full((200,), V - 1))


# ---------------------------------------------------------------------------------------------------------------------
# random numbers

def test_random_numbers_of_a_stream_never_change():
    assert (random_uniform(1337, 0, 3) * 2 ** 24).tolist() == [15428602, 16515512, 1895670]


def test_random_numbers_are_in_half_open_unit_interval_and_even():
    u = random_uniform(5, 2, 100_000)
    assert u.dtype == torch.float32
    assert u.min() > 0 and u.max() <= 1
    assert (u * 16).ceil().long().bincount(minlength=17)[1:].sub(6250).abs().max() < 5 * 6250 ** 0.5
    assert torch.equal(u * 2 ** 24, (u * 2 ** 24).round())   # 24 bits: exact, so the same on every device


def test_a_longer_stream_begins_like_a_shorter_one():
    assert torch.equal(random_uniform(7, 3, 1000)[:10], random_uniform(7, 3, 10))
    assert random_uniform(7, 3, 0).shape == (0,)


@pytest.mark.parametrize('seed', [0, 1, -1, 2 ** 53 + 1, 2 ** 63, 2 ** 64 - 5])
def test_neighbouring_seeds_and_rows_have_streams_of_their_own(seed):
    here = random_uniform(seed, 0, 8)
    for other in (1, 2):
        assert not torch.equal(here, random_uniform(seed + other, 0, 8))
        assert not torch.equal(here, random_uniform(seed, other, 8))


# ---------------------------------------------------------------------------------------------------------------------
# stop strings

@pytest.mark.parametrize(('option', 'stops'), [('', []), ('Q:', ['Q:']), ('["Q:", "\\n"]', ['Q:', '\n']), ('[]', [])])
def test_stop_strings_are_one_text_or_a_json_list(option, stops):
    assert parse_stops(option) == stops


@pytest.mark.parametrize('option', ['[', '["a", 1]', '["a", ""]', '[[]]', '[' * 100_000])
def test_a_list_of_stop_strings_that_is_none_is_an_error(option):
    with pytest.raises(UsageError, match='^stop=.*: expected a text, or a JSON list of texts such as'):
        parse_stops(option)
