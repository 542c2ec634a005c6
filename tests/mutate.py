"""Breaks a line of code, runs the tests, and prints which test fails, or that none does: how much the tests notice.

    python -m tests.mutate --count=60 --seed=0 --out=a.jsonl
    python -m tests.mutate --mutations=a.jsonl --root=../other --out=b.jsonl     the same ones in another version
A command that is given again goes on where it was interrupted.
"""

import argparse
import ast
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

FILES = ['model.py', 'configurator.py', 'flatgpt/dataset.py', 'flatgpt/checkpoint.py', 'flatgpt/optim.py',
         'flatgpt/engine.py', 'flatgpt/tokenizer.py']
KEPT = (ast.JoinedStr, ast.arguments, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Pass)
SWAPPED = {ast.Lt: '<=', ast.LtE: '<', ast.Gt: '>=', ast.GtE: '>', ast.Eq: '!=', ast.NotEq: '==',
           ast.In: 'not in', ast.NotIn: 'in', ast.Is: 'is not', ast.IsNot: 'is'}
HANGS = 1800   # seconds
MISSING = 'not tried: this version has no such line'
CALLS = {'print', 'warn', 'notice', 'lru_cache'}   # no test should notice their change, nor that of these arguments:
KEYWORDS = {'timeout', 'stacklevel', 'maxsize', 'buffering', 'indent', 'flush', 'chunk_size', 'mininterval'}


def unnoticed(node):
    """Whether no test should notice a change: of words for people, types, defaults, imports."""
    node = node.value if isinstance(node, ast.Expr) else node
    name = node.func.__dict__.get('id', node.func.__dict__.get('attr')) if isinstance(node, ast.Call) else None
    return (isinstance(node, KEPT) or name in CALLS or getattr(node, 'arg', None) in KEYWORDS
            or isinstance(getattr(node, 'value', None), str))


def edits(node, source):
    """(part of the code, what stands there instead), of one statement or expression and all that it holds."""
    if unnoticed(node):
        return
    text = lambda part: ast.get_source_segment(source, part)
    if isinstance(node, ast.stmt) and not hasattr(node, 'body') and getattr(node, 'value', node) is not None:
        yield node, 'pass'
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield node.test, f'(not ({text(node.test)}))'
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield node, f'({text(node.left)} {SWAPPED[type(node.ops[0])]} {text(node.comparators[0])})'
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield node, str(not node.value if isinstance(node.value, bool) else node.value + 1)
    for name, child in ast.iter_fields(node):
        if isinstance(node, ast.Raise) or name in ('annotation', 'returns', 'decorator_list', 'format_spec'):
            continue   # a raise: only its message
        for part in child if isinstance(child, list) else [child]:
            if isinstance(part, ast.AST):
                yield from edits(part, source)


def places(lines, old):
    """The numbers of the lines at which these old lines begin."""
    return [i for i in range(len(lines)) if lines[i:i + len(old)] == old]


def mutations(root, name, common):
    """[[mutation of a line]] of the functions and classes of a file, of lines that another version has too."""
    source = (root / name).read_text(encoding='utf-8')
    lines, found = source.splitlines(), {}
    others = (common / name).read_text(encoding='utf-8').splitlines() if common else lines
    blocks = [part for node in ast.parse(source).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef)) for part in node.body]
    for node, new in (edit for block in blocks for edit in edits(block, source)):
        first, old = node.lineno - 1, lines[node.lineno - 1:node.end_lineno]
        before, after = old[0].encode()[:node.col_offset].decode(), old[-1].encode()[node.end_col_offset:].decode()
        here = places(lines, old)
        if len(places(others, old)) == len(here):
            found.setdefault(first, []).append({'file': name, 'line': first + 1, 'old': '\n'.join(old),
                                                'nth': here.index(first), 'new': before + new + after})
    return [found[line] for line in sorted(found)]


def pytest(root, args, timeout):
    """(The exit status of the tests, or None after so many seconds; the ids of the failed ones)."""
    command, mark = [sys.executable, '-m', 'pytest', '-n', '0', '--tb=no', *args], str(uuid.uuid4())
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'FLATGPT_MUTANT': mark}
    with tempfile.TemporaryFile('w+', encoding='utf-8') as out:
        try:
            status = subprocess.run(command, cwd=root, env=env, timeout=timeout, stdin=subprocess.DEVNULL, stdout=out,
                                    stderr=subprocess.STDOUT).returncode
        except subprocess.TimeoutExpired:
            status = None
            for folder in Path('/proc').glob('[0-9]*'):   # what the tests started
                with suppress(OSError):
                    if mark in (folder / 'environ').read_text():
                        os.kill(int(folder.name), signal.SIGKILL)
        out.seek(0)
        return status, re.findall(r'^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$', out.read(), re.MULTILINE)


