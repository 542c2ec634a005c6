"""The repository itself: its layout, its options, and that what its texts say can be done."""

import ast
import contextlib
import functools
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT
from in_process import call, defaults_of, options
from packaging.requirements import Requirement

import configurator
import optim
from model import GPTConfig

# What is known is checked; a file of one's own, here, in config/ or in data/, is nobody's business
PARTS = ['budget', 'configurator', 'tokenizer', 'download', 'hub', 'runtime', 'attention', 'sampling', 'model',
         'weights', 'lora', 'pretrained', 'dataset', 'corpus', 'ingest', 'optim', 'validate', 'lr_range', 'checkpoint',
         'scoring', 'curves', 'scaling']
SCRIPTS = ['train', 'sample', 'eval', 'bench', 'export', 'plot', 'sweep']
PREPARES = [f'data/{name}/prepare.py' for name in (
    'fineweb', 'my_code', 'openwebtext', 'python_char', 'shakespeare', 'shakespeare_char', 'sql', 'text')]
CONFIGS = [f'config/{name}.py' for name in (
    'eval_gpt2', 'eval_gpt2_large', 'eval_gpt2_medium', 'eval_gpt2_xl', 'finetune_code', 'finetune_shakespeare',
    'finetune_sql', 'train_bpe_10m', 'train_gpt2', 'train_python_char', 'train_shakespeare_char',
    'train_shakespeare_char_cpu', 'train_shakespeare_char_cpu_fast', 'train_shakespeare_char_fast')]
RUNNABLE = [f'{name}.py' for name in SCRIPTS] + PREPARES
PAGES = ['README.md', 'README.zh-CN.md', 'LEARN.md']


def tree(name):
    return ast.parse((ROOT / name).read_text(encoding='utf-8'))


def text_of(name):
    return (ROOT / name).read_text(encoding='utf-8')


def options_of(script):
    return [name for name, *_ in configurator.read_options(ROOT / script)]


# ---------------------------------------------------------------------------------------------------------------------
# layout

def test_every_part_and_script_is_there_and_named_in_the_readme():
    for name in (*PARTS, *SCRIPTS):
        assert (ROOT / f'{name}.py').is_file() and f'`{name}.py`' in text_of('README.md'), name


def test_no_root_module_shadows_the_standard_library():
    assert not {*PARTS, *SCRIPTS} & sys.stdlib_module_names


def imports_of(name):
    """The root modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split('.')[0])
    return found & {*PARTS, *SCRIPTS}


@pytest.mark.parametrize('part', PARTS)
def test_a_part_imports_only_parts_above_it(part):
    assert imports_of(f'{part}.py') <= set(PARTS[:PARTS.index(part)])


@pytest.mark.parametrize('script', RUNNABLE)
def test_a_script_imports_only_parts(script):
    assert imports_of(script) <= set(PARTS)


def test_parts_do_nothing_at_import_and_load_no_package_that_is_used_rarely(tmp_path):
    (tmp_path / 'probe.py').write_text(
        f'import os, sys, threading\nbefore = os.environ.copy(), os.getcwd(), sys.excepthook, sys.argv[:]\n'
        f'import {", ".join(PARTS)}\n'
        f'assert (os.environ, os.getcwd(), sys.excepthook, sys.argv) == before\n'
        f'assert threading.active_count() == 1\n'
        f'assert not sys.modules.keys() & {{"wandb", "tiktoken", "requests", "matplotlib", "torch._dynamo"}}\n')
    done = subprocess.run([sys.executable, tmp_path / 'probe.py'], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert [path.name for path in tmp_path.iterdir()] == ['probe.py']


# ---------------------------------------------------------------------------------------------------------------------
# options

@pytest.mark.parametrize('script', RUNNABLE)
def test_options_stand_between_the_rulers_each_alone_on_its_line(script):
    lines = text_of(script).splitlines()
    ruler = [i for i, line in enumerate(lines, 1) if re.fullmatch('# -{117}', line)]
    numbers = [number for *_, number in configurator.read_options(ROOT / script)]
    assert numbers and ruler[0] < min(numbers) and max(numbers) < ruler[1]
    assert len(set(numbers)) == len(numbers)
    assert lines[ruler[1]].startswith(('configure(globals())', 'config = configure(globals())'))


@pytest.mark.parametrize('script', RUNNABLE)
def test_help_prints_the_docstring_and_every_option_with_its_default(script):
    done = call(script, '--help')
    assert done.returncode == 0 and done.stderr == ''
    assert done.stdout.startswith(ast.get_docstring(tree(script)))
    defaults = defaults_of(script)
    for name in options_of(script):
        assert f'  --{name}={defaults[name]!r}' in done.stdout


@pytest.fixture(autouse=True, scope='module')
def read_once():
    """The options of a script are read once for all tests, not for each command of each page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configurator, 'read_options', functools.cache(configurator.read_options))
        yield


