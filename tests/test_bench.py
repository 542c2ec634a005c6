"""bench.py: a table, one JSON object whose numbers agree, a trace; one true run, the others in this process."""

import itertools
import json

import pytest
import torch
from conftest import assert_one_line, run
from in_process import call
from one_device import OneDevice, no_fused_adamw

from flatgpt import machine, runtime
from model import GPT, GPTConfig

TINY_MODEL = ('--device=cpu', '--dtype=float32', '--block_size=16', '--n_layer=2', '--n_head=2', '--n_embd=32',
              '--vocab_size=100', '--steps=3')


def a_model(vocab_size=100):
    return GPT(GPTConfig(vocab_size, 16, n_layer=2, n_embd=32, n_head=2, bias=False))


def result_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def table_of(done):
    return {line[:12].strip(): line[13:] for line in done.stdout.splitlines()[:-1]}


@pytest.fixture
def bench(monkeypatch):
    """A function that runs bench.py in this process, on a machine whose rates are known: to measure them takes most of
    the time of a short run."""
    monkeypatch.setattr(runtime.Runtime, 'measured_flops', lambda rt: 5e10)
    monkeypatch.setattr(runtime.Runtime, 'measured_bandwidth', lambda rt: 7e9)
    return lambda *args: call('bench.py', *args)


# ---------------------------------------------------------------------------------------------------------------------
# a true run

@pytest.fixture(scope='module')
def profiled(tmp_path_factory):
    """(what it printed, the folder it ran in)"""
    folder = tmp_path_factory.mktemp('bench')
    return run('bench.py', *TINY_MODEL, '--batch_size=3', '--profile=True', cwd=folder), folder


def test_the_last_line_is_json_whose_numbers_agree(profiled):
    result = result_of(profiled[0])
    assert set(result) == {'mode', 'parameters', 'batch_size', 'block_size', 'attention', 'machine', 'loss',
                           'steps', 'kernels', 'ms_per_step', 'ms_min', 'ms_max', 'tok_per_s', 'mfu', 'peak_flops',
                           'first_step_s', 'measured_flops', 'measured_bandwidth', 'flops', 'traffic_bytes',
                           'ms_by_flops', 'ms_by_bandwidth', 'reached', 'peak_memory_bytes'}
    model = a_model()
    assert result['parameters'] == model.get_num_params(non_embedding=False)
    assert (result['batch_size'], result['block_size']) == (3, 16)
    assert 0 < result['ms_min'] <= result['ms_per_step'] <= result['ms_max']
    assert result['tok_per_s'] == pytest.approx(3 * 16 / result['ms_per_step'] * 1000)
    assert result['mfu'] == pytest.approx(model.flops_per_token() * result['tok_per_s'] / result['peak_flops'])
    assert 1e9 < result['peak_flops'] < 1e15    # measured
    assert 1e8 < result['measured_bandwidth'] < 1e13
    assert result['flops'] == model.flops_per_token() * 3 * 16
    assert result['ms_by_flops'] == pytest.approx(result['flops'] / result['measured_flops'] * 1000)
    assert result['traffic_bytes'] == 32 * result['parameters']
    assert result['ms_by_bandwidth'] == pytest.approx(result['traffic_bytes'] / result['measured_bandwidth'] * 1000)
    assert result['reached'] == pytest.approx(
        max(result['ms_by_flops'], result['ms_by_bandwidth']) / result['ms_per_step'])
    assert 2**26 < result['peak_memory_bytes'] < 2**34
    assert 4 < result['loss'] < 5.5             # about log(100): it learns from one batch
    assert 'cpu (' in result['machine'] and 'float32, not compiled' in result['machine']


def test_the_table_says_the_same(profiled):
    done, _ = profiled
    result, table = result_of(done), table_of(done)
    assert table['work'] == f'{result["parameters"]:,} parameters, batch 3 x 16'
    assert table['step'].startswith(f'{result["ms_per_step"]:,.2f} ms, median of 3')
    assert table['speed'] == f'{result["tok_per_s"]:,.0f} tok/s'
    assert table['mfu'].startswith(f'{result["mfu"]:.1%} of ')
    assert table['limit'].startswith(f'{result["ms_by_flops"]:,.3f} ms at ')
    assert table['reached'] == f'{result["reached"]:.1%} of it'
    assert table['first step'] == f'{result["first_step_s"]:,.1f} s'
    assert table['peak memory'] == f'{result["peak_memory_bytes"] / 2**30:,.2f} GiB'
    assert result['machine'] in done.stderr and result['machine'] not in done.stdout.splitlines()[0]


def test_profile_prints_ten_operators_and_writes_a_trace_that_viewers_open(profiled):
    done, folder = profiled
    lines = done.stdout.splitlines()
    rulers = [i for i, line in enumerate(lines) if line.startswith('-----')]
    operators = lines[rulers[1] + 1:rulers[2]]
    assert len(operators) == 10 and any('aten::' in line for line in operators)
    assert './bench_log' in done.stderr
    traces = list((folder / 'bench_log').iterdir())
    assert [trace.name[-len('.pt.trace.json'):] for trace in traces] == ['.pt.trace.json']   # as TensorBoard wants it
    events = json.loads(traces[0].read_text(encoding='utf-8'))['traceEvents']
    assert sum(event['name'].startswith('Optimizer.step#AdamW') for event in events if 'name' in event) >= 3
    assert [path.name for path in folder.iterdir()] == ['bench_log']


