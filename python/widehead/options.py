"""widehead/options.py -- the options of the heads, checked once for the NumPy and the PyTorch face."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ._core import ShapeError

LOSSES = ("softmax", "sampled_softmax", "bce", "squared_hinge")
SPARSE_LOSSES = ("squared_hinge", "bce", "softmax")
EXACT_LOSSES = ("squared_error", "spherical_softmax", "taylor_softmax", "z_loss")
HASH_FAMILIES = ("wta", "dwta", "simhash")
ESTIMATORS = ("corrected", "restricted", "importance")
REWIRE_MODES = ("magnitude_global", "magnitude_row", "threshold")
REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class DenseOptions:
    """Options of `DenseHead` that are plain numbers and names; None means off.

    Raises:
        ShapeError: an unknown name, a number out of its range, or an option that the loss has no place for.
    """

    loss: str = "softmax"
    label_smoothing: float = 0.0
    ignore_index: int = -100
    lse_penalty: float = 0.0
    softcap: float | None = None
    filter_eps: float | None = None
    negatives: int | None = None
    reduction: str = "mean"

    def __post_init__(self) -> None:
        choose(self.loss, LOSSES, "loss")
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ShapeError(f"softcap: expected None or a positive number, got {self.softcap}")
        if self.filter_eps is not None:
            between(self.filter_eps, 0.0, 1.0, "filter_eps")
        _check_loss(self, softcap=self.softcap, filter_eps=self.filter_eps)
        if (self.negatives is not None) != (self.loss == "sampled_softmax"):
            wanted = "an integer of at least 1" if self.loss == "sampled_softmax" else "None"
            raise ShapeError(f"negatives: expected {wanted} with loss={self.loss!r}, got {self.negatives}")
        if self.negatives is not None and self.negatives < 1:
            raise ShapeError(f"negatives: expected an integer of at least 1, got {self.negatives}")

    @property
    def core_loss(self) -> str:
        """The loss's name in the core, where sampled softmax is softmax over the sampled classes."""
        return "softmax" if self.loss == "sampled_softmax" else self.loss


@dataclass(frozen=True)
class SparseOptions:
    """Options of `SparseHead` that are plain numbers and names; None means off.

    Raises:
        ShapeError: an unknown name, a number out of its range, or an option that loss or mode has no place for.
    """

    fan_in: int = 32
    loss: str = "squared_hinge"
    group_size: int = 1
    rewire_mode: str = "magnitude_global"
    rewire_every: int | None = 1000
    rewire_fraction: float = 0.1
    rewire_end: int | None = None
    rewire_threshold: float | None = None
    rewire_keep_value: bool = False
    prior: float | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    lse_penalty: float = 0.0
    reduction: str = "mean"
    dense_head: int = 0

    def __post_init__(self) -> None:
        choose(self.loss, SPARSE_LOSSES, "loss")
        _check_loss(self)
        whole(self.fan_in, 1, "fan_in")
        whole(self.group_size, 1, "group_size")
        whole(self.rewire_every or 0, 0, "rewire_every")
        whole(self.dense_head, 0, "dense_head")
        if self.rewire_end is not None:
            whole(self.rewire_end, 1, "rewire_end")
        check_rewiring(self.rewire_mode, self.rewire_fraction, self.rewire_threshold)
        if self.prior is not None and not (self.loss == "bce" and 0.0 < self.prior < 1.0):
            wanted = "a number in (0, 1)" if self.loss == "bce" else "None"
            raise ShapeError(f"prior: expected {wanted} with loss={self.loss!r}, got {self.prior}")

    @property
    def core_loss(self) -> str:
        return self.loss

    def first_bias(self, n_classes: int) -> float:
        """-1 for squared hinge, as nearly all classes of an example are negatives; log-odds of the prior for bce."""
        if self.loss == "squared_hinge":
            return -1.0
        if self.loss == "softmax":
            return 0.0
        prior = 1.0 / max(n_classes, 2) if self.prior is None else self.prior
        return math.log(prior / (1.0 - prior))

    def fraction_after(self, step: int) -> float | None:
        """The fraction of connections that moves once `step` steps are done; None: no rewiring then."""
        if not self.rewire_every or step % self.rewire_every:
            return None
        if self.rewire_end is None:
            return self.rewire_fraction
        if step >= self.rewire_end:
            return None
        return self.rewire_fraction * 0.5 * (1.0 + math.cos(math.pi * step / self.rewire_end))

    def rewiring(self, fraction: float | None, mode: str | None, threshold: float | None) -> dict[str, Any]:
        """The core's arguments of one rewiring; what is None is taken from here."""
        mode = self.rewire_mode if mode is None else mode
        fraction = self.rewire_fraction if fraction is None else float(fraction)
        if threshold is None and mode == "threshold":
            threshold = self.rewire_threshold
        check_rewiring(mode, fraction, threshold)
        keep = self.rewire_keep_value
        return {"mode": mode, "fraction": fraction, "threshold": threshold or 0.0, "keep_value": keep}


