"""widehead: output layers for 100 thousand to 100 million classes, for PyTorch, NumPy and C++.

`widehead.torch` holds the PyTorch modules, `widehead.numpy` the same heads without PyTorch. This package itself imports
neither PyTorch nor scikit-learn.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._core import (
    BackendError,
    CapacityError,
    DtypeError,
    Error,
    LabelError,
    NonFiniteError,
    ShapeError,
    __version__,
    current_isa,
    get_num_threads,
    set_isa,
    set_num_threads,
    supported_isas,
)
from .files import FileError
from .labels import Labels

__all__ = [
    "BackendError",
    "CapacityError",
    "Classifier",
    "DtypeError",
    "Error",
    "FileError",
    "LabelError",
    "Labels",
    "NonFiniteError",
    "ShapeError",
    "__version__",
    "current_isa",
    "get_num_threads",
    "order_classes",
    "set_isa",
    "set_num_threads",
    "supported_isas",
]

# Imported on first use: they need packages or time that many programs can do without.
_LAZY = {"Classifier": "widehead.estimator", "order_classes": "widehead.order"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'widehead' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
