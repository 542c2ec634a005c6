"""The range test: rates rise by a factor, and the suggestion is below the rate at which the loss rises."""

import json
import math

import pytest

from flatgpt import lr_range
from flatgpt.errors import UserError


def curve(edge, noise=0.0, fall=True):
    """A test in which the loss falls with the rate, or stays, and rises steeply beyond edge."""
    test = lr_range.RangeTest()
    for step in range(lr_range.STEPS):
        rate = test.rate(step)
        loss = 4 - (0.3 * min(math.log10(rate / lr_range.LOW), math.log10(edge / lr_range.LOW)) if fall else 0)
        loss += max(math.log10(rate / edge), 0) + noise * math.sin(step * 7.0)
        if test.add(rate, loss):
            break
    return test


def test_rates_rise_by_one_factor_from_the_lowest_to_the_highest():
    test = lr_range.RangeTest()
    rates = [test.rate(step) for step in range(lr_range.STEPS)]
    assert rates[0] == lr_range.LOW and rates[-1] == pytest.approx(lr_range.HIGH)
    assert max(b / a for a, b in zip(rates, rates[1:])) == pytest.approx(min(b / a for a, b in zip(rates, rates[1:])))


@pytest.mark.parametrize('edge', [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize('noise', [0.0, 0.05])
@pytest.mark.parametrize('fall', [True, False])
def test_the_suggestion_is_a_margin_below_where_the_loss_begins_to_rise(edge, noise, fall):
    rate, reason = curve(edge, noise, fall).suggestion()
    assert edge / 3 / lr_range.MARGIN < rate < edge * 3 / lr_range.MARGIN
    assert ('falls to' in reason) == fall and f'{rate * lr_range.MARGIN:.1e}' in reason


def test_a_ruined_loss_ends_the_test_and_is_not_kept():
    test = lr_range.RangeTest()
    assert not test.add(1e-6, 4.0)
    assert test.add(1e-5, math.nan) and test.add(1e-5, math.inf)
    assert test.losses == [4.0]
    assert not any(test.add(1e-4, 5.5) for _ in range(lr_range.NEAR - 1))   # one bad step is not the end
    assert test.add(1e-4, 5.5)


def test_a_loss_that_never_rises_gets_no_suggestion():
    rate, reason = curve(1e9).suggestion()
    assert rate is None and 'does not rise' in reason


def test_without_a_loss_there_is_no_suggestion(tmp_path):
    test = lr_range.RangeTest()
    test.add(1e-6, math.nan)
    assert 'no number from the first steps on' in test.report(tmp_path)


def test_the_curve_is_written_as_json_and_drawn(tmp_path):
    test = curve(1e-2, noise=0.02)
    said = test.report(tmp_path)
    records = [json.loads(line) for line in (tmp_path / 'find_lr.jsonl').read_text().splitlines()]
    assert [record['lr'] for record in records] == test.rates and [r['loss'] for r in records] == test.losses
    assert (tmp_path / 'find_lr.png').read_bytes().startswith(b'\x89PNG')
    rate, reason = test.suggestion()
    assert f'--learning_rate={rate:.1e}' in said and reason in said and 'find_lr.png' in said


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match='cannot write .*find_lr.jsonl'):
        curve(1e-2).report(tmp_path / 'gone')
