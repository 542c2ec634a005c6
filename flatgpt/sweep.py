"""
The sweep behind scaling_laws.ipynb: models of several sizes, each trained from scratch with several budgets of FLOPs,
and a larger model with a larger budget, which no fit gets to see.

    python data/python_char/prepare.py
    python -m flatgpt.sweep                                               what make scaling does
    python -m flatgpt.sweep --sizes=1x16 --budgets=1e9,2e9 --held_out=None --min_steps=1 --results=try.json

Each run is a train.py of its own, whose learning rate reaches zero where its budget ends, and becomes a line of the
results. A run that the file holds is not made again, so that a sweep goes on where it was stopped.
"""

from configurator import configure

# ---------------------------------------------------------------------------------------------------------------------
results = 'flatgpt/scaling.json'          # the file of results
# the runs
sizes = '1x16,1x24,1x32,2x32,2x48,2x64,3x64,3x80,4x96,4x128'   # layers x width, each for every budget
budgets = '1e11,3e11,1e12,3e12,1e13'   # FLOPs of a run, as model.py counts them
held_out: str | None = '5x160:1e14'   # size and budget of the run that no fit gets to see
min_steps = 130                   # a size that a budget would train for less is left out of it,
max_epochs = 4.0                  # a size that would see the text more often is left out too
# what they have in common
dataset = 'python_char'           # a folder in data/, or a path
block_size = 64                   # tokens per row: the context
batch_size = 16                   # rows per step
arch = 'speedrun'                 # a set of switches in model.py
optimizer = 'muon'                # 'adamw', 'muon'
learning_rate = 5.6e-3            # the peak at a width of 64; it goes as 1 / width, measured at 32 and 128
seed = 1337                       # of weights and batches
device = 'cpu'                    # models this small gain nothing from a GPU
jobs = 2                          # runs side by side, each on one core
# ---------------------------------------------------------------------------------------------------------------------
config = configure(globals())

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from flatgpt.dataset import Dataset, write_atomically
from flatgpt.errors import UsageError, UserError
from flatgpt.validate import at_least, one_of
from model import ARCHS, GPT, GPTConfig

COMMON = ('dataset', 'block_size', 'batch_size', 'arch', 'optimizer', 'learning_rate', 'seed')
EVAL_ITERS = 64   # batches, always the same ones, whose mean loss is the result

SIZE = r'([1-9]\d*)x([1-9]\d*)'
NUMBER = r'([1-9]\d*(?:\.\d+)?(?:e\d+)?)'

at_least(1, config, 'min_steps', 'block_size', 'batch_size', 'jobs')
one_of(ARCHS, config, 'arch')


def parse(name, text, pattern, example):
    """The numbers in a text, by a pattern. UsageError if it does not match."""
    match = re.fullmatch(pattern, text.strip())
    if not match:
        raise UsageError(f'{name}={text!r}: expected such as {example}')
    return tuple(map(float, match.groups()))


# the runs: how large each model is, and for how many steps its budget lasts

wanted = [(*parse('sizes', size, SIZE, '2x64'), *parse('budgets', budget, NUMBER, '1e12'), False)
          for budget in budgets.split(',') for size in sizes.split(',')]
if held_out:
    wanted.append((*parse('held_out', held_out, f'{SIZE}:{NUMBER}', '5x160:1e14'), True))
data = Dataset(dataset)
runs = []
for n_layer, n_embd, budget, is_held_out in wanted:
    shape = {'n_layer': int(n_layer), 'n_embd': int(n_embd), 'n_head': max(int(n_embd) // 32, 1)}
    try:
        with torch.device('meta'):   # sizes without memory
            model = GPT(GPTConfig(data.vocab_size, block_size, bias=False, **shape, **ARCHS[arch]))
    except ValueError as error:
        raise UsageError(error) from None
    steps = round(budget / model.flops_per_token() / (batch_size * block_size))
    tokens = steps * batch_size * block_size
    if is_held_out or (steps >= min_steps and tokens <= max_epochs * len(data.data['train'])):
        runs.append({**shape, 'params': model.get_num_params(), 'budget': budget, 'steps': steps, 'tokens': tokens,
                     'flops': model.flops_per_token() * tokens, 'learning_rate': learning_rate * 64 / n_embd,
                     'held_out': is_held_out})

# which of them the file of results has

common = {name: config[name] for name in COMMON} | {'train_tokens': len(data.data['train'])}
try:
    before = json.loads(Path(results).read_text(encoding='utf-8')) if Path(results).exists() else {}
    done = before.get('runs', [])
    other = [f'{name}={value!r}' for name, value in before.get('common', common).items() if common[name] != value]
    missing = [run for run in runs if not any(run.items() <= old.items() for old in done)]
except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{results} is not a file of results ({error}): move it away, or give another --results') from None
if other:
    raise UsageError(f'{results} is of runs with {", ".join(other)}: give these too, or another --results')


def write():
    """Write the results, a line per run, in an order that does not depend on which was ready first."""
    ready = sorted(done, key=lambda run: (run['held_out'], run['budget'], run['params']))
    lines = ',\n  '.join(map(json.dumps, ready))
    try:
        write_atomically(results, f'{{"common": {json.dumps(common)},\n "runs": [\n  {lines}]}}\n'.encode())
    except OSError as error:
        raise UserError(f'cannot write {results}: {error.strerror}') from None


def train(run):
    """Train a run. Returns it with its losses, in nats per token."""
    with tempfile.TemporaryDirectory() as out_dir:
        of_run = {name: run[name] for name in ('n_layer', 'n_embd', 'n_head', 'learning_rate')}
        options = {**{name: config[name] for name in COMMON}, **of_run, 'out_dir': out_dir, 'device': device,
                   'gradient_accumulation_steps': 1, 'max_iters': run['steps'], 'schedule': 'linear',
                   'warmup_iters': run['steps'] // 20, 'min_lr': 0.0, 'eval_interval': run['steps'],
                   'eval_iters': EVAL_ITERS, 'log_interval': 100}
        command = [sys.executable, Path(__file__).parents[1] / 'train.py', *(f'--{k}={v}' for k, v in options.items())]
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        if ended.returncode:
            raise UserError(f'{run["n_layer"]}x{run["n_embd"]}: {ended.stderr.strip().splitlines()[-1]}')
        log = [json.loads(line) for line in Path(out_dir, 'log.jsonl').read_text(encoding='utf-8').splitlines()]
    (last,) = [record for record in log if record.get('step') == run['steps']]
    return {**run, 'train_loss': round(last['train_loss'], 5), 'val_loss': round(last['val_loss'], 5),
            'seconds': round(last['seconds'], 1)}


# sweep: the longest run first, so that the cores are idle at the end for as short as can be

missing = sorted(missing, key=lambda run: -run['flops'])
print(f'{len(runs) - len(missing)} of {len(runs)} runs are in {results}', file=sys.stderr)
with ThreadPoolExecutor(jobs) as pool:
    waiting = [pool.submit(train, run) for run in missing]
    try:
        for ended in tqdm(as_completed(waiting), total=len(missing), unit='run', disable=None):
            done.append(ended.result())
            write()
    finally:
        pool.shutdown(cancel_futures=True)
print(json.dumps({'results': results, 'runs': len(runs), 'trained': len(missing)}))
