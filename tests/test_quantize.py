"""How weights are stored for decoding: packed ones compute the same, 8-bit ones nearly the same; the fastest form for
a shape is found by measurement; where a kernel fails or is missing, the plain path works."""

import pytest
import torch
import torch.nn as nn
from test_model import make, tokens

from flatgpt import checkpoint, quantize
from flatgpt.dataset import Dataset
from flatgpt.engine import generate
from flatgpt.quantize import Float16Linear, Int8Linear, LinearByRows, PackedLinear
from flatgpt.runtime import Runtime

SHAPES = [(64, 48, True), (65, 64, False), (1, 7, True), (130, 256, True)]   # out, in, bias


def a_linear(out, width, bias, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).to(dtype)


def packed(linear):
    """What quantize.prepare() makes of this Linear in bfloat16."""
    model = nn.Sequential(linear)
    quantize.prepare(model, machine_with(None, torch.bfloat16))
    return model[0]


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
    quantize.runs.cache_clear()
    yield
    quantize.runs.cache_clear()


def fails(*forms):
    """A runs() for which the trials of some forms have failed and the others not."""
    return lambda form, dtype=None: form not in forms


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
    assert quantize.runs(PackedLinear, torch.bfloat16) == kernel_runs()
    assert quantize.runs(Float16Linear) == ('fbgemm' in torch.backends.quantized.supported_engines)
    assert quantize.runs(quantize.INT8_KERNEL)   # torch has it for each kind of CPU
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
    assert quantize.runs(PackedLinear, torch.bfloat16) is False
    linear = a_linear(64, 48, True)
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
    assert quantize.runs(quantize.INT8_KERNEL) is False


def test_a_kernel_for_8_bits_that_works_is_used_for_few_rows(monkeypatch):
    calls, kernel = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, '_weight_int8pack_mm', lambda *args: calls.append(1) or kernel(*args))
    monkeypatch.setattr(quantize, 'runs', fails())
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

@pytest.mark.parametrize('bits', [None, 'int8'])
@pytest.mark.parametrize('changes', [{}, {'tie_weights': False, 'mlp': 'swiglu', 'n_kv_head': 2}], ids=str)
@pytest.mark.parametrize('trials', ['as they are', 'failing'])
def test_all_linears_are_replaced_and_the_embedding_is_not(monkeypatch, changes, bits, trials):
    if trials == 'failing':
        monkeypatch.setattr(quantize, 'runs', fails(PackedLinear, quantize.INT8_KERNEL))
    if bits:
        expected = Int8Linear
    else:
        expected = PackedLinear if quantize.runs(PackedLinear, torch.bfloat16) else nn.Linear
    model = make(torch.bfloat16, spread=0.02, n_embd=32, **changes)
    embedding, idx = model.transformer.wte.weight.clone(), tokens()
    with torch.inference_mode():
        before = model(idx)[0]
        quantize.prepare(model, machine_with(None, torch.bfloat16), bits)
        linears = [type(module) for module in model.modules() if type(module).__name__.endswith('Linear')]
        assert linears == [expected] * (2 * 4 + 1)
        assert torch.equal(model.transformer.wte.weight, embedding)
        torch.testing.assert_close(model(idx)[0], before, atol=0.03, rtol=0.05)
        assert len(list(generate(model, idx, 5))) == 5


@pytest.mark.parametrize(('bits', 'most'), [(None, 0.0005), ('int8', 0.01)])
def test_16_and_8_bits_cost_little_of_the_loss_of_a_trained_model(everything, trained, char_dataset, bits, most):
    """What docs/sampling.md says of the cost."""
    data = Dataset(str(char_dataset))
    x, y = data.eval_batch('val', 0, 1, 150, 16, torch.device('cpu'))
    model, _, _ = checkpoint.load_model(trained)
    with torch.inference_mode():
        before = model(x, y)[1].item()
        quantize.prepare(model, machine_with(0), bits)   # without memory for the first form
        assert len(quantize.kernels(model, 1)) > 2
        assert model(x, y)[1].item() == pytest.approx(before, rel=most)


# ---------------------------------------------------------------------------------------------------------------------
# float16, and the choice of a form

fbgemm = pytest.mark.skipif('fbgemm' not in torch.backends.quantized.supported_engines, reason='torch without FBGEMM')


def machine_with(memory, dtype=torch.float32):
    """The Runtime of a CPU with so much free memory."""
    rt = Runtime(torch.device('cpu'), dtype, False, 0, 1)
    rt.free_memory = lambda: memory
    return rt


@pytest.fixture
def everything(monkeypatch):
    """No matrix is too small, and nothing is measured: float16 is faster, unless a test says something else in the
    dictionary of seconds that is returned."""
    times = {nn.Linear: 1.0, Float16Linear: 0.01}
    monkeypatch.setattr(quantize, 'SMALL', 0)
    monkeypatch.setattr(quantize, 'CACHED', 0)
    quantize.float16_is_faster.cache_clear()
    monkeypatch.setattr(quantize, 'seconds', lambda module, x: times[type(module)])
    yield times
    quantize.float16_is_faster.cache_clear()


