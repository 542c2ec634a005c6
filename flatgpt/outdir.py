"""
The output folder of a run: one run at a time, checkpoints written in the background, the log.

    out_dir/ckpt.pt          everything that a run needs to go on: weights, optimizer, step, ...
    out_dir/ckpt-1000.pt     the same at an earlier step, if keep_last asks for it
    out_dir/best.pt          the weights with the lowest validation loss
    out_dir/log.jsonl        one JSON object per log line
    out_dir/loss.png         the log as curves, if matplotlib is installed
    out_dir/previous-1/      the run that was here before
    out_dir/.lock            there while a run writes here
"""

import atexit
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import zlib
from pathlib import Path

import filelock

from flatgpt import plots, runtime
from flatgpt.checkpoint import older_states, save, state_of
from flatgpt.dataset import write_atomically
from flatgpt.errors import UserError, exit_callbacks
from flatgpt.runtime import Runtime

# What is in ckpt.pt and not in best.pt
RESUME_ONLY = ('optimizer', 'scaler', 'machine', 'planned', 'evaluated', 'bad_evals', 'seconds', 'tokens', 'flops',
               'measured', 'wandb_id', 'reference')


# ---------------------------------------------------------------------------------------------------------------------
# one run at a time

def claim(out_dir):
    """Make out_dir and lock it until this process ends or calls the function that is returned, which also removes the
    lock file, and folders that were made here and are empty. UserError if another run holds it or it is not writable.
    """
    folder = Path(out_dir).absolute()
    lock = filelock.FileLock(folder / '.lock')
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / '.lock').touch()
    except OSError as error:
        raise UserError(f'cannot write to out_dir={str(out_dir)!r}: {error.strerror}; choose another') from None
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f'another run writes to out_dir={str(out_dir)!r}: stop it, or choose another folder') from None
    except OSError:   # a file system without locks
        pass

    def release():
        if lock.is_locked:
            with contextlib.suppress(OSError):
                (folder / '.lock').unlink()   # before the release: afterwards it may be another run's
            lock.release()
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()   # fails, and ends this, if something is in it

    atexit.register(release)
    exit_callbacks.append(release)
    return release


def claim_for_all(out_dir, rt: Runtime):
    """Claim out_dir for all processes of a run, each of which must call this. UserError, besides those of claim(), if
    the hosts see different folders."""
    if rt.master:
        claim(out_dir)
    rt.any_process(False)   # wait until the master has made the lock file
    lock = Path(out_dir) / '.lock'
    seen = lock.stat() if lock.exists() else None
    number = zlib.crc32(repr(seen and (seen.st_ino, seen.st_mtime_ns)).encode())
    same_file = rt.same_everywhere(number)
    if not same_file:
        raise UserError(f'out_dir={out_dir!r} must be a folder that all hosts share')


def set_aside(out_dir):
    """Move the files of an earlier run to out_dir/previous-1, or the next number. Returns that folder, or None."""
    out_dir = Path(out_dir)
    found = [path.name for path in sorted(out_dir.glob('*'))]
    names = [name for name in found if re.fullmatch(r'(ckpt|best)(-\d+)?\.pt|log\.jsonl', name)]
    if not names:
        return None
    names += [name for name in ('base.pt', 'loss.png', 'tensorboard') if name in found]
    number = next(n for n in itertools.count(1) if not (out_dir / f'previous-{n}').exists())
    previous = out_dir / f'previous-{number}'
    try:
        previous.mkdir()
        for name in names:
            os.replace(out_dir / name, previous / name)
    except OSError as error:
        raise UserError(f'cannot move the run that is in {out_dir} to {previous}: {error.strerror}; choose another '
                        f'out_dir') from None
    return previous


def link(source, target):
    """Let the content of a file be in target too, whatever takes the name source later: a hard link, which needs no
    space, or a copy where there are none. Does nothing if there is no source."""
    if os.path.exists(source):
        Path(target).unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

