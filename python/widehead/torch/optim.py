"""optim.py -- optimisers whose step happens inside backward, tile by tile: no weight gradient ever exists.

    optimizer = FusedSGD(head, lr=0.1, momentum=0.9)
    loss.backward()       # the head's weights are updated here
    optimizer.step()      # counts the step; refuses nothing, moves nothing

After some steps that of a `SparseHead` also moves connections to other inputs.

They own their heads' weights: `requires_grad` is False, and a plain torch optimiser trains the rest of the network.
An `ExactHead` is updated by step() instead, and the rest of this does not hold for it.

What needs the whole gradient before the step is out of reach: gradient accumulation and double backward are refused
with an error, and gradient clipping must leave the head out (`clip_grad_norm_(backbone.parameters(), ...)`: the head
has no `.grad` to clip). Under `DistributedDataParallel` every rank would update its own copy: train data-parallel heads
in plain mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from widehead._core import BackendError, Error, ShapeError

from ._device import faults_of, on_gpu
from ._head import Head, check, checked_seed
from ._owner import PENDING, Owner
from .exact import ExactHead

ROUNDINGS = ("nearest", "stochastic", "kahan")
BY_COLUMN = ("square_avg",)  # state with a number a feature, not a class
HALVES = (torch.bfloat16, torch.float16)


class FusedOptimizer(torch.optim.Optimizer):
    """What the fused optimisers share: owning heads, counting steps, keeping state.

    A parameter group takes its heads as `{"heads": [...], "lr": ...}`; in `param_groups` each head shows up as its
    anchor (a 0-d tensor that carries the head's report to a GradScaler) followed by its weight and bias.
    """

    optimizer_name: str  # the core's
    takes_deferred = False  # whether it trains an ExactHead

    def __init__(
        self,
        heads: Head | Iterable[Head] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        rounding: str | None,
        grad_scaler: Any | None,
        seed: int | None,
    ) -> None:
        self.grad_scaler = grad_scaler
        self._owners: list[Owner] = []
        # In the parameter group, so that a checkpoint resumes with the same random rounding.
        seed = checked_seed(seed)
        groups: list[Any] = [heads] if isinstance(heads, Head) else list(heads)
        if groups and all(isinstance(head, Head) for head in groups):
            groups = [{"heads": groups}]
        try:
            super().__init__(groups, {**defaults, "rounding": rounding, "seed": seed})
        except BaseException:
            for owner in list(self._owners):
                self.release(owner.head)
            raise

    # A GradScaler hands such an optimiser its scale instead of deciding for it: step() can then see a forgotten
    # grad_scaler=.
    _step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any] | Head) -> None:
        """Take ownership of more heads: a head, or `{"heads": [...], "lr": ...}`.

        Raises:
            ShapeError: no head, a head that another optimiser owns, or an option outside its range.
        """
        group = {"heads": [param_group]} if isinstance(param_group, Head) else dict(param_group)
        given = group.pop("heads", ())
        heads = list(given) if isinstance(given, (list, tuple)) else [given]
        check(
            bool(heads) and "params" not in group and all(isinstance(head, Head) for head in heads),
            f"heads: expected widehead heads, got {heads or group.get('params')}; other parameters belong to a "
            "torch.optim optimiser of their own",
        )
        for head in heads:
            if head._stored().is_meta:
                raise BackendError("weight is on the meta device: call to_empty(device=...) first")
            if head._owner is not None:
                raise ShapeError(
                    f"heads: {head._owner.name} is owned by a {type(head._owner.optimizer).__name__} already; "
                    "call head.release() first"
                )
            check(not head.inner, "heads: expected the head itself, not the layer of its frequent classes")
        check(len({id(head) for head in heads}) == len(heads), "heads: expected each head once")
        self._check_group({**self.defaults, **group}, heads)
        owners = [Owner(head, self, len(self.param_groups)) for head in heads]
        params = [p for owner in owners for p in (owner.anchor, *owner.head.owned_parameters())]
        super().add_param_group({**group, "params": params})
        for owner in owners:
            owner.head.enter_ownership(owner)
        self._owners += owners

    def release(self, head: Head) -> None:
        """Give a head back: its weights are plain parameters again, its optimiser state is dropped."""
        owner = next((owner for owner in self._owners if owner.head is head), None)
        if owner is None:
            raise ShapeError("head: expected a head that this optimiser owns")
        gone = {id(p) for p in (owner.anchor, *head.owned_parameters())}
        group = self.param_groups[owner.group_index]
        group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in [p for p in self.state if id(p) in gone]:
            del self.state[parameter]
        self._owners.remove(owner)
        head.leave_ownership()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradient that waits for step(), which exact heads have."""
        super().zero_grad(set_to_none)
        for owner in self._owners:
            if owner.head.deferred:
                owner.head.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Close the step that backward has taken: count it and let the next backward pass. Nothing to close: no
        effect. An `ExactHead` is updated here, by the gradient of all the backward passes since the last step.

        Raises:
            ShapeError: a hyper-parameter out of range, before any exact head is updated.
            LabelError, NonFiniteError: on a GPU, what an earlier step has met, as soon as that is known without
                waiting. That step has changed nothing; this one is closed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "grad_scale", None) is not None and self.grad_scaler is None:
            raise Error(
                f"a GradScaler drives this optimiser but {type(self).__name__} does not know it: the update in "
                "backward saw scaled gradients; construct it with grad_scaler=scaler"
            )
        self._step_exact()
        for owner in self._owners:
            if owner.control[PENDING]:
                applied, owner.applied = owner.applied, None
                self._state_of(owner.head._stored())["step"] += 1 if applied is None else applied
                owner.control[PENDING] = 0
                owner.closed += 1
                owner.head.after_step(applied)
        for device in {w.device for w in (owner.head._stored() for owner in self._owners) if on_gpu(w)}:
            faults_of(device).look()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's. The velocities of exact heads are brought together first, as their weights are."""
        self._consolidate()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own type: moments stay float32 beside bfloat16 weights, bit for bit."""
        self._consolidate()
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.detach().to(device=self._place(key, parameter), copy=True)
        for owner in self._owners:
            owner.closed = int(self.state.get(owner.head._stored(), {}).get("step", 0))

    def __getstate__(self) -> dict[str, Any]:
        raise Error(
            f"{type(self).__name__} cannot be copied or pickled: it is bound to its heads; save state_dict() and load "
            "it into a new one"
        )

    def core_update(self, owner: Owner, layer: int = 0) -> dict[str, Any]:
        """The next step on a layer of this head, as the core takes it; tensors where it takes arrays."""
        head, group = owner.head.layers()[layer], self.param_groups[owner.group_index]
        update = {
            "optimizer": self.optimizer_name,
            "rounding": group["rounding"] or "stochastic",
            "weight_decay": float(group["weight_decay"]),
            "seed": int(group["seed"]),
            **self._core_options(group),
            **self._counted(owner.head.weight, group["lr"]),
        }
        if head.first_class:
            update["first_row"] = head.first_class
        update |= self.slots(owner, layer)
        if head.bias is not None:
            state = self._state_of(head.bias)
            for name, key in zip(("bias_first", "bias_second"), self._moments(group), strict=False):
                update[name] = state[key]
        return update

    def slots(self, owner: Owner, layer: int = 0) -> dict[str, Tensor]:
        """State of the weight of a layer of the head that has its shape, by the core's names."""
        head, group = owner.head.layers()[layer], self.param_groups[owner.group_index]
        state = self._state_of(head.weight, counted=head is owner.head)
        slots = {name: state[key] for name, key in zip(("first", "second"), self._moments(group), strict=False)}
        if group["rounding"] == "kahan" and head.weight.dtype in HALVES:
            slots["compensation"] = state["compensation"]
        return slots

    def steps(self, owner: Owner) -> int:
        """Steps taken on the head; waits for a GPU."""
        return int(self._state_of(owner.head._stored())["step"])

    def step_count(self, owner: Owner) -> Tensor:
        return self._state_of(owner.head._stored())["step"].reshape(1)

    def _counted(self, weight: nn.Parameter, lr: float | Tensor) -> dict[str, Any]:
        """Learning rate and step. On a GPU the step, and a learning rate that is a tensor there, are read by the
        device, so that a captured graph reads them anew.
        """
        done = self._state_of(weight)["step"]
        if not on_gpu(weight):
            return {"lr": float(lr), "step": int(done) + 1}
        counted: dict[str, Any] = {"device_step": done.reshape(1)}
        if on_device(lr):
            return {**counted, "device_lr": _rate_on(lr, weight)}
        return {**counted, "lr": float(lr)}

    def velocities(self, owner: Owner) -> list[Tensor]:
        """State of momentum of an exact head's weight and bias; none without momentum."""
        if not self.param_groups[owner.group_index].get("momentum"):
            return []
        return [self._state_of(parameter)["momentum_buffer"] for parameter in owner.head.owned_parameters()]

    def take_velocities(self, owner: Owner, velocities: list[Tensor]) -> None:
        """The same numbers, where the head wants them."""
        for parameter, velocity in zip(owner.head.owned_parameters(), velocities, strict=True):
            self.state[parameter]["momentum_buffer"] = velocity

    def follow(self, owner: Owner) -> None:
        """Takes the state of an exact head to where its parameters are now."""
        for parameter in owner.head.owned_parameters():
            state = self.state.get(parameter, {})
            for key, value in state.items():
                state[key] = value.to(self._place(key, parameter))

    @staticmethod
    def _place(key: str, parameter: Tensor) -> torch.device:
        return parameter.device if key != "step" or on_gpu(parameter) else torch.device("cpu")

    def _step_exact(self) -> None:
        exact = [(owner, owner.head) for owner in self._owners if isinstance(owner.head, ExactHead)]
        if not exact:  # on a GPU, found_inf below would have to be waited for
            return
        for owner, head in exact:  # all is checked before any head moves
            self._check_step(self.param_groups[owner.group_index], head)
        # Under a GradScaler they are skipped together, and with the backbone. On a GPU they find out there.
        signs = [getattr(self, "found_inf", None), *(head.spoilt for _, head in exact)]
        refused = None
        if all(on_gpu(head._stored()) for _, head in exact):
            place = exact[0][1]._stored().device
            there = [sign.reshape(()).to(place, non_blocking=True) != 0 for sign in signs if isinstance(sign, Tensor)]
            refused = torch.stack(there).any() if there else None
        elif any(sign is not None and bool(sign) for sign in signs):
            for _, head in exact:
                head.zero_grad()
            return
        for owner, head in exact:
            state = self._state_of(head._stored())
            applied = self._take_step(owner, refused)
            if applied is not None:
                state["step"] += applied
                owner.closed += 1

    def _take_step(self, owner: Owner, refused: Tensor | None) -> Tensor | int | None:
        """The step of an exact head: what it counts; None: nothing waited for it.

        Args:
            refused: 0-d bool, of heads on a GPU.
        """
        raise Error(f"{type(self).__name__} has no exact step")

    def _check_step(self, group: dict[str, Any], head: Head) -> None:
        if on_gpu(head._stored()) and on_device(group["lr"]):
            group = {**group, "lr": 0.0}  # the device looks at it
        for name in ("lr", "weight_decay", "momentum"):
            value = float(group[name])
            check(0 <= value < math.inf, f"{name}: expected a finite number of at least 0, got {value}")
        self._check_group(group, [head])

    def _consolidate(self) -> None:
        for owner in self._owners:
            if isinstance(owner.head, ExactHead):
                owner.head.consolidate()

    def grow(self, owner: Owner) -> None:
        """Extend the state of a head that has grown: zeros for the new classes, as at the start."""
        for parameter in owner.head.owned_parameters():
            for key, value in self.state.get(parameter, {}).items():
                if value.dim() and key not in BY_COLUMN:
                    fresh = value.new_zeros(parameter.shape[0] - len(value), *value.shape[1:])
                    self.state[parameter][key] = torch.cat([value, fresh])

    def _state_of(self, parameter: nn.Parameter, counted: bool = True) -> dict[str, Tensor]:
        """The parameter's state, made at its first use; counted: a weight has the head's step count."""
        group = next((g for g in self.param_groups if any(p is parameter for p in g["params"])), None)
        if group is None:
            raise Error(
                "a parameter of the head was replaced after the fused optimiser took it: release() the head first"
            )
        state = self.state[parameter]
        kind = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        for key in self._moments(group):
            if key not in state:
                state[key] = torch.zeros_like(parameter, dtype=kind, requires_grad=False)
        if parameter.dim() == 2:
            if counted and "step" not in state:
                device = parameter.device if on_gpu(parameter) else "cpu"
                state["step"] = torch.zeros((), dtype=torch.int64, device=device)
            if group["rounding"] == "kahan" and parameter.dtype in HALVES and "compensation" not in state:
                state["compensation"] = torch.zeros_like(parameter, requires_grad=False)
        return state

    def _check_group(self, group: dict[str, Any], heads: list[Head]) -> None:
        if not self.takes_deferred and any(head.deferred for head in heads):
            raise ShapeError(
                f"heads: {type(self).__name__} cannot train an ExactHead, whose weights have no gradient of their own "
                "each: FusedSGD and FusedRMSprop can"
            )
        check(float(group["lr"]) >= 0, f"lr: expected at least 0, got {group['lr']}")
        check(group["weight_decay"] >= 0, f"weight_decay: expected at least 0, got {group['weight_decay']}")
        rounding = group["rounding"]
        check(
            rounding is None or rounding in ROUNDINGS,
            f"rounding: expected {', '.join(ROUNDINGS)} or None, got {rounding!r}",
        )
        check(
            rounding in (None, "nearest") or not any(head.deferred for head in heads),
            f"rounding: expected None or 'nearest' with an ExactHead, got {rounding!r}",
        )

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors that take the core's `first` and `second`, as torch.optim calls them."""
        raise Error(f"{type(self).__name__} names no moments")

    def _core_options(self, group: dict[str, Any]) -> dict[str, float]:
        raise Error(f"{type(self).__name__} has no options")


