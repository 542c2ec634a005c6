"""
The errors that a user can correct, how a script shows them (one line on stderr and an exit status), and its end.
"""

import contextlib
import difflib
import os
import sys


class UserError(Exception):
    """The work cannot go on, and the user can do something about it: the message says what. Exit status 1."""
    status = 1


class UsageError(UserError):
    """An option has a wrong name or value, or options exclude each other. Exit status 2."""
    status = 2


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters, or its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def do_you_mean(name: str, names) -> str:
    """'; do you mean X?' with the nearest of some names, '' if none is near: the end of an error's message."""
    near = difflib.get_close_matches(name, names, n=1)
    return f'; do you mean {near[0]}?' if near else ''


def nothing_at(path: str | os.PathLike) -> str:
    """'there is no X' for a path that does not exist, with the nearest name in its folder: an error's message."""
    return f'there is no {path}{nearest_to(path)}'


def nearest_to(path: str | os.PathLike) -> str:
    """'; do you mean X?' with the nearest name in the folder of a path, '' if none is near or the path exists."""
    if os.path.exists(path):
        return ''
    folder, name = os.path.split(os.path.normpath(path))
    names = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
    near = difflib.get_close_matches(name, names, n=1)
    return f'; do you mean {os.path.join(folder, near[0])}?' if near else ''


def refuse_pointer(path: str | os.PathLike, start: bytes):
    """Raise UserError if a file with these first bytes is a pointer of Git LFS, which a clone without it has instead of
    a large file."""
    if start.startswith(b'version https://git-lfs'):
        raise UserError(f'cannot read {path}: it is a pointer of Git LFS: run `git lfs pull` in its folder')


def on_interrupt(number, frame):
    """Raise KeyboardInterrupt, as Python does at Ctrl-C; while something is imported, end at once, because libraries
    lose the exception there. The handler of SIGINT until a script sets another."""
    while frame:
        if 'importlib' in frame.f_code.co_filename:
            print(f'{os.path.basename(sys.argv[0])}: interrupted', file=sys.__stderr__, flush=True)
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def show_error(error_type, error, trace, to_lower=()):
    """Print an error that the user can correct as one line and exit with its status; sys.excepthook of a script.
    Any other error keeps its traceback. to_lower: options to lower when memory runs out."""
    line = str(error)
    status = 1
    if issubclass(error_type, UserError):
        status = error.status
    elif issubclass(error_type, KeyboardInterrupt) or 'KeyboardInterrupt' in line:   # which C++ hides in its own errors
        line = 'interrupted'
        status = 130
    elif issubclass(error_type, UnicodeEncodeError) and 'surrogates' in line:   # a library that needs text
        line = f'a name that is invalid UTF-8: {error.object!r:.200}; rename it, or set PYTHONUTF8=1'
    elif issubclass(error_type, BrokenPipeError):   # the reader of our stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    elif error_type.__name__ in ('OutOfMemoryError', 'MemoryError') or "can't allocate memory" in line:
        line = 'out of memory' + (f': lower {" or ".join(to_lower)}' if to_lower else '')
    else:
        return sys.__excepthook__(error_type, error, trace)
    # __stderr__: past the hook of torch.distributed, which collects what is printed until a normal return
    print(os.path.basename(sys.argv[0]), ' '.join(line.splitlines()), sep=': ', file=sys.__stderr__)
    raise SystemExit(status)


exit_callbacks = []   # functions that finish work in the background, such as writing a checkpoint


def exit_now(status: int):
    """End this process after exit_callbacks, without waiting for other threads: torch's pools never end."""
    for finish in list(exit_callbacks):
        finish()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):   # closed by its reader
            stream.flush()
    os._exit(status)
