"""_head.py -- the base of every head: batches, targets, reduction, ownership by a fused optimiser, copies."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from widehead import _core
from widehead._core import BackendError, DtypeError, Error, NonFiniteError, ShapeError
from widehead.files import FileError, HeadFile, load_head, save_head
from widehead.options import REDUCTIONS, choose

from . import _device
from ._files import DTYPES, NAMES, take_parameters, to_array
from ._owner import Owner
from ._target import Target, parse_exclude, parse_target

HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadOutput(NamedTuple):
    """What a head returns: `output`, each example's target log-probability or score, and the reduced `loss`."""

    output: Tensor
    loss: Tensor


class HeadOutputLse(NamedTuple):
    """The same with the log-sum-exp of each example's logits."""

    output: Tensor
    loss: Tensor
    lse: Tensor


class TopK(NamedTuple):
    """The best classes of each example, best first: `scores` float32 and `classes` int64, both `[..., k]`."""

    scores: Tensor
    classes: Tensor


class Head(nn.Module):
    """An output layer over very many classes that computes its own loss.

    A subclass provides `weight` and `bias` and the methods of one job each at the end of this class; it inherits
    everything that a user calls.
    """

    kind: ClassVar[str]
    losses: ClassVar[tuple[str, ...]]
    # Whether step() of the optimiser updates the weights, not backward; see `ExactHead`.
    deferred: ClassVar[bool] = False
    # Constructor arguments that may be tensors: files keep them as tensors.
    option_tensors: ClassVar[frozenset[str]] = frozenset({"class_weight"})
    weight: nn.Parameter
    bias: nn.Parameter | None
    seed: int
    first_class = 0  # classes before those of `weight`, which another layer of the head holds
    inner = False  # whether this is such a layer

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        loss: str,
        ignore_index: int = -100,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check(in_features >= 1, f"in_features: expected at least 1, got {in_features}")
        check(n_classes >= 1, f"n_classes: expected at least 1, got {n_classes}")
        self.in_features = int(in_features)
        self.n_classes = int(n_classes)
        self.loss = choose(loss, self.losses, "loss")
        self.ignore_index = int(ignore_index)
        self.reduction = choose(reduction, REDUCTIONS, "reduction")
        self.class_weight = checked_class_weight(class_weight, n_classes)
        self._owner: Owner | None = None
        self._anchor: Tensor | None = None
        self._control: Tensor | None = None

    def forward(
        self, hidden: Tensor, target: Any, sample_weight: Tensor | None = None, *, return_lse: bool = False
    ) -> HeadOutput | HeadOutputLse:
        """Loss of a batch.

        Args:
            hidden: `[..., in_features]`; float32, bfloat16 or float16, or float64 with float64 weights.
            target: int64 of shape `[...]`, `ignore_index` where an example has none; or, for several classes an
                example, a `torch.sparse_csr_tensor` `[B, n_classes]` (values are weights) or `widehead.Labels`, with B
                the product of `[...]`.
            sample_weight: floating, `[...]`: multiplies the examples' losses; `mean` divides by their sum.
            return_lse: also return the log-sum-exp of the logits (softmax losses).

        Returns:
            `HeadOutput(output, loss)`: `output` `[...]` is the target's log-probability (softmax) or score, summed over
            targets by weight; `loss` is 0-d, or `[...]` for `reduction="none"`. Both float32 (float64 with float64
            weights).

        Raises:
            ShapeError, DtypeError, BackendError: hidden or target does not fit the head.
            LabelError: a class is outside 0 .. n_classes - 1 (the message has its value and position). On a GPU, where
                nothing waits for the labels to be looked at, such an example's loss is NaN, the batch moves no weights,
                and the error comes from `check` or from a fused optimiser's step() soon after.
        """
        rows, batch = self._rows(hidden)
        labels = parse_target(target, batch, self.n_classes, hidden.device)
        losses, output, lse = self._losses(rows, labels)
        loss = self._reduce(losses, labels, sample_weight, batch)
        if not return_lse:
            return HeadOutput(output.reshape(batch), loss)
        check("softmax" in self.loss, f"return_lse: expected a softmax loss, this head has loss={self.loss!r}")
        return HeadOutputLse(output.reshape(batch), loss, lse.reshape(batch))

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int, exclude: Any = None) -> TopK:
        """The k best classes of each example, best first, without ever storing all scores.

        Args:
            hidden: `[..., in_features]`; k: at most n_classes.
            exclude: classes that must not appear, as a `torch.sparse_csr_tensor` `[B, n_classes]` or `widehead.Labels`.

        Returns:
            `TopK(scores, classes)`, both `[..., k]`; equal scores in order of class. Where `exclude`, or
            logits of -infinity or NaN, leave fewer than k classes, the rest has score -infinity and class -1.
        """
        rows, batch = self._rows(hidden)
        check(1 <= k <= self.n_classes, f"k: expected 1 .. {self.n_classes}, got {k}")
        scores, classes = self._topk_rows(rows, k, *parse_exclude(exclude, batch, self.n_classes, hidden.device))
        return TopK(scores.reshape(*batch, k), classes.reshape(*batch, k))

    def predict(self, hidden: Tensor) -> Tensor:
        """The best class of each example: int64 `[...]`."""
        return self.topk(hidden, 1).classes.squeeze(-1)

    @torch.no_grad()
    def scores(self, hidden: Tensor, classes: Tensor | None = None) -> Tensor:
        """Scores (logits) of the given classes, int64 `[..., n]` or `[n]` for every example; of all when None. No
        gradient.

        Returns:
            float32 (float64) `[..., n]`, or `[..., n_classes]`, which is as large as it looks.
        """
        rows, batch = self._rows(hidden)
        if classes is None:
            return self._score_rows(rows, None).reshape(*batch, self.n_classes)
        if classes.dtype != torch.int64:
            raise DtypeError(f"classes: expected int64, got {classes.dtype}")
        if classes.dim() < 2 or classes.shape[:-1] != batch:
            check(classes.dim() == 1, f"classes: expected [n] or {[*batch, 'n']}, got {list(classes.shape)}")
            classes = classes.expand(*batch, -1)
        n = classes.shape[-1]
        return self._score_rows(rows, classes.reshape(rows.shape[0], n)).reshape(*batch, n)

    @torch.no_grad()
    def log_prob(self, hidden: Tensor, classes: Tensor | None = None) -> Tensor:
        """Log-probabilities of the given classes (int64 `[..., n]` or `[n]`), or of all; shapes as `scores`. No
        gradient.

        Softmax losses: z - lse(z). `bce`: log sigmoid(z), each class by itself. Raises ShapeError for other losses,
            whose
        scores are not probabilities.
        """
        known = self.loss == "bce" or "softmax" in self.loss
        check(known, f"log_prob: expected a softmax loss or bce, this head has loss={self.loss!r}")
        scores = self.scores(hidden, classes)
        return nn.functional.logsigmoid(scores) if self.loss == "bce" else scores.sub_(self.lse(hidden).unsqueeze(-1))

    @torch.no_grad()
    def lse(self, hidden: Tensor) -> Tensor:
        """The log-sum-exp of all logits of each example: float32 (float64) `[...]`. No gradient; `return_lse` has
        one.
        """
        rows, batch = self._rows(hidden)
        return self._lse_rows(rows).reshape(batch)

    def check(self) -> None:
        """On a GPU: wait for the work so far, and raise what none of it could: the LabelError or NonFiniteError of the
        first bad value that a head on this device has met since the last such error. `save` and `grow` do so too, and
        the fused optimisers' step() raises what has arrived without waiting. On the CPU errors come at once.
        """
        _device.check(self._stored())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the head to a safetensors file, which appears under its name only when it is complete.

        `load` reads it, and so does the class of the same name in `widehead.numpy`. An optimiser's state is not in it:
        `torch.save(optimizer.state_dict(), ...)` keeps that.
        """
        self.check()
        kept = {**self._named(), **self._option_tensors()}
        tensors = {name: to_array(tensor) for name, tensor in kept.items()}
        integers = {name for name, tensor in kept.items() if tensor.dtype == torch.uint16}
        config = {
            "in_features": self.in_features,
            "n_classes": self.n_classes,
            "loss": self.loss,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "bias": self.bias is not None,
            "dtype": NAMES[self.weight.dtype],
            **self._config(),
        }
        save_head(path, HeadFile(self.kind, config, tensors, integers=integers))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: Any = None) -> Self:
        """Read a head that this class, or the class of the same name in `widehead.numpy`, has saved.

        Raises:
            FileError: the file is damaged, truncated, foreign, newer, or holds another kind of head.
        """
        file = load_head(path, cls.kind)
        try:
            config, tensors = dict(file.config), dict(file.tensors)
            for name in cls.option_tensors & set(tensors):
                config[name] = tensors.pop(name)
            dtype = DTYPES[config.pop("dtype")]
            build: Any = cls  # the constructor of the subclass, with its own options
            head: Self = build(config.pop("in_features"), config.pop("n_classes"), dtype=dtype, device="meta", **config)
            for name, tensor in take_parameters(tensors, head._named(), device, file.integers).items():
                head._adopt(name, tensor)
        except (Error, KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise FileError(f"{path}: a saved {cls.kind} that this version cannot build: {reason}") from error
        head._move_options(head.weight.device)
        return head

    def release(self) -> None:
        """Take the weights back from the fused optimiser that owns them; they are plain parameters again."""
        if self._owner is not None:
            self._owner.optimizer.release(self)

    def owned_parameters(self) -> list[nn.Parameter]:
        """What a fused optimiser updates."""
        found = [layer._stored(name) for layer in self.layers() for name in ("weight", "bias")]
        return [p for p in found if p is not None]

    def layers(self) -> tuple[Head, ...]:
        """What has a weight and a bias: this head first."""
        return (self,)

    def _stored(self, name: str = "weight") -> Any:
        """The parameter, for its place, type and device: an `ExactHead` does not bring its weights together for it."""
        return getattr(self, name)

    def _named(self) -> dict[str, Tensor]:
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def _adopt(self, name: str, tensor: Tensor) -> None:
        """Takes one of `_named` from a file."""
        setattr(self, name, nn.Parameter(tensor))

    def _fill(self, out: Tensor, first_row: int) -> None:
        """The first weights of rows from `first_row` on: uniform in [-1, 1) / sqrt(columns)."""
        bound = 1.0 / math.sqrt(out.shape[1])
        where, gpu, row = _device.capsule(out), _device.gpu_of(out), self.first_class + first_row
        _core.init_uniform(out=where, low=-bound, high=bound, seed=self.seed, first_row=row, gpu=gpu)

    def _grow_parameters(self, n_classes: int, first_bias: float = 0.0) -> None:
        """Weight, bias and the state of a fused optimiser for `n_classes`, the new rows as in a new head."""
        old, self.n_classes = self.weight.shape[0], int(n_classes)
        rows = self.n_classes - self.first_class
        weight = self.weight.new_empty(rows, self.weight.shape[1])
        weight[:old] = self.weight
        self._fill(weight[old:], old)
        _replace(self.weight, weight)
        if self.bias is not None:
            _replace(self.bias, torch.cat([self.bias, self.bias.new_full((rows - old,), first_bias)]))
        if self._owner is not None:
            self._owner.optimizer.grow(self._owner)

    def enter_ownership(self, owner: Owner) -> None:
        self._owner, self._anchor, self._control = owner, owner.anchor, owner.control
        for parameter in self.owned_parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def leave_ownership(self) -> None:
        self._owner = self._anchor = self._control = None
        for parameter in self.owned_parameters():
            parameter.requires_grad_(True)

    def after_step(self, applied: Tensor | None = None) -> None:
        """Called by the fused optimiser's step() after an update: rewiring, table maintenance.

        Args:
            applied: on a GPU, 0-d int64: 1, or 0 where the device has refused the step.
        """

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, n_classes={self.n_classes}, loss={self.loss!r}"]
        parts += [f"{name}={value!r}" for name, value in self._config().items() if value and name != "seed"]
        if self._stored("bias") is None:
            parts.append("bias=False")
        if self.reduction != "mean":
            parts.append(f"reduction={self.reduction!r}")
        if self._owner is not None:
            parts.append(f"owner={type(self._owner.optimizer).__name__}")
        return ", ".join(parts)

    def _rows(self, hidden: Tensor) -> tuple[Tensor, torch.Size]:
        """hidden as `[B, in_features]`, and its batch shape."""
        if not isinstance(hidden, Tensor) or hidden.dtype not in HIDDEN_DTYPES:
            came = hidden.dtype if isinstance(hidden, Tensor) else type(hidden).__name__
            raise DtypeError(f"hidden: expected a float32, bfloat16, float16 or float64 tensor, got {came}")
        if hidden.dim() == 0 or hidden.shape[-1] != self.in_features:
            raise ShapeError(f"hidden: expected shape [..., {self.in_features}], got {list(hidden.shape)}")
        weight = self._stored()
        if hidden.dtype == torch.float64 and weight.dtype != torch.float64:
            raise DtypeError(f"hidden: float64 needs float64 weights, this head's are {weight.dtype}")
        if weight.is_meta:
            raise BackendError(
                "weight is on the meta device: call to_empty(device=...), then reset_parameters() or load"
            )
        if hidden.device != weight.device:
            raise BackendError(f"hidden: expected it on {weight.device} like weight, got it on {hidden.device}")
        if weight.dtype == torch.float16 and not _device.on_gpu(weight):
            raise DtypeError("weight: float16 is for a GPU; move the head there, or use bfloat16 or float32")
        return hidden.reshape(-1, self.in_features), hidden.shape[:-1]

    def _reduce(self, losses: Tensor, target: Target, sample_weight: Tensor | None, batch: torch.Size) -> Tensor:
        """none, sum, or the mean by weight over the examples that have a target; 0 when their weights sum to 0."""
        weights = None
        if sample_weight is not None:
            if sample_weight.shape != batch or not sample_weight.is_floating_point():
                raise ShapeError(
                    f"sample_weight: expected a floating tensor of shape {list(batch)}, "
                    f"got {sample_weight.dtype} {list(sample_weight.shape)}"
                )
            weights = sample_weight.reshape(-1).to(losses.dtype)
            losses = losses * weights
        if self.reduction == "none":
            return losses.reshape(batch)
        if self.reduction == "sum":
            return losses.sum()
        if target.indptr is None:
            valid = target.indices != self.ignore_index
            weights = valid if weights is None else weights * valid
            if self.class_weight is not None and "softmax" in self.loss:
                # A class out of range has been reported; here it must not index.
                picked = self.class_weight[torch.where(valid, target.indices, 0).clamp(0, self.n_classes - 1)]
                weights = weights * picked.to(losses.dtype)
        if weights is None:
            return losses.sum() / max(batch.numel(), 1)
        total = weights.sum()
        return torch.where(total == 0, 0, losses.sum() / torch.where(total == 0, 1, total))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Head:
        super()._apply(fn, recurse)
        # Tensors that are options rather than state follow the device only: to_empty() and half() must not touch them.
        device = fn(torch.empty(0, device=self._option_device())).device
        if device.type != "meta":
            self._move_options(device)
        return self

    def _option_device(self) -> torch.device:
        return torch.device("cpu") if self.class_weight is None else self.class_weight.device

    def _move_options(self, device: torch.device) -> None:
        """Called whenever the head has come to a device."""
        _device.prepare(self._stored())
        if self.class_weight is not None:
            self.class_weight = self.class_weight.to(device)

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to nobody: its weights are plain parameters again.
        state = self.__dict__.copy()
        state["_was_owned"] = self._owner is not None
        state["_owner"] = state["_anchor"] = state["_control"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        was_owned = state.pop("_was_owned", False)
        super().__setstate__(state)
        if was_owned:
            self.leave_ownership()

    # What a subclass provides.

    def _losses(self, rows: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """losses, output and lse of `[B, in_features]` rows, before any reduction; each `[B]`, lse empty if there is
        none.
        """
        raise Error(f"{type(self).__name__} has no losses")

    def _topk_rows(
        self, rows: Tensor, k: int, exclude_indptr: Tensor | None, exclude_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """scores and classes, `[B, k]`."""
        raise Error(f"{type(self).__name__} has no topk")

    def _score_rows(self, rows: Tensor, classes: Tensor | None) -> Tensor:
        """Scores of classes `[B, n]`, or of all."""
        raise Error(f"{type(self).__name__} has no scores")

    def _lse_rows(self, rows: Tensor) -> Tensor:
        """Log-sum-exp of all logits, `[B]`."""
        raise Error(f"{type(self).__name__} has no lse")

    def _config(self) -> dict[str, Any]:
        """The subclass's own constructor arguments by name, as JSON keeps them; None, 0 and False where they are
        off.
        """
        return {}

    def _option_tensors(self) -> dict[str, Tensor]:
        """Those of `option_tensors` that this head has."""
        return {} if self.class_weight is None else {"class_weight": self.class_weight}


def _replace(parameter: Tensor, value: Tensor) -> None:
    parameter.grad = None
    parameter.data = value.detach()


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeError(message)


def checked_class_weight(class_weight: Any, n_classes: int) -> Tensor | None:
    if class_weight is None:
        return None
    tensor = torch.as_tensor(class_weight).detach().to(torch.float32).contiguous()
    check(tuple(tensor.shape) == (n_classes,), f"class_weight: expected shape [{n_classes}], got {list(tensor.shape)}")
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= 0 and math.isfinite(high)):
        raise NonFiniteError(f"class_weight: expected finite numbers of at least 0, got {low} to {high}")
    return tensor


def checked_seed(seed: int | None) -> int:
    """The seed of the core's random numbers; None draws one from torch's generator."""
    if seed is None:
        return int(torch.randint(2**63 - 1, ()))
    check(0 <= seed < 2**64, f"seed: expected an integer in [0, 2^64), got {seed}")
    return int(seed)


def checked_weight_dtype(dtype: torch.dtype | None, where: Tensor) -> torch.dtype:
    """The type of weights on the device of `where`."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in WEIGHT_DTYPES:
        raise DtypeError(f"dtype: expected float32, bfloat16, float16 or float64 weights, got {dtype}")
    if dtype == torch.float16 and not where.is_meta and not _device.on_gpu(where):
        raise DtypeError("dtype: float16 weights are for a GPU; on the CPU use bfloat16 or float32")
    return dtype
