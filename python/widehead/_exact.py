"""widehead/_exact.py -- the NumPy face of the exact head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import as_batch, example_weights, stored
from ._core import DtypeError, NonFiniteError, ShapeError
from ._output import OutputHead
from ._results import ForwardResult, Reduction, StepResult, TopKResult
from .labels import Labels, Target, as_target, check_range
from .options import ExactOptions, choose

Double = NDArray[np.float64]


class Statistics:
    """One batch on its way from a loss of your own to a step; see `ExactHead.statistics`.

    Attributes:
        A: `[nnz]` outputs at the targets, in the order of the targets.
        q, s: `[B]` sum of the squares of all n_classes outputs, and their sum. All three float64.
        rows: `[nnz]` the example that each target belongs to.
        values: `[nnz]` the targets' values, 1 where they have none.
    """

    def __init__(self, head: ExactHead, hidden: NDArray, target: Target, train: bool) -> None:
        assert target.indptr is not None
        self._head, self._type, self._target = head, hidden.dtype, target
        self._hidden = head._with_bias(hidden)
        self.A = np.empty(len(target.indices))
        self.q, self.s = np.empty(len(hidden)), np.empty(len(hidden))
        self.rows = np.repeat(np.arange(len(hidden)), np.diff(target.indptr))
        ones = np.ones(len(self.A), np.float32)
        self.values = (ones if target.values is None else target.values).astype(np.float64)
        self._batch = head._exact.forward(
            hidden=self._hidden, **target.arguments(), train=train, A=self.A, q=self.q, s=self.s
        )

    def backward(self, grad_A: ArrayLike, grad_q: ArrayLike, grad_s: ArrayLike = 0.0) -> NDArray:
        """Adds this batch's gradient to what the next `apply` takes; returns the gradient to hidden, of hidden's type.

        Args:
            grad_A, grad_q, grad_s: derivatives of the loss by A, q and s; a number stands for all of them.

        Raises:
            ShapeError, NonFiniteError: a derivative that does not fit, or is NaN or infinite. Nothing has changed.
        """
        grads = {}
        for name, grad, like in (("grad_A", grad_A, self.A), ("grad_q", grad_q, self.q), ("grad_s", grad_s, self.s)):
            array = np.asarray(grad, np.float64)
            if array.shape not in (like.shape, ()):
                raise ShapeError(f"{name}: expected shape {list(like.shape)}, got {list(array.shape)}")
            grads[name] = np.ascontiguousarray(np.broadcast_to(array, like.shape))
        grad_hidden = np.empty(self._hidden.shape, self._hidden.dtype)
        self._head._exact.backward(self._batch, **grads, grad_hidden=grad_hidden)
        return np.ascontiguousarray(grad_hidden[:, : self._head.in_features]).view(self._type)

    def losses(self) -> tuple[Double, dict[str, Double]]:
        """The head's own loss `[B]` and its derivatives."""
        losses = np.empty_like(self.q)
        grads = {"grad_A": np.empty_like(self.A), "grad_q": np.empty_like(self.q), "grad_s": np.empty_like(self.s)}
        head = self._head
        arguments: dict[str, Any] = {**head.options.loss_arguments(), **self._target.arguments(), **grads}
        _core.spherical_loss(n_classes=head.n_classes, A=self.A, q=self.q, s=self.s, losses=losses, **arguments)
        return losses, grads


