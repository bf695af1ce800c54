"""tests/python/test_files.py -- saved heads: read back, read by others, and refused with the reason when something is
wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from widehead import FileError, files
from widehead.numpy import DenseHead, from_bfloat16

DTYPES = ("float32", "bfloat16", "float64")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss": "bce", "bias": False, "reduction": "sum"},
    {"label_smoothing": 0.1, "softcap": 7.5, "filter_eps": 1e-5, "class_weight": np.linspace(0.5, 2, 40)},
    {"loss": "sampled_softmax", "negatives": 9, "proposal": np.linspace(1, 3, 40), "ignore_index": -1},
    {"loss": "sampled_softmax", "negatives": 9, "proposal": "log_uniform", "lse_penalty": 1e-3, "seed": (1 << 64) - 1},
]


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(12, 8)), rng.integers(0, 40, 12)


def train(head: DenseHead, steps: range, optimizer: str = "adam") -> list[float]:
    losses = []
    for step in steps:
        hidden, target = batch(step)
        hidden = hidden.astype(np.float64 if head.dtype == "float64" else np.float32)
        losses.append(head.step(hidden, target, 0.01, optimizer).loss)
    return losses


def same(a: DenseHead, b: DenseHead) -> None:
    assert repr(a) == repr(b) and a.options == b.options and (a.seed, a.steps) == (b.seed, b.steps)
    for x, y in [(a.weight, b.weight), (a.bias, b.bias), (a.class_weight, b.class_weight)]:
        assert (x is None and y is None) or (np.array_equal(x, y) and x.dtype == y.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "plain")
def test_round_trip_and_resume(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    """A head read back is the same; with the optimiser's state it goes on bit for bit."""
    path = tmp_path / "head.safetensors"
    head = DenseHead(8, 40, dtype=dtype, **options)
    train(head, range(5))
    head.save(path)
    again = DenseHead.load(path)
    same(again, head)
    assert again.weight.flags.writeable and again._optimizer.name is None
    head.save(path, optimizer=True)
    again = DenseHead.load(path)
    assert train(again, range(5, 9)) == train(head, range(5, 9))
    same(again, head)
    assert os.listdir(tmp_path) == ["head.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_reads_it(tmp_path: Path, dtype: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "head.safetensors"
    head = DenseHead(3, 5, dtype=dtype)
    head.save(path)
    tensors = dict(safetensors.deserialize(path.read_bytes()))
    names = {"float32": "F32", "bfloat16": "BF16", "float64": "F64"}
    assert tensors["weight"]["dtype"] == names[dtype] and tensors["weight"]["shape"] == [5, 3]
    assert bytes(tensors["weight"]["data"]) == head.weight.tobytes()
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata()["kind"] == "DenseHead" and set(opened.keys()) == {"weight", "bias"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "plain")
def test_torch_reads_it_and_writes_it(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from widehead.torch import DenseHead as TorchHead

    first, second = tmp_path / "a", tmp_path / "b"
    head = DenseHead(8, 40, dtype=dtype, **{**options, "seed": 5})
    train(head, range(3))
    head.save(first, optimizer=True)
    theirs = TorchHead.load(first)
    theirs.save(second)
    back = DenseHead.load(second)
    assert back.options == head.options and np.array_equal(back.weight, head.weight)
    assert back.bias is None or np.array_equal(back.bias, head.bias)
    hidden, _ = batch()
    hidden = hidden.astype(np.float64 if dtype == "float64" else np.float32)
    scores, classes = theirs.topk(torch.from_numpy(hidden), 5)
    mine = back.topk(hidden, 5)
    assert np.array_equal(mine.classes, classes.numpy()) and np.array_equal(mine.scores, scores.detach().numpy())


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def small(path: Path) -> bytes:
    DenseHead(2, 3).save(path)
    return path.read_bytes()


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head"
    whole = small(path)
    for at in range(len(whole)):
        for mask in (0x01, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            with pytest.raises(FileError, match=str(path)):
                DenseHead.load(path)


def test_every_truncation_and_anything_appended_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head"
    whole = small(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"truncated|not a safetensors file"):
            DenseHead.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FileError, match=f"expected {len(whole)} bytes, got {len(whole) + 1}"):
        DenseHead.load(path)


GOOD = {"widehead": "1", "kind": "DenseHead", "config": "{}", "state": "{}", "checksum": "00000000"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json at all", "header is not JSON"),
        ([1, 2], "header is not JSON"),
        ({"weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}}, "not one that widehead wrote"),
        ({"__metadata__": {"format": "pt"}}, "not one that widehead wrote"),
        ({"__metadata__": {**GOOD, "widehead": "2"}}, "newer widehead; this one reads up to 1: upgrade"),
        ({"__metadata__": {**GOOD, "widehead": "x"}}, "expected the version"),
        ({"__metadata__": {**GOOD, "kind": "SparseHead"}}, "expected a saved DenseHead, got a SparseHead"),
        ({"__metadata__": {**GOOD, "config": "{"}}, "'config' is not JSON"),
        ({"__metadata__": {**GOOD, "state": "[]"}}, "'state' is no JSON object"),
        ({"__metadata__": {"widehead": "1"}}, "metadata has no 'kind'"),
        ({"__metadata__": GOOD}, "checksum"),
        ({"__metadata__": GOOD, "w": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}, "truncated"),
        (
            {"__metadata__": GOOD, "w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 0]}},
            "elements",
        ),
        ({"__metadata__": GOOD, "w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, "shape"),
        ({"__metadata__": GOOD, "w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "shape"),
        (
            {"__metadata__": GOOD, "w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}},
            "data type 'F8_E4M3'",
        ),
        (
            {"__metadata__": GOOD, "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            "expected 1 elements from 0",
        ),
        ({"__metadata__": GOOD, "w": {"dtype": "F32", "shape": [1]}}, "damaged"),
        ({"__metadata__": GOOD, "w": 3}, "damaged"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, message: str) -> None:
    path = write(tmp_path / "head", header)
    with pytest.raises(FileError, match=message) as error:
        DenseHead.load(path)
    assert isinstance(error.value, ValueError) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "loss"),
        ({"in_features": 3}, "weight: expected"),
        ({"colour": "blue"}, "colour"),
        ({"dtype": "float16"}, "dtype"),
        ({"n_classes": None}, "n_classes"),
        ({"bias": False}, "unexpected tensors"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, head = tmp_path / "head", DenseHead(2, 3)
    config = {**head._config(), **change}
    files.save_head(path, files.HeadFile("DenseHead", config, head.state_dict(), {}))
    with pytest.raises(FileError, match=message):
        DenseHead.load(path)
    files.save_head(path, files.HeadFile("DenseHead", head._config(), {"bias": head.bias}, {}))
    with pytest.raises(FileError, match="no 'weight'"):
        DenseHead.load(path)


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "head"
    before = small(path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, where, fail)
    with pytest.raises(OSError, match="No space left"):
        DenseHead(2, 3, seed=9).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["head"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DenseHead.load(tmp_path / "nothing")
    with pytest.raises(OSError, match="absent"):
        DenseHead(2, 3).save(tmp_path / "absent" / "head")


def test_bfloat16_bits_survive(tmp_path: Path) -> None:
    path, head = tmp_path / "head", DenseHead(16, 64, dtype="bfloat16")
    head._weight[...] = np.arange(1024, dtype=np.uint16).reshape(64, 16) * 61
    head.save(path)
    again = DenseHead.load(path)
    assert np.array_equal(again.weight, head.weight)
    assert np.array_equal(np.isnan(from_bfloat16(again.weight)), np.isnan(from_bfloat16(head.weight)))
