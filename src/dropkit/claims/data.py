"""The data sets of the experiments: a folder of shared sets, then the user's cache, then scikit-learn's own.

DROPKIT_DATA names the folder; without it `../shared/data` beside the working directory's repository is looked at.
The cache is what `dropkit claims --fetch` filled. Nothing is fetched at import, and nothing without being asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dropkit.claims.fetching import SETS, cached_files, read_idx
from dropkit.errors import OptionError

IMAGES = {"mnist": "mnist/mnist_full.npz", "fashion_mnist": "fashion_mnist/fashion_10k_2k.npz"}
UCI = ("boston", "concrete", "energy", "wine", "power", "kin8nm")


@dataclass(frozen=True, slots=True)
class Images:
    """Images of classes.

    Attributes:
        x_train, x_test: (N, pixels) float32 in [0, 1].
        y_train, y_test: (N,) int64.
        name: what they are, for the report; says so where a smaller set stands in.
        side: pixels along an edge.
    """

    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    name: str
    side: int


@dataclass(frozen=True, slots=True)
class Table:
    """A regression table with its splits.

    Attributes:
        x: (N, D) float64; y: (N,) float64, both in their own units.
        splits: pairs of row numbers, to learn from and to test on.
        name: for the report.
        published: {column: (splits,)} of the source's own results per split; empty where there are none.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    splits: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    name: str
    published: dict[str, NDArray[np.float64]]


def shared_folder() -> Path | None:
    """The folder of shared data sets, or None where there is none."""
    folder = Path(os.environ.get("DROPKIT_DATA", Path.cwd().parent / "shared" / "data"))
    return folder if folder.is_dir() else None


def images(name: Literal["mnist", "fashion_mnist"]) -> Images:
    """MNIST or Fashion-MNIST; scikit-learn's digits (1 797 of 8 x 8 pixels) where neither folder nor cache has it."""
    if name not in IMAGES:
        raise OptionError(f"{name!r} was given; the sets of images are {', '.join(IMAGES)}.")
    folder = shared_folder()
    path = folder / IMAGES[name] if folder else None
    if path is None or not path.is_file():
        return _cached(name) or _digits(name)
    with np.load(path, allow_pickle=False) as file:
        parts = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    said = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST (10 000 + 2 000 images, a split of our own)"}
    return Images(
        _pixels(parts["x_train"], 255), parts["y_train"].astype(np.int64),
        _pixels(parts["x_test"], 255), parts["y_test"].astype(np.int64),
        said[name], parts["x_train"].shape[-1],
    )  # fmt: skip


def table(name: str) -> Table:
    """A UCI regression set with its 20 published splits; scikit-learn's diabetes set where it is not there."""
    if name not in UCI:
        raise OptionError(f"{name!r} was given; the tables are {', '.join(UCI)}.")
    folder = shared_folder()
    here = folder / "uci_regression" / name if folder else None
    if here is None or not here.is_dir():
        return _diabetes(name)
    path = here / ("data.txt.gz" if (here / "data.txt.gz").is_file() else "data.txt")
    rows = np.loadtxt(path)
    with np.load(here / "splits.npz", allow_pickle=False) as file:
        parts = {key: file[key] for key in file.files}
    splits = tuple(
        (train.astype(np.int64), test.astype(np.int64))
        for train, test in zip(parts["train"], parts["test"], strict=True)
    )
    published = np.genfromtxt(here / "published_per_split_100x.csv", delimiter=",", names=True)
    return Table(
        rows[:, parts["index_features"]], rows[:, int(parts["index_target"][0])], splits, name,
        {column: np.asarray(published[column], np.float64) for column in published.dtype.names or ()},
    )  # fmt: skip


def fingerprint() -> str:
    """Names and sizes of the files that the experiments would read here, as a digest.

    Contents are not read: the folder may be large. Results that are kept know by this whether the data changed.
    """
    folder = shared_folder()
    found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    shared = [(path.relative_to(folder or path).as_posix(), path.stat().st_size) for path in found]
    cached = [name for name in SETS if cached_files(name)]
    return hashlib.sha256(json.dumps([shared, cached]).encode()).hexdigest()


def _cached(name: str) -> Images | None:
    """The set that was fetched, with its own split; None where it was not."""
    files = cached_files(name)
    if not files:
        return None
    parts = [read_idx(path) for path in files]
    said = SETS[name].title
    x_train, y_train, x_test, y_test = parts
    return Images(
        _pixels(x_train, 255), y_train.astype(np.int64), _pixels(x_test, 255), y_test.astype(np.int64), said,
        x_train.shape[-1],
    )  # fmt: skip


def _pixels(x: NDArray[Any], top: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(x.reshape(len(x), -1), np.float32) / np.float32(top)


def _digits(wanted: str) -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    train, test = order[:1297], order[1297:]
    x, y = _pixels(found.data, 16), found.target.astype(np.int64)
    name = f"scikit-learn's digits in place of {wanted}, whose file is not here"
    return Images(x[train], y[train], x[test], y[test], name, 8)


def _diabetes(wanted: str) -> Table:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    splits = []
    for split in range(20):
        order = np.random.default_rng([0, split]).permutation(len(y))
        splits.append((np.sort(order[44:]), np.sort(order[:44])))
    name = f"scikit-learn's diabetes in place of {wanted}, whose file is not here"
    return Table(x.astype(np.float64), y.astype(np.float64), tuple(splits), name, {})
