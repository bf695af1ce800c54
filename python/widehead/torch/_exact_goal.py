"""_exact_goal.py -- the targets of an exact head's batch, as the core takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widehead._core import LabelError

from ._device import capsule, on_gpu
from ._target import Target


class Goal(NamedTuple):
    """Single labels `[B]` (`indptr` None) or CSR. Of single labels, `valid` `[B]` says which examples have a target
    (None: all). On the CPU those without are left out of `indices`; on a GPU, where their number is not known, they
    stay, and the core is told the `ignore_index`.
    """

    indptr: Tensor | None
    indices: Tensor
    values: Tensor | None = None
    valid: Tensor | None = None
    ignore_index: int | None = None

    @classmethod
    def of(cls, labels: Target, n_classes: int, ignore_index: int) -> Goal:
        """Raises LabelError for a single label out of range; on a GPU the core records it."""
        if labels.indptr is not None:
            return cls(*labels)
        classes = labels.indices
        valid = classes != ignore_index
        if on_gpu(classes):
            return cls(None, classes, None, valid, ignore_index)
        bad = valid & ((classes < 0) | (classes >= n_classes))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise LabelError(
                f"target: expected a class in [0, {n_classes}) or the ignore_index {ignore_index}, got "
                f"{int(classes[at])} at position {at}"
            )
        if valid.all():
            return cls(None, classes)
        return cls(nn.functional.pad(valid.cumsum(0), (1, 0)), classes[valid], None, valid)

    @classmethod
    def nobody(cls, examples: int, device: torch.device) -> Goal:
        """No example has a target."""
        indptr, indices = (torch.zeros(n, dtype=torch.int64, device=device) for n in (examples + 1, 0))
        return cls(indptr, indices)

    def own_classes(self) -> Goal:
        """The same without values, in no memory of the caller's."""
        indptr = None if self.indptr is None else self.indptr.clone()
        return Goal(indptr, self.indices.clone(), None, self.valid, self.ignore_index)

    def capsules(self, values: bool = True) -> dict[str, Any]:
        """As arguments of the core."""
        named = {"indptr": capsule(self.indptr), "indices": capsule(self.indices)}
        if values:
            named["values"] = capsule(self.values)
        return named if self.ignore_index is None else {**named, "ignore_index": self.ignore_index}

    def owners(self, examples: int) -> Tensor:
        """The example of each target `[nnz]`; `examples` where it has none."""
        numbers = torch.arange(len(self.indices), device=self.indices.device)
        if self.indptr is not None:
            return torch.searchsorted(self.indptr[1:], numbers, right=True)
        return numbers if self.valid is None else torch.where(self.valid, numbers, examples)

    def spread(self, examples: Tensor) -> Tensor:
        """A number an example `[B]` as one a target `[nnz]`."""
        if self.indptr is None:
            return examples
        return nn.functional.pad(examples, (0, 1))[self.owners(len(examples))]

    def gather(self, numbers: Tensor, examples: int) -> Tensor:
        """The sums over each example's targets, `[B]`."""
        if self.indptr is None:
            return numbers if self.valid is None else torch.where(self.valid, numbers, 0.0)
        sums = numbers.new_zeros(examples + 1)
        # Sorted on a GPU, so that the sums are the same bits every time.
        return sums.index_put((self.owners(examples),), numbers, accumulate=True)[:examples]

    def by_example(self, numbers: Tensor) -> Tensor:
        """Of single labels: the number of each example's target `[B]`, 0 where it has none."""
        if self.valid is None:
            return numbers
        if self.indptr is None:
            return torch.where(self.valid, numbers, 0.0)
        return numbers.new_zeros(len(self.valid)).masked_scatter(self.valid, numbers)

    @property
    def single(self) -> bool:
        return self.valid is not None or self.indptr is None
