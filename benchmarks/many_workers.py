"""Predict a generated table of two million rows with one worker and with two, and compare what they wrote.

python benchmarks/many_workers.py FOLDER [ROWS]

FOLDER is made and must not exist. Prints rows, parts, seconds and the digest of each run; equal digests are equal
files.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from pyarrow import parquet as pq
from torch import nn

import dropkit as dk
from dropkit.engines.ray import predict_dataset

FEATURES, FILES, GROUP = 8, 16, 1 << 16


def write_table(folder: Path, rows: int) -> None:
    """Parquet files of normal numbers, some row groups each."""
    folder.mkdir()
    each = -(-rows // FILES)
    for k, start in enumerate(range(0, rows, each)):
        rng = np.random.default_rng(k)
        count = min(each, rows - start)
        columns = {f"x{i}": rng.standard_normal(count, dtype=np.float32) for i in range(FEATURES)}
        table = pa.table({"id": np.arange(start, start + count), **columns})
        pq.write_table(table, folder / f"{k:03d}.parquet", row_group_size=GROUP)


def main() -> None:
    """Write, predict twice, compare."""
    place, rows = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2_000_000
    place.mkdir()
    write_table(place / "table", rows)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(64, 1),
    )  # fmt: skip
    committee = dk.Committee(model, members=16, seed=0)
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    digests = set()
    for workers in (1, 2):
        start = time.perf_counter()
        done = predict_dataset(
            committee,
            place / "table",
            place / f"by_{workers}",
            columns=[f"x{i}" for i in range(FEATURES)],
            keep=["id"],
            workers=workers,
        )
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in done.path.iterdir())
        print(
            f"{workers} workers: {done.rows} rows, {done.parts} parts, {size} bytes, {seconds:.1f} s, {done.digest}"
        )
        digests.add(done.digest)
    ray.shutdown()
    print("the same files" if len(digests) == 1 else "DIFFERENT FILES")


if __name__ == "__main__":
    main()
