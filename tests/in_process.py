"""Scripts of the project inside the process of the tests: a tenth of the time of a process of its own, with the same
output and exit status. What only a process has (signals, a closed stdout, its real exit) is tested by conftest.run."""

import ast
import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

import configurator
from flatgpt.errors import exit_callbacks

SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]


def defaults_of(script):
    """{name: value} of the options of a script, and its path as '__file__': its globals when it calls configure()."""
    numbers = {number for *_, number in configurator.read_options(ROOT / script)}
    source = (ROOT / script).read_text(encoding='utf-8')
    block = [node for node in ast.parse(source).body if node.lineno in numbers]
    namespace = {'__file__': str(ROOT / script)}
    exec(compile(ast.Module(block, type_ignores=[]), str(script), 'exec'), namespace)
    del namespace['__builtins__']
    return namespace


def options(script, *args):
    """The Config of a script that is started with these arguments. Raises UsageError."""
    hook = sys.excepthook
    try:
        return configurator.configure(defaults_of(script), [str(arg) for arg in args])
    finally:
        sys.excepthook = hook


@contextlib.contextmanager
def restored():
    """A block that may change what belongs to the whole process; afterwards it is as before."""
    argv, path, folder, environ = sys.argv, sys.path[:], os.getcwd(), dict(os.environ)
    streams = sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
    hook, handlers = sys.excepthook, {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.excepthook = argv, path, hook
        sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__ = streams
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def execute(script, namespace):
    """Execute a script. Returns the exit status that its process would have."""
    try:
        try:
            exec(compile(Path(script).read_bytes(), script, 'exec'), namespace)
        except SystemExit:
            raise
        except BaseException:
            sys.excepthook(*sys.exc_info())   # configurator's, which raises SystemExit for what a person can correct
            return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


def call(script, *args, cwd=ROOT, encoding='utf-8', **env):
    """Run a script of the project here; its CompletedProcess, as conftest.run gives it. encoding: of its terminal."""
    script, args = str(ROOT / script), [str(arg) for arg in args]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    with restored():
        sys.argv, sys.path[0:0] = [script, *args], [os.path.dirname(script)]
        sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__ = out, err, out, err
        os.chdir(cwd)
        os.environ.update(env)
        namespace = {'__name__': '__main__', '__file__': script, '__builtins__': __builtins__}
        status = execute(script, namespace)
        for finish in exit_callbacks:   # as the end of a process does, such as the lock of an output folder
            finish()
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    return subprocess.CompletedProcess([script, *args], status, *texts)
