"""widehead.torch: the heads as PyTorch modules, and the optimisers that update them inside backward."""

from __future__ import annotations

from ._head import Head, HeadOutput, HeadOutputLse, TopK
from .exact import ExactHead
from .exact_optim import FusedRMSprop, clip_grad_norm_
from .hashed import HashedHead
from .heads import DenseHead
from .optim import FusedAdam, FusedOptimizer, FusedSGD
from .sparse import SparseHead

__all__ = [
    "DenseHead",
    "ExactHead",
    "FusedAdam",
    "FusedOptimizer",
    "FusedRMSprop",
    "FusedSGD",
    "HashedHead",
    "Head",
    "HeadOutput",
    "HeadOutputLse",
    "SparseHead",
    "TopK",
    "clip_grad_norm_",
]
