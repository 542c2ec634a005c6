"""How weights are stored for decoding: packed ones compute the same, 8-bit ones nearly the same; where a kernel fails
or is missing, the plain path works."""

import pytest
import torch
import torch.nn as nn
from test_model import make, tokens

from flatgpt import checkpoint, quantize
from flatgpt.dataset import Dataset
from flatgpt.engine import generate
from flatgpt.quantize import Int8Linear, PackedLinear

SHAPES = [(64, 48, True), (65, 64, False), (1, 7, True), (130, 256, True)]   # out, in, bias


def a_linear(out, width, bias, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).to(dtype)


def packed(linear):
    """What quantize.pack() makes of a model whose head is this Linear."""
    model = nn.Module()
    model.lm_head = linear
    return quantize.pack(model).lm_head


def kernel_runs():
    """Whether oneDNN packs a matrix in bfloat16 here, found by trying."""
    try:
        PackedLinear(a_linear(8, 8, True))
    except (RuntimeError, AttributeError):
        return False
    return True


@pytest.fixture
def untried():
    """No kernel has been tried in this process yet, and none counts as tried afterwards."""
    trials = quantize.can_pack, quantize.int8_kernel_works
    for trial in trials:
        trial.cache_clear()
    yield
    for trial in trials:
        trial.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# packed by oneDNN

@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('rows', [(1, 1), (2, 40)], ids=str)
def test_packing_gives_the_same_numbers_with_the_kernel_or_without(shape, rows):
    linear = a_linear(*shape)
    x = torch.randn(*rows, shape[1], dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = linear(x)
        result = packed(linear)
        assert type(result) is (PackedLinear if kernel_runs() else nn.Linear)
        torch.testing.assert_close(result(x), expected, atol=1e-2, rtol=1.6e-2)


def test_the_trial_finds_whether_the_kernel_runs_and_uses_no_random_numbers(untried):
    state = torch.get_rng_state()
    assert quantize.can_pack() == kernel_runs()
    assert quantize.int8_kernel_works() in (True, False)
    assert torch.equal(torch.get_rng_state(), state)


def refuse(*args):
    raise RuntimeError('bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq')


def missing(*args):
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


KERNELS = {
    'does not pack': ('_reorder_linear_weight', refuse),
    'does not multiply': ('_linear_pointwise', refuse),
    'is not there': ('_linear_pointwise', missing),
    'is wrong': ('_linear_pointwise', lambda x, weight, *args: x.new_ones(*x.shape[:-1], weight.size(0))),
}


@pytest.mark.parametrize('damage', KERNELS)
def test_a_kernel_that_fails_is_not_used_whatever_oneDNN_says(monkeypatch, untried, damage):
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: True)
    name, kernel = KERNELS[damage]
    monkeypatch.setattr(torch.ops.mkldnn, name, kernel)
    if damage != 'does not pack':
        monkeypatch.setattr(torch.ops.mkldnn, '_reorder_linear_weight', lambda weight, rows: weight)
    assert quantize.can_pack() is False
    linear = a_linear(64, 48, True)
    assert packed(linear) is linear


def test_a_matrix_that_oneDNN_refuses_is_not_packed_after_a_good_trial(monkeypatch):
    monkeypatch.setattr(quantize, 'can_pack', lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, '_reorder_linear_weight', refuse)
    linear = a_linear(64, 48, True)
    assert packed(linear) is linear


@pytest.mark.parametrize('why', ['float32', 'the trial fails'])
def test_a_linear_that_cannot_be_packed_is_not_replaced(monkeypatch, why):
    if why == 'the trial fails':
        monkeypatch.setattr(quantize, 'can_pack', lambda: False)
    linear = a_linear(64, 48, True, torch.float32 if why == 'float32' else torch.bfloat16)
    assert packed(linear) is linear


