"""The output folder: one run at a time, checkpoints in the background, the log."""

import errno
import json
import math
import os
import threading

import pytest
from conftest import ROOT, needs, run
from test_checkpoint import file_size_limit, small_model, state_of, steps_in

from flatgpt import checkpoint, outdir
from flatgpt.errors import UserError, exit_callbacks

# ---------------------------------------------------------------------------------------------------------------------
# one run per folder

def claim_elsewhere(out_dir):
    """What another process that claims out_dir prints."""
    script = out_dir.parent / 'claim.py'
    script.write_text(f'from flatgpt import outdir\noutdir.claim({str(out_dir)!r})\nprint("claimed")\n')
    done = run(script, PYTHONPATH=str(ROOT))
    return done.stdout + done.stderr


@needs('file_locks')
def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    out_dir = tmp_path / 'a' / 'b'
    release = outdir.claim(out_dir)
    assert (out_dir / '.lock').exists()
    refusal = claim_elsewhere(out_dir).splitlines()[-1]
    assert 'another run writes to' in refusal and str(out_dir) in refusal
    (out_dir / 'file').touch()
    release()
    assert [path.name for path in out_dir.iterdir()] == ['file']
    assert claim_elsewhere(out_dir) == 'claimed\n'
    assert [path.name for path in out_dir.iterdir()] == ['file']   # the end of that process has freed it


@pytest.mark.parametrize('made_before', [0, 1, 3])
def test_a_run_that_writes_nothing_leaves_nothing_not_even_folders(tmp_path, made_before):
    """Folders that were there before stay."""
    paths = [tmp_path / 'a', tmp_path / 'a' / 'b', tmp_path / 'a' / 'b' / 'c']
    for path in paths[:made_before]:
        path.mkdir()
    outdir.claim(paths[-1])()
    assert [path.exists() for path in paths] == [i < made_before for i in range(3)]


def test_a_late_release_leaves_the_lock_of_the_next_run_alone(tmp_path):
    first = outdir.claim(tmp_path)
    first()
    second = outdir.claim(tmp_path)
    first()
    assert (tmp_path / '.lock').exists()
    second()


@needs('file_locks')
def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch):
    import fcntl

    def flock(*args):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'flock', flock)
    outdir.claim(tmp_path)()


@pytest.mark.parametrize('out_dir', ['file', 'file/out', 'a' * 300])
def test_what_cannot_be_a_folder_is_refused(tmp_path, out_dir):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='out_dir') as error:
        outdir.claim(tmp_path / out_dir)
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# writing in the background

def put(writer, step, best=False):
    writer.put(state_of(small_model(), iter_num=step, optimizer={}, seconds=1.0), best)
    return writer.wait()


def test_the_writer_writes_the_state_and_the_best_weights(tmp_path):
    writer = outdir.Writer(tmp_path)
    assert writer.wait() is None
    put(writer, 10, best=True)
    put(writer, 20)
    assert steps_in(tmp_path) == {'ckpt.pt': 20, 'best.pt': 10}
    assert 'optimizer' not in checkpoint.load(tmp_path / 'best.pt')
    assert 'optimizer' in checkpoint.load(tmp_path / 'ckpt.pt')


def test_put_returns_before_the_state_is_written_and_no_two_writes_overlap(tmp_path, monkeypatch):
    go, busy, most, written = threading.Event(), [], [], []

    def save(path, state):
        busy.append(path)
        most.append(len(busy))
        assert go.wait(60)
        written.append((path.name, state['iter_num']))
        busy.remove(path)
    monkeypatch.setattr(outdir, 'save', save)
    writer = outdir.Writer(tmp_path)
    writer.put({'iter_num': 1}, best=True)
    assert not written   # and yet we are here
    threading.Timer(0.2, go.set).start()
    writer.put({'iter_num': 2}, best=False)
    writer.put({'iter_num': 3}, best=False)
    for finish in exit_callbacks:   # what the end of a process waits for
        finish()
    assert written == [('best.pt', 1), ('ckpt.pt', 1), ('ckpt.pt', 2), ('ckpt.pt', 3)] and max(most) == 1


