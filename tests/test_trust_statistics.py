"""Are the bits of masks what chance would give? All tests together raise a false alarm once in a million runs.

Seeds are fixed, so an alarm is not chance that comes and goes. Each statistic is shown to find the fault it is there
for: the same numbers, computed from a generator with the fault planted in it.
"""

from __future__ import annotations

import numpy as np
import pytest

import bit_statistics as bits
from faulty_bits import DROPKIT, FAULTS, Address, with_fault

COUNT = 30_000  # p-values of a run, at least; what the faults' alarms are measured by


def finds(statistic: str, source) -> bool:
    """Whether one statistic alone gives an alarm at the rate of the whole run."""
    compute = getattr(bits, statistic.partition(":")[0].replace(" ", "_"))
    return any(o.p < bits.RATE / COUNT for o in compute(source) if o.statistic == statistic)


def test_the_masks_are_what_chance_would_give():
    """False alarms: 1e-6 for all p-values together."""
    run = bits.outcomes(DROPKIT)
    assert len(run) >= COUNT
    assert bits.alarms(run) == []


def test_p_values_are_spread_as_they_should_be():
    """A test that always passes would show here: exact p-values are hardly larger than uniform ones, never smaller."""
    values = np.array([outcome.p for outcome in bits.avalanche(DROPKIT)])
    for level in (0.5, 0.1, 0.01, 0.001):
        share = (values <= level).mean()
        assert 0.75 * level < share < level + 6 * np.sqrt(level / len(values))


@pytest.mark.parametrize(("fault", "statistic"), FAULTS.items())
def test_a_planted_fault_is_found(fault, statistic):
    assert finds(statistic, with_fault(fault))


@pytest.mark.parametrize("rounds", [3, 4, 5, 6])
def test_fewer_rounds_are_found(rounds):
    """From 7 rounds on nothing is seen, as the authors of Philox say of batteries of tests; masks have 10."""
    assert finds("avalanche", with_fault(rounds=rounds))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 5e-6, 1.0])
def test_without_a_fault_the_generator_is_dropkit(p):
    """So that what the faults are planted in is the thing itself."""
    source = with_fault()
    for where in bits.addresses("no fault", 8):
        for turned in (False, True):
            ours, theirs = (s.keep(where, 5, 77, p, turned) for s in (DROPKIT, source))
            assert np.array_equal(ours, theirs)
    called = Address(site="layers.3", call=2)
    assert np.array_equal(DROPKIT.keep(called, 2, 100, 0.5, False), source.keep(called, 2, 100, 0.5, False))


def test_the_exact_p_value_is_the_binomial_sum():
    """By hand: 10 throws of a fair coin, 1 head; P(<= 1) = 11 / 1024."""
    assert bits.two_sided(1, 10, 0.5) == pytest.approx(2 * 11 / 1024)
    assert bits.two_sided(9, 10, 0.5) == pytest.approx(2 * 11 / 1024)
    assert bits.two_sided(5, 10, 0.5) == 1
