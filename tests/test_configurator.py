"""Options from config files and the command line: each value that is set is read back, each error is one line."""

import copy
import functools
import importlib.util
import io
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_one_line, run
from hypothesis import example, given
from hypothesis import strategies as st
from in_process import call as call_script
from in_process import defaults_of
from properties import quick
from test_repo import RUNNABLE

import configurator
from configurator import Config, configure, read_options
from flatgpt.errors import UsageError, UserError

DOC = '''
What the script is for.

    python options.py --count=4
'''
SCRIPT = f'"""{DOC}"""' + '''
from configurator import configure
from flatgpt.errors import UsageError, UserError

# a heading
count = 3                        # how many there are
rate = 0.5                       # how fast, a number with a # in its comment
flag = False                     # whether or not
text = 'a # in it'               # what it says

# -----
# another heading
maybe_count: int | None = None   # None takes them all
maybe_rate: float | None = 0.1
maybe_text: str | None = None    # None says nothing
choice: str | bool = 'auto'      # True, False, or a word
sizes = [1, 2]                   # of the parts
_hidden = 1
config = configure(globals())

derived = count * 2
'''
DEFAULTS = {'count': 3, 'rate': 0.5, 'flag': False, 'text': 'a # in it', 'maybe_count': None, 'maybe_rate': 0.1,
            'maybe_text': None, 'choice': 'auto', 'sizes': [1, 2]}

any_text = st.text(st.characters(exclude_characters='~'))   # NUL and lone surrogates too; ~ is the home folder
plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                     | any_text, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner), max_leaves=5)
VALUES = {'count': st.integers(), 'rate': st.floats(), 'flag': st.booleans(), 'text': any_text,
          'maybe_count': st.none() | st.integers(), 'maybe_rate': st.none() | st.floats(),
          'maybe_text': st.none() | any_text, 'choice': st.booleans() | any_text, 'sizes': st.lists(plain, max_size=4)}
assignments = st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name]))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with options.py, a script of ours that has options of every type."""
    folder = tmp_path_factory.mktemp('configurator')
    (folder / 'options.py').write_text(SCRIPT)
    return folder


@pytest.fixture(autouse=True, scope='module')
def same_hooks():
    hook, handler = sys.excepthook, signal.getsignal(signal.SIGINT)
    yield
    sys.excepthook = hook
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(autouse=True, scope='module')
def quick_owner():
    """All scripts are parsed for each unknown name: here once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configurator, 'read_options', functools.cache(configurator.read_options))
        yield


def call(folder, *argv):
    """configure() as options.py would call it: (the Config, the script's globals)."""
    namespace = {'__file__': str(folder / 'options.py'), '__doc__': DOC, **copy.deepcopy(DEFAULTS)}
    return configure(namespace, list(argv)), namespace


def write(folder, content, name='config.py'):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def literal(value):
    """Python source of a value, in ASCII."""
    return f'float({str(value)!r})' if isinstance(value, float) else ascii(value)


def same(a, b):
    """Equal and of the same type all the way down; nan is nan, and -0.0 is not 0.0."""
    return type(a) is type(b) and repr(a) == repr(b)


def refusal(folder, *argv):
    """The one line with which the arguments are refused."""
    with pytest.raises(UsageError) as error:
        call(folder, *argv)
    assert str(error.value)
    return ' '.join(str(error.value).splitlines())   # as show_error prints it


# ---------------------------------------------------------------------------------------------------------------------
# what is set comes back

@quick
@given(assignments)
def test_any_value_set_by_a_config_file_comes_back(folder, assignment):
    name, value = assignment
    config, namespace = call(folder, write(folder, f'{name} = {literal(value)}\n'))
    assert same(config[name], value) and same(namespace[name], value)
    assert config.given == {name}
    assert all(same(config[other], DEFAULTS[other]) for other in DEFAULTS if other != name)


def sayable(assignment):
    """Whether a value can be told from others on a command line: None and True are no texts there."""
    name, value = assignment
    if type(value) is str:
        return not (name == 'maybe_text' and value == 'None' or name == 'choice' and value.lower() in ('true', 'false'))
    return True


@quick
@given(assignments.filter(sayable))
def test_any_value_set_by_key_equals_value_comes_back(folder, assignment):
    name, value = assignment
    config, namespace = call(folder, f'--{name}={value}')
    assert same(config[name], value) and same(namespace[name], value)
    assert config.given == {name}
    assert all(same(config[other], DEFAULTS[other]) for other in DEFAULTS if other != name)