@dataclass(frozen=True)
class ExactOptions:
    """Options of `ExactHead` that are plain numbers and names; None means off.

    Raises:
        ShapeError: an unknown name, a number out of its range, or an option that the loss has no place for.
    """

    loss: str = "squared_error"
    eps: float | None = None
    a: float | None = None
    b: float | None = None
    factors: str | None = None
    block_steps: int = 4
    method: str = "blocked"
    max_kappa: float | None = None
    ignore_index: int = -100
    reduction: str = "mean"

    def __post_init__(self) -> None:
        choose(self.loss, EXACT_LOSSES, "loss")
        choose(self.reduction, REDUCTIONS, "reduction")
        for name, loss in (("eps", "spherical_softmax"), ("a", "z_loss"), ("b", "z_loss")):
            value = getattr(self, name)
            if value is None:
                continue
            if self.loss != loss:
                raise ShapeError(f"{name}: expected None with loss={self.loss!r}, it belongs to {loss!r}, got {value}")
            if not math.isfinite(value) or (name != "b" and value <= 0):
                raise ShapeError(f"{name}: expected a {'finite' if name == 'b' else 'positive'} number, got {value}")
        if self.factors is not None:
            choose(self.factors, ("float32", "float64"), "factors")
        whole(self.block_steps, 1, "block_steps")
        choose(self.method, ("blocked", "woodbury"), "method")
        if self.max_kappa is not None:
            if self.method != "woodbury":
                raise ShapeError(f"max_kappa: expected None with method={self.method!r}, got {self.max_kappa}")
            if not 1 < self.max_kappa < math.inf:
                raise ShapeError(f"max_kappa: expected a number above 1, got {self.max_kappa}")

    def method_arguments(self) -> dict[str, Any]:
        """The method as `_core.ExactState` takes it."""
        own = {} if self.max_kappa is None else {"max_kappa": float(self.max_kappa)}
        return {"method": self.method, "wide": self.wide(), "block_steps": self.block_steps, **own}

    def loss_arguments(self) -> dict[str, Any]:
        """The loss as `_core.spherical_loss` takes it."""
        eps, a, b = (
            default if value is None else value for value, default in ((self.eps, 1e-2), (self.a, 1.0), (self.b, 10.0))
        )
        return {"loss": self.loss, "eps": eps, "a": a, "b": b}

    def wide(self) -> bool:
        """Whether small matrices and the rows in work are float64 beside float32 weights."""
        return self.loss == "spherical_softmax" if self.factors is None else self.factors == "float64"


# Options of a hashed head that all heads have, or that are off.
OF_ALL_HEADS = frozenset({"ignore_index", "reduction", "loss", "label_smoothing", "lse_penalty"})


