"""widehead/demo/options.py -- what of the place resolver's training can be chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """What is trained. The defaults were chosen on 10,000 names of the training part that were set aside for it."""

    dim: int = 128
    negatives: int = 1024
    epochs: int = 4
    batch_size: int = 256
    lr: float = 0.1
    scale: float = 12.0
    hash_bits: int = 18
    typos: float = 0.0
    dtype: str = "float32"
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
