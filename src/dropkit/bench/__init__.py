"""Speed and memory against the peers that are installed: what is timed, how, and what was found."""

from dropkit.bench.record import Bench, Missing, Result, bench_from_json, to_json, to_text
from dropkit.bench.rows import ROWS, choose
from dropkit.bench.run import run_bench, write_bench

__all__ = [
    "ROWS",
    "Bench",
    "Missing",
    "Result",
    "bench_from_json",
    "choose",
    "run_bench",
    "to_json",
    "to_text",
    "write_bench",
]
