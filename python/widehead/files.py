"""widehead/files.py -- saved heads: safetensors files that PyTorch and NumPy heads both read and write.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header, the header in JSON, the
tensors' bytes. The metadata of the header holds `widehead` (the format's version), `kind` (the class name of the head),
`config` (the constructor's arguments by name, JSON), `state` (what else the head goes on with, JSON: `steps`, and
`optimizer` where its moments are kept) and `checksum` (CRC-32 of all that and of the tensors). Tensors: `weight`,
`bias`, options that are arrays by the names of their arguments (`class_weight`, `proposal`, `class_order`), and moments
as `optimizer.<name>`, which a reader may pass over. A sparse head's dense rows are `frequent.weight` and
`frequent.bias`, their moments `optimizer.frequent.<name>`.

NumPy has no bfloat16: arrays of uint16 stand for it, here as everywhere in widehead, but for the tensors that
`integers` names (the `index` of a sparse head), whose data type in the file is U16.
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ._core import Error

VERSION = 1

_CODES = {"float32": "F32", "float64": "F64", "float16": "F16", "uint16": "BF16", "int64": "I64", "int32": "I32"}
_DTYPES = {code: np.dtype(name) for name, code in _CODES.items()} | {"U16": np.dtype(np.uint16)}
_MAX_HEADER = 100_000_000  # the limit of the safetensors format


class FileError(Error, ValueError):
    """A file that is damaged, foreign, or newer than this version of widehead. The message names the file and the
    reason."""


@dataclass
class HeadFile:
    """A saved head: `kind` and `config` say how to build it, `tensors` and `state` what it has learnt. uint16 is
    bfloat16, except in the tensors that `integers` names."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, NDArray] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    integers: set[str] = field(default_factory=set)


def save_head(path: str | os.PathLike[str], head: HeadFile) -> None:
    """Writes a head; a file that was there before is replaced in one step, or stays as it was when anything fails.

    The bytes go to a temporary name in the same folder, are synced to the disk, and only then take the name.
    """
    path = Path(path)
    # Widest types first, so that every tensor starts at a multiple of its element's size.
    order = sorted(head.tensors, key=lambda name: (-head.tensors[name].dtype.itemsize, name))
    arrays = {name: np.ascontiguousarray(head.tensors[name]) for name in order}
    entries: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        if array.dtype.name not in _CODES:
            raise FileError(f"{path}: tensor {name!r} has data type {array.dtype}, which head files do not hold")
        end = offset + array.nbytes
        whole = name in head.integers and array.dtype == np.uint16
        code = "U16" if whole else _CODES[array.dtype.name]
        entries[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    metadata = {"widehead": str(VERSION), "kind": head.kind, "config": _json(head.config), "state": _json(head.state)}
    checksum = _checksum_of_header(metadata, entries)
    for array in arrays.values():
        checksum = zlib.crc32(_bytes(array), checksum)
    metadata["checksum"] = f"{checksum:08x}"
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for array in arrays.values():
                file.write(_bytes(array))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load_head(path: str | os.PathLike[str], kind: str | None = None) -> HeadFile:
    """Reads a head that `save_head` wrote.

    Args:
        path: the file.
        kind: the kind of head that the caller can take; None for any.

    Raises:
        FileError: damaged, truncated, foreign, newer, or of another kind. Nothing is allocated before the sizes add up.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        metadata, entries, start = _read_header(file, path, size)
        config, state = (_json_object(metadata[key], path, key) for key in ("config", "state"))
        if kind is not None and metadata["kind"] != kind:
            raise FileError(f"{path}: expected a saved {kind}, got a {metadata['kind']}")
        checksum = _checksum_of_header({key: metadata[key] for key in ("widehead", "kind", "config", "state")}, entries)
        tensors = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            array = np.empty(entry["shape"], _DTYPES[entry["dtype"]])
            file.seek(start + entry["data_offsets"][0])
            if file.readinto(_bytes(array)) != array.nbytes:  # type: ignore[attr-defined]
                raise FileError(f"{path}: damaged: it ends inside tensor {name!r}")
            checksum = zlib.crc32(_bytes(array), checksum)
            tensors[name] = array
    if metadata["checksum"] != f"{checksum:08x}":
        raise FileError(f"{path}: damaged: checksum {checksum:08x}, expected {metadata['checksum']}")
    integers = {name for name, entry in entries.items() if entry["dtype"] == "U16"}
    return HeadFile(metadata["kind"], config, tensors, state, integers)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _json_object(text: str, path: Path, key: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: damaged: {key!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: damaged: {key!r} is no JSON object")
    return value


def _bytes(array: NDArray) -> Any:
    return array.reshape(-1).view(np.uint8).data


def _checksum_of_header(metadata: dict[str, str], entries: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps([metadata, entries], sort_keys=True).encode())


def _sync_folder(folder: Path) -> None:
    # Without this a crash may bring the old name back. Folders cannot be opened on every system.
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_header(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, str], dict[str, Any], int]:
    """Metadata, entries of the tensors, and where their bytes start; everything checked against the size of the
    file."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > _MAX_HEADER or length < 2:
        raise FileError(f"{path}: not a safetensors file: it starts with no header")
    if length > size - 8:
        raise FileError(f"{path}: truncated or not a safetensors file: a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: damaged or not a safetensors file: the header is not JSON ({error})") from None
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or "widehead" not in metadata:
        raise FileError(f"{path}: a safetensors file, but not one that widehead wrote")
    version = metadata["widehead"]
    if not (isinstance(version, str) and version.isdecimal() and len(version) < 10):
        raise FileError(f"{path}: damaged: expected the version of the format, got {version!r}")
    if int(version) > VERSION:
        raise FileError(
            f"{path}: written in format {version} by a newer widehead; this one reads up to {VERSION}: upgrade widehead"
        )
    for key in ("kind", "config", "state", "checksum"):
        if not isinstance(metadata.get(key), str):
            raise FileError(f"{path}: damaged: the metadata has no {key!r}")
    start, end = 8 + length, 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            count = 1
            for number in (first, last, *entry["shape"]):
                if type(number) is not int or number < 0:
                    raise ValueError(f"tensor {name!r} has the shape {entry['shape']} at {entry['data_offsets']}")
            for extent in entry["shape"]:
                count *= extent
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"tensor {name!r} has the data type {entry['dtype']!r}")
            if first != end or last - first != count * _DTYPES[entry["dtype"]].itemsize:
                raise ValueError(f"tensor {name!r} lies at {first} to {last}, expected {count} elements from {end}")
            end = last
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path}: damaged: {error}") from None
    if start + end > size:
        raise FileError(f"{path}: truncated: expected {start + end} bytes, got {size}")
    if start + end < size:
        raise FileError(f"{path}: damaged: expected {start + end} bytes, got {size}")
    return metadata, header, start
