"""
Options of a script, from the assignments at its top, config files and the command line, in this order:

    learning_rate = 6e-4          # peak learning rate
    top_k: int | None = None      # its types, if they are not that of the default
    config = configure(globals())

    python train.py config/x.py --learning_rate=1e-3 --compile

A config file is Python and is executed.
"""

import ast
import contextlib
import difflib
import functools
import os
import re
import signal
import symtable
import sys
from pathlib import Path
from types import NoneType

from flatgpt.errors import UsageError, on_interrupt, show_error

# name, annotation and comment of an option: `top_k: int | None = None   # sample among the k most likely tokens`
OPTION = re.compile(r'([a-z][a-z0-9_]*)(?:\s*:([^=]+))?\s*=(?!=).*?(?:  # (.*))?', re.ASCII)
# options that hold a text; in all others that are strings, a leading ~/ is the home folder
TEXTS = {'start', 'stop', 'separator', 'delimiter', 'system', 'template', 'inspect', 'special', 'versus'}
BOOLS = {'true': True, 'false': False}
PARSERS = {NoneType: {'None': None}.__getitem__, bool: lambda text: BOOLS[text.lower()],
           int: lambda text: float(text) if 'e' in text else int(text), float: float, str: str}   # 1e3 is whole
TYPE_NAMES = {NoneType: 'None', bool: 'True or False', int: 'an integer', float: 'a number', str: 'a string'}
RETIRED = {   # nanoGPT's options that are not needed here
    'always_save_checkpoint': 'ckpt.pt is always the latest state and best.pt the best one',
    'backend': 'it follows from the device',
    'decay_lr': "False is schedule='constant' with warmup_iters=0",
    'real_data': 'bench.py measures on random ids, or on those of --dataset=NAME',
}


class Config(dict):
    """The options of a script: {name: value}. `given` has the names that a config file or the command line has set,
    `types` the types that each option may have."""

    def __init__(self, namespace: dict):
        self.namespace = namespace
        self.script = Path(namespace['__file__'])
        self.given = set()
        self.types = {}
        for name, annotation, *_ in read_options(self.script):
            hint = eval(annotation) if annotation else type(namespace[name])
            self.types[name] = getattr(hint, '__args__', (hint,))
            self[name] = namespace[name]

    def put(self, name: str, value, source: str):
        """Set an option that the user gives, here and in the globals of the script; an int becomes a float where a
        float is expected, a whole float an int, ~/ the home folder. Of a retired option, print what replaces it.
        Raises UsageError for another type. source: where the value comes from, for messages."""
        if name not in self:
            print(f'{source}: {name} is not needed: {RETIRED[name]}', file=sys.stderr)
            if name == 'decay_lr' and value is False and 'schedule' in self:
                self.put('schedule', 'constant', source)
                self.put('warmup_iters', 0, source)
            return
        types = self.types[name]
        if type(value) is int and float in types and int not in types:
            value = float(value)
        if type(value) is float and int in types and value.is_integer():
            value = int(value)
        if type(value) is str and (name not in TEXTS or value.startswith('FILE:')):   # a path, or some with commas
            value = re.sub('(^|,|^FILE:|^auto:)~(?=[/,]|$)', lambda found: found[1] + os.path.expanduser('~'), value)
        if type(value) not in types:
            raise UsageError(f'{source}: {name}={value!r:.100}: {expected(types)}')
        self[name] = self.namespace[name] = value
        self.given.add(name)

    def adopt(self, values: dict, but=()):
        """Set the options that the user has not given to their values in a checkpoint's config, except those in but."""
        names = self.keys() & values.keys() - self.given - set(but)
        for name in names:
            self.put(name, values[name], 'checkpoint')
        self.given -= names


