"""_checks.py -- the parameters of a classifier and the weights of its examples, checked before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._training import SCHEDULES
from ._validation import place_of

if TYPE_CHECKING:
    from .estimator import Classifier

_COUNTS = ("dim", "negatives", "epochs", "batch_size", "n_iter_no_change", "patience")


def check_parameters(model: Classifier, heads: tuple[str, ...]) -> None:
    """Raises ShapeError for the first parameter out of its range."""
    for name in _COUNTS:
        value = getattr(model, name)
        if not isinstance(value, int | np.integer) or value < 1:
            raise _core.ShapeError(f"{name}: expected an integer of at least 1, got {value!r}")
    for name, choices in (("head", heads), ("schedule", SCHEDULES)):
        if getattr(model, name) not in choices:
            raise _core.ShapeError(f"{name}: expected one of {', '.join(choices)}, got {getattr(model, name)!r}")
    if not (np.isfinite(model.lr) and model.lr > 0):
        raise _core.ShapeError(f"lr: expected a positive number, got {model.lr!r}")
    if model.intermediate is not None and model.intermediate < 1:
        raise _core.ShapeError(f"intermediate: expected a width of at least 1 or None, got {model.intermediate!r}")
    if model.dictionary is not None and model.dictionary < 1:
        raise _core.ShapeError(f"dictionary: expected a width of at least 1 or None, got {model.dictionary!r}")
    if not 0 <= model.dropout < 1:
        raise _core.ShapeError(f"dropout: expected a share in [0, 1), got {model.dropout!r}")
    if not 0 <= model.warmup <= 1:
        raise _core.ShapeError(f"warmup: expected a share in [0, 1], got {model.warmup!r}")
    if not place_of(model.validation_metric):
        raise _core.ShapeError(
            f"validation_metric: expected P@k, nDCG@k, hit@k or recall@k with k of at least 1, got "
            f"{model.validation_metric!r}"
        )
    if (model.early_stopping or model.schedule == "plateau") and not (
        isinstance(model.validation_fraction, float) and 0 < model.validation_fraction < 1
    ):
        raise _core.ShapeError(
            f"validation_fraction: expected a share in (0, 1) with early_stopping or schedule='plateau', got "
            f"{model.validation_fraction!r}"
        )
    if model.resume and model.checkpoint is None:
        raise _core.ShapeError("resume: expected a checkpoint to resume from, got checkpoint=None")


def checked_weights(weight: Any | None, n: int) -> NDArray[np.float64] | None:
    """The weights of n examples, or None where they are all 1."""
    if weight is None:
        return None
    array = np.asarray(weight, np.float64)
    if array.shape != (n,):
        raise _core.ShapeError(f"sample_weight: expected shape [{n}], got {list(array.shape)}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise _core.NonFiniteError("sample_weight: expected finite weights of at least 0")
    return array
