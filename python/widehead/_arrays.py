"""widehead/_arrays.py -- what every NumPy head does with arrays: batches of any shape, bfloat16 without a NumPy
type."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._core import DtypeError, NonFiniteError, ShapeError

Array = NDArray[Any]

# The type that a head's dtype is stored in; NumPy has no bfloat16, so its bits are kept as uint16.
STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(np.uint16),
}


def to_bfloat16(x: ArrayLike) -> NDArray[np.uint16]:
    """The bits of x rounded to bfloat16, to nearest, ties to even; NaN stays NaN. Same shape, uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16).reshape(np.shape(x))


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers whose bfloat16 bits are given, exact, float32."""
    return (np.asarray(bits, dtype=np.uint32) << 16).view(np.float32)


def stored(x: ArrayLike, like: Array, name: str) -> Array:
    """A contiguous copy of x in the data type that `like` is stored in; floats become bfloat16 by rounding to
    nearest."""
    array = np.asarray(x)
    if array.shape != like.shape:
        raise ShapeError(f"{name}: expected shape {list(like.shape)}, got {list(array.shape)}")
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    if array.dtype == like.dtype:
        return array.copy()
    if array.dtype.kind != "f":
        raise DtypeError(f"{name}: expected floating-point numbers or {like.dtype}, got {array.dtype}")
    return to_bfloat16(array) if like.dtype == np.uint16 else array.astype(like.dtype)


def as_batch(hidden: Array, in_features: int) -> tuple[Array, tuple[int, ...]]:
    """hidden as a matrix `[B, in_features]` and the shape before its last axis."""
    hidden = np.asarray(hidden)
    if hidden.dtype.name == "bfloat16":
        hidden = hidden.view(np.uint16)
    if hidden.ndim == 0 or hidden.shape[-1] != in_features:
        raise ShapeError(f"hidden: expected shape [..., in_features] = [..., {in_features}], got {list(hidden.shape)}")
    if hidden.dtype.kind != "f" and hidden.dtype != np.uint16:
        raise DtypeError(f"hidden: expected float32, float16, bfloat16 or float64, got {hidden.dtype}")
    shape = hidden.shape[:-1]
    return hidden if hidden.ndim == 2 else hidden.reshape(int(np.prod(shape, dtype=np.int64)), in_features), shape


def example_weights(weight: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Weights of the examples, flat."""
    if weight is None:
        return None
    array = np.asarray(weight, dtype=np.float64)
    if array.shape != shape:
        raise ShapeError(f"sample_weight: expected shape {list(shape)}, got {list(array.shape)}")
    array = array.reshape(-1)
    if not np.isfinite(array).all() or (array < 0).any():
        raise NonFiniteError("sample_weight: expected finite weights of at least 0")
    return array


def check_finite(hidden: Array) -> None:
    """Raises NonFiniteError naming the first row that holds NaN or infinity."""
    finite = (hidden & 0x7F80) != 0x7F80 if hidden.dtype == np.uint16 else np.isfinite(hidden)
    if not finite.all():
        row = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise NonFiniteError(f"hidden: expected finite numbers, got NaN or infinity in row {row}")
