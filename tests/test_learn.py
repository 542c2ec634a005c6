"""LEARN.md: its exercises work as printed, and print what the page says."""

import code
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, assert_one_line, run
from in_process import call

TEXT = (ROOT / 'LEARN.md').read_text(encoding='utf-8')

# Python code, and the block of output that follows it directly, if any
PYTHON = re.findall(r'^```python\n(.*?)^```$(?:\n\n^```\n(.*?)^```$)?', TEXT, re.MULTILINE | re.DOTALL)
FILES = {content.split()[1]: content for content, _ in PYTHON if re.match(r'# \w+\.py\n', content)}
TYPED = [(content, output) for content, output in PYTHON if content not in FILES.values()]
ALONE = [(content, output) for content, output in TYPED if not re.search(r'python_char|out-', content)]


def test_the_page_walks_through_the_files_in_order():
    named = re.findall(r'^## (\d+)\. .*`([\w/]+\.py)`$', TEXT, re.MULTILINE)
    assert [path for _, path in named] == [
        'config/train_python_char.py', 'configurator.py', 'flatgpt/tokenizer.py', 'flatgpt/dataset.py', 'model.py',
        'model.py', 'train.py', 'flatgpt/optim.py', 'flatgpt/checkpoint.py', 'flatgpt/engine.py', 'sample.py',
        'eval.py', 'flatgpt/lora.py', 'export.py', 'bench.py']
    assert all((ROOT / path).is_file() for _, path in named)
    assert [int(number) for number, _ in named] == list(range(1, 16))


def test_the_page_names_every_part():
    assert {path.stem for path in ROOT.glob('flatgpt/*.py')} - {'__init__'} <= set(re.findall(r'(\w+)\.py`', TEXT))


def test_every_file_of_the_walk_has_something_to_do():
    for section in re.split(r'^## ', TEXT, flags=re.MULTILINE)[1:-1]:
        assert '\n    python ' in section or '```python' in section


def same(printed, expected):
    """Whether two texts are equal, where decimal numbers may differ by 0.01, because other CPUs round differently."""
    number = r'\d+\.\d+'
    pairs = zip(re.findall(number, printed), re.findall(number, expected))
    return re.split(number, printed) == re.split(number, expected) and all(
        abs(float(a) - float(b)) < 0.011 for a, b in pairs)


@pytest.mark.parametrize('source, output', ALONE, ids=[str(i) for i in range(len(ALONE))])
def test_python_that_is_typed_line_by_line_prints_the_output_below_it(source, output, monkeypatch):
    monkeypatch.chdir(ROOT)
    console, printed, errors = code.InteractiveConsole(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        for line in (*source.splitlines(), ''):   # one more return ends a block
            console.push(line)
    assert errors.getvalue() == ''
    assert same(printed.getvalue(), output)


def test_the_script_to_write_prints_the_greeting_and_the_errors_of_the_page(tmp_path):
    script = tmp_path / 'hello.py'
    script.write_text(FILES['hello.py'])
    assert call(script, '--times=3').stdout == 'hello you!!!\n'
    for mistake, words in (('--tims=3', "unknown option 'tims', the nearest is 'times'"),
                           ('--times=many', 'expected an integer')):
        assert_one_line(call(script, mistake), 2, words)
        assert f'`{words}`' in ' '.join(TEXT.split())


# Appended to the recipes, so that all exercises take a minute; options in the commands of the page still apply
SMALLER = """
n_layer, n_embd, n_head, batch_size = 1, 32, 2, 2
max_iters = 60
eval_interval, eval_iters, warmup_iters = 30, 2, 2
"""


@pytest.mark.full
def test_all_exercises_work_in_their_order(tmp_path):
    for folder in ('config', 'data', 'assets', 'flatgpt'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns(
            '*.bin', '*.mask', 'meta.json', '*.parquet', '__pycache__'))
    for path in (*ROOT.glob('*.py'), *ROOT.glob('*.md')):
        shutil.copy(path, tmp_path)
    for name in ('train_python_char', 'finetune_code'):
        with open(tmp_path / 'config' / f'{name}.py', 'a') as f:
            f.write(SMALLER)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    steps = re.findall(r'^    python ([^\n]*)$|^```python\n(.*?)^```$(?:\n\n^```\n(.*?)^```$)?', TEXT,
                       re.MULTILINE | re.DOTALL)
    commands = 0
    for command, source, output in steps:
        if command:
            script, *args = shlex.split(command)
            done = run(tmp_path / script, *args, cwd=tmp_path, timeout=300)
            commands += 1
        elif source in FILES.values():
            continue
        else:
            done = subprocess.run([sys.executable, '-c', source], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f'{command or source}\n{done.stderr}'
        assert not output or same(done.stdout, output)
    assert commands > 25
    assert not {'ckpt.pt', 'best.pt', 'log.jsonl'} - {path.name for path in (tmp_path / 'out-lora').iterdir()}
    assert (tmp_path / 'my-llama' / 'model.safetensors').exists()
