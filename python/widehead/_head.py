"""widehead/_head.py -- what the NumPy heads share: parameters, their first values, growth, and files."""

from __future__ import annotations

import os
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import STORED, stored
from ._core import DtypeError, Error, ShapeError
from ._optimizer import SAVED, OptimizerState
from .files import FileError, HeadFile, load_head, save_head
from .options import choose

Self = TypeVar("Self", bound="Head")


class Head:
    """Parameters `weight` `[n_classes, columns]` and `bias` `[n_classes]`, and their life in files.

    A subclass sets its options in `_configure`, which takes the constructor's arguments, and lists in `_config` those
    that go into a file; tensors among them go by `_option_tensors`.
    """

    kind: ClassVar[str]
    integers: ClassVar[frozenset[str]] = frozenset()  # parameters that are whole numbers, not bfloat16, in uint16
    in_features: int
    n_classes: int
    dtype: str
    seed: int
    _first_class: int = 0  # classes before this layer's, which another one holds
    _weight: NDArray
    _bias: NDArray | None

    def _allocate(
        self, in_features: int, n_classes: int, bias: bool, dtype: str, seed: int, columns: int | None = None
    ) -> None:
        """columns: of the weight; None: in_features."""
        for name, value in (("in_features", in_features), ("n_classes", n_classes)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise ShapeError(f"{name}: expected an integer of at least 1, got {value!r}")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
            raise ShapeError(f"seed: expected an integer in [0, 2^64), got {seed!r}")
        self.dtype = choose(dtype, tuple(STORED), "dtype")
        kept: np.dtype[Any] = STORED[dtype]
        self.in_features, self.n_classes, self.seed = int(in_features), int(n_classes), int(seed)
        rows = self.n_classes - self._first_class
        self._weight = np.empty((rows, columns or self.in_features), kept)
        # A bfloat16 head keeps its bias in float32: it is one number a class, and rounding it would cost
        # accuracy.
        self._bias = np.zeros(rows, np.float64 if dtype == "float64" else np.float32) if bias else None
        self.steps = 0
        self._optimizer = OptimizerState()

    def reset_parameters(self) -> None:
        """Weights uniform in [-1, 1) / sqrt(columns of weight), the same for the same seed on every machine; the first
        bias."""
        self._fill(0)
        if self._bias is not None:
            self._bias[:] = self._first_bias()
        self.steps = 0
        self.reset_optimizer()

    def _fill(self, first: int) -> None:
        bound = 1.0 / np.sqrt(self._weight.shape[1])
        row = self._first_class + first
        _core.init_uniform(out=self._weight[first:], low=-bound, high=bound, seed=self.seed, first_row=row)

    def _first_bias(self) -> float:
        return 0.0

    def reset_optimizer(self) -> None:
        """Forgets the optimiser's state; the next step may use another optimiser."""
        self._optimizer = OptimizerState()

    @property
    def weight(self) -> NDArray:
        """`[n_classes, columns]`, not a copy. A bfloat16 head's is uint16 (`widehead.numpy.from_bfloat16` reads
        it)."""
        return self._weight

    @weight.setter
    def weight(self, value: ArrayLike) -> None:
        self._weight = stored(value, self._weight, "weight")

    @property
    def bias(self) -> NDArray | None:
        """`[n_classes]`, not a copy; None without bias."""
        return self._bias

    @bias.setter
    def bias(self, value: ArrayLike | None) -> None:
        if (value is None) != (self._bias is None):
            raise ShapeError(f"bias: expected {'None' if self._bias is None else 'an array'}, as the head was made")
        if self._bias is not None and value is not None:
            self._bias = stored(value, self._bias, "bias")

    def state_dict(self) -> dict[str, NDArray]:
        """The parameters by name, not copied."""
        return self._tensors()

    def _tensors(self) -> dict[str, NDArray]:
        """Those of this layer, as files name them."""
        return {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})

    def load_state_dict(self, state: dict[str, ArrayLike]) -> None:
        """Sets the parameters from arrays of the same shapes; the optimiser's state is forgotten."""
        if set(state) != set(self.state_dict()):
            raise ShapeError(f"state: expected the names {sorted(self.state_dict())}, got {sorted(state)}")
        arrays = {name: stored(state[name], like, name) for name, like in self.state_dict().items()}
        self._weight, self._bias = arrays["weight"], arrays.get("bias")
        self.reset_optimizer()

    def _grow(self, n_classes: int) -> None:
        if not isinstance(n_classes, int | np.integer) or n_classes < self.n_classes:
            raise ShapeError(f"n_classes: expected an integer of at least {self.n_classes}, got {n_classes!r}")
        old, self.n_classes = len(self._weight), int(n_classes)
        rows = self.n_classes - self._first_class
        weight = np.empty((rows, self._weight.shape[1]), self._weight.dtype)
        weight[:old] = self._weight
        self._weight = weight
        self._fill(old)
        if self._bias is not None:
            fresh = np.full(rows - old, self._first_bias(), self._bias.dtype)
            self._bias = np.concatenate([self._bias, fresh])
        self._optimizer.grow(rows)

    def _configure(self, in_features: int, n_classes: int, **options: Any) -> None:
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        raise NotImplementedError

    def _option_tensors(self) -> dict[str, NDArray]:
        return {}

    def save(self, path: str | os.PathLike[str], *, optimizer: bool = False) -> None:
        """Writes the head to a safetensors file, which appears under its name only when it is complete.

        Args:
            path: the file; replaced if it is there.
            optimizer: also keep the optimiser's state, so that training resumes bit for bit.
        """
        save_head(path, self._to_file(optimizer))

    def _to_file(self, optimizer: bool) -> HeadFile:
        tensors = self._tensors() | self._option_tensors()
        state: dict[str, Any] = {"steps": self.steps}
        if optimizer:
            state["optimizer"], arrays = self._optimizer.to_file()
            tensors |= arrays
        return HeadFile(self.kind, self._config(), tensors, state, set(self.integers))

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Reads a head that was saved by this class or by the class of the same name in `widehead.torch`.

        Raises:
            FileError: the file is damaged, truncated, foreign, newer, or holds another kind of head.
        """
        file = load_head(path, cls.kind)
        try:
            return cls._from_file(file)
        except FileError:
            raise
        except (Error, KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise FileError(f"{path}: a saved {cls.kind} that this version cannot build: {reason}") from error

    @classmethod
    def _from_file(cls: type[Self], file: HeadFile) -> Self:
        head = cls.__new__(cls)
        tensors = dict(file.tensors)
        names = ("weight", "bias", *cls.integers)
        parameters: dict[str, NDArray] = {name: tensors.pop(name) for name in names if name in tensors}
        moments = {name: tensors.pop(name) for name in list(tensors) if name.startswith(SAVED)}
        config = dict(file.config)
        if config.get("dtype") == "float16":
            raise DtypeError(
                "dtype: float16 is for GPUs; in PyTorch convert the head, head.to(torch.float32), and save it again"
            )
        head._configure(config.pop("in_features"), config.pop("n_classes"), **head._options_from_file(config, tensors))
        for name, like in head._tensors().items():
            array = parameters.pop(name)
            if array.dtype == np.uint16 and (name in file.integers) != (name in cls.integers):
                raise DtypeError(f"{name}: expected {'uint16' if name in cls.integers else 'bfloat16'}, got the other")
            # The bias may come in any of the types that the core takes: PyTorch's bfloat16 heads have it in bfloat16.
            if array.shape != like.shape or array.dtype not in (STORED.values() if name == "bias" else [like.dtype]):
                raise DtypeError(
                    f"{name}: expected {list(like.shape)} {like.dtype}, got {list(array.shape)} {array.dtype}"
                )
            setattr(head, f"_{name}", array)
        if parameters:
            raise ShapeError(f"unexpected tensors {sorted(parameters)}")
        head.steps = int(file.state.get("steps", 0))
        if "optimizer" in file.state:
            head._optimizer = OptimizerState.from_file(file.state["optimizer"], moments)
        return head

    def _options_from_file(self, config: dict[str, Any], tensors: dict[str, NDArray]) -> dict[str, Any]:
        raise NotImplementedError
