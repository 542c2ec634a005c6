"""Scaling laws: what the fit finds, what the optimum is, and what the paper says of both."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT

from flatgpt.scaling import PRINTED, REPLICATION, UNROUNDED, Law, fit, isoflop_minimum, power_law
from model import GPT, GPTConfig, arch_fields

LAWS = [PRINTED, REPLICATION, Law(E=0.9, A=3e3, alpha=0.45, B=3e4, beta=0.5)]

# Parameters, FLOPs and tokens of tables 3 (approach 1) and A3 (approach 3) of Hoffmann et al. (2022)
TABLE_3 = [(400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9), (67e9, 5.76e23, 1.5e12),
           (175e9, 3.85e24, 3.7e12), (280e9, 9.90e24, 5.9e12), (520e9, 3.43e25, 11.0e12), (1e12, 1.27e26, 21.2e12),
           (10e12, 1.30e28, 216.2e12)]
TABLE_A3 = [(400e6, 2.21e19, 9.2e9), (1e9, 1.62e20, 27.1e9), (10e9, 2.46e22, 410.1e9), (67e9, 1.71e24, 4.1e12),
            (175e9, 1.26e25, 12.0e12), (280e9, 3.52e25, 20.1e12), (520e9, 1.36e26, 43.5e12),
            (1e12, 5.65e26, 94.1e12), (10e12, 8.55e28, 1425.5e12)]


def some_runs(law, n=40):
    """Parameters, tokens and exact losses of n runs."""
    rng = np.random.default_rng(0)
    params, tokens = np.exp(rng.uniform(np.log([[3e7], [1e9]]), np.log([[1e10], [3e11]]), (2, n)))
    return params, tokens, law.loss(params, tokens)


def constants(law):
    return [law.E, law.A, law.alpha, law.B, law.beta]


@pytest.mark.parametrize('law', [REPLICATION, *(pytest.param(law, marks=pytest.mark.full) for law in LAWS[::2])])
def test_the_fit_recovers_the_law_that_made_the_losses(law):
    assert constants(fit(*some_runs(law))) == pytest.approx(constants(law), rel=1e-3)


@pytest.mark.full
def test_runs_that_went_wrong_do_not_bend_the_law():
    params, tokens, losses = some_runs(REPLICATION)
    losses[::10] *= 1.2
    assert constants(fit(params, tokens, losses)) == pytest.approx(constants(REPLICATION), rel=0.03)
    assert constants(fit(params, tokens, losses, delta=1.0)) != pytest.approx(constants(REPLICATION), rel=0.3)


@pytest.mark.full
def test_noise_of_the_runs_becomes_an_error_of_that_size():
    params, tokens, losses = some_runs(REPLICATION, 200)
    found = fit(params, tokens, losses * np.exp(np.random.default_rng(1).normal(0, 0.002, 200)))
    assert found.loss(params, tokens) == pytest.approx(losses, rel=0.002)
    assert found.exponents()[0] == pytest.approx(REPLICATION.exponents()[0], abs=0.02)


@pytest.mark.full
def test_a_fit_from_a_law_that_is_near_is_that_from_the_grid():
    params, tokens, losses = some_runs(REPLICATION)
    losses = losses * np.exp(np.random.default_rng(1).normal(0, 0.002, len(losses)))
    near = Law(E=1.8, A=500.0, alpha=0.35, B=2000.0, beta=0.36)
    assert constants(fit(params, tokens, losses, start=near)) == pytest.approx(constants(fit(params, tokens, losses)),
                                                                              rel=1e-3)


@pytest.mark.parametrize('law', LAWS)
@pytest.mark.parametrize('flops', [1e12, 1e20, 1e26])
@pytest.mark.parametrize('cost, power', [(6.0, 1.0), (12.7, 0.95)])
def test_the_optimum_spends_the_budget_and_nothing_beside_it_is_better(law, flops, cost, power):
    params, tokens = law.optimum(flops, cost, power)
    assert cost * params**power * tokens == pytest.approx(flops)
    for factor in (0.9, 1.1):
        assert law.loss(params * factor, tokens / factor**power) > law.loss(params, tokens)
    assert law.alpha * law.A / params**law.alpha == pytest.approx(power * law.beta * law.B / tokens**law.beta)


@pytest.mark.parametrize('law', LAWS)
def test_the_exponents_are_the_slopes_of_the_optimum(law):
    budgets = np.logspace(18, 24, 7)
    params, tokens = law.optimum(budgets)
    assert (power_law(budgets, params)[1], power_law(budgets, tokens)[1]) == pytest.approx(law.exponents())
    assert sum(law.exponents()) == pytest.approx(1)


def furthest(law, table):
    """The largest factor between the optimal parameters, or tokens, of a law and of a table."""
    return max(math.exp(abs(math.log(ours / theirs))) for params, flops, tokens in table
               for ours, theirs in zip(law.optimum(flops), (params, tokens)))


def test_the_laws_are_as_far_from_the_tables_of_the_paper_as_is_said():
    assert furthest(REPLICATION, TABLE_3) < 1.25
    assert furthest(REPLICATION, [row for row in TABLE_3 if row[1] < 1e24]) < 1.13
    assert furthest(UNROUNDED, TABLE_A3) < 1.11
    assert furthest(PRINTED, TABLE_A3) > 1.4 and furthest(PRINTED, TABLE_3) > 3


def test_a_power_law_is_found():
    x = np.array([1.0, 10.0, 1000.0])
    assert power_law(x, 3 * x**0.7) == pytest.approx((3, 0.7))


def test_the_bottom_of_a_parabola_is_found():
    params = np.array([1e4, 3e4, 2e5, 1e6])
    assert isoflop_minimum(params, 1.5 + 0.02 * np.log(params / 7e4)**2) == pytest.approx((7e4, 1.5))


@pytest.mark.parametrize('params, losses, word', [
    ([1e4, 1e5, 1e5, 1e4], [2.0, 1.0, 1.1, 2.1], '2 sizes'), ([1e4, 1e5, 1e6], [1.0, 2.0, 1.0], 'no minimum'),
])
def test_where_there_is_no_bottom_that_is_said(params, losses, word):
    with pytest.raises(ValueError, match=word):
        isoflop_minimum(np.array(params), losses)


def test_the_runs_that_were_kept_are_those_of_the_present_model():
    study = json.loads((ROOT / 'flatgpt' / 'scaling.json').read_text())
    common, runs = study['common'], study['runs']
    assert sum(run['held_out'] for run in runs) == 1 and len(runs) == 37
    largest = max((run for run in runs if not run['held_out']), key=lambda run: run['params'])
    for run in runs:
        with torch.device('meta'):
            model = GPT(GPTConfig(97, common['block_size'], run['n_layer'], run['n_embd'], run['n_head'], bias=False,
                                  **arch_fields(common['arch'])))
        assert run['params'] == model.get_num_params()
        assert run['tokens'] == run['steps'] * common['batch_size'] * common['block_size']
        assert run['flops'] == run['tokens'] * model.flops_per_token() == pytest.approx(run['budget'], rel=0.01)
        assert run['tokens'] <= 4 * common['train_tokens']
        assert not run['held_out'] or run['params'] > largest['params'] and run['budget'] > largest['budget']
