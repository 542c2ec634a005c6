"""The repository itself: layout, imports, language, options, and that what the pages say can be done."""

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
from conftest import ROOT, needs
from in_process import call, defaults_of, options
from packaging.requirements import Requirement
from packaging.version import Version

import configurator
from flatgpt import optim
from model import GPTConfig

# The project's own files are named here and checked; a user's own files and pages are not.
SCRIPTS = ['train', 'dpo', 'grpo', 'sample', 'chat', 'serve', 'eval', 'bench', 'export', 'plot']
# Each part imports only parts that stand before it
PARTS = [
    'errors', 'budget', 'encodings', 'tokenizer', 'sandbox', 'conversation', 'hub', 'machine', 'runtime', 'engine',
    'answers', 'batching', 'openai_forms', 'serving', 'quantize', 'architectures', 'pretrained', 'llama_cpp', 'lora',
    'alignment', 'dataset', 'checkpoint', 'corpus', 'ingest', 'pairs', 'optim', 'validate', 'start', 'evaluation',
    'plots', 'outdir', 'scaling', 'sweep', 'queries', 'tasks', 'rewards', 'rollouts']
PREPARES = [f'data/{name}/prepare.py' for name in (
    'chat', 'fineweb', 'my_code', 'openwebtext', 'preferences', 'python_char', 'shakespeare', 'shakespeare_char', 'sql',
    'text')]
CONFIGS = [f'config/{name}.py' for name in (
    'chat_lora', 'chat_tiny', 'dpo_lora', 'dpo_tiny', 'grpo_arithmetic', 'grpo_sql',
    'eval_gpt2', 'eval_gpt2_large', 'eval_gpt2_medium', 'eval_gpt2_xl', 'finetune_code',
    'finetune_shakespeare', 'finetune_sql',
    'lora_llama', 'train_bpe_10m', 'train_gpt2', 'train_my_text', 'train_python_char', 'train_shakespeare_char',
    'train_shakespeare_char_cpu', 'train_shakespeare_char_cpu_fast', 'train_shakespeare_char_fast')]
# {module: file}
MODULES = {**{name: f'{name}.py' for name in ('configurator', 'model', *SCRIPTS)},
           **{f'flatgpt.{part}': f'flatgpt/{part}.py' for part in PARTS}}
RUNNABLE = [f'{name}.py' for name in SCRIPTS] + ['flatgpt/sweep.py'] + PREPARES   # what has options
DOCS = sorted({*re.findall(r'\]\((docs/\w+\.md)', (ROOT / 'README.md').read_text(encoding='utf-8'))})
TOURS = ['README.md', 'README.zh-CN.md', 'LEARN.md', 'LEARN.zh-CN.md']   # pages that walk through the whole project
PAGES = [*TOURS, 'CONTRIBUTING.md', *DOCS]


def tree(name):
    return ast.parse(text_of(name))


def text_of(name):
    return (ROOT / name).read_text(encoding='utf-8')


def options_of(script):
    return [name for name, *_ in configurator.read_options(ROOT / script)]


# ---------------------------------------------------------------------------------------------------------------------
# layout and imports

@pytest.mark.parametrize('module', MODULES)
def test_every_script_and_part_is_there_and_in_the_lists_of_the_pages(module):
    assert (ROOT / MODULES[module]).is_file()
    name = f'{module.removeprefix("flatgpt.")}.py'
    assert f'{name} ' in text_of('README.md') and f'{name}`' in text_of('LEARN.md')


def all_imports(nodes):
    """The dotted names that import statements name; `from a import b` names a and a.b."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'relative import'
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found


def imports_of(path):
    """Modules of ours that a file imports, at its import or later."""
    return all_imports(ast.walk(tree(path))) & MODULES.keys()


@pytest.mark.parametrize('path', [*MODULES.values(), *PREPARES])
def test_nothing_imports_a_script(path):
    assert not imports_of(path) & {*SCRIPTS}


@pytest.mark.parametrize('part', PARTS)
def test_a_part_imports_only_parts_above_it_and_model(part):
    """So that imports make no circle."""
    path = f'flatgpt/{part}.py'
    allowed = {'model', *(f'flatgpt.{above}' for above in PARTS[:PARTS.index(part)])}
    if path in RUNNABLE:
        allowed.add('configurator')
    assert imports_of(path) <= allowed


# Runs in a process of its own: what each import has loaded, and that none has a side effect
PROBE = """
import os, sys, threading
def state():
    return os.environ.copy(), os.getcwd(), sys.excepthook, sys.argv[:], threading.active_count()