# ---------------------------------------------------------------------------------------------------------------------
# the modes

def test_a_recipe_gives_the_model_the_batch_and_the_dataset(bench, tiny):
    done = bench(tiny, '--steps=1', '--peak_flops=1e12')
    result, model = result_of(done), a_model(20)
    assert result['parameters'] == model.get_num_params(non_embedding=False)   # the vocabulary is the dataset's
    assert (result['batch_size'], result['peak_flops']) == (4, 1e12)
    assert result['mfu'] == pytest.approx(model.flops_per_token() * result['tok_per_s'] / 1e12)
    assert 'not options of bench.py, ignored: ' in done.stderr and 'learning_rate' in done.stderr


def test_versus_measures_two_settings_in_turn_and_gives_their_ratio(bench):
    done = bench(*TINY_MODEL, '--versus=n_layer=4 batch_size=2')
    result, table = result_of(done), table_of(done)
    first, second = result['settings']
    assert (first['batch_size'], second['batch_size']) == (1, 2)
    assert second['parameters'] > first['parameters']
    assert first['loss'] != second['loss']
    assert 0 < result['ratio_min'] <= result['ratio'] <= result['ratio_max']
    assert table['setting'].split() == ['batch_size=None', 'n_layer=2', 'batch_size=2', 'n_layer=4']
    assert f'takes {result["ratio"]:.3f} of' in table['ratio']


@pytest.mark.parametrize('first, second, verdict', [
    ([1] * 6, [1] * 6, 'no difference seen: the second takes 1.000'), ([1] * 6, [2] * 6, 'the second takes 2.0'),
    ([1, 1, 1, 9, 1, 1], [2] * 6, 'the second takes 2.0'),   # one slow step does not hide a difference
    ([1, 2, 1, 2, 1, 2], [2, 1, 2, 1, 1, 2], 'no difference seen: ')])
def test_two_settings_are_told_apart_only_if_their_times_are(bench, monkeypatch, first, second, verdict):
    ticks = [0]   # of the clock since it was asked before: at the start, before and after each setting's step
    for i, times in enumerate(zip(first, second)):
        ticks += [0] * (i >= 3)   # whether the time is over
        for seconds in times:
            ticks += [0, seconds]
    now = itertools.accumulate(ticks)
    monkeypatch.setattr('time.perf_counter', lambda: float(next(now)))
    done = bench(*TINY_MODEL, '--versus=seed=2', '--warmup_steps=0', '--steps=6', '--seconds=1000')
    assert table_of(done)['ratio'].startswith(verdict)
    first, second = result_of(done)['settings']
    assert first['measured_flops'] == second['measured_flops']   # one limit for both


def test_no_step_begins_after_the_time_once_three_are_counted(bench):
    assert result_of(bench(*TINY_MODEL, '--steps=9', '--seconds=0'))['steps'] == 3


def test_versus_may_be_another_precision(bench):
    first, second = result_of(bench(*TINY_MODEL, '--versus=dtype=bfloat16'))['settings']
    assert 'float32, not' in first['machine'] and 'bfloat16, not' in second['machine']
    assert first['loss'] == pytest.approx(second['loss'], rel=1e-2) and first['loss'] != second['loss']


def test_activation_checkpointing_gives_the_same_losses(bench):
    first, second = result_of(bench(*TINY_MODEL, '--versus=activation_checkpointing=True'))['settings']
    assert first['loss'] == second['loss']


def test_adapters_train_few_parameters_of_the_same_model(bench):
    result = result_of(bench(*TINY_MODEL, '--lora_rank=2'))
    assert result['parameters'] == 2 * 2 * (2 * 32 + 96 + 32 + 2 * 32 + 2 * 128)   # 2 layers: in and out of 4 matrices


def test_attention_compares_the_ways_to_compute_it(bench):
    done = bench(*TINY_MODEL, '--mode=attention', '--batch_size=2')
    first, second = result_of(done)['settings']
    assert (first['attention'], second['attention']) == ('math', 'sdpa')
    assert first['tok_per_s'] == pytest.approx(2 * 16 / first['ms_per_step'] * 1000)
    assert first['flops'] == 12 * 32 * 8 * 32   # of 32 tokens that see 8 others on average
    assert first['ms_by_flops'] == pytest.approx(first['flops'] / 5e10 * 1000)
    assert table_of(done)['setting'].split() == ['attention=math', 'attention=sdpa']


