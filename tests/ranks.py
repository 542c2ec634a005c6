"""A script in several processes that share the work, as torchrun starts them but for a tenth of its time: forks of a
process that has imported torch. What torchrun itself does (restarts, signals) is tested with conftest.torchrun.

    python tests/ranks.py 2 train.py config/x.py
"""

import os
import runpy
import socket
import sys


def run(script, *args, processes=2, **more):
    """The CompletedProcess of a script in so many processes: what all of them printed, and the worst exit status."""
    from conftest import ROOT
    from conftest import run as run_one

    return run_one('tests/ranks.py', processes, ROOT / script, *args, **more)


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def main(processes, script, *args):
    """Start the processes and wait for all. Returns the worst exit status."""
    port, children = free_port(), []
    for rank in range(int(processes)):
        pid = os.fork()
        if pid == 0:
            os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': processes,
                           'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
            sys.argv, sys.path[0] = [script, *args], os.path.dirname(script)
            runpy.run_path(script, run_name='__main__')
            return 0
        children.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in children)


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