def copy(root, folder):
    """A copy of the repository in a folder; the tests find ../shared there too."""
    (folder / 'shared').symlink_to(root.parent / 'shared')
    ignored = shutil.ignore_patterns('.git', '.venv*', '__pycache__', 'out*')
    return shutil.copytree(root, folder / 'flatgpt', ignore=ignored)


def ordered(root, name):
    """The test files: (those named after the module, the others, those first that mention it)."""
    tests, stem = sorted(path.name for path in (root / 'tests').glob('test_*.py')), Path(name).stem
    own = [test for test in tests if test.startswith(f'test_{stem}')]
    mentions = lambda test: re.search(rf'\b(import|from) {stem}\b', (root / 'tests' / test).read_text('utf-8'))
    others = sorted({*tests} - {*own}, key=lambda test: (not mentions(test), test))
    return [[f'tests/{test}' for test in group] for group in (own, others) if group]


def tried(mutation, root, args):
    """The mutation with its line in this version and 'by': the test that failed, None where none did."""
    with tempfile.TemporaryDirectory(prefix='mutant-') as folder:
        here, start, by = copy(root, Path(folder)), time.time(), None
        path, old = here / mutation['file'], mutation['old'].splitlines()
        lines = path.read_text(encoding='utf-8').splitlines()
        found = places(lines, old)[mutation['nth']:]
        if not found:
            return {**mutation, 'by': MISSING, 'seconds': 0}
        lines[found[0]:found[0] + len(old)] = mutation['new'].splitlines()
        path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
        for group in ordered(here, mutation['file']):
            status, failed = pytest(here, ['-x', *args, *group], HANGS)
            if status not in (0, 5):   # 5: no test was chosen
                by = failed[0] if failed else 'a timeout' if status is None else f'the exit status {status}'
                break
        return {**mutation, 'line': found[0] + 1, 'by': by, 'seconds': round(time.time() - start)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=60, help='how many lines are broken')
    parser.add_argument('--seed', type=int, default=0, help='which ones')
    parser.add_argument('--files', nargs='+', default=FILES)
    parser.add_argument('--tests', default='-m "not gpu"', help='further arguments of pytest')
    parser.add_argument('--common', type=Path, help='another version: only lines that it has too')
    parser.add_argument('--mutations', type=Path, help='the --out of another run: its mutations')
    parser.add_argument('--root', type=Path, default=Path(__file__).parent.parent, help='the version that is broken')
    parser.add_argument('--out', type=Path, default=Path(tempfile.gettempdir(), 'mutants.jsonl'))
    options = parser.parse_args()
    root, args = options.root.resolve(), shlex.split(options.tests)
    records = lambda path: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    key = lambda mutation: [mutation[name] for name in ('file', 'old', 'nth', 'new')]
    if options.mutations:
        todo = records(options.mutations)[1:]
    else:
        lines = [found for name in options.files for found in mutations(root, name, options.common)]
        rng = random.Random(options.seed)
        todo = [rng.choice(found) for found in rng.sample(lines, min(options.count, len(lines)))]
    if not records(options.out):
        with tempfile.TemporaryDirectory(prefix='mutant-') as folder:
            failing = pytest(copy(root, Path(folder)), args, 2 * HANGS)[1]
        options.out.write_text(json.dumps({'failing': failing}) + '\n')
    first, *done = records(options.out)
    print('fail without a mutation:', *first['failing'] or ['none'], flush=True)
    args += [f'--deselect={test}' for test in first['failing']]
    with ThreadPoolExecutor(2) as pool, options.out.open('a') as out:
        running = [pool.submit(tried, each, root, args) for each in todo if key(each) not in map(key, done)]
        for record in (future.result() for future in as_completed(running)):
            done.append(record)
            print(f'{record["file"]}:{record["line"]}', *record['old'].splitlines(), sep='\n  - ')
            print(f'  + {record["new"]}\n    {record["by"] or "SURVIVED"} ({record["seconds"]} s)', flush=True)
            print(json.dumps(record), file=out, flush=True)
    missing, survived = (sum(record['by'] == by for record in done) for by in (MISSING, None))
    print(f'{len(done) - missing - survived} of {len(done)} caught, {survived} survived, {missing} not tried')


if __name__ == '__main__':
    main()