def ours():
    return {name for name in sys.modules if name in MODULES}
before = state()
import configurator
assert ours() == {'configurator', 'flatgpt.errors'} and not sys.modules.keys() & {'torch', 'numpy', 'tqdm'}
import model
assert ours() == {'configurator', 'flatgpt.errors', 'model'}
import PARTS
assert state() == before
assert not sys.modules.keys() & RARELY, sys.modules.keys() & RARELY
"""


def test_an_import_loads_what_it_must_and_has_no_side_effect(tmp_path):
    importable = [f'flatgpt.{part}' for part in PARTS if f'flatgpt/{part}.py' not in RUNNABLE]
    rarely = {'wandb', 'tiktoken', 'requests', 'huggingface_hub', 'matplotlib', 'plotext', 'torch._dynamo'}
    probe = PROBE.replace('PARTS', ', '.join(importable))
    done = subprocess.run([sys.executable, '-c', f'MODULES, RARELY = {[*MODULES]}, {rarely}\n{probe}'], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# language

# Phrases that the project does not use, see Style in CONTRIBUTING.md. No pattern matches itself.
DIALECT = [re.compile(pattern, re.IGNORECASE) for pattern in (
    r'\bparted\s+by\b',                       # comma-separated
    r'\blea(?:ve|ves|ving)\b(?:\s\S+){0,4}\s+away\b',   # drop, remove
    r'\bleft\s+away\b',
    r'\b(?:what|who)\s(?:is|are|was|were)\s+no\b',      # invalid
    r'\bmend(?:s|ed|ing)?\b',                 # repair
    r'\bfore(?:tell|tells|told|telling)\b',   # predict
    r'\bdear(?:er|est|ly)?\b',                # expensive, slow
    r'\bso\s+are\b',
    r'\btak(?:e|es|ing)\s+(?:`pip\sinstall\s)?(?:pyarrow|matplotlib|plotext)\b',   # needs
    r'\bof\s+a\s+folder,',                    # a folder means
    r'\bwhat\s+was\s+read\b',
    r'\bas\s+ever\b',
    r'\bupon\s+which\b',
    r'\b(?:is|are|was|were|be)\s+to\s+be\s+had\b',      # available
    r'\bin\s+words[,.;]',
    r'"""the\s+same[;,.]',
    r'\bagain\s+and\s+again\b',               # repeatedly
    r'\bl(?:ies|ie|ay)\s+(?:in|at|on|under|below|beside|there|here|where|by)\b',   # is stored in
)]


def dialect_in(text):
    """Phrases of DIALECT in a text, also across line breaks and in the names of functions and tests."""
    text = re.sub(r'\s*\n\s*(?:#\s*)?', ' ', text).replace('_', ' ')
    return [found[0] for pattern in DIALECT for found in pattern.finditer(text)]


@pytest.mark.parametrize('path', [*MODULES.values(), *CONFIGS, *PREPARES, *PAGES, 'Makefile'])
def test_a_file_has_no_phrase_of_the_former_dialect(path):
    assert dialect_in(text_of(path)) == []


def test_a_phrase_of_the_dialect_is_found_and_plain_words_are_not():
    assert all(map(dialect_in, ('fields, par' + 'ted\n    # by commas', 'def test_what_' + 'is_no_number():')))
    assert not dialect_in('recommended: leave the file. The same as before. 0 lies between 1 and 2')


# ---------------------------------------------------------------------------------------------------------------------
# options