@quick
@given(assignments.filter(sayable).filter(lambda pair: not str(pair[1]).startswith(('--', '-h'))
                                          and not (pair[0] == 'choice' and str(pair[1]).endswith('.py'))))
def test_any_value_set_by_key_and_next_word_comes_back(folder, assignment):
    name, value = assignment
    config, namespace = call(folder, f'--{name}', str(value), '--flag' if name != 'flag' else '--count=7')
    assert same(config[name], value) and same(namespace[name], value)
    assert config.given == {name, 'flag' if name != 'flag' else 'count'}


@pytest.mark.parametrize('argv, expected', [
    (['--flag'], {'flag': True}),
    (['--choice'], {'choice': True}),
    (['--flag', '--count=4'], {'flag': True, 'count': 4}),
    (['--flag', 'False'], {'flag': False}),
    (['--flag', 'false'], {'flag': False}),
    (['--flag=TRUE'], {'flag': True}),
    (['--choice', 'False'], {'choice': False}),
    (['--choice', 'fast'], {'choice': 'fast'}),
    (['--choice=true'], {'choice': True}),
    (['--rate=3'], {'rate': 3.0}),
    (['--count=1e3'], {'count': 1000}),
    (['--maybe_count=2.5e2'], {'maybe_count': 250}),
    (['--maybe_rate', '-3'], {'maybe_rate': -3.0}),
    (['--maybe_rate=None'], {'maybe_rate': None}),
    (['--text=None'], {'text': 'None'}),
    (['--text='], {'text': ''}),
    (['--text=a=b --count=5'], {'text': 'a=b --count=5'}),
    (['--text=--flag'], {'text': '--flag'}),
    (['--sizes=[]'], {'sizes': []}),
    ([], {}),
])
def test_command_line_forms(folder, argv, expected):
    config, namespace = call(folder, *argv)
    assert config.keys() == DEFAULTS.keys()
    assert all(same(config[name], value) for name, value in {**DEFAULTS, **expected}.items())
    assert all(same(namespace[name], value) for name, value in config.items())
    assert config.given == expected.keys()


@pytest.mark.parametrize('name', ['flag', 'choice'])
def test_a_bare_bool_leaves_the_next_word_to_be_a_config_file(folder, name):
    config, _ = call(folder, f'--{name}', write(folder, 'count = 8'))
    assert config[name] is True and config['count'] == 8


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(-9, 9)), max_size=6))
def test_settings_apply_in_their_order_and_a_file_sees_the_ones_before(folder, steps):
    argv, expected = [], DEFAULTS['count']
    for i, (by_file, k) in enumerate(steps):
        argv.append(write(folder, f'count = count * 3 + {k}', f'step{i}.py') if by_file else f'--count={k}')
        expected = expected * 3 + k if by_file else k
    config, namespace = call(folder, *argv)
    assert config['count'] == namespace['count'] == expected


@quick
@given(st.sampled_from(['rate', 'maybe_rate']), st.integers(-2**1000, 2**1000))
def test_an_int_becomes_a_float_where_one_is_expected(folder, name, value):
    assert same(call(folder, write(folder, f'{name} = {value}'))[0][name], float(value))
    assert same(call(folder, f'--{name}={value}')[0][name], float(value))


@pytest.mark.parametrize('source', [
    'count = True', 'count = 2.5', 'count = 1e400', 'count = None',
    'count = "3"', 'rate = False', 'rate = "fast"', 'rate = None',
    'flag = 1', 'flag = 0.0', 'flag = "True"', 'flag = None', 'text = 3', 'text = None', 'text = b"x"',
    'maybe_count = True', 'maybe_count = 1.5', 'maybe_rate = True', 'maybe_text = 1', 'choice = 1', 'choice = None',
    'sizes = (1, 2)', 'sizes = 1', 'sizes = None', 'count = int', 'count = lambda: 3',
])
def test_a_value_of_another_type_in_a_config_file_is_refused(folder, source):
    path = write(folder, source)
    line = refusal(folder, path)
    assert line.startswith(f'{path}: {source.split()[0]}=') and 'expected' in line


