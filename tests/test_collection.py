"""What holds for the suite as a whole: its ids are the same at any time and on any machine, and make test-oldest runs
it with the oldest versions that pyproject.toml allows."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import tomllib

import pytest
from conftest import CAPABILITIES, ROOT, can, needs, run, started
from packaging.requirements import Requirement
from packaging.version import Version

# Makes the collecting process another machine at another time: its clock is wrong, and it has none of the capabilities
ELSEWHERE = """
import sys, time
seconds, nanoseconds = time.time, time.time_ns
time.time = lambda: seconds() + 40_000_000.25
time.time_ns = lambda: nanoseconds() + 40_000_000_250_000_000

def pytest_collection():
    if 'conftest' in sys.modules:
        sys.modules['conftest'].can = lambda name: False
"""


def collected(tmp_path, name, *args, **env):
    """The ids of the tests that pytest finds, in its order."""
    command = [sys.executable, '-m', 'pytest', '--collect-only', '-q', '-o', 'addopts=', '-p', 'no:cacheprovider',
               f'--basetemp={tmp_path / name}', *args]
    env = {**os.environ, 'PYTHONPATH': str(tmp_path), **env}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding='utf-8', timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if '::' in line]


def both(tmp_path, *args):
    """The ids in two processes that differ in all that ids must not depend on."""
    (tmp_path / 'elsewhere.py').write_text(ELSEWHERE)
    return (collected(tmp_path, 'one', *args, PYTHONHASHSEED='1', TZ='Asia/Shanghai'),
            collected(tmp_path, 'two', *args, '-p', 'elsewhere', PYTHONHASHSEED='2', TZ='America/New_York',
                      ATEN_CPU_CAPABILITY='default'))


@pytest.mark.full
def test_the_suite_has_the_same_ids_in_the_same_order_in_two_processes(tmp_path):
    here, there = both(tmp_path)
    assert here == there and len(here) == len(set(here)) > 1000


# What an id must not hold: each is code for the values that a test is given
CHANGING = {
    'clock': '[int(time.time())]', 'compressed': '[str(gzip.compress(b"")[4:8])]', 'hash': '[hash("a")]',
    'set': 'set("abcdefgh")', 'address': '[object()]', 'time_zone': '[os.environ["TZ"]]', 'process': '[os.getpid()]',
    'random': '[random.random()]', 'folder': '[tempfile.mkdtemp()]',
}


@pytest.mark.full
def test_an_id_that_depends_on_the_process_is_found(tmp_path):
    tests = [f'@pytest.mark.parametrize("value", {values}, ids=str)\ndef test_{name}(value):\n    pass\n'
             for name, values in {**CHANGING, 'constant': '[1, 2]'}.items()]
    (tmp_path / 'test_generated.py').write_text(
        '\n\n'.join(['import gzip, os, random, tempfile, time\nimport pytest', *tests]))
    here, there = ({name: [line for line in ids if f'test_{name}[' in line] for name in [*CHANGING, 'constant']}
                   for ids in both(tmp_path, tmp_path / 'test_generated.py'))
    assert all(here.values()) and [name for name in here if here[name] == there[name]] == ['constant']


def wrong(ids):
    """The ids that hold an address, a path of this machine or of the run, or more than a person reads."""
    places = [str(ROOT), tempfile.gettempdir(), os.path.expanduser('~')]
    return [each for each in ids if re.search(r'0x[0-9a-f]{6,}| object at ', each) or len(each) > 300
            or any(place in each for place in places if len(place) > 1)]


def test_no_id_holds_an_address_or_a_path_of_this_machine(request):
    """Of all tests that were collected with this one."""
    assert wrong(request.session.collected_ids) == []


@pytest.mark.parametrize('value', [object(), wrong, tempfile.gettempdir(), ROOT / 'x', 'x' * 400],
                         ids=['object', 'function', 'folder', 'path', 'length'])
def test_an_address_and_a_path_are_found_in_an_id(value):
    assert wrong([f'tests/test_x.py::test_y[{value}]']) and not wrong(['tests/test_x.py::test_y[0x10-a]'])


@pytest.mark.parametrize('value, name', [(b'\x1f\x8b', 'content'), ('a\nb', 'content'), ('x' * 61, 'content'),
                                         ('x' * 60, None), ('größe', None), (1.5, None)], ids=range(6))
def test_what_is_long_or_not_printable_is_named_by_its_argument(value, name, request):
    assert request.config.hook.pytest_make_parametrize_id(config=request.config, val=value, argname='content') == name


def test_the_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    bounds = [Requirement(text) for text in project['dependencies'] + project['optional-dependencies']['test']]
    lines = (ROOT / 'requirements-oldest.txt').read_text(encoding='utf-8').splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith('#')]
    versions = [{each.name: [(only.operator, Version(only.version)) for only in each.specifier] for each in those}
                for those in (bounds, pins)]
    assert versions[1] == {name: [('==', version) for _, version in found] for name, found in versions[0].items()}
    assert {operator for found in versions[0].values() for operator, _ in found} == {'>='}


@pytest.mark.parametrize('name', CAPABILITIES)
def test_a_test_is_skipped_with_the_reason_where_a_capability_is_missing(name):
    mark = needs(name).mark
    assert mark.args == (not can(name),) and (mark.kwargs['reason'] == CAPABILITIES[name][1]) == (not can(name))


def test_the_reasons_of_all_missing_capabilities_are_given(monkeypatch):
    monkeypatch.setattr('conftest.can', lambda name: name == 'linux')
    mark = needs('linux', 'root', 'symlinks').mark
    assert mark.args == (True,) and mark.kwargs['reason'] == 'needs root, needs a file system with symbolic links'
    assert needs('linux').mark.args == (False,)


@pytest.mark.full
def test_scripts_run_without_forks_as_with_them(monkeypatch, tmp_path):
    calls = [('plot.py', '--help'), ('plot.py', '--out_dir=nowhere', '--größe=1')]
    forked = [run(*call, cwd=tmp_path) for call in calls]
    monkeypatch.setattr('conftest.can', lambda name: False)
    plain = [run(*call, cwd=tmp_path) for call in calls]
    assert [(done.args, done.returncode, done.stdout, done.stderr) for done in plain] == [
        ([sys.executable, *done.args], done.returncode, done.stdout, done.stderr) for done in forked]
    assert [done.returncode for done in plain] == [0, 2]


@pytest.mark.full
def test_a_started_process_ends_with_its_block_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr('conftest.can', lambda name: False)
    with started('-c', 'import time; print("up", flush=True); time.sleep(60)') as process:
        assert process.stdout.readline() == 'up\n'
    assert process.returncode == -signal.SIGTERM
