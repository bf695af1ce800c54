"""_target.py -- targets of a batch in the one form that the operators take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from widehead._core import BackendError, DtypeError, ShapeError


class Target(NamedTuple):
    """One class a row (`indptr` None, `indices` int64 `[B]`), or CSR: rows `indptr` `[B + 1]`, classes, weights or
    None.
    """

    indptr: Tensor | None
    indices: Tensor
    values: Tensor | None


def parse_target(target: Any, batch: torch.Size, n_classes: int, device: torch.device) -> Target:
    """Turn what the user passes into a `Target`, checking types and shapes; the values are checked by the core.

    Args:
        target: int64 tensor of shape `batch`; or `torch.sparse_csr_tensor` `[B, n_classes]`; or any object with the
            attributes `indptr`, `indices`, `values` (or None) and `n_classes`, such as `widehead.Labels`.
        batch: shape of the hidden states without the last axis; B is its number of elements.
    """
    if not isinstance(target, Tensor):
        return _parse_labels(target, batch, n_classes, device, "target")
    if target.layout == torch.sparse_csr:
        return _parse_csr(target, batch, n_classes, device, "target")
    if target.layout != torch.strided:
        raise DtypeError(f"target: expected a dense or a sparse CSR tensor, got {target.layout}; use .to_sparse_csr()")
    if target.dtype != torch.int64:
        raise DtypeError(f"target: expected int64 class numbers, got {target.dtype}; convert with target.long()")
    if target.shape != batch:
        raise ShapeError(f"target: expected shape {list(batch)} as hidden without its last axis, got {_shape(target)}")
    _check_device(target, device, "target")
    return Target(None, target.reshape(-1).contiguous(), None)


def parse_exclude(
    exclude: Any, batch: torch.Size, n_classes: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Row pointer and classes of the classes that `topk` must leave out; given as multi-label targets are."""
    if exclude is None:
        return None, None
    parse = _parse_csr if isinstance(exclude, Tensor) and exclude.layout == torch.sparse_csr else _parse_labels
    parsed = parse(exclude, batch, n_classes, device, "exclude")
    return parsed.indptr, parsed.indices


def _parse_csr(target: Tensor, batch: torch.Size, n_classes: int, device: torch.device, name: str) -> Target:
    rows = batch.numel()
    if tuple(target.shape) != (rows, n_classes):
        raise ShapeError(f"{name}: expected a sparse matrix of shape [{rows}, {n_classes}], got {_shape(target)}")
    _check_device(target, device, name)
    return Target(
        target.crow_indices().to(torch.int64).contiguous(),
        target.col_indices().to(torch.int64).contiguous(),
        target.values().to(torch.float32).contiguous(),
    )


def _parse_labels(labels: Any, batch: torch.Size, n_classes: int, device: torch.device, name: str) -> Target:
    try:
        indptr, indices, values, width = labels.indptr, labels.indices, labels.values, labels.n_classes
    except AttributeError:
        raise DtypeError(
            f"{name}: expected a tensor, a torch.sparse_csr_tensor or widehead.Labels, got {type(labels).__name__}"
        ) from None
    rows = batch.numel()
    if width != n_classes or indptr.shape[0] != rows + 1:
        raise ShapeError(
            f"{name}: expected labels of {rows} rows over {n_classes} classes, "
            f"got {indptr.shape[0] - 1} rows over {width} classes"
        )
    parts = [_part(part, device, f"{name}.{which}") for part, which in ((indptr, "indptr"), (indices, "indices"))]
    weights = None if values is None else _part(values, device, f"{name}.values").to(torch.float32)
    return Target(parts[0].to(torch.int64), parts[1].to(torch.int64), weights)


def _part(part: Any, device: torch.device, name: str) -> Tensor:
    tensor = torch.as_tensor(part)
    _check_device(tensor, device, name)
    return tensor.contiguous()


def _check_device(tensor: Tensor, device: torch.device, name: str) -> None:
    if tensor.device != device:
        raise BackendError(f"{name}: expected a tensor on {device} like hidden, got one on {tensor.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
