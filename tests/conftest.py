"""What all tests share: running a script as a person would, a small dataset, a small recipe."""

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'   # before torch is imported: tests run side by side, one per core
os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_HOME': '/nonexistent'}   # no test asks the hub or its cache

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'   # real text and GPT-2's encoding, on machines that have them
sys.path.insert(0, str(ROOT))


def can_link():
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.symlink('target', Path(folder, 'link'))
        except (OSError, NotImplementedError):
            return False
        return True


def can_compile():
    compilers = (os.environ.get('CXX', 'c++'), 'g++', 'clang++')
    return any(map(shutil.which, compilers)) and Path(sysconfig.get_path('include'), 'Python.h').exists()


def can_connect_namespaces():
    """Whether two connected network devices can be made: tried in a network namespace that ends with the trial."""
    command = 'unshare --net ip link add flatgpt0 type veth peer name flatgpt1'.split()
    return bool(shutil.which('unshare')) and subprocess.run(command, capture_output=True).returncode == 0


def can_use_gpu():
    import torch  # not at the top: the process that only hands out tests to others does not need it
    return torch.cuda.is_available()


def can_use_gloo():
    import torch.distributed
    return torch.distributed.is_available() and torch.distributed.is_gloo_available()


def node_llama_cpp():
    """The folder of the npm package node-llama-cpp, which has llama.cpp in it, or None: `npm install node-llama-cpp`
    in the project's folder puts it there, the variable NODE_LLAMA_CPP names another one."""
    folder = Path(os.environ.get('NODE_LLAMA_CPP', ROOT / 'node_modules' / 'node-llama-cpp'))
    return folder if shutil.which('node') and (folder / 'dist' / 'index.js').exists() else None


def is_there(module):
    return importlib.util.find_spec(module) is not None


# What a test can need of the machine: how to find out, and the reason that the skipped test gives
CAPABILITIES = {
    'gpu': (can_use_gpu, 'needs a CUDA GPU'),
    'linux': (lambda: sys.platform == 'linux', 'needs Linux'),
    'root': (lambda: hasattr(os, 'geteuid') and os.geteuid() == 0, 'needs root'),
    'fork': (lambda: sys.platform == 'linux', 'needs fork() of a process that has threads: Linux'),
    'two_processes': (can_use_gloo, 'needs torch.distributed with gloo'),
    'c_compiler': (can_compile, 'needs a C++ compiler and Python.h, for torch.compile'),
    'git_checkout': (lambda: (ROOT / '.git').exists() and bool(shutil.which('git')), 'needs git and a checkout'),
    'symlinks': (can_link, 'needs a file system with symbolic links'),
    'fifo': (lambda: hasattr(os, 'mkfifo'), 'needs named pipes'),
    'full_disk': (lambda: Path('/dev/full').exists(), 'needs a file that is always full: /dev/full'),
    'limits': (lambda: is_there('resource'), 'needs limits of memory and file size: the module resource'),
    'file_locks': (lambda: is_there('fcntl'), 'needs the module fcntl'),
    'network_namespaces': (can_connect_namespaces, 'needs network namespaces: Linux and root'),
    'browser': (lambda: bool(shutil.which('chromium') and shutil.which('chromedriver')) and is_there('selenium'),
                'needs chromium, chromedriver and selenium'),
    'llama_cpp': (lambda: node_llama_cpp() and is_there('gguf'), 'needs gguf and the npm package node-llama-cpp'),
    'gpt2_encoding': (lambda: (SHARED / 'tiktoken_cache').is_dir(), "needs GPT-2's encoding on this machine"),
    'shakespeare': (lambda: (SHARED / 'tinyshakespeare.txt').exists(), 'needs tiny Shakespeare on this machine'),
}


@functools.cache
def can(name):
    """Whether this machine has the capability."""
    return bool(CAPABILITIES[name][0]())


def needs(*names):
    """The mark of a test that is skipped, with the reason, where one of these capabilities is missing."""
    reasons = [CAPABILITIES[name][1] for name in names if not can(name)]
    return pytest.mark.skipif(bool(reasons), reason=', '.join(reasons))


def pytest_make_parametrize_id(val, argname):
    """Names what is long or not printable by its argument: a compressed file, for one, holds the time of its making."""
    if isinstance(val, bytes) or isinstance(val, str) and (len(val) > 60 or not val.isprintable()):
        return argname


@pytest.hookimpl(tryfirst=True)   # before -m and -k drop some
def pytest_collection_modifyitems(session, items):
    session.collected_ids = [item.nodeid for item in items]
    for item in items:
        if item.get_closest_marker('gpu'):
            item.add_marker(needs('gpu'))


signal.signal(signal.SIGINT, signal.default_int_handler)   # which a job in a shell's background inherits as ignored
if hasattr(signal, 'SIGHUP'):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)   # which nohup ignores

# A model that trains in a second, in float32 so that a run can be compared bit for bit
TINY = """
eval_interval = 10
eval_iters = 2
log_interval = 1
gradient_accumulation_steps = 2
batch_size = 4
block_size = 16
n_layer = 2
n_head = 2
n_embd = 32
learning_rate = 1e-2
max_iters = 20
warmup_iters = 2
min_lr = 1e-3
device = 'cpu'
dtype = 'float32'
"""


