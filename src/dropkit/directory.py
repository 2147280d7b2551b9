"""Results on disk: whole or not at all, and verified when read back.

A model, or a committee, is a directory of safetensors and JSON files with a `manifest.json` that states the schema
version and the size and SHA-256 of every other file. It is written beside its place under a temporary name, brought
to disk, and moved there in one step, so that nobody ever sees half a model. The digests show damage and careless
edits; they are no signature, for whoever can change a file can change the manifest too. Reading runs no code from the
directory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dropkit.errors import ModelDirectoryError, OutputError


@dataclass(frozen=True, slots=True)
class Kind:
    """What a directory holds.

    Attributes:
        noun: as people call it.
        schema: version of the layout. It grows when an older release could no longer read the directory.
        writer: what writes it.
        again: what to do about a damaged one.
    """

    noun: str
    schema: int
    writer: str
    again: str

    @property
    def format(self) -> str:
        """What the manifest calls it."""
        return f"dropkit {self.noun}"


MODEL = Kind("model", 1, "dropkit fit", "Copy the model anew or fit again.")
COMMITTEE = Kind("committee", 1, "Committee.save", "Copy the committee anew or save it again.")

MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MOST_MANIFEST = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model directory as read, every byte checked against the manifest.

    Attributes:
        path: the directory.
        schema: version of its layout.
        files: {name: bytes}.
        kind: what it holds.
    """

    path: Path
    schema: int
    files: Mapping[str, bytes]
    kind: Kind = MODEL

    def bytes(self, name: str) -> bytes:
        """The bytes of a file, or say that it is not there."""
        if name not in self.files:
            raise ModelDirectoryError(f"{self.path} has no {name}. {self.kind.again}")
        return self.files[name]

    def json(self, name: str) -> Any:
        """The contents of a JSON file."""
        try:
            return strict_json(self.bytes(name))
        except ValueError as error:
            raise ModelDirectoryError(
                f"{self.path / name} is not valid JSON ({error}). {self.kind.again}"
            ) from None


def write_directory(
    path: str | Path,
    files: Mapping[str, bytes | Path | dict[str, Any] | list[Any]],
    *,
    force: bool = False,
    kind: Kind = MODEL,
) -> Path:
    """Write a directory in one step.

    Args:
        path: the directory; its parent must be there.
        files: {name: contents}: bytes, a file to copy, or plain data that becomes JSON. The manifest is added.
        force: replace a model that is there. The old one stays until the new one is complete; anything that is not a
            dropkit directory of this kind, or holds files that dropkit did not write, is never replaced.
        kind: what it holds.

    Returns:
        The directory.

    Raises:
        OutputError: the path exists, its parent does not, or the disk is full or refuses.
    """
    path = check_directory(path, force=force, kind=kind)
    for name in files:
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"{name!r} is no name for a file of a {kind.noun}")
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        entries = {name: _put(temporary / name, content) for name, content in files.items()}
        manifest = {"format": kind.format, "schema": kind.schema, "files": entries}
        _put(temporary / MANIFEST, manifest)
        temporary.chmod(0o777 & ~_umask())
        _sync_directory(temporary)
        _move_directory(temporary, path)
    except OSError as error:
        raise _refused(path, error) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already when all went well
    return path


def read_directory(path: str | Path, kind: Kind = MODEL) -> ModelFiles:
    """Read a directory and check every file against its manifest.

    Raises:
        ModelDirectoryError: not a model, of a newer schema, or a file is missing, truncated, altered, or no plain file.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise ModelDirectoryError(f"{path} {what}. Give the directory that {kind.writer} wrote.")
    manifest = _read_manifest(path, kind)
    files = {name: _read_entry(path, name, entry, kind) for name, entry in manifest["files"].items()}
    return ModelFiles(path, manifest["schema"], files, kind)


@contextlib.contextmanager
def write_file(path: str | Path, *, force: bool = False) -> Iterator[TextIO]:
    """Open a text file that appears under its name when the block ends well, and not at all otherwise.

    Args:
        path: the file; its folder must be there.
        force: replace a file that is there.

    Raises:
        OutputError: the path exists, its folder does not, or the disk is full or refuses.
    """
    path = Path(os.path.realpath(path))
    temporary = None
    try:
        check_output(path, force=force)
        if path.exists() and not path.is_file():  # a device, replaced by a file, would be gone for everybody
            what = "is a folder" if path.is_dir() else "is not a plain file"
            raise OutputError(f"{path} {what}. Give the path of a file.")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        check_output(path, force=force)  # someone may have been quicker
        temporary.replace(path)
        temporary = None
        _sync_directory(path.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise _refused(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_directory(path: str | Path, *, force: bool = False, kind: Kind = MODEL) -> Path:
    """Return the real path if a directory of results may be written there; ask early, before an hour of work.

    Raises:
        OutputError: the path exists and may not be replaced, its folder does not exist, or the disk refuses.
    """
    real = Path(os.path.realpath(path))
    try:
        check_output(path, force=force)
        if real.exists():
            _check_replaceable(real, kind)
        Path(tempfile.mkdtemp(prefix=f".{real.name}.", suffix=".tmp", dir=real.parent)).rmdir()
    except OSError as error:
        raise error if isinstance(error, OutputError) else _refused(real, error) from None
    return real


def check_output(path: str | Path, *, force: bool = False) -> Path:
    """Return the path if a result may be written there; ask early, before an hour of work.

    Raises:
        OutputError: the path exists and force is not given, or its folder does not exist.
    """
    path = Path(path)
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path} exists. Give another path, or --force to replace it.")
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"{path.absolute().parent} is not a folder that exists. Create it first, or give another path."
        )
    return path


def dump_json(data: Any) -> bytes:
    """Plain data as JSON that any reader understands; NaN and infinity are refused."""
    return (json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def strict_json(text: bytes) -> Any:
    """Read JSON; refuse names given twice, NaN, infinite numbers, and nesting without end.

    Raises:
        ValueError: it is not such JSON.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_no_name_twice,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name is given twice")
    return dict(pairs)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _put(path: Path, content: bytes | Path | dict[str, Any] | list[Any]) -> dict[str, Any]:
    """Write one file, bring it to disk, and return its entry in the manifest."""
    if isinstance(content, Path):
        content = content.read_bytes()
    elif not isinstance(content, bytes):
        content = dump_json(content)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _move_directory(temporary: Path, path: Path) -> None:
    """Put a complete directory in its place; an old one is set aside first and comes back if that fails."""
    if not path.exists():
        temporary.rename(path)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        path.rename(aside / path.name)
        try:
            temporary.rename(path)
        except BaseException:
            (aside / path.name).rename(path)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_directory(path.parent)


