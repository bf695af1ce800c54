"""widehead/_dense.py -- the NumPy face of the dense head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import check_finite
from ._core import ShapeError
from ._output import OutputHead, checked_class_weight
from .labels import Target
from .options import DenseOptions
from .sampling import Proposal, sample_classes


class DenseHead(OutputHead):
    """The exact output layer, fused: losses, gradients and updates without ever storing the logits.

    Logits are z = W h + b. Classes are walked in tiles that stay in cache, so a step needs no memory beyond the weights
    and the optimiser's state; arXiv 2411.09009 describes the layout, arXiv 1805.02867 the online normaliser.

    Args:
        in_features: size d of hidden.
        n_classes: number of classes D.
        loss: "softmax"; "sampled_softmax", which trains on shared negatives; "bce" or "squared_hinge", where every
            class that is not a target is a negative.
        label_smoothing: in [0, 1), softmax with one class an example.
        ignore_index: a target that does not count.
        class_weight: `[n_classes]` weights, finite and at least 0.
        lse_penalty: adds lse_penalty * lse^2 to the softmax loss (the "z-loss" of language models).
        softcap: logits become softcap * tanh(z / softcap).
        filter_eps: skip the gradient of a tile of classes in which every entry is below filter_eps times the largest
            weight of an example in the loss; each skipped entry is in error by less than that (arXiv 2411.09009).
            `filtered` counts them.
        negatives: draws a step, for sampled softmax.
        proposal: where negatives come from: "uniform", "log_uniform" or `[n_classes]` positive weights.
        bias: whether classes have a bias.
        reduction: "mean" (softmax: divided by the class weights of the targets that count, as in torch; multi-label: by
            the number of examples; sample weights count as so many examples; 0 where all that sums to 0), "sum" or
            "none".
        dtype: "float32", "bfloat16" or "float64" of the weights. bfloat16 weights multiply hidden rounded to bfloat16
            and are accumulated in float32; float64 is for checks.
        seed: of the first weights, the negatives and stochastic rounding.

    Raises:
        ShapeError: an option out of its range.

    A step of sampled softmax moves only the rows of its sampled classes and targets; their moments and decay stand
    still meanwhile.

    `hidden` is `[..., in_features]`, float32, float16 or bfloat16 (ml_dtypes, or bits in uint16), or float64 for a
    float64 head; rows may be strided, the last axis is contiguous. Targets are integers of hidden's shape without its
    last axis (0-D for one example), or `Labels` or a `scipy.sparse` CSR matrix with a row an example, whose values are
    weights.
    """

    kind = "DenseHead"
    prefix = "dense"
    options: DenseOptions

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        loss: str = "softmax",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_weight: ArrayLike | None = None,
        lse_penalty: float = 0.0,
        softcap: float | None = None,
        filter_eps: float | None = None,
        negatives: int | None = None,
        proposal: str | ArrayLike = "uniform",
        bias: bool = True,
        reduction: str = "mean",
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        self._configure(
            in_features,
            n_classes,
            loss=loss,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            class_weight=class_weight,
            lse_penalty=lse_penalty,
            softcap=softcap,
            filter_eps=filter_eps,
            negatives=negatives,
            proposal=proposal,
            bias=bias,
            reduction=reduction,
            dtype=dtype,
            seed=seed,
        )
        self.reset_parameters()

    def _configure(
        self,
        in_features: int,
        n_classes: int,
        *,
        class_weight: ArrayLike | None = None,
        proposal: str | ArrayLike = "uniform",
        bias: bool = True,
        dtype: str = "float32",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.options = DenseOptions(**options)
        self._allocate(in_features, n_classes, bias, dtype, seed)
        self.class_weight = checked_class_weight(class_weight, self.n_classes)
        self._proposal = Proposal(proposal, self.n_classes)
        self.filtered = 0

    def __repr__(self) -> str:
        return f"DenseHead({self.in_features}, {self.n_classes}, loss={self.options.loss!r}, dtype={self.dtype!r})"

    def _train(
        self,
        hidden: NDArray,
        goal: Target,
        scale: NDArray,
        losses: NDArray,
        grad_hidden: NDArray,
        update: dict[str, Any],
    ) -> None:
        train = self._train_sampled if self.options.loss == "sampled_softmax" else super()._train
        train(hidden, goal, scale, losses, grad_hidden, update)

    def _backward(self, **arguments: Any) -> None:
        self.filtered += _core.dense_backward(**arguments, filter_eps=self.options.filter_eps or 0.0)

    def _train_sampled(
        self,
        hidden: NDArray,
        goal: Target,
        scale: NDArray,
        losses: NDArray,
        grad_hidden: NDArray,
        update: dict[str, Any],
    ) -> None:
        check_finite(hidden)  # before the rows' gradients, which would be blamed, are there
        sampled = sample_classes(
            self._proposal,
            self.options.negatives or 1,
            goal.indices,
            seed=self.seed,
            step=self.steps,
            ignore_index=self.options.ignore_index if goal.indptr is None else None,
        )
        self._train_rows(sampled, hidden, goal, scale, losses, grad_hidden, update)

    def grow(
        self, n_classes: int, *, class_weight: ArrayLike | None = None, proposal: str | ArrayLike | None = None
    ) -> None:
        """Adds classes at the end, up to `n_classes`. Their first weights are those of a head made with so many
        classes.

        A head with class weights, or with a proposal of weights, takes new ones `[n_classes]`.
        """
        for name, held, new in (
            ("class_weight", self.class_weight, class_weight),
            ("proposal", self._proposal.weight, proposal),
        ):
            if held is not None and new is None:
                raise ShapeError(
                    f"{name}: expected an array [n_classes] for all the classes, as the head has one, got None"
                )
        if not isinstance(n_classes, int | np.integer) or n_classes < self.n_classes:
            raise ShapeError(f"n_classes: expected an integer of at least {self.n_classes}, got {n_classes!r}")
        weights = checked_class_weight(class_weight, int(n_classes))
        proposals = Proposal(self._proposal.name if proposal is None else proposal, int(n_classes))
        self._grow(int(n_classes))
        self.class_weight, self._proposal = weights, proposals

    def _query(self, hidden: NDArray) -> dict[str, Any]:
        return {**self._layer(hidden), "softcap": self.options.softcap or 0.0}

    def _loss_arguments(self) -> dict[str, Any]:
        return {**super()._loss_arguments(), "softcap": self.options.softcap or 0.0}

    def _config(self) -> dict[str, Any]:
        options = {name: getattr(self.options, name) for name in self.options.__dataclass_fields__}
        return {
            "in_features": self.in_features,
            "n_classes": self.n_classes,
            **options,
            "proposal": self._proposal.name,
            "bias": self._bias is not None,
            "dtype": self.dtype,
            "seed": self.seed,
        }

    def _option_tensors(self) -> dict[str, NDArray]:
        proposal = {} if self._proposal.weight is None else {"proposal": self._proposal.weight}
        return super()._option_tensors() | proposal
