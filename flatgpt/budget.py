"""How many steps fit into --max_minutes: the first steps of a run are timed, then the number of steps is set."""

import bisect
import time

WARMUP = 3       # first steps that are not timed: memory is allocated, kernels are built
LEAST = 10       # steps to time
SHARE = 0.04     # and at least this share of the minutes, because a step's time varies
MOST = 0.10      # but no more than this share, if a step is slow
MARGIN = 0.03    # share of the minutes that is not planned, for steps that turn out slower
AT_EXIT = 2.0    # seconds for the picture of the losses and the end of the process


def duration(seconds: float) -> str:
    """Return seconds as people say them, rounded: '45 s', '12 min', '3.5 h', '2.1 days'."""
    for unit, length in (('days', 86400), ('h', 3600)):
        if seconds >= 2 * length:
            return f'{seconds / length:.1f} {unit}'
    return f'{seconds / 60:.0f} min' if seconds >= 120 else f'{seconds:.0f} s'


class Budget:
    """Times the parts of a run and tells how many steps fit into its minutes.

    minutes: for the whole run, with the start of the process, evaluations and saves. None: no limit. begun: what the
    clock showed when the run began; for a resumed run, earlier by what its first part took. mean: a function that
    returns the mean of a number over the processes, so that all set the same number of steps. clock: returns seconds.
    splits: how many splits are evaluated each time.
    """

    def __init__(self, minutes, begun, mean=float, clock=time.perf_counter, splits=2):
        self.seconds = None if minutes is None else 60 * minutes
        self.begun = begun
        self.mean = mean
        self.clock = clock
        self.splits = splits
        self.started = begun
        self.first_logged = None   # (step, what the clock showed then)
        self.times = {'step': [], 'evaluation': [], 'save': []}   # seconds of each

    @property
    def measuring(self):
        """Whether the number of steps is still to be set."""
        return self.seconds is not None

    def start(self):
        """Start to time one part."""
        self.started = self.clock()

    def stop(self, part):
        """Count the seconds since start() as one 'step', one 'evaluation' of a split, or one 'save'."""
        self.times[part].append(self.clock() - self.started)

    def time_left(self, step, end):
        """Return ', 12 min left' for the log line of a step that has just ended, in a run of `end` steps, at the pace
        since the first such line; '' in that line, and as long as the number of steps is still to be set."""
        now = self.clock()
        if self.first_logged is None:   # after the first step, which also allocates memory and compiles
            self.first_logged = step, now
        first_step, then = self.first_logged
        if self.measuring or step == first_step:
            return ''
        return f', {duration((end - step - 1) * (now - then) / (step - first_step))} left'

    def steps_that_fit(self, step, most, eval_interval, seconds_to_write=0.0):
        """Return the number of steps of the whole run, of which `step` are made: at least these, at most `most`; None
        if too few steps are timed yet. After it has returned a number it measures no more.

        The steps left, an evaluation with a save each eval_interval steps and one at the end, and the seconds to write
        the last checkpoint fit into what is left of the minutes.
        """
        steps = self.times['step']
        counted = steps[WARMUP:]
        timed = self.mean(sum(counted))
        used = self.mean(self.clock() - self.begun)
        enough = len(counted) >= LEAST and timed >= SHARE * self.seconds
        slow = self.mean(sum(steps[1:])) >= MOST * self.seconds or used >= 0.5 * self.seconds
        if not (enough or slow or step >= most):
            return None
        counted = counted or steps[1:] or steps   # the first step compiles
        per_step = self.mean(sum(counted) / len(counted))
        evaluation = self.splits * self.mean(min(self.times['evaluation'], default=0.0))
        evaluation += self.mean(min(self.times['save'], default=0.0))
        left = (1 - MARGIN) * self.seconds - used - self.mean(seconds_to_write) - AT_EXIT

        def cost(total):
            """Seconds from now to the end of a run of so many steps."""
            evaluations = (total - 1) // eval_interval - (step - 1) // eval_interval + 1
            return (total - step) * per_step + evaluations * evaluation

        fit = bisect.bisect_right(range(step + 1, most + 1), left, key=cost)   # the cost rises with the steps
        self.seconds = None
        return step + fit
