"""widehead/data -- readers and writers of multi-label data files.

load(path)                 finds out the format: XMC text, text<TAB>labels, row-item lists, or X.npz beside Y.npz
load_xmc, load_pair, load_text, load_lists     one format each
save_xmc, save_matrix, save_text               the way back
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import scipy.sparse

from ..errors import DataError
from .dataset import Dataset, statistics
from .files import fail, first_lines
from .npz import load_matrix, load_pair, save_matrix
from .text import load_lists, load_text, save_text
from .xmc import load_xmc, save_xmc

__all__ = [
    "FORMATS",
    "DataError",
    "Dataset",
    "detect_format",
    "load",
    "load_lists",
    "load_matrix",
    "load_pair",
    "load_text",
    "load_xmc",
    "save_matrix",
    "save_text",
    "save_xmc",
    "statistics",
]

FORMATS = ("xmc", "npz", "text", "lists")

_NUMBERS = re.compile(rb"\s*\d+(\s+\d+)+\s*")


def detect_format(path: str | Path) -> str:
    """The format of a data file, one of `FORMATS`, by its name and first lines.

    Raises DataError where it looks like none of them, OSError where it cannot be opened.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return "npz"
    lines = [line for line in first_lines(path) if not line.startswith(b"#")]
    if not any(line.strip() for line in lines):
        fail(path, None, "the file is empty")
    first = lines[0]
    if re.fullmatch(rb"(\xef\xbb\xbf)?\s*\d+\s+\d+\s+\d+\s*", first):
        # A header, or a row of a list with two items? Every row of a list has at least two numbers and nothing else.
        others = [line for line in lines[1:-1] if line.strip()]
        return "lists" if others and all(map(_NUMBERS.fullmatch, others)) else "xmc"
    if re.search(rb"\t[\d,]+\r?$", first):
        return "text"
    if re.search(rb"(^|\s)\d+:[-+.\d]", first):
        return "xmc"
    if _NUMBERS.fullmatch(first):
        return "lists"
    fail(path, None, f"cannot tell the format from the first line; say which of {', '.join(FORMATS)} it is")


def load(
    path: str | Path,
    labels: str | Path | None = None,
    *,
    format: str | None = None,
    n_features: int | None = None,
    n_labels: int | None = None,
    progress: bool = False,
) -> Dataset:
    """Reads a data set in any of the formats.

    Args:
        path: the data file, or the feature matrix of a pair of .npz files.
        labels: the label matrix of the pair; without it, the file whose name has Y where `path` has its first X.
        format: "xmc", "npz", "text" or "lists"; found out where not given. Lists become one point a row, whose only
            feature is the row's own number, and whose labels are the items.
        n_features, n_labels: sizes, for files that do not say; else they have to agree.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the file is not of the format or does not have the sizes; the message names file, line and reason.
        OSError: a file cannot be opened. ValueError: an unknown format, or `labels` with a format that needs none.
    """
    path = Path(path)
    kind = format or ("npz" if labels is not None else detect_format(path))
    if kind not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {kind!r}")
    if labels is not None and kind != "npz":
        raise ValueError(f"labels: a second file goes with the format npz only, not with {kind}")
    if kind == "npz":
        data = load_pair(path, labels if labels is not None else _partner(path))
    elif kind == "xmc":
        data = load_xmc(path, n_features=n_features, n_labels=n_labels, progress=progress)
    elif kind == "text":
        data = load_text(path, n_labels=n_labels, progress=progress)
    else:
        matrix = load_lists(path, n_rows=n_features, n_items=n_labels, progress=progress)
        data = Dataset(features=scipy.sparse.eye_array(matrix.shape[0], dtype=np.float32, format="csr"), labels=matrix)
    for what, wanted, found in (("features", n_features, data.n_features), ("labels", n_labels, data.n_labels)):
        if wanted is not None and found is not None and wanted != found:
            fail(path, None, f"{found} {what}, expected {wanted}")
    return data


def _partner(path: Path) -> Path:
    if "X" not in path.name:
        fail(path, None, "a feature matrix without its labels: give the label matrix too, or name them X... and Y...")
    return path.with_name(path.name.replace("X", "Y", 1))