def test_the_end_of_a_process_waits_for_the_write_and_then_releases_the_folder(tmp_path, monkeypatch):
    go, locked = threading.Event(), []

    def save(path, state):
        assert go.wait(60)
        locked.append((tmp_path / '.lock').exists())
    monkeypatch.setattr(outdir, 'save', save)
    monkeypatch.setattr(outdir, 'exit_callbacks', [])
    outdir.claim(tmp_path)
    outdir.Writer(tmp_path).put({'iter_num': 1}, best=False)
    threading.Timer(0.2, go.set).start()
    for finish in outdir.exit_callbacks:
        finish()
    assert locked == [True] and not (tmp_path / '.lock').exists()


@needs('limits')
def test_a_write_that_fails_is_reported_and_the_next_one_makes_up_for_it(tmp_path, monkeypatch, capsys):
    writer = outdir.Writer(tmp_path)
    put(writer, 10, best=True)
    with file_size_limit(1000):
        assert 'cannot write' in str(put(writer, 20, best=True))
        assert 'cannot write' in str(put(writer, 30))
    assert capsys.readouterr().err.count('cannot write') == 2
    assert steps_in(tmp_path) == {'ckpt.pt': 10, 'best.pt': 10}
    assert put(writer, 40) is None
    assert steps_in(tmp_path) == {'ckpt.pt': 40, 'best.pt': 20}   # the best weights were not forgotten


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_write_that_ends_in_any_other_way_is_an_error_too(tmp_path, monkeypatch):
    monkeypatch.setattr(outdir, 'save', lambda *args: 1 / 0)
    writer = outdir.Writer(tmp_path)
    assert put(writer, 10)


@pytest.mark.parametrize('keep_last', [0, 1, 3])
def test_the_last_states_are_kept_under_their_steps(tmp_path, keep_last):
    writer = outdir.Writer(tmp_path, keep_last)
    for step in (5, 10, 15, 20, 25, 25):   # the last one again, as a signal at an evaluation may
        put(writer, step)
        os.utime(tmp_path / 'ckpt.pt', (step, step))   # the clock of a file system may be coarse
    kept = (20, 15, 10)[:keep_last]
    assert steps_in(tmp_path) == {'ckpt.pt': 25, **{f'ckpt-{step}.pt': step for step in kept}}
    resumed = outdir.Writer(tmp_path, keep_last, step=25)
    put(resumed, 30)
    assert steps_in(tmp_path) == {'ckpt.pt': 30, **{f'ckpt-{step}.pt': step for step in (25, 20, 15)[:keep_last]}}


