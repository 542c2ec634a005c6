"""AdamW against its equations, what decays, and the learning rate at every step."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st
from properties import quick

from flatgpt import optim
from flatgpt.optim import OPTIMIZERS, SCHEDULES, adamw, build, learning_rate_at, load_state, orthogonalise, param_groups
from model import GPT, GPTConfig

SHAPE = {'vocab_size': 11, 'block_size': 6, 'n_layer': 2, 'n_embd': 8, 'n_head': 2}


def make(bias=True):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE, bias=bias))


def give_gradients(model, seed):
    source = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=source)


def weights(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# AdamW

def test_steps_are_those_of_the_adamw_paper():
    rate, beta1, beta2, decay, eps = 3e-2, 0.8, 0.95, 0.1, 1e-8
    model = make()
    optimizer = adamw(model, rate, (beta1, beta2), decay)
    theta = {name: p.astype(np.float64) for name, p in weights(model).items()}
    m = {name: np.zeros_like(p) for name, p in theta.items()}
    v = {name: np.zeros_like(p) for name, p in theta.items()}
    for t in range(1, 6):
        give_gradients(model, t)
        gradients = {name: p.grad.numpy().astype(np.float64) for name, p in model.named_parameters()}
        optimizer.step()
        for name, g in gradients.items():
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            step = m[name] / (1 - beta1 ** t) / (np.sqrt(v[name] / (1 - beta2 ** t)) + eps)
            theta[name] = theta[name] - rate * (step + (decay * theta[name] if theta[name].ndim > 1 else 0))
    for name, p in weights(model).items():
        np.testing.assert_allclose(p, theta[name], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize('bias', [True, False])
def test_each_trainable_parameter_is_in_exactly_one_group_and_only_matrices_decay(bias):
    model = make(bias)
    model.transformer.wpe.weight.requires_grad_(False)
    model.transformer.ln_f.weight.requires_grad_(False)
    matrices, vectors = param_groups(model, 0.1)
    assert (matrices['weight_decay'], vectors['weight_decay']) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for p in matrices['params'] + vectors['params']]
    assert len(found) == len(set(found))
    assert set(found) == set(names.values()) - {'transformer.wpe.weight', 'transformer.ln_f.weight'}
    assert 'transformer.wte.weight' in found   # the head too: they are one
    for p in matrices['params']:
        assert names[id(p)].endswith('weight') and 'ln_' not in names[id(p)]
    for p in vectors['params']:
        assert names[id(p)].endswith('bias') or 'ln_' in names[id(p)]


def test_without_gradient_matrices_shrink_and_vectors_stay():
    model = make()
    model.transformer.h[0].mlp.c_fc.bias.data.fill_(2.0)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, 0.5, (0.9, 0.95), 0.1).step()
    for name, p in weights(model).items():
        np.testing.assert_allclose(p, before[name] * (0.95 if p.ndim > 1 else 1.0), rtol=1e-6, err_msg=name)


def test_the_optimizer_is_the_fused_one():
    assert all(group['fused'] for group in adamw(make(), 1e-3, (0.9, 0.95), 0.1).param_groups)


# ---------------------------------------------------------------------------------------------------------------------
# a saved optimizer

def trained_by(model, optimizer, steps=3):
    for t in range(steps):
        give_gradients(model, t)
        optimizer.step()
    return optimizer


def test_a_loaded_optimizer_goes_on_as_the_saved_one_would():
    model = make()
    optimizer = trained_by(model, adamw(model, 1e-2, (0.9, 0.95), 0.1))
    other = copy.deepcopy(model)
    resumed = adamw(other, 1e-2, (0.9, 0.95), 0.1)
    load_state(resumed, copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (other, resumed)):
        give_gradients(each, 9)
        its.step()
    for name, p in weights(model).items():
        assert np.array_equal(p, weights(other)[name]), name


def test_a_loaded_optimizer_keeps_the_options_of_this_run_and_takes_the_moments():
    model = make()
    saved = trained_by(model, adamw(model, 1e-2, (0.9, 0.95), 0.1)).state_dict()
    ours = adamw(model, 7e-4, (0.8, 0.99), 0.3)
    load_state(ours, saved)
    assert [group['weight_decay'] for group in ours.param_groups] == [0.3, 0.0]
    for group in ours.param_groups:
        assert (group['lr'], group['betas'], group['fused']) == (7e-4, (0.8, 0.99), True)
    state = ours.state_dict()['state']
    assert state.keys() == saved['state'].keys()
    assert len(state) == len(list(model.parameters()))
    for i, moments in state.items():
        assert moments['step'] == 3
        assert torch.equal(moments['exp_avg'], saved['state'][i]['exp_avg'])
        assert torch.equal(moments['exp_avg_sq'], saved['state'][i]['exp_avg_sq'])


@pytest.mark.parametrize('bias', [True, False])
def test_a_state_in_the_order_of_nanogpt_loads(bias):
    """First the tensors of two or more dimensions by the order of named_parameters, then the others."""
    model = make(bias)
    named = [p for _, p in model.named_parameters()]
    theirs = torch.optim.AdamW([{'params': [p for p in named if p.ndim > 1], 'weight_decay': 0.1},
                                {'params': [p for p in named if p.ndim <= 1], 'weight_decay': 0.0}],
                               lr=1e-2, betas=(0.9, 0.95))
    trained_by(model, theirs)
    ours = adamw(model, 1e-2, (0.9, 0.95), 0.1)
    load_state(ours, copy.deepcopy(theirs.state_dict()))
    for p in named:
        assert torch.equal(ours.state[p]['exp_avg'], theirs.state[p]['exp_avg'])
        assert torch.equal(ours.state[p]['exp_avg_sq'], theirs.state[p]['exp_avg_sq'])
        assert ours.state[p]['step'] == 3
    start = copy.deepcopy(model.state_dict())
    after = []
    for optimizer in (theirs, ours):
        model.load_state_dict(start)
        give_gradients(model, 9)
        optimizer.step()
        after.append(weights(model))
    for name in after[0]:
        np.testing.assert_allclose(after[1][name], after[0][name], rtol=0, atol=1e-7, err_msg=name)


def test_the_state_of_an_unfused_optimizer_moves_to_where_the_fused_one_wants_it():
    """An unfused AdamW, as nanoGPT has on a CPU, counts its steps on the CPU; a fused one counts them beside the
    parameters. The meta device stands for a GPU."""
    here = make()
    saved = trained_by(here, torch.optim.AdamW(param_groups(here, 0.1), fused=False)).state_dict()
    with torch.device('meta'):
        there = GPT(GPTConfig(**SHAPE))
    ours = adamw(there, 1e-3, (0.9, 0.95), 0.1)
    for group in ours.param_groups:
        group['fused'] = True   # as it is on a GPU
    load_state(ours, saved)
    places = {kind: {moments[kind].device.type for moments in ours.state.values()}
              for kind in ('exp_avg', 'exp_avg_sq', 'step')}
    assert places == {'exp_avg': {'meta'}, 'exp_avg_sq': {'meta'}, 'step': {'meta'}}


def test_loading_leaves_the_saved_state_as_it_was():
    model = make()
    saved = trained_by(model, adamw(model, 1e-2, (0.9, 0.95), 0.1)).state_dict()
    before = copy.deepcopy(saved)
    ours = adamw(model, 7e-4, (0.8, 0.99), 0.3)
    load_state(ours, saved)
    trained_by(model, ours)
    assert saved['param_groups'] == before['param_groups']


# ---------------------------------------------------------------------------------------------------------------------
# freezing

@pytest.mark.parametrize('name', ['lm_head', 'wte'])
def test_a_tied_matrix_is_frozen_by_either_of_its_names(name):
    model = make()
    freezer = optim.Freezer(model, name)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ['transformer.wte.weight']
    assert len(freezer.notes) == 1 and 'transformer.wte.weight is lm_head.weight' in freezer.notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# the learning rate of a step

def rate(step, schedule='cosine', peak=1.0, low=0.1, warmup=10, decay=110, cooldown=None):
    return learning_rate_at(step, schedule, peak, low, warmup, decay, cooldown)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_warmup_rises_in_equal_steps_from_above_zero_to_the_peak(schedule):
    np.testing.assert_allclose([rate(step, schedule) for step in range(11)], np.arange(1, 12) / 11, rtol=1e-12)


@pytest.mark.parametrize(('step', 'expected'), [
    (10, 1.0), (35, 0.1 + 0.9 * (2 + 2 ** 0.5) / 4), (60, 0.55), (85, 0.1 + 0.9 * (2 - 2 ** 0.5) / 4), (110, 0.1),
    (111, 0.1), (10 ** 9, 0.1),
])
def test_cosine_falls_along_half_a_wave_and_stays_low(step, expected):
    assert rate(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(('cooldown', 'step', 'expected'), [
    (None, 10, 1.0), (None, 35, 0.775), (None, 60, 0.55), (None, 109, 0.109), (None, 110, 0.1), (None, 999, 0.1),
    (40, 10, 1.0), (40, 69, 1.0), (40, 70, 1.0), (40, 80, 0.775), (40, 90, 0.55), (40, 110, 0.1), (40, 999, 0.1),
    (100, 60, 0.55), (5000, 60, 0.55),   # no longer than there is after the warmup
    (0, 109, 1.0), (0, 110, 0.1),
])
def test_linear_falls_over_the_cooldown_or_over_all(cooldown, step, expected):
    assert rate(step, 'linear', cooldown=cooldown) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('step', [10, 60, 110, 10 ** 9])
@pytest.mark.parametrize('cooldown', [None, 40])
def test_constant_stays(step, cooldown):
    assert rate(step, 'constant', cooldown=cooldown) == 1.0


@pytest.mark.parametrize('schedule', ['cosine', 'linear'])
@pytest.mark.parametrize(('warmup', 'decay', 'rates'), [
    (0, 2, [1.0, 0.55, 0.1, 0.1]),       # no warmup: the first step has the peak
    (2, 2, [1 / 3, 2 / 3, 0.1, 0.1]),    # nothing between
    (2, 1, [1 / 3, 2 / 3, 0.1, 0.1]),    # the end before the end of the warmup
    (0, 0, [0.1, 0.1, 0.1, 0.1]),
    (1, 2, [1 / 2, 1.0, 0.1, 0.1]),
])
def test_degenerate_schedules_have_a_rate_at_every_step(schedule, warmup, decay, rates):
    assert [rate(step, schedule, warmup=warmup, decay=decay) for step in range(4)] == pytest.approx(rates, rel=1e-12)


COUNTS = st.integers(0, 10 ** 6)
ANY_SCHEDULE = {'schedule': st.sampled_from(SCHEDULES), 'warmup': COUNTS, 'decay': COUNTS,
                'cooldown': st.none() | COUNTS}


@quick
@given(step=st.integers(0, 2 * 10 ** 6), peak=st.floats(1e-8, 10), share=st.floats(0, 1), **ANY_SCHEDULE)
@example(step=5, peak=0.3, share=1 / 3, schedule='cosine', warmup=5, decay=9, cooldown=None)
def test_the_rate_is_between_zero_and_the_peak_and_after_the_warmup_not_below_the_low(step, peak, share, schedule,
                                                                                     warmup, decay, cooldown):
    low, just = peak * share, 1 + 1e-12   # rounding
    here = rate(step, schedule, peak, low, warmup, decay, cooldown)
    assert 0 <= here <= peak * just
    assert here > 0 or low == 0
    assert step < warmup or here * just >= low


@quick
@given(step=COUNTS, **ANY_SCHEDULE)
def test_the_rate_rises_in_the_warmup_and_never_after(step, schedule, warmup, decay, cooldown):
    here, there = (rate(s, schedule, 1.0, 0.1, warmup, decay, cooldown) for s in (step, step + 1))
    assert here < there if step + 1 < warmup else here >= there or step + 1 == warmup


@quick
@given(step=COUNTS, **ANY_SCHEDULE)
def test_the_rate_is_low_from_the_end_on_unless_constant(step, schedule, warmup, decay, cooldown):
    here = rate(max(decay, warmup) + step, schedule, 1.0, 0.1, warmup, decay, cooldown)
    assert here == (1.0 if schedule == 'constant' else 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Muon

def a_gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(23, 12, n_layer=2, n_embd=16, n_head=2, **changes))


def spoil_gradients(model, seed):
    """Gradients at random, of very different sizes."""
    torch.manual_seed(seed)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn_like(p) * 10.0 ** (i % 5 - 3)


@pytest.mark.parametrize('shape', [(16, 16), (16, 48), (16, 64), (32, 128)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_orthogonalise_brings_all_singular_values_near_one_and_keeps_the_vectors(shape, dtype):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    found = orthogonalise(matrices.to(dtype)).float()
    assert found.shape == matrices.shape
    for matrix, direction in zip(matrices, found):
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        core = U.T @ direction @ Vh.T   # diagonal if the vectors are the same
        values = torch.linalg.svdvals(direction)
        assert 0.3 < values.min() and values.max() < 1.3
        if dtype == torch.float32:
            torch.testing.assert_close(core, core.diagonal().diag(), rtol=0, atol=1e-3)


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
def test_muon_moves_the_matrices_of_the_blocks_as_torch_does_and_all_else_as_adamw(weight_decay):
    ours, theirs = a_gpt(bias=True), a_gpt(bias=True)
    opt = build('muon', ours, 1e-2, (0.9, 0.95), weight_decay, torch.bfloat16)
    of_blocks = [p for name, p in theirs.named_parameters() if '.h.' in name and p.dim() == 2]
    rest = [p for name, p in theirs.named_parameters() if '.h.' not in name or p.dim() < 2]
    muon = torch.optim.Muon(of_blocks, lr=1e-2, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw')
    plain = torch.optim.AdamW([{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
                               {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}],
                              lr=1e-2, betas=(0.9, 0.95))
    for step in range(4):
        before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
        for model in (ours, theirs):
            spoil_gradients(model, step)
        opt.step()
        muon.step()
        plain.step()
        for (name, p), other in zip(ours.named_parameters(), theirs.parameters()):
            moved = (other - before[name]).norm()
            assert (p - other).norm() < 0.02 * moved, name   # products in bfloat16, in another order
            p.data.copy_(other)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('changes', [{}, {'tie_weights': False, 'layer_scale': 0.1, 'qk_norm': True, 'bias': True}])
def test_every_parameter_is_in_exactly_one_group(optimizer, changes):
    model = a_gpt(**changes)
    groups = build(optimizer, model, 1e-2, (0.9, 0.95), 0.1, torch.float32).param_groups
    ids = [id(p) for group in groups for p in group['params']]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    for group in groups:
        assert all(p.dim() >= 2 for p in group['params']) if group['weight_decay'] else \
               all(p.dim() < 2 for p in group['params'])


def test_muon_holds_one_moment_for_a_matrix_and_passes_over_what_has_no_gradient():
    model = a_gpt()
    opt = build('muon', model, 1e-2, (0.9, 0.95), 0.1, torch.float32)
    spoil_gradients(model, 0)
    frozen = model.transformer.h[0].mlp.c_fc.weight
    frozen.grad, before = None, frozen.detach().clone()
    opt.step()
    assert torch.equal(frozen, before) and frozen not in opt.state
    assert opt.state[model.transformer.h[1].mlp.c_fc.weight].keys() == {'momentum_buffer'}
    assert 'exp_avg_sq' in opt.state[model.transformer.wte.weight]


def test_a_loss_scaler_that_meets_an_overflow_skips_the_whole_step_of_muon():
    model = a_gpt()
    opt = build('muon', model, 1e-2, (0.9, 0.95), 0.1, torch.float16)
    assert opt.dtype == torch.float32
    scaler = torch.amp.GradScaler('cpu')
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1]).backward()
    model.transformer.wpe.weight.grad[0, 0] = math.inf
    scaler.unscale_(opt)
    scaler.step(opt)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_the_state_of_muon_is_taken_over_and_the_next_step_is_the_same_bit_for_bit():
    one, two = a_gpt(), a_gpt()
    first = build('muon', one, 1e-2, (0.9, 0.95), 0.1, torch.bfloat16)
    for step in range(3):
        spoil_gradients(one, step)
        first.step()
    two.load_state_dict(one.state_dict())
    second = build('muon', two, 1e-2, (0.9, 0.95), 0.1, torch.bfloat16)
    load_state(second, copy.deepcopy(first.state_dict()))
    for model, opt in ((one, first), (two, second)):
        spoil_gradients(model, 9)
        opt.step()
    assert all(torch.equal(p, other) for p, other in zip(one.parameters(), two.parameters()))


@pytest.mark.full
def test_neither_training_nor_loading_a_model_imports_the_compiler(tmp_path):
    code = f"""if True:
        import sys, torch
        from flatgpt import checkpoint, optim
        from model import GPT, GPTConfig
        sizes = dict(vocab_size=8, block_size=8, n_layer=1, n_head=1, n_embd=8)
        model = GPT(GPTConfig(**sizes))
        for name in ('adamw', 'muon'):
            opt = optim.build(name, model, 1e-3, (0.9, 0.99), 0.1, torch.float32)
            for _ in range(2):
                model(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))[1].backward()
                opt.step()
                opt.zero_grad()
            optim.load_state(opt, opt.state_dict())
        checkpoint.build({{'model_args': sizes, 'model': model.state_dict()}}, {str(tmp_path / 'x.pt')!r})
        print('torch._dynamo' in sys.modules)"""
    ended = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == 'False\n', ended.stderr