def used(model, rows):
    """{kernel: how many matrices} for so many rows."""
    found = {}
    for (_, kernel, _), n in quantize.kernels(model, rows).items():
        found[kernel] = found.get(kernel, 0) + n
    return found


@fbgemm
@pytest.mark.parametrize('piece', [16, 8192])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('rows', [(1, 1), (2, 40)], ids=str)
def test_float16_gives_the_numbers_of_rounded_weights(monkeypatch, shape, rows, piece):
    monkeypatch.setattr(quantize, 'PIECE', piece)
    linear = a_linear(*shape, torch.float32)
    x = torch.randn(*rows, shape[1])
    with torch.inference_mode():
        result = Float16Linear(linear)(x)
        torch.testing.assert_close(result, linear(x), atol=1e-3, rtol=1e-3)
        linear.weight.copy_(linear.weight.half())
        torch.testing.assert_close(result, linear(x), atol=2e-6, rtol=1e-5)


@fbgemm
def test_by_default_the_text_is_that_of_rounded_weights_whatever_form_is_used(everything):
    texts = []
    for half, rows, memory in ((2.0, 1, None), (0.01, 1, None), (0.01, 3, None), (0.01, 1, 0)):
        everything[Float16Linear] = half   # seconds
        quantize.float16_is_faster.cache_clear()
        model = make(torch.float32, n_embd=32)
        quantize.prepare(model, machine_with(memory), rows=rows)
        assert used(model, 1) == {'FBGEMM float16' if half < 1 else 'torch float32': 9}
        texts.append(torch.stack([token for token, _ in generate(model, tokens(), 8, temperature=0)]))
    assert all(torch.equal(text, texts[0]) for text in texts)


@fbgemm
def test_matrices_are_rounded_also_where_the_kernel_is_slower(everything):
    everything[Float16Linear] = 2.0
    plain, model = make(torch.float32, n_embd=32), make(torch.float32, n_embd=32)
    quantize.prepare(model, machine_with(None))
    assert used(model, 1) == {'torch float32': 9}
    for module, name in quantize.linears(plain):
        getattr(module, name).weight.data.copy_(getattr(module, name).weight.half())
    with torch.inference_mode():
        assert torch.equal(model(tokens())[0], plain(tokens())[0])


@fbgemm
@pytest.mark.parametrize(('memory', 'many'), [(None, 'torch float32'), (2**40, 'torch float32'), (0, 'FBGEMM float16')])
def test_the_first_form_multiplies_many_rows_unless_the_memory_is_short(everything, memory, many):
    model = make(torch.float32, n_embd=32)
    quantize.prepare(model, machine_with(memory), rows=4)
    assert used(model, 1) == used(model, 4) == {'FBGEMM float16': 9}
    assert used(model, quantize.FEW_ROWS + 1) == {many: 9}
    kept = [module for module in model.modules() if type(module) is nn.Linear]
    assert len(kept) == (9 if many == 'torch float32' else 0)   # two forms at most, or one


