"""flatgpt/runtime.py, flatgpt/machine.py: choice of the machine, refusals, two processes."""

import ast
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT, killed_after, needs, run, torchrun
from test_repo import MODULES
from torch.nn.attention import SDPBackend

from flatgpt import engine, machine, runtime
from flatgpt.engine import generate
from flatgpt.errors import UsageError
from flatgpt.machine import pick_compile, pick_device, pick_dtype
from flatgpt.runtime import Runtime
from model import GPT, GPTConfig

CPU = torch.device('cpu')


def a_runtime(device='cpu', dtype=torch.float32, compile=False, rank=0, world_size=1):
    return Runtime(torch.device(device), dtype, compile, rank, world_size)


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes torch find n GPUs and no Apple GPU."""
    def pretend(n):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: n > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: n)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    return pretend


# ---------------------------------------------------------------------------------------------------------------------
# device

@pytest.mark.parametrize(('n', 'name', 'local_rank', 'expected'), [
    (0, 'auto', None, 'cpu'), (0, 'auto', 1, 'cpu'), (0, 'cpu', 1, 'cpu'),
    (2, 'auto', None, 'cuda:0'), (2, 'cuda', None, 'cuda:0'), (2, 'cuda:1', None, 'cuda:1'), (2, 'cpu', None, 'cpu'),
    (2, 'auto', 1, 'cuda:1'), (2, 'cuda', 1, 'cuda:1'), (2, 'cuda:0', 1, 'cuda:1'),   # each process takes its own
])
def test_device_follows_the_name_and_the_local_rank(gpus, n, name, local_rank, expected):
    gpus(n)
    assert pick_device(name, local_rank) == torch.device(expected)


def test_auto_takes_an_apple_gpu_that_works_if_there_is_no_other(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    ones = torch.ones
    monkeypatch.setattr(torch, 'ones', lambda *shape, device: ones(*shape))
    assert pick_device('auto', None) == pick_device('mps', None) == torch.device('mps')
    assert pick_device('auto', 1) == CPU   # several processes cannot share it


def test_an_apple_gpu_that_fails_is_not_used_by_auto_and_refused_by_name(gpus, monkeypatch, capsys):
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)   # where there is none, the trial raises
    monkeypatch.setattr(torch, 'ones', lambda *shape, device: torch.zeros(*shape))
    assert pick_device('auto', None) == CPU
    with pytest.raises(UsageError, match="device='mps'.*try device='auto'"):
        pick_device('mps', None)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize(('n', 'name', 'local_rank', 'words'), [
    (0, 'cuda', None, ["device='cuda:0'", '0 GPUs', "try device='auto'"]),
    (1, 'cuda:1', None, ["device='cuda:1'", '1 GPUs', "try device='auto'"]),
    (1, 'auto', 1, ["device='cuda:1'", '1 GPUs', "try device='auto'"]),   # more processes than GPUs
    *((0, 'mps', rank, ["device='mps'", "try device='auto'"]) for rank in (None, 1)),
    *((2, name, None, [f'device={name!r}', "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"])
      for name in ('gpu', '', 'cuda:x', 'cuda:-1', 'cuda:1:1', 'CUDA', 'cuda:²')),
])
def test_a_device_that_is_not_there_is_refused_with_value_and_remedy(gpus, n, name, local_rank, words):
    gpus(n)
    with pytest.raises(UsageError) as refusal:
        pick_device(name, local_rank)
    assert all(word in str(refusal.value) for word in words), refusal.value


# ---------------------------------------------------------------------------------------------------------------------
# precision

INTEL, ARM = {'avx512_bf16': True, 'amx_bf16': False}, {'neon': True, 'bf16': True}


@pytest.mark.parametrize(('can', 'used', 'limit', 'onednn', 'expected'), [
    (INTEL, 'AVX512', None, True, torch.bfloat16), ({'amx_bf16': True}, 'AVX512', None, True, torch.bfloat16),
    (INTEL, 'AVX512', 'AVX512_CORE_BF16', True, torch.bfloat16), (INTEL, 'AVX512', 'ALL', True, torch.bfloat16),
    (INTEL, 'AVX512', 'AVX512_CORE', True, torch.float32), (INTEL, 'AVX512', 'avx512_core_vnni', True, torch.float32),
    (INTEL, 'AVX2', None, True, torch.float32), (INTEL, 'DEFAULT', None, True, torch.float32),   # ATEN_CPU_CAPABILITY
    (INTEL, 'AVX512', 'AVX2', False, torch.float32), (INTEL, 'AVX2', 'AVX2', False, torch.float32),
    ({'avx512_bf16': False, 'amx_bf16': False}, 'AVX512', None, True, torch.float32),
    ({}, 'AVX2', None, False, torch.float32),
    (ARM, 'SVE256', None, True, torch.bfloat16), (ARM, 'DEFAULT', None, True, torch.bfloat16),
    (ARM, 'DEFAULT', None, None, torch.float32), ({'neon': True, 'bf16': False}, 'DEFAULT', None, True, torch.float32),
])
def test_auto_dtype_on_a_cpu_is_bfloat16_where_the_cpu_multiplies_it(monkeypatch, can, used, limit, onednn, expected):
    """used: what torch uses of what the CPU can; limit: the variable of oneDNN; onednn: its own answer, None: there is
    no oneDNN."""
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: can)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: used)
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: onednn is not None)
    if onednn is not None:
        monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: onednn)
    monkeypatch.delenv('ONEDNN_MAX_CPU_ISA', raising=False)
    if limit:
        monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', limit)
    assert pick_dtype('auto', CPU) == expected


@pytest.mark.parametrize(('speedup', 'expected'), [(2, torch.bfloat16), (1.1, torch.float32), (0.5, torch.float32)])
def test_training_on_a_cpu_is_in_bfloat16_only_if_its_products_are_faster(monkeypatch, speedup, expected):
    monkeypatch.setattr(machine, 'cpu_multiplies_bfloat16', lambda: True)
    monkeypatch.setattr(Runtime, 'measured_flops', lambda rt: 1e9 * (speedup if rt.dtype == torch.bfloat16 else 1))
    assert runtime.setup('cpu', training=True).dtype == expected


def test_what_is_not_to_be_measured_is_not(monkeypatch):
    monkeypatch.setattr(machine, 'cpu_multiplies_bfloat16', lambda: True)
    monkeypatch.setattr(Runtime, 'measured_flops', lambda rt: pytest.fail('measured'))
    assert runtime.setup('cpu').dtype == torch.bfloat16   # to decode, memory decides
    assert runtime.setup('cpu', 'bfloat16', training=True).dtype == torch.bfloat16
    assert runtime.setup('cpu', training=True, earlier=('cpu', 'bfloat16')).dtype == torch.bfloat16
    monkeypatch.setattr(machine, 'cpu_multiplies_bfloat16', lambda: False)
    assert runtime.setup('cpu', training=True).dtype == torch.float32


def test_a_resumed_run_keeps_its_dtype_on_the_same_kind_of_device_only(monkeypatch):
    monkeypatch.setattr(runtime, 'bfloat16_is_faster', lambda world_size: True)
    monkeypatch.setattr(machine, 'cpu_multiplies_bfloat16', lambda: True)
    assert runtime.setup('cpu', training=True, earlier=('cpu', 'float32')).dtype == torch.float32
    assert runtime.setup('cpu', 'bfloat16', training=True, earlier=('cpu', 'float32')).dtype == torch.bfloat16
    assert runtime.setup('cpu', training=True, earlier=('cuda', 'float32')).dtype == torch.bfloat16


@pytest.mark.full
def test_a_process_that_is_limited_to_avx2_is_one_of_a_cpu_with_avx2():
    code = ('import torch; from flatgpt import machine; from flatgpt.quantize import PackedLinear, runs; '
            'print(machine.pick_dtype("auto", torch.device("cpu")), runs(PackedLinear, torch.bfloat16))')
    limits = {'ATEN_CPU_CAPABILITY': 'avx2', 'ONEDNN_MAX_CPU_ISA': 'AVX2'}
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, **limits}, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split() == ['torch.float32', 'False']


@pytest.mark.parametrize(('engines', 'compile', 'expected'), [
    (['fbgemm'], False, torch.float32), (['qnnpack'], False, torch.bfloat16), (['fbgemm'], True, torch.bfloat16)])
def test_decoding_on_a_cpu_is_in_float32_where_a_kernel_reads_float16(monkeypatch, engines, compile, expected):
    monkeypatch.setattr(machine, 'cpu_multiplies_bfloat16', lambda: True)
    monkeypatch.setattr(machine, 'pick_compile', lambda choice, device: choice)
    monkeypatch.setattr(torch.backends, 'quantized', types.SimpleNamespace(supported_engines=engines))
    assert runtime.setup('cpu', compile=compile, decoding=True).dtype == expected
    assert runtime.setup('cpu', 'bfloat16', compile=compile, decoding=True).dtype == torch.bfloat16


@pytest.mark.parametrize(('capability', 'expected'), [((7, 5), torch.float32), ((8, 0), torch.bfloat16),
                                                      ((10, 0), torch.bfloat16)])
def test_auto_dtype_on_a_gpu_is_bfloat16_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert pick_dtype('auto', torch.device('cuda:0')) == expected


def test_auto_dtype_on_an_apple_gpu_is_float32():
    assert pick_dtype('auto', torch.device('mps')) == torch.float32


@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'float16'])
def test_a_named_dtype_is_taken(name):
    assert pick_dtype(name, CPU) == getattr(torch, name)


@pytest.mark.parametrize('name', ['float64', 'bf16', 'fp16', ''])
def test_an_unknown_dtype_is_refused_with_the_known_ones(name):
    with pytest.raises(UsageError) as refusal:
        pick_dtype(name, CPU)
    assert all(word in str(refusal.value)
               for word in (f'dtype={name!r}', "'auto'", "'float32'", "'bfloat16'", "'float16'"))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_matrix_products_run_in_the_chosen_dtype_and_only_float16_is_scaled(dtype):
    rt = a_runtime(dtype=dtype)
    weight = torch.ones(2, 2, requires_grad=True)
    with rt.autocast():
        product = torch.ones(2, 2) @ weight
    assert product.dtype == dtype
    assert (torch.ones(2, 2) @ weight).dtype == torch.float32
    scaler = rt.grad_scaler()
    assert scaler.is_enabled() == (dtype == torch.float16)
    loss = product.float().sum()
    assert (scaler.scale(loss) > loss) == (dtype == torch.float16)


# ---------------------------------------------------------------------------------------------------------------------
# compilation

class Elsewhere(str):
    """A device that torch allocates on as if it were the CPU, and that says it is a GPU."""
    type = 'cuda'


@pytest.fixture
def compiled(monkeypatch):
    """What was given to torch.compile, which gives it back as it is."""
    seen = []
    monkeypatch.setattr(torch, 'compile', lambda function: seen.append(function) or function)
    return seen


GPU, APPLE = Elsewhere('cpu'), torch.device('mps')


@pytest.mark.parametrize(('choice', 'device'), [(False, CPU), (False, GPU), ('auto', CPU), ('auto', APPLE)])
def test_where_nothing_is_compiled_there_is_no_trial(compiled, choice, device):
    assert pick_compile(choice, device) is False
    assert compiled == []


@pytest.mark.parametrize(('choice', 'device'), [(True, CPU), (True, GPU), ('auto', GPU)])
def test_compile_is_used_after_a_trial(compiled, capsys, choice, device):
    assert pick_compile(choice, device) is True
    assert len(compiled) == 1
    assert capsys.readouterr() == ('', '')


def broken(*args, **options):
    raise RuntimeError('Cannot find a working triton installation\nand ten lines more')


FAILURES = {'at once': (broken, 'RuntimeError: Cannot find a working triton installation'),
            'when called': (lambda function: broken, 'RuntimeError: Cannot find a working triton installation'),
            'wrong': (lambda function: lambda x: x, 'wrong numbers')}


@pytest.mark.parametrize(('choice', 'device'), [(True, CPU), ('auto', GPU)])
@pytest.mark.parametrize('failure', FAILURES)
def test_compile_is_not_used_and_a_line_says_so_when_the_trial_fails(monkeypatch, capsys, choice, device, failure):
    compile, reason = FAILURES[failure]
    monkeypatch.setattr(torch, 'compile', compile)
    assert pick_compile(choice, device) is False
    assert capsys.readouterr() == ('', f'torch.compile does not work here ({reason}), continuing without it\n')


def test_only_one_process_per_machine_prints_that_a_trial_failed(monkeypatch, capsys):
    monkeypatch.setattr(torch, 'compile', broken)
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert pick_compile(True, CPU) is False
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('fails', [False, True])
def test_decoding_is_compiled_if_the_first_step_works_and_prompts_are_not(monkeypatch, capsys, fails):
    torch.manual_seed(0)
    model, calls = GPT(GPTConfig(11, 8, 1, 8, 2)).eval(), []
    prompt = torch.tensor([[1, 2, 3]])
    expected = [token.item() for token, _ in generate(model, prompt, 5, temperature=0)]

    def compile(function, **options):
        def compiled(idx, *rest):
            calls.append((options, idx.size(1)))
            return broken() if fails else function(idx, *rest)
        return compiled

    monkeypatch.setattr(torch, 'compile', compile)
    engine.compile_step(model)
    for _ in range(2):
        assert [token.item() for token, _ in generate(model, prompt, 5, temperature=0, static_cache=True)] == expected
    assert calls == [({'options': {'freezing': True}}, 1)] * (1 if fails else 9)   # the first of 2 * 4 is the trial
    notice = f'torch.compile does not work here ({FAILURES["at once"][1]}), continuing without it\n' if fails else ''
    assert capsys.readouterr() == ('', notice)


@pytest.mark.full
def test_without_a_compiler_a_script_that_is_told_to_compile_goes_on_without(tmp_path, trained):
    """The cache is empty, and no folder of PATH has a compiler."""
    nowhere = {'PATH': str(tmp_path), 'CXX': str(tmp_path / 'c++'), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}
    args = (f'--out_dir={trained}', '--start=1 times', '--num_samples=2', '--max_new_tokens=9', '--temperature=0')
    plain = run('sample.py', *args)
    done = run('sample.py', *args, '--compile=True', **nowhere)
    assert (done.returncode, done.stdout) == (0, plain.stdout), done.stderr
    assert 'Traceback' not in done.stderr
    assert done.stderr.count('torch.compile does not work here') == 1 and ', not compiled, ' in done.stderr


@pytest.mark.parametrize('choice', ['yes', '', 'max-autotune'])
def test_an_unknown_compile_is_refused_with_the_known_ones(choice):
    with pytest.raises(UsageError) as refusal:
        pick_compile(choice, CPU)
    assert f'compile={choice!r}' in str(refusal.value)
    assert "'auto', True or False" in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# setup, seeds, description

@pytest.fixture
def alone(monkeypatch):
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)


def test_setup_chooses_and_seeds(alone):
    rt = runtime.setup('cpu', 'bfloat16', 'auto', seed=5)
    first = torch.rand(3)
    assert rt == a_runtime(dtype=torch.bfloat16)
    assert rt.master
    runtime.setup('cpu', 'float32', 'auto', seed=5)
    assert torch.equal(torch.rand(3), first)
    runtime.setup('cpu', 'float32', 'auto', seed=6)
    assert not torch.equal(torch.rand(3), first)
    rt.sync()
    rt.close()


def test_one_process_needs_no_wrapping():
    rt, model = a_runtime(), torch.nn.Linear(2, 2)
    assert rt.wrap(model) is model
    assert rt.mean(torch.tensor(3.0)) == 3
    assert (rt.any_process(True), rt.any_process(False)) == (True, False)
    with rt.average_gradients(model, on=False):
        pass


def rand_after(seed, step, **process):
    a_runtime(**process).reseed(seed, step)
    return torch.rand(4).tolist()


def test_reseeding_is_a_function_of_seed_step_and_rank():
    draws = [rand_after(seed, step, rank=rank, world_size=2)
             for seed in (0, 1, 1337) for step in (0, 1, 500) for rank in (0, 1)]
    assert len(set(map(tuple, draws))) == len(draws)
    assert rand_after(1337, 500, rank=1, world_size=2) == draws[-1]


@pytest.mark.parametrize('seed', [-1, -10 ** 19, 2 ** 32, 2 ** 63 - 1, 1_700_000_000_123_456_789])
def test_any_integer_is_a_seed(alone, seed):
    runtime.setup('cpu', 'float32', False, seed)
    assert rand_after(seed, 10) != rand_after(seed + 1, 10)


@pytest.mark.parametrize(('compile', 'world_size', 'words'), [
    (True, 1, [', compiled, ', '1 process,']), (False, 8, [', not compiled, ', '8 processes,']),
])
def test_the_machine_is_described_in_one_line(compile, world_size, words):
    line = a_runtime(dtype=torch.bfloat16, compile=compile, world_size=world_size).describe()
    assert len(line.splitlines()) == 1
    for word in ('cpu', 'bfloat16', f'torch {torch.__version__}', 'Python 3.', f'{torch.get_num_threads()} thread',
                 *words):
        assert word in line, line


# ---------------------------------------------------------------------------------------------------------------------
# how fast it could be, how much memory it took

@pytest.mark.parametrize(('name', 'tflops'), [
    ('NVIDIA H200', 989), ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA H100 NVL', 835),
    ('NVIDIA H20', 148), ('NVIDIA GH200 480GB', 989), ('NVIDIA B200', 2250), ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA A100-PCIE-40GB', 312), ('NVIDIA A10', 125), ('NVIDIA A30', 165), ('NVIDIA A40', 150), ('NVIDIA L4', 121),
    ('NVIDIA L40', 181), ('NVIDIA L40S', 362), ('NVIDIA GeForce RTX 3090', 71), ('NVIDIA GeForce RTX 4090', 165),
    ('NVIDIA RTX A6000', 155), ('NVIDIA RTX 6000 Ada Generation', 364),
])
def test_peak_of_a_gpu_comes_from_the_row_of_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert a_runtime('cuda:0', torch.bfloat16).peak_flops() == tflops * 1e12
    assert a_runtime('cuda:0', torch.float16).peak_flops() == tflops * 1e12
    assert a_runtime('cuda:0', torch.float32).peak_flops() == tflops * 1e12 / 2


@pytest.mark.parametrize('name', ['Tesla T4', 'Tesla V100-SXM2-16GB', 'AMD Instinct MI300X', 'Quadro P4000',
                                  'NVIDIA RTX A1000 Laptop GPU', 'NVIDIA RTX A3000 Laptop GPU', 'NVIDIA RTX A4000'])
def test_peak_of_an_unknown_gpu_is_unknown_and_not_that_of_another(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert a_runtime('cuda:0', torch.bfloat16).peak_flops() is None


def test_peak_of_an_apple_gpu_is_unknown():
    assert a_runtime('mps').peak_flops() is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_peak_of_a_cpu_is_what_a_matrix_product_reaches(monkeypatch, dtype):
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    counts, results = [], []

    def timed(self, work):
        with FlopCounterMode(display=False) as counter:
            results.append(work())
        counts.append(counter.get_total_flops())
        return 0.5

    monkeypatch.setattr(Runtime, 'best_time', timed)
    with FakeTensorMode():   # whose products take no time
        assert a_runtime(dtype=dtype).peak_flops() == counts[0] / 0.5 > 0
    assert results[0].dtype == dtype


def test_bandwidth_is_that_of_the_faster_of_two_ways_to_read_memory(monkeypatch):
    read, times = [], iter([0.4, 0.2])

    def timed(self, work):
        work()
        read.append(work.__self__.nbytes)   # of the tensor that is summed
        return next(times)

    monkeypatch.setattr(Runtime, 'best_time', timed)
    assert a_runtime().measured_bandwidth() == read[0] / 0.2
    assert read == [2 ** 28, 2 ** 28]


@pytest.mark.parametrize('seconds, calls', [([0.05, 0.03, 0.07, 0.02] + [0.09] * 9, 10), ([0.6, 0.5, 0.4], 2)])
def test_best_time_is_the_shortest_of_ten_that_begin_within_a_second(monkeypatch, seconds, calls):
    took, now = iter(seconds), [100.0]

    def work():
        now[0] += next(took)

    monkeypatch.setattr(runtime.time, 'perf_counter', lambda: now[0])
    assert a_runtime().best_time(work) == pytest.approx(min(seconds[:calls]))
    assert len(list(took)) == len(seconds) - calls


# ---------------------------------------------------------------------------------------------------------------------
# what is set for torch, once per process

@pytest.fixture
def kernels():
    """A function that gives the attention kernels that torch may use, in order; as before once the test has ended."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    def now():
        return [backend.name.removesuffix('_ATTENTION') for backend in _cur_sdpa_kernel_backends(with_priority=True)]

    before = now()
    yield now
    machine.kernel_priority.close()
    assert now() == before