def configured(script, args, monkeypatch):
    """The options with which a script would run from the root with these arguments."""
    monkeypatch.chdir(ROOT)
    with contextlib.suppress(SystemExit):   # --help
        return options(script, *args)


@pytest.mark.parametrize('path', CONFIGS)
def test_a_config_is_accepted_and_makes_a_model_and_a_schedule(path, monkeypatch):
    config = configured('train.py', [path], monkeypatch)
    names = ('block_size', 'n_layer', 'n_embd', 'n_head', 'bias', 'dropout', 'attention')
    GPTConfig(**{name: config[name] for name in names})
    assert config['schedule'] in optim.SCHEDULES and config['optimizer'] in optim.OPTIMIZERS
    assert config['eval_only'] or 0 <= config['warmup_iters'] < config['max_iters']
    assert config['eval_only'] or config['out_dir'] != 'out'   # its own folder
    made_here = f'--name={config["dataset"]} ' in text_of(path)   # by data/text/prepare.py
    assert (ROOT / 'data' / config['dataset'] / 'prepare.py').exists() or made_here


@pytest.mark.parametrize('path', CONFIGS)
def test_a_config_states_its_commands_hardware_time_and_result(path, monkeypatch):
    header = text_of(path).split('\n\n')[0].splitlines()
    assert all(line.startswith('#') for line in header)
    config = configured('train.py', [path], monkeypatch)
    wanted = {'train.py': path, 'sample.py': f'--out_dir={config["out_dir"]}',
              f'data/{config["dataset"]}/prepare.py': None, 'data/text/prepare.py': f'--name={config["dataset"]}'}
    assert 'train.py' in dict(commands(path))
    for script, args in commands(path):
        assert wanted[script] is None or wanted[script] in args
    assert all(f'{word}: ' in '\n'.join(header) for word in ('hardware', 'time', 'result'))


# ---------------------------------------------------------------------------------------------------------------------
# what the texts say

COMMAND = re.compile(r'(?:^|[\s`(])(?:(?:cd (\S+?)(?:;| &&) )?python3?|torchrun(?: --\S+)*|\$\(PY\)) '
                     r'([\w/.-]+\.py)\b(.*)')
ARGUMENTS = re.compile(r'''(?:[^'"]|'[^']*'|"[^"]*")*?(?=  | [>|#&(]|[;)]|$)''')   # what ends them may be in quotes


def commands(name):
    """[(script, arguments)] of the commands in a text: in the Makefile, a page, docstrings and headers."""
    text, found = text_of(name), []
    if name.endswith('.py') and not name.startswith('config/'):
        text = ast.get_docstring(tree(name))
    for line in text.replace('\\\n', ' ').replace('$(OUT)', 'out').splitlines():
        for piece in re.split(r'`', line) if name.endswith('.md') else [line]:
            match = COMMAND.search(piece)
            if match:
                folder, script, rest = match.groups()
                rest = ARGUMENTS.match(rest)[0]
                found.append((f'{folder}/{script}' if folder else script, shlex.split(rest)))
    return found


