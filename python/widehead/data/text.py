"""widehead/data/text.py -- lists: `text<TAB>label,label` a line, and `row item item ...` a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import scipy.sparse

from .dataset import Dataset
from .files import MAX_COUNT, fail, line_blocks, shown, writing


def load_text(path: str | Path, *, n_labels: int | None = None, progress: bool = False) -> Dataset:
    """Reads UTF-8 lines `text<TAB>label,label`, plain or compressed; labels are whole numbers, at least one a line.

    A tab inside the text belongs to the text: the last one divides. Empty lines may only stand at the end.

    Args:
        path: the file.
        n_labels: number of labels; one above the largest met where not given.
        progress: show a progress bar on stderr.

    Returns:
        Dataset with `texts` and `labels` (all ones).

    Raises:
        DataError: a line that is not of this form, naming file, line and reason; nothing is returned then.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    limit = MAX_COUNT if n_labels is None else n_labels
    texts: list[str] = []
    counts: list[Any] = []
    labels: list[Any] = []
    line = 1
    blank: int | None = None
    for block in line_blocks(path, progress):
        rows = _decode(path, line, block).split("\n")[:-1]
        kept = len(rows)
        while kept and not rows[kept - 1].strip():
            kept -= 1
        if kept and blank is not None:
            fail(path, blank, "an empty line between points")
        if kept < len(rows) and blank is None:
            blank = line + kept
        own = rows[:kept]
        split = [row.rpartition("\t") for row in own]
        own_texts = [pieces[0] for pieces in split]
        names = [pieces[2] for pieces in split]
        if b"\r" in block:
            names = [name.removesuffix("\r") for name in names]
        found = _numbers("\n".join(names) + "\n")
        if own and (found is None or found[1].max() >= limit or not all(map(str.strip, own_texts))):
            _explain(path, line, own, limit)
        if found is not None:
            texts += own_texts
            counts.append(found[0])
            labels.append(found[1].astype(np.int32))
        line += len(rows)
    if not texts:
        fail(path, None, "no points")
    matrix = _ones(np.concatenate(counts), np.concatenate(labels), n_labels)
    return Dataset(texts=texts, labels=matrix)


def _decode(path: Path, line: int, block: bytes) -> str:
    try:
        return block.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        fail(path, line + block.count(b"\n", 0, error.start), f"not UTF-8: byte 0x{block[error.start]:02x}")


