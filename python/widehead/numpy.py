"""widehead/numpy.py -- the heads without PyTorch: train and serve from NumPy arrays."""

from ._arrays import from_bfloat16, to_bfloat16
from ._dense import DenseHead
from ._exact import ExactHead
from ._hashed import HashedHead
from ._results import ForwardResult, StepResult, TopKResult
from ._sparse import SparseHead
from .bag import EmbeddingBag
from .hash_index import HashIndex

__all__ = [
    "DenseHead",
    "EmbeddingBag",
    "ExactHead",
    "ForwardResult",
    "HashIndex",
    "HashedHead",
    "SparseHead",
    "StepResult",
    "TopKResult",
    "from_bfloat16",
    "to_bfloat16",
]