class Writer:
    """Writes the states of a run into out_dir in the background, one at a time. A failed write does not end the run: it
    is reported, the older files stay, and the next write may find room.

    keep_last: number of earlier states to keep. step: of the state in ckpt.pt; None: there is none.
    .error: why the latest write failed, or None. .seconds: how long the latest write took.
    """

    def __init__(self, out_dir, keep_last=0, step=None):
        self.out_dir = Path(out_dir)
        self.keep_last = keep_last
        self.step = step
        self.best = None       # the best weights, until they are on the disk
        self.error = None
        self.seconds = 0.0
        self.thread = None
        exit_callbacks.insert(0, self.wait)   # before the lock of the folder is released

    def put(self, state: dict, best: bool):
        """Begin to write a state, which must not change any more, to ckpt.pt, and its weights to best.pt if they are
        the best so far. Waits for the write before it."""
        self.wait()
        if best:
            self.best = {key: value for key, value in state.items() if key not in RESUME_ONLY}
        self.thread = threading.Thread(target=self.write, args=(state,))
        self.thread.start()

    def wait(self):
        """Wait for the write that is under way. Returns why the latest one failed, or None."""
        if self.thread:
            self.thread.join()
        return self.error

    def write(self, state):
        self.error = 'the write was cut short'
        begun = time.perf_counter()
        try:
            if self.best:
                save(self.out_dir / 'best.pt', self.best)
                self.best = None
            if self.keep_last and self.step not in (None, state['iter_num']):
                self.keep_earlier_state()
            save(self.out_dir / 'ckpt.pt', state)
            self.step = state['iter_num']
            self.error = None
            self.seconds = time.perf_counter() - begun
        except UserError as error:
            self.error = error
            print(error, file=sys.stderr, flush=True)

    def keep_earlier_state(self):
        """Keep the state in ckpt.pt as ckpt-<step>.pt, and remove all but the latest keep_last of these. It is a hard
        link, so that there is a ckpt.pt at every moment."""
        earlier = self.out_dir / f'ckpt-{self.step}.pt'
        try:
            earlier.unlink(missing_ok=True)
            os.link(self.out_dir / 'ckpt.pt', earlier)
            for path in older_states(self.out_dir)[:-self.keep_last]:
                path.unlink()
        except FileNotFoundError:   # somebody has removed it
            pass
        except OSError as error:
            print(f'cannot keep {earlier}: {error.strerror}', file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# what a run writes

class RunFolder:
    """The output folder of a run while it trains: its log, its states, the signals that end it.

    options: of the script. progress: a start.Progress. resuming: whether the run goes on. start_path: where its first
    weights are. parts: model, optimizer, scaler, description, base and adapter, as checkpoint.state_of() gets them.
    .log: a Log. .writer: a Writer. .path: of ckpt.pt.
    """

    def __init__(self, options: dict, rt: Runtime, progress, resuming: bool, start_path, **parts):
        self.out_dir = options['out_dir']
        self.eval_only = options.get('eval_only', False)
        self.rt = rt
        self.progress = progress
        self.parts = {**parts, 'config': options, 'progress': progress, 'machine': (rt.device.type, str(rt.dtype)[6:])}
        self.first_step = progress.step
        self.resuming = resuming
        self.log = Log(self.out_dir, options, rt, progress, resuming, start_path if parts['adapter'] else None)
        self.signals = [] if self.eval_only else runtime.catch_signals(rt)
        self.writer = Writer(self.out_dir, options.get('keep_last', 0), progress.step if resuming else None)
        self.path = os.path.join(self.out_dir, 'ckpt.pt')
        self.saved = (progress.step, progress.evaluated) if resuming else None   # of the state in ckpt.pt
        self.begun = time.perf_counter() - progress.seconds

    def seconds(self) -> float:
        """Seconds of the whole run until now."""
        return time.perf_counter() - self.begun

    def interrupted(self) -> bool:
        """Whether a signal has come, in any process; each must call this."""
        return self.rt.any_process(bool(self.signals))

    def changed(self) -> bool:
        """Whether the state of the run differs from the saved one."""
        return self.saved != (self.progress.step, self.progress.evaluated)

    def evaluated(self, val_loss: float, **values):
        """Note an evaluation of the weights of this step, and log it with more values of it."""
        run = self.progress
        run.evaluate(val_loss)
        self.log.add(step=run.step, val_loss=val_loss, best_val_loss=run.best_val_loss, **values, tokens=run.tokens,
                     flops=run.flops, seconds=self.seconds())

    def diverged(self, what: str) -> UserError:
        """Return the error for a number that is not finite, once the last good state is written."""
        self.writer.wait()
        state = f'{self.path} holds the last good state' if os.path.exists(self.path) else 'nothing was saved'
        return UserError(f'{what} at step {self.progress.step}: {state}; lower learning_rate, raise warmup_iters, or '
                         f'use dtype=float32, then resume or start again')

    def save(self, **more):
        """Copy the state of the run, with more entries, and write it in the background: ckpt.pt, and best.pt if it is
        the best so far. UserError if a weight is not finite."""
        finite = all(runtime.local_shard(p).isfinite().all() for p in self.parts['model'].parameters())
        ruined = self.rt.any_process(not finite)
        if ruined:
            raise self.diverged('a weight is not finite')
        self.writer.wait()   # the previous state is freed before this one is copied
        self.progress.seconds = self.seconds()
        self.saved = (self.progress.step, self.progress.evaluated)
        state = self.rt.gather_state({**state_of(**self.parts), **more})
        if self.rt.master:
            self.log.start()   # moves an earlier run out of the way
            best = self.progress.evaluated == self.progress.step and self.progress.bad_evals == 0
            self.writer.put(state, best)

    def end(self, last_step: int, interrupted: bool, result: str) -> int:
        """Wait for the last save, draw the losses, say how the run ended: with a result, unless it was interrupted or
        had nothing to do until last_step. Returns the exit status of the script."""
        run = self.progress
        error = self.writer.wait()   # the writer has printed it
        status = 0
        if error:
            status = 1
        elif self.eval_only:
            pass
        elif interrupted and not (run.step >= last_step and run.evaluated == run.step):   # else nothing is missing
            self.rt.notice(f'interrupted at step {run.step:,}, saved in {self.path}: go on with --init_from=resume')
            status = 130
        elif self.first_step >= last_step and self.resuming:
            self.rt.notice(f'nothing to do: the run has made {run.step:,} steps, max_iters={last_step:,}: raise '
                           f'--max_iters to go on')
        else:
            self.rt.notice(f'done at step {run.step:,}: {result}, in {self.out_dir}')
        if self.rt.master and run.evaluated >= 0 and not (self.eval_only or error):
            plots.leave_picture(self.out_dir)   # loss.png
        self.log.close()
        return status


# ---------------------------------------------------------------------------------------------------------------------
# the log

class Log:
    """Where the records of a run go: log.jsonl and, if the options ask for them, Weights & Biases and TensorBoard. It
    does nothing in processes other than the master; with eval_only it writes no file.

    progress: of the run, with its step and its id in Weights & Biases. resuming: whether it goes on.
    base_path: of an adapter, where its base is; a file is kept beside it.
    """

    def __init__(self, out_dir, options: dict, rt: Runtime, progress, resuming: bool, base_path=None):
        self.rt = rt
        self.out_dir = Path(out_dir)
        self.writes = rt.master and not options.get('eval_only')
        self.started = resuming
        self.base_path = base_path
        self.wandb = None
        self.board = None
        if rt.master and options['wandb_log']:
            name = options['wandb_run_name'] or str(out_dir)
            self.wandb = plots.start_wandb(options['wandb_project'], name, dict(options), progress.wandb_id)
            progress.wandb_id = self.wandb.run.id
        if self.writes and resuming:
            rewind_log(out_dir, progress.step)
            if progress.best_val_loss == math.inf:   # the best loss begins anew
                link(self.out_dir / 'best.pt', self.out_dir / f'best-{progress.step}.pt')
        if self.writes and options['tensorboard']:
            self.board = plots.Board(out_dir, progress.step if resuming else None)

    def start(self):
        """Move the files of an earlier run out of the way, before a new run writes for the first time."""
        if not self.started:
            self.started = True
            previous = set_aside(self.out_dir)
            if previous:
                self.rt.notice(f'the run that was in {self.out_dir} is now in {previous}')
            if self.base_path and os.path.isfile(self.base_path):
                link(self.base_path, self.out_dir / 'base.pt')

    def add(self, **record):
        """Add a record, {name: value}, of a step: 'step' or 'iter' has its number."""
        step = record.get('step', record.get('iter'))
        if self.writes:
            self.start()
            append_log(self.out_dir, record)
        if self.wandb:
            self.wandb.log(record, step=step)
        if self.board:
            self.board.show(record, step)

    def close(self):
        """End the run in Weights & Biases."""
        if self.wandb:
            with contextlib.redirect_stdout(sys.stderr):   # its summary is a notice
                self.wandb.finish()


def append_log(out_dir, record: dict):
    """Add a record to log.jsonl; numbers that are not finite become null. A full disk costs the line, not the run."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    path = Path(out_dir) / 'log.jsonl'
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, 'ab') as f:
            f.write(json.dumps(plain).encode() + b'\n')
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)   # half a line would spoil the next one
        print(f'cannot write to {path}: {error.strerror}', file=sys.stderr)


def rewind_log(out_dir, step: int):
    """Remove from log.jsonl what a run wrote after the checkpoint of a step, because it will be written again: losses
    of this step and later ones, evaluations of later ones, and a line that was cut off. UserError if that fails."""
    path = Path(out_dir) / 'log.jsonl'
    if not path.exists():
        return
    valid = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, AttributeError, TypeError):   # what a power cut left
            record = json.loads(line)
            if record.get('iter', -1) < step and record.get('step', -1) <= step and line.endswith(b'\n'):
                valid.append(line)
    try:
        write_atomically(path, b''.join(valid))
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}; it is as it was, make room') from None
