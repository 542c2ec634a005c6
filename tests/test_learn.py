"""LEARN.md: its exercises work as printed, and print what the page says."""

import code
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line, run
from in_process import call

TEXT = (ROOT / 'LEARN.md').read_text(encoding='utf-8')

# Python code, and the block of output that follows it directly, if any
BLOCK = r'^```python\n(.*?)^```$(?:\n\n^```\n(.*?)^```$)?'
PYTHON = re.findall(BLOCK, TEXT, re.MULTILINE | re.DOTALL)
FILES = {content.split()[1]: content for content, _ in PYTHON if re.match(r'# \w+\.py\n', content)}
TYPED = [(content, output) for content, output in PYTHON if content not in FILES.values()]
ALONE = [(content, output) for content, output in TYPED if not re.search(r"Dataset\(|data/|out-", content)]


def test_the_chinese_page_has_the_same_sections_commands_and_code():
    chinese = (ROOT / 'LEARN.zh-CN.md').read_text(encoding='utf-8')
    blocks = re.compile(r'^```.*?^```$|^    [^\n]*$|^## \d+\.', re.MULTILINE | re.DOTALL)
    assert blocks.findall(chinese) == blocks.findall(TEXT)


CODE = {word for path in (*ROOT.glob('*.py'), *ROOT.glob('flatgpt/*.py'), *ROOT.glob('data/*/*.py'))
        for word in re.findall(r'\w+', path.read_text(encoding='utf-8'))}


@pytest.mark.parametrize('page', ['LEARN.md', 'LEARN.zh-CN.md', 'CONTRIBUTING.md', 'docs/training.md', 'docs/data.md',
                                  'docs/finetuning.md', 'docs/reliability.md', 'docs/evaluation.md'])
def test_every_name_in_the_prose_of_a_page_occurs_in_the_code(page):
    prose = re.sub(r'^```.*?^```|^    [^\n]*$', '', (ROOT / page).read_text(encoding='utf-8'), flags=re.M | re.S)
    names = {name for name in re.findall(r'`(?:\w+\.)?(\w+)(?:\(\))?`', prose) if '_' in name.strip('_')}
    assert names and not names - CODE


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
    assert output and same(printed.getvalue(), output)


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
SHORTER = '\nmax_iters, batch_size, eval_interval = 2, 4, 1\n'   # for the recipes of dpo.py and grpo.py


@pytest.mark.full
def test_all_exercises_work_in_their_order(tmp_path):
    for folder in ('config', 'data', 'assets', 'flatgpt'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns(
            '*.bin', '*.mask', '*.jsonl', 'meta.json', '*.parquet', '__pycache__'))
    for path in (*ROOT.glob('*.py'), *ROOT.glob('*.md')):
        shutil.copy(path, tmp_path)
    recipes = {'train_python_char': SMALLER, 'finetune_code': SMALLER, 'finetune_sql': SMALLER, 'chat_tiny': SMALLER,
               'dpo_tiny': SHORTER, 'grpo_arithmetic': SHORTER}
    for name, smaller in recipes.items():
        with open(tmp_path / 'config' / f'{name}.py', 'a') as f:
            f.write(smaller)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    commands = 0
    for command, source, output in re.findall(rf'^    ((?:python|head) [^\n]*)$|{BLOCK}', TEXT.replace('\\\n', ''),
                                              re.MULTILINE | re.DOTALL):
        if source in FILES.values():
            continue
        commands += bool(command)
        if command.startswith('python ') and '$(' not in command:
            script, *args = shlex.split(command)[1:]
            done = run(tmp_path / script, *args, cwd=tmp_path, timeout=300)
        else:
            done = subprocess.run(['bash', '-c', command] if command else [sys.executable, '-c', source], cwd=tmp_path,
                                  env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f'{command or source}\n{done.stderr}'
        assert not output or same(done.stdout, output)
    assert commands > 25
    assert not {'ckpt.pt', 'best.pt', 'log.jsonl'} - {path.name for path in (tmp_path / 'out-lora').iterdir()}
    assert (tmp_path / 'my-llama' / 'model.safetensors').exists()
