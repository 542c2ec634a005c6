"""
Options for a script that states them as plain assignments at its top, from config files and the command line:

    learning_rate = 6e-4          # peak learning rate
    config = configure(globals())

    python train.py config/x.py --learning_rate=1e-3 --compile

A config file is Python and is executed. An option takes the type of its default, or the types of its annotation
(`top_k: int | None = None`). Whatever a person gets wrong ends in one line on stderr.
"""

import ast
import difflib
import io
import os
import sys
import tokenize
import traceback
import types
from pathlib import Path


class UserError(Exception):
    """Something that the person at the keyboard can mend. Scripts show it as one line and exit with its status."""
    status = 1


class UsageError(UserError):
    """A wrong option or value, or options that do not go together."""
    status = 2


class Config(dict):
    """The options of a script, by name. `given` holds the names that a config file or the command line has set."""

    def __init__(self, namespace, kinds):
        super().__init__((name, namespace[name]) for name in kinds)
        self.namespace, self.kinds, self.given = namespace, kinds, set()

    def put(self, name, value):
        """Set an option, here and in the script."""
        self[name] = self.namespace[name] = value

    def adopt(self, values, but=()):
        """Set the options that nobody has given, and that are not among `but`, to their values in a dictionary."""
        for name in self.keys() & values.keys() - self.given - set(but):
            self.put(name, check(name, values[name], self.kinds[name], 'checkpoint'))


# What nanoGPT has as an option and ours derives: name -> (what False sets in its place, what to say)
RETIRED = {
    'always_save_checkpoint': ({}, 'ckpt.pt is always the latest state and best.pt the best one'),
    'backend': ({}, 'it follows from the device'),
    'decay_lr': ({'schedule': 'constant', 'warmup_iters': 0}, "False is schedule='constant' with warmup_iters=0"),
    'real_data': ({}, 'bench.py measures on random ids, or on those of --dataset=NAME'),
}


def configure(namespace, argv=None):
    """Apply the config files and --key=val arguments of the command line, in their order, to the options of the script
    whose globals() these are. Returns them all as a Config; raises UsageError; --help prints the options and exits."""
    sys.excepthook = show_error
    script = Path(namespace['__file__'])
    kinds = {name: kinds_of(annotation, namespace[name]) for name, annotation, _ in read_options(script)}
    config = Config(namespace, kinds)
    words = list(sys.argv[1:] if argv is None else argv)
    if '--help' in words or '-h' in words:
        print(help_text(script, config))
        raise SystemExit(0)
    while words:
        word = words.pop(0)
        if not word.startswith('--'):
            apply_file(word, config, kinds, script)
            continue
        name, equals, text = word[2:].partition('=')
        old = name in RETIRED and name not in kinds
        if name not in kinds and not old:
            raise UsageError(unknown(name, kinds, owner(name, script)))
        takes = kinds.get(name, (str, bool))
        value = parse(name, text if equals else next_value(name, takes, words), takes)
        if old:
            replace_retired(name, value, config, 'command line')
        else:
            config.put(name, value)
            config.given.add(name)
    return config


def next_value(name, kinds, words):
    """The value of a --key without '=': the next word, or True for a bool that the next word says nothing of."""
    word = words[0] if words and not words[0].startswith('--') else None
    if bool in kinds and (word is None or word.endswith('.py') or str not in kinds and word.lower() not in BOOLS):
        return 'True'
    if word is None:
        raise UsageError(f'--{name} needs a value: {expected(kinds)}')
    return words.pop(0)


def apply_file(path, config, kinds, script):
    """Execute a config file, which sees the present values, and take over what it sets."""
    try:
        source = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        near = os.path.join(script.parent, path)
        there = '\0' not in path and os.path.isfile(near)
        hint = f'do you mean {near}?' if there else 'expected a Python file or --key=val'
        raise UsageError(f'config file {path!r}: {reason}; {hint}') from None
    if b'configure(globals())' in source:
        raise UsageError(f'{path} is a script, expected a config file such as config/train_shakespeare_char.py')
    scope = {**config, '__name__': '__config__', '__file__': os.path.abspath(path)}
    try:
        tree = ast.parse(source)
        stored = set(names_stored(tree))
        exec(compile(tree, path, 'exec'), scope)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:   # whatever a file may raise
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = own[-1] if own else getattr(error, 'lineno', None) or '?'
        reason = shown(getattr(error, 'msg', error), str)
        raise UsageError(f'{path}, line {line}: {type(error).__name__}: {reason}') from None
    passed_over = []
    for name, value in scope.items():
        if name in kinds:
            if name in stored or value is not config[name]:   # as after `from math import pi as learning_rate`
                config.put(name, check(name, value, kinds[name], path))
                config.given.add(name)
        elif name not in stored or name.startswith('_'):
            continue   # its imports, functions and private names
        elif name in RETIRED:
            replace_retired(name, value, config, path)
        elif owner(name, script):
            passed_over.append(name)
        else:
            raise UsageError(f'{path}: {unknown(name, kinds)}; names of its own must begin with an underscore')
    if passed_over:
        print(f'{path}: not for {script.name}, passed over: {", ".join(passed_over)}', file=sys.stderr)


