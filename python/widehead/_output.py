"""widehead/_output.py -- what the NumPy output layers share: steps, losses, and queries over all classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import as_batch, example_weights
from ._core import DtypeError, NonFiniteError, ShapeError
from ._head import Head
from ._optimizer import ROUNDINGS
from ._results import ForwardResult, Reduction, StepResult, TopKResult
from .labels import Labels, Target, as_target, check_range
from .options import DenseOptions, SparseOptions, choose
from .sampling import IGNORED, SampledClasses


class OutputHead(Head):
    """An output layer whose logits are computed tile by tile. `prefix` names its functions of the core."""

    prefix: ClassVar[str]
    options: DenseOptions | SparseOptions
    class_weight: NDArray[np.float32] | None

    def step(
        self,
        hidden: NDArray,
        target: ArrayLike | Labels | Any,
        lr: float,
        optimizer: str = "sgd",
        *,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding: str | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> StepResult:
        """Loss, gradient to hidden, and one optimiser step on the weights, without a gradient of the weights in memory.

        Args:
            hidden, target: a batch, as the class says.
            lr: step size.
            optimizer: "sgd", "momentum" (SGD with `momentum`), "adam" (AdamW: decoupled decay) or "adagrad" (one
                accumulator a row).
            momentum, betas, eps, weight_decay: of the optimiser, as in torch.optim.
            rounding: of bfloat16 weights: "stochastic" (the default), "nearest", or "kahan" (keeps the lost bits: 2
                bytes a weight).
            sample_weight: weights of the examples, of the batch's shape.

        Raises:
            NonFiniteError: hidden holds NaN or infinity. The weights and the state are as before, as after every error.
            LabelError: a class out of range.
            ShapeError, DtypeError: an argument that does not fit.
        """
        rows, shape = as_batch(hidden, self.in_features)
        goal = as_target(target, shape, self.n_classes)
        reduction = self._reduction(goal, example_weights(sample_weight, shape))
        scale = reduction.scale.astype(self._result)
        # An integer hidden view stands for bfloat16 bits; the gradient goes back in the same coat.
        grad_hidden = np.empty(rows.shape, rows.dtype)
        losses = np.zeros(len(rows), self._result)
        if len(rows):
            rounding = choose(
                rounding or ("stochastic" if self.dtype == "bfloat16" else "nearest"), ROUNDINGS, "rounding"
            )
            kahan = rounding == "kahan" and self.dtype == "bfloat16"
            before = self._optimizer.copy()
            try:
                self._optimizer.prepare(optimizer, self._weight, self._bias, kahan)
                update = self._optimizer.arguments(
                    rounding,
                    self.seed,
                    lr=lr,
                    momentum=momentum,
                    beta1=betas[0],
                    beta2=betas[1],
                    eps=eps,
                    weight_decay=weight_decay,
                )
                self._train(rows, goal, scale, losses, grad_hidden, update)
            except BaseException:
                # The arrays of a refused step would look like the state of an optimiser that has run.
                self._optimizer = before
                raise
            self._optimizer.step += 1
            self.steps += 1
            self._after_step()
        return StepResult(
            reduction(losses, shape), grad_hidden.view(np.asarray(hidden).dtype).reshape(np.shape(hidden))
        )

    def _train(
        self,
        hidden: NDArray,
        goal: Target,
        scale: NDArray,
        losses: NDArray,
        grad_hidden: NDArray,
        update: dict[str, Any],
    ) -> None:
        arguments = {
            **self._layer(hidden),
            **goal.arguments(),
            **self._loss_arguments(),
            "class_weight": self.class_weight,
        }
        lse = None
        if self.options.core_loss == "softmax":
            lse = np.empty_like(losses)
            self._call("forward", **arguments, losses=losses, output=None, lse=lse)
        # The other losses need no normaliser, so one pass does everything.
        self._backward(
            **arguments,
            lse=lse,
            grad_losses=scale,
            grad_hidden=grad_hidden,
            update=update,
            losses=None if lse is not None else losses,
        )

    def _train_rows(
        self,
        sampled: SampledClasses,
        hidden: NDArray,
        goal: Target,
        scale: NDArray,
        losses: NDArray,
        grad_hidden: NDArray,
        update: dict[str, Any],
    ) -> None:
        """A step on some classes, the same for all examples."""
        weight = np.empty((len(sampled.rows), self.in_features), self._weight.dtype)
        _core.gather_rows(weight=self._weight, rows=sampled.rows, out=weight)
        arguments = {
            "hidden": hidden,
            "weight": weight,
            "bias": None if self._bias is None else self._bias[sampled.rows],
            "offset": sampled.offset,
            "indptr": goal.indptr,
            "indices": sampled.indices,
            "values": goal.values,
            "class_weight": None if self.class_weight is None else self.class_weight[sampled.rows],
            **self._loss_arguments(),
            "ignore_index": IGNORED,
        }
        lse = np.empty_like(losses)
        grad_weight = np.empty(weight.shape, self._result)
        grad_bias = None if self._bias is None else np.empty(len(weight), self._result)
        _core.dense_forward(**arguments, losses=losses, output=None, lse=lse)
        self._backward(
            **arguments,
            lse=lse,
            grad_losses=scale,
            grad_hidden=grad_hidden,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
        )
        _core.update_rows(
            weight=self._weight,
            rows=sampled.rows,
            grad=grad_weight,
            bias=self._bias,
            grad_bias=grad_bias,
            update=update,
        )

    def _backward(self, **arguments: Any) -> None:
        self._call("backward", **arguments)

    def _after_step(self) -> None:
        """Called when a step has been taken and counted."""

    def _call(self, operation: str, **arguments: Any) -> Any:
        """The operation of the core on this layer."""
        return getattr(_core, f"{self.prefix}_{operation}")(**arguments)

    def forward(
        self,
        hidden: NDArray,
        target: ArrayLike | Labels | Any,
        *,
        sample_weight: ArrayLike | None = None,
        return_lse: bool = False,
    ) -> ForwardResult:
        """Output and loss of a batch, over all classes (also for a head that trains on samples); nothing changes.

        `output`: softmax: the log-probability of the target, sum_j y_j (z_j - lse) over several; bce, hinge: sum_j y_j
        z_j. `lse` is None unless `return_lse` (softmax only).
        """
        rows, shape = as_batch(hidden, self.in_features)
        goal = as_target(target, shape, self.n_classes)
        if return_lse and self.options.core_loss != "softmax":
            raise ShapeError(
                f"return_lse: expected False with loss={self.options.loss!r}, which has no normaliser, got True"
            )
        reduction = self._reduction(goal, example_weights(sample_weight, shape))
        losses, output, lse = (np.zeros(len(rows), self._result) for _ in range(3))
        if len(rows):
            self._call(
                "forward",
                **self._layer(rows),
                **goal.arguments(),
                **self._loss_arguments(),
                class_weight=self.class_weight,
                losses=losses,
                output=output,
                lse=lse if return_lse else None,
            )
        return ForwardResult(
            output.reshape(shape), reduction(losses, shape), lse.reshape(shape) if return_lse else None
        )

    def scores(self, hidden: NDArray, classes: ArrayLike | None = None) -> NDArray:
        """Logits `[..., n]` of the classes int64 `[..., n]`, or `[n]` for the whole batch; of all of them when None."""
        rows, shape = as_batch(hidden, self.in_features)
        if classes is None:
            scores = np.empty((len(rows), self.n_classes), self._result)
            if len(rows):
                self._call("logits", **self._query(rows), logits=scores)
            return scores.reshape(*shape, self.n_classes)
        wanted = np.asarray(classes)
        if wanted.dtype.kind not in "iu" and wanted.size:
            raise DtypeError(f"classes: expected integers, got {wanted.dtype}")
        if wanted.ndim == 1:
            wanted = np.broadcast_to(wanted, (*shape, len(wanted)))
        if wanted.shape[:-1] != shape:
            raise ShapeError(f"classes: expected shape {[*shape, 'n']} or ['n'], got {list(wanted.shape)}")
        n = wanted.shape[-1]
        wanted = np.ascontiguousarray(wanted.reshape(len(rows), n), dtype=np.int64)
        check_range(wanted.reshape(-1), self.n_classes, "classes")
        scores = np.empty((len(rows), n), self._result)
        if scores.size:
            self._call("scores", **self._query(rows), classes=wanted, scores=scores)
        return scores.reshape(*shape, n)

    def log_prob(self, hidden: NDArray, classes: ArrayLike | None = None) -> NDArray:
        """Log-probabilities `[..., n]` of the given classes (as in `scores`), or `[..., n_classes]` of all.

        Softmax: z - lse over all classes. bce: log sigmoid(z), each class by itself.
        """
        if self.options.loss == "squared_hinge":
            raise ShapeError(
                "log_prob: expected a softmax or bce head, got squared_hinge, whose scores are no probabilities"
            )
        scores = self.scores(hidden, classes)
        if self.options.loss == "bce":
            return -np.logaddexp(np.zeros_like(scores), -scores)
        return scores - self.lse(hidden)[..., None]

    def lse(self, hidden: NDArray) -> NDArray:
        """The log-sum-exp of all logits, of the batch's shape."""
        rows, shape = as_batch(hidden, self.in_features)
        lse = np.empty(len(rows), self._result)
        if len(rows):
            nothing = np.full(len(rows), self.options.ignore_index, np.int64)
            arguments = {**self._loss_arguments(), "loss": "softmax", "label_smoothing": 0.0}
            self._call(
                "forward",
                **self._layer(rows),
                indptr=None,
                indices=nothing,
                values=None,
                **arguments,
                losses=None,
                output=None,
                lse=lse,
            )
        return lse.reshape(shape)

    def topk(
        self, hidden: NDArray, k: int, exclude: Labels | Iterable[Sequence[int]] | Any | None = None
    ) -> TopKResult:
        """The k best classes, best first, in a stream over the classes; memory O(batch k).

        Args:
            hidden: `[..., in_features]`.
            k: how many.
            exclude: classes that must not appear (items already seen): `Labels`, a CSR matrix or a list of lists, a row
                an example.

        Returns:
            scores and int64 classes `[..., k]`. Where fewer than k classes are left, the rest is -infinity and -1; a
            class whose logit is -infinity (a masked one) or NaN is never chosen.
        """
        rows, shape = as_batch(hidden, self.in_features)
        if not isinstance(k, int | np.integer) or k < 1:
            raise ShapeError(f"k: expected an integer of at least 1, got {k!r}")
        indptr = indices = None
        if exclude is not None:
            if not isinstance(exclude, Labels) and not hasattr(exclude, "tocsr"):
                exclude = Labels.from_lists(exclude, self.n_classes)
            out = as_target(exclude, shape, self.n_classes)
            indptr, indices = out.indptr, out.indices
        scores, classes = np.empty((len(rows), k), self._result), np.empty((len(rows), k), np.int64)
        if len(rows):
            self._call(
                "topk",
                **self._query(rows),
                k=k,
                exclude_indptr=indptr,
                exclude_indices=indices,
                scores=scores,
                classes=classes,
            )
        return TopKResult(scores.reshape(*shape, k), classes.reshape(*shape, k))

    def predict(self, hidden: NDArray) -> NDArray[np.int64]:
        """The best class of every example, int64 of the batch's shape."""
        return self.topk(hidden, 1).classes[..., 0]

    def set_bias(self, value: ArrayLike) -> None:
        """Sets the bias of every class, `[n_classes]`."""
        self.bias = np.asarray(value)

    @property
    def _result(self) -> type[np.floating]:
        return np.float64 if self.dtype == "float64" else np.float32

    def _layer(self, hidden: NDArray) -> dict[str, Any]:
        return {"hidden": hidden, "weight": self._weight, "bias": self._bias}

    def _query(self, hidden: NDArray) -> dict[str, Any]:
        """The layer as queries take it."""
        return self._layer(hidden)

    def _loss_arguments(self) -> dict[str, Any]:
        o = self.options
        return {
            "loss": o.core_loss,
            "label_smoothing": o.label_smoothing,
            "lse_penalty": o.lse_penalty,
            "ignore_index": o.ignore_index,
        }

    def _reduction(self, goal: Target, sample_weight: NDArray[np.float64] | None) -> Reduction:
        o = self.options
        class_weight = self.class_weight if o.core_loss == "softmax" else None
        return Reduction(o.reduction, goal, self.n_classes, o.ignore_index, sample_weight, class_weight)

    def _option_tensors(self) -> dict[str, NDArray]:
        return {} if self.class_weight is None else {"class_weight": self.class_weight}

    def _options_from_file(self, config: dict[str, Any], tensors: dict[str, NDArray]) -> dict[str, Any]:
        return {**config, **tensors}


def checked_class_weight(weight: ArrayLike | None, n_classes: int) -> NDArray[np.float32] | None:
    if weight is None:
        return None
    array = np.array(weight, dtype=np.float32)
    if array.shape != (n_classes,):
        raise ShapeError(f"class_weight: expected shape [n_classes] = [{n_classes}], got {list(array.shape)}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise NonFiniteError("class_weight: expected finite weights of at least 0")
    return array