@pytest.mark.parametrize(('capability', 'good', 'order'), [
    ((9, 0), {'CUDNN', 'FLASH', 'EFFICIENT'}, ['CUDNN', 'FLASH', 'EFFICIENT', 'MATH']),
    ((9, 0), {'FLASH', 'EFFICIENT'}, ['FLASH', 'EFFICIENT', 'MATH']),
    ((8, 0), {'CUDNN', 'FLASH', 'EFFICIENT'}, ['FLASH', 'CUDNN', 'EFFICIENT', 'MATH']),
    ((12, 0), {'CUDNN', 'EFFICIENT'}, ['CUDNN', 'EFFICIENT', 'MATH']),
    ((7, 5), {'EFFICIENT'}, ['EFFICIENT', 'MATH']),
    ((7, 0), set(), ['MATH']),
])
def test_the_fastest_attention_kernel_that_works_goes_first_and_is_named(monkeypatch, kernels, capability, good, order):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(machine, 'attention_kernel_works',
                        lambda kernel, device, dtype: kernel.name.removesuffix('_ATTENTION') in good)
    first = machine.prioritize_attention_kernels(CPU, torch.bfloat16)
    assert first == order[0].lower()
    assert kernels() == order
    line = Runtime(CPU, torch.float32, False, 0, 1, first).describe()
    assert f', {first} attention, ' in line
    assert 'attention' not in a_runtime().describe()