def names_stored(node):
    """The names that a tree assigns to in its own scope, not in those of its functions, classes and comprehensions."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda,
             ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, inner):
            yield from names_stored(child)


# ---------------------------------------------------------------------------------------------------------------------
# values and their types

BOOLS = {'true': True, 'false': False}


def kinds_of(annotation, default):
    """The types that an option takes: those of its annotation ('int | None'), else that of its default."""
    if annotation is None:
        return (type(default),)
    hint = eval(annotation, {})
    return tuple(getattr(hint, '__args__', (hint,)))


def check(name, value, kinds, where):
    """A value from a config file, an int made a float where one is expected; UsageError when the type is wrong."""
    if type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        try:
            return float(value)
        except OverflowError:
            pass
    raise UsageError(f'{where}: {name}={shown(value)}: {expected(kinds)}')


def parse(name, text, kinds):
    """A value from the command line."""
    if types.NoneType in kinds and text == 'None':
        return None
    if bool in kinds and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    for kind in (int, float, str):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                pass
    if not {bool, int, float, str} & set(kinds):   # a list, a tuple, a dict
        try:
            return check(name, ast.literal_eval(text), kinds, 'command line')
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            pass
    raise UsageError(f'--{name}={shown(text)}: {expected(kinds)}')


def expected(kinds):
    words = {int: 'an integer', float: 'a number', str: 'a text', bool: 'True or False', types.NoneType: 'None'}
    return 'expected ' + ' or '.join(words.get(kind, f'a {kind.__name__}') for kind in kinds)


def shown(value, as_text=repr):
    """A value in a few words on one line, whatever it is."""
    try:
        text = ' '.join(as_text(value).split())
    except Exception:   # an integer of too many digits, a config file's own class
        text = f'a {type(value).__name__}'
    return text if len(text) <= 100 else text[:97] + '...'


def unknown(name, kinds, owner=None):
    near = max(kinds, key=lambda known: difflib.SequenceMatcher(None, known, name).ratio(), default=None)
    return f'unknown option {shown(name)}' + (f', an option of {owner}' if owner else f', the nearest is {near!r}')


def replace_retired(name, value, config, where):
    """Set what stands in the place of a retired option, if anything does, and say so."""
    instead, advice = RETIRED[name]
    for other in instead.keys() & config.keys() if value is False else ():
        config.put(other, instead[other])
        config.given.add(other)
    print(f'{where}: {name} is not needed: {advice}', file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# the option block of a script, and its errors

def read_options(script):
    """[(name, annotation or None, line number)] of the options of a script: its assignments before configure(globals())
    to names in lower case without a leading underscore; none for a file that does not call it."""
    options = []
    for node in ast.parse(Path(script).read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.Assign, ast.Expr)) and ast.unparse(node.value) == 'configure(globals())':
            return options
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, 'target', None)
        if isinstance(target, ast.Name) and target.id.islower() and not target.id.startswith('_'):
            annotation = getattr(node, 'annotation', None)
            options.append((target.id, annotation and ast.unparse(annotation), node.lineno))
    return []


def owner(name, script):
    """The name of another script, beside this file, that has the option; None if none has."""
    for path in sorted(Path(__file__).parent.glob('*.py')):
        try:
            if path != script and name in [option for option, *_ in read_options(path)]:
                return path.name
        except (OSError, SyntaxError, ValueError):   # somebody's work in progress is no script yet
            pass
    return None


def help_text(script, config):
    """The script's docstring and its option block, each option with its present default and its comment."""
    text = script.read_text(encoding='utf-8')
    comments = {token.start[0]: token for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT}
    options = {line: name for name, _, line in read_options(script)}
    out = [ast.get_docstring(ast.parse(text)) or '', '', 'Options: --key=val; a Python file sets several at once.']
    for line in range(min(options, default=0), max(options, default=-1) + 1):
        comment = comments[line].string.lstrip('# ') if line in comments else ''
        if line in options:
            out.append(f'  --{options[line]}={config[options[line]]!r}'.ljust(38) + f'  {comment}')
        elif comment.strip('- '):
            out.append(f'\n{comment}')   # the heading of a group
    return '\n'.join(out)


def show_error(kind, error, trace):
    """sys.excepthook of a script: one line and the right exit status for what a person can mend or has asked for."""
    script = Path(sys.argv[0]).name
    if issubclass(kind, UserError):
        status, line = error.status, f'{script}: {error}'
    elif issubclass(kind, KeyboardInterrupt):
        status, line = 130, f'{script}: interrupted'
    elif issubclass(kind, BrokenPipeError):   # whoever read our stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, line = 0, ''
    elif kind.__name__ in ('OutOfMemoryError', 'MemoryError') or "can't allocate memory" in str(error):
        status, line = 1, f'{script}: out of memory: lower batch_size or block_size'
    else:
        return sys.__excepthook__(kind, error, trace)
    if line:   # past the hook of torch.distributed, which collects what is printed and shows it only on a normal return
        print(' '.join(line.splitlines()), file=sys.__stderr__)
    raise SystemExit(status)