def test_float32_asked_for_changes_no_number_and_no_module(everything):
    model = make(torch.float32, n_embd=32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantize.prepare(model, machine_with(None), dtype='float32')
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert used(model, 1) == {'torch float32': 9}


@pytest.mark.parametrize('damage', ['raises', 'is not there', 'is wrong'])
def test_without_the_kernel_for_float16_the_plain_path_is_used(everything, monkeypatch, untried, damage):
    def absent(*args):
        raise AttributeError("'_OpNamespace' 'quantized' object has no attribute 'linear_prepack_fp16'")

    monkeypatch.setattr(torch.ops.quantized, 'linear_prepack_fp16', absent if damage == 'is not there' else
                        refuse if damage == 'raises' else lambda weight, bias: weight)
    monkeypatch.setattr(torch.ops.quantized, 'linear_dynamic_fp16', lambda x, weight: x @ weight.T * 1.1)
    model, plain = make(torch.float32, n_embd=32), make(torch.float32, n_embd=32)
    quantize.prepare(model, machine_with(None))
    with torch.inference_mode():
        assert torch.equal(model(tokens())[0], plain(tokens())[0])
    assert used(model, 1) == {'torch float32': 9}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('memory', [0, 2**40])
def test_int8_asked_for_is_one_form_whatever_is_fast_or_free(everything, monkeypatch, memory, dtype):
    everything[Int8Linear] = 100.0
    monkeypatch.setattr(quantize, 'CACHED', 2**40)
    expected, model, idx = make(dtype, spread=0.02, n_embd=32), make(dtype, spread=0.02, n_embd=32), tokens()
    quantize.replace_linears(expected, Int8Linear)
    quantize.prepare(model, machine_with(memory, dtype), 'int8', rows=8)
    assert used(model, 1) == used(model, 8) == used(model, 100) == {'torch int8': 9}
    assert not [module for module in model.modules() if type(module) is nn.Linear]   # which would need memory
    with torch.inference_mode():
        assert torch.equal(model(idx)[0], expected(idx)[0])


@fbgemm
@pytest.mark.parametrize(('memory', 'notices'), [(2**40, 1), (0, 0)])
def test_second_forms_of_a_large_model_are_announced_if_they_need_more_memory(
        everything, monkeypatch, capsys, memory, notices):
    for limit, expected in ((0, notices), (2**40, 0)):
        monkeypatch.setattr(quantize, 'NOTICED', limit)
        quantize.prepare(make(torch.float32, n_embd=32), machine_with(memory))
        assert capsys.readouterr().err.count('more memory') == expected


@fbgemm
@pytest.mark.parametrize(('plain', 'half', 'faster'), [
    ({1: 8, 4: 8}, {1: 4, 4: 4}, (True, True)), ({1: 8, 4: 8}, {1: 4, 4: 16}, (True, False)),
    ({1: 8, 4: 8}, {1: 16, 4: 4}, (False, True)), ({1: 8, 4: 8}, {1: 16, 4: 16}, (False, False)),
])
def test_float16_is_used_for_the_numbers_of_rows_for_which_it_is_faster(everything, monkeypatch, plain, half, faster):
    times = {nn.Linear: plain, Float16Linear: half}
    monkeypatch.setattr(quantize, 'seconds', lambda module, x: times[type(module)][len(x)])
    model = make(torch.float32, n_embd=32)
    quantize.prepare(model, machine_with(None), rows=4)
    names = {True: 'FBGEMM float16', False: 'torch float32'}
    assert (used(model, 1), used(model, 4)) == tuple({names[is_faster]: 9} for is_faster in faster)


@fbgemm
def test_each_shape_is_measured_once_for_one_row_and_for_several(everything, monkeypatch):
    calls = []
    monkeypatch.setattr(quantize, 'seconds', lambda module, x: calls.append((type(module), len(x))) or 1.0)
    for _ in range(2):
        quantize.prepare(make(torch.float32, n_embd=32), machine_with(None), rows=40)
    shapes = 5   # four of a block, and the head
    assert sorted(calls, key=str) == sorted(
        [(form, n) for form in (nn.Linear, Float16Linear) for n in (1, quantize.FEW_ROWS)] * shapes, key=str)


@fbgemm
def test_the_time_is_that_of_the_fastest_call_and_of_reading_the_bytes(everything, monkeypatch):
    monkeypatch.setattr(quantize, 'BANDWIDTH', 4.0)
    everything[Float16Linear] = 1 + 3 * 8 * 2 / 4   # two bytes less for each number
    shape = torch.Size((3, 8))
    assert not quantize.float16_is_faster(shape, 5)
    everything[Float16Linear] -= 0.01
    quantize.float16_is_faster.cache_clear()
    assert quantize.float16_is_faster(shape, 5)


def test_seconds_are_those_of_the_fastest_call(monkeypatch):
    now = iter([0, 3, 10, 11, 20, 22, 30, 39, 40, 49, 50, 59])   # before and after each call
    monkeypatch.setattr(quantize.time, 'perf_counter', lambda: next(now))
    assert quantize.seconds(lambda x: x, torch.ones(1, 4)) == 1


@fbgemm
def test_a_model_that_caches_hold_stays_as_it_is(everything, monkeypatch):
    model = make(torch.float32, n_embd=32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights = sum(getattr(module, name).weight.nbytes for module, name in quantize.linears(model))
    monkeypatch.setattr(quantize, 'CACHED', weights + 1)
    quantize.prepare(model, machine_with(None))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert used(model, 1) == {'torch float32': 9}
    monkeypatch.setattr(quantize, 'CACHED', weights)
    quantize.prepare(model, machine_with(None))
    assert used(model, 1) == {'FBGEMM float16': 9}


@fbgemm
def test_packing_waits_for_some_tokens_and_goes_block_by_block(everything, monkeypatch):
    monkeypatch.setattr(quantize, 'WAIT', 2)
    model = make(torch.float32, n_embd=32)
    quantize.prepare(model, machine_with(None), gradually=True)
    idx = tokens(1, 3)
    packed = [used(model, 1).get('FBGEMM float16', 0) for _ in generate(model, idx, 7)]
    assert packed == [0, 0, 0, 1, 5, 9, 9]   # the prompt gives a token; two more; the head; the blocks of four


@fbgemm
@pytest.mark.parametrize('number', [1e5, float('nan')])
def test_a_matrix_with_numbers_that_float16_does_not_have_stays_as_it_is(everything, number):
    model = make(torch.float32, n_embd=32)
    weight = model.transformer.h[0].mlp.c_fc.weight
    weight.data[0, 0] = number
    quantize.prepare(model, machine_with(None))
    assert type(model.transformer.h[0].mlp.c_fc) is nn.Linear
    assert used(model, 1) == {'torch float32': 1, 'FBGEMM float16': 8}


def test_one_form_for_a_row_another_for_some_and_a_third_use_of_them_for_many():
    calls = []

    def form(name):
        module = nn.Module()
        module.forward = lambda x: calls.append(name)
        return module

    linear = LinearByRows(form('one'), form('few'), form('many'))
    for rows in (1, 2, quantize.FEW_ROWS, quantize.FEW_ROWS + 1):
        linear(torch.ones(1, rows, 4))
    assert calls == ['one', 'few', 'few', 'many']
