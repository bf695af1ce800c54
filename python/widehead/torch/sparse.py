"""sparse.py -- the balanced sparse head as a module, and its rewiring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from widehead import _core
from widehead._core import BackendError, DtypeError, ShapeError
from widehead.options import SPARSE_LOSSES, SparseOptions, check_dense_head, check_fan_in

from . import _device
from ._device import on_gpu
from ._glue import follow_threads, sum_dtype
from ._head import Head, check, checked_class_weight, checked_seed, checked_weight_dtype
from ._order import order_array
from ._sparse_rows import SparseRows
from .heads import DenseHead

MAX_UINT16 = 65536
_CHUNK = 1 << 16  # rows of an optimiser's state that are carried along at a time


class SparseHead(SparseRows):
    """Balanced sparse output layer: every class has the same small number of inputs, and they move in training.

    z[b, c] = bias[c] + sum_k weight[c, k] hidden[b, index[c, k]] (Schultheis & Babbar, ECML-PKDD 2023, arXiv
    2306.03725, section 3). The head takes n_classes * fan_in weights in place of n_classes * in_features, and neither
    logits nor, in fused mode, a gradient of the weights exist in memory. It works best over a wide layer that is not
    negative (the paper: a ReLU layer of 16k to 100k).

    Args:
        in_features: size H of the hidden states. n_classes: number of classes D.
        fan_in: number K of inputs of every class, at most in_features.
        loss: "squared_hinge", "bce" (both: every class by itself, summed over classes) or "softmax".
        group_size: G classes in a row share their inputs; 1 is the paper.
        rewire_mode: which connections move: "magnitude_global" (the `rewire_fraction` of all with the smallest
            |weight|, mean over a group), "magnitude_row" (that fraction of each row of the index, as in arXiv
            2305.02299) or "threshold" (all below `rewire_threshold`).
        rewire_every: in fused mode, steps from one rewiring to the next; None or 0: never. In plain mode call `rewire`.
        rewire_fraction: in [0, 1].
        rewire_end: the step from which on nothing moves; until then the fraction falls by a half cosine to 0. None: it
            stays.
        seed: of the first weights and inputs, and of rewiring; None draws one from torch's generator.
        rewire_threshold: of the mode "threshold", and of no other.
        rewire_keep_value: a moved connection keeps its small weight, as in the paper, in place of 0.
        prior: with loss "bce": the probability that a class is a label of an example; biases begin at its log-odds.
            None: 1 / n_classes. With squared hinge they begin at -1, with softmax at 0.
        dense_head: so many classes, the first ones, have a dense row each in place of fan_in inputs: the submodule
            `frequent`, a `DenseHead` that this head computes and trains with the rest. Meant for the most frequent
            classes, with `class_order`. Rewiring leaves them alone.
        class_order: `[D]`, a permutation, as `widehead.order_classes` makes: row i of the head is class class_order[i].
            What comes in and goes out keeps the classes' own numbers; equal scores are in the order of the rows. None:
            as they are numbered. With `group_size` above 1 neighbours share their inputs.
        bias, reduction, class_weight, label_smoothing, lse_penalty, ignore_index: see `DenseHead`.
        dtype: float32, bfloat16 (the bias stays float32) or float64 (checks).

    Shape:
        weight `[D, K]`, bias `[D]`, index `[ceil(D / G), K]`: a buffer, torch.uint16 where H <= 65536, else int32,
        ascending and distinct in a row. hidden `[..., H]`; see `forward`. With dense_head D is the number of the other
        classes here, and `frequent` has weight `[dense_head, H]`. The class order is the buffer `order`.

    Raises:
        ShapeError, DtypeError: an option out of range or of the wrong type; fan_in larger than in_features.

    Training in plain mode gives `weight.grad` `[D, K]` and `bias.grad` for any torch optimiser; `FusedSGD` and
    `FusedAdam` update inside backward, and their step() rewires.

    On a GPU nothing waits to learn whether a step was refused (a bad label, an overflow under a GradScaler): the
    schedule of rewiring counts the calls of step() that closed one (after a checkpoint's loading: the steps taken, as
    it has them), and nothing moves after a refused one. A CUDA graph has the same work every time, so a step() inside
    its capture never rewires: call `rewire` between replays.

    DistributedDataParallel cannot send torch.uint16, and need not: the same seed gives every rank the same index, and
    the same `step=` the same rewiring. Before wrapping `net` with a head at `net.head` call
    `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["head.index"])`.
    """

    kind: ClassVar[str] = "SparseHead"
    losses: ClassVar[tuple[str, ...]] = SPARSE_LOSSES
    option_tensors: ClassVar[frozenset[str]] = frozenset({"class_weight", "class_order"})
    index: Tensor

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
        seed: int | None = 0,
        rewire_threshold: float | None = None,
        rewire_keep_value: bool = False,
        prior: float | None = None,
        dense_head: int = 0,
        class_order: Any = None,
        bias: bool = True,
        reduction: str = "mean",
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        lse_penalty: float = 0.0,
        ignore_index: int = -100,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = SparseOptions(
            fan_in, loss, group_size, rewire_mode, rewire_every, rewire_fraction, rewire_end, rewire_threshold,
            rewire_keep_value, prior, label_smoothing, ignore_index, lse_penalty, reduction, dense_head,
        )  # fmt: skip
        super().__init__(
            in_features,
            n_classes,
            loss=loss,
            ignore_index=ignore_index,
            class_weight=class_weight,
            reduction=reduction,
        )
        check_fan_in(fan_in, in_features)
        check_dense_head(dense_head, n_classes)
        self.options, self.first_class = options, dense_head
        dtype = checked_weight_dtype(dtype, torch.empty(0, device=device))
        if dtype == torch.float16:
            raise DtypeError("dtype: expected float32, bfloat16 or float64 weights of a sparse head, got float16")
        self.seed = checked_seed(seed)
        self._seen: tuple[Tensor, int] | None = None
        rows = n_classes - dense_head
        self.weight = nn.Parameter(torch.empty(rows, fan_in, device=device, dtype=dtype))
        bias_dtype = torch.promote_types(dtype, torch.float32)
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=bias_dtype)) if bias else None
        self.frequent = None
        if dense_head:
            self.frequent = DenseHead(
                in_features, dense_head, loss=loss, bias=bias, device=device, dtype=dtype, seed=self.seed
            )
            self.frequent.inner = True
        self._class_order = None if class_order is None else order_array(class_order, n_classes)
        self._row_weight: tuple[Tensor | None, Tensor | None] = (None, None)
        for name in ("order", "_rank"):
            self.register_buffer(name, None, persistent=name == "order")
        self._place_order(device)
        self.register_buffer("index", torch.empty(self._groups, fan_in, device=device, dtype=self._index_dtype))
        if not self.weight.is_meta:
            self._move_options(self.weight.device)
            self.reset_parameters()

    @property
    def _groups(self) -> int:
        return -(-(self.n_classes - self.first_class) // self.options.group_size)

    @property
    def _index_dtype(self) -> torch.dtype:
        return torch.uint16 if self.in_features <= MAX_UINT16 else torch.int32

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Weights uniform in [-1, 1) / sqrt(fan_in) and inputs uniform among all sets of fan_in, the same for the same
        seed in every face and on every machine; biases as `prior` says.

        Args:
            seed: None keeps the head's own.
        """
        self.seed = self.seed if seed is None else checked_seed(seed)
        self._fill(self.weight, 0)
        if self._is_own(self.index):
            self._draw(self.index, 0)
            if not self.index.is_inference():
                torch.autograd.graph.increment_version(self.index)
            self._mark_index()
        else:
            self.index.copy_(self._drawn(self._groups, 0))
        if self.frequent is not None:
            self.frequent.reset_parameters(self.seed)
        for layer in self.layers():
            if layer.bias is not None:
                layer.bias.fill_(self.options.first_bias(self.n_classes))

    def _drawn(self, rows: int, first_row: int) -> Tensor:
        index = torch.empty(rows, self.options.fan_in, dtype=self._index_dtype, device=self.weight.device)
        self._draw(index, first_row)
        return index

    def _draw(self, index: Tensor, first_row: int) -> None:
        if index.numel():
            where, gpu = _device.capsule(index), _device.gpu_of(index)
            _core.draw_index(index=where, in_features=self.in_features, seed=self.seed, first_row=first_row, gpu=gpu)

    @torch.no_grad()
    def rewire(
        self,
        fraction: float | None = None,
        mode: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        threshold: float | None = None,
        step: int | None = None,
    ) -> int | Tensor:
        """Move the weakest connections to other inputs, drawn at random: they start anew with weight 0. Fan-in and
        distinct inputs stay. Call it after the optimiser's step(), before the next forward pass.

        Args:
            fraction, mode, threshold: None: as the head was made.
            optimizer: the torch optimiser that trains the head: every tensor of `weight`'s shape in its state
                (momentum_buffer, exp_avg, exp_avg_sq, ...) is carried along, zero where a connection has moved. In
                fused mode the owner's state always is.
            step: of the random draw, which is a function of (seed, step, row). None: the step count in the optimiser's
                state, where it has one; else a number of torch's generator.

        Returns:
            how many connections have moved (of a group's shared inputs each counts once): on the CPU an int; on a GPU,
            where nothing waits for it, a 0-d int64 tensor there. `weight.grad` is gone.

        Raises:
            ShapeError: a number out of its range, or an optimiser that does not train this head. Nothing has changed.
            BackendError: the head is on the meta device.
        """
        arguments = self.options.rewiring(fraction, mode, threshold)
        if self.weight.is_meta:
            raise BackendError("weight is on the meta device: call to_empty(device=...) first")
        state: dict[str, Any] = {}
        count: Tensor | None = None
        if self._owner is not None:
            check(
                optimizer is None or optimizer is self._owner.optimizer,
                f"optimizer: expected None or the {type(self._owner.optimizer).__name__} that owns this head",
            )
            state, count = dict(self._owner.slots()), self._owner.step_count()
        elif optimizer is not None:
            trained = any(p is self.weight for group in optimizer.param_groups for p in group["params"])
            check(trained, "optimizer: expected one that trains this head's weight")
            found = optimizer.state.get(self.weight, {})
            state = {n: v for n, v in found.items() if isinstance(v, Tensor) and v.shape == self.weight.shape}
            count = torch.as_tensor(found["step"]) if "step" in found else None
        if step is not None:
            count = None
        elif count is None:
            step = int(torch.randint(2**63 - 1, ()))
        elif not (on_gpu(self.weight) and count.device == self.weight.device):
            step, count = int(count), None
        return self._rewire(state, 0 if step is None else int(step), count, None, arguments)

    def _rewire(
        self,
        state: dict[str, Tensor],
        step: int,
        device_step: Tensor | None,
        refused: Tensor | None,
        arguments: dict[str, Any],
    ) -> int | Tensor:
        """device_step: in the place of step. refused: int32 `[1]`, not 0 where nothing may move."""
        if refused is None and on_gpu(self.weight):
            refused = torch.zeros(1, dtype=torch.int32, device=self.weight.device)
        self._check_index(refused)
        moved = self._move(state, step, device_step, refused, arguments)
        for tensor in (self.weight, self.index, *state.values()):
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)  # a graph that has kept it must not be walked any more
        self.weight.grad = None
        self._mark_index()
        return moved

    def _move(
        self,
        state: dict[str, Tensor],
        step: int,
        device_step: Tensor | None,
        refused: Tensor | None,
        arguments: dict[str, Any],
    ) -> int | Tensor:
        follow_threads()
        kind = sum_dtype(self.weight)
        if self._owner is not None:
            slots, others = state, []
        else:
            fits = all(value.dtype == kind and value.is_contiguous() for value in state.values())
            direct = len(state) <= 2 and fits
            slots = dict(zip(("first", "second"), state.values(), strict=False)) if direct else {}
            others = [] if direct else list(state.values())
        if others:
            # The core carries the columns' numbers along; 0 comes back where a connection has moved.
            columns = torch.arange(1, self.options.fan_in + 1, dtype=kind, device=self.weight.device)
            slots = {"first": columns.expand_as(self.weight).contiguous()}
        count = torch.empty(1, dtype=torch.int64, device=self.weight.device)
        if device_step is not None:
            device_step = device_step.to(torch.int64).reshape(1)
        _core.rewire(
            weight=_device.capsule(self.weight),
            index=_device.capsule(self.index),
            group_size=self.options.group_size,
            in_features=self.in_features,
            seed=self.seed,
            step=step,
            device_step=_device.capsule(device_step),
            moved=_device.capsule(count),
            gpu=_device.gpu_of(self.weight, refused),
            **{name: _device.capsule(value) for name, value in slots.items()},
            **arguments,
        )
        for value in others:
            for begin in range(0, self.weight.shape[0], _CHUNK):
                origin = slots["first"][begin : begin + _CHUNK].long() - 1
                part = value[begin : begin + _CHUNK]
                part.copy_(torch.where(origin >= 0, part.gather(1, origin.clamp(min=0)), 0))
        return count[0] if on_gpu(self.weight) else int(count)

    def after_step(self, applied: Tensor | None = None) -> None:
        if self._owner is None or not self.options.rewire_every:
            return
        if not on_gpu(self.weight):
            step = self._owner.steps()
            fraction = self.options.fraction_after(step)
            if fraction is not None:
                self.rewire(fraction, step=step)
            return
        # The device alone knows how many steps it has taken: the schedule follows those that were closed.
        fraction = self.options.fraction_after(self._owner.closed)
        if fraction is None or _device.capturing(self.weight.device):
            return
        refused = None if applied is None else (1 - applied).to(torch.int32).reshape(1)
        with torch.no_grad():
            self._rewire(
                self._owner.slots(), 0, self._owner.step_count(), refused, self.options.rewiring(fraction, None, None)
            )

    @torch.no_grad()
    def grow(self, n_classes: int, *, class_weight: Tensor | None = None) -> None:
        """Add classes at the end, up to `n_classes`; those that were there keep their numbers, inputs and weights.

        New weights and inputs are what a head of the new size would have had from the start; classes that complete a
        group have its inputs, and none gets a dense row. Parameters stay the same objects, and the state of a fused
        optimiser that owns them grows along; that of a plain torch optimiser does not: make a new one.

        Args:
            class_weight: new ones for all `[n_classes]`, exactly when the head has them.

        Raises:
            ShapeError: fewer classes than now, or class weights missing.
        """
        self.check()
        check(n_classes >= self.n_classes, f"n_classes: expected at least {self.n_classes}, got {n_classes}")
        check(
            class_weight is not None or self.class_weight is None,
            "class_weight: expected numbers for all the classes, as the head has them, got None",
        )
        weights = checked_class_weight(class_weight, n_classes)
        self.class_weight = None if weights is None else weights.to(self.weight.device)
        if self._class_order is not None:
            self._class_order = np.concatenate([self._class_order, np.arange(self.n_classes, n_classes)])
            self._place_order(self.weight.device)
        self._grow_parameters(n_classes, self.options.first_bias(n_classes))
        old = len(self.index)
        self.index = torch.cat([self.index, self._drawn(self._groups - old, old)])

    @torch.no_grad()
    def to_dense(self) -> DenseHead:
        """The same function as a `DenseHead`, for checks: a copy with n_classes * in_features weights, nearly all 0."""
        head = DenseHead(
            self.in_features,
            self.n_classes,
            loss=self.loss,
            label_smoothing=self.options.label_smoothing,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            lse_penalty=self.options.lse_penalty,
            bias=self.bias is not None,
            reduction=self.reduction,
            device="meta",
            dtype=self.weight.dtype,
        )
        rows = self.weight.shape[0]
        inputs = self.index.long().repeat_interleave(self.options.group_size, 0)[:rows]
        weight = self.weight.new_zeros(rows, self.in_features).scatter_(1, inputs, self.weight)
        bias: Tensor | None = self.bias
        if self.frequent is not None:
            weight = torch.cat([self.frequent.weight, weight])
            bias = None if bias is None or self.frequent.bias is None else torch.cat([self.frequent.bias, bias])
        if self._rank is not None:
            weight, bias = weight[self._rank], None if bias is None else bias[self._rank]
        head.weight = nn.Parameter(weight)
        head.bias = None if bias is None else nn.Parameter(bias.clone())
        head._move_options(self.weight.device)
        return head

    def _named(self) -> dict[str, Tensor]:
        named = {**super()._named(), "index": self._checked(self.index)}
        frequent = {} if self.frequent is None else self.frequent._named()
        return {**named, **{f"frequent.{name}": tensor for name, tensor in frequent.items()}}

    def _adopt(self, name: str, tensor: Tensor) -> None:
        if name == "index":
            self.index = self._checked(tensor)
        elif self.frequent is not None and name.startswith("frequent."):
            self.frequent._adopt(name.removeprefix("frequent."), tensor)
        else:
            super()._adopt(name, tensor)

    def _checked(self, index: Tensor) -> Tensor:
        """The index in this head's type, if it is one."""
        if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
            raise DtypeError(f"index: expected integers, got {index.dtype}")
        want = [self._groups, self.options.fan_in]
        if list(index.shape) != want:
            raise ShapeError(f"index: expected shape {want}, got {list(index.shape)}")
        if index.is_meta:
            return index.to(self._index_dtype)
        # Looked at before the narrowing, which could make a wrong number a right one.
        wide = index if index.dtype in (torch.uint16, torch.int32) else index.long().clamp(-1, self.in_features).int()
        _core.check_index(index=wide.detach().cpu().contiguous().numpy(), in_features=self.in_features)
        return index.to(self._index_dtype)

    def _is_own(self, index: Tensor) -> bool:
        """Whether the core takes it as it is, what it says apart."""
        shape = (self._groups, self.options.fan_in)
        return index.dtype == self._index_dtype and index.shape == shape and index.is_contiguous()

    def _check_index(self, refused: Tensor | None = None) -> None:
        """The core reads where the index says: one that others have written to since the last look is looked at again.

        On a GPU that waits for the answer, but inside a graph's capture, where `check` has it. No step of training
        comes here a second time: the head knows what it has drawn and rewired itself.
        """
        if torch.compiler.is_compiling() or type(self.index) is not Tensor:
            return
        seen, version = self._seen or (None, 0)
        if seen is self.index and version == _version(self.index):
            return
        if on_gpu(self.index) and self._is_own(self.index):
            device = self.index.device
            waits = not _device.capturing(device)
            record = torch.zeros(_device.NUMBERS, dtype=torch.int64, device=device) if waits else None
            where, gpu = _device.capsule(self.index), _device.gpu_of(self.index, refused, record)
            _core.check_index(index=where, in_features=self.in_features, gpu=gpu)
            if record is not None:
                _core.raise_fault(record.tolist())
        else:
            self.index = self._checked(self.index)
        self._mark_index()

    def _mark_index(self) -> None:
        self._seen = (self.index, _version(self.index))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        name = prefix + "index"
        if name in state_dict:
            state_dict[name] = self._checked(state_dict[name])
        order = state_dict.get(prefix + "order")
        if order is not None and self._class_order is not None and not order.is_meta:
            self._class_order = order_array(order, self.n_classes, "order")
            self._place_order(order.device if self.weight.is_meta else self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *more)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Head:
        self._seen, self._row_weight = None, (None, None)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "_seen": None, "_row_weight": (None, None)}
        if self.index.dtype == torch.uint16:  # which torch cannot pickle
            state["_buffers"] = {**self._buffers, "index": self.index.view(torch.int16)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.index.dtype == torch.int16:
            self.index = self.index.view(torch.uint16)

    def _config(self) -> dict[str, Any]:
        aside = ("loss", "ignore_index", "reduction")
        names = [name for name in self.options.__dataclass_fields__ if name not in aside]
        return {**{name: getattr(self.options, name) for name in names}, "seed": self.seed}


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
