"""widehead/_results.py -- what the NumPy heads return, and how the losses of a batch become one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .labels import Target, check_range

Loss = float | NDArray[np.floating]


class StepResult(NamedTuple):
    """`loss`: a float, or an array of the batch's shape without reduction. `grad_hidden`: hidden's shape and type."""

    loss: Loss
    grad_hidden: NDArray


class ForwardResult(NamedTuple):
    """`output`: each example's target log-probability (or score). `lse`: the log-sum-exp of its logits, if asked
    for."""

    output: NDArray
    loss: Loss
    lse: NDArray | None


class TopKResult(NamedTuple):
    """`scores` and `classes`, `[..., k]`, best first; equal scores in the order of the classes."""

    scores: NDArray
    classes: NDArray[np.int64]


class Reduction:
    """How the losses of one batch become one number, and the gradient of that number to each of them.

    Args:
        kind: "none" (gradients are those of the sum), "mean" or "sum".
        target: the batch's targets; single labels in range, or `ignore_index`, which does not count.
        n_classes, ignore_index: of the head.
        sample_weight: weights of the examples, flat, or None.
        class_weight: where the mean divides by the class weights of the targets, as torch's cross-entropy does; or
            None.

    Attributes:
        scale: `[B]` float64, the factor of each example's loss.

    Raises:
        LabelError: a single label out of range.
    """

    def __init__(
        self,
        kind: str,
        target: Target,
        n_classes: int,
        ignore_index: int,
        sample_weight: NDArray[np.float64] | None,
        class_weight: NDArray[np.float32] | None,
    ) -> None:
        self.kind = kind
        if target.indptr is not None:
            scale = np.ones(len(target.indptr) - 1)
        else:
            check_range(target.indices, n_classes, "target", ignore_index)
            scale = (target.indices != ignore_index).astype(np.float64)
        if sample_weight is not None:
            scale *= sample_weight
        if kind == "mean":
            mass = scale
            if target.indptr is None and class_weight is not None:
                mass = scale * class_weight[np.where(scale > 0, target.indices, 0)]
            total = float(mass.sum())
            scale = scale / total if total > 0 else np.zeros_like(scale)
        self.scale = scale

    def __call__(self, losses: NDArray[np.floating], shape: tuple[int, ...]) -> Loss:
        # An example that does not count has no say, not even by 0 times infinity.
        weighted = np.where(self.scale > 0, self.scale * losses, 0.0)
        if self.kind == "none":
            return weighted.astype(losses.dtype).reshape(shape)
        return float(weighted.sum())
