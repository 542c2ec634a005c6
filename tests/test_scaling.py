"""Scaling laws: what the fit finds, what the optimum is, and what the paper says of both."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from in_process import call, options

from flatgpt import runtime, scaling
from flatgpt.dataset import write
from flatgpt.errors import UsageError
from flatgpt.scaling import PRINTED, REPLICATION, SIZES, SMALL, UNROUNDED, Law, fit, isoflop_minimum, power_law
from flatgpt.tokenizer import CharTokenizer
from model import ARCHS, GPT, GPTConfig

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
                                  **ARCHS[common['arch']]))
        assert run['params'] == model.get_num_params()
        assert run['tokens'] == run['steps'] * common['batch_size'] * common['block_size']
        assert run['flops'] == run['tokens'] * model.flops_per_token() == pytest.approx(run['budget'], rel=0.01)
        assert run['tokens'] <= 4 * common['train_tokens']
        assert not run['held_out'] or run['params'] > largest['params'] and run['budget'] > largest['budget']


# ---------------------------------------------------------------------------------------------------------------------
# the size for some minutes

RT = runtime.Runtime(torch.device('cpu'), torch.float32, False, 0, 1)
TEXT = SimpleNamespace(data={'train': range(10**9)})   # so long that nothing repeats


def chosen(monkeypatch, *args, data=TEXT, speed=1e9, clock=lambda: 0.0):
    """(options of train.py, the line about the size, sizes that were timed) on a machine that needs parameters / speed
    seconds for each token, and at least 5 ms for a step."""
    timed = []

    def time_size(config, data, rt, n_layer, n_embd, clock):
        timed.append((n_layer, n_embd))
        return 12 * n_layer * n_embd**2, max(12 * n_layer * n_embd**2 * 2048 / speed, 0.005)

    monkeypatch.setattr(scaling, 'time_size', time_size)
    config = options('train.py', 'config/train_my_text.py', *args)
    return config, scaling.choose_size(config, data, RT, clock), timed


@pytest.mark.parametrize('minutes', [0.2, 1, 4, 16, 100])
def test_the_size_is_the_best_of_all_by_the_law(monkeypatch, minutes):
    config, line, timed = chosen(monkeypatch, f'--max_minutes={minutes}')

    def loss(size):
        params = 12 * size[0] * size[1]**2
        return SMALL.loss(params, 0.9 * 60 * minutes / max(params * 2048 / 1e9, 0.005) * 2048)

    best = min(SIZES, key=loss)
    assert (config['n_layer'], config['n_embd'], config['n_head']) == (*best, best[1] // 32)
    assert config['learning_rate'] == pytest.approx(5.6e-3 * 64 / best[1])
    assert f'{best[0]} layers of width {best[1]}' in line
    assert timed == list(SIZES[:SIZES.index(best) + 3])   # two larger ones were worse
    assert config.namespace['n_embd'] == best[1]   # what train.py sees


def test_a_short_text_gets_a_smaller_model(monkeypatch):
    widths = [chosen(monkeypatch, '--max_minutes=16', data=SimpleNamespace(data={'train': range(n)}))[0]['n_embd']
              for n in (10**5, 10**9)]
    assert widths[0] < widths[1]


def test_what_repeats_counts_for_less():
    assert scaling.discounted(500, 1000, 15.4) == 500
    assert scaling.discounted(2000, 1000, 15.4) == pytest.approx(1000 + 15400 * (1 - math.exp(-1 / 15.4)))
    assert scaling.discounted(10**9, 1000, 15.4) == pytest.approx(16400)
    params, tokens = SMALL.optimum(1e13)
    fitting = scaling.expected_loss(params, tokens, tokens)   # a text of one epoch, and the model that fits it
    assert fitting == pytest.approx(SMALL.loss(params, tokens))
    assert scaling.expected_loss(1.5 * params, tokens, tokens) > SMALL.loss(1.5 * params, tokens)
    assert scaling.expected_loss(params, tokens, tokens / 2) > fitting


def test_measuring_ends_after_a_tenth_of_the_time(monkeypatch):
    times = iter(range(100))
    timed = chosen(monkeypatch, '--max_minutes=0.5', clock=lambda: next(times))[2]
    assert len(timed) == 4   # of 30 s, more than 3 are over


@pytest.mark.parametrize(('processes', 'seconds'), [(1, 2 + 3 * 1), (2, 2 + 1 * 1)])
def test_a_step_is_timed_with_its_micro_batches_when_the_device_has_finished(monkeypatch, processes, seconds):
    now = [0]
    monkeypatch.setattr(runtime.Runtime, 'sync', lambda self: now.append(now[-1] + 1))   # what takes the time
    monkeypatch.setattr(runtime.Runtime, 'mean_number', lambda self, number: number)
    rt = runtime.Runtime(torch.device('cpu'), torch.float32, False, 0, processes)
    batch = torch.zeros(1, 2, 8, dtype=torch.long)
    data = SimpleNamespace(padded_vocab_size=8, begins={}, train_batch=lambda *args: (batch, batch))
    config = options('train.py', 'config/train_my_text.py', '--gradient_accumulation_steps=4', '--block_size=8')
    params, per_step = scaling.time_size(config, data, rt, 1, 32, lambda: now[-1])
    assert per_step == seconds and params > 12 * 32**2


@pytest.mark.parametrize('args, word', [
    (['--n_layer=2'], 'n_layer'), (['--learning_rate=1e-3', '--n_embd=64'], 'learning_rate, n_embd'),
    (['--max_minutes=None'], '--max_minutes=10')])
def test_what_cannot_be_chosen_is_one_line(monkeypatch, args, word):
    with pytest.raises(UsageError, match=word):
        chosen(monkeypatch, *args)


def test_a_run_has_the_chosen_size_and_keeps_it_when_it_goes_on(monkeypatch, tmp_path):
    tok = CharTokenizer('abcdefgh')
    write(tmp_path / 'text', dict.fromkeys(('train', 'val'), np.arange(999) % 8), tok, {})
    monkeypatch.setattr(scaling, 'SIZES', ((1, 32), (1, 64)))
    args = ['config/train_my_text.py', f'--dataset={tmp_path / "text"}', f'--out_dir={tmp_path / "out"}',
            '--block_size=8', '--batch_size=2', '--max_iters=3', '--eval_iters=1', '--device=cpu', '--dtype=float32']
    first = call('train.py', *args, '--max_minutes=1')
    assert first.returncode == 0, first.stderr
    (line,) = [line for line in first.stderr.splitlines() if 'of width' in line]
    width = int(line.split('width ')[1].split(',')[0])
    again = call('train.py', *args, '--max_minutes=1', '--init_from=resume', '--max_iters=5')
    assert again.returncode == 0 and 'of width' not in again.stderr, again.stderr
    by_hand = call('train.py', *args, '--size=None', '--max_minutes=1', '--n_layer=1', f'--n_embd={width}',
                   f'--n_head={width // 32}', f'--learning_rate={5.6e-3 * 64 / width}', f'--out_dir={tmp_path / "b"}')
    losses = [[line for line in run.stdout.splitlines() if line.startswith('step')] for run in (first, by_hand)]
    assert losses[0] == losses[1]   # timing has changed nothing


def test_the_law_of_small_models_is_the_one_of_the_kept_runs():
    runs = [run for run in json.loads((ROOT / 'flatgpt' / 'scaling.json').read_text())['runs'] if not run['held_out']]
    found = fit(*([run[name] for run in runs] for name in ('params', 'tokens', 'val_loss')), start=SMALL)
    assert constants(found) == pytest.approx(constants(SMALL), rel=1e-2)
