"""exact.py -- the exact head as a module: SGD on a full layer in time that does not depend on the number of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from widehead._core import BackendError, DtypeError, Error
from widehead.options import EXACT_LOSSES, ExactOptions

from . import ops
from ._device import on_gpu
from ._exact_goal import Goal
from ._exact_memory import ExactMemory, join, joined, views
from ._exact_queries import class_log_prob, most_probable
from ._glue import sum_dtype
from ._head import Head, HeadOutput, HeadOutputLse, check, checked_seed
from ._owner import Owner
from ._target import parse_target
from .exact_ops import Job, SphericalLoss, Statistics
from .heads import DenseHead

SOFTMAXES = ("spherical_softmax", "taylor_softmax")


class Moments(NamedTuple):
    """What a spherical loss is a function of, float64: `A`, the outputs at the targets; `q` `[...]`, the sum of the
    squares of all n_classes outputs of each example; `s` `[...]`, their sum.
    """

    A: Tensor
    q: Tensor
    s: Tensor


class ExactHead(Head):
    """A full layer over all classes, trained by exact SGD at a cost that does not grow with their number.

    It takes losses of the spherical family, functions of the outputs A at the targets, of q = |o|^2 and of s = sum o,
    where o = W h are the outputs of all classes (Vincent, de Brebisson, Bouthillier, NIPS 2015, arXiv 1412.7091; arXiv
    1606.08061). W is kept as rows times small matrices: a step costs O(in_features^2 batch) and gives, up to rounding,
    the weights that torch.optim.SGD would give an nn.Linear.

        head = ExactHead(300, 800_000)
        optimizer = FusedSGD(head, lr=0.1, momentum=0.9)
        head(backbone(x), target).loss.backward()  # gathers the gradient; several backwards add up
        optimizer.step()  # updates all the weights; optimizer.zero_grad() forgets the gradient instead

    Args:
        in_features: size d of the hidden states; n_classes, the number of classes D, should be far above it.
        loss: "squared_error": q - 2 sum y A + sum y^2, where y are the values of the targets (1 without) and all other
            classes want 0; "spherical_softmax": log(q + D eps) - log(A^2 + eps); "taylor_softmax": log(D + s + q / 2) -
            log(1 + A + A^2 / 2) (arXiv 1511.05042); "z_loss": softplus(a (b - z)) / a with z = (A - mean) / deviation
            of all outputs (arXiv 1604.08859). The last three are sums over the targets, times their values. Any other
            loss of the family: see `statistics`.
        eps: of spherical softmax, 0.01 if None. a, b: of the z-loss, 1 and 10 if None.
        factors: "float32" or "float64", the type of the small matrices and of the rows in work, and so of the products
            behind A, q and s: in float32 they lose digits where outputs are far smaller than |W| |h|. None: float64
            with spherical softmax, whose course is sensitive, and with float64 weights.
        block_steps: for how many steps the rows of targets stay in work before they go back.
        method: "blocked", or "woodbury", the update of the papers, which keeps an inverse; it has no momentum.
        max_kappa: of "woodbury", 4 if None: it starts anew before a singular value of its matrix passes this, or its
            inverse. More is faster and rounds worse.
        bias: whether classes have a bias: the weight of a feature that is always 1, as exact as the others.
        ignore_index, reduction, seed: see `DenseHead`.
        dtype: float32 or float64, of the weights.

    Shape:
        weight `[D, d]`, bias `[D]`: views of one matrix. hidden `[..., d]`; see `forward`.

    Raises:
        ShapeError, DtypeError: an option out of range or of the wrong type.

    `FusedSGD` and `FusedRMSprop` train it, no other optimiser: the gradient of W never exists, and `requires_grad` of
    its parameters is False. The gradient's norm is known nonetheless (`grad_norm`, `clip_grad_norm_`). The update comes
    with the optimiser's step(), not in backward. Where no optimiser owns the head, in eval() and under no_grad, losses
    and the gradient to hidden are right and nothing is trained.

    Between steps the memory of `weight` holds a factor of the weights. Reading the attributes, `state_dict`, `save`,
    copies, `to` and queries over all classes (`topk`, `scores`) bring the rows together first, in one pass over them;
    `rows`, `materialise` and training never do. So take `head.weight` anew to look at it or to write to it: a reference
    (or a state_dict) from before a step does not hold the weights after it, and no other module can share the
    parameter. Writing to `head.weight` is seen, but not through `.data`.

    On a GPU nothing waits, errors of values come later (`check`), a block is one step, and there is no "woodbury". A
    whole step (forward, backward, step()) can be captured in a CUDA graph, after one outside of it; `head.weight` and
    the rest are right between replays. Weights written to between replays: call `consolidate` before the next one.
    """

    kind: ClassVar[str] = "ExactHead"
    losses: ClassVar[tuple[str, ...]] = EXACT_LOSSES
    option_tensors: ClassVar[frozenset[str]] = frozenset()
    deferred: ClassVar[bool] = True

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        loss: str = "squared_error",
        eps: float | None = None,
        a: float | None = None,
        b: float | None = None,
        factors: str | None = None,
        block_steps: int = 4,
        method: str = "blocked",
        max_kappa: float | None = None,
        ignore_index: int = -100,
        bias: bool = False,
        reduction: str = "mean",
        device: Any = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ) -> None:
        options = ExactOptions(loss, eps, a, b, factors, block_steps, method, max_kappa, ignore_index, reduction)
        super().__init__(in_features, n_classes, loss=loss, ignore_index=ignore_index, reduction=reduction)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"dtype: expected float32 or float64 weights of an exact head, got {dtype}")
        self.options = options
        self.seed = checked_seed(seed)
        self._memory: ExactMemory | None = None
        matrix = torch.empty(n_classes, in_features + bool(bias), device=device, dtype=dtype)
        parts = views(matrix, 1 + bool(bias))
        for name, part in zip(("weight", "bias"), [*parts, None], strict=False):
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))
        if not matrix.is_meta:
            self._move_options(matrix.device)
            self.reset_parameters()

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            self.consolidate()
        return super().__getattr__(name)

    def consolidate(self) -> None:
        """Brings the rows together: afterwards the memory of `weight` holds the weights. One pass over all rows."""
        memory = self.__dict__.get("_memory")
        if memory is not None:
            memory.consolidate()

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Weights uniform in [-1, 1) / sqrt(in_features), the same for the same seed in every face and on every
        machine; bias 0.

        Args:
            seed: None keeps the head's own.
        """
        self.seed = self.seed if seed is None else checked_seed(seed)
        self._open()
        self._fill(self._stored(), 0)
        for bias in self._parts()[1:]:
            bias.zero_()
        self._close()

    def forward(
        self, hidden: Tensor, target: Any, sample_weight: Tensor | None = None, *, return_lse: bool = False
    ) -> HeadOutput | HeadOutputLse:
        """Loss of a batch.

        Args:
            hidden, target, sample_weight: see `DenseHead.forward`; the values of a sparse target are the y of squared
                error, and weights with the other losses.
            return_lse: False; these losses have no log-sum-exp.

        Returns:
            `HeadOutput(output, loss)`: `output` `[...]` is the sum of y A over an example's targets, with spherical and
            Taylor softmax their log-probability; `loss` is 0-d, or `[...]` for `reduction="none"`. Both float32
            (float64 with float64 weights).

        Raises:
            ShapeError, DtypeError, BackendError: hidden or target does not fit the head.
            LabelError, NonFiniteError: a class out of range; a hidden state or target value that is NaN or infinite
                (under a GradScaler a hidden state makes the step be skipped). Nothing has changed.
            Error: in backward, the optimiser has taken a step since, or the derivative is to have one itself.
        """
        check(not return_lse, f"return_lse: expected False with loss={self.loss!r}, got True")
        rows, batch = self._rows(hidden)
        labels = parse_target(target, batch, self.n_classes, hidden.device)
        goal = Goal.of(labels, self.n_classes, self.ignore_index)
        A, q, s = self._moments(rows, goal)
        losses = SphericalLoss.apply(A, q, s, goal, self.n_classes, self.options.loss_arguments())
        scale = self._scale(goal, len(rows), sample_weight, batch)
        loss = torch.where(scale == 0, 0.0, losses * scale)
        if self.loss in SOFTMAXES:
            output = -losses
        else:
            output = goal.gather(A if goal.values is None else A * goal.values, len(rows))
        kind = sum_dtype(self._stored())
        loss = loss.reshape(batch) if self.reduction == "none" else loss.sum()
        return HeadOutput(output.reshape(batch).to(kind), loss.to(kind))

    def statistics(self, hidden: Tensor, target: Any) -> Moments:
        """What a loss of the spherical family is a function of, with autograd: any differentiable loss on it is trained
        exactly, as the named ones are.

            A, q, s = head.statistics(hidden, target)
            loss = (q - 2 * A + 1).mean()  # squared error of one-hot targets
            loss.backward()
            optimizer.step()

        Of implicit feedback, where all pairs count a little and the observed ones more: alpha sum o^2 over all classes
        + sum w (o - 1)^2 over the observed ones of each example, whose weights w are the values of the target:

            A, q, s = head.statistics(hidden, labels)
            loss = (alpha * q.sum() + (labels.values * (A - 1) ** 2).sum()) / len(hidden)

        Args:
            hidden: `[..., in_features]`; target: as in `forward`; its values play no part.

        Returns:
            `Moments(A, q, s)`: A is `[nnz]` in the order of the targets of a sparse target (target i belongs to example
            `torch.arange(B).repeat_interleave(indptr.diff())[i]`); for single labels `[...]`, 0 at the ignore_index,
            where q and s are those of the example all the same.
        """
        rows, batch = self._rows(hidden)
        labels = parse_target(target, batch, self.n_classes, hidden.device)
        goal = Goal.of(labels, self.n_classes, self.ignore_index)
        A, q, s = self._moments(rows, goal)
        if goal.single:
            A = goal.by_example(A).reshape(batch)
        return Moments(A, q.reshape(batch), s.reshape(batch))

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The norm of the gradient of all weights and biases that waits for step(): 0-d float64, exact, without any of
        its elements. Infinity after an overflow under a GradScaler.
        """
        if self._memory is None:
            return torch.zeros((), dtype=torch.float64, device=self._stored().device)
        return self._memory.core.grad_norm()

    def grad_columns(self) -> Tensor:
        """The mean square of each column of that gradient: float64 `[in_features]`, with a bias one more."""
        if self._memory is None:
            return torch.zeros(self._width, dtype=torch.float64, device=self._stored().device)
        return self._memory.core.grad_columns()

    def scale_grad(self, factor: float | Tensor) -> None:
        """Multiplies the gradient that waits for step().

        Args:
            factor: a number; or 0-d on a GPU, which is not waited for.

        Raises:
            ShapeError: factor is a number that is not finite.
        """
        if self._memory is not None:
            self._memory.core.scale_grad(factor if isinstance(factor, Tensor) else float(factor))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradient that waits for step(), as the optimiser's zero_grad() does. (That of a module around the
        head does not come here.)
        """
        super().zero_grad(set_to_none)
        if self._memory is not None:
            self._memory.core.drop_pending()

    def rows(self, ids: Any) -> Tensor:
        """The weights of some classes as they are now: `[n, in_features]`, a copy. The others stay as they lie.

        Args:
            ids: int64 `[n]`, or a sequence of integers.
        """
        memory, weight = self._exact(), self._stored()
        wanted = torch.as_tensor(ids, dtype=torch.int64, device=weight.device).reshape(-1).contiguous()
        out = torch.empty(len(wanted), self._width, dtype=weight.dtype, device=weight.device)
        memory.core.rows(wanted, out)
        return out[:, : self.in_features]

    def materialise(self, lo: int, hi: int) -> Tensor:
        """The weights of the classes lo .. hi - 1: `[hi - lo, in_features]`, a copy."""
        check(0 <= lo <= hi <= self.n_classes, f"lo, hi: expected 0 <= lo <= hi <= {self.n_classes}, got {lo}, {hi}")
        return self.rows(torch.arange(lo, hi, device=self._stored().device))

    def diagnostics(self) -> dict[str, float]:
        """How the state is: steps, blocks, live matrices, rows in work (not on a GPU), rows fetched and moved, the
        relative error of W'W on a probe (a pass over all rows), |W|^2. Waits for a GPU.
        """
        return self._exact().core.diagnostics()

    @torch.no_grad()
    def log_prob(self, hidden: Tensor, classes: Tensor | None = None) -> Tensor:
        """Log-probabilities of the given classes, or of all, of spherical or Taylor softmax; shapes as `scores`. No
        gradient. Raises ShapeError for other losses, whose scores are not probabilities.
        """
        check(self.loss in SOFTMAXES, f"log_prob: expected spherical_softmax or taylor_softmax, got loss={self.loss!r}")
        rows, batch = self._rows(hidden)
        _, q, s = self._moments(rows, Goal.nobody(len(rows), rows.device))
        scores = self.scores(hidden, classes)
        q, s = q.reshape(*batch, 1), s.reshape(*batch, 1)
        return class_log_prob(self.options.loss_arguments(), self.n_classes, scores, q, s)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        """A head with a copy of a linear layer's parameters; `options` as in the constructor."""
        check(isinstance(linear, nn.Linear), f"linear: expected torch.nn.Linear, got {type(linear).__name__}")
        weight, bias = linear.weight.detach(), linear.bias
        head = cls(
            linear.in_features,
            linear.out_features,
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        for part, given in zip(head._parts(), (weight, bias), strict=False):
            part.data.copy_(given.detach())
        return head

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A linear layer with a copy of the parameters; it computes the outputs."""
        weight = self.weight
        linear = nn.Linear(
            self.in_features, self.n_classes, self._stored("bias") is not None, weight.device, weight.dtype
        )
        linear.weight.copy_(weight)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear

    def to_dense(self) -> DenseHead:
        """A `DenseHead` with a copy of the parameters and so the same scores; its loss is softmax, as it has none of
        this head's.
        """
        return DenseHead.from_linear(self.to_linear(), ignore_index=self.ignore_index, reduction=self.reduction)

    @torch.no_grad()
    def grow(self, n_classes: int) -> None:
        """Add classes at the end, up to `n_classes`; those that were there keep their numbers and weights.

        New weights are what a head of the new size would have had from the start. Parameters stay the same objects, and
        the state of the optimiser grows along.

        Raises:
            ShapeError: fewer classes than now. Error: a gradient waits for step().
        """
        check(n_classes >= self.n_classes, f"n_classes: expected at least {self.n_classes}, got {n_classes}")
        if self._pending:
            raise Error("grow: a gradient waits for the optimiser: call its step() or zero_grad() first")
        self.check()
        self._leave()
        old, self.n_classes = self.n_classes, int(n_classes)
        parts = self._parts()
        grown = views(parts[0].new_empty(self.n_classes, self._width), len(parts))
        for part, new in zip(parts, grown, strict=True):
            new[:old] = part
            part.data = new
        self._fill(grown[0][old:], old)
        for bias in grown[1:]:
            bias[old:] = 0
        if self._owner is not None:
            self._owner.optimizer.grow(self._owner)

    def take_step(self, **how: Any) -> Tensor | int | None:
        """Called by the optimiser's step(): the update by the gradient that waits, `how` as the core's step has it.
        Returns what it counts, on a GPU 0-d: 0 where it was refused. None: there is nothing to take.
        """
        return self._exact().step(**how) if self._pending else None

    @property
    def spoilt(self) -> Tensor | bool | None:
        """Whether what waits was spoilt by an overflow under a GradScaler; on a GPU 0-d or None, and without those that
        the report to the scaler tells of.
        """
        return self._memory is not None and self._memory.core.spoilt

    def spoil_grad(self, norm: Tensor) -> None:
        """The gradient that waits belongs to one of the norm NaN or infinity: under a GradScaler its step is skipped.
        On a GPU the norm, 0-d, may also be finite, and nothing happens then.

        Raises:
            NonFiniteError: no scaler. On a GPU it is recorded.
        """
        if self._memory is not None and self._pending:
            self._memory.core.spoil(norm, self._owner is not None and self._owner.scaler() is not None)

    def enter_ownership(self, owner: Owner) -> None:
        self._leave()
        super().enter_ownership(owner)

    def leave_ownership(self) -> None:
        self._leave()
        super().leave_ownership()
        for part in self._parts():
            part.requires_grad_(False)

    @property
    def _width(self) -> int:
        return self.in_features + len(self._parts()) - 1

    @property
    def _pending(self) -> int:
        return 0 if self._memory is None else self._memory.core.pending()

    def _stored(self, name: str = "weight") -> Any:
        return self._parameters[name]

    def _parts(self) -> list[Any]:
        return [p for p in (self._stored(), self._stored("bias")) if p is not None]

    def _exact(self) -> ExactMemory:
        """The core's state over the parameters as they are; made anew, in a pass over all rows, where they changed."""
        parts = self._parts()
        if not all(isinstance(part, nn.Parameter) for part in parts):
            raise Error(
                "weight: an ExactHead works in its own parameters; functional_call with others is not supported"
            )
        if parts[0].is_meta:
            raise BackendError("weight is on the meta device: call to_empty(device=...) first")
        if parts[0].device.type != "cpu" and not on_gpu(parts[0]):
            raise BackendError(f"ExactHead: on the CPU and on CUDA, the weights are on {parts[0].device}")
        owner = self._owner
        velocities = [] if owner is None else owner.optimizer.velocities(owner)
        memory = self._memory
        if memory is not None:
            here = memory.lies_in(parts, velocities)
            if here and not memory.edited():
                return memory
            if memory.core.pending():
                raise Error(
                    "the weights, their velocities or the momentum were changed while a gradient waits for the "
                    "optimiser's step(): forget it with zero_grad(), and run the forward pass again"
                )
            memory.consolidate()
            if here and memory.refresh():
                return memory
            self._leave()
        with torch.inference_mode(False), torch.no_grad():
            if owner is not None:
                owner.optimizer.follow(owner)
                velocities = owner.optimizer.velocities(owner)
            if joined(parts) is None:
                for part, view in zip(parts, views(join(parts), len(parts)), strict=True):
                    part.data = view
            if velocities and joined(velocities) is None:
                velocities = views(join(velocities), len(velocities))
                assert owner is not None
                owner.optimizer.take_velocities(owner, velocities)
            for part in parts:
                part.requires_grad_(False)
            self._memory = ExactMemory(parts, velocities, self.options)
        return self._memory

    def _leave(self, lost: bool = False) -> None:
        """Lets go of the core's state, and of the gradient that waits; the parameters hold the weights.

        Args:
            lost: the weights do not matter any more.
        """
        memory, self._memory = self._memory, None
        if memory is None:
            return
        memory.retired = True
        try:
            memory.consolidate()
        except Error:
            if not lost:
                raise

    def _open(self, lost: bool = False) -> None:
        """Makes the parameters hold the weights, and forgets the gradient that waits, for the caller to write to them.
        lost: see `_leave`.
        """
        memory = self._memory
        if memory is None or not memory.refreshable:
            self._leave(lost)
            return
        memory.core.drop_pending()
        try:
            memory.consolidate()
        except Error:
            if not lost:
                raise

    def _close(self) -> None:
        """After `_open`: takes over what the parameters hold, where the core's state stays."""
        if self._memory is not None:
            self._memory.refresh()

    def _moments(self, rows: Tensor, goal: Goal) -> tuple[Tensor, Tensor, Tensor]:
        memory = self._exact()
        train = self._owner is not None and self.training and torch.is_grad_enabled()
        scaler = self._owner.scaler() if train and self._owner is not None else None
        if self._stored("bias") is not None:
            rows = nn.functional.pad(rows, (0, 1), value=1.0)
        return Statistics.apply(rows, self._anchor if train else None, Job(memory, goal, train, scaler))

    def _scale(self, goal: Goal, n: int, sample_weight: Tensor | None, batch: torch.Size) -> Tensor:
        """What each example's loss is multiplied by, `[B]`."""
        device = goal.indices.device
        scale = torch.ones(n, dtype=torch.float64, device=device) if goal.valid is None else goal.valid.double()
        if sample_weight is not None:
            check(
                sample_weight.shape == batch and sample_weight.is_floating_point(),
                f"sample_weight: expected a floating tensor of shape {list(batch)}, "
                f"got {sample_weight.dtype} {list(sample_weight.shape)}",
            )
            scale = scale * sample_weight.reshape(-1).double()
        if self.reduction != "mean":
            return scale
        total = scale.sum()
        return torch.where(total == 0, 0.0, scale / torch.where(total == 0, 1.0, total))

    def _topk_rows(
        self, rows: Tensor, k: int, exclude_indptr: Tensor | None, exclude_indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight, bias = self._layer()
        if self.loss in SOFTMAXES:
            return most_probable(self.loss, rows, weight, bias, k, exclude_indptr, exclude_indices)
        return ops.dense_topk(rows, weight, bias, 0.0, k, exclude_indptr, exclude_indices)

    def _score_rows(self, rows: Tensor, classes: Tensor | None) -> Tensor:
        return ops.dense_scores(rows, *self._layer(), 0.0, classes)

    def _lse_rows(self, rows: Tensor) -> Tensor:
        nobody = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
        layer = self._layer()
        return ops.dense_loss(
            rows, *layer, None, None, nobody, None, None, None, None, "softmax", 0.0, 0.0, 0.0, -1, 0.0
        )[2]

    def _layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, brought together."""
        bias = self.bias
        return self.weight.detach(), None if bias is None else bias.detach().contiguous()

    def _adopt(self, name: str, tensor: Tensor) -> None:
        self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.consolidate()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        self._open(lost=all(prefix + name in state_dict for name, p in self._parameters.items() if p is not None))
        super()._load_from_state_dict(state_dict, prefix, *more)
        self._close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Head:
        dtype = fn(self._stored().new_empty(0)).dtype
        if dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"weight: expected float32 or float64 weights of an exact head, got {dtype}")
        self._leave()
        super()._apply(fn, recurse)
        if self._anchor is not None and not self._stored().is_meta:
            self._anchor.data = self._anchor.data.to(self._stored().device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.consolidate()
        return {**super().__getstate__(), "_memory": None}

    def _config(self) -> dict[str, Any]:
        names = ("eps", "a", "b", "factors", "block_steps", "method", "max_kappa")
        return {**{name: getattr(self.options, name) for name in names}, "seed": self.seed}