def test_the_trial_of_an_attention_kernel_runs_it(monkeypatch):
    """On a CPU: torch has one fused kernel for it, and none of cuDNN's."""
    trial, attend = machine.attention_kernel_works, torch.nn.functional.scaled_dot_product_attention
    assert trial(SDPBackend.MATH, CPU, torch.float32) and trial(SDPBackend.FLASH_ATTENTION, CPU, torch.bfloat16)
    assert not trial(SDPBackend.CUDNN_ATTENTION, CPU, torch.bfloat16)

    def damaged(damage):
        def attention(q, k, v, is_causal):
            y = attend(q, k, v, is_causal=is_causal)
            return damage(y) if torch.backends.cuda.flash_sdp_enabled() else y
        monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', attention)

    damaged(lambda y: y)
    assert trial(SDPBackend.FLASH_ATTENTION, CPU, torch.float32)
    for damage in (lambda y: y * 1.2, lambda y: y + (y - y.detach()), lambda y: y.detach(), broken):
        damaged(damage)   # another output, another gradient, none, an error
        assert not trial(SDPBackend.FLASH_ATTENTION, CPU, torch.float32)


@pytest.mark.parametrize('environ, expected', [({}, ['expandable_segments:True']), ({'PYTORCH_ALLOC_CONF': 'x'}, []),
                                               ({'PYTORCH_CUDA_ALLOC_CONF': 'x'}, [])])
