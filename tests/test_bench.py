"""bench.py as a person runs it: a table, one JSON object whose numbers agree, and a trace."""

import json

import pytest
from conftest import assert_one_line, run

from model import GPT, GPTConfig

TINY_MODEL = ('--device=cpu', '--dtype=float32', '--block_size=16', '--n_layer=2', '--n_head=2', '--n_embd=32',
              '--vocab_size=100', '--steps=3')


def result_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def profiled(tmp_path_factory):
    """(what it printed, the folder it ran in)"""
    folder = tmp_path_factory.mktemp('bench')
    return run('bench.py', *TINY_MODEL, '--batch_size=3', '--profile=True', cwd=folder), folder


def test_the_last_line_is_json_whose_numbers_agree(profiled):
    result = result_of(profiled[0])
    assert set(result) == {'ms_per_step', 'ms_min', 'ms_max', 'tok_per_s', 'mfu', 'peak_flops', 'peak_memory_bytes',
                           'first_step_s', 'loss', 'parameters', 'batch_size', 'block_size', 'machine'}
    model = GPT(GPTConfig(100, 16, n_layer=2, n_embd=32, n_head=2, bias=False))
    assert result['parameters'] == model.get_num_params(non_embedding=False)
    assert (result['batch_size'], result['block_size']) == (3, 16)
    assert 0 < result['ms_min'] <= result['ms_per_step'] <= result['ms_max']
    assert result['tok_per_s'] == pytest.approx(3 * 16 / result['ms_per_step'] * 1000)
    assert result['mfu'] == pytest.approx(model.flops_per_token() * result['tok_per_s'] / result['peak_flops'])
    assert 1e9 < result['peak_flops'] < 1e15    # measured
    assert 2**26 < result['peak_memory_bytes'] < 2**34
    assert 4 < result['loss'] < 5.5             # about log(100): it learns from one batch
    assert 'cpu (' in result['machine'] and 'float32, not compiled' in result['machine']


def test_the_table_says_the_same(profiled):
    done, _ = profiled
    result, table = result_of(done), {line[:12].strip(): line[13:] for line in done.stdout.splitlines()[-7:-1]}
    assert table['model'] == f'{result["parameters"]:,} parameters, batch 3 x 16'
    assert table['step'].startswith(f'{result["ms_per_step"]:,.2f} ms, median of 3')
    assert table['speed'] == f'{result["tok_per_s"]:,.0f} tok/s'
    assert table['mfu'].startswith(f'{result["mfu"]:.1%} of ')
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


def test_a_recipe_gives_the_model_the_batch_and_the_dataset(tiny, char_dataset):
    done = run('bench.py', tiny, '--steps=1', '--peak_flops=1e12')
    result = result_of(done)
    model = GPT(GPTConfig(20, 16, n_layer=2, n_embd=32, n_head=2, bias=False))
    assert result['parameters'] == model.get_num_params(non_embedding=False)   # the vocabulary is the dataset's
    assert (result['batch_size'], result['peak_flops']) == (4, 1e12)
    assert result['mfu'] == pytest.approx(model.flops_per_token() * result['tok_per_s'] / 1e12)
    assert 'not for bench.py, passed over: ' in done.stderr and 'learning_rate' in done.stderr


@pytest.mark.parametrize('args, status, words', [
    (['--steps=0'], 2, ['steps=0', '1 or more']), (['--n_head=3'], 2, ['n_embd=32', 'n_head=3']),
], ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith('--') else '')
def test_what_cannot_be_ends_in_one_line(args, status, words):
    done = run('bench.py', *TINY_MODEL, *args)
    assert_one_line(done, status, *words)
    assert done.stdout == ''