@pytest.mark.parametrize('word, expected', [
    ('--count=True', 'expected an integer'), ('--count=2.0', 'expected an integer'),
    ('--count=None', 'expected an integer'), ('--count=15e-1', 'expected an integer'),
    ('--count=1e400', 'expected an integer'), ('--count=e', 'expected an integer'),
    ('--count=0x10', 'expected an integer'), ('--rate=0x10', 'expected a number'), ('--rate=[1]', 'expected a number'),
    ('--count=', 'expected an integer'), ('--count=' + '9' * 5000, 'expected an integer'),
    ('--rate=fast', 'expected a number'), ('--rate=True', 'expected a number'), ('--rate=', 'expected a number'),
    ('--flag=1', 'expected True or False'), ('--flag=', 'expected True or False'),
    ('--maybe_count=none', 'expected an integer or None'), ('--maybe_rate=', 'expected a number or None'),
    ('--sizes=3', 'expected a list'), ('--sizes=[1', 'expected a list'), ('--sizes=print()', 'expected a list'),
    ('--sizes=' + '(' * 9999, 'expected a list'), ('--sizes=\0', 'expected a list'),
    ('--count', 'expected an integer'), ('--rate', 'expected a number'), ('--sizes', 'expected a list'),
    ('--text', 'expected a string'), ('--maybe_text', 'expected a string or None'),
])
def test_a_value_of_another_type_on_the_command_line_is_refused(folder, word, expected):
    line = refusal(folder, word, '--flag')
    assert word.partition('=')[0].strip('-') in line and line.endswith(expected) and len(line) < 150


def test_a_whole_float_of_a_config_file_is_an_int_where_one_is_expected(folder):
    assert same(call(folder, write(folder, 'count = 1e3\nmaybe_count = 2e0'))[0]['count'], 1000)


@pytest.fixture
def sampler(tmp_path, monkeypatch):
    """A function of arguments: the options of a script that has paths and texts; its home is a name with a blank."""
    monkeypatch.setenv('HOME', '/home/张 三')
    options = {'out_dir': 'out', 'init_from': '', 'runs': '', 'start': '', 'stop': '', 'separator': '', 'delimiter': '',
               'system': '', 'template': '', 'inspect': ''}
    lines = [f'{name} = {value!r}' for name, value in options.items()]
    (tmp_path / 'options.py').write_text('\n'.join([*lines, 'configure(globals())']))
    return lambda *argv: configure({'__file__': str(tmp_path / 'options.py'), **options}, argv)


@pytest.mark.parametrize('name, text, expected', [
    ('out_dir', '~/x', '/home/张 三/x'), ('out_dir', '~', '/home/张 三'), ('out_dir', 'a~/x', 'a~/x'),
    ('out_dir', './~/x', './~/x'), ('out_dir', '~x', '~x'), ('runs', '~/a,b,~/c', '/home/张 三/a,b,/home/张 三/c'),
    ('init_from', 'auto:~/x', 'auto:/home/张 三/x'), ('init_from', '~/a,~/b', '/home/张 三/a,/home/张 三/b'),
    ('start', 'FILE:~/x', 'FILE:/home/张 三/x'), ('start', '~/x', '~/x'), ('system', '~/x', '~/x'),
    ('inspect', '~/x', '~/x')])
def test_the_home_folder_stands_for_a_tilde_in_every_path(sampler, tmp_path, name, text, expected):
    assert sampler(f'--{name}={text}')[name] == expected
    assert sampler(write(tmp_path, f'{name} = {text!r}'))[name] == expected


@pytest.mark.parametrize('name, text, expected', [
    ('stop', r'\n', '\n'), ('stop', r'\n\n', '\n\n'), ('stop', r'\nQ:\t', '\nQ:\t'), ('separator', r'\r\n', '\r\n'),
    ('separator', r'[end]\n', '[end]\n'), ('delimiter', r'\n', '\n'), ('delimiter', r'\nA:\t', '\nA:\t'),
    ('stop', r'["\n"]', r'["\n"]'),   # which JSON reads
    ('start', r'a\nb', r'a\nb'), ('system', r'a\nb', r'a\nb'), ('inspect', r'\n', r'\n'), ('out_dir', r'a\n', r'a\n'),
    ('start', 'caf\udce9', r'caf\xe9'), ('stop', '\udcff', r'\xff'), ('out_dir', 'caf\udce9', 'caf\udce9')])
