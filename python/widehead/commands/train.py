"""widehead/commands/train.py -- `widehead train`: a data file in, a model out, with its quality and its cost."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from .._training import SCHEDULES
from ..data import Dataset, statistics
from ..metrics import inverse_propensity
from ..plan import human_bytes
from . import common

_LOSSES = ("softmax", "sampled_softmax", "bce", "squared_hinge")
_EXACT_LIMIT = 50_000  # up to so many classes the exact losses are affordable on a few cores
_STEPS = 1500  # that a model with few points needs, whatever their number: tuned on bibtex and Debian's dependencies


def _held_out(text: str) -> float:
    value = float(text)
    if not (0 <= value < 1 or (value >= 1 and value == int(value))):
        raise ValueError
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_data(parser, "data file (XMC text, text<TAB>labels, lists), or X.npz and Y.npz; may be compressed")
    parser.add_argument("-o", "--output", required=True, metavar="MODEL", help="safetensors file to write")
    held = parser.add_mutually_exclusive_group()
    held.add_argument(
        "--validation",
        type=common.number(_held_out, 0, "a share below 1, or a number of points"),
        default=0.1,
        metavar="PART",
        help="hold out this share of the points, drawn by the seed, or this many of the last; 0: none (default: 0.1)",
    )
    held.add_argument(
        "--test", nargs="+", metavar="FILE", help="measure on this data instead, and train on all the rest"
    )

    model = parser.add_argument_group("model")
    model.add_argument("--head", choices=("dense", "sparse"), default="dense", help="output layer (default: dense)")
    model.add_argument(
        "--loss", choices=_LOSSES, help=f"default: bce up to {_EXACT_LIMIT} classes, else sampled_softmax"
    )
    model.add_argument("--dim", type=common.count, default=128, help="length of the hidden vectors (default: 128)")
    model.add_argument(
        "--intermediate", type=common.count, metavar="H", help="width of a ReLU layer before the head (sparse: 4096)"
    )
    model.add_argument(
        "--dictionary",
        type=common.count,
        metavar="A",
        help="width of a linear layer before the head (sparse: over --dim)",
    )
    model.add_argument("--dropout", type=float, default=0.0, help="share of the features left out (default: 0)")
    model.add_argument("--fan-in", type=common.count, metavar="K", help="of a sparse head (default: 32)")
    model.add_argument("--group-size", type=common.count, metavar="G", help="of a sparse head (default: 1)")
    model.add_argument(
        "--dense-head",
        type=common.count,
        metavar="N",
        help="dense rows for the N most frequent labels (sparse head)",
    )
    model.add_argument(
        "--group-labels",
        action="store_true",
        default=None,
        help="labels that occur together share a group (sparse head)",
    )
    model.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    model.add_argument("--scale", type=float, default=8.0, help="length that hidden vectors are given (default: 8)")
    model.add_argument("--negatives", type=common.count, default=512, help="of sampled softmax, a batch (default: 512)")
    model.add_argument("--ngrams", type=common.count, nargs=2, default=(2, 4), metavar=("MIN", "MAX"), help="for texts")
    model.add_argument(
        "--hash-bits", type=common.number(int, 8, "8 to 30", 30), default=18, help="for texts (default: 18)"
    )

    fit = parser.add_argument_group("training")
    fit.add_argument("--epochs", type=common.count, help=f"passes over the data (default: {_STEPS} steps, 3 to 10)")
    fit.add_argument("--batch-size", type=common.count, help="points a step (default: by their number, 32 to 512)")
    fit.add_argument("--lr", type=float, help="highest learning rate (default: 0.1; sparse: 0.001)")
    fit.add_argument("--optimizer", choices=("adagrad", "adam", "sgd"), help="(default: adagrad; sparse: adam)")
    fit.add_argument("--schedule", choices=SCHEDULES, default="linear", help="of the rate (default: linear)")
    fit.add_argument("--weight-decay", type=float, default=0.0, help="(default: 0)")
    fit.add_argument("--early-stopping", action="store_true", help="end when the validation figure improves no more")
    fit.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        metavar="PART",
        help="share of the training points that judges the epochs, for --early-stopping and --schedule plateau; the "
        "best epoch's model is kept, and --validation and --test stay unseen (default: 0.1)",
    )
    fit.add_argument("--validation-metric", default="P@3", metavar="NAME@K", help="that figure (default: P@3)")
    fit.add_argument(
        "--n-iter-no-change", type=common.count, default=5, metavar="N", help="epochs till the end (default: 5)"
    )
    fit.add_argument(
        "--patience", type=common.count, default=2, metavar="N", help="epochs till plateau halves the rate (default: 2)"
    )
    fit.add_argument("--seed", type=int, default=0, help="of weights, order and samples: the same seed, the same model")
    fit.add_argument("--resume", action="store_true", help="go on from MODEL.checkpoint if a run was cut short")
    fit.add_argument(
        "--checkpoint-every", type=float, default=60.0, metavar="S", help="seconds (default: 60); 0: never"
    )

    out = parser.add_argument_group("results")
    out.add_argument(
        "--ks", type=common.count, nargs="+", default=(1, 3, 5), metavar="K", help="places (default: 1 3 5)"
    )
    out.add_argument(
        "--propensity", type=float, nargs=2, default=(0.55, 1.5), metavar=("A", "B"), help="constants of PSP"
    )
    out.add_argument("--plot", metavar="PNG", help="draw the loss and the validation precision by epoch")
    common.add_general(parser)


def run(arguments: argparse.Namespace) -> int:
    common.prepare(arguments)
    if arguments.plot:
        _pyplot()  # fail before the work, not after it
    train, test = _load(arguments)
    from ..estimator import Classifier  # imports scikit-learn

    watcher = _Watcher(test)
    checkpoint = f"{arguments.output}.checkpoint" if arguments.checkpoint_every > 0 or arguments.resume else None
    model = Classifier(**_parameters(arguments, train), checkpoint=checkpoint, callback=watcher)
    classes = common.single_labels(train)
    clock, cpu = time.perf_counter(), time.process_time()
    model.fit(train.points, train.labels if classes is None else classes)
    seconds, cpu_seconds = (
        time.perf_counter() - clock - watcher.seconds,
        time.process_time() - cpu - watcher.cpu_seconds,
    )
    model.save(arguments.output)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)

    metrics = {}
    if test is not None:
        weights = inverse_propensity(train.labels, *arguments.propensity)
        label = None if arguments.quiet else "evaluating"
        metrics = common.measure(model, test, arguments.ks, weights, label)
    if arguments.plot:
        _plot(arguments.plot, watcher.epochs)
    _report(arguments, model, train, test, metrics, watcher, seconds, cpu_seconds)
    return 0


def _load(arguments: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    whole = common.load(arguments)
    if arguments.test:
        test = common.load(arguments, arguments.test, n_features=whole.n_features, n_labels=whole.n_labels)
        common.same_kind(test, whole.texts is not None)
        return whole, test
    if arguments.validation == 0:
        return whole, None
    if arguments.validation < 1:
        return whole.split(arguments.validation, arguments.seed)
    last = len(whole) - int(arguments.validation)
    if last < 1:
        raise ValueError(f"--validation: {int(arguments.validation)} of {len(whole)} points leave none to train on")
    rows = np.arange(len(whole))
    return whole.take(rows[:last]), whole.take(rows[last:])


def _parameters(arguments: argparse.Namespace, train: Dataset) -> dict[str, Any]:
    """Arguments of the Classifier."""
    out = {
        name: getattr(arguments, name)
        for name in (
            *("head", "dim", "dictionary", "dtype", "scale", "negatives", "schedule", "weight_decay", "dropout"),
            *("early_stopping", "validation_fraction", "validation_metric", "n_iter_no_change", "patience"),
            *("seed", "resume", "checkpoint_every"),
        )
    }
    sparse = arguments.head == "sparse"
    out["intermediate"] = arguments.intermediate or (4096 if sparse and not arguments.dictionary else None)
    out["optimizer"] = arguments.optimizer or ("adam" if sparse else "adagrad")
    out["lr"] = (1e-3 if sparse else 0.1) if arguments.lr is None else arguments.lr
    asked = {name: getattr(arguments, name) for name in ("fan_in", "group_size", "dense_head", "group_labels")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and not sparse:
        raise ValueError(f"--{next(iter(asked)).replace('_', '-')}: belongs to --head sparse, the head is dense")
    if sparse:
        grouped = asked.pop("group_labels", False)
        if grouped or asked.get("dense_head"):
            asked["class_order"] = "cooccurrence" if grouped else "frequency"
        out["head_options"] = asked
    out["batch_size"] = batch = arguments.batch_size or _batch_size(len(train))
    out["epochs"] = arguments.epochs or min(10, max(3, round(_STEPS * batch / len(train))))
    exact = "squared_hinge" if sparse else "bce"
    out["loss"] = arguments.loss or (exact if sparse or train.n_labels <= _EXACT_LIMIT else "sampled_softmax")
    out["n_classes"] = train.n_labels
    out["verbose"] = not arguments.quiet
    if arguments.checkpoint_every <= 0:
        out["checkpoint_every"] = float("inf")
    if train.texts is not None:
        from ..text import NGramHasher

        out["features"] = NGramHasher(2**arguments.hash_bits, tuple(arguments.ngrams))
    return out


def _batch_size(points: int) -> int:
    """The power of two from 32 to 512 that gives an epoch some 300 steps."""
    return 2 ** min(9, max(5, round(np.log2(max(1, points) / 300))))


class _Watcher:
    """Gathers loss and precision of a part of the held-out points after every epoch, and the time that this takes."""

    def __init__(self, test: Dataset | None, points: int = 1000) -> None:
        self.sample = test.take(np.arange(min(len(test), points))) if test is not None else None
        self.epochs: list[dict[str, float]] = []
        self.seconds = self.cpu_seconds = 0.0

    def __call__(self, model: Any, epoch: int, loss: float) -> None:
        clock, cpu = time.perf_counter(), time.process_time()
        entry = {"epoch": epoch + 1, "loss": float(loss)}
        if self.sample is not None:
            entry["P@1"] = common.measure(model, self.sample, (1,))["P@1"]
        if "validation" in model.history_[-1]:
            entry["validation"] = model.history_[-1]["validation"]
        self.epochs.append(entry)
        self.seconds += time.perf_counter() - clock
        self.cpu_seconds += time.process_time() - cpu


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'widehead[plot]'") from None
    return pyplot


def _plot(path: str, epochs: list[dict[str, float]]) -> None:
    pyplot = _pyplot()
    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    x = [entry["epoch"] for entry in epochs]
    left.plot(x, [entry["loss"] for entry in epochs], "o-", color="tab:blue", label="training loss")
    left.set(xlabel="epoch", ylabel="training loss")
    if epochs and "P@1" in epochs[0]:
        right = left.twinx()
        right.plot(x, [100 * entry["P@1"] for entry in epochs], "s--", color="tab:orange", label="P@1")
        right.set(ylabel="P@1 on held-out points, %")
    figure.legend(loc="upper center", ncols=2)
    left.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _report(
    arguments: argparse.Namespace,
    model: Any,
    train: Dataset,
    test: Dataset | None,
    metrics: dict[str, float],
    watcher: _Watcher,
    seconds: float,
    cpu_seconds: float,
) -> None:
    size = Path(arguments.output).stat().st_size
    if arguments.json:
        common.print_json(
            {
                "output": arguments.output,
                "train": statistics(train),
                "test_points": len(test) if test is not None else 0,
                "parameters": {k: v for k, v in model.get_params(deep=False).items() if json_able(v)},
                "epochs": watcher.epochs,
                "best_epoch": None if model.best_epoch_ is None else model.best_epoch_ + 1,
                "metrics": metrics,
                "train_seconds": seconds,
                "train_cpu_seconds": cpu_seconds,
                "peak_bytes": common.peak_memory(),
                "model_bytes": size,
            }
        )
        return
    tables = []
    if metrics and test is not None:
        tables.append(common.metric_table(f"Quality on {len(test):,} points not trained on", metrics))
    best = []
    if model.best_epoch_ is not None:
        name = f"best {model.validation_metric}, of epoch {model.best_epoch_ + 1}"
        best = [(name, f"{100 * model.best_validation_score_:.2f}")]
    cost = [
        ("training points", f"{len(train):,}"),
        ("classes", f"{train.n_labels:,}"),
        ("loss, last epoch", f"{model.history_[-1]['loss']:.4g}" if model.history_ else "-"),
        *best,
        ("training time", f"{seconds:.1f} s"),
        ("processor time", f"{cpu_seconds:.1f} s"),
        ("peak memory of the process", human_bytes(common.peak_memory())),
        (f"model {arguments.output}", human_bytes(size)),
    ]
    common.show(*tables, common.value_table(f"{model.loss}, d = {model.bag_.dim}, {len(model.history_)} epochs", cost))


def json_able(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))
