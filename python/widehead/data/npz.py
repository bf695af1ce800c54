"""widehead/data/npz.py -- pairs of scipy .npz files: a feature matrix and a label matrix with the same rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from .dataset import Dataset
from .files import MAX_COUNT, fail, writing


def load_matrix(path: str | Path) -> scipy.sparse.csr_array:
    """Reads a matrix saved by `scipy.sparse.save_npz` as CSR float32 with ascending indices, repeated entries summed.

    Raises:
        DataError: the file is no such matrix, is damaged, or holds indices out of range, NaN or infinity.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as raw:
        content = io.BytesIO(raw.read())
    try:
        matrix = scipy.sparse.load_npz(content)
        if matrix.format not in ("csr", "csc", "coo"):
            raise ValueError(f"format {matrix.format} is not supported: save it as csr")
        if max(matrix.shape, default=0) > MAX_COUNT or matrix.ndim != 2:
            raise ValueError(f"shape {matrix.shape} is not supported")
        if matrix.dtype.kind not in "bifu":
            raise ValueError(f"entries of type {matrix.dtype} are not supported")
        if matrix.format in ("csr", "csc"):
            matrix.check_format(full_check=True)
        csr = scipy.sparse.csr_array(matrix)
        with np.errstate(over="ignore"):
            csr = csr.astype(np.float32)
        csr.sum_duplicates()
    except Exception as error:  # a zip, npy headers and index arrays can be wrong in too many ways to list
        reason = " ".join(str(error).split()) or type(error).__name__
        fail(path, None, f"not a sparse matrix saved by scipy: {reason}")
    if not np.all(np.isfinite(csr.data)):
        entry = int(np.flatnonzero(~np.isfinite(csr.data))[0])
        row = int(np.searchsorted(csr.indptr, entry, side="right")) - 1
        fail(path, None, f"row {row}, column {csr.indices[entry]}: value is NaN, infinite or too large for float32")
    return csr


def load_pair(features: str | Path, labels: str | Path) -> Dataset:
    """Reads a feature matrix [n, n_features] and a label matrix [n, n_labels] saved by `scipy.sparse.save_npz`.

    Entries of the label matrix are label weights; stored zeros are dropped.

    Raises:
        DataError: a file is damaged or no sparse matrix, the numbers of rows differ, a value is NaN or infinite, a
            label weight is negative. OSError: a file cannot be opened.
    """
    x, y = load_matrix(features), load_matrix(labels)
    if x.shape[0] != y.shape[0]:
        fail(Path(labels), None, f"{y.shape[0]} rows of labels, but {x.shape[0]} rows of features in {features}")
    if not x.shape[0]:
        fail(Path(features), None, "no points")
    if y.nnz and y.data.min() < 0:
        fail(Path(labels), None, f"a label weight is negative: {y.data.min()}")
    y.eliminate_zeros()
    return Dataset(features=x, labels=y)


def save_matrix(path: str | Path, matrix: Any) -> None:
    """Writes a sparse matrix for `load_matrix` and `scipy.sparse.load_npz`; the file appears only when complete."""
    with writing(Path(path)) as out:
        scipy.sparse.save_npz(out, scipy.sparse.csr_matrix(matrix))
