"""widehead/_sparse.py -- the NumPy face of the sparse head."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _block, _core
from ._arrays import stored
from ._core import DtypeError, ShapeError
from ._dense import DenseHead
from ._order import ClassOrder, checked_order
from ._output import OutputHead, checked_class_weight
from .files import HeadFile
from .options import SparseOptions, check_dense_head, check_fan_in

MAX_UINT16 = 65536


class SparseHead(OutputHead):
    """The balanced sparse output layer: every class has the same small number of inputs, and they move in training.

    z[b, c] = bias[c] + sum_k weight[c, k] hidden[b, index[c, k]] (Schultheis & Babbar, ECML-PKDD 2023, arXiv
    2306.03725, section 3). The head takes n_classes * fan_in weights in place of n_classes * in_features; a step walks
    the classes in tiles that stay in cache and needs no memory of batch times classes. Every `rewire_every` steps the
    weakest connections move to other inputs, drawn at random: they start anew with weight 0 and zero state. It works
    best over a wide layer that is not negative (the paper: a ReLU layer of 16k to 100k).

    Args:
        in_features: size H of hidden.
        n_classes: number of classes D.
        fan_in: number K of inputs of every class, at most in_features.
        loss: "squared_hinge", "bce" (both: every class that is not a target is a negative) or "softmax".
        group_size: G classes in a row share their inputs; 1 is the paper.
        rewire_mode: which connections move: "magnitude_global" (the `rewire_fraction` of all with the smallest
            |weight|, mean over a group), "magnitude_row" (that fraction of each row of the index, as in arXiv
            2305.02299) or "threshold" (all below `rewire_threshold`).
        rewire_every: steps from one rewiring to the next; None or 0: never.
        rewire_fraction: in [0, 1].
        rewire_end: the step from which on nothing moves; until then the fraction falls by a half cosine to 0. None: it
            stays.
        rewire_threshold: of the mode "threshold", and of no other.
        rewire_keep_value: a moved connection keeps its small weight, as in the paper; its state is zeroed all the same.
        prior: with loss "bce": the probability that a class is a label of an example; biases begin at its log-odds.
            None: 1 / n_classes. With squared hinge they begin at -1, with softmax at 0.
        dense_head: so many classes, the first ones, have a dense row each in place of fan_in inputs (`frequent`). Meant
            for the most frequent classes, with `class_order`. Rewiring leaves them alone.
        class_order: `[n_classes]`, a permutation, as `widehead.order_classes` makes: row i of the head is class
            class_order[i]. What comes in and goes out keeps the classes' own numbers; equal scores are in the order of
            the rows. None: as they are numbered. With `group_size` above 1 neighbours share their inputs.
        seed: of the first weights and inputs, of rewiring and stochastic rounding.
        label_smoothing, lse_penalty, ignore_index, class_weight, bias, reduction, dtype: see `DenseHead`.

    Attributes:
        weight: `[n_classes - dense_head, fan_in]`; a bfloat16 head's is uint16, bits.
        index: `[ceil((n_classes - dense_head) / group_size), fan_in]`, uint16 where in_features <= 65536, else int32;
            ascending and distinct in a row.
        bias: `[n_classes - dense_head]` or None.
        frequent: the `DenseHead` of the first classes, or None; it is trained by this head's `step`.
        order: `class_order`, or None.

    Raises:
        ShapeError: an option out of its range, or fan_in larger than in_features.

    `hidden` and targets are those of `DenseHead`.
    """

    kind = "SparseHead"
    prefix = "sparse"
    integers: ClassVar[frozenset[str]] = frozenset({"index"})
    options: SparseOptions
    frequent: DenseHead | None

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        fan_in: int = 32,
        *,
        loss: str = "squared_hinge",
        group_size: int = 1,
        rewire_mode: str = "magnitude_global",
        rewire_every: int | None = 1000,
        rewire_fraction: float = 0.1,
        rewire_end: int | None = None,
        rewire_threshold: float | None = None,
        rewire_keep_value: bool = False,
        prior: float | None = None,
        dense_head: int = 0,
        class_order: ArrayLike | None = None,
        label_smoothing: float = 0.0,
        lse_penalty: float = 0.0,
        ignore_index: int = -100,
        class_weight: ArrayLike | None = None,
        bias: bool = True,
        reduction: str = "mean",
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        self._configure(
            in_features,
            n_classes,
            fan_in=fan_in,
            loss=loss,
            group_size=group_size,
            rewire_mode=rewire_mode,
            rewire_every=rewire_every,
            rewire_fraction=rewire_fraction,
            rewire_end=rewire_end,
            rewire_threshold=rewire_threshold,
            rewire_keep_value=rewire_keep_value,
            prior=prior,
            dense_head=dense_head,
            class_order=class_order,
            label_smoothing=label_smoothing,
            lse_penalty=lse_penalty,
            ignore_index=ignore_index,
            class_weight=class_weight,
            bias=bias,
            reduction=reduction,
            dtype=dtype,
            seed=seed,
        )
        self.reset_parameters()

    def _configure(
        self,
        in_features: int,
        n_classes: int,
        *,
        class_weight: ArrayLike | None = None,
        class_order: ArrayLike | None = None,
        bias: bool = True,
        dtype: str = "float32",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.options = SparseOptions(**options)
        self._first_class = self.options.dense_head
        if isinstance(n_classes, int | np.integer) and n_classes >= 1:
            check_dense_head(self._first_class, n_classes)
        self._allocate(in_features, n_classes, bias, dtype, seed, self.options.fan_in)
        check_fan_in(self.options.fan_in, self.in_features)
        self._index = self._empty_index()
        self.class_weight = checked_class_weight(class_weight, self.n_classes)
        self._order = None if class_order is None else ClassOrder(class_order, self.n_classes)
        self.frequent = None
        if self._first_class:
            self.frequent = DenseHead(
                self.in_features, self._first_class, loss=self.options.loss, bias=bias, dtype=dtype, seed=seed
            )

    def __repr__(self) -> str:
        o = self.options
        return (
            f"SparseHead({self.in_features}, {self.n_classes}, fan_in={o.fan_in}, loss={o.loss!r}, "
            f"group_size={o.group_size}, dtype={self.dtype!r})"
        )

    @property
    def order(self) -> NDArray[np.int64] | None:
        """`[n_classes]`: row i of the head is class order[i]; None: as they are numbered. Not to be written to."""
        return None if self._order is None else self._order.order

    @property
    def index(self) -> NDArray:
        """`[ceil(n_classes / group_size), fan_in]`, the inputs of the classes; not a copy, and not to be written to:
        set it as a whole."""
        return self._index

    @index.setter
    def index(self, value: ArrayLike) -> None:
        self._index = self._checked_index(value)

    def reset_parameters(self) -> None:
        """Weights uniform in [-1, 1) / sqrt(fan_in) and inputs uniform among all sets of fan_in, the same for the same
        seed on every machine; biases as `prior` says."""
        _core.draw_index(index=self._index, in_features=self.in_features, seed=self.seed)
        super().reset_parameters()
        if self.frequent is not None:
            self.frequent.reset_parameters()
            if self.frequent._bias is not None:
                self.frequent._bias[:] = self._first_bias()

    def reset_optimizer(self) -> None:
        super().reset_optimizer()
        if self.frequent is not None:
            self.frequent.reset_optimizer()

    def set_bias(self, value: ArrayLike) -> None:
        value = np.asarray(value)
        if self._bias is None or value.shape != (self.n_classes,):
            want = "no bias" if self._bias is None else f"shape [n_classes] = [{self.n_classes}]"
            raise ShapeError(f"bias: expected {want}, got shape {list(value.shape)}")
        rows = value if self._order is None else value[self._order.order]
        self.bias = rows[self._first_class :]
        if self.frequent is not None:
            self.frequent.bias = rows[: self._first_class]

    def rewire(
        self,
        fraction: float | None = None,
        mode: str | None = None,
        *,
        threshold: float | None = None,
        step: int | None = None,
    ) -> int:
        """Moves the weakest connections to other inputs, with their weights and the optimiser's state; `step` of
        training does so by itself.

        Args:
            fraction, mode, threshold: None: as the head was made.
            step: of the random draw, which is a function of (seed, step, row); None: the steps taken so far.

        Returns:
            how many connections have moved (of a group's shared inputs each counts once).

        Raises:
            ShapeError: a number out of its range, or a threshold without its mode. Nothing has changed.
        """
        arguments = self.options.rewiring(fraction, mode, threshold)
        names = ("first", "second", "compensation")
        # Adagrad's accumulator belongs to the row, not to a connection.
        arrays: dict[str, Any] = {
            n: a for n, a in self._optimizer.arrays.items() if n in names and a.shape == self._weight.shape
        }
        return _core.rewire(
            weight=self._weight,
            index=self._index,
            group_size=self.options.group_size,
            in_features=self.in_features,
            seed=self.seed,
            step=self.steps if step is None else step,
            **arrays,
            **arguments,
        )

    def grow(self, n_classes: int, *, class_weight: ArrayLike | None = None) -> None:
        """Adds classes at the end, up to `n_classes`, with the weights and inputs of a head made with so many classes;
        those that complete a group have the group's inputs. None of them is among the frequent ones.

        A head with class weights takes new ones `[n_classes]`.
        """
        if self.class_weight is not None and class_weight is None:
            raise ShapeError("class_weight: expected an array [n_classes] for all the classes, as the head has one")
        if not isinstance(n_classes, int | np.integer) or n_classes < self.n_classes:
            raise ShapeError(f"n_classes: expected an integer of at least {self.n_classes}, got {n_classes!r}")
        weights = checked_class_weight(class_weight, int(n_classes))
        order = None if self._order is None else self._order.grown(int(n_classes))
        self._grow(int(n_classes))
        index, old = self._empty_index(), len(self._index)
        index[:old] = self._index
        if old < len(index):
            _core.draw_index(index=index[old:], in_features=self.in_features, seed=self.seed, first_row=old)
        self._index, self.class_weight, self._order = index, weights, order

    def to_dense(self) -> DenseHead:
        """The same function as a `DenseHead`, for checks: a copy with n_classes * in_features weights, nearly all 0."""
        o = self.options
        head = DenseHead(
            self.in_features,
            self.n_classes,
            loss=o.loss,
            label_smoothing=o.label_smoothing,
            ignore_index=o.ignore_index,
            class_weight=self.class_weight,
            lse_penalty=o.lse_penalty,
            bias=self._bias is not None,
            reduction=o.reduction,
            dtype=self.dtype,
        )
        inputs = np.repeat(self._index.astype(np.int64), o.group_size, axis=0)[: len(self._weight)]
        head.weight[...] = 0
        np.put_along_axis(head.weight[self._first_class :], inputs, self._weight, 1)
        bias = self._bias
        if self.frequent is not None:
            head.weight[: self._first_class] = self.frequent._weight
            if bias is not None and self.frequent._bias is not None:
                bias = np.concatenate([self.frequent._bias, bias])
        if self._order is not None:
            head.weight = head.weight[self._order.rank]
            bias = None if bias is None else bias[self._order.rank]
        head.bias = bias
        return head

    def state_dict(self) -> dict[str, NDArray]:
        """The parameters by name, not copied."""
        state = self._tensors()
        if self.frequent is not None:
            state |= {f"frequent.{name}": array for name, array in self.frequent.state_dict().items()}
        return state if self._order is None else {**state, "order": self._order.order}

    def _tensors(self) -> dict[str, NDArray]:
        return {**super()._tensors(), "index": self._index}

    def load_state_dict(self, state: dict[str, ArrayLike]) -> None:
        """Sets the parameters from arrays of the same shapes; the optimiser's state is forgotten.

        Raises:
            ShapeError, DtypeError: one does not fit, or the index is none. Nothing has changed.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ShapeError(f"state: expected the names {sorted(own)}, got {sorted(state)}")
        index = self._checked_index(state["index"])
        aside = ("index", "order")
        arrays = {name: stored(state[name], like, name) for name, like in own.items() if name not in aside}
        if "order" in state:
            self._order = ClassOrder(checked_order(state["order"], self.n_classes, "order"), self.n_classes)
        self._weight, self._bias, self._index = arrays["weight"], arrays.get("bias"), index
        if self.frequent is not None:
            self.frequent._weight, self.frequent._bias = arrays["frequent.weight"], arrays.get("frequent.bias")
        self.reset_optimizer()

    def _call(self, operation: str, **arguments: Any) -> Any:
        if self.frequent is None and self._order is None:
            return super()._call(operation, **arguments)
        return _block.run(self, operation, arguments)

    def _after_step(self) -> None:
        fraction = self.options.fraction_after(self.steps)
        if fraction is not None:
            self.rewire(fraction)

    def _first_bias(self) -> float:
        return self.options.first_bias(self.n_classes)

    def _empty_index(self) -> NDArray:
        groups = -(-(self.n_classes - self._first_class) // self.options.group_size)
        return np.empty((groups, self.options.fan_in), np.uint16 if self.in_features <= MAX_UINT16 else np.int32)

    def _checked_index(self, value: ArrayLike) -> NDArray:
        array = np.asarray(value)
        if array.dtype.kind not in "iu":
            raise DtypeError(f"index: expected integers, got {array.dtype}")
        if array.shape != self._index.shape:
            raise ShapeError(f"index: expected shape {list(self._index.shape)}, got {list(array.shape)}")
        # Looked at before the narrowing, which could make a wrong number a right one.
        wide = np.clip(array, -1, self.in_features).astype(np.int32)
        _core.check_index(index=wide, in_features=self.in_features)
        return wide.astype(self._index.dtype)

    def _layer(self, hidden: NDArray) -> dict[str, Any]:
        return {**super()._layer(hidden), "index": self._index, "group_size": self.options.group_size}

    @classmethod
    def _from_file(cls, file: HeadFile) -> SparseHead:
        own, others = _block.parted(file)
        head: SparseHead = super()._from_file(own)
        _core.check_index(index=head._index, in_features=head.in_features)
        if head.frequent is not None:
            config = head.frequent._config()
            head.frequent = DenseHead._from_file(HeadFile("DenseHead", config, others, file.state))
        return head

    def _to_file(self, optimizer: bool) -> HeadFile:
        file = super()._to_file(optimizer)
        if self.frequent is not None:
            file.tensors |= _block.named(self.frequent._to_file(optimizer).tensors)
        return file

    def _option_tensors(self) -> dict[str, NDArray]:
        order = {} if self._order is None else {"class_order": self._order.order}
        return super()._option_tensors() | order

    def _config(self) -> dict[str, Any]:
        options = {name: getattr(self.options, name) for name in self.options.__dataclass_fields__}
        return {
            "in_features": self.in_features,
            "n_classes": self.n_classes,
            **options,
            "bias": self._bias is not None,
            "dtype": self.dtype,
            "seed": self.seed,
        }