def test_escapes_that_a_shell_hands_over_and_invalid_bytes_of_a_text_are_read(sampler, capsys, name, text, expected):
    assert sampler(f'--{name}={text}')[name] == expected
    assert capsys.readouterr().err.count('line break') == (name in ('start', 'system') and 'n' in text)


def test_given_holds_what_was_set_and_nothing_else(folder):
    path = write(folder, 'import math\n_half = count / 2\nrate = _half\nmaybe_count = None\ntemperature = 1.0\n')
    assert call(folder, path, '--text=x')[0].given == {'rate', 'maybe_count', 'text'}


def test_adopt_sets_what_nobody_has_given(folder):
    config, namespace = call(folder, '--count=4')
    config.adopt({'count': 9, 'rate': 2, 'flag': True, 'text': 'kept', 'other': 1}, but=('text',))
    expected = {**DEFAULTS, 'count': 4, 'rate': 2.0, 'flag': True}
    assert all(same(config[name], expected[name]) and same(namespace[name], expected[name]) for name in DEFAULTS)
    assert config.keys() == DEFAULTS.keys() and 'other' not in namespace
    assert config.given == {'count'}


def test_adopt_refuses_a_value_of_another_type(folder):
    config, _ = call(folder)
    with pytest.raises(UsageError, match='^checkpoint: rate=.*expected a number'):
        config.adopt({'rate': 'fast'})


def test_config_is_a_dictionary_of_the_options_alone(folder):
    config, namespace = call(folder)
    assert isinstance(config, Config) and dict(config) == DEFAULTS
    assert '_hidden' not in config and 'derived' not in config
    config.put('count', 5, 'test')
    assert config['count'] == namespace['count'] == 5


# ---------------------------------------------------------------------------------------------------------------------
# misspellings

letters = st.sampled_from('abcdefghijklmnopqrstuvwxyz_')


@st.composite
def misspellings(draw):
    """(an option, its name with one letter dropped, doubled, changed or swapped)"""
    name = draw(st.sampled_from(sorted(DEFAULTS)))
    i = draw(st.integers(1, len(name) - 1))
    wrong = draw(st.sampled_from([name[:i] + name[i + 1:], name[:i] + name[i - 1:], name[:i] + draw(letters) + name[i:],
                                  name[:i] + draw(letters) + name[i + 1:],
                                  name[:i - 1] + name[i] + name[i - 1] + name[i + 1:]]))
    return name, wrong


@quick
@given(misspellings().filter(lambda pair: pair[1] not in DEFAULTS and not configurator.owner(pair[1], None)))
def test_any_misspelling_is_refused_with_the_nearest_key(folder, pair):
    name, wrong = pair
    expected = f'unknown option {wrong!r}, the nearest is {name!r}'
    assert refusal(folder, f'--{wrong}=1') == expected
    path = write(folder, f'{wrong} = 1')
    assert refusal(folder, path) == f'{path}: {expected}; names of its own must begin with an underscore'


@quick
@given(any_text.filter(lambda name: '=' not in name and name not in (*DEFAULTS, 'help', *configurator.RETIRED)))
def test_any_unknown_name_is_refused_with_a_key_that_exists(folder, name):
    line = refusal(folder, f'--{name}=1')
    assert line.startswith('unknown option ') and line.endswith((*map(repr, DEFAULTS), '.py'))


# ---------------------------------------------------------------------------------------------------------------------
# config files

def test_a_config_file_may_compute_import_and_keep_names_of_its_own(folder):
    path = write(folder, """
import math
from pathlib import Path
_third = count / 3
def half(x):
    return x / 2
rate = half(math.pi) + _third
text = Path(__file__).name + __name__
for _i in range(3):
    count += _i
sizes += [n for n in range(2)]
""")
    config, _ = call(folder, path)
    assert config['rate'] == 3.141592653589793 / 2 + 1
    assert config['text'] == 'config.py__config__'
    assert config['count'] == 6 and config['sizes'] == [1, 2, 0, 1]