# Runs scripts, each in a fork of this process, which has imported torch already: importing it takes half the time of a
# short run. A fork ends without the clean-up of the interpreter, which would take half a second with torch in it.
FORKS = """
import atexit, gc, json, os, sys, threading
import numpy, torch, torch._dynamo

def execute(script, args, cwd, env, out, err):
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w')
    sys.__stderr__ = sys.stderr
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if script.endswith('train.py') and 'DRAW' not in env:   # a picture takes as long as a short run
        sys.modules['matplotlib'] = None
    sys.argv, sys.path[0] = [script, *args], os.path.dirname(script)
    sys.path[1:1] = filter(None, env.get('PYTHONPATH', '').split(os.pathsep))
    with open(script, encoding='utf-8') as f:
        code = compile(f.read(), script, 'exec')
    try:
        exec(code, {'__name__': '__main__', '__file__': script, '__builtins__': __builtins__})
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())   # which may raise SystemExit, with the status
        sys.exit(1)

gc.freeze()
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            execute(*json.loads(line))
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        threading._shutdown()   # waits for the threads that are no daemons
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@functools.cache
def forks():
    server = subprocess.Popen([sys.executable, '-c', FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)   # which closes its stdin, and that ends it
    return server


def run(script, *args, cwd=ROOT, timeout=120, **env):
    """The CompletedProcess of a script of the project, with stdout and stderr as text."""
    script, args, env = str(ROOT / script), [str(arg) for arg in args], {**os.environ, 'WANDB_MODE': 'offline', **env}
    if not can('fork'):
        return subprocess.run([sys.executable, script, *args], cwd=cwd, env=env, timeout=timeout, encoding='utf-8',
                              stdin=subprocess.DEVNULL, capture_output=True)
    with tempfile.NamedTemporaryFile('r', encoding='utf-8') as out, \
            tempfile.NamedTemporaryFile('r', encoding='utf-8') as err:
        forks().stdin.write(json.dumps([script, args, str(cwd), env, out.name, err.name]) + '\n')
        forks().stdin.flush()
        with killed_after(timeout, int(forks().stdout.readline())):
            status = int(forks().stdout.readline())
        return subprocess.CompletedProcess([script, *args], status, out.read(), err.read())


@contextlib.contextmanager
def killed_after(seconds, pid):
    """A block in which a process that runs for longer is killed, so that nobody waits for it for ever."""
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_until(condition, seconds=60):
    """What the condition returns as soon as it is true. Fails if it does not become true in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f'not true after {seconds} s'
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def started(*command, cwd=ROOT, seconds=150, **env):
    """The running process of a command; when the block or the time ends, nothing that it started runs on."""
    mark = f'FLATGPT_TEST={uuid.uuid4()}'
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, **dict([mark.split('=')]), **env})
    try:
        with killed_after(seconds, process.pid):
            yield process
    finally:
        if not can('linux'):   # no /proc: torchrun ends its children when it is asked to end
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for folder in Path('/proc').glob('[0-9]*'):   # torchrun's children are in sessions of their own
            with contextlib.suppress(OSError):
                if mark.encode() in (folder / 'environ').read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
        process.kill()
        process.communicate()


def torchrun(script, *args, processes=2, restarts=0, status=0, timeout=120, cwd=ROOT, **env):
    """Run a script of the project in several processes on this machine; its CompletedProcess."""
    launcher = ('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
                f'--max-restarts={restarts}')
    with started(*launcher, ROOT / script, *args, cwd=cwd, **env) as process:
        out, err = process.communicate(timeout=timeout)
    assert process.returncode == status, err
    return subprocess.CompletedProcess(process.args, status, out, err)


def log_of(out_dir):
    """The records of log.jsonl without what depends on the clock."""
    lines = (Path(out_dir) / 'log.jsonl').read_text(encoding='utf-8').splitlines()
    clock = {'seconds', 'dt', 'tok_per_s', 'mfu'}
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_one_line(done, status, *words):
    """A script ended as it should for a person's mistake: the status, one line on stderr as its last, no traceback."""
    assert done.returncode == status, done.stderr
    assert 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, f'{word!r} is not in {last!r}'


@pytest.fixture(scope='session')
def char_dataset(tmp_path_factory):
    """A folder with a dataset of characters, small and learnable."""
    from flatgpt.dataset import write
    from flatgpt.tokenizer import CharTokenizer

    text = ''.join(f'{i} times {i % 7} makes {i * (i % 7)}.\n' for i in range(1000))
    folder = tmp_path_factory.mktemp('char_dataset')
    tok = CharTokenizer.of(text)
    ids = tok.encode(text)
    write(folder, {'train': ids[:-3000], 'val': ids[-3000:]}, tok, {'text': 'multiplication'})
    return folder


@pytest.fixture(scope='session')
def tiny(tmp_path_factory, char_dataset):
    """The path of a config file for train.py: a tiny model on char_dataset."""
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(f'dataset = {str(char_dataset)!r}\n{TINY}')
    return path


@pytest.fixture(scope='session')
def trained(tmp_path_factory, tiny):
    """The out_dir of a finished run of the tiny config."""
    out_dir = tmp_path_factory.mktemp('trained')
    done = run('train.py', tiny, f'--out_dir={out_dir}')
    assert done.returncode == 0, done.stderr
    return out_dir