@pytest.mark.parametrize('script', RUNNABLE)
def test_options_are_read_before_anything_slow_is_imported_and_no_import_hides_one(script):
    call_line = max(number for *_, number in configurator.read_options(ROOT / script))
    above = all_imports(node for node in ast.walk(tree(script)) if getattr(node, 'lineno', call_line) < call_line)
    assert above <= {'sys', 'time', 'pathlib', 'pathlib.Path', 'configurator', 'configurator.configure'}
    bound = [alias.asname or alias.name for node in ast.walk(tree(script))
             if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    assert not {*bound} & {*options_of(script)}


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


def script_of(recipe):
    """The script that a file in config/ is for."""
    kind = recipe.removeprefix('config/').split('_')[0]
    return f'{kind}.py' if kind in ('dpo', 'grpo') else 'train.py'


@pytest.mark.parametrize('path', CONFIGS)
def test_a_config_is_accepted_and_makes_a_model_and_a_schedule(path, monkeypatch):
    config = configured(script_of(path), [path], monkeypatch)
    assert config['schedule'] in optim.SCHEDULES and config['optimizer'] in optim.OPTIMIZERS
    assert config.get('eval_only') or 0 <= config['warmup_iters'] < config['max_iters']
    if script_of(path) != 'train.py':
        return
    names = ('block_size', 'n_layer', 'n_embd', 'n_head', 'bias', 'dropout', 'attention')
    GPTConfig(**{name: config[name] for name in names})
    made_here = f'--name={config["dataset"]} ' in text_of(path)   # by data/text/prepare.py
    assert (ROOT / 'data' / config['dataset'] / 'prepare.py').exists() or made_here


@pytest.mark.parametrize('path', CONFIGS)
def test_the_commands_in_the_header_of_a_config_use_it_and_its_folder(path, monkeypatch):
    out_dir = configured(script_of(path), [path], monkeypatch)['out_dir']
    found = commands(path)
    assert path in dict(found)[script_of(path)]
    for script, args in found:
        folders = [arg for arg in args if arg.startswith('--out_dir=')]
        assert script == 'train.py' or folders in ([], [f'--out_dir={out_dir}'])



# ---------------------------------------------------------------------------------------------------------------------
# what the pages say

COMMAND = re.compile(r'(?:^|[\s`(])(?:(?:cd (\S+?)(?:;| &&) )?python3?|torchrun(?: --\S+)*|\$\(PY\)) '
                     r'([\w/.-]+\.py|-m flatgpt\.\w+)\b(.*)')
ARGUMENTS = re.compile(r'''(?:[^'"]|'[^']*'|"[^"]*")*?(?=  | [>|#&(]|[;)]|$)''')   # what ends them may be in quotes


def commands(name):
    """[(script, arguments)] of the commands in a text: in the Makefile, a page, docstrings and headers."""
    text, found = text_of(name), []
    if name.endswith('.py') and not name.startswith('config/'):
        text = ast.get_docstring(tree(name))
    for line in text.replace('\\\n', ' ').replace('$(OUT)', 'out').replace('$(MINUTES)', '10').splitlines():
        for piece in re.split(r'`', line) if name.endswith('.md') else [line]:
            match = COMMAND.search(piece)
            if match:
                folder, script, rest = match.groups()
                if script.startswith('-m '):
                    script = MODULES[script.removeprefix('-m ')]
                rest = ARGUMENTS.match(rest)[0]
                found.append((f'{folder}/{script}' if folder else script, shlex.split(rest)))
    return found


def to_write(name):
    """{file: content} of the files that a text tells its reader to write: Python that begins with a file's name."""
    return dict(re.findall(r'^```python\n# (\w+\.py)\n(.*?)^```$', text_of(name), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize('name', ['README.md', 'README.zh-CN.md', 'LEARN.md', 'Makefile', *DOCS, *RUNNABLE, *CONFIGS])
def test_every_command_that_a_text_gives_would_be_accepted(name, tmp_path, monkeypatch):
    written = {}
    for file, content in to_write(name).items():
        (tmp_path / file).write_text(content)
        written[file] = str(tmp_path / file)
    found = commands(name)
    assert found
    for script, args in found:
        assert script in RUNNABLE or script in written
        configured(written.get(script, script), [written.get(arg, arg) for arg in args], monkeypatch)


TARGETS = set(re.findall(r'^([\w-]+):', text_of('Makefile'), re.MULTILINE))


def targets_named(name):
    """The targets in a text's `make TARGET` commands; '' for `make` alone."""
    return set(re.findall(r'(?:`|^    |^# )make(?: ([a-z-]+))?(?=`|  |$)', text_of(name), re.MULTILINE))


@pytest.mark.parametrize('name', [*PAGES, 'Makefile'])
def test_every_make_target_that_a_text_names_exists(name):
    assert targets_named(name) - {''} <= TARGETS


def test_the_workflow_of_github_runs_targets_that_exist():
    targets = set(re.findall(r'- run: make ([a-z-]+)', text_of('.github/workflows/test.yml')))
    assert targets and targets <= TARGETS


# --help, --key=val, the options of torchrun, pip, hf, tensorboard, lm_eval and llama.cpp, and one in a sample of text
OTHER_OPTIONS = {'help', 'key', 'standalone', 'nproc_per_node', 'nnodes', 'node_rank', 'master_addr', 'master_port',
                 'max-restarts', 'index-url', 'local-dir', 'logdir', 'model', 'model_args', 'tasks', 'outfile', 'user',
                 'real_data'}


@pytest.mark.parametrize('name', PAGES)
def test_every_option_that_a_page_names_belongs_to_a_script(name, tmp_path):
    known = {option for script in [*RUNNABLE, 'tests/load.py'] for option in options_of(script)}
    for file, content in to_write(name).items():
        (tmp_path / file).write_text(content)
        known |= set(options_of(tmp_path / file))
    named = set(re.findall(r'(?<![\w-])--(\w[\w-]*)', text_of(name)))
    assert named - known <= OTHER_OPTIONS
    assert named or name not in TOURS


# Names that stand for a reader's own files, for files that are made, and for files of other projects
OTHER_FILES = {'prompts.txt', 'prompt.txt', 'book.txt', 'book-gbk.txt', 'my.txt', 'samples.txt', 'input.txt', 'i.txt',
               'de.txt', 'zh-cn.txt', 'de/reference.txt', 'zh/reference.txt', 'prepare.py', 'topics.txt'}


@pytest.mark.parametrize('name', PAGES)
def test_every_file_that_a_page_names_exists(name):
    """Each is there from the root, from the page's folder, or in flatgpt/."""
    named = set(re.findall(r'(?<![\w/<>.-])((?:[\w.]+/)*[\w-]+(?:\.zh-CN)?\.(?:py|md|txt|toml|ipynb))\b', text_of(name),
                           re.ASCII))
    assert name not in TOURS or {'train.py', 'model.py'} <= named
    allowed = OTHER_FILES | to_write(name).keys()
    folders = [ROOT, (ROOT / name).parent, ROOT / 'flatgpt']
    assert not [file for file in sorted(named - allowed) if not any((folder / file).exists() for folder in folders)]


def anchors_of(page):
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r'^```.*?^```$', '', page.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)
    anchors = []
    for heading in re.findall(r'^#+ (.*)$', text, re.MULTILINE):
        anchor = re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
        anchors.append(f'{anchor}-{anchors.count(anchor)}' if anchor in anchors else anchor)
    return anchors


@pytest.mark.parametrize('name', PAGES)
def test_every_link_and_picture_of_a_page_is_there(name):
    """Links are relative to the folder of the page."""
    links = re.findall(r'\]\(([^)\s]+)\)', text_of(name))
    assert links or name not in TOURS
    for link in links:
        path, _, anchor = link.partition('#')
        page = (ROOT / name).parent / path if path else ROOT / name
        if not link.startswith(('http://', 'https://')):
            assert page.exists(), link
            assert not anchor or anchor in anchors_of(page), link


@needs('git_checkout')
def test_git_ignores_what_the_commands_of_the_pages_write():
    text = '\n'.join(map(text_of, PAGES))
    folders = re.findall(r'--(?:to|out_dir)=([a-z][a-z0-9_-]*)(?=[\s`])', text)
    files = re.findall(r'^    python .*> ([\w.-]+)$', text, re.MULTILINE)
    written = {*(f'{folder}/x' for folder in folders), *files}
    done = subprocess.run(['git', 'check-ignore', '--no-index', *written], cwd=ROOT, capture_output=True, text=True)
    assert len(written) > 10 and {*done.stdout.split()} == written


# ---------------------------------------------------------------------------------------------------------------------
# the README in Chinese: prose and numbers may differ, what one types may not

def test_the_chinese_readme_has_the_commands_of_the_other_in_their_order():
    assert commands('README.zh-CN.md') == commands('README.md')


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
    ('requirements-oldest.txt', PROJECT['dependencies'] + PROJECT['optional-dependencies']['test']),
])
def test_the_pins_are_exact_and_those_that_pyproject_allows(name, declared):
    pins, declared = requirements(name), {Requirement(text).name: Requirement(text) for text in declared}
    assert pins.keys() == declared.keys()
    for pin in pins.values():
        [only] = pin.specifier
        assert only.operator == '==' and only.version in declared[pin.name].specifier
        if name == 'requirements-oldest.txt':
            [lowest] = declared[pin.name].specifier
            assert (lowest.operator, Version(lowest.version)) == ('>=', Version(only.version))


def test_every_package_that_is_imported_is_declared():
    imported = set().union(*(all_imports(ast.walk(tree(path))) for path in (*MODULES.values(), *PREPARES)))
    packages = {name.split('.')[0] for name in imported} - sys.stdlib_module_names - {'flatgpt', *MODULES}
    extras = [text for group in PROJECT['optional-dependencies'].values() for text in group]
    assert packages <= {Requirement(text).name for text in PROJECT['dependencies'] + extras}