def test_the_file_of_a_config_is_an_absolute_path_to_itself(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write(folder, 'text = __file__')
    assert call(folder, 'config.py')[0]['text'] == str(folder / 'config.py')


def test_a_config_file_is_decoded_as_python_does(folder):
    latin = write(folder, '# coding: latin-1\ntext = "é"'.encode('latin-1'))
    assert call(folder, latin)[0]['text'] == 'é'
    assert call(folder, write(folder, '\ufefftext = "é"'))[0]['text'] == 'é'


@pytest.mark.parametrize('source', [
    'from math import tau as rate', 'globals()["rate"] = 6.283185307179586', 'exec("rate = 6.283185307179586")',
    'def _set():\n    global rate\n    rate = 6.283185307179586\n_set()', 'if (rate := 6.283185307179586): pass',
    'for rate in [1.0, 6.283185307179586]: pass', 'rate: float = 6.283185307179586', '_x, rate = 0, 6.283185307179586',
])
def test_whatever_way_a_config_file_binds_an_option_it_is_set(folder, source):
    config, _ = call(folder, write(folder, source))
    assert config['rate'] == 6.283185307179586 and config.given == {'rate'}


@pytest.mark.parametrize('source', ['def _f():\n    rate = 9.0\n    other = 1\n    return rate\n_f()',
                                    'class _Own:\n    rate = 9.0\n    other = 1'])
def test_a_local_variable_of_a_config_file_is_no_option(folder, source):
    config, _ = call(folder, write(folder, source))
    assert config['rate'] == 0.5 and config.given == set()


@pytest.mark.parametrize('source, line, words', [
    ('count = 1\nrate = = 2\n', 2, 'SyntaxError: invalid syntax'),
    ('count = 1\n\nrate = 1 / 0\n', 3, 'ZeroDivisionError: division by zero'),
    ('count = 1\nrate = undefined\n', 2, "NameError: name 'undefined' is not defined"),
    ('def f():\n    return {}["x"]\n\nrate = f()\n', 4, "KeyError: 'x'"),
    ('import json\n\njson.loads("{")\n', 3, 'JSONDecodeError: Expecting property name'),
    ('import no_such_module_anywhere\n', 1, "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    ('\n\nraise ValueError("two\\nlines")\n', 3, 'ValueError: two'),
    ('def f():\n    f()\nf()\n', 3, 'RecursionError: maximum recursion depth exceeded'),
    ('if True:\ncount = 1\n', 2, "IndentationError: expected an indented block after 'if' statement on line 1"),
    ('return\n', 1, "SyntaxError: 'return' outside function"),
])
def test_a_config_file_that_fails_is_named_with_its_line(folder, source, line, words):
    path = write(folder, source)
    assert refusal(folder, path).startswith(f'{path}, line {line}: {words}')


@pytest.mark.parametrize('stop', [SystemExit, KeyboardInterrupt])
def test_a_config_file_may_end_the_script(folder, stop):
    with pytest.raises(stop, match='^3$'):
        call(folder, write(folder, f'raise {stop.__name__}(3)'))


def test_a_script_given_as_a_config_is_refused(folder):
    line = refusal(folder, str(ROOT / 'train.py'))
    assert 'train.py is a script' in line and 'config/train_shakespeare_char.py' in line
    assert 'options.py is a script' in refusal(folder, str(folder / 'options.py'))


@pytest.mark.parametrize('word, reason', [
    ('nowhere.py', 'No such file'), ('.', 'Is a directory'), ('', 'Is a directory'), ('cnt=3', 'No such file'),
    ('x' * 300, 'File name too long'), ('nul\0', 'embedded null'), ('\ud800', 'encode'),
])
def test_a_config_file_that_cannot_be_read_is_refused(folder, word, reason):
    line = refusal(folder, word)
    assert reason in line and repr(word) in line and line.endswith('expected a Python file or --key=val')


@pytest.mark.parametrize('word, meant', [
    ('count=3', '--count=3'), ('-count=3', '--count=3'), ('\u2014count=3', '--count=3'),   # a word processor's dash
    ('data', '--out_dir=data'), ('book.txt', '--out_dir=book.txt'),
    ('config/train_python.py', 'config/train_python_char.py'), ('train_gpt2', 'config/train_gpt2.py'),
    ('config/train_gpt2.yaml', 'config/train_gpt2.py'), ('finetune_sq.py', 'config/finetune_sql.py')])
def test_what_a_user_may_mean_by_an_argument_is_suggested(tmp_path, monkeypatch, word, meant):
    (tmp_path / 'options.py').write_text("count = 1\nout_dir = 'out'\nconfigure(globals())\n")
    (tmp_path / 'data').mkdir()
    (tmp_path / 'book.txt').write_text('count = 2')   # text, also if it is Python
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        configure({'__file__': 'options.py', 'count': 1, 'out_dir': 'out'}, [word])
    assert str(error.value).endswith(f'{meant}?') and 'do you mean ' in str(error.value)


def test_a_config_file_beside_the_script_is_suggested_from_elsewhere(folder):
    write(folder, 'count = 1', 'recipe.py')
    assert refusal(folder, 'recipe.py').endswith(f'do you mean {folder / "recipe.py"}?')


def test_options_of_other_scripts_in_a_config_file_are_ignored_with_one_line(folder, capsys):
    path = write(folder, 'temperature = 0.5\ncount = 4\nwarmup_iters = "any type"\n')
    config, namespace = call(folder, path)
    assert capsys.readouterr().err == f'{path}: not options of options.py, ignored: temperature, warmup_iters\n'
    assert config['count'] == 4 and config.given == {'count'}
    assert not {'temperature', 'warmup_iters'} & {*config, *namespace}


def test_a_config_file_of_known_keys_says_nothing(folder, capsys):
    call(folder, write(folder, '_own = 1\ncount = 4\n'))
    assert capsys.readouterr() == ('', '')


def test_a_key_of_another_script_on_the_command_line_is_refused_with_its_name(folder):
    assert refusal(folder, '--exact_window=5') == "unknown option 'exact_window', an option of sample.py"


@pytest.mark.parametrize('name, value', [('always_save_checkpoint', 'False'), ('backend', "'nccl'"),
                                         ('decay_lr', 'True'), ('real_data', 'False')])
def test_retired_options_are_ignored_with_a_line_about_what_replaces_them(folder, capsys, name, value):
    advice = configurator.RETIRED[name]
    path = write(folder, f'{name} = {value}\ncount = 4')
    assert call(folder, path)[0].given == {'count'}
    assert capsys.readouterr().err == f'{path}: {name} is not needed: {advice}\n'
    config, namespace = call(folder, f'--{name}={value}')
    assert capsys.readouterr().err == f'command line: {name} is not needed: {advice}\n'
    assert not config.given and name not in config and name not in namespace


@pytest.mark.parametrize('words', [['--backend', 'nccl'], ['--decay_lr', 'True'], ['--decay_lr'], ['--real_data']])
def test_a_retired_key_takes_its_value_with_it(folder, capsys, words):
    config, _ = call(folder, *words, '--count=4')
    assert config.given == {'count'} and 'is not needed' in capsys.readouterr().err


@pytest.fixture
def trainer(tmp_path):
    """A folder with a script that has the options which stand for a retired one."""
    (tmp_path / 'options.py').write_text("schedule = 'cosine'\nwarmup_iters = 2000\nconfigure(globals())\n")
    return tmp_path


@pytest.mark.parametrize('words', [['--decay_lr=False'], ['--decay_lr=false'], ['--decay_lr', 'False'], ['file']])
def test_no_decay_is_translated_and_says_so(trainer, capsys, words):
    if words == ['file']:
        (trainer / 'config.py').write_text('decay_lr = False\nwarmup_iters = 100')
        words = [str(trainer / 'config.py')]
    namespace = {'__file__': str(trainer / 'options.py'), 'schedule': 'cosine', 'warmup_iters': 2000}
    config = configurator.configure(namespace, words)
    assert dict(config) == {'schedule': 'constant', 'warmup_iters': 0}
    assert config.given == {'schedule', 'warmup_iters'} and namespace['schedule'] == 'constant'
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'decay_lr is not needed' in err and "schedule='constant'" in err


def test_an_option_that_has_the_name_of_a_retired_one_is_an_option(tmp_path):
    (tmp_path / 'options.py').write_text('backend = "x"\nconfigure(globals())\n')
    namespace = {'__file__': str(tmp_path / 'options.py'), 'backend': 'x'}
    assert configure(namespace, ['--backend=y'])['backend'] == 'y'
    assert configure(namespace, [write(tmp_path, 'backend = "z"')])['backend'] == 'z'


@pytest.mark.parametrize('script', RUNNABLE)
def test_every_option_of_every_script_is_lower_case_and_takes_its_default(script):
    config = Config(defaults_of(script))
    for name, value in config.items():
        assert name.islower(), f'the constant {name} would be an option'
        assert type(value) in config.types[name]


def test_a_file_that_does_not_call_configure_has_no_options(folder):
    assert read_options(ROOT / 'configurator.py') == []
    names = [name for name, *_ in read_options(folder / 'options.py')]
    assert names == list(DEFAULTS)


# ---------------------------------------------------------------------------------------------------------------------
# no input gives a traceback

any_word = st.one_of(any_text, st.sampled_from(['--flag', '--text', '--sizes', '--help', '--', '--=', '-', '/', '~']),
                     st.builds('--{}={}'.format, st.sampled_from([*DEFAULTS, 'decay_lr', 'backend', '']), any_text),
                     st.builds('--{}'.format, any_text))


@quick
@given(st.lists(any_word, max_size=6))
def test_no_arguments_give_a_traceback(folder, argv):
    try:
        config, namespace = call(folder, *argv)
    except UsageError as error:
        assert str(error)
    except SystemExit as stop:
        assert stop.code == 0 and {'--help', '-h'} & set(argv)
    else:
        assert all(type(config[name]) in config.types[name] for name in DEFAULTS)


@quick
@given(st.binary(max_size=60))
@example(b'# caf\xe9')
@example(b'# coding: unheard-of')
@example(b'count = 4\n\xff')
@example(b'\xef\xbb\xbf# coding: latin-1')
def test_no_bytes_in_a_config_file_give_a_traceback(folder, content):
    try:
        call(folder, write(folder, content))
    except UsageError as error:
        assert str(error)


# ---------------------------------------------------------------------------------------------------------------------
# help

def test_help_shows_the_values_of_a_config_file(folder, capsys):
    with pytest.raises(SystemExit):
        call(folder, '--help', write(folder, 'count = 77'), '--text=x')
    out = capsys.readouterr().out
    assert '--count=77 ' in out and "--text='x' " in out and '--rate=0.5 ' in out


@pytest.mark.parametrize('argv', [['--help'], ['-h'], ['--count=wrong', 'nowhere.py', '--help']])
def test_help_prints_every_option_with_default_and_comment(folder, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        call(folder, *argv)
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    lines = [' '.join(line.split()) for line in out.splitlines()]
    assert err == ''
    assert lines == [
        'What the script is for.', '', 'python options.py --count=4', '',
        'Options: --key=val; a Python file sets several at once.',
        '--count=3 how many there are', '--rate=0.5 how fast, a number with a # in its comment',
        '--flag=False whether or not', "--text='a # in it' what it says", '', 'another heading',
        '--maybe_count=None None takes them all', '--maybe_rate=0.1', '--maybe_text=None None says nothing',
        "--choice='auto' True, False, or a word", '--sizes=[1, 2] of the parts']


def test_help_of_a_script_with_neither_docstring_nor_options(folder, capsys):
    (folder / 'bare.py').write_text('from configurator import configure\nconfigure(globals())\n')
    with pytest.raises(SystemExit) as stop:
        configure({'__file__': str(folder / 'bare.py')}, ['--help'])
    assert stop.value.code == 0 and 'Options' in capsys.readouterr().out


def test_help_of_train_prints_every_option_with_its_comment():
    done = run('train.py', '--help')
    assert done.returncode == 0 and done.stderr == ''
    source = (ROOT / 'train.py').read_text(encoding='utf-8').splitlines()
    assert done.stdout.startswith('Train a GPT: ')
    for name, *_, number in read_options(ROOT / 'train.py'):
        comment = source[number - 1].partition('  # ')[2]
        entry, = [line for line in done.stdout.splitlines() if line.startswith(f'  --{name}=')]
        assert entry.endswith(comment)


# ---------------------------------------------------------------------------------------------------------------------
# errors of a script

def run_body(folder, body, *args, run=call_script):
    """Run options.py with more statements at its end."""
    (folder / 'body.py').write_text(SCRIPT + body + '\n')
    return run(folder / 'body.py', *args, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize('body, status, line', [
    ('raise UserError("no data: make some")', 1, 'body.py: no data: make some'),
    ('raise UsageError("top_k=0: expected 1 or more")', 2, 'body.py: top_k=0: expected 1 or more'),
    ('raise KeyboardInterrupt', 130, 'body.py: interrupted'),
    (r'"caf\udce9".encode()', 1, r"body.py: a name that is invalid UTF-8: 'caf\udce9'; rename it, or set PYTHONUTF8=1"),
    ('raise RuntimeError("in C++: KeyboardInterrupt: ")', 130, 'body.py: interrupted'),
    ('import signal; signal.raise_signal(signal.SIGINT)', 130, 'body.py: interrupted'),
    ('bytearray(2 ** 62)', 1, 'body.py: out of memory'),
], ids=['UserError', 'UsageError', 'Ctrl-C', 'name', 'hidden', 'signal', 'memory'])
def test_an_error_of_the_user_is_one_line_and_its_status(folder, body, status, line):
    done = run_body(folder, body)
    assert (done.returncode, done.stdout, done.stderr) == (status, '', line + '\n')


def test_ctrl_c_while_something_is_imported_ends_in_one_line_whatever_the_import_does_with_it(folder):
    (folder / 'swallows.py').write_text('import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n'
                                        'except BaseException:\n    pass\n')
    done = run_body(folder, 'import swallows\nprint("goes on")', run=run)
    assert (done.returncode, done.stdout, done.stderr) == (130, '', 'body.py: interrupted\n')


@pytest.mark.parametrize('handler', [signal.SIG_IGN, lambda number, frame: None])
def test_another_handler_of_ctrl_c_stays(folder, handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        call(folder)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_wrong_argument_of_a_script_is_one_line_and_status_2(folder):
    done = run_body(folder, '', '--coun=3', run=run)
    assert_one_line(done, 2, "body.py: unknown option 'coun', the nearest is 'count'")


def test_what_a_script_reads_after_configure_is_what_was_set(folder):
    done = run_body(folder, 'print(count, derived, config["count"], config.given)', '--count', '5')
    assert (done.returncode, done.stdout) == (0, "5 10 5 {'count'}\n")


def test_any_other_error_keeps_its_traceback(folder):
    done = run_body(folder, 'raise ZeroDivisionError("a defect")')
    assert done.returncode == 1
    assert done.stderr.startswith('Traceback') and done.stderr.endswith('ZeroDivisionError: a defect\n')


@pytest.mark.parametrize('n', [1, 99_999])   # what fits into the buffer of stdout is tried again at the end
def test_a_closed_stdout_ends_a_script_quietly(folder, n):
    (folder / 'body.py').write_text(SCRIPT + f'print("x" * {n}, flush=True)\n')
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, folder / 'body.py'], stdout=write, stderr=subprocess.PIPE,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': ''}, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b'')


def torch_error():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2 ** 50)
    return caught.value


@pytest.mark.parametrize('error_of', [torch_error, lambda: torch.OutOfMemoryError('CUDA out of memory.')],
                         ids=['cpu', 'gpu'])
@pytest.mark.parametrize('options, advice', [
    ({'batch_size': 8, 'block_size': 64}, ': lower batch_size or block_size'),
    ({'batch_size': 8}, ': lower batch_size'),
    ({'rate': 0.5}, ''),
])
def test_out_of_memory_is_one_line_that_names_what_the_script_can_lower(folder, monkeypatch, capfd, error_of, options,
                                                                        advice):
    configure({'__file__': write(folder, 'configure(globals())', 'empty.py'), **options}, [])
    monkeypatch.setattr(sys, 'argv', ['some/train.py'])
    error = error_of()
    with pytest.raises(SystemExit) as stop:
        sys.excepthook(type(error), error, error.__traceback__)
    assert stop.value.code == 1
    assert capfd.readouterr().err == f'train.py: out of memory{advice}\n'


def test_usage_errors_are_user_errors_with_a_status_of_their_own():
    assert issubclass(UsageError, UserError) and (UserError.status, UsageError.status) == (1, 2)


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'utf-8'])
def test_what_a_stream_cannot_show_is_escaped(folder, monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(b'caf\xe9'), encoding=encoding) for _ in range(3)]
    for name, stream in zip(('stdin', 'stdout', 'stderr'), streams):
        monkeypatch.setattr(sys, name, stream)
    call(folder)
    print('é 你 \udce9')
    sys.stdout.flush()
    shown = 'é 你' if encoding == 'utf-8' else 'é \\u4f60' if encoding == 'cp1252' else '\\xe9 \\u4f60'
    assert streams[1].buffer.getvalue().decode(encoding) == shown + ' \\udce9\n'
    assert sys.stdin.read() == ('café' if encoding == 'cp1252' else 'caf\\xe9')


def test_importing_the_configurator_changes_nothing():
    spec = importlib.util.spec_from_file_location('a_second_configurator', ROOT / 'configurator.py')
    hook = sys.excepthook
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert sys.excepthook is hook