def test_there_is_a_whole_checkpoint_at_every_moment_of_a_save_that_keeps_older_ones(tmp_path, monkeypatch):
    writer, seen = outdir.Writer(tmp_path, keep_last=1), []
    put(writer, 5)

    def watched(do):
        def look(*args):
            seen.append(checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'])
            do(*args)
            seen.append(checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'])
        return look
    for name in ('link', 'replace', 'fsync'):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    put(writer, 10)
    put(writer, 15)
    assert seen == [5] * 5 + [10] * 6 + [15]


def test_a_folder_that_cannot_link_keeps_none_and_says_so(tmp_path, monkeypatch, capsys):
    writer = outdir.Writer(tmp_path, keep_last=1)
    put(writer, 5)

    def link(*args):
        raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', link)
    assert put(writer, 10) is None
    assert steps_in(tmp_path) == {'ckpt.pt': 10}
    assert 'cannot keep' in capsys.readouterr().err


def test_a_checkpoint_that_somebody_removed_stops_no_other(tmp_path, capsys):
    writer = outdir.Writer(tmp_path, keep_last=1)
    put(writer, 5)
    (tmp_path / 'ckpt.pt').unlink()
    assert put(writer, 10) is None
    assert steps_in(tmp_path) == {'ckpt.pt': 10} and not capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# the log, and the run before

def test_set_aside_keeps_every_earlier_run_whole(tmp_path):
    runs = [{'ckpt.pt': 'a', 'ckpt-50.pt': 'z', 'best.pt': 'b', 'log.jsonl': 'c', 'loss.png': 'f', 'tensorboard': 'g'},
            {'ckpt.pt': 'd', 'log.jsonl': 'e'}]
    (tmp_path / 'notes.txt').write_text('mine')
    assert outdir.set_aside(tmp_path) is None
    for n, files in enumerate(runs, start=1):
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        assert outdir.set_aside(tmp_path) == tmp_path / f'previous-{n}'
    assert outdir.set_aside(tmp_path) is None   # nothing came since
    assert {file.name for file in tmp_path.iterdir()} == {'notes.txt', 'previous-1', 'previous-2'}
    for n, files in enumerate(runs, start=1):
        assert {file.name: file.read_text() for file in (tmp_path / f'previous-{n}').iterdir()} == files


def test_rewind_log_drops_what_will_be_written_again_and_keeps_the_rest_byte_for_byte(tmp_path):
    lines = ['{"step": 0, "val_loss": 3.0}', '{"iter": 0,   "loss": 3}', '{"iter": 19, "grad_norm": null}',
             '{"step": 20, "val_loss": 2.00}', '{"iter": 20, "loss": 1.9}', '{"iter": 21, "loss": 1.8}',
             '{"step": 30, "val_loss": 1.7}', '{"note": "\\u00fc\\u2028"}', '{"iter": 5', '{"iter": 3}', '{"step": 3']
    (tmp_path / 'log.jsonl').write_text('\n'.join(lines))
    outdir.rewind_log(tmp_path, 20)
    kept = [lines[i] + '\n' for i in (0, 1, 2, 3, 7, 9)]
    assert (tmp_path / 'log.jsonl').read_bytes() == ''.join(kept).encode()
    assert [file.name for file in tmp_path.iterdir()] == ['log.jsonl']


@pytest.mark.parametrize('torn', [b'{"iter": 1, "lo', b'\0' * 64, b'{"iter": 1, \xe2\x82\xff'],
                         ids=['cut off', 'zeros', 'garbage'])
def test_rewind_log_survives_what_a_power_cut_leaves(tmp_path, torn):
    (tmp_path / 'log.jsonl').write_bytes(b'{"iter": 0}\n' + torn)
    outdir.rewind_log(tmp_path, 20)
    assert (tmp_path / 'log.jsonl').read_bytes() == b'{"iter": 0}\n'


def test_rewind_log_without_a_log_makes_none(tmp_path):
    outdir.rewind_log(tmp_path, 20)
    assert not list(tmp_path.iterdir())


@needs('limits')
def test_rewind_log_that_finds_no_room_says_so_and_leaves_the_log(tmp_path):
    log = b'{"iter": 0}\n' * 1000
    (tmp_path / 'log.jsonl').write_bytes(log)
    with file_size_limit(1000), pytest.raises(UserError, match='log.jsonl'):
        outdir.rewind_log(tmp_path, 20)
    assert (tmp_path / 'log.jsonl').read_bytes() == log


def test_append_log_writes_null_for_what_json_has_no_number_for(tmp_path):
    record = {'iter': 3, 'loss': math.nan, 'grad_norm': math.inf, 'lr': -math.inf, 'mfu': None, 'dt': 0.5}
    outdir.append_log(tmp_path, record)
    outdir.append_log(tmp_path, {'iter': 4})
    first, second = (tmp_path / 'log.jsonl').read_text().splitlines()
    assert json.loads(first, parse_constant=pytest.fail) == {
        'iter': 3, 'loss': None, 'grad_norm': None, 'lr': None, 'mfu': None, 'dt': 0.5}
    assert second == '{"iter": 4}'


@needs('limits')
@pytest.mark.parametrize('room', [0, 5])
def test_append_log_that_finds_no_room_says_so_and_goes_on_with_whole_lines(tmp_path, capsys, room):
    outdir.append_log(tmp_path, {'iter': 0})
    with file_size_limit((tmp_path / 'log.jsonl').stat().st_size + room):
        outdir.append_log(tmp_path, {'iter': 1})
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and 'cannot write' in err and 'log.jsonl' in err
    outdir.append_log(tmp_path, {'iter': 2})
    assert (tmp_path / 'log.jsonl').read_text() == '{"iter": 0}\n{"iter": 2}\n'


@pytest.mark.parametrize('links', [True, False])
def test_a_kept_file_has_the_content_that_its_source_had(tmp_path, monkeypatch, links):
    source, target = tmp_path / 'source', tmp_path / 'target'
    if not links:
        def refuse(*args):
            raise OSError(errno.EXDEV, 'Invalid cross-device link')
        monkeypatch.setattr(os, 'link', refuse)
    for content in ('first', 'second'):
        source.write_text(content) if not source.exists() else None
        outdir.link(source, target)
        assert target.read_text() == content
        (tmp_path / 'new').write_text('second')
        os.replace(tmp_path / 'new', source)
        assert target.read_text() == content
    outdir.link(tmp_path / 'nowhere', tmp_path / 'nothing')
    assert not (tmp_path / 'nothing').exists()
