"""The tests have the same names, in the same order, at any time and on any machine: workers agree, and so do people."""

import os
import re
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT

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
