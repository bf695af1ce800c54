"""widehead/_optimizer.py -- the optimiser of a NumPy head: its numbers, and the state that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._core import Error
from .options import choose

OPTIMIZERS = ("sgd", "momentum", "adam", "adagrad")
ROUNDINGS = ("nearest", "stochastic", "kahan")

# State arrays by optimiser; "row" is one number a row of the weight.
_STATE: dict[str, dict[str, str]] = {
    "sgd": {},
    "momentum": {"first": "weight", "bias_first": "bias"},
    "adam": {"first": "weight", "second": "weight", "bias_first": "bias", "bias_second": "bias"},
    "adagrad": {"second": "row", "bias_second": "bias"},
}

SAVED = "optimizer."  # of its arrays among the tensors of a file


@dataclass
class OptimizerState:
    """What an optimiser remembers between steps: `step` counts those taken, `arrays` hold moments and lost bits."""

    name: str | None = None
    step: int = 0
    arrays: dict[str, NDArray] = field(default_factory=dict)

    def copy(self) -> OptimizerState:
        """The same state; the arrays themselves are shared."""
        return OptimizerState(self.name, self.step, dict(self.arrays))

    def prepare(self, name: str, weight: NDArray, bias: NDArray | None, kahan: bool) -> None:
        """Chooses the optimiser and allocates its state, zero, where it is not there yet.

        Raises:
            ShapeError: no such optimiser.
            Error: another optimiser's moments are there.
        """
        choose(name, OPTIMIZERS, "optimizer")
        if self.name not in (None, name):
            if _STATE[self.name or "sgd"]:
                raise Error(
                    f"optimizer: expected {self.name!r}, whose state this head holds, got {name!r}; "
                    "to change it, call reset_optimizer() first"
                )
            self.step = 0
        self.name = name
        moments = np.float64 if weight.dtype == np.float64 else np.float32
        for key, kind in _STATE[name].items():
            if key in self.arrays or (kind == "bias" and bias is None):
                continue
            shape = {"weight": weight.shape, "row": (len(weight), 1), "bias": (len(weight),)}[kind]
            self.arrays[key] = np.zeros(shape, moments)
        if kahan and "compensation" not in self.arrays:
            self.arrays["compensation"] = np.zeros(weight.shape, np.uint16)

    def arguments(self, rounding: str, seed: int, **numbers: Any) -> dict[str, Any]:
        """The `update` of the core for the next step; `step` is to be counted up once it has been taken."""
        unused = set() if rounding == "kahan" else {"compensation"}
        optimizer = "sgd" if self.name == "momentum" else self.name
        if self.name != "momentum":
            numbers["momentum"] = 0.0
        elif numbers["momentum"] == 0:
            unused |= {"first", "bias_first"}
        arrays = {key: value for key, value in self.arrays.items() if key not in unused}
        return {"optimizer": optimizer, "rounding": rounding, "seed": seed, "step": self.step + 1, **numbers, **arrays}

    def to_file(self) -> tuple[dict[str, Any], dict[str, NDArray]]:
        """What a saved layer keeps of it: numbers, and arrays by name."""
        return {"name": self.name, "step": self.step}, {SAVED + name: array for name, array in self.arrays.items()}

    @classmethod
    def from_file(cls, numbers: dict[str, Any], tensors: dict[str, NDArray]) -> OptimizerState:
        """What `to_file` gave, among other tensors."""
        arrays = {name.removeprefix(SAVED): array for name, array in tensors.items() if name.startswith(SAVED)}
        return cls(numbers["name"], int(numbers["step"]), arrays)

    def grow(self, n_classes: int) -> None:
        """Zero state for new rows at the end."""
        for key, array in self.arrays.items():
            grown = np.zeros((n_classes, *array.shape[1:]), array.dtype)
            grown[: len(array)] = array
            self.arrays[key] = grown