def test_segments_grow_unless_the_environment_or_torch_says_no(monkeypatch, capsys, environ, expected):
    for name in ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(torch._C, '_accelerator_setAllocatorSettings', seen.append)
    machine.use_expandable_segments()
    assert seen == expected
    monkeypatch.delattr(torch._C, '_accelerator_setAllocatorSettings')
    machine.use_expandable_segments()
    assert capsys.readouterr() == ('', '')


class Malloc:
    """A C library whose mallopt() gives these answers."""
    def __init__(self, *answers):
        self.answers, self.calls = list(answers), []

    def mallopt(self, option, value):
        self.calls.append((option, value))
        return self.answers.pop(0)


def test_malloc_keeps_freed_memory_if_it_can(monkeypatch):
    library = Malloc(1, 1)
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: library)
    assert machine.keep_freed_memory() is True
    assert library.calls == [(-1, 2 ** 31 - 1), (-4, 0)]
    for other in (Malloc(0), Malloc(1, 0), object()):   # of another C library: no such option, no such function
        monkeypatch.setattr(ctypes, 'CDLL', lambda name, other=other: other)
        assert machine.keep_freed_memory() is False
    monkeypatch.setattr(ctypes, 'CDLL', broken)   # Windows
    assert machine.keep_freed_memory() is False


