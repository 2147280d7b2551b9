"""A third-party battery of randomness tests, dieharder, on the bits that masks are made of.

Every field of the address in turn runs fastest: neighbouring blocks of the stream differ by one in the feature, the
sample, the step, the member, the seed, or stand at the next layer's name. So the battery sees the neighbours that a
training run sees, and not only one long stream, which any generator of quality passes.

    python benchmarks/battery.py run --out docs/battery.txt     all streams through all tests, and the summary
    python benchmarks/battery.py stream step | dieharder -g 200 -a      one stream for any other program

dieharder is in Debian and Ubuntu: apt-get install dieharder.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numba import njit

from dropkit.masks.address import NOISE, SCHEME, signed, site_hash, site_key
from dropkit.masks.philox import (
    LANES,
    MULTIPLIER_0,
    MULTIPLIER_1,
    ROUNDS,
    WEYL_0,
    WEYL_1,
    WORD,
    lanes,
)

Array = np.ndarray[Any, Any]

FIELDS = ("feature", "sample", "step", "member", "site", "seed")
CONTROL = (
    "AES"  # not a field: dieharder's own generator, to see what the tests say of bits that nobody doubts
)
SITES = (
    1 << 20
)  # names that are hashed before the stream begins; then the next eight features, and the names again
MEMBERS = 1 << 24
CHUNK = 1 << 16  # blocks of 16 bytes made at a time
BASE = {"seed": 20140615, "site": "encoder.layers.0.dropout", "sample": 0, "step": 0, "member": 0}


class Test(NamedTuple):
    """One call of dieharder: its number, what it is called here, and further options."""

    number: int
    name: str
    options: tuple[str, ...] = ()


# Of the tests that dieharder calls good, those that take seconds a stream. Left out: OPSO, OQSO and DNA (suspect by its
# own list), sums (not to be used, by the same), minimum distances in several dimensions, lagged sums beyond 4, bit
# distributions and permutations of other lengths. The number of p-samples is never below the default: at 20, dieharder
# gives too many p-values near 1, to AES and the Mersenne twister as well.
TESTS = (
    Test(0, "birthdays"),
    Test(1, "permutations, overlapping"),
    Test(2, "rank of 32 x 32"),
    Test(3, "rank of 6 x 8"),
    Test(4, "bitstream"),
    Test(8, "count the ones, stream"),
    Test(9, "count the ones, byte"),
    Test(10, "parking lot"),
    Test(11, "minimum distance, 2 d"),
    Test(12, "minimum distance, 3 d"),
    Test(13, "squeeze"),
    Test(15, "runs"),
    Test(16, "craps"),
    Test(17, "greatest common divisor", ("-t", "1000000")),
    Test(100, "monobit"),
    Test(101, "runs of bits"),
    Test(102, "serial"),
    Test(200, "bit distribution, 8", ("-n", "8")),
    Test(202, "permutations of 5", ("-n", "5")),
    Test(203, "lagged sum, 1", ("-n", "1")),
    Test(203, "lagged sum, 4", ("-n", "4")),
    Test(204, "Kolmogorov and Smirnov"),
    Test(205, "bytes"),
    Test(206, "cosine transform"),
    Test(207, "fill tree"),
    Test(208, "fill tree 2"),
    Test(209, "monobit 2"),
)


@njit
def _philox(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int, rounds: int) -> tuple[int, int, int, int]:
    word, half = np.uint64(WORD), np.uint64(32)
    for _ in range(rounds):
        product_0, product_1 = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
        c0, c1, c2, c3 = (
            (product_1 >> half) ^ c1 ^ k0,
            product_1 & word,
            (product_0 >> half) ^ c3 ^ k1,
            product_0 & word,
        )
        k0, k1 = (k0 + np.uint64(WEYL_0)) & word, (k1 + np.uint64(WEYL_1)) & word
    return c0, c1, c2, c3


@njit(nogil=True)
def _fill(
    out: Array, block: Array, sample: Array, step: Array, member: Array, key: Array, rounds: int
) -> None:
    """Blocks of four words at the addresses given, (n, 4) uint32; the definition is `dropkit.masks.philox.lanes`."""
    word, half = np.uint64(WORD), np.uint64(32)
    for i in range(len(out)):
        c3 = (sample[i] >> half) | (member[i] << np.uint64(8))
        words = _philox(block[i], sample[i] & word, step[i], c3, key[i] & word, key[i] >> half, rounds)
        for j in range(4):
            out[i, j] = words[j]


@njit(nogil=True)
def _keys(out: Array, site: Array, seed: Array) -> None:
    """`site_key` of many sites and seeds."""
    word, half = np.uint64(WORD), np.uint64(32)
    scheme, purpose = np.uint64(SCHEME), np.uint64(NOISE)
    for i in range(len(out)):
        low, high, _, _ = _philox(
            site[i] & word, site[i] >> half, scheme, purpose, seed[i] & word, seed[i] >> half, ROUNDS
        )
        out[i] = low | high << half


@lru_cache(maxsize=1)
def _names() -> Array:
    """Hashes of the sites `layers.0.dropout`, `layers.1.dropout` and so on."""
    return np.array([site_hash(f"layers.{i}.dropout") for i in range(SITES)], np.uint64)


def _addresses(field: str) -> Iterator[dict[str, Array]]:
    """Chunks of addresses in the order of the stream; without end but for the range of the field."""
    site = site_hash(str(BASE["site"]))
    sites = _names() if field == "site" else None
    first = 0
    while True:
        i = np.arange(first, first + CHUNK, dtype=np.uint64)
        first += CHUNK
        rest = {
            name: np.full(CHUNK, int(BASE[name]), np.uint64) for name in ("seed", "sample", "step", "member")
        }
        rest |= {"block": np.zeros(CHUNK, np.uint64), "site": np.full(CHUNK, site, np.uint64)}
        if field == "feature":
            rest["block"] = i % np.uint64(1 << 31)
        elif field == "member":
            rest["member"], rest["block"] = i % np.uint64(MEMBERS), i // np.uint64(MEMBERS)
        elif sites is not None:
            rest["site"], rest["block"] = sites[i % np.uint64(SITES)], i // np.uint64(SITES)
        else:
            rest[field] = i
        yield rest


def stream(field: str, rounds: int = ROUNDS) -> Iterator[Array]:
    """The bits of masks, block after block, (CHUNK, 4) uint32, with one field of the address running fastest."""
    key = np.empty(CHUNK, np.uint64)
    for where in _addresses(field):
        out = np.empty((CHUNK, 4), np.uint32)
        _keys(key, where["site"], where["seed"])
        _fill(out, where["block"], where["sample"], where["step"], where["member"], key, rounds)
        yield out


def check(field: str) -> None:
    """Compare a stream's first blocks with the definition of the masks; it must be dropkit's bits that are tested."""
    where, bits = next(_addresses(field)), next(stream(field)).view(np.uint16)
    for i in (0, 1, 2, 77, CHUNK - 1):
        number = {name: int(values[i]) for name, values in where.items()}
        site = site_hash(f"layers.{i}.dropout") if field == "site" else number["site"]
        key = torch.tensor(signed(site_key(number["seed"], site)))
        sample, member = torch.tensor([number["sample"]]), torch.tensor(number["member"])
        expected = lanes(key, member, sample, number["step"], LANES * (number["block"] + 1))[0, -LANES:]
        if bits[i].tolist() != expected.tolist():
            raise SystemExit(f"battery: the stream of {field} is not the bits of the masks at block {i}.")


def feed(pipe: IO[bytes] | None, field: str, rounds: int) -> None:
    """Write the stream into a pipe until its reader has enough."""
    if pipe is None:
        return
    with contextlib.suppress(BrokenPipeError):
        for words in stream(field, rounds):
            pipe.write(memoryview(words).cast("B"))


def measure(field: str, test: Test, rounds: int) -> list[list[str]]:
    """Rows [ntuple, tsamples, psamples, p-value, assessment] of one test on a fresh stream."""
    generator = ["-g", "205", "-S", "1"] if field == CONTROL else ["-g", "200"]
    command = ["dieharder", *generator, "-d", str(test.number), *test.options, "-c", ","]
    with tempfile.TemporaryFile("w+") as report:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=report) as battery:
            if field != CONTROL:
                feed(battery.stdin, field, rounds)
        if battery.returncode:
            raise SystemExit(f"battery: {' '.join(command)} ended with status {battery.returncode}.")
        report.seek(0)
        text = report.read()
    lines = [line.split(",") for line in text.splitlines() if line.count(",") == 5 and "p-value" not in line]
    return [[part.strip() for part in line[-5:]] for line in lines]


def summarise(rows: list[tuple[str, str, list[str]]]) -> str:
    """For each stream how many p-values there are, how they are spread, and what dieharder calls them."""
    text = ["fastest  p-values  passed  weak  failed  smallest  largest     in tenths of [0, 1]"]
    for field in dict.fromkeys(row[0] for row in rows):
        own = [row[2] for row in rows if row[0] == field]
        values, verdicts = np.array([float(row[3]) for row in own]), [row[4] for row in own]
        tenths = " ".join(f"{count:2}" for count in np.histogram(values, 10, (0, 1))[0])
        text.append(
            f"{field:8} {len(own):8} {verdicts.count('PASSED'):7} {verdicts.count('WEAK'):5} "
            f"{verdicts.count('FAILED'):7}  {values.min():8.6f}  {values.max():.8f}  {tenths}"
        )
    return "\n".join(text)


def run(out: Path, fields: list[str], rounds: int, workers: int) -> int:
    """All tests on all streams; 1 where one failed."""
    if shutil.which("dieharder") is None:
        raise SystemExit(
            "battery: dieharder is not installed; on Debian or Ubuntu: apt-get install dieharder"
        )
    for field in fields:
        if field != CONTROL:
            check(field)
    began = time.monotonic()
    rows: list[tuple[str, str, list[str]]] = []
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            (field, test, pool.submit(measure, field, test, rounds)) for field in fields for test in TESTS
        ]
        for field, test, job in jobs:
            for row in job.result():
                rows.append((field, test.name, row))
                print(f"{field:8} {test.name:26} {' '.join(row)}", flush=True)
    head = [
        "dieharder on the bits of dropkit's masks; every field of the address runs fastest in a stream of its own.",
        f"{datetime.now(UTC):%Y-%m-%d}  Philox4x32-{rounds}  scheme {SCHEME}  {platform.machine()}  "
        f"{time.monotonic() - began:.0f} s on {workers} core{'s' if workers > 1 else ''}",
        "dieharder calls a p-value weak below 0.005 or above 0.995, and failed below 0.000001 or above 0.999999.",
        "",
        summarise(rows),
        "",
        f"{'fastest':8} {'test':26} {'ntuple':>6} {'tsamples':>9} {'psamples':>8} {'p-value':>11}  assessment",
    ]
    body = [
        f"{field:8} {name:26} {row[0]:>6} {row[1]:>9} {row[2]:>8} {row[3]:>11}  {row[4]}"
        for field, name, row in rows
    ]
    out.write_text("\n".join([*head, *body]) + "\n")
    print(summarise(rows))
    return int(any(row[4] == "FAILED" for _, _, row in rows))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("stream", help="write one stream to standard output")
    writing.add_argument("field", choices=FIELDS)
    writing.add_argument("--rounds", type=int, default=ROUNDS, help="fewer than 10 are a planted fault")
    running = commands.add_parser("run", help="all tests on all streams")
    running.add_argument("--out", type=Path, required=True, help="where the log goes")
    running.add_argument("--fields", nargs="+", choices=[*FIELDS, CONTROL], default=[*FIELDS, CONTROL])
    running.add_argument("--rounds", type=int, default=ROUNDS, help="fewer than 10 are a planted fault")
    running.add_argument("--workers", type=int, default=1, help="cores to use")
    given = parser.parse_args()
    if given.command == "stream":
        feed(sys.stdout.buffer, given.field, given.rounds)
        sys.stderr.close()  # the reader has gone; the interpreter would complain of the pipe
        return 0
    return run(given.out, given.fields, given.rounds, given.workers)


if __name__ == "__main__":
    sys.exit(main())
