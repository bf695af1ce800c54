"""widehead/data/xmc.py -- the text format of the extreme classification repository: `label,label feature:value ...`.

A block of lines is first read as a whole with NumPy; whatever that does not recognise as correct goes through
`_by_line`, which is slow, decides, and names the line. So the fast reader need not explain anything and the slow one
need not be fast.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse

from .dataset import Dataset
from .files import MAX_COUNT, fail, line_blocks, shown, writing

_DIGIT, _SPACE, _NEWLINE, _COMMA, _COLON, _NUMBER, _OTHER = range(7)
_CLASS = np.full(256, _OTHER, np.uint8)
for _characters, _value in (
    (b"0123456789", _DIGIT),
    (b" \t\r", _SPACE),
    (b"\n", _NEWLINE),
    (b",", _COMMA),
    (b":", _COLON),
    (b"+-.eE", _NUMBER),
):
    _CLASS[list(_characters)] = _value
_TO_SPACES = bytes.maketrans(b",:\n\t\r", b"     ")

_HEADER = re.compile(rb"[ \t]*(\d+)[ \t]+(\d+)[ \t]+(\d+)[ \t\r]*")
_FLOAT = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class _Part(NamedTuple):
    """The points of some lines: number of labels and of features of each, and all of them one after the other."""

    label_counts: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    feature_counts: npt.NDArray[np.int64]
    features: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


@dataclass
class _Reader:
    path: Path
    n_features: int
    n_labels: int
    n_points: int | None = None  # as the header says
    line: int = 1  # number of the next line
    points: int = 0
    blank: int | None = None  # first of the empty lines that may only stand at the end
    parts: list[_Part] = field(default_factory=list)

    def add(self, block: bytes) -> None:
        """Takes in whole lines."""
        behind = 0
        if self.n_points is not None:
            block, behind = self._cut(block)
        if not block:
            self.line += behind
            return
        part = _at_once(block, self.n_features, self.n_labels) if self.blank is None else None
        if part is not None and self.n_points is None and np.any(part.label_counts + part.feature_counts == 0):
            part = None
        if part is None:
            part = self._by_line(block)
        self.parts.append(part)
        self.points += len(part.label_counts)
        self.line += block.count(b"\n") + behind

    def _cut(self, block: bytes) -> tuple[bytes, int]:
        """The lines of points that the header announced, and the number of lines behind, which have to be empty."""
        wanted = self.n_points - self.points if self.n_points is not None else 0
        if block.count(b"\n") <= wanted:
            return block, 0
        end = 0
        for _ in range(wanted):
            end = block.index(b"\n", end) + 1
        rest = block[end:]
        if rest.strip():
            blanks = rest[: len(rest) - len(rest.lstrip())].count(b"\n")
            fail(self.path, self.line + wanted + blanks, f"more points than the {self.n_points} of the header")
        return block[:end], rest.count(b"\n")

    def _by_line(self, block: bytes) -> _Part:
        label_counts: list[int] = []
        labels: list[int] = []
        feature_counts: list[int] = []
        features: list[int] = []
        values: list[float] = []
        for line, text in enumerate(block.split(b"\n")[:-1], self.line):
            if self.n_points is None and not text.strip():
                self.blank = self.blank or line
                continue
            if self.blank is not None:
                fail(self.path, self.blank, "an empty line between points (a file without header holds none)")
            own, pairs = self._point(line, text)
            labels += own
            label_counts.append(len(own))
            features += pairs.keys()
            values += pairs.values()
            feature_counts.append(len(pairs))
        return _Part(
            np.array(label_counts, np.int64),
            np.array(labels, np.int32),
            np.array(feature_counts, np.int64),
            np.array(features, np.int32),
            np.array(values, np.float32),
        )

    def _point(self, line: int, text: bytes) -> tuple[list[int], dict[int, float]]:
        fields = text.split()
        own: list[int] = []
        if fields and text[:1].strip() and b":" not in fields[0]:
            own = sorted({self._index(line, token, "label", self.n_labels) for token in fields.pop(0).split(b",")})
        pairs: dict[int, float] = {}
        for token in fields:
            pieces = token.split(b":")
            if len(pieces) != 2:
                fail(self.path, line, f"expected feature:value, got {shown(token)}")
            feature = self._index(line, pieces[0], "feature", self.n_features)
            if feature in pairs:
                fail(self.path, line, f"feature {feature} stands twice in the line")
            pairs[feature] = self._number(line, feature, pieces[1])
        return own, dict(sorted(pairs.items()))

    def _index(self, line: int, token: bytes, what: str, count: int) -> int:
        if not token:
            fail(self.path, line, f"empty {what}")
        if not token.isdigit():
            fail(self.path, line, f"{what} {shown(token)} is not a whole number")
        if len(token.lstrip(b"0")) > 18 or int(token) >= count:
            fail(self.path, line, f"{what} {shown(token)[1:-1]} is outside 0..{count - 1}")
        return int(token)

    def _number(self, line: int, feature: int, token: bytes) -> float:
        if token.lower().lstrip(b"+-") in (b"nan", b"inf", b"infinity"):
            fail(self.path, line, f"value of feature {feature} is {token.decode()}; values have to be finite")
        if not _FLOAT.fullmatch(token):
            fail(self.path, line, f"value {shown(token)} of feature {feature} is not a number")
        with np.errstate(over="ignore"):
            value = np.float32(float(token))
        if not np.isfinite(value):
            fail(self.path, line, f"value {shown(token)} of feature {feature} is too large for float32")
        return float(value)

    def finish(self, n_features: int | None, n_labels: int | None) -> Dataset:
        if self.n_points is not None and self.points < self.n_points:
            got = f"the header announces {self.n_points} points, the file ends after {self.points}"
            fail(self.path, self.line - 1, f"too few lines: {got}")
        if not self.points:
            fail(self.path, None, "no points")
        part = _Part(*(np.concatenate(arrays) for arrays in zip(*self.parts, strict=True)))  # type: ignore[arg-type]
        width = n_features if n_features is not None else int(part.features.max(initial=-1)) + 1
        classes = n_labels if n_labels is not None else int(part.labels.max(initial=-1)) + 1
        return Dataset(
            features=_csr(part.feature_counts, part.features, part.values, width),
            labels=_csr(part.label_counts, part.labels, np.ones(len(part.labels), np.float32), classes),
        )


def _csr(counts: Any, indices: Any, values: Any, width: int) -> scipy.sparse.csr_array:
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    if indptr[-1] <= MAX_COUNT:
        indptr = indptr.astype(np.int32)
    return scipy.sparse.csr_array((values, indices, indptr), shape=(len(counts), width))


def _at_once(block: bytes, n_features: int, n_labels: int) -> _Part | None:
    """The points of a block of whole lines, or None where anything is not as it should be."""
    classes = _CLASS[np.frombuffer(block, np.uint8)]
    position = np.flatnonzero(classes)
    kind = classes[position]
    if kind.max() == _OTHER:
        return None
    separates = kind != _NUMBER
    end = position[separates]
    after = kind[separates]  # what follows each token; tokens may be empty
    before = np.empty_like(after)  # and what stands before it
    before[0] = _NEWLINE
    before[1:] = after[:-1]
    full = np.diff(end, prepend=-1) > 1
    if np.any(~full & ((after > _NEWLINE) | (before > _NEWLINE))):
        return None  # nothing where a number belongs

    is_feature = full & (after == _COLON)
    is_value = full & (before == _COLON)
    is_label = full & ~is_feature & ~is_value
    if (
        np.any(is_feature & (before > _NEWLINE))
        or np.any(is_value & (after > _NEWLINE))
        or np.any(is_label & (before == _SPACE))
        or not np.all(is_value[np.cumsum(separates)[~separates]])  # signs, points and exponents outside values
    ):
        return None

    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # NumPy < 2.3 warns of trailing rubbish, later ones raise
        try:
            numbers = np.fromstring(block.translate(_TO_SPACES), np.float64, sep=" ")
        except (ValueError, DeprecationWarning):
            return None
    if len(numbers) != np.count_nonzero(full):
        return None
    labels, features = numbers[is_label[full]], numbers[is_feature[full]]
    with np.errstate(over="ignore"):
        values = numbers[is_value[full]].astype(np.float32)
    if labels.max(initial=0) >= n_labels or features.max(initial=0) >= n_features or not np.all(np.isfinite(values)):
        return None

    newlines = np.flatnonzero(after == _NEWLINE)
    label_counts = np.diff(np.cumsum(is_label)[newlines], prepend=0)
    feature_counts = np.diff(np.cumsum(is_feature)[newlines], prepend=0)
    if _ascending(labels, label_counts) is not None:
        return None  # labels are few: the slow reader sorts them and drops repetitions
    feature_order = _ascending(features, feature_counts)
    if feature_order is not None:
        features, values = features[feature_order], values[feature_order]
        if _ascending(features, feature_counts) is not None:
            return None  # a feature stands twice
    return _Part(label_counts, labels.astype(np.int32), feature_counts, features.astype(np.int32), values)


def _ascending(numbers: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """None if the numbers strictly ascend within each line, else the order that sorts them within their lines."""
    falls = numbers[1:] <= numbers[:-1]
    starts = np.cumsum(counts)[:-1]
    falls[starts[(starts > 0) & (starts < len(numbers))] - 1] = False
    if not falls.any():
        return None
    return np.lexsort((numbers, np.repeat(np.arange(len(counts)), counts)))


def load_xmc(
    path: str | Path, *, n_features: int | None = None, n_labels: int | None = None, progress: bool = False
) -> Dataset:
    """Reads the XMC text format, plain or compressed by gzip, xz or bzip2.

    First line `n_points n_features n_labels`, then a line a point: `label,label feature:value feature:value`. A line
    that starts with a space, or with a feature, has no labels. Without a header (svmlight, multi-label) the sizes are
    those of the largest numbers met, unless given. Features may come in any order but not twice; a label named twice
    counts once.

    Args:
        path: the file.
        n_features, n_labels: sizes for a file without header; those of a header have to agree.
        progress: show a progress bar on stderr.

    Returns:
        Dataset with `features` float32 and `labels` (all ones) as CSR with ascending indices.

    Raises:
        DataError: anything that is not this format, naming file, line and reason; nothing is returned then.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    limit = [MAX_COUNT if size is None else size for size in (n_features, n_labels)]
    reader: _Reader | None = None
    for block in line_blocks(path, progress):
        if reader is None:
            reader, block = _start(path, block, limit[0], limit[1])
            if reader.n_points is not None:
                for what, asked, found in (
                    ("features", n_features, reader.n_features),
                    ("labels", n_labels, reader.n_labels),
                ):
                    if asked is not None and asked != found:
                        fail(path, reader.line - 1, f"the header announces {found} {what}, expected {asked}")
                n_features, n_labels = reader.n_features, reader.n_labels
        reader.add(block)
    if reader is None:
        fail(path, None, "the file is empty")
    return reader.finish(n_features, n_labels)