def _numbers(names: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None:
    """How many numbers each line of `1,2,3` holds, and all of them; None where anything else stands there."""
    raw = names.encode()
    if raw.translate(None, b"0123456789,\n"):
        return None
    characters = np.frombuffer(raw, np.uint8)
    ends = np.flatnonzero(characters < ord("0"))
    if ends[0] == 0 or np.any(np.diff(ends) == 1):
        return None  # nothing where a number belongs
    newlines = np.flatnonzero(characters[ends] == ord("\n"))
    return np.diff(newlines, prepend=-1), np.fromstring(raw.replace(b",", b" "), np.float64, sep=" ")


def _explain(path: Path, first: int, rows: list[str], limit: int) -> NoReturn:
    """Raises the error of the first wrong line."""
    for line, row in enumerate(rows, first):
        text, tab, names = row.removesuffix("\r").rpartition("\t")
        if not row.strip():
            fail(path, line, "an empty line between points")
        if not tab:
            fail(path, line, f"expected text<TAB>label,label, got no tab in {shown(row)}")
        if not text.strip():
            fail(path, line, "empty text")
        for name in names.split(","):
            if not name:
                fail(path, line, "empty label")
            if not (name.isascii() and name.isdigit()):
                fail(path, line, f"label {shown(name)} is not a whole number")
            if len(name.lstrip("0")) > 18 or int(name) >= limit:
                fail(path, line, f"label {shown(name)[1:-1]} is outside 0..{limit - 1}")
    fail(path, first, "expected text<TAB>label,label")


def _ones(counts: Any, indices: Any, width: int | None) -> scipy.sparse.csr_array:
    """CSR of ones with ascending indices; an index named twice in a row counts once."""
    if width is None:
        width = int(indices.max(initial=-1)) + 1
    indptr = np.concatenate([[0], np.cumsum(counts)])
    out = scipy.sparse.csr_array((np.ones(len(indices), np.float32), indices, indptr), shape=(len(counts), width))
    out.sum_duplicates()
    out.data[:] = 1.0
    return out


def save_text(path: str | Path, texts: list[str], labels: Any) -> None:
    """Writes lines `text<TAB>label,label`; `.gz`, `.xz` and `.bz2` are compressed. The file appears only when complete.

    Args:
        path: the file to write.
        texts: n texts, none empty and none with a line break.
        labels: sparse matrix [n, n_labels], at least one label a row; only which entries are not zero is written.

    Raises:
        ValueError: a text or a row that the format cannot hold. OSError: the file cannot be written.
    """
    y = scipy.sparse.csr_array(labels, copy=True)
    y.sum_duplicates()
    y.eliminate_zeros()
    if y.shape[0] != len(texts):
        raise ValueError(f"labels: expected {len(texts)} rows, as there are texts, got {y.shape[0]}")
    for i, text in enumerate(texts):
        if not text.strip() or "\n" in text:
            raise ValueError(f"texts: text {i} is empty or holds a line break: {shown(text)}")
    unlabelled = np.flatnonzero(np.diff(y.indptr) == 0)
    if len(unlabelled):
        raise ValueError(f"labels: row {unlabelled[0]} has none; the format needs one a line")
    names, stops = list(map(str, y.indices.tolist())), y.indptr.tolist()
    with writing(Path(path)) as out:
        for i, text in enumerate(texts):
            out.write(f"{text}\t{','.join(names[stops[i] : stops[i + 1]])}\n".encode())


def load_lists(
    path: str | Path, *, n_rows: int | None = None, n_items: int | None = None, progress: bool = False
) -> scipy.sparse.csr_array:
    """Reads lines `row item item ...` of whole numbers, as recommenders keep who used what, plain or compressed.

    Rows may come in any order and more than once; an item named twice in a row counts once.

    Args:
        path: the file.
        n_rows, n_items: sizes of the matrix; one above the largest number met where not given.
        progress: show a progress bar on stderr.

    Returns:
        CSR float32 [n_rows, n_items] of ones.

    Raises:
        DataError: a line that is not of this form, naming file, line and reason. OSError: the file cannot be opened.
    """
    path = Path(path)
    limits = [MAX_COUNT if size is None else size for size in (n_rows, n_items)]
    rows: list[Any] = []
    items: list[Any] = []
    line = 1
    for block in line_blocks(path, progress):
        fields = [text.split() for text in block.split(b"\n")[:-1]]
        lengths = np.fromiter(map(len, fields), np.int64, len(fields))
        if not lengths.any():
            line += len(fields)
            continue
        numbers = None
        if not block.translate(None, b"0123456789 \t\r\n"):
            numbers = np.fromstring(block, np.float64, sep=" ")
        starts = np.cumsum(lengths) - lengths
        first = np.zeros(int(lengths.sum()), bool)
        first[starts[lengths > 0]] = True
        if numbers is None or np.any(numbers >= np.where(first, limits[0], limits[1])):
            _explain_lists(path, line, fields, limits)
        heads = numbers[first].astype(np.int32)
        rows.append(np.repeat(heads, lengths[lengths > 0] - 1))
        items.append(numbers[~first].astype(np.int32))
        line += len(fields)
    if not rows or not any(map(len, items)):
        fail(path, None, "no points")
    row, item = np.concatenate(rows), np.concatenate(items)
    if n_rows is None and row.max() > 16 * line + 1_000_000:
        fail(path, None, f"row number {row.max()} in a file of {line - 1} lines: say n_rows if that is right")
    shape = (
        int(row.max()) + 1 if n_rows is None else n_rows,
        int(item.max()) + 1 if n_items is None else n_items,
    )
    out = scipy.sparse.csr_array((np.ones(len(row), np.float32), (row, item)), shape=shape)
    out.sum_duplicates()
    out.data[:] = 1.0
    return out


def _explain_lists(path: Path, first: int, fields: list[list[bytes]], limits: list[int]) -> NoReturn:
    """Raises the error of the first wrong line."""
    for line, tokens in enumerate(fields, first):
        for place, token in enumerate(tokens):
            what, limit = ("item", limits[1]) if place else ("row", limits[0])
            if not token.isdigit():
                fail(path, line, f"{what} {shown(token)} is not a whole number")
            if len(token.lstrip(b"0")) > 18 or int(token) >= limit:
                fail(path, line, f"{what} {shown(token)[1:-1]} is outside 0..{limit - 1}")
    fail(path, first, "a control character in this line or one of the next")
