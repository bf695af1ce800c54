"""widehead/commands/predict.py -- `widehead predict`: the best classes of points or of lines of text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse

from .. import data
from . import common

if TYPE_CHECKING:
    from ..estimator import Classifier

_BATCH = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="safetensors file of `widehead train`")
    parser.add_argument(
        "data", nargs="?", default="-", metavar="FILE", help="X.npz, a data file, or lines of text (default: stdin)"
    )
    parser.add_argument("--format", choices=data.FORMATS, help="of the data file; lines of text where not given")
    parser.add_argument("-k", type=common.count, default=5, help="classes a point (default: 5)")
    parser.add_argument("--names", metavar="FILE", help="names of the classes: line i, up to a tab, names class i - 1")
    parser.add_argument("-o", "--output", metavar="FILE", help=".npz: a matrix of scores; else text (default: stdout)")
    common.add_general(parser)


def run(arguments: argparse.Namespace) -> int:
    common.prepare(arguments)
    from ..estimator import Classifier  # imports scikit-learn

    model = Classifier.load(arguments.model)
    names = _names(arguments.names, model.n_classes_) if arguments.names else None
    answers = _answers(model, _batches(arguments, model), arguments.k)
    if arguments.output and Path(arguments.output).suffix == ".npz":
        data.save_matrix(arguments.output, _matrix(answers, model.n_classes_))
    elif arguments.output:
        from ..data.files import writing

        with writing(Path(arguments.output)) as out:
            for line in _lines(answers, names, arguments.json):
                out.write(line.encode() + b"\n")
    else:
        for line in _lines(answers, names, arguments.json):
            print(line, flush=sys.stdin.isatty())
    return 0


def _batches(arguments: argparse.Namespace, model: Classifier) -> Iterator[Any]:
    """What the model takes, some points at a time."""
    if model.features is not None and arguments.format is None:
        yield from _texts(arguments.data)
        return
    path = "/dev/stdin" if arguments.data == "-" else arguments.data
    if (arguments.format or data.detect_format(path)) == "npz":
        points = data.load_matrix(path)
        if points.shape[1] != model.n_features_in_:
            raise data.DataError(f"{path}: {points.shape[1]} features, but the model has {model.n_features_in_}")
    else:
        wide = None if model.features is not None else model.n_features_in_
        points = common.load(arguments, [path], n_features=wide).points
    size = points.shape[0] if scipy.sparse.issparse(points) else len(points)
    for start in range(0, size, _BATCH):
        yield points[start : start + _BATCH]


def _texts(path: str) -> Iterator[list[str]]:
    """Lines of a file or of stdin; one at a time where somebody types them."""
    if path == "-":
        lines: Iterable[bytes] = sys.stdin.buffer
        size = 1 if sys.stdin.isatty() else _BATCH
    else:
        from ..data.files import line_blocks

        lines = (line for block in line_blocks(Path(path)) for line in block.splitlines())
        size = _BATCH
    source = iter(lines)
    while batch := list(islice(source, size)):
        yield [line.decode("utf-8", "replace").rstrip("\r\n") for line in batch]


def _answers(model: Classifier, batches: Iterable[Any], k: int) -> Iterator[tuple[Any, Any]]:
    """(scores, classes) [n, k] of every batch."""
    for batch in batches:
        yield model.predict_topk(batch, k)


def _names(path: str, n_classes: int) -> list[str]:
    from ..data.files import line_blocks

    lines = b"".join(line_blocks(Path(path))).decode("utf-8", "replace").splitlines()
    if len(lines) != n_classes:
        raise data.DataError(f"{path}: {len(lines)} names, but the model has {n_classes} classes")
    return [line.partition("\t")[0] for line in lines]


def _lines(answers: Iterable[tuple[Any, Any]], names: list[str] | None, as_json: bool) -> Iterator[str]:
    for scores, classes in answers:
        for row, own in zip(np.asarray(scores).tolist(), np.asarray(classes).tolist(), strict=True):
            labels = own if names is None else [names[c] for c in own]
            if as_json:
                yield json.dumps({"classes": labels, "scores": row}, ensure_ascii=False)
            else:
                yield "\t".join(f"{label}:{score:.4f}" for label, score in zip(labels, row, strict=True))


def _matrix(answers: Iterable[tuple[Any, Any]], n_classes: int) -> scipy.sparse.csr_array:
    parts = list(answers)
    scores = np.concatenate([scores for scores, _ in parts]).astype(np.float32)
    classes = np.concatenate([classes for _, classes in parts])
    n, k = classes.shape
    return scipy.sparse.csr_array((scores.ravel(), classes.ravel(), np.arange(n + 1) * k), shape=(n, n_classes))
