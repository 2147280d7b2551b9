"""Public image sets for who has not got them: fetched when asked for, checked against known digests, kept in a cache.

The digests are those of the files as their authors gave them out, as many loaders hold them; PyTorch's loader and the
page of Fashion-MNIST give the MD5 of the same files. Files are IDX: counts, then plain bytes; nothing is unpickled.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dropkit.errors import MissingPackageError, OptionError, OutputError, TableError

PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
MOST_BYTES = 1 << 28  # of an unpacked file; the largest of these holds 47 million


@dataclass(frozen=True, slots=True)
class PublicSet:
    """A set of images that anybody may fetch.

    Attributes:
        title: for reports.
        homes: addresses, one tried after the other; the file's name is put behind.
        sha256: of the files, in the order of `PARTS`.
        megabytes: to be fetched.
    """

    title: str
    homes: tuple[str, ...]
    sha256: tuple[str, ...]
    megabytes: int


SETS = {
    "mnist": PublicSet(
        "MNIST",
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",  # the mirror of PyTorch
            "https://storage.googleapis.com/cvdf-datasets/mnist/",  # the mirror of TensorFlow
        ),
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
        12,
    ),
    "fashion_mnist": PublicSet(
        "Fashion-MNIST",
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # no https there; digests are checked
        ),
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        31,
    ),
}


def fetch(
    names: Sequence[str] = tuple(SETS),
    *,
    say: Callable[[str], None] = lambda line: None,
    sets: dict[str, PublicSet] = SETS,
) -> Path:
    """Fetch public image sets into the user's cache; what is there and whole is not fetched again.

    Args:
        names: of `SETS`.
        say: is told what is fetched from where.
        sets: where the sets are.

    Returns:
        The cache, a folder of each set.

    Raises:
        OptionError: no such set.
        MissingPackageError: pooch is not installed.
        OutputError: no address gave the file with its digest, or the cache cannot be written.
    """
    if unknown := [name for name in names if name not in sets]:
        raise OptionError(f"{unknown[0]!r} was given; the sets to fetch are {', '.join(sets)}.")
    if find_spec("pooch") is None:
        raise MissingPackageError(
            "fetching data needs pooch, which is not installed: pip install 'dropkit[claims]'"
        )
    folder = cache()
    for name in names:
        found = sets[name]
        if cached_files(name, sets):
            say(f"{found.title} is in {folder / name}.")
            continue
        say(f"{found.title}, {found.megabytes} MB, from {found.homes[0]}")
        for part, digest in zip(PARTS, found.sha256, strict=True):
            _fetch_file(f"{part}-ubyte.gz", digest, found.homes, folder / name)
    return folder


def cache() -> Path:
    """The folder of what was fetched, where the system keeps caches."""
    import pooch

    return Path(pooch.os_cache("dropkit"))


def cached_files(name: str, sets: dict[str, PublicSet] = SETS) -> tuple[Path, ...]:
    """Images and labels to learn from and to test on, each with its digest checked; () unless all are there."""
    if name not in sets or find_spec("pooch") is None:
        return ()
    files = tuple(cache() / name / f"{part}-ubyte.gz" for part in PARTS)
    whole = all(
        path.is_file() and _digest(path) == digest
        for path, digest in zip(files, sets[name].sha256, strict=True)
    )
    return files if whole else ()


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes from a gzipped IDX file.

    Raises:
        TableError: it is no such file, or a longer or shorter one than its header says.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise TableError(f"{path} cannot be unpacked ({error}). Remove it and fetch it again.") from None
    axes = content[3] if len(content) >= 4 else 0
    shape = np.frombuffer(content, ">u4", count=axes, offset=4) if len(content) >= 4 + 4 * axes else ()
    start = 4 + 4 * axes
    if content[:3] != b"\0\0\x08" or not len(shape) or len(content) - start != np.prod(shape, dtype=object):
        raise TableError(
            f"{path} is not an IDX file of bytes, or not all of it. Remove it and fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(tuple(int(n) for n in shape))


def _fetch_file(name: str, digest: str, homes: Sequence[str], folder: Path) -> None:
    import pooch

    pooch.get_logger().setLevel("ERROR")
    reasons = []
    for home in homes:
        try:
            pooch.retrieve(home + name, f"sha256:{digest}", fname=name, path=folder)
            return
        except (
            Exception
        ) as error:  # pooch, requests and the system have errors of their own; all mean the next home
            reasons.append(f"{home}: {_one_line(error)}")
    raise OutputError(
        f"{name} could not be fetched ({'; '.join(reasons)}). Try again, or put the set into the folder that "
        "DROPKIT_DATA names."
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: Any) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
