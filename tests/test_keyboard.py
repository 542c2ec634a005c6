"""At the keyboard: all scripts under terminals that cannot show every character, in a home folder with a blank and
Chinese characters, from a folder that cannot be written to, with names that are invalid UTF-8; line editing."""

import json
import os
import sys

import pytest
from conftest import ROOT, TINY, needs
from in_process import call

TEXT = '人之初，性本善。性相近，习相远。苟不教，性乃迁。教之道，贵以专。😀\n' * 60
SHOWN = {'utf-8': '人之初', 'cp1252': r'\u4eba\u4e4b\u521d', 'ascii': r'\u4eba\u4e4b\u521d', 'gbk': '人之初'}
anywhere = pytest.mark.parametrize('encoding', ['cp1252', *(pytest.param(name, marks=pytest.mark.full)
                                                            for name in ('utf-8', 'ascii', 'gbk'))])


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A home folder with a text, a dataset of it and a trained model."""
    home = tmp_path_factory.mktemp('home') / '张 三'
    home.mkdir()
    (home / 'text.txt').write_text(TEXT, encoding='utf-8')
    (home / 'tiny.py').write_text(TINY)
    for script, *args in (
            ('data/text/prepare.py', '--input=~/text.txt', '--name=~/数据 集/诗', '--tokenizer=char'),
            ('train.py', home / 'tiny.py', '--dataset=~/数据 集/诗', '--out_dir=~/输出 x', '--max_iters=3')):
        done = call(script, *args, HOME=str(home))
        assert done.returncode == 0, done.stderr
    assert (home / '输出 x/ckpt.pt').exists() and not (ROOT / '~').exists()
    return home


WORK = {   # scripts and arguments that show the text
    'sample': ['sample.py', '--start=人之初', '--num_samples=1', '--max_new_tokens=5', '--seed=3'],
    'stream': ['sample.py', '--start=人之初', '--num_samples=1', '--max_new_tokens=5', '--stream=True'],
    'file': ['sample.py', '--prompts=~/prompts.txt', '--num_samples=1', '--max_new_tokens=5'],
    'json': ['sample.py', '--start=人之初', '--num_samples=1', '--max_new_tokens=40', '--json'],
    'eval': ['eval.py', '--data=~/人之初.txt'],
    'export': ['export.py', '--to=~/人之初'],
}


@anywhere
@pytest.mark.parametrize('work', WORK)
def test_every_script_works_in_any_home_and_escapes_what_a_terminal_cannot_show(home, encoding, work):
    for name in ('人之初.txt', 'prompts.txt'):
        (home / name).write_text('人之初\n' * 20, encoding='utf-8')
    script, *args = WORK[work]
    if work == 'export':
        args[0] += encoding   # a folder that does not exist yet
    done = call(script, '--out_dir=~/输出 x', *args, HOME=str(home), encoding=encoding)
    assert done.returncode == 0, done.stderr
    if work in ('json', 'eval'):
        assert '人之初' in str(json.loads(done.stdout))   # whatever characters the rest has
    else:
        assert SHOWN[encoding] in done.stdout


@anywhere
def test_a_refusal_is_one_line_on_any_terminal(home, encoding):
    done = call('sample.py', '--out_dir=~/输出 x', '--start=龍', HOME=str(home), encoding=encoding)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith('sample.py: ')


@pytest.mark.parametrize('script, args', [
    ('plot.py', ['--runs=~/输出 x', '--text']), ('plot.py', ['--runs=~/输出 x']),
    ('data/text/prepare.py', ['--input=~/text.txt', '--inspect=人之初', '--tokenizer=char']),
    ('train.py', ['--out_dir=~/输出 x', '--init_from=resume'])])
@anywhere
def test_other_scripts_work_there_too(home, encoding, script, args):
    done = call(script, *args, HOME=str(home), encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert 'Glyph' not in done.stderr   # of a font without Chinese


@needs('linux')
@pytest.mark.parametrize('script, args', [
    ('sample.py', ['--out_dir=~/输出 x', '--num_samples=1', '--max_new_tokens=2']),
    ('eval.py', ['--out_dir=~/输出 x', '--data=~/text.txt']), ('plot.py', ['--runs=~/输出 x']),
    ('data/text/prepare.py', ['--input=~/text.txt', '--name=~/二', '--tokenizer=char']),
    ('train.py', ['--out_dir=~/输出 x', '--init_from=resume'])])
def test_scripts_work_from_a_folder_that_cannot_be_written_to(home, script, args):
    done = call(script, *args, HOME=str(home), cwd='/proc')
    assert done.returncode == 0, done.stderr


@needs('linux')
@pytest.mark.parametrize('script, args', [
    ('train.py', ['~/tiny.py', '--dataset=~/数据 集/诗', '--out_dir=out']),
    ('export.py', ['--out_dir=~/输出 x', '--to=model'])])
def test_output_into_such_a_folder_is_refused_in_one_line(home, script, args):
    done = call(script, *[arg.replace('~/tiny.py', str(home / 'tiny.py')) for arg in args], HOME=str(home), cwd='/proc')
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f'{script}: cannot ')


@needs('linux')   # where a name is bytes
def test_names_that_are_invalid_utf_8_work_and_are_shown_escaped(home):
    name = os.fsdecode(b'caf\xe9')
    (home / f'{name}.txt').write_text(TEXT, encoding='utf-8')
    for script, *args in (
            ('data/text/prepare.py', f'--input=~/{name}.txt', f'--name=~/{name}', '--tokenizer=char'),
            ('train.py', home / 'tiny.py', f'--dataset=~/{name}', f'--out_dir=~/out-{name}', '--max_iters=1'),
            ('sample.py', f'--out_dir=~/out-{name}', '--num_samples=1', '--max_new_tokens=2', '--start=人'),
            ('eval.py', f'--out_dir=~/out-{name}', f'--data=~/{name}'),
            ('export.py', f'--out_dir=~/out-{name}', '--to=~/exported'),
            ('plot.py', f'--runs=~/out-{name}', '--text'), ('plot.py', f'--runs=~/out-{name}')):
        done = call(script, *args, HOME=str(home))
        assert done.returncode == 0, done.stderr
    assert r'caf\udce9' in done.stderr
    done = call('sample.py', f'--out_dir=~/nowhere-{name}', HOME=str(home))
    assert done.returncode == 1 and r'nowhere-caf\udce9' in done.stderr


@pytest.mark.full
@needs('fork')
def test_prompts_are_typed_with_line_editing_and_a_history(trained):
    import pty
    pid, terminal = pty.fork()
    if not pid:
        script = str(ROOT / 'sample.py')
        os.execv(sys.executable, [sys.executable, script, f'--out_dir={trained}', '--max_new_tokens=3', '--top_k=1'])

    def until(end):
        """What the terminal shows up to some text."""
        shown = b''
        while not shown.endswith(end):
            shown += os.read(terminal, 1)
        return shown.decode(errors='replace').replace('\r', '')

    until(b'> ')
    os.write(terminal, b'4 tmies\x1b[D\x1b[D\x1b[D\x1b[D\x7f\x1b[C\x1b[C\x1b[Ci\n')   # to the left, and back
    until(b'\n')
    first = until(b'> ')
    os.write(terminal, b'\x1b[A\n')   # up
    until(b'\n')
    assert until(b'> ') == first
    os.write(terminal, b'half a li\x03')   # Ctrl-C drops the line
    until(b'> ')
    os.write(terminal, b'\xff\n')
    assert 'never seen' in until(b'> ')
    os.write(terminal, b'\x04')
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
