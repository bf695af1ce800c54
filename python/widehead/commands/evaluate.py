"""widehead/commands/evaluate.py -- `widehead evaluate`: the metrics of a model on a data file."""

from __future__ import annotations

import argparse
import time

from ..metrics import inverse_propensity
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="safetensors file of `widehead train`")
    common.add_data(parser)
    parser.add_argument("--ks", type=common.count, nargs="+", default=(1, 3, 5), metavar="K", help="places")
    parser.add_argument(
        "--train-labels", metavar="FILE", help="data the model was trained on (or its Y.npz): adds propensity scores"
    )
    parser.add_argument(
        "--propensity", type=float, nargs=2, default=(0.55, 1.5), metavar=("A", "B"), help="constants of PSP"
    )
    common.add_general(parser)


def run(arguments: argparse.Namespace) -> int:
    common.prepare(arguments)
    from ..estimator import Classifier  # imports scikit-learn

    model = Classifier.load(arguments.model)
    wide = None if model.features is not None else model.n_features_in_
    dataset = common.load(arguments, n_features=wide, n_labels=model.n_classes_)
    common.same_kind(dataset, model.features is not None)
    weights = None
    if arguments.train_labels:
        weights = inverse_propensity(_labels(arguments, model.n_classes_), *arguments.propensity)
    start = time.perf_counter()
    metrics = common.measure(model, dataset, arguments.ks, weights, None if arguments.quiet else "evaluating")
    seconds = time.perf_counter() - start
    if arguments.json:
        common.print_json({"points": len(dataset), "metrics": metrics, "seconds": seconds})
    else:
        rate = f"{len(dataset) / seconds:,.0f} a second"
        common.show(common.metric_table(f"Quality on {len(dataset):,} points, {rate}", metrics))
    return 0


def _labels(arguments: argparse.Namespace, n_labels: int) -> object:
    from .. import data

    path = arguments.train_labels
    if data.detect_format(path) != "npz":
        return common.load(arguments, [path], n_labels=n_labels).labels
    labels = data.load_matrix(path)
    if labels.shape[1] != n_labels:
        raise data.DataError(f"{path}: {labels.shape[1]} labels, but the model has {n_labels}")
    return labels
