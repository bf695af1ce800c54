"""_order.py -- a head's rows and the classes of its user, as tensors on the head's device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from widehead._core import LabelError
from widehead._order import ClassOrder, checked_order, inverse, refuse_repeated

from ._target import Target

IGNORED = ClassOrder.IGNORED


def order_array(order: Any, n_classes: int, name: str = "class_order") -> np.ndarray:
    """The permutation as an int64 array."""
    return checked_order(order.detach().cpu().numpy() if isinstance(order, Tensor) else order, n_classes, name)


def rank_of(order: np.ndarray, device: Any) -> Tensor:
    return torch.from_numpy(inverse(order).astype(np.int64)).to(device)


def rows_of(classes: Tensor, rank: Tensor) -> Tensor:
    """The rows of classes; a number that is no class stays, so that whoever checks it can name it."""
    inside = (classes >= 0) & (classes < len(rank))
    return torch.where(inside, rank[classes.clamp(0, len(rank) - 1)], classes)


def row_targets(target: Target, rank: Tensor, ignore_index: int) -> Target:
    """Targets by row; `IGNORED` where an example has none, as the ignore_index may be the number of a row."""
    rows = rows_of(target.indices, rank)
    if target.indptr is None:
        rows = torch.where(target.indices == ignore_index, IGNORED, rows)
    return Target(target.indptr, rows, target.values)


def refuse_by_class(error: LabelError, target: Target) -> None:
    """Raises what the core has said of a row about the class, where the two have different numbers."""
    if target.indptr is not None:
        refuse_repeated(target.indptr.cpu().numpy(), target.indices.cpu().numpy())
    raise error