@pytest.mark.parametrize('quantize', [None, 'int8'])
def test_decode_measures_tokens_and_names_the_kernel_of_each_shape(bench, quantize):
    options = [f'--quantize={quantize}'] if quantize else []
    done = bench(*TINY_MODEL, '--mode=decode', '--batch_size=2', '--prompt_tokens=5', *options)
    result, table = result_of(done), table_of(done)
    assert result['tok_per_s'] == pytest.approx(2 / result['ms_per_step'] * 1000)
    kernel, itemsize = ('torch int8', 1) if quantize else ('torch float32', 4)
    shapes = {'100 x 32': 1, '96 x 32': 2, '32 x 32': 2, '128 x 32': 2, '32 x 128': 2}
    assert {shape: n for shape, _, _, n in result['kernels']} == shapes
    assert {name for _, name, _, _ in result['kernels']} == {kernel}
    assert table['96 x 32'] == f'{kernel}, 2 of 0.0 MB'
    weights = (100 + 2 * (96 + 32 + 128 + 128)) * 32 * itemsize
    keys = 2 * 2 * 32 * (5 + 2 + 1) * 2   # and values, of 2 layers and 2 rows, after prompt, warmup and half the steps
    assert result['traffic_bytes'] == weights + keys * 4
    assert result['ms_by_bandwidth'] == pytest.approx(result['traffic_bytes'] / 7e9 * 1000)


def test_decode_compares_one_row_with_ten(bench):
    first, second = result_of(bench(*TINY_MODEL, '--mode=decode', '--prompt_tokens=2'))['settings']
    assert (first['batch_size'], second['batch_size']) == (1, 10)


def test_prefill_measures_the_time_to_the_first_token(bench):
    result = result_of(bench(*TINY_MODEL, '--mode=prefill', '--batch_size=2', '--prompt_tokens=9'))
    assert result['tok_per_s'] == pytest.approx(2 * 9 / result['ms_per_step'] * 1000)
    assert result['flops'] == 2 * a_model().get_num_params() * 2 * 9


def test_decode_has_the_vocabulary_of_a_dataset(bench, char_dataset):
    options = ('--mode=decode', '--batch_size=1', '--prompt_tokens=2', f'--dataset={char_dataset}')
    result = result_of(bench(*TINY_MODEL, *options))
    assert result['parameters'] == a_model(20).get_num_params(non_embedding=False)


def test_data_measures_batches_of_a_dataset(bench, char_dataset):
    result = result_of(bench(*TINY_MODEL, '--mode=data', f'--dataset={char_dataset}', '--batch_size=4'))
    assert (result['batch_size'], result['loss'], result['mfu']) == (4, None, None)
    assert result['tok_per_s'] == pytest.approx(4 * 16 / result['ms_per_step'] * 1000)


# ---------------------------------------------------------------------------------------------------------------------
# a GPU, rehearsed on the device 'meta', whose tensors have shapes and no numbers

@pytest.mark.parametrize('options', [['train'], ['train', '--dtype=bfloat16', '--arch=llama', '--optimizer=muon'],
                                     ['train', '--lora_rank=2', '--activation_checkpointing'],
                                     ['decode', '--prompt_tokens=2', '--batch_size=3'],
                                     ['decode', '--prompt_tokens=2', '--quantize=int8', '--dtype=bfloat16'],
                                     ['prefill', '--prompt_tokens=7'],
                                     ['attention', '--window=5'], ['attention', '--pos=alibi']], ids=' '.join)
def test_all_tensors_of_a_mode_are_on_its_device(bench, monkeypatch, options):
    meta = torch.device('meta')
    monkeypatch.setattr(machine, 'pick_device', lambda *_: meta)
    monkeypatch.setattr(runtime.Runtime, 'sync', lambda rt: None)
    monkeypatch.setattr(runtime.Runtime, 'autocast', lambda rt: torch.autocast('cpu', enabled=False))
    monkeypatch.setattr(runtime.Runtime, 'peak_memory', lambda rt: None)
    no_fused_adamw(monkeypatch)
    with OneDevice(meta) as mode:
        done = bench(*TINY_MODEL, f'--mode={options[0]}', *options[1:])
    result = result_of(done)
    assert 'meta (' in str(result) and mode.operators > 100


# ---------------------------------------------------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize('args, words', [
    (['--steps=0'], ['steps=0', '1 or more']), (['--n_head=3'], ['n_embd=32', 'n_head=3']),
    (['--batch_size=0'], ['batch_size=0', '1 or more']), (['--warmup_steps=-1'], ['warmup_steps=-1', '0 or more']),
    (['--optimizer=sgd'], ["optimizer='sgd'", "'adamw', 'muon'"]), (['--quantize=int4'], ["quantize='int4'", 'int8']),
    (['--mode=dance'], ["mode='dance'", "'decode'"]), (['--mode=data'], ['dataset']),
    (['--mode=decode'], ['21 tokens', 'block_size=16']), (['--mode=prefill'], ['500 tokens', 'block_size=16']),
    (['--versus=steps=5'], ["'steps=5' cannot be compared"]), (['--versus=n_heads=2'], ['n_heads', 'n_head']),
    (['--versus=help'], ["'help'"]), (['--versus=versus=x'], ['words such as']),
    (['--versus=n_layer=0'], ['n_layer=0', '1 or more']),
], ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith('--') else '')
def test_what_cannot_be_ends_in_one_line(bench, args, words):
    done = bench(*TINY_MODEL, *args)
    assert_one_line(done, 2, *words)
    assert done.stdout == ''
