"""sparse_cells.py -- sizes and methods of the sparse head's GPU benchmark, and the floors of each. No PyTorch here."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_cells import human

FUSED, PLAIN = "widehead fused", "widehead plain"
SCATTER, BAGS = "scatter kernels", "torch embedding_bag"
DENSE, TORCH_DENSE = "widehead dense 768", "torch dense 768"
SPARSE_METHODS = (FUSED, PLAIN, SCATTER, BAGS)
METHODS = (*SPARSE_METHODS, DENSE, TORCH_DENSE)
# They know no shared inputs: a cell with groups is for ours alone.
UNGROUPED = (SCATTER, BAGS)
DENSE_FEATURES = 768
LABELS = 5  # of an example
SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class SparseCell:
    """One size. Without a fan-in it is the dense layer to compare with."""

    classes: int
    features: int
    batch: int
    fan_in: int = 32
    group: int = 1
    dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        inputs = f"{self.fan_in} of {self.features:,}" if self.fan_in else f"all of {self.features:,}"
        group = f", groups of {self.group}" if self.group > 1 else ""
        return f"{human(self.classes)} classes, {inputs}{group}, batch {self.batch}, {self.dtype}"

    @property
    def weight_bytes(self) -> int:
        return self.classes * (self.fan_in or self.features) * SIZES[self.dtype]

    @property
    def index_bytes(self) -> int:
        return -(-self.classes // self.group) * self.fan_in * (2 if self.features <= 65536 else 4)


def grid() -> list[SparseCell]:
    """The sizes of the paper's largest data set first, then wider ones and larger batches."""
    classes = 670_091
    return [
        SparseCell(classes, 16384, 32),
        SparseCell(classes, DENSE_FEATURES, 32, fan_in=0),
        SparseCell(classes, 16384, 32, group=16),
        SparseCell(classes, 65536, 32),
        SparseCell(classes, 16384, 256),
        SparseCell(classes, DENSE_FEATURES, 256, fan_in=0),
        SparseCell(classes, 16384, 32, dtype="float32"),
        SparseCell(4_000_000, 16384, 32),
    ]


def rehearsal() -> list[SparseCell]:
    """Sizes that a CPU does in no time, for a dry run."""
    return [
        SparseCell(700, 64, 8, fan_in=6, dtype="float32"),
        SparseCell(700, 24, 8, fan_in=0),
        SparseCell(500, 64, 8, fan_in=6, group=4),
    ]


def methods_of(cell: SparseCell, chosen: tuple[str, ...] | list[str]) -> list[str]:
    if not cell.fan_in:
        return [name for name in chosen if name not in SPARSE_METHODS]
    return [name for name in chosen if name in SPARSE_METHODS and (cell.group == 1 or name not in UNGROUPED)]


def floors(cell: SparseCell, ceilings: dict[str, float]) -> dict[str, float]:
    """Seconds below which no step can go, and what has no rate of its own.

    Bytes: the losses of the classes are each by itself, so one visit of a class has its logits, gradients and step: the
    weights are read and written once, the index is read. Flops: logits, dW and dX. `gathered_bytes`: rows of the batch
    read for the logits and for dW, and added to for dX, once for every connection and in the weights' type: they pass
    through the caches, for whose rate there is no measured ceiling.
    """
    connections = cell.classes * (cell.fan_in or cell.features)
    shared = connections // cell.group if cell.fan_in else 0
    found = {
        "bytes_s": (2 * cell.weight_bytes + cell.index_bytes) / ceilings["copy_bytes"],
        "flops_s": 6 * connections * cell.batch / ceilings["gemm_flops"],
    }
    return found | {"floor_s": max(found.values()), "gathered_bytes": 4 * shared * cell.batch * SIZES[cell.dtype]}
