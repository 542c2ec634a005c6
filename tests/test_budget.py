"""--max_minutes: how many steps fit, by a clock of the test's own, and that a run ends, decays and resumes by them."""

import itertools
import threading

import pytest
import torch
from conftest import log_of, run
from hypothesis import given, settings
from hypothesis import strategies as st

from flatgpt.budget import Budget, duration


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def simulate(minutes, step_seconds, evaluation=0.0, save=0.0, write=0.0, start_up=0.0, eval_interval=10**9, most=10**6,
             splits=2):
    """(number of steps that were set, step at which they were set, seconds of the whole run) of a run whose parts take
    so many seconds; step_seconds is a list, whose last value all later steps take."""
    clock = Clock()
    budget = Budget(minutes, clock.now, clock=clock, splits=splits)
    clock.now += start_up
    total, set_at, step = most, None, 0

    def spend(part, seconds):
        budget.start()
        clock.now += seconds
        budget.stop(part)

    while True:
        if step >= total or step % eval_interval == 0:
            for _ in range(splits):
                spend('evaluation', evaluation / splits)
            spend('save', save)
        if step >= total:
            break
        spend('step', step_seconds[min(step, len(step_seconds) - 1)])
        step += 1
        if budget.measuring:
            fit = budget.steps_that_fit(step, most, eval_interval, write)
            if fit is not None:
                total, set_at = fit, step
    return total, set_at, clock.now + write - 100.0


def test_evaluations_are_counted_once_for_each_split():
    runs = [simulate(2, [0.125], evaluation=2.0, eval_interval=100, splits=splits) for splits in (1, 2)]
    assert runs[0] == runs[1]


def test_a_run_ends_within_its_minutes_and_uses_most_of_them():
    total, set_at, seconds = simulate(2, [5.0, 0.125], evaluation=2.0, save=0.5, write=1.0, start_up=4.0,
                                      eval_interval=100)
    assert set_at == 3 + 39   # after the warm-up, 4 % of 120 s in steps of 0.125 s
    assert 0.9 * 120 < seconds < 120
    assert 600 < total < 900


@settings(deadline=None, max_examples=25, database=None)
@given(st.floats(0.5, 600), st.floats(1e-3, 0.02), st.floats(0, 0.05), st.floats(0, 0.02), st.floats(0, 0.05),
       st.floats(0, 0.1), st.integers(1, 10_000))
def test_any_run_ends_within_its_minutes(minutes, step, evaluation, save, write, start_up, eval_interval):
    """Steps, evaluations, saves and the start take these shares of the minutes. One evaluation more than the steps it
    is for may take all of the time; so the interval is such that they take a quarter of it at most."""
    unit = 60 * minutes
    interval = max(eval_interval, round(4 * (evaluation + save) / step) + 1)
    total, set_at, seconds = simulate(minutes, [5 * step * unit, step * unit], evaluation * unit, save * unit,
                                      write * unit, start_up * unit, interval)
    assert set_at <= total
    if total > set_at:
        assert seconds <= unit
        one_more = unit * (step + evaluation + save)
        assert seconds > 0.97 * unit - 2.0 - one_more - 1e-6   # all but the margin and the exit are used


@pytest.mark.parametrize('part', ['evaluation', 'save', 'write', 'start_up'])
def test_each_part_of_a_run_takes_time_from_the_steps(part):
    less, more = (simulate(1, [0.1], eval_interval=100, **{part: seconds})[0] for seconds in (0.0, 5.0))
    assert more < less - 40


def test_the_first_steps_do_not_count_because_they_are_slow():
    slow_start = simulate(1, [1.0, 1.0, 1.0, 0.05])[0]
    assert slow_start == pytest.approx(simulate(1, [0.05])[0] - 3 * 0.95 / 0.05, abs=2)


@pytest.mark.parametrize(('step_seconds', 'expected'), [([7.0], (8, 2)), ([30.0], (2, 2)), ([300.0], (1, 1))])
def test_slow_steps_are_believed_early_and_a_run_has_no_fewer_than_it_has_made(step_seconds, expected):
    total, set_at, _ = simulate(1.05, step_seconds)
    assert (total, set_at) == expected


def test_max_iters_stays_the_limit():
    assert simulate(10, [0.001], most=50)[:2] == (50, 50)
    assert simulate(10, [0.1], most=2000)[0] == 2000


def test_without_minutes_nothing_is_measured():
    assert not Budget(None, 0.0).measuring