class FusedSGD(FusedOptimizer):
    """Stochastic gradient descent inside backward: `torch.optim.SGD` without its gradient. Of an `ExactHead` in step().

    g += weight_decay w; with momentum m = momentum m + g, g = m (m starts as g); w -= lr g.

    Args:
        heads: a head, a list of them, or groups `{"heads": [...], "lr": ...}`. They are owned from now on.
        lr: learning rate, read at every backward: schedulers work. A tensor on the GPU is read there: steps captured in
            a CUDA graph follow it.
        momentum, weight_decay: as in torch.optim.SGD. With sampled softmax they act on the rows a step touches.
        rounding: how bfloat16 and float16 weights are rounded: "stochastic" (None), "nearest", or "kahan", which keeps
            the lost bits in one more number of that type a weight.
        grad_scaler: the `torch.amp.GradScaler` in use. Gradients that come in are unscaled, and an overflow leaves the
            head as
            it was and reaches the scaler: `scaler.step(...)` skips head and backbone together. One that shows up only
                deeper
            in the backbone comes after the head's update.
        seed: of stochastic rounding; None draws one from torch's generator.

    Raises:
        ShapeError: an option out of range, or a head that is owned already.
        NonFiniteError: in backward, a hidden state or gradient is NaN or infinite (no scaler); nothing has changed. On
            a GPU the error comes from a later step(), or from `head.check()`.
        Error: in backward, the second one before step(); those of an `ExactHead` add up.
    """

    optimizer_name = "sgd"
    takes_deferred = True

    def __init__(
        self,
        heads: Head | Iterable[Head] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rounding: str | None = None,
        grad_scaler: Any | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(heads, defaults, rounding, grad_scaler, seed)

    def _check_group(self, group: dict[str, Any], heads: list[Head]) -> None:
        super()._check_group(group, heads)
        check(0 <= group["momentum"] < 1, f"momentum: expected at least 0 and below 1, got {group['momentum']}")

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _take_step(self, owner: Owner, refused: Tensor | None) -> Tensor | int | None:
        assert isinstance(owner.head, ExactHead)
        group = self.param_groups[owner.group_index]
        return owner.head.take_step(**exact_step(group, owner.head._stored()), refused=refused)

    def _core_options(self, group: dict[str, Any]) -> dict[str, float]:
        return {"momentum": float(group["momentum"])}


class FusedAdam(FusedOptimizer):
    """Adam with decoupled weight decay inside backward: `torch.optim.AdamW` without its gradient (arXiv 1711.05101).

    w -= lr weight_decay w; m, v are the moments with bias correction; w -= lr m / (sqrt(v) + eps). The moments are
    float32.

    Args:
        betas, eps, weight_decay: as in torch.optim.AdamW, but weight_decay is 0 unless given. Sampled softmax moves the
            moments of the rows that a step touches only, as torch.optim.SparseAdam does.
        heads, lr, rounding, grad_scaler, seed: see `FusedSGD`, and its errors.
    """

    optimizer_name = "adam"

    def __init__(
        self,
        heads: Head | Iterable[Head] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding: str | None = None,
        grad_scaler: Any | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            heads, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, rounding, grad_scaler, seed
        )

    def _check_group(self, group: dict[str, Any], heads: list[Head]) -> None:
        super()._check_group(group, heads)
        check(
            all(0 <= b < 1 for b in group["betas"]),
            f"betas: expected two of at least 0 and below 1, got {group['betas']}",
        )
        check(group["eps"] >= 0, f"eps: expected at least 0, got {group['eps']}")

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _core_options(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"beta1": float(beta1), "beta2": float(beta2), "eps": float(group["eps"])}


def exact_step(group: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """What an exact head's step takes of a parameter group."""
    options: dict[str, Any] = {name: float(group[name]) for name in ("weight_decay", "momentum")}
    if on_gpu(weight) and on_device(group["lr"]):
        return {**options, "lr": 0.0, "device_lr": _rate_on(group["lr"], weight)}
    return {**options, "lr": float(group["lr"])}


def on_device(lr: Any) -> bool:
    """Whether a learning rate is a tensor on a GPU, which is read there."""
    return isinstance(lr, Tensor) and on_gpu(lr)


def _rate_on(lr: Any, weight: Tensor) -> Tensor:
    return lr.detach().to(device=weight.device, dtype=torch.float32, non_blocking=True).reshape(1)
