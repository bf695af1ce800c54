"""_sparse_rows.py -- how a sparse head computes: rows in an order of their own, the first of them perhaps dense."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from widehead._core import Error, LabelError
from widehead.options import SparseOptions

from . import _device, block_ops, sparse_ops
from ._head import Head
from ._order import IGNORED, rank_of, refuse_by_class, row_targets, rows_of
from ._target import Target
from .heads import DenseHead


class SparseRows(Head):
    """The computing half of `SparseHead`, whose parameters these are.

    Row i is class `order[i]`, class c is row `_rank[c]`; both None where they are the same. Rows 0 .. first_class - 1
    are those of `frequent`, the others have `weight`, `bias` and `index`.
    """

    options: SparseOptions
    index: Tensor
    order: Tensor | None
    frequent: DenseHead | None
    _rank: Tensor | None
    _class_order: np.ndarray | None
    _row_weight: tuple[Tensor | None, Tensor | None]

    def layers(self) -> tuple[Head, ...]:
        return (self,) if self.frequent is None else (self, self.frequent)

    def _losses(self, rows: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        anchor, control = (self._anchor, self._control) if self.training else (None, None)
        if self._rank is None:
            return self._row_losses(rows, target, self.class_weight, anchor, control, self.loss, self.ignore_index)
        by_row = row_targets(target, self._rank, self.ignore_index)
        arguments = (rows, by_row, self._row_weights(), anchor, control, self.loss, IGNORED)
        if torch.compiler.is_compiling():
            return self._row_losses(*arguments)
        try:
            return self._row_losses(*arguments)
        except LabelError as error:
            refuse_by_class(error, target)
            raise

    def _row_losses(
        self, rows: Tensor, target: Target, class_weight: Tensor | None, anchor: Tensor | None,
        control: Tensor | None, loss: str, ignore_index: int, query: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Losses of targets, and with class weights, by row. query: only lse is wanted."""
        self._check_index()
        o = self.options
        tensors = (rows, self.weight, self.bias, self.index, *target, class_weight, anchor, control)
        options = (loss, *((0.0, 0.0) if query else (o.label_smoothing, o.lse_penalty)), ignore_index, o.group_size)
        if self.frequent is None:
            return sparse_ops.sparse_loss(*tensors, *options)
        return block_ops.block_loss(*tensors, self.frequent.weight, self.frequent.bias, *options)

    def _row_weights(self) -> Tensor | None:
        """The class weights by row, put in order once."""
        if self.class_weight is None or self.order is None:
            return self.class_weight
        if torch.compiler.is_compiling():
            return self.class_weight[self.order]
        if self._row_weight[0] is not self.class_weight:
            self._row_weight = (self.class_weight, self.class_weight[self.order])
        return self._row_weight[1]

    def _topk_rows(
        self, rows: Tensor, k: int, exclude_indptr: Tensor | None, exclude_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._check_index()
        if self._rank is not None and exclude_indices is not None:
            exclude_indices = rows_of(exclude_indices, self._rank)
        layer = (rows, self.weight, self.bias, self.index, self.options.group_size)
        query = (k, exclude_indptr, exclude_indices)
        if self.frequent is None:
            scores, classes = sparse_ops.sparse_topk(*layer, *query)
        else:
            scores, classes = block_ops.block_topk(*layer, self.frequent.weight, self.frequent.bias, *query)
        if self.order is not None:
            classes = torch.where(classes >= 0, self.order[classes.clamp(min=0)], -1)
        return scores, classes

    def _score_rows(self, rows: Tensor, classes: Tensor | None) -> Tensor:
        self._check_index()
        if classes is not None and not _device.on_gpu(rows) and (self._rank is not None or self.frequent is not None):
            bad = classes[(classes < 0) | (classes >= self.n_classes)]
            if len(bad):
                raise LabelError(f"classes: expected a class in [0, {self.n_classes}), got {int(bad[0])}")
        by_row = classes if classes is None or self._rank is None else rows_of(classes, self._rank)
        layer = (rows, self.weight, self.bias, self.index, self.options.group_size)
        if self.frequent is None:
            scores = sparse_ops.sparse_scores(*layer, by_row)
        else:
            scores = block_ops.block_scores(*layer, self.frequent.weight, self.frequent.bias, by_row)
        return scores[:, self._rank] if classes is None and self._rank is not None else scores

    def _lse_rows(self, rows: Tensor) -> Tensor:
        nothing = torch.full((rows.shape[0],), self.ignore_index, dtype=torch.int64, device=rows.device)
        none = Target(None, nothing, None)
        return self._row_losses(rows, none, None, None, None, "softmax", self.ignore_index, query=True)[2]

    def _option_tensors(self) -> dict[str, Tensor]:
        order = {} if self._class_order is None else {"class_order": torch.from_numpy(self._class_order)}
        return super()._option_tensors() | order

    def _place_order(self, device: Any) -> None:
        """The class order where the head is: an option, which neither to_empty() nor half() may touch."""
        if self._class_order is not None:
            self.order = torch.from_numpy(self._class_order.copy()).to(device)
            self._rank = rank_of(self._class_order, device)

    def _move_options(self, device: torch.device) -> None:
        super()._move_options(device)
        self._place_order(device)

    def _check_index(self) -> None:
        raise Error(f"{type(self).__name__} has no index")