def _start(path: Path, block: bytes, n_features: int, n_labels: int) -> tuple[_Reader, bytes]:
    """A reader set up by the header, if there is one, and the lines behind it."""
    line = 1
    block = block.removeprefix(b"\xef\xbb\xbf")
    while block.startswith(b"#"):
        block = block[block.index(b"\n") + 1 :]
        line += 1
    if not block:
        fail(path, None, "no points")
    end = block.index(b"\n")
    header = _HEADER.fullmatch(block[:end])
    if header is None:
        return _Reader(path, n_features, n_labels, line=line), block
    for size in header.groups():
        if len(size) > 18 or int(size) > MAX_COUNT:
            fail(path, line, f"the header's {shown(size)[1:-1]} is above the limit of {MAX_COUNT}")
    n_points, n_features, n_labels = map(int, header.groups())
    return _Reader(path, n_features, n_labels, n_points, line=line + 1), block[end + 1 :]


def save_xmc(path: str | Path, features: Any, labels: Any) -> None:
    """Writes the XMC text format; `.gz`, `.xz` and `.bz2` are compressed. The file appears only when complete.

    Args:
        path: the file to write.
        features: sparse matrix [n, n_features]; values are written as the shortest text that gives the same float32.
        labels: sparse matrix [n, n_labels]; only which entries are not zero is written.

    Raises:
        ValueError: the numbers of rows differ, or a value is not finite. OSError: the file cannot be written.
    """
    path = Path(path)
    x = _canonical(features).astype(np.float32)
    y = _canonical(labels)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"labels: expected {x.shape[0]} rows, as features has, got {y.shape[0]}")
    if not np.all(np.isfinite(x.data)):
        raise ValueError("features: values have to be finite float32 numbers")
    with writing(path) as out:
        out.write(f"{x.shape[0]} {x.shape[1]} {y.shape[1]}\n".encode())
        for start in range(0, x.shape[0], 4096):
            out.write(_lines(x[start : start + 4096], y[start : start + 4096]).encode())


def _lines(x: scipy.sparse.csr_array, y: scipy.sparse.csr_array) -> str:
    values = [text.removesuffix(".0") for text in x.data.astype(str).tolist()]
    pairs = list(map("%d:%s".__mod__, zip(x.indices.tolist(), values, strict=True)))
    names = list(map(str, y.indices.tolist()))
    ends, stops = x.indptr.tolist(), y.indptr.tolist()
    return "".join(
        f"{','.join(names[stops[i] : stops[i + 1]])} {' '.join(pairs[ends[i] : ends[i + 1]])}\n"
        for i in range(x.shape[0])
    )


def _canonical(matrix: Any) -> scipy.sparse.csr_array:
    """A CSR copy with ascending indices and no stored zeros."""
    out = scipy.sparse.csr_array(matrix, copy=True)
    out.sum_duplicates()
    out.eliminate_zeros()
    return out
