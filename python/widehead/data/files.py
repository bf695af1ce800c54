"""widehead/data/files.py -- opening data files: decompression by content, whole lines in blocks, atomic writing."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..errors import DataError

# Big enough that the cost of a call vanishes, small enough that a block's working arrays stay near the caches.
BLOCK_BYTES = 1 << 21

# Class numbers are int32, so that CSR arrays stay small; scipy widens them where the number of entries asks for it.
MAX_COUNT = 2**31 - 1

_MAGIC: list[tuple[bytes, Callable[..., Any]]] = [
    (b"\x1f\x8b", lambda raw: gzip.GzipFile(fileobj=raw)),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
    (b"BZh", bz2.BZ2File),
]
_PACKERS: dict[str, Callable[..., Any]] = {
    ".gz": lambda raw: gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0),
    ".xz": partial(lzma.LZMAFile, mode="wb", preset=3),
    ".bz2": partial(bz2.BZ2File, mode="wb"),
}
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)


def fail(path: Path, line: int | None, reason: str) -> NoReturn:
    """Raises the DataError `path:line: reason`."""
    raise DataError(f"{path}: {reason}" if line is None else f"{path}:{line}: {reason}")


def shown(token: bytes | str) -> str:
    """A piece of the file, quoted and shortened for a message."""
    text = token.decode("utf-8", "replace") if isinstance(token, bytes) else token
    return repr(text if len(text) <= 40 else text[:37] + "...")


def line_blocks(path: Path, progress: bool = False) -> Iterator[bytes]:
    """Blocks of whole lines of a plain, gzip, xz or bzip2 file. Every block ends in a newline; the last is given one.

    Raises DataError for a damaged or truncated compressed file, OSError where the file cannot be opened.
    """
    with open(path, "rb") as raw, _progress(path, raw, progress) as report:
        head = raw.peek(6)
        opener = next((function for magic, function in _MAGIC if head.startswith(magic)), None)
        stream = cast(BinaryIO, opener(raw)) if opener else raw
        rest: list[bytes] = []
        while block := _read(path, stream):
            report(raw.tell())
            cut = block.rfind(b"\n") + 1
            if not cut:
                rest.append(block)
                continue
            rest.append(block[:cut])
            yield b"".join(rest)
            rest = [block[cut:]] if cut < len(block) else []
        if rest:
            yield b"".join(rest) + b"\n"


def _read(path: Path, stream: BinaryIO) -> bytes:
    try:
        return stream.read(BLOCK_BYTES)
    except _BROKEN as error:
        raise DataError(f"{path}: damaged or cut short: {error or type(error).__name__}") from error


def first_lines(path: Path, limit: int = 1 << 16) -> list[bytes]:
    """The first lines of a file, without their newlines, from its first `limit` bytes."""
    with open(path, "rb") as raw:
        opener = next((function for magic, function in _MAGIC if raw.peek(6).startswith(magic)), None)
        stream = cast(BinaryIO, opener(raw)) if opener else raw
        try:
            return stream.read(limit).split(b"\n")
        except _BROKEN as error:
            raise DataError(f"{path}: damaged or cut short: {error or type(error).__name__}") from error


@contextmanager
def _progress(path: Path, raw: BinaryIO, wanted: bool) -> Iterator[Callable[[int], None]]:
    if not wanted:
        yield lambda position: None
        return
    columns = [TextColumn("reading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(path.name, total=os.fstat(raw.fileno()).st_size)
        yield lambda position: bar.update(task, completed=position)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` only when all went well; .gz, .xz and .bz2 are compressed."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as raw:
            if path.suffix in _PACKERS:
                with _PACKERS[path.suffix](raw) as packed, io.BufferedWriter(packed, BLOCK_BYTES) as buffered:
                    yield cast(BinaryIO, buffered)
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
