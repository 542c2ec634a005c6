"""
Options of a script, from the assignments at its top, config files and the command line, in this order:

    learning_rate = 6e-4          # peak learning rate
    config = configure(globals())

    python train.py config/x.py --learning_rate=1e-3 --compile

A config file is Python and is executed. An option has the type of its default, or the types of its annotation
(`top_k: int | None = None`). An error of the user ends in one line on stderr.
"""

import ast
import contextlib
import difflib
import functools
import os
import re
import symtable
import sys
import traceback
import typing
from pathlib import Path
from types import NoneType

from flatgpt.errors import UsageError, UserError

# name, annotation and comment of an option: `top_k: int | None = None   # sample among the k most likely tokens`
OPTION = re.compile(r'([a-z][a-z0-9_]*)(?:\s*:([^=]+))?\s*=(?!=).*?(?:  # (.*))?', re.ASCII)
BOOLS = {'true': True, 'false': False}
PARSERS = {NoneType: {'None': None}.__getitem__, bool: lambda text: BOOLS[text.lower()],
           int: int, float: float, str: str}
TYPE_NAMES = {NoneType: 'None', bool: 'True or False', int: 'an integer', float: 'a number', str: 'a string'}
# nanoGPT's options that are not needed here: name -> (what False sets instead, what to tell the user)
RETIRED = {
    'always_save_checkpoint': ({}, 'ckpt.pt is always the latest state and best.pt the best one'),
    'backend': ({}, 'it follows from the device'),
    'decay_lr': ({'schedule': 'constant', 'warmup_iters': 0}, "False is schedule='constant' with warmup_iters=0"),
    'real_data': ({}, 'bench.py measures on random ids, or on those of --dataset=NAME'),
}


class Config(dict):
    """The options of a script: {name: value}. `given` has the names that a config file or the command line has set,
    `types` the types that each option may have."""

    def __init__(self, namespace: dict, types: dict[str, tuple]):
        super().__init__((name, namespace[name]) for name in types)
        self.namespace = namespace
        self.types = types
        self.given = set()

    def put(self, name: str, value, where: str):
        """Set an option, here and in the globals of the script; an int becomes a float where a float is expected.
        Raises UsageError for another type. where: a config file or another source of the value, for messages."""
        types = self.types[name]
        if type(value) is int and float in types and int not in types:
            value = float(value)
        if type(value) not in types:
            raise UsageError(f'{where}: {name}={value!r:.100}: {expected(types)}')
        self[name] = self.namespace[name] = value

    def give(self, name: str, value, where: str):
        """Set an option as the user asks for; for a retired one, print a line and set what replaces it, if anything."""
        if name in self:
            self.put(name, value, where)
            self.given.add(name)
            return
        instead, advice = RETIRED[name]
        if value is False:
            for other in instead.keys() & self.keys():
                self.give(other, instead[other], where)
        print(f'{where}: {name} is not needed: {advice}', file=sys.stderr)

    def adopt(self, values: dict, but=()):
        """Set the options that the user has not given to their values in a checkpoint's config, except those in but."""
        for name in self.keys() & values.keys() - self.given - set(but):
            self.put(name, values[name], 'checkpoint')


def configure(namespace: dict, argv: list[str] | None = None) -> Config:
    """Apply config files and --key=val arguments, in their order, to the options of the script that has these
    globals(), and return all options. Prints them and exits for --help. Raises UsageError."""
    to_lower = [name for name in ('batch_size', 'block_size') if name in namespace]
    sys.excepthook = functools.partial(show_error, to_lower=to_lower)
    script = Path(namespace['__file__'])
    config = Config(namespace, {name: types_of(annotation, namespace[name])
                                for name, annotation, *_ in read_options(script)})
    words = list(sys.argv[1:] if argv is None else argv)
    if '--help' in words or '-h' in words:
        print(help_text(script, config))
        raise SystemExit(0)
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            apply_file(word, config, script)
            continue
        name, equals, text = word[2:].partition('=')
        if name not in config and name not in RETIRED:
            raise UsageError(unknown_option(name, config, script))
        types = config.types.get(name, (str, bool))
        if not equals:
            text = next_value(name, types, words)
        config.give(name, parse(name, text, types), 'command line')
    return config


def next_value(name, types, words):
    """Take the value of a --key without '=' from words: the next word, or 'True' for a flag that stands alone."""
    word = words[0] if words and not words[0].startswith('--') else None
    if bool in types:
        alone = word is None or word.endswith('.py')
        if alone or (str not in types and word.lower() not in BOOLS):
            return 'True'
    if word is None:
        raise UsageError(f'--{name} needs a value: {expected(types)}')
    return words.pop(0)