def configure(namespace: dict, argv: list[str] | None = None) -> Config:
    """Apply config files and --key=val arguments, in their order, to the options of the script that has these
    globals(), and return all options. Prints them and exits for --help. Raises UsageError.

    Side effects: errors of the user and Ctrl-C end in one line (sys.excepthook, SIGINT). What a stream cannot show, and
    typed bytes that are invalid UTF-8, are escaped, as in \\u4f60.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:   # not in the background of a shell
        signal.signal(signal.SIGINT, on_interrupt)
    sys.excepthook = functools.partial(show_error, to_lower=[n for n in ('batch_size', 'block_size') if n in namespace])
    config = Config(namespace)
    words = list(sys.argv[1:] if argv is None else argv)
    asks = {'--help', '-h'}
    try:
        apply_words([word for word in words if word not in asks], config)
    except UsageError:
        if not asks & {*words}:
            raise
    if asks & {*words}:
        print(help_text(config))
        raise SystemExit(0)
    return config


def apply_words(words, config):
    """Apply the arguments of a command line."""
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            apply_file(word, config)
            continue
        name, equals, text = word[2:].partition('=')
        if name not in config and name not in RETIRED:
            raise UsageError(unknown_option(name, config))
        types = config.types.get(name, (str, bool))
        if not equals:   # its value is the next word, or True for a flag that stands alone
            alone = not words or words[0].startswith('--') or (bool in types and words[0].endswith('.py'))
            if alone and bool not in types:
                raise UsageError(f'--{name} needs a value: {expected(types)}')
            text = 'True' if alone else words.pop(0)
        if name in TEXTS:
            text = readable(name, text)
        config.put(name, parse(name, text, types), 'command line')


def readable(name, text):
    """A text from the command line without bytes that are invalid UTF-8; a shell hands over \\n as two characters."""
    text = text.encode(errors='surrogateescape').decode(errors='backslashreplace')
    json_list = name == 'stop' and text.startswith('[')   # which has its own escapes
    if name in ('stop', 'separator', 'delimiter') and not json_list:
        return text.replace('\\n', '\n').replace('\\t', '\t').replace('\\r', '\r')
    if name in ('start', 'system') and '\\n' in text:
        or_file = ' or --start=FILE:prompt.txt' if name == 'start' else ''
        print(rf"--{name} has a backslash and an n; for a line break give --{name}=$'a\nb'{or_file}", file=sys.stderr)
    return text


def apply_file(path, config):
    """Execute a config file, which sees the present values, and set the options that it assigns."""
    try:
        source = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UsageError(f'config file {path!r}: {reason}; {guess(path, config)}') from None
    if not path.endswith('.py'):
        raise UsageError(f'{path!r} is not a Python file; {guess(path, config)}')
    if b'configure(globals())' in source:
        raise UsageError(f'{path} is a script, expected a config file such as config/train_shakespeare_char.py')
    scope = {**config, '__name__': '__config__', '__file__': os.path.abspath(path)}
    try:
        symbols = symtable.symtable(source, path, 'exec').get_symbols()
        exec(compile(source, path, 'exec'), scope)
    except Exception as error:   # anything that the code of a user may raise
        line = error.lineno if isinstance(error, SyntaxError) else error.__traceback__.tb_next.tb_lineno
        raise UsageError(f'{path}, line {line}: {type(error).__name__}: {getattr(error, "msg", error)}') from None
    assigned = {symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_namespace()}
    assigned |= {name for name in config if scope.get(name) is not config[name]}   # by an import, or in a function
    ignored = []
    for name in [name for name in scope if name in assigned and not name.startswith('_')]:
        if name in config or name in RETIRED:
            config.put(name, scope[name], path)
        elif owner(name, config.script):
            ignored.append(name)
        else:
            raise UsageError(f'{path}: {unknown_option(name, config)}; names of its own must begin with an underscore')
    if ignored:
        print(f'{path}: not options of {config.script.name}, ignored: {", ".join(ignored)}', file=sys.stderr)


def guess(word, config):
    """What a user may mean by an argument that is not a config file: 'do you mean ...?'"""
    option = word.lstrip('-\u2013\u2014')   # dashes, as word processors write them
    if '=' in option and option.partition('=')[0] in config:
        return f'do you mean --{option}?'
    operands = [name for name in ('out_dir', 'runs', 'input') if name in config]
    if os.path.exists(word) and not word.endswith('.py') and operands:
        return f'do you mean --{operands[0]}={word}?'
    recipes = {path.stem: path for path in Path(__file__).parent.glob('config/*.py')}
    near = difflib.get_close_matches(Path(word).stem, recipes, n=1)
    path = config.script.parent / word   # given from another folder
    if near and not os.path.isfile(path):
        path = recipes[near[0]]
    if os.path.isfile(path):
        return f'do you mean {min(str(path), os.path.relpath(path), key=len)}?'
    return 'expected a Python file or --key=val'


def parse(name, text, types):
    """The value of an option, of one of its types, from its text on the command line. Raises UsageError."""
    for each in [*PARSERS, *types]:   # a string last, which may be anything
        with contextlib.suppress(Exception):
            value = PARSERS.get(each, ast.literal_eval)(text)   # a list or a tuple is a literal
            if each in types:
                return value
    raise UsageError(f'--{name}={text!r:.100}: {expected(types)}')


def expected(types):
    """'expected an integer or None', for an error."""
    return 'expected ' + ' or '.join(TYPE_NAMES.get(each, f'a {each.__name__}') for each in types)


def unknown_option(name, config):
    """The error for an option that the script does not have."""
    other = owner(name, config.script)
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
    text = Path(script).read_text(encoding='utf-8', errors='replace')
    above, *below = re.split(r'^(?:\w+ = )?configure\(globals\(\)\)', text, maxsplit=1, flags=re.MULTILINE)
    found = [(OPTION.fullmatch(line), number) for number, line in enumerate(above.splitlines(), 1)]
    return [(*option.groups(''), number) for option, number in found if option and below]


def help_text(config):
    """The script's docstring and its options, each with its present value and its comment, under their headings."""
    options = {number: (name, comment) for name, _, comment, number in read_options(config.script)}
    docstring = config.namespace.get('__doc__') or ''
    out = [docstring.strip(), '', 'Options: --key=val; a Python file sets several at once.']
    for number, line in enumerate(config.script.read_text(encoding='utf-8').splitlines(), 1):
        if number in options:
            name, comment = options[number]
            out.append(f'  --{name}={config[name]!r}'.ljust(38) + f'  {comment}')
        elif re.match('# *[^- ]', line) and min(options, default=0) < number < max(options, default=0):
            out.append('\n' + line.lstrip('# '))   # the heading of a group
    return '\n'.join(out)
