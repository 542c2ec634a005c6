"""What holds for the suite as a whole: its ids are the same at any time and on any machine."""

import os
import re
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT, needs

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


def collected(tmp_path, *args, **env):
    """The ids of the tests that pytest finds, in its order."""
    command = [sys.executable, '-m', 'pytest', '--collect-only', '-q', '-o', 'addopts=', '-p',
               'no:cacheprovider', *args]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(tmp_path), **env},
                          capture_output=True, encoding='utf-8', timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if '::' in line]


@pytest.mark.full
def test_the_suite_has_the_same_ids_in_the_same_order_on_another_machine(tmp_path):
    (tmp_path / 'elsewhere.py').write_text(ELSEWHERE)
    here = collected(tmp_path, f'--basetemp={tmp_path / "one"}', PYTHONHASHSEED='1', TZ='Asia/Shanghai')
    there = collected(tmp_path, f'--basetemp={tmp_path / "two"}', '-p', 'elsewhere', PYTHONHASHSEED='2',
                      TZ='America/New_York', ATEN_CPU_CAPABILITY='default')
    assert here == there and len(here) == len(set(here)) > 1000


def test_no_id_holds_an_address_or_a_path_of_this_machine(request):
    """Of all tests that were collected with this one."""
    places = f'0x[0-9a-f]{{6,}}| object at |{re.escape(str(ROOT))}|{re.escape(tempfile.gettempdir())}'
    assert not [each for each in request.session.collected_ids if re.search(places, each)]


def test_the_reasons_of_all_missing_capabilities_are_given(monkeypatch):
    monkeypatch.setattr('conftest.can', lambda name: name == 'linux')
    mark = needs('linux', 'root', 'symlinks').mark
    assert mark.args == (True,) and mark.kwargs['reason'] == 'needs root, needs a file system with symbolic links'
    assert needs('linux').mark.args == (False,)