@dataclass(frozen=True)
class HashedOptions:
    """Options of `HashedHead` that are plain numbers and names; None means off.

    Raises:
        ShapeError: an unknown name or a number out of its range.
    """

    family: str = "wta"
    tables: int = 50
    hashes: int = 4
    window: int = 8
    candidates: int = 1000
    negatives: int = 1000
    estimator: str = "corrected"
    shared: bool = False
    max_bucket: int | None = None
    probes: int = 0
    drift: float = 0.03
    rebuild_every: int | None = None
    rebuild_growth: float = 1.0
    ignore_index: int = -100
    reduction: str = "mean"
    loss: str = "sampled_softmax"
    label_smoothing: float = 0.0
    lse_penalty: float = 0.0

    def __post_init__(self) -> None:
        choose(self.loss, ("sampled_softmax",), "loss")
        choose(self.family, HASH_FAMILIES, "family")
        choose(self.estimator, ESTIMATORS, "estimator")
        choose(self.reduction, REDUCTIONS, "reduction")
        for name, least in (("candidates", 1), ("negatives", 0), ("probes", 0)):
            whole(getattr(self, name), least, name)
        for name in ("max_bucket", "rebuild_every"):
            if getattr(self, name) is not None:
                whole(getattr(self, name), 1, name)
        if self.estimator == "importance" and self.shared:
            raise ShapeError("shared: expected False with estimator='importance', got True")
        if not 0.0 <= self.drift < math.inf:
            raise ShapeError(f"drift: expected a finite number of at least 0, got {self.drift}")
        if not 1.0 <= self.rebuild_growth < math.inf:
            raise ShapeError(f"rebuild_growth: expected a finite number of at least 1, got {self.rebuild_growth}")
        if self.label_smoothing != 0.0 or self.lse_penalty != 0.0:
            raise ShapeError("label_smoothing, lse_penalty: expected 0 with a hashed head")

    @property
    def core_loss(self) -> str:
        """The loss over all classes that the sampled one estimates."""
        return "softmax"

    def index_arguments(self) -> dict[str, Any]:
        """The tables as `_core.HashIndex` takes them."""
        names = ("family", "tables", "hashes", "window")
        return {**{name: getattr(self, name) for name in names}, "max_bucket": self.max_bucket or 0}


def check_rewiring(mode: str, fraction: float, threshold: float | None) -> None:
    choose(mode, REWIRE_MODES, "rewire_mode")
    if not 0.0 <= fraction <= 1.0:
        raise ShapeError(f"rewire_fraction: expected a number in [0, 1], got {fraction}")
    if (threshold is not None) != (mode == "threshold") or not 0.0 <= (threshold or 0.0) < math.inf:
        wanted = "a number of at least 0" if mode == "threshold" else "None"
        raise ShapeError(f"rewire_threshold: expected {wanted} with rewire_mode={mode!r}, got {threshold}")


def check_fan_in(fan_in: int, in_features: int) -> None:
    if fan_in > in_features:
        raise ShapeError(f"fan_in: expected 1 to in_features = {in_features}, got {fan_in}")


def check_dense_head(dense_head: int, n_classes: int) -> None:
    if dense_head >= n_classes:
        raise ShapeError(f"dense_head: expected 0 to n_classes - 1 = {n_classes - 1}, got {dense_head}")


def _check_loss(options: DenseOptions | SparseOptions, **softmax_only: float | None) -> None:
    """What the heads' losses share; `softmax_only` are more options that belong to softmax."""
    choose(options.reduction, REDUCTIONS, "reduction")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ShapeError(f"label_smoothing: expected a number in [0, 1], got {options.label_smoothing}")
    between(options.lse_penalty, 0.0, math.inf, "lse_penalty")
    if options.core_loss != "softmax":
        for name, value in {"lse_penalty": options.lse_penalty, **softmax_only}.items():
            if value:
                raise ShapeError(
                    f"{name}: expected nothing with loss={options.loss!r}, got {value}: it belongs to softmax"
                )
    if options.label_smoothing and options.loss != "softmax":
        raise ShapeError(f"label_smoothing: expected 0 with loss={options.loss!r}, got {options.label_smoothing}")


def whole(value: int, low: int, argument: str) -> None:
    """Raises ShapeError unless value is an integer of at least `low`."""
    if not hasattr(value, "__index__") or isinstance(value, bool) or value < low:
        raise ShapeError(f"{argument}: expected an integer of at least {low}, got {value!r}")


def choose(value: str, names: tuple[str, ...], argument: str) -> str:
    if value not in names:
        raise ShapeError(f"{argument}: expected one of {', '.join(map(repr, names))}, got {value!r}")
    return value


def between(value: float, low: float, high: float, argument: str) -> None:
    """Raises ShapeError unless low <= value < high."""
    if not low <= value < high:
        raise ShapeError(f"{argument}: expected a number in [{low}, {high}), got {value}")