def test_processes_set_the_same_number_from_the_mean_of_their_times():
    """Two threads stand for two processes, of which one is three times as fast; each waits for the other's value."""
    barrier, values, found = threading.Barrier(2, timeout=10), [0.0, 0.0], [0, 0]

    def process(rank, seconds):
        def mean(value):
            values[rank] = value
            barrier.wait()
            result = sum(values) / 2
            barrier.wait()   # both have read before either writes again
            return result

        clock = Clock()
        budget = Budget(1, clock.now, mean, clock)
        for step in itertools.count(1):
            budget.start()
            clock.now += seconds
            budget.stop('step')
            found[rank] = budget.steps_that_fit(step, 10**6, 10**6)
            if found[rank]:
                return

    threads = [threading.Thread(target=process, args=args) for args in ((0, 0.1), (1, 0.3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == pytest.approx(simulate(1, [0.2])[0], abs=2)


@pytest.mark.parametrize('seconds, text', [(0, '0 s'), (45.4, '45 s'), (119, '119 s'), (125, '2 min'),
                                           (7000, '117 min'), (7200, '2.0 h'), (100_000, '27.8 h'),
                                           (200_000, '2.3 days')])
def test_a_duration_is_short(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_is_at_the_pace_since_the_first_line():
    clock = Clock()
    budget = Budget(None, clock.now, clock=clock)
    told = []
    for step, seconds in ((5, 60.0), (6, 2.0), (10, 14.0), (19, 9.0)):   # the first step compiles
        clock.now += seconds
        told.append(budget.time_left(step, 20))
    assert told == ['', ', 26 s left', ', 29 s left', ', 0 s left']


def test_no_time_is_left_to_tell_until_the_steps_are_planned():
    clock = Clock()
    budget = Budget(1, clock.now, clock=clock)
    assert [budget.time_left(step, 20) for step in (0, 1, 2)] == [''] * 3
    budget.seconds = None
    clock.now += 3.0
    assert budget.time_left(3, 20) == ', 16 s left'


# ---------------------------------------------------------------------------------------------------------------------
# in train.py: each update takes one second of the clock

@pytest.fixture
def clock(tmp_path):
    """A config file that gives train.py's budget a clock, on which the start takes ten seconds and each step one."""
    path = tmp_path / 'clock.py'
    path.write_text('from flatgpt import budget\nfrom flatgpt import optim\n'
                    '_now = [0.0]\n_rate_at = optim.learning_rate_at\n\n'
                    'def _with_clock(*args):\n'
                    '    _now[0] += 1.0\n'
                    '    return _rate_at(*args)\n\n'
                    '_init = budget.Budget.__init__\n\n'
                    'def _with_own_clock(self, minutes, begun, mean):\n'
                    '    _init(self, minutes, -10.0, mean, lambda: _now[0])\n\n'
                    'optim.learning_rate_at = _with_clock\nbudget.Budget.__init__ = _with_own_clock\n')
    return path


def rates(out_dir):
    return [record['lr'] for record in log_of(out_dir) if 'iter' in record]


def train(*args, status=0):
    done = run('train.py', *args, '--device=cpu', '--peak_flops=1e12')
    assert done.returncode == status, done.stderr
    return done


def test_a_run_with_max_minutes_ends_where_its_schedule_ends_and_resumes_to_the_same_step(tmp_path, tiny, clock):
    """A minute of 60 seconds: ten for the start, 60 * 0.03 in reserve, 2 for the exit, and 13 steps until it is set."""
    out_dir = tmp_path / 'out'
    args = (tiny, clock, f'--out_dir={out_dir}', '--max_minutes=1', '--eval_interval=30', '--max_iters=100000',
            '--min_lr=0.0', '--schedule=linear', '--lr_decay_iters=7', '--warmup_iters=30')
    done = train(*args)
    steps = int(60 * 0.97 - 10 - 2)
    assert f'max_minutes=1: {steps} steps fit' in done.stderr
    found = rates(out_dir)
    assert len(found) == steps
    assert found[0] == pytest.approx(1e-2 / 31)               # the warm-up as asked for, until the number is set
    warmup = steps // 10                                      # then a tenth of the run at most
    assert found[-1] == pytest.approx(1e-2 / (steps - warmup))   # one step before zero
    ckpt = torch.load(out_dir / 'ckpt.pt', weights_only=True)
    assert ckpt['iter_num'] == ckpt['planned'] == steps

    torch.save({**ckpt, 'iter_num': 30, 'evaluated': 30}, out_dir / 'ckpt.pt')   # as if it had been stopped there
    done = train(*args, '--init_from=auto')
    assert 'steps fit' not in done.stderr                     # the number is kept, the schedule too
    assert rates(out_dir) == found
    assert torch.load(out_dir / 'ckpt.pt', weights_only=True)['planned'] == steps

    done = train(*args, '--init_from=resume', '--max_minutes=2')   # more minutes: measured anew
    assert '--max_minutes' not in done.stderr and 'max_minutes=2: ' in done.stderr
    longer = torch.load(out_dir / 'ckpt.pt', weights_only=True)['planned']
    assert longer > steps + 30
