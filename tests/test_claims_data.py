"""The data of the claims: a folder, the cache, what comes along; fetched files are checked, and read without trust."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import threading

import numpy as np
import pytest

import claim_examples as examples
from dropkit.claims import (
    data,
    fetch,
)
from dropkit.claims.fetching import PARTS, SETS, PublicSet, cached_files, read_idx
from dropkit.claims.record import Outcome
from dropkit.errors import MissingPackageError, OptionError, OutputError, TableError


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of claims find this folder, and no data that lie somewhere on this machine."""
    monkeypatch.setenv("DROPKIT_DATA", "nowhere")


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file, as its inventors define it."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A public set of tiny images on a server of this machine, and an empty cache."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (30, 4, 4)), rng.integers(0, 10, 30), rng.integers(0, 256, (10, 4, 4)),
        rng.integers(0, 10, 10),
    ]  # fmt: skip
    home = tmp_path / "home"
    (home / "good").mkdir(parents=True)
    (home / "bad").mkdir()
    digests = []
    for part, array in zip(PARTS, arrays, strict=True):
        content = gzip.compress(idx(array), mtime=0)
        (home / "good" / f"{part}-ubyte.gz").write_bytes(content)
        (home / "bad" / f"{part}-ubyte.gz").write_bytes(content[:-1] + b"\1")
        digests.append(hashlib.sha256(content).hexdigest())

    class Handler(http.server.SimpleHTTPRequestHandler):
        asked: list[str] = []  # noqa: RUF012 - counted over all of them

        def __init__(self, *args, **options):
            super().__init__(*args, directory=str(home), **options)

        def do_GET(self):
            self.asked.append(self.path)
            super().do_GET()

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    address = f"http://127.0.0.1:{server.server_port}"
    public = PublicSet("Tiny", (f"{address}/bad/", f"{address}/good/"), tuple(digests), 1)
    yield {"mnist": public}, arrays, Handler.asked
    server.shutdown()
    server.server_close()


def test_a_set_is_fetched_checked_and_read_once(served, monkeypatch):
    sets, arrays, asked = served
    assert data.images("mnist").name.startswith("scikit-learn")
    said: list[str] = []
    folder = fetch(("mnist",), say=said.append, sets=sets)
    assert said[0].startswith("Tiny, 1 MB, from http")
    assert len(asked) == 8  # the first home's files do not have their digests
    files = cached_files("mnist", sets)
    assert [path.parent for path in files] == [folder / "mnist"] * 4
    for path, array in zip(files, arrays, strict=True):
        np.testing.assert_array_equal(read_idx(path), array)
    monkeypatch.setitem(SETS, "mnist", sets["mnist"])
    found = data.images("mnist")
    assert (found.name, found.side) == ("Tiny", 4)
    np.testing.assert_allclose(found.x_train, arrays[0].reshape(30, 16) / 255, rtol=1e-6)
    np.testing.assert_array_equal(found.y_test, arrays[3])
    assert found.x_test.dtype == np.float32
    fetch(("mnist",), say=said.append, sets=sets)
    assert len(asked) == 8
    files[0].write_bytes(files[0].read_bytes()[:-2])
    assert cached_files("mnist", sets) == ()
    assert data.images("mnist").name.startswith("scikit-learn")
    fetch(("mnist",), sets=sets)
    assert len(asked) == 10
    assert len(cached_files("mnist", sets)) == 4


def test_the_folder_of_shared_sets_comes_before_the_cache(served, tmp_path, monkeypatch):
    sets, _, _ = served
    fetch(("mnist",), sets=sets)
    monkeypatch.setitem(SETS, "mnist", sets["mnist"])
    monkeypatch.setenv("DROPKIT_DATA", str(tmp_path / "data"))
    path = tmp_path / "data" / data.IMAGES["mnist"]
    path.parent.mkdir(parents=True)
    images, labels = np.zeros((3, 2, 2), np.uint8), np.zeros(3, np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert (data.images("mnist").name, data.images("mnist").side) == ("MNIST", 2)


def test_what_cannot_be_fetched_says_which_and_why(served, monkeypatch):
    sets, _, _ = served
    bad = dataclasses.replace(sets["mnist"], homes=sets["mnist"].homes[:1])
    with pytest.raises(OutputError, match=r"train-images-idx3-ubyte.gz could not be fetched \(http.*hash"):
        fetch(("mnist",), sets={"mnist": bad})
    with pytest.raises(OptionError, match="'minst' was given; the sets to fetch are mnist"):
        fetch(("minst",), sets=sets)
    with pytest.raises(OptionError, match="sets of images are mnist, fashion_mnist"):
        data.images("minst")
    monkeypatch.setattr("dropkit.claims.fetching.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'dropkit\[claims\]'"):
        fetch(("mnist",), sets=sets)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", b"\0\0\x08\x01\0\0", idx(np.zeros(5)) + b"\0", idx(np.zeros(5))[:-1],
     b"\0\0\x0d" + idx(np.zeros(5))[3:], b"\0\0\x08\0", b"\0\0\x08\x03" + b"\xff" * 12],
)  # fmt: skip
def test_a_file_that_is_no_idx_file_is_refused(tmp_path, content):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(TableError, match="not an IDX file"):
        read_idx(path)
    path.write_bytes(gzip.compress(idx(np.arange(5)))[:-9])
    with pytest.raises(TableError, match="cannot be unpacked"):
        read_idx(path)


def test_public_sets_have_four_digests_and_homes():
    assert set(SETS) == set(data.IMAGES)
    for public in SETS.values():
        assert len(public.sha256) == len(PARTS) == len(set(public.sha256))
        assert all(len(bytes.fromhex(digest)) == 32 for digest in public.sha256)
        assert len(public.homes) == 2


def test_the_outcomes_are_records():
    assert dataclasses.is_dataclass(Outcome)
    with pytest.raises(dataclasses.FrozenInstanceError):
        examples.results().outcomes[0].verdict = "holds"