def apply_file(path, config, script):
    """Execute a config file, which sees the present values, and take over the options that it sets."""
    try:
        source = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        near = os.path.join(script.parent, path)
        hint = f'do you mean {near}?' if os.path.isfile(near) else 'expected a Python file or --key=val'
        raise UsageError(f'config file {path!r}: {reason}; {hint}') from None
    if b'configure(globals())' in source:
        raise UsageError(f'{path} is a script, expected a config file such as config/train_shakespeare_char.py')
    scope = {**config, '__name__': '__config__', '__file__': os.path.abspath(path)}
    try:
        symbols = symtable.symtable(source, path, 'exec').get_symbols()
        exec(compile(source, path, 'exec'), scope)
    except Exception as error:   # anything that the code of a user may raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(error, 'lineno', '?')
        raise UsageError(f'{path}, line {line}: {type(error).__name__}: {getattr(error, "msg", error)}') from None
    assigned = {symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_namespace()}
    ignored = []
    for name, value in scope.items():
        changed = name in config and value is not config[name]   # also by an import
        if name.startswith('_') or (name not in assigned and not changed):
            continue   # its private names, imports and functions
        if name in config or name in RETIRED:
            config.give(name, value, path)
        elif owner(name, script):
            ignored.append(name)
        else:
            raise UsageError(f'{path}: {unknown_option(name, config, script)}; '
                             f'names of its own must begin with an underscore')
    if ignored:
        print(f'{path}: not options of {script.name}, ignored: {", ".join(ignored)}', file=sys.stderr)


def types_of(annotation: str, default) -> tuple:
    """The types of an option: those of its annotation ('int | None'), or if that is empty, the type of its default."""
    hint = eval(annotation) if annotation else type(default)
    return typing.get_args(hint) or (hint,)


def parse(name, text, types):
    """The value of an option, of one of its types, from its text on the command line. Raises UsageError."""
    for each in [*PARSERS, *types]:   # a string last, which may be anything
        with contextlib.suppress(Exception):
            value = PARSERS.get(each, ast.literal_eval)(text)   # a list or a tuple is a literal
            if each in types and type(value) is each:
                return value
    raise UsageError(f'--{name}={text!r:.100}: {expected(types)}')


def expected(types):
    """'expected an integer or None', for an error."""
    return 'expected ' + ' or '.join(TYPE_NAMES.get(each, f'a {each.__name__}') for each in types)


def unknown_option(name, config, script):
    """The error for an option that the script does not have."""
    other = owner(name, script)
    near = difflib.get_close_matches(name, config, n=1, cutoff=0)
    hint = f'an option of {other}' if other else f'the nearest is {near[0]!r}' if near else 'the script has none'
    return f'unknown option {name!r:.100}, {hint}'


def owner(name, script):
    """The file name of another script beside this file that has an option of this name, or None."""
    for path in sorted(Path(__file__).parent.glob('[a-z]*.py')):
        if path != script and name in [option for option, *_ in read_options(path)]:
            return path.name


def read_options(script: str | os.PathLike) -> list[tuple]:
    """[(name, annotation, comment, line number)] of a script's options: its assignments to lower-case names above
    configure(globals()). Empty for a file that does not call it."""
    options = []
    for number, line in enumerate(Path(script).read_text(encoding='utf-8', errors='replace').splitlines(), 1):
        if re.match(r'(\w+ = )?configure\(globals\(\)\)', line):
            return options
        if option := OPTION.fullmatch(line):
            options.append((*(group or '' for group in option.groups()), number))
    return []


def help_text(script, config):
    """The script's docstring and its options, each with its present default and its comment, under their headings."""
    text = script.read_text(encoding='utf-8')
    options = {number: (name, comment) for name, _, comment, number in read_options(script)}
    out = [ast.get_docstring(ast.parse(text)) or '', '', 'Options: --key=val; a Python file sets several at once.']
    for number, line in enumerate(text.splitlines(), 1):
        if number in options:
            name, comment = options[number]
            out.append(f'  --{name}={config[name]!r}'.ljust(38) + f'  {comment}')
        elif line.startswith('#') and line.strip('# -') and min(options, default=0) < number < max(options, default=0):
            out.append('\n' + line.lstrip('# '))   # the heading of a group
    return '\n'.join(out)


def show_error(error_type, error, trace, to_lower=()):
    """Print an error that the user can correct as one line and exit with its status; sys.excepthook of a script.
    to_lower: options to lower when memory runs out."""
    line = str(error)
    status = 1
    if issubclass(error_type, UserError):
        status = error.status
    elif issubclass(error_type, KeyboardInterrupt):
        line = 'interrupted'
        status = 130
    elif issubclass(error_type, BrokenPipeError):   # the reader of our stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    elif error_type.__name__ in ('OutOfMemoryError', 'MemoryError') or "can't allocate memory" in line:
        line = 'out of memory' + (f': lower {" or ".join(to_lower)}' if to_lower else '')
    else:
        return sys.__excepthook__(error_type, error, trace)
    # __stderr__: past the hook of torch.distributed, which collects what is printed until a normal return
    print(Path(sys.argv[0]).name, ' '.join(line.splitlines()), sep=': ', file=sys.__stderr__)
    raise SystemExit(status)
