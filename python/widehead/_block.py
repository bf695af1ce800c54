"""widehead/_block.py -- a NumPy sparse head in two layers: a dense row for each frequent class, inputs for the others.

Every call of the core goes through `run`: classes become rows on the way in, both layers compute over their ranges of
the rows (ranges.h says how losses of ranges become one), and rows become classes on the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._arrays import to_bfloat16
from ._core import LabelError
from ._order import refuse_repeated
from .files import HeadFile

if TYPE_CHECKING:
    from ._dense import DenseHead
    from ._sparse import SparseHead

Arguments = dict[str, Any]
_LAYER = ("weight", "bias", "index", "group_size")
_STATE = ("first", "second", "compensation", "bias_first", "bias_second")


def run(head: SparseHead, operation: str, arguments: Arguments) -> None:
    """Operation of the core on a head with frequent classes, an order of its classes, or both."""
    order = head._order
    if order is None:
        _dispatch(head, operation, arguments)
        return
    inward = dict(arguments)
    for name in ("classes",) if operation == "scores" else ("exclude_indices",):
        if inward.get(name) is not None:
            inward[name] = order.rows(inward[name])
    if "indices" in inward:
        if inward["indptr"] is not None:
            inward["indices"] = order.rows(inward["indices"])
        else:
            inward["indices"] = order.targets(inward["indices"], inward["ignore_index"])
        inward["ignore_index"] = order.IGNORED
        inward["class_weight"] = order.weights(inward.get("class_weight"))
    try:
        _dispatch(head, operation, inward)
    except LabelError:
        refuse_repeated(arguments["indptr"], arguments["indices"])  # the core has named its row
        raise
    if operation == "topk":
        classes = arguments["classes"]
        classes[...] = np.where(classes >= 0, order.order[classes], -1)
    elif operation == "logits":
        arguments["logits"][...] = arguments["logits"][:, order.rank]


def _dispatch(head: SparseHead, operation: str, arguments: Arguments) -> None:
    if head.frequent is None:
        getattr(_core, f"sparse_{operation}")(**arguments)
    else:
        _OPERATIONS[operation](head, head.frequent, arguments)


def _layers(head: SparseHead, frequent: DenseHead, arguments: Arguments) -> tuple[Arguments, Arguments]:
    """Arguments of both layers: the frequent classes, then the others."""
    shared = {name: value for name, value in arguments.items() if name not in _LAYER}
    dense = {**shared, "weight": frequent._weight, "bias": frequent._bias}
    sparse = dict(arguments)
    if "indices" in arguments:
        for layer, first in ((dense, 0), (sparse, frequent.n_classes)):
            layer |= {"n_classes": head.n_classes, "first_class": first}
    return dense, sparse


def _forward(head: SparseHead, frequent: DenseHead, arguments: Arguments) -> None:
    dense, sparse = _layers(head, frequent, arguments)
    softmax = arguments["loss"] == "softmax"
    losses, output, lse = (arguments[name] for name in ("losses", "output", "lse"))
    if softmax and lse is None:
        lse = np.empty(len(arguments["hidden"]), head._result)
    if not softmax:
        lse = None
    _core.dense_forward(**{**dense, "lse": lse})
    more: dict[str, NDArray] = {}
    for name, mine in (("losses", losses), ("output", output), ("lse", lse)):
        sparse[name] = None if mine is None else more.setdefault(name, np.empty_like(mine))
    _core.sparse_forward(**sparse)
    for name, mine in (("losses", losses), ("output", output)):
        if mine is not None:
            mine += more[name]
    if lse is not None:
        with np.errstate(invalid="ignore"):  # NaN goes on
            np.logaddexp(lse, more["lse"], out=lse)
        _join(head, arguments, lse)


def _join(head: SparseHead, arguments: Arguments, lse: NDArray) -> None:
    if arguments["losses"] is None and arguments["output"] is None:
        return
    names = ("indptr", "indices", "values", "label_smoothing", "lse_penalty", "ignore_index", "losses", "output")
    shared = {name: arguments[name] for name in names}
    _core.join_softmax(**shared, class_weight=arguments.get("class_weight"), n_classes=head.n_classes, lse=lse)


def _backward(head: SparseHead, frequent: DenseHead, arguments: Arguments) -> None:
    """With `update` the optimiser's step on both: the frequent classes have a state of their own, and the same step
    count."""
    dense, sparse = _layers(head, frequent, arguments)
    first, grad_hidden, losses = frequent._optimizer.copy(), arguments["grad_hidden"], arguments["losses"]
    update = arguments["update"]
    frequent._optimizer.prepare(
        head._optimizer.name or "sgd", frequent._weight, frequent._bias, "compensation" in update
    )
    state = {name: frequent._optimizer.arrays[name] for name in _STATE if name in update}
    dense["update"] = {**update, **state}
    sparse["update"] = {**update, "first_row": frequent.n_classes}
    # Both gradients in full precision, so that they are rounded once.
    both = [np.empty(grad_hidden.shape, head._result) for _ in range(2)]
    other = None if losses is None else np.empty_like(losses)
    try:
        _core.dense_backward(**{**dense, "grad_hidden": both[0]})
    except BaseException:
        frequent._optimizer = first
        raise
    # The same checks of the same batch have just been passed: this one does not throw.
    _core.sparse_backward(**{**sparse, "grad_hidden": both[1], "losses": other})
    _add(losses, other)
    _round_to(grad_hidden, both[0] + both[1])
    frequent._optimizer.step += 1
    frequent.steps += 1


def _logits(head: SparseHead, frequent: DenseHead, arguments: Arguments) -> None:
    dense, sparse = _layers(head, frequent, arguments)
    logits, n = arguments["logits"], frequent.n_classes
    _core.dense_logits(**{**dense, "logits": logits[:, :n]})
    _core.sparse_logits(**{**sparse, "logits": logits[:, n:]})


def _scores(head: SparseHead, frequent: DenseHead, arguments: Arguments) -> None:
    dense, sparse = _layers(head, frequent, arguments)
    classes, scores, n = arguments["classes"], arguments["scores"], frequent.n_classes
    other = np.empty_like(scores)
    _core.dense_scores(**{**dense, "classes": np.minimum(classes, n - 1)})
    _core.sparse_scores(**{**sparse, "classes": np.maximum(classes - n, 0), "scores": other})
    np.copyto(scores, other, where=classes >= n)


def _topk(head: SparseHead, frequent: DenseHead, arguments: Arguments) -> None:
    dense, sparse = _layers(head, frequent, arguments)
    scores, classes, n = arguments["scores"], arguments["classes"], frequent.n_classes
    more = {"scores": np.empty_like(scores), "classes": np.empty_like(classes)}
    if arguments["exclude_indices"] is not None:
        more["exclude_indices"] = arguments["exclude_indices"] - n
    _core.dense_topk(**dense)
    _core.sparse_topk(**{**sparse, **more})
    scores_of_both = np.concatenate([scores, more["scores"]], axis=1)
    others = np.where(more["classes"] >= 0, more["classes"] + n, -1)
    classes_of_both = np.concatenate([classes, others], axis=1)
    best = np.argsort(-scores_of_both, axis=1, kind="stable")[:, : scores.shape[1]]  # the lower row of equal scores
    scores[...] = np.take_along_axis(scores_of_both, best, 1)
    classes[...] = np.take_along_axis(classes_of_both, best, 1)


def _add(to: NDArray | None, more: NDArray | None) -> None:
    if to is not None:
        to += more


def _round_to(out: NDArray, value: NDArray) -> None:
    if out.dtype == np.uint16:
        out[...] = to_bfloat16(value)
    else:
        with np.errstate(over="ignore"):  # float16, where the core gives infinity too
            out[...] = value


_PREFIXES = {"frequent.": "", "optimizer.frequent.": "optimizer."}


def named(tensors: dict[str, NDArray]) -> dict[str, NDArray]:
    """The tensors of the frequent classes' layer under the names that the head's file has for them."""
    dots = ("optimizer.", "optimizer.frequent."), ("", "frequent.")
    return {next(new + n.removeprefix(old) for old, new in dots if n.startswith(old)): a for n, a in tensors.items()}


def parted(file: HeadFile) -> tuple[HeadFile, dict[str, NDArray]]:
    """A head's file without the tensors of the frequent classes' layer, and those under its own names."""
    own, others = {}, {}
    for name, array in file.tensors.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            own[name] = array
        else:
            others[_PREFIXES[prefix] + name.removeprefix(prefix)] = array
    return replace(file, tensors=own), others


_OPERATIONS: dict[str, Callable[[SparseHead, DenseHead, Arguments], None]] = {
    "forward": _forward,
    "backward": _backward,
    "logits": _logits,
    "scores": _scores,
    "topk": _topk,
}