class ExactHead(OutputHead):
    """A full layer over all classes, trained by exact SGD at a cost that does not grow with their number.

    It takes losses of the spherical family, functions of the outputs A at the targets, of q = |o|^2 and of s = sum o,
    where o = W h are the outputs of all classes (Vincent, de Brebisson, Bouthillier, NIPS 2015, arXiv 1412.7091; arXiv
    1606.08061). W is kept as rows times small matrices: a step costs O(in_features^2 batch) and gives, up to rounding,
    the weights that dense SGD would give. Reading `weight`, and queries over all classes, bring the rows together
    first, in one pass over them.

    Args:
        in_features: size d of hidden; n_classes should be far above it.
        n_classes: number of classes D.
        loss: "squared_error": q - 2 sum y A + sum y^2, where y are the values of the labels (1 without) and all other
            classes want 0; "spherical_softmax": log(q + D eps) - log(A^2 + eps); "taylor_softmax":
            log(D + s + q / 2) - log(1 + A + A^2 / 2) (arXiv 1511.05042); "z_loss": softplus(a (b - z)) / a with
            z = (A - mean) / deviation of all outputs (arXiv 1604.08859). The last three are sums over the labels, times
            their values.
        eps: of spherical softmax, 0.01 if None. a, b: of the z-loss, 1 and 10 if None.
        factors: "float32" or "float64", the type of the small matrices and of the rows in work, and so of the products
            behind A, q and s: in float32 they lose digits where outputs are far smaller than |W| |h|. None: float64
            with spherical softmax, whose course is sensitive, and with float64 weights.
        method: "blocked": rows of targets are taken out for `block_steps` steps, and no inverse is needed; "woodbury":
            the update of the papers, which keeps an inverse and starts anew when its condition grows. The same weights.
        block_steps: for how many steps the rows of targets stay in work before they go back.
        max_kappa: of "woodbury", 4 if None: it starts anew before a singular value of its matrix passes this, or its
            inverse. More is faster and rounds worse.
        ignore_index, reduction, seed: see `DenseHead`.
        bias: whether classes have a bias: the weight of a feature that is always 1.
        dtype: "float32" or "float64", of the weights.

    Attributes:
        weight: `[n_classes, in_features]`. bias: `[n_classes]` or None. Reading them brings the rows together.

    Raises:
        ShapeError: an option out of its range.

    `hidden` and targets are those of `DenseHead`.
    """

    kind = "ExactHead"
    prefix = "dense"  # of the queries over all classes
    options: ExactOptions  # type: ignore[assignment]
    class_weight = None
    _negated = False  # queries with -hidden want -bias

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        *,
        loss: str = "squared_error",
        method: str = "blocked",
        eps: float | None = None,
        a: float | None = None,
        b: float | None = None,
        factors: str | None = None,
        block_steps: int = 4,
        max_kappa: float | None = None,
        ignore_index: int = -100,
        bias: bool = False,
        reduction: str = "mean",
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        self._configure(
            in_features,
            n_classes,
            loss=loss,
            method=method,
            eps=eps,
            a=a,
            b=b,
            factors=factors,
            block_steps=block_steps,
            max_kappa=max_kappa,
            ignore_index=ignore_index,
            reduction=reduction,
            bias=bias,
            dtype=dtype,
            seed=seed,
        )
        self.reset_parameters()

    def _configure(
        self,
        in_features: int,
        n_classes: int,
        *,
        bias: bool = False,
        dtype: str = "float32",
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.options = ExactOptions(**options)
        choose(dtype, ("float32", "float64"), "dtype")
        self._state: Any = None
        self._velocity: NDArray | None = None
        self._allocate(in_features, n_classes, bias, dtype, seed)

    def __repr__(self) -> str:
        return f"ExactHead({self.in_features}, {self.n_classes}, loss={self.options.loss!r}, dtype={self.dtype!r})"

    def reset_parameters(self) -> None:
        """Weights uniform in [-1, 1) / sqrt(in_features), the same for the same seed on every machine; biases 0."""
        self._leave()
        super().reset_parameters()

    def reset_optimizer(self) -> None:
        """Forgets the velocities of momentum."""
        self._leave()
        self._velocity = None
        super().reset_optimizer()

    @property
    def weight(self) -> NDArray:
        """`[n_classes, in_features]`, brought together; not a copy, and not to be written to: set it as a whole."""
        self.consolidate()
        return self._weight

    @weight.setter
    def weight(self, value: ArrayLike) -> None:
        array = stored(value, self._weight, "weight")
        self._leave()
        self._weight = array

    @property
    def bias(self) -> NDArray | None:
        """`[n_classes]`, likewise; None without bias."""
        self.consolidate()
        return self._bias

    @bias.setter
    def bias(self, value: ArrayLike | None) -> None:
        if (value is None) != (self._bias is None):
            raise ShapeError(f"bias: expected {'None' if self._bias is None else 'an array'}, as the head was made")
        if self._bias is not None and value is not None:
            array = stored(value, self._bias, "bias")
            self._leave()
            self._bias = array

    def consolidate(self) -> None:
        """Brings the rows together: afterwards the memory of `weight` holds the weights. One pass over all rows."""
        if self._state is not None:
            self._state.consolidate()

    def step(  # type: ignore[override]
        self,
        hidden: NDArray,
        target: ArrayLike | Labels | Any,
        lr: float,
        optimizer: str = "sgd",
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clip: float | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> StepResult:
        """Loss, gradient to hidden, and one exact step of SGD on all the weights.

        Args:
            hidden, target: a batch; single labels may be `ignore_index`.
            lr, optimizer, momentum, weight_decay, clip: see `apply`.
            sample_weight: weights of the examples, of the batch's shape.

        Raises:
            NonFiniteError, LabelError, ShapeError, DtypeError: before anything has changed.
        """
        if self._state is not None and self._state.pending():
            raise ShapeError(f"step: {self._state.pending()} examples wait for apply() or zero_grad()")
        rows, shape = as_batch(hidden, self.in_features)
        goal, reduction = self._goal(target, shape, sample_weight)
        self._check_step(lr, optimizer, momentum, weight_decay, clip)
        losses, grad_hidden = np.zeros(len(rows)), np.empty(rows.shape, rows.dtype)
        if len(rows):
            if optimizer == "momentum":
                self._want_velocity()
            batch = Statistics(self, rows, goal, train=True)
            losses, grads = batch.losses()
            scale = reduction.scale
            grad_hidden = batch.backward(
                grads["grad_A"] * scale[batch.rows], grads["grad_q"] * scale, grads["grad_s"] * scale
            )
            self.apply(lr, optimizer, momentum=momentum, weight_decay=weight_decay, clip=clip)
        loss = reduction(losses.astype(self._result), shape)
        return StepResult(loss, grad_hidden.view(np.asarray(hidden).dtype).reshape(np.shape(hidden)))

    def forward(
        self,
        hidden: NDArray,
        target: ArrayLike | Labels | Any,
        *,
        sample_weight: ArrayLike | None = None,
        return_lse: bool = False,
    ) -> ForwardResult:
        """Output and loss of a batch; nothing changes. `output`: sum of y A over an example's labels; with spherical
        and Taylor softmax their log-probability."""
        if return_lse:
            raise ShapeError(f"return_lse: expected False with loss={self.options.loss!r}, got True")
        rows, shape = as_batch(hidden, self.in_features)
        goal, reduction = self._goal(target, shape, sample_weight)
        batch = Statistics(self, rows, goal, train=False)
        losses, _ = batch.losses()
        if self.options.loss in ("spherical_softmax", "taylor_softmax"):
            output: NDArray[Any] = -losses
        else:
            output = np.bincount(batch.rows, batch.A * batch.values, minlength=len(rows))
        return ForwardResult(
            output.astype(self._result).reshape(shape), reduction(losses.astype(self._result), shape), None
        )

    def statistics(self, hidden: NDArray, target: ArrayLike | Labels | Any, *, momentum: bool = False) -> Statistics:
        """What any loss of the spherical family is a function of, for a loss of your own:

            batch = head.statistics(hidden, target)
            grad_hidden = batch.backward(grad_A=-2 * batch.values, grad_q=1.0)  # of q - 2 sum y A
            head.apply(lr=0.01)

        Several batches can go into one `apply`: their gradients add up. The rows of their targets are held apart until
        then; `forward` is for evaluation.

        Args:
            hidden: `[..., in_features]`; target: as in `step`.
            momentum: whether `apply` will be with momentum.
        """
        rows, shape = as_batch(hidden, self.in_features)
        goal, _ = self._goal(target, shape, None)
        if momentum:
            self._check_step(0.0, "momentum", 0.0, 0.0, None)
            self._want_velocity()
        return Statistics(self, rows, goal, train=True)

    def apply(
        self,
        lr: float,
        optimizer: str = "sgd",
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clip: float | None = None,
        column_scale: ArrayLike | None = None,
    ) -> None:
        """One step by the gradients that `backward` has gathered.

        Args:
            lr: step size.
            optimizer: "sgd", or "momentum": SGD with heavy-ball `momentum`. Both are torch.optim.SGD's, exactly; no
                method that keeps a number for each weight, as Adam does, can be.
            weight_decay: as in torch.optim.SGD.
            clip: the gradient of all the weights is scaled down to this norm, which is known exactly.
            column_scale: `[in_features]` (and one for the bias) factors of the gradient's columns, such as
                1 / (sqrt(running mean of `grad_columns()`) + eps): RMSprop by column.

        Raises:
            ShapeError, NonFiniteError: before anything has changed.
        """
        self._check_step(lr, optimizer, momentum, weight_decay, clip)
        scale = None if column_scale is None else self._checked_scale(column_scale)
        if optimizer == "momentum" and self._velocity is None:
            raise ShapeError("optimizer: 'momentum' wants statistics(..., momentum=True)")
        if clip is not None:
            norm = self.grad_norm()
            if norm > clip:
                self._exact.scale_grad(clip / norm)
        self._exact.step(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum if optimizer == "momentum" else 0.0,
            column_scale=scale,
        )
        self.steps += 1

    def zero_grad(self) -> None:
        """Forgets the gradients that `backward` has gathered."""
        if self._state is not None:
            self._state.zero_grad()

    def grad_norm(self) -> float:
        """The norm of the gradient of all the weights that has been gathered; exact, without any of its elements."""
        return float(np.sqrt(max(0.0, self._exact.grad_norm2())))

    def grad_columns(self) -> Double:
        """The mean square of each of that gradient's columns, `[in_features]`, with a bias one more."""
        out = np.empty(self.in_features + (self._bias is not None))
        self._exact.grad_columns(out)
        return out

    def rows(self, ids: ArrayLike) -> NDArray:
        """The weights of some classes `[n]` as they are now, `[n, in_features]`; the others stay as they lie."""
        wanted = np.ascontiguousarray(ids, np.int64).reshape(-1)
        out = np.empty((len(wanted), self.in_features + (self._bias is not None)), self._weight.dtype)
        self._exact.rows(wanted, out)
        return out[:, : self.in_features]

    def materialise(self, lo: int, hi: int) -> NDArray:
        """The weights of the classes lo .. hi - 1, `[hi - lo, in_features]`."""
        if not 0 <= lo <= hi <= self.n_classes:
            raise ShapeError(f"lo, hi: expected 0 <= lo <= hi <= {self.n_classes}, got {lo} and {hi}")
        return self.rows(np.arange(lo, hi))

    def diagnostics(self) -> dict[str, float]:
        """How the state is: steps, blocks, live matrices, rows in work, rows fetched and moved, the relative error of
        W'W on a probe (a pass over all rows), |W|^2."""
        return self._exact.diagnostics()

    def topk(
        self, hidden: NDArray, k: int, exclude: Labels | Iterable[Sequence[int]] | Any | None = None
    ) -> TopKResult:
        """The k best classes; see `DenseHead.topk`. Spherical and Taylor softmax: the most probable ones, whose outputs
        are the largest or the smallest, as probabilities grow with |o| and |o + 1|. Scores are the outputs."""
        least = {"spherical_softmax": 0.0, "taylor_softmax": -1.0}.get(self.options.loss)
        high = super().topk(hidden, k, exclude)
        if least is None:
            return high
        self._negated = True
        try:
            rows = np.asarray(hidden)
            low = super().topk(rows ^ np.uint16(0x8000) if rows.dtype == np.uint16 else -rows, k, exclude)
        finally:
            self._negated = False
        scores = np.concatenate([high.scores, -low.scores], -1)
        classes = np.concatenate([high.classes, low.classes], -1)
        # Each class from one of the two lists only; the rest goes to the end.
        ours = ((scores >= least) == (np.arange(2 * k) < k)) & (classes >= 0) & ~np.isnan(scores)
        rank = np.where(ours, np.abs(scores - least), -np.inf)
        order = np.lexsort((classes, -rank), axis=-1)[..., :k]
        found = np.take_along_axis(rank, order, -1) >= 0
        scores, classes = np.take_along_axis(scores, order, -1), np.take_along_axis(classes, order, -1)
        return TopKResult(np.where(found, scores, -np.inf), np.where(found, classes, -1))

    def log_prob(self, hidden: NDArray, classes: ArrayLike | None = None) -> NDArray:
        """Log-probabilities as in `DenseHead.log_prob`, of spherical or Taylor softmax."""
        o = self.options.loss_arguments()
        if o["loss"] not in ("spherical_softmax", "taylor_softmax"):
            raise ShapeError(f"log_prob: expected spherical_softmax or taylor_softmax, this head has {o['loss']}")
        rows, shape = as_batch(hidden, self.in_features)
        nobody = Target(np.zeros(len(rows) + 1, np.int64), np.zeros(0, np.int64), None)
        batch = Statistics(self, rows, nobody, train=False)
        z, n = self.scores(hidden, classes), self.n_classes
        if o["loss"] == "spherical_softmax":
            norm, own = batch.q + n * o["eps"], z * z + o["eps"]
        else:
            norm, own = n + batch.s + batch.q / 2, 1 + z + z * z / 2
        return np.log(own) - np.log(norm).reshape(*shape, 1).astype(z.dtype)

    def lse(self, hidden: NDArray) -> NDArray:
        raise ShapeError("lse: the losses of an exact head have no log-sum-exp; see log_prob")

    def grow(self, n_classes: int) -> None:
        """Adds classes at the end, up to `n_classes`, with the weights of a head made with so many classes."""
        self._leave()
        old = self._velocity
        self._grow(n_classes)
        if old is not None:
            self._velocity = np.concatenate([old, np.zeros((n_classes - len(old), old.shape[1]), old.dtype)])

    def state_dict(self) -> dict[str, NDArray]:
        """The parameters by name, brought together, not copied."""
        self.consolidate()
        return super().state_dict()

    def load_state_dict(self, state: dict[str, ArrayLike]) -> None:
        """Sets the parameters from arrays of the same shapes; velocities are forgotten."""
        super().load_state_dict(state)

    @property
    def _exact(self) -> Any:
        """The core's state; made when it is wanted, as W'W costs a pass over all rows."""
        if self._state is None:
            memory = self._weight
            if self._bias is not None:
                memory = np.concatenate([self._weight, self._bias[:, None]], axis=1)
                self._weight, self._bias = memory[:, : self.in_features], memory[:, self.in_features]
            self._state = _core.ExactState(memory, self._velocity, **self.options.method_arguments())
        return self._state

    def _leave(self) -> None:
        """Lets go of the core's state; the arrays hold the weights."""
        if self._state is None:
            return
        self._state.consolidate()
        self._state = None
        self._weight = np.ascontiguousarray(self._weight)
        self._bias = None if self._bias is None else np.ascontiguousarray(self._bias)

    def _want_velocity(self) -> None:
        if self._velocity is not None:
            return
        if self._exact.pending():
            raise ShapeError(
                "momentum: gradients wait that were gathered without it; call apply() or zero_grad() first"
            )
        self._leave()
        columns = self.in_features + (self._bias is not None)
        self._velocity = np.zeros((self.n_classes, columns), self._weight.dtype)

    def _with_bias(self, hidden: NDArray) -> NDArray:
        if self._bias is None:
            return hidden
        one = np.uint16(0x3F80) if hidden.dtype == np.uint16 else hidden.dtype.type(1)
        return np.concatenate([hidden, np.full((len(hidden), 1), one)], axis=1)

    def _goal(
        self, target: ArrayLike | Labels | Any, shape: tuple[int, ...], sample_weight: ArrayLike | None
    ) -> tuple[Target, Reduction]:
        """Rows of labels, empty where there is none, and what the examples count."""
        goal, o = as_target(target, shape, self.n_classes), self.options
        weight = example_weights(sample_weight, shape)
        reduction = Reduction(o.reduction, goal, self.n_classes, o.ignore_index, weight, None)
        if goal.indptr is not None:
            return goal, reduction
        check_range(goal.indices, self.n_classes, "target", o.ignore_index)
        known = goal.indices != o.ignore_index
        indptr = np.concatenate([[0], np.cumsum(known)]).astype(np.int64)
        return Target(indptr, goal.indices[known], None), reduction

    def _check_step(self, lr: float, optimizer: str, momentum: float, weight_decay: float, clip: float | None) -> None:
        methods = ("sgd", "momentum") if self.options.method == "blocked" else ("sgd",)
        choose(optimizer, methods, "optimizer")
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("clip", clip)):
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise ShapeError(f"{name}: expected a finite number of at least 0, got {value!r}")

    def _checked_scale(self, column_scale: ArrayLike) -> Double:
        scale, want = np.ascontiguousarray(column_scale, np.float64), self.in_features + (self._bias is not None)
        if scale.shape != (want,):
            raise ShapeError(f"column_scale: expected shape [{want}], got {list(scale.shape)}")
        if not np.isfinite(scale).all():
            raise NonFiniteError("column_scale: expected finite numbers, got NaN or infinity")
        return scale

    def _query(self, hidden: NDArray) -> dict[str, Any]:
        self.consolidate()
        bias = None if self._bias is None else np.ascontiguousarray(-self._bias if self._negated else self._bias)
        return {"hidden": hidden, "weight": self._weight, "bias": bias, "softcap": 0.0}

    def _tensors(self) -> dict[str, NDArray]:
        self.consolidate()
        tensors = {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})
        return {name: np.ascontiguousarray(array) for name, array in tensors.items()} if self._state else tensors

    def _options_from_file(self, config: dict[str, Any], tensors: dict[str, NDArray]) -> dict[str, Any]:
        return config

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

    def save(self, path: Any, *, optimizer: bool = False) -> None:
        """Writes the head, brought together, to a safetensors file; see `DenseHead.save`. Velocities are not kept."""
        if optimizer:
            raise DtypeError("optimizer: expected False; the velocities of an exact head are not written")
        super().save(path)
