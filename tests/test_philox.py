"""The bits: known answers, an independent oracle, and the rule from a rate to a threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from randomgen import Philox

from dropkit.masks import cpu
from dropkit.masks.philox import bernoulli_keep, lanes, philox_4x32, philox_rounds, survivor_scale, threshold

VECTORS = Path(__file__).parent / "vectors" / "philox.txt"
KNOWN_ANSWERS = [
    [int(word, 16) for word in line.split()]
    for line in VECTORS.read_text().splitlines()
    if line and not line.startswith("#")
]
words = st.integers(0, 2**32 - 1)
probabilities = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 2.0**-16, 2.0**-17]), st.floats(0, 1), st.floats(0, 2.0**-15)
)


def reference(answer: list[int], rounds: int = 10) -> list[int]:
    return philox_4x32(torch.tensor(answer[:4]), torch.tensor(answer[4:6]), rounds).tolist()


def python_integers(answer: list[int]) -> list[int]:
    return list(philox_rounds(*answer[:4], *answer[4:6]))


def numba_kernel(answer: list[int]) -> list[int]:
    c0, c1, c2, c3, k0, k1 = (np.uint64(word) for word in answer[:6])
    block = np.full(cpu.BATCH, c0)
    sample = np.full(cpu.BATCH, c1 | (c3 & np.uint64(0xFF)) << np.uint64(32))
    out = np.empty(2 * cpu.BATCH, np.uint64)
    cpu._philox_batch(block, sample, k0 | k1 << np.uint64(32), c3 >> np.uint64(8), c2, out)
    return out.view(np.uint32)[-4:].tolist()  # the last counter of the batch


@pytest.mark.parametrize("implementation", [reference, python_integers, numba_kernel])
@pytest.mark.parametrize("answer", KNOWN_ANSWERS)
def test_known_answers(implementation, answer):
    assert implementation(answer) == answer[6:]


def test_known_answers_would_catch_a_missing_round():
    assert all(reference(answer, rounds=9) != answer[6:] for answer in KNOWN_ANSWERS)


@pytest.mark.parametrize("implementation", [reference, python_integers, numba_kernel])
@given(counter=st.tuples(words, words, words, words), key=st.tuples(words, words))
def test_an_independent_philox_agrees(implementation, counter, key):
    number = sum(word << 32 * i for i, word in enumerate(counter))
    # The oracle counts up before it draws.
    oracle = Philox(counter=(number - 1) % 2**128, key=key[0] | key[1] << 32, number=4, width=32)
    assert implementation([*counter, *key]) == [int(word) for word in oracle.random_raw(4)]


def test_lanes_are_the_blocks_halves_in_order():
    words_of_block = reference(KNOWN_ANSWERS[0])
    zero = torch.tensor(0)
    got = lanes(zero, zero, torch.zeros(1, dtype=torch.int64), 0, 8)[0].tolist()
    assert got == [half for word in words_of_block for half in (word & 0xFFFF, word >> 16)]


@given(p=probabilities)
def test_the_rate_used_is_close_and_the_scale_is_its_own(p):
    t, fine = threshold(torch.tensor(p, dtype=torch.float64))
    used = int(fine) / 2**32 if fine else int(t) / 2**16
    assert abs(used - p) <= (2.0**-33 if fine else 2.0**-17)
    assert float(survivor_scale(torch.tensor(p, dtype=torch.float64))) * (1 - used) == pytest.approx(
        float(used < 1), abs=1e-15
    )


def test_rates_zero_and_one_are_exact():
    key, member, rows = torch.tensor(7), torch.tensor(0), torch.arange(64)
    keep = [
        bernoulli_keep(key, member, rows, 0, 1000, torch.tensor(p, dtype=torch.float64)) for p in (0.0, 1.0)
    ]
    assert keep[0].all()
    assert not keep[1].any()


@given(p=st.floats(0, 1), q=st.floats(0, 1), seed=st.integers(-(2**63), 2**63 - 1))
def test_a_higher_rate_keeps_the_dropped_set(p, q, seed):
    low, high = sorted((p, q))
    key, member, rows = torch.tensor(seed), torch.tensor(3), torch.arange(4)
    few, many = (
        bernoulli_keep(key, member, rows, 5, 40, torch.tensor(r, dtype=torch.float64)) for r in (low, high)
    )
    assert not (many & ~few).any()