def test_warnings_of_a_trial_are_not_shown(recwarn, capsys):
    def trial():
        machine.warnings.warn('Flash attention was not compiled', stacklevel=1)
        return torch.tensor(True)

    assert machine.works(trial) is True
    assert not recwarn.list and capsys.readouterr() == ('', '')


def test_compiled_code_is_kept_in_the_users_cache_unless_the_environment_says_where(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', 'elsewhere')
    machine.set_compile_cache()
    assert os.environ['TORCHINDUCTOR_CACHE_DIR'] == 'elsewhere'
    monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
    machine.set_compile_cache()
    folder = os.environ['TORCHINDUCTOR_CACHE_DIR']
    assert os.path.dirname(folder) == str(tmp_path / 'flatgpt' / 'compiled')
    assert os.path.basename(folder).startswith(torch.backends.cpu.get_cpu_capability())
    monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'is not there'))
    machine.set_compile_cache()
    assert 'TORCHINDUCTOR_CACHE_DIR' not in os.environ


def test_each_kind_of_cpu_has_compiled_code_of_its_own(monkeypatch, tmp_path):
    """torch's key of compiled code knows nothing of the width of vectors."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    folders = []
    for used, can in (('AVX512', INTEL), ('AVX2', INTEL), ('AVX512', {}), ('AVX512', {**INTEL, 'l2_cache_size': 7})):
        monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR', raising=False)
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda used=used: used)
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda can=can: can)
        with torch.compiler.config.patch(cache_key_tag=''):
            machine.set_compile_cache()
            assert os.path.basename(os.environ['TORCHINDUCTOR_CACHE_DIR']) == torch.compiler.config.cache_key_tag
        folders.append(os.environ['TORCHINDUCTOR_CACHE_DIR'])
    assert len(set(folders)) == 3 and folders[0] == folders[3]   # the size of a cache changes no code


@pytest.mark.parametrize(('n_layer', 'parallel', 'world_size', 'by_block'), [
    (2, 'ddp', 1, False), (2, 'ddp', 2, False), (2, 'fsdp', 1, False), (2, 'fsdp', 2, True),
    (runtime.DEEP, 'ddp', 1, False), (runtime.DEEP + 1, 'ddp', 1, True),
])
def test_deep_and_spread_models_are_compiled_block_by_block(monkeypatch, n_layer, parallel, world_size, by_block):
    model, modules, functions = GPT(GPTConfig(11, 8, n_layer, 8, 2)), [], []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda module: modules.append(module))
    monkeypatch.setattr(torch, 'compile', lambda function: functions.append(function) or function)
    a_runtime(world_size=world_size).compile_model(model, parallel)
    assert modules == (list(model.transformer.h) if by_block else [model])
    assert [function.__name__ for function in functions] == ['logits_and_loss'] * by_block


@pytest.mark.full
@needs('c_compiler')
@pytest.mark.filterwarnings('ignore')   # of torch's own modules
def test_a_model_compiled_block_by_block_gives_the_same_loss_and_gradients(monkeypatch):
    from torch._dynamo.utils import counters
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', '')
    monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR')
    machine.set_compile_cache()
    monkeypatch.setattr(runtime, 'DEEP', 0)
    torch._dynamo.reset()
    counters.clear()   # of what earlier tests have compiled
    torch.manual_seed(1)
    models = [GPT(GPTConfig(11, 8, 6, 8, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    a_runtime().compile_model(models[1])
    x, y = torch.randint(11, (2, 3, 8))
    losses = [model(x, y)[1] for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for one, other in zip(models[1].parameters(), models[0].parameters()):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
    assert counters['stats']['unique_graphs'] == 2   # one serves for all blocks, one for the loss
    torch._dynamo.reset()


MEMORY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from flatgpt import runtime

rt = runtime.setup('cpu', 'float32')
peaks = [rt.peak_memory()]
held = torch.ones(2**27, dtype=torch.uint8)
peaks.append(rt.peak_memory())
del held
peaks.append(rt.peak_memory())
print(*peaks)
"""