def to_write(name):
    """{file: content} of the files that a text tells its reader to write: Python that begins with a file's name."""
    return dict(re.findall(r'^```python\n# (\w+\.py)\n(.*?)^```$', text_of(name), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize('name, least', [('README.md', 8), ('README.zh-CN.md', 8), ('LEARN.md', 25), ('Makefile', 3),
                                         *((script, 2) for script in RUNNABLE if 'python_char' not in script),
                                         ('data/python_char/prepare.py', 1), *((path, 1) for path in CONFIGS)])
def test_every_command_that_a_text_gives_would_be_accepted(name, least, tmp_path, monkeypatch):
    written = {}
    for file, content in to_write(name).items():
        (tmp_path / file).write_text(content)
        written[file] = str(tmp_path / file)
    found = commands(name)
    assert len(found) >= least
    for script, args in found:
        assert script in RUNNABLE or script in written
        configured(written.get(script, script), [written.get(arg, arg) for arg in args], monkeypatch)


TARGETS = set(re.findall(r'^([\w-]+):', text_of('Makefile'), re.MULTILINE))


@pytest.mark.parametrize('name', [*PAGES, 'Makefile'])
def test_every_make_target_that_a_text_names_exists(name):
    named = re.findall(r'(?:`|^    |^# )make(?: ([a-z-]+))?(?=`|  |$)', text_of(name), re.MULTILINE)
    assert {'', 'test'} <= set(named)
    assert set(named) - {''} <= TARGETS


def test_every_phony_target_exists():
    phony = re.search(r'^\.PHONY: (.*)$', text_of('Makefile'), re.MULTILINE)[1].split()
    assert set(phony) <= TARGETS


@pytest.mark.parametrize('name', PAGES)
def test_every_option_that_a_page_names_belongs_to_a_script(name, tmp_path):
    known = {option for script in RUNNABLE for option in options_of(script)}
    for file, content in to_write(name).items():
        (tmp_path / file).write_text(content)
        known |= set(options_of(tmp_path / file))
    named = set(re.findall(r'(?<![\w-])--(\w[\w-]*)', text_of(name)))
    assert len(named) > 5
    assert named - known <= {'help', 'key', 'standalone', 'nproc_per_node', 'nnodes', 'node_rank', 'master_addr',
                             'master_port', 'max-restarts', 'logdir', 'model', 'model_args', 'tasks', 'outfile'}


@pytest.mark.parametrize('name', PAGES)
def test_every_file_that_a_page_names_exists(name):
    named = re.findall(r'(?<![\w/<>-])((?:config/|data/\w+/|tests/)?\w+\.(?:py|md|txt|toml|ipynb))\b', text_of(name),
                       re.ASCII)
    assert {'train.py', 'model.py'} <= set(named)
    outputs = {'prompts.txt', 'prompt.txt', 'book.txt', 'my.txt', 'samples.txt', 'input.txt', *to_write(name)}
    assert not [file for file in named if file not in outputs and not (ROOT / file).exists()]


@pytest.mark.parametrize('name', PAGES)
def test_every_link_and_picture_of_a_page_is_there(name):
    headings = re.findall(r'^#+ (.*)$', text_of(name), re.MULTILINE)
    anchors = {'#' + re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}
    targets = [target for target in links(name) if not target.startswith(('http://', 'https://'))]
    assert targets and not [target for target in targets if target not in anchors and not (ROOT / target).exists()]


def links(name):
    return re.findall(r'\]\(([^)\s]+)\)', text_of(name))


# ---------------------------------------------------------------------------------------------------------------------
# the README in Chinese: prose and numbers may differ, what one types may not

def test_the_chinese_readme_has_the_commands_of_the_other_in_their_order():
    assert commands('README.zh-CN.md') == commands('README.md')


def test_the_two_readmes_link_to_each_other_at_once():
    names = ['README.md', 'README.zh-CN.md']
    for name, other in zip(names, reversed(names)):
        assert f']({other})' in ''.join(text_of(name).splitlines(keepends=True)[:3])


@pytest.mark.parametrize('name', PAGES)
def test_no_text_has_a_placeholder_left(name):
    assert not re.findall(r'@\w+@|\bTODO\b|\bXXX\b', text_of(name))


# ---------------------------------------------------------------------------------------------------------------------
# dependencies

def requirements(name):
    """{name: Requirement} of a requirements file, without what it includes."""
    lines = [line.split('#')[0].strip() for line in text_of(name).splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith('-r ')]
    return {requirement.name: requirement for requirement in found}


PROJECT = tomllib.loads(text_of('pyproject.toml'))['project']


@pytest.mark.parametrize('name, declared', [
    ('requirements.txt', PROJECT['dependencies']), ('requirements-dev.txt', PROJECT['optional-dependencies']['test']),
])
def test_the_pins_are_exact_and_those_that_pyproject_allows(name, declared):
    pins, declared = requirements(name), {Requirement(text).name: Requirement(text) for text in declared}
    assert pins.keys() == declared.keys()
    for pin in pins.values():
        (only,) = pin.specifier
        assert only.operator == '==' and only.version in declared[pin.name].specifier


def test_the_test_requirements_include_the_others():
    assert '-r requirements.txt' in text_of('requirements-dev.txt').splitlines()


def test_every_package_that_is_imported_is_declared():
    third = {name for path in [f'{module}.py' for module in (*PARTS, *SCRIPTS)] + PREPARES
             for node in ast.walk(tree(path)) if isinstance(node, (ast.Import, ast.ImportFrom))
             for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])}
    third = {name.split('.')[0] for name in third} - sys.stdlib_module_names - {*PARTS}
    extras = [text for group in PROJECT['optional-dependencies'].values() for text in group]
    assert third <= {Requirement(text).name for text in PROJECT['dependencies'] + extras}