def _check_replaceable(path: Path, kind: Kind) -> None:
    """Refuse to replace anything that dropkit did not write itself."""
    if not path.is_dir():
        raise OutputError(
            f"{path} is a file, not a {kind.noun} directory; it is not replaced. Give another path."
        )
    there = {entry.name for entry in path.iterdir()}
    if not there:
        return
    if MANIFEST not in there:
        raise OutputError(f"{path} is not a {kind.format}; not even --force replaces it. Give another path.")
    try:
        known = {MANIFEST, *_read_manifest(path, kind, any_schema=True)["files"]}
    except ModelDirectoryError:
        raise OutputError(
            f"{path} has a manifest that is not of a {kind.format}; it is not replaced. Give another path."
        ) from None
    foreign = sorted(there - known)
    if foreign:
        listed = ", ".join(foreign[:5]) + (" and more" if len(foreign) > 5 else "")
        raise OutputError(
            f"{path} holds files that dropkit did not write ({listed}); it is not replaced. Move them away first."
        )


def _read_manifest(path: Path, kind: Kind, *, any_schema: bool = False) -> dict[str, Any]:
    again = kind.again
    try:
        text = _read_plain(path / MANIFEST, _MOST_MANIFEST, kind)
    except FileNotFoundError:
        raise ModelDirectoryError(
            f"{path} has no {MANIFEST}, so it is not a {kind.format}. Give what {kind.writer} wrote."
        ) from None
    try:
        manifest = strict_json(text)
    except ValueError as error:
        raise ModelDirectoryError(f"{path / MANIFEST} is not valid JSON ({error}). {again}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != kind.format:
        raise ModelDirectoryError(
            f"{path / MANIFEST} is not the manifest of a {kind.format}. Give what {kind.writer} wrote."
        )
    schema = manifest.get("schema")
    if type(schema) is not int or schema < 1:
        raise ModelDirectoryError(
            f"{path / MANIFEST} has schema {schema!r:.40}; a schema is a whole number from 1. {again}"
        )
    if schema > kind.schema and not any_schema:
        raise ModelDirectoryError(
            f"{path} is a {kind.noun} of schema {schema}; this release reads schemas 1 to {kind.schema}. "
            "Upgrade: pip install --upgrade dropkit."
        )
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ModelDirectoryError(f"{path / MANIFEST} lists no files. {again}")
    for name, entry in files.items():
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise ModelDirectoryError(
                f"{path / MANIFEST} lists {name!r:.80}, which is no plain file name. {again}"
            )
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ModelDirectoryError(
                f"{path / MANIFEST} lists {name} without a valid size and digest. {again}"
            )
    return manifest


def _read_entry(path: Path, name: str, entry: dict[str, Any], kind: Kind) -> bytes:
    again = kind.again
    try:
        content = _read_plain(path / name, entry["size"] + 1, kind)
    except FileNotFoundError:
        raise ModelDirectoryError(f"{path / name} is missing from the {kind.noun}. {again}") from None
    if len(content) < entry["size"]:
        raise ModelDirectoryError(
            f"{path / name} is truncated: {len(content)} of {entry['size']} bytes are there. {again}"
        )
    if len(content) > entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ModelDirectoryError(
            f"{path / name} is altered or damaged: it is not what the manifest describes. {again}"
        )
    return content


def _read_plain(path: Path, most: int, kind: Kind) -> bytes:
    """Read a regular file, never through a link and never more than `most` bytes."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise ModelDirectoryError(f"{path} {what}; a {kind.noun} holds plain files. {kind.again}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ModelDirectoryError(f"{path} is not a plain file. {kind.again}")
    with os.fdopen(handle, "rb") as file:
        return file.read(most)


def _refused(path: Path, error: OSError) -> OutputError:
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    why = "the disk is full" if full else (error.strerror or str(error))
    todo = "Free some space or give a path on another disk." if full else "Give a path you may write to."
    refused = OutputError(f"{path} could not be written: {why}. Nothing was left there. {todo}")
    refused.errno = error.errno
    return refused


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