def test_peak_memory_grows_by_what_is_allocated_and_does_not_shrink(tmp_path):
    (tmp_path / 'probe.py').write_text(MEMORY, encoding='utf-8')
    done = run(tmp_path / 'probe.py')
    before, grown, after = map(int, done.stdout.split())
    assert 2**25 < before < grown
    assert grown - before == pytest.approx(2**27, rel=0.25)
    assert after >= 0.99 * grown   # the kernel counts in batches


@pytest.mark.full
def test_peak_memory_is_not_that_of_the_process_that_started_this_one(tmp_path):
    (tmp_path / 'probe.py').write_text(MEMORY, encoding='utf-8')
    held = torch.ones(2**30, dtype=torch.uint8)
    done = subprocess.run([sys.executable, tmp_path / 'probe.py'], capture_output=True, text=True, check=True)
    assert max(map(int, done.stdout.split())) < held.nbytes


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    def no_proc(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr('builtins.open', no_proc)
    assert a_runtime().peak_memory() is None


# ---------------------------------------------------------------------------------------------------------------------
# signals

SIGNALS = [name for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]


@pytest.fixture
def handlers():
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize('name', SIGNALS)
def test_a_signal_is_noted_and_a_second_one_interrupts(handlers, capsys, name):
    signals = runtime.catch_signals(a_runtime())
    signal.raise_signal(getattr(signal, name))
    assert len(signals) == 1 and 'stopping after this step' in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(getattr(signal, name))


@pytest.mark.skipif('SIGHUP' not in SIGNALS, reason='needs SIGHUP')
def test_a_closed_terminal_does_not_end_a_run_that_nohup_started(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = runtime.catch_signals(a_runtime())
    signal.raise_signal(signal.SIGHUP)
    assert signals == []


@needs('fork')
@pytest.mark.filterwarnings('ignore::DeprecationWarning')   # of a fork of a process that has threads
def test_a_run_in_a_terminal_that_is_closed_can_write_and_save(handlers, tmp_path):
    import pty
    pid, terminal = pty.fork()
    if not pid:
        try:
            sys.stdout, sys.stderr = open(1, 'w'), open(2, 'w')
            signals = runtime.catch_signals(a_runtime())
            print('ready', flush=True)
            while not signals:
                time.sleep(0.01)
            print('the step at hand is finished', flush=True)
            (tmp_path / 'saved').touch()
        finally:
            os._exit(0)
    with killed_after(60, pid):
        assert os.read(terminal, 5) == b'ready'
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and (tmp_path / 'saved').exists()


# ---------------------------------------------------------------------------------------------------------------------
# which files may name an accelerator

def names_in_code(path):
    """The names and strings of a Python file, without docstrings and without what device.type is compared with."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    ignored = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):   # a docstring
            ignored.add(node.value)
        if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith('device.type'):
            ignored.update(node.comparators)
        parts = {ast.Name: 'id', ast.Attribute: 'attr', ast.alias: 'name', ast.keyword: 'arg', ast.Constant: 'value'}
        if type(node) in parts and node not in ignored:
            yield str(getattr(node, parts[type(node)]))


MACHINE = re.compile(r'(?<![a-z])(cuda|mps|nccl|gloo)(?![a-z])|\b(LOCAL_)?RANK\b|\bWORLD_SIZE\b')


@pytest.mark.parametrize('path', MODULES.values())
def test_only_runtime_and_machine_name_accelerators_and_the_variables_of_torchrun(path):
    found = sorted({name for name in names_in_code(ROOT / path) if MACHINE.search(name)})
    if path in ('flatgpt/runtime.py', 'flatgpt/machine.py'):
        assert {'cuda', 'LOCAL_RANK'} <= set(found)   # so the search works
    else:
        assert found == []


# ---------------------------------------------------------------------------------------------------------------------
# two processes

PROBE = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from flatgpt import runtime

rt = runtime.setup('cpu', 'float32', False, seed=3)
start = torch.rand(2).tolist()
weight = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.ones_(weight.weight)
wrapped, gradients = rt.wrap(weight), []
for on in (False, True):
    weight.weight.grad = None
    with rt.average_gradients(wrapped, on):
        wrapped(torch.tensor([[1.0 + rt.rank]])).sum().backward()
    gradients.append(weight.weight.grad.item())
rt.reseed(7, 1)
result = {{'master': rt.master, 'start': start, 'reseeded': torch.rand(2).tolist(), 'gradients': gradients,
          'mean': rt.mean(torch.tensor([1.0, 10.0]) * (1 + rt.rank)).tolist(), 'one': rt.any_process(rt.rank == 1),
          'none': rt.any_process(False), 'all': rt.any_process(True), 'line': rt.describe()}}
print('held until the end', end='')
open(f'{{rt.rank}}.json', 'w').write(json.dumps(result))
rt.close()
open('not reached', 'w')
"""


@pytest.mark.full
@needs('two_processes')
def test_two_processes_share_means_flags_and_gradients(tmp_path):
    (tmp_path / 'probe.py').write_text(PROBE, encoding='utf-8')
    done = torchrun(tmp_path / 'probe.py', cwd=tmp_path)
    assert done.stdout == 2 * 'held until the end'
    assert not (tmp_path / 'not reached').exists()   # close() ends the process
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1))
    assert (first['master'], second['master']) == (True, False)
    assert first['start'] == second['start']           # the same weights at the start
    assert first['reseeded'] != second['reseeded']     # and each its own dropout
    assert first['gradients'] == [1.0, 1.5]            # its own, then the mean of both
    assert second['gradients'] == [2.0, 1.5]
    for result in (first, second):
        assert result['mean'] == [1.5, 15.0]
        assert (result['one'], result['none'], result['all']) == (True, False, True)
        assert '2 processes' in result['line']