# ---------------------------------------------------------------------------------------------------------------------
# 8 bits

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('rows', [(1, 1), (2, 40)], ids=str)
def test_8_bit_weights_differ_by_half_a_step_of_their_channel_at_most(shape, rows, dtype):
    linear = a_linear(*shape, dtype)
    quantized = Int8Linear(linear)
    assert quantized.weight.dtype == torch.int8 and quantized.weight.abs().max() == 127
    weight = quantized.weight.float() * quantized.scale.float()[:, None]
    step = linear.weight.float().abs().amax(dim=1, keepdim=True) / 127
    assert ((weight - linear.weight.float()).abs() <= step * 0.52).all()   # the scale is rounded too, in bfloat16
    x = torch.randn(*rows, shape[1], dtype=dtype)
    with torch.inference_mode():
        expected = nn.functional.linear(x.float(), weight, linear.bias if linear.bias is None else linear.bias.float())
        torch.testing.assert_close(quantized(x).float(), expected, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize('damage', ['raises', 'is not there', 'is wrong'])
def test_a_kernel_for_8_bits_that_fails_is_not_used(monkeypatch, untried, damage):
    x, linear = torch.randn(2, 64, dtype=torch.bfloat16), a_linear(48, 64, True)
    with torch.inference_mode():
        expected = Int8Linear(linear, use_kernel=False)(x)
        if damage == 'is not there':
            monkeypatch.delattr(torch, '_weight_int8pack_mm')
        else:
            wrong = lambda x, weight, scale: x.new_ones(len(x), len(weight))
            monkeypatch.setattr(torch, '_weight_int8pack_mm', wrong if damage == 'is wrong' else refuse)
        assert torch.equal(Int8Linear(linear)(x), expected)
    assert quantize.int8_kernel_works() is False


def test_a_kernel_for_8_bits_that_works_is_used_for_few_rows(monkeypatch):
    calls, kernel = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, '_weight_int8pack_mm', lambda *args: calls.append(1) or kernel(*args))
    monkeypatch.setattr(quantize, 'int8_kernel_works', lambda: True)
    linear = Int8Linear(a_linear(48, 64, True))
    with torch.inference_mode():
        for rows, counted in ((1, 1), (quantize.KERNEL_ROWS, 2), (quantize.KERNEL_ROWS + 1, 2)):
            linear(torch.randn(rows, 64, dtype=torch.bfloat16))
            assert len(calls) == counted


def test_large_activations_do_not_overflow_in_float16():
    linear = nn.Linear(768, 8, bias=False).half()
    linear.weight.data.fill_(0.05)
    x = torch.full((1, 768), 30.0, dtype=torch.float16)
    torch.testing.assert_close(Int8Linear(linear)(x), linear(x), atol=2, rtol=1e-2)


def test_a_channel_of_zeros_stays_zero():
    linear = a_linear(3, 8, False, torch.float32)
    linear.weight.data[1] = 0
    assert Int8Linear(linear)(torch.randn(2, 8))[:, 1].tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# a whole model

@pytest.mark.parametrize('change', [quantize.pack, quantize.int8])
@pytest.mark.parametrize('changes', [{}, {'tie_weights': False, 'mlp': 'swiglu', 'n_kv_head': 2}], ids=str)
@pytest.mark.parametrize('trials', ['as they are', 'failing'])
def test_all_linears_are_replaced_and_the_embedding_is_not(monkeypatch, changes, change, trials):
    if trials == 'failing':
        monkeypatch.setattr(quantize, 'can_pack', lambda: False)
        monkeypatch.setattr(quantize, 'int8_kernel_works', lambda: False)
    if change is quantize.int8:
        expected = Int8Linear
    else:
        expected = PackedLinear if quantize.can_pack() else nn.Linear
    model = make(torch.bfloat16, spread=0.02, n_embd=32, **changes)
    embedding, idx = model.transformer.wte.weight.clone(), tokens()
    with torch.inference_mode():
        before = model(idx)[0]
        change(model)
        linears = [type(module) for module in model.modules() if type(module).__name__.endswith('Linear')]
        assert linears == [expected] * (2 * 4 + 1)
        assert torch.equal(model.transformer.wte.weight, embedding)
        torch.testing.assert_close(model(idx)[0], before, atol=0.03, rtol=0.05)
        assert len(list(generate(model, idx, 5))) == 5


def test_8_bits_cost_little_of_the_loss_of_a_trained_model(trained, char_dataset):
    """docs/results.md has the cost for a larger model."""
    data, losses = Dataset(str(char_dataset)), {}
    x, y = data.eval_batch('val', 0, 1, 150, 16, torch.device('cpu'))
    for change in (quantize.pack, quantize.int8):
        model, _, _ = checkpoint.load_model(trained)
        change(model.to(torch.bfloat16))
        with torch.inference_mode():
            losses[change] = model(x, y)[1].item()
    print(losses)
    assert losses[quantize.int8] == pytest.approx(losses[quantize.pack], rel=0.01)
