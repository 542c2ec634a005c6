"""Two hosts, made of two network namespaces and a cable between them, which is then cut."""

import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import pytest
from conftest import ROOT, log_of, needs, run, started
from test_train import HERE, load

pytestmark = [pytest.mark.full, needs('network_namespaces', 'two_processes')]
GIVE_UP = 8   # seconds


def ip(*words):
    return subprocess.run(['ip', *' '.join(words).split()], capture_output=True, text=True, check=True)


@pytest.fixture(scope='module')
def hosts():
    """The names of two namespaces, at 10.77.0.1 and 10.77.0.2 on the two ends of a veth pair."""
    names = [f'flatgpt-{os.getpid()}-{i}' for i in (0, 1)]
    cable = [f'v{os.getpid()}-{i}' for i in (0, 1)]
    for name in names:
        ip('netns add', name)
    ip('link add', cable[0], 'netns', names[0], 'type veth peer name', cable[1], 'netns', names[1])
    for i, (name, end) in enumerate(zip(names, cable)):
        ip('-n', name, f'address add 10.77.0.{i + 1}/24 dev', end)
        ip('-n', name, 'link set lo up')
        ip('-n', name, 'link set', end, 'up')
    try:
        yield list(zip(names, cable))
    finally:
        for name in names:
            ip('netns delete', name)


@contextmanager
def launched(hosts, *args):
    """The launch line for two hosts, on both of them; their two processes."""
    with ExitStack() as stack:
        processes = []
        for i, (name, cable) in enumerate(hosts):
            inside = f'import os, sys; os.execvp("ip", "ip netns exec {name}".split() + sys.argv[1:])'
            processes.append(stack.enter_context(started(
                '-c', inside, sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', f'--node_rank={i}',
                '--nproc_per_node=1', '--master_addr=10.77.0.1', '--master_port=29500', ROOT / 'train.py', *args,
                GLOO_SOCKET_IFNAME=cable, DIST_TIMEOUT=str(GIVE_UP))))
        yield processes


def test_two_hosts_train_as_one_survive_a_cut_cable_with_an_error_and_go_on_when_relaunched(hosts, tiny, tmp_path):
    args = (tiny, *HERE, '--init_from=auto', '--checkpoint_interval=5', f'--out_dir={tmp_path / "two"}')
    with launched(hosts, *args, '--max_iters=1000000', '--schedule=constant') as (first, second):
        for line in first.stdout:
            if line.startswith('iter 40:'):
                break
        name, cable = hosts[1]
        ip('-n', name, 'link set', cable, 'down')
        cut = time.monotonic()
        outputs = [process.communicate(timeout=GIVE_UP + 60) for process in (first, second)]
        print(f'both hosts gave up {time.monotonic() - cut:.1f} s after the cut')
        assert time.monotonic() - cut < GIVE_UP + 15
    assert first.returncode == second.returncode == 1
    for rank, (_, err) in enumerate(outputs):
        assert re.search(f'rank {rank}: lost the connection to another process', err), err
    saved = load(tmp_path / 'two' / 'ckpt.pt')['iter_num']
    assert saved >= 35

    ip('-n', name, 'link set', cable, 'up')
    end = f'--max_iters={saved + 10}'
    with launched(hosts, *args, end, '--schedule=constant') as (first, second):
        out, err = first.communicate(timeout=60)
        assert first.returncode == second.wait(timeout=60) == 0, err
    assert f'step {saved:,}' in next(line for line in err.splitlines() if line.startswith('resumed'))

    done = run('train.py', tiny, *HERE, end, '--schedule=constant', f'--out_dir={tmp_path / "one"}')
    assert done.returncode == 0, done.stderr
    one, two = ([record for record in log_of(tmp_path / name) if 'iter' in record] for name in ('one', 'two'))
    assert [record['iter'] for record in two] == list(range(saved + 10))
    for ours, theirs in zip(two, one):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-3)
