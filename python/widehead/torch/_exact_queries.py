"""_exact_queries.py -- probabilities of the exact head's softmaxes: they grow with |o| and |o + 1|, not o."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops

# The output at which a class is least probable.
LEAST = {"spherical_softmax": 0.0, "taylor_softmax": -1.0}


def class_log_prob(loss: dict[str, Any], n_classes: int, scores: Tensor, q: Tensor, s: Tensor) -> Tensor:
    """Log-probabilities of classes by their outputs; q and s of each example, of a size that broadcasts."""
    z = scores.double()
    if loss["loss"] == "spherical_softmax":
        own, norm = z * z + loss["eps"], q + n_classes * loss["eps"]
    else:
        own, norm = 1 + z + z * z / 2, n_classes + s + q / 2
    return (own.log() - norm.log()).to(scores.dtype)


def most_probable(
    loss: str,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    exclude_indptr: Tensor | None,
    exclude_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and classes `[B, k]`, most probable first: they are among the k largest and the k smallest outputs."""
    high, most = ops.dense_topk(rows, weight, bias, 0.0, k, exclude_indptr, exclude_indices)
    low, least = ops.dense_topk(-rows, weight, None if bias is None else -bias, 0.0, k, exclude_indptr, exclude_indices)
    scores, classes = torch.cat([high, -low], -1), torch.cat([most, least], -1)
    # Each class from one of the two lists only; the rest goes to the end.
    upper = torch.arange(2 * k, device=scores.device) < k
    rank = torch.where((scores >= LEAST[loss]) == upper, (scores - LEAST[loss]).abs(), -torch.inf)
    rank = torch.where((classes < 0) | rank.isnan(), -torch.inf, rank)
    by_class = classes.argsort(dim=-1, stable=True)
    order = by_class.gather(-1, rank.gather(-1, by_class).argsort(dim=-1, descending=True, stable=True))[:, :k]
    found = rank.gather(-1, order) >= 0
    scores, classes = scores.gather(-1, order), classes.gather(-1, order)
    return torch.where(found, scores, -torch.inf), torch.where(found, classes, -1)
