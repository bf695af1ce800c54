"""widehead/numpy.py -- the heads without PyTorch: train and serve from NumPy arrays."""

from ._arrays import from_bfloat16, to_bfloat16
from ._dense import DenseHead
from ._exact import ExactHead
from ._results import ForwardResult, StepResult, TopKResult
from ._sparse import SparseHead
from .bag import EmbeddingBag

__all__ = [
    "DenseHead",
    "EmbeddingBag",
    "ExactHead",
    "ForwardResult",
    "SparseHead",
    "StepResult",
    "TopKResult",
    "from_bfloat16",
    "to_bfloat16",
]
