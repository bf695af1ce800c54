"""widehead/plan.py -- what a head costs before it is built: memory, arithmetic, traffic and time of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ._core import ShapeError
from .machine import Machine

DTYPES = {"float32": 4, "bfloat16": 2}
LOSSES = ("softmax", "sampled_softmax", "bce", "squared_hinge")
# Bytes of optimiser state: (per weight, per row of weights) in fused training, moments in float32.
OPTIMIZERS = {"sgd": (0, 0), "momentum": (4, 0), "adagrad": (0, 4), "adam": (8, 0)}
_CPU_SCRATCH = 32 << 20  # packed tiles, partial sums and buffers of the threads


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        n_classes, in_features, batch: D, d and B.
        dtype: of the weights, "float32" or "bfloat16".
        loss: "softmax", "sampled_softmax", "bce" or "squared_hinge".
        optimizer: "sgd", "momentum", "adagrad" or "adam".
        negatives: classes that sampled softmax draws for a batch.
        labels: mean number of labels an example.
        intermediate, fan_in, group_size: H, K and G of a sparse head, which takes a wide layer in place of d features.

    Raises:
        ShapeError: a number below 1, or a name that is not known.
    """

    n_classes: int
    in_features: int
    batch: int
    dtype: str = "float32"
    loss: str = "softmax"
    optimizer: str = "adagrad"
    negatives: int = 512
    labels: float = 1.0
    intermediate: int = 16384
    fan_in: int = 32
    group_size: int = 1

    def __post_init__(self) -> None:
        for name in ("n_classes", "in_features", "batch", "negatives", "intermediate", "fan_in", "group_size"):
            if getattr(self, name) < 1:
                raise ShapeError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.fan_in > self.intermediate:
            raise ShapeError(f"fan_in: expected at most {self.intermediate}, as intermediate is, got {self.fan_in}")
        for name, known in (("dtype", DTYPES), ("loss", LOSSES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ShapeError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Term:
    """A line of the arithmetic: what is counted, how, and what comes out (bytes or operations)."""

    what: str
    formula: str
    value: float


@dataclass(frozen=True)
class Plan:
    """The cost of one way to train the job.

    Attributes:
        head, loss: the head and its loss.
        exact: the gradient is that of the loss over all classes.
        ours: False for the ordinary layer that everything is compared with.
        memory: bytes that stay between steps and bytes of a step, term by term.
        flops: floating-point operations of products in a step, forward, backward and update.
        traffic: bytes of memory read and written in a step.
        exponentials: evaluations of the loss's function in a step.
        rate_dtype: whose product rate counts.
        fused: arithmetic and traffic overlap; they come one after the other where every operation stores its result.
        gathers: bytes in a step of rows of hidden that are read or written at random places, mostly of a cache.
        substitute: another model than a full layer, and so another quality: taken where nothing else fits.
    """

    head: str
    loss: str
    exact: bool
    memory: list[Term]
    flops: list[Term]
    traffic: list[Term]
    exponentials: float
    rate_dtype: str
    ours: bool = True
    fused: bool = True
    gathers: float = 0.0
    substitute: bool = False
    note: str = ""

    @property
    def peak(self) -> float:
        """Bytes at the peak of a step."""
        return sum(term.value for term in self.memory)

    def seconds(self, machine: Machine) -> float:
        """Time of a step: the arithmetic or the traffic, whichever takes longer, or both where nothing is fused."""
        arithmetic = sum(t.value for t in self.flops) / machine.flops[self.rate_dtype]
        arithmetic += self.exponentials / machine.exponentials + self.gathers / machine.gather_rate
        traffic = sum(t.value for t in self.traffic) / machine.bandwidth
        return max(arithmetic, traffic) if self.fused else arithmetic + traffic

    def as_dict(self, machine: Machine, batch: int) -> dict[str, object]:
        """All of it as plain values for JSON; bytes, seconds, examples a second."""
        seconds = self.seconds(machine)
        return {
            "head": self.head,
            "loss": self.loss,
            "exact": self.exact,
            "peak_bytes": self.peak,
            "flops": sum(t.value for t in self.flops),
            "traffic_bytes": sum(t.value for t in self.traffic),
            "exponentials": self.exponentials,
            "gathered_bytes": self.gathers,
            "seconds_per_step": seconds,
            "examples_per_second": batch / seconds,
            "fits": self.peak <= machine.memory,
            "terms": {
                kind: [vars(term) for term in terms]
                for kind, terms in (("memory", self.memory), ("flops", self.flops), ("traffic", self.traffic))
            },
            "note": self.note,
        }


Planner = Callable[[Job], Iterable[Plan]]
_PLANNERS: dict[str, Planner] = {}


def register(name: str) -> Callable[[Planner], Planner]:
    """Decorator: the function that gives the plans of the head `name`, in the order of the table."""

    def keep(planner: Planner) -> Planner:
        _PLANNERS[name] = planner
        return planner

    return keep


def plans(job: Job) -> list[Plan]:
    """The plans of every registered head for a job, the ordinary layer first."""
    return [plan for planner in _PLANNERS.values() for plan in planner(job)]


@dataclass
class _Layer:
    """The parts that every plan of one job shares, with their formulas."""

    job: Job
    weights: float = field(init=False)

    def __post_init__(self) -> None:
        self.weights = float(self.job.n_classes) * self.job.in_features * DTYPES[self.job.dtype]

    def parameters(self) -> list[Term]:
        job = self.job
        per_weight, per_row = OPTIMIZERS[job.optimizer]
        terms = [
            Term("weights", f"D d {DTYPES[job.dtype]} B", self.weights),
            Term("bias", "D 4 B", 4.0 * job.n_classes),
        ]
        state = job.n_classes * (per_weight * (job.in_features + 1.0) + (2.0 * per_row))
        if state:
            formula = f"D (d + 1) {per_weight} B" if per_weight else f"2 D {per_row} B"
            terms.append(Term(f"state of {job.optimizer}", formula, state))
        return terms

    def state_traffic(self, rows: float) -> float:
        """Bytes read and written for the optimiser's state of some rows."""
        per_weight, per_row = OPTIMIZERS[self.job.optimizer]
        return 2.0 * rows * (per_weight * self.job.in_features + per_row)


@register("linear")
def plan_linear(job: Job) -> list[Plan]:
    """torch's `nn.Linear`, its loss function and optimiser: logits and all gradients are stored."""
    layer, size = _Layer(job), DTYPES[job.dtype]
    logits = float(job.batch) * job.n_classes
    product = 2.0 * logits * job.in_features
    loss = "softmax" if job.loss == "sampled_softmax" else job.loss
    return [
        Plan(
            head="nn.Linear",
            loss=loss,
            exact=True,
            ours=False,
            fused=False,
            memory=[
                *layer.parameters(),
                Term("gradient of weights", f"D d {size} B", layer.weights),
                Term("logits, probabilities, their gradient", f"3 B D {size} B", 3 * logits * size),
            ],
            flops=[Term("logits, dH, dW", "3 x 2 B D d", 3 * product)],
            traffic=[
                Term("weights: forward, backward, update", f"4 D d {size} B", 4 * layer.weights),
                Term("gradient: written, read", f"2 D d {size} B", 2 * layer.weights),
                Term("optimiser state", "read and written", layer.state_traffic(job.n_classes)),
                Term("logits: six passes", f"6 B D {size} B", 6 * logits * size),
            ],
            exponentials=2 * logits,
            rate_dtype=job.dtype,
            note="torch, for comparison",
        )
    ]


@register("dense")
def plan_dense(job: Job) -> list[Plan]:
    """DenseHead, fused: exact over all classes, and on sampled ones."""
    losses = ("softmax", "sampled_softmax") if job.loss in ("softmax", "sampled_softmax") else (job.loss,)
    return [_dense_sampled(job) if loss == "sampled_softmax" else _dense_exact(job, loss) for loss in losses]


def _dense_exact(job: Job, loss: str) -> Plan:
    layer, size = _Layer(job), DTYPES[job.dtype]
    pairs = float(job.batch) * job.n_classes
    product = 2.0 * pairs * job.in_features
    hidden = 4.0 * job.batch * job.in_features
    # Softmax needs its normaliser before any gradient: one pass for it and one that recomputes the logits.
    passes = 2 if loss == "softmax" else 1
    return Plan(
        head="DenseHead",
        loss=loss,
        exact=True,
        memory=[
            *layer.parameters(),
            Term("hidden, its gradient, packed copies", "4 B d 4 B", 4 * hidden),
            Term("tiles and partial sums", "fixed", _CPU_SCRATCH),
        ],
        flops=[
            Term("logits" + (", twice" if passes == 2 else ""), f"{passes} x 2 B D d", passes * product),
            Term("dH and dW", "2 x 2 B D d", 2 * product),
        ],
        traffic=[
            Term("weights: read, and updated in cache", f"{passes + 1} D d {size} B", (passes + 1) * layer.weights),
            Term("optimiser state", "read and written", layer.state_traffic(job.n_classes)),
        ],
        exponentials=passes * pairs,
        rate_dtype=job.dtype,
    )


def _dense_sampled(job: Job) -> Plan:
    layer, size = _Layer(job), DTYPES[job.dtype]
    rows = min(float(job.n_classes), job.negatives + job.batch * job.labels)
    product = 2.0 * job.batch * rows * job.in_features
    gathered = rows * job.in_features * (size + 4.0)
    return Plan(
        head="DenseHead",
        loss="sampled_softmax",
        exact=False,
        memory=[
            *layer.parameters(),
            Term("rows of the sampled classes, their gradient", f"S d {size + 4} B", gathered),
            Term("hidden, its gradient, packed copies", "4 B d 4 B", 16.0 * job.batch * job.in_features),
            Term("tiles and partial sums", "fixed", _CPU_SCRATCH),
        ],
        flops=[
            Term("logits, twice", "2 x 2 B S d", 2 * product),
            Term("dH and dW", "2 x 2 B S d", 2 * product),
        ],
        traffic=[
            Term(f"rows: gathered and updated, S = {rows:.0f}", f"3 S d {size} B", 3 * rows * job.in_features * size),
            Term("their gradient", "4 S d 4 B", 16.0 * rows * job.in_features),
            Term("optimiser state", "read and written", layer.state_traffic(rows)),
        ],
        exponentials=2.0 * job.batch * rows,
        rate_dtype=job.dtype,
        note=f"{job.negatives} negatives a batch stand for all classes",
    )


@register("sparse")
def plan_sparse(job: Job) -> list[Plan]:
    """SparseHead over a wide ReLU layer: K inputs a class."""
    loss = job.loss if job.loss in ("bce", "squared_hinge") else "squared_hinge"
    size, classes, k = DTYPES[job.dtype], float(job.n_classes), job.fan_in
    per_weight, per_row = OPTIMIZERS[job.optimizer]
    number = 2 if job.intermediate <= 65536 else 4
    weights, index = classes * k * size, math.ceil(classes / job.group_size) * k * number
    state = classes * (per_weight * (k + 1.0) + 2.0 * per_row)
    hidden = 4.0 * job.batch * job.intermediate
    pairs = job.batch * classes
    memory = [
        Term("weights", f"D K {size} B", weights),
        Term("inputs of the classes", f"D / G K {number} B", index),
        Term("bias", "D 4 B", 4.0 * classes),
        *([Term(f"state of {job.optimizer}", "a weight, a row and their biases", state)] if state else []),
        Term("hidden, its gradient, packed copies", "4 B H 4 B", 4 * hidden),
        Term("tiles and partial sums", "fixed", _CPU_SCRATCH),
    ]
    return [
        Plan(
            head="SparseHead",
            loss=loss,
            exact=True,
            memory=memory,
            flops=[Term("logits, dH, dW", "3 x 2 B D K", 6 * pairs * k)],
            traffic=[
                Term("weights: read, and updated in cache", f"2 D K {size} B", 2 * weights),
                Term("inputs of the classes", "read", index),
                Term("optimiser state", "read and written", 2 * classes * (per_weight * k + per_row)),
            ],
            exponentials=pairs,
            rate_dtype=job.dtype,
            gathers=4 * pairs * k * 4 / job.group_size,
            substitute=True,
            note=f"K = {k} inputs of a ReLU layer of H = {job.intermediate}, G = {job.group_size}: another model",
        )
    ]


# Measured: row-by-matrix products a target, to fetch it and when matrices are merged, of classes drawn evenly; matrices
# of the log that are alive after many steps.
_EXACT_ROW_PRODUCTS, _EXACT_MATRICES, _EXACT_BLOCK = 4.2, 30, 4


@register("exact")
def plan_exact(job: Job) -> list[Plan]:
    """ExactHead with squared error, float32 weights and factors: SGD, or with momentum."""
    classes, d, b = float(job.n_classes), job.in_features, float(job.batch)
    width = d * (2 if job.optimizer == "momentum" else 1)
    rows = min(classes, b * job.labels)
    hot = min(classes, rows * (_EXACT_BLOCK + 1) / 2)
    weights = classes * d * 4
    return [
        Plan(
            head="ExactHead",
            loss="squared_error",
            exact=True,
            memory=[
                Term("weights", "D d 4 B", weights),
                *([Term("velocities", "D d 4 B", weights)] if width > d else []),
                Term("marks of the rows", "D 4 B", 4 * classes),
                Term("W'W and its change, the block's matrix", "w^2 20 B", 20.0 * width * width),
                Term("matrices of the log", f"{_EXACT_MATRICES} w^2 4 B", 4.0 * _EXACT_MATRICES * width * width),
                Term("rows of targets, batch and its products", "S w 20 B + B w 40 B", width * (20 * hot + 40 * b)),
                Term("tiles and partial sums", "fixed", _CPU_SCRATCH),
            ],
            flops=[
                Term("q, and W'W", "2 B (d w + w^2)", 2 * b * (d + width) * width),
                Term("S'S", "2 B^2 (d + w)", 2 * b * b * (d + width)),
                Term("the block's matrix", "2 B (d w + w^2)", 2 * b * (d + width) * width),
                Term("rows of targets", "2 B S (d + w)", 2 * b * hot * (d + width)),
                Term("their fetching", f"{_EXACT_ROW_PRODUCTS} x 2 S w^2", 2 * _EXACT_ROW_PRODUCTS * rows * width**2),
                Term("products of the log", "2 w^3", 2.0 * width**3),
            ],
            traffic=[
                Term("rows of targets", "read and written, and again when merged", 16 * rows * width),
                Term("W'W and matrices", "w^2 40 B", 40.0 * width * width),
            ],
            exponentials=0.0,
            rate_dtype="float32",
            substitute=True,
            note="exact SGD on all classes, but of squared error: another loss"
            + ("" if job.optimizer in ("sgd", "momentum") else "; by sgd"),
        )
    ]


@dataclass(frozen=True)
class Advice:
    """What to take, and why; `plan` is None where nothing fits."""

    plan: Plan | None
    reason: str


# An approximation has to pay: it is taken only where it saves this factor, and only above this time of an exact step.
_WORTH = 4.0
_QUICK = 0.1


def recommend(candidates: Iterable[Plan], machine: Machine) -> Advice:
    """The head to take: the fastest exact one that fits, unless an approximate one saves a step of over 0.1 s more than
    three quarters of its time; another model only where none of the full ones fits."""
    ours = [plan for plan in candidates if plan.ours]
    fitting = [plan for plan in ours if plan.peak <= machine.memory]

    def seconds(plan: Plan) -> float:
        return plan.seconds(machine)

    full = [plan for plan in ours if not plan.substitute] or ours
    least = min(full, key=lambda plan: plan.peak)
    needs = f"{least.head} with {least.loss} needs {human_bytes(least.peak)}, {human_bytes(machine.memory)} are free"
    if not fitting:
        return Advice(None, f"nothing fits: {needs}; take fewer features, bfloat16 weights, or sgd or adagrad")
    if all(plan.substitute for plan in fitting):
        other = min(fitting, key=seconds)
        return Advice(
            other,
            f"{needs}; this takes {human_bytes(other.peak)} and {human_seconds(seconds(other))} a step. It is another "
            "model: compare the quality on a part of the classes",
        )
    fitting = [plan for plan in fitting if not plan.substitute]
    exact = min((plan for plan in fitting if plan.exact), key=seconds, default=None)
    sampled = min((plan for plan in fitting if not plan.exact), key=seconds, default=None)
    if exact is None or sampled is None:
        best = exact or sampled
        assert best is not None
        return Advice(best, f"the fastest that fits: {human_seconds(seconds(best))} a step")
    gain = seconds(exact) / seconds(sampled)
    if gain >= _WORTH and seconds(exact) > _QUICK:
        return Advice(
            sampled,
            f"{gain:.0f} times faster than the exact {exact.loss}, which takes {human_seconds(seconds(exact))} a step; "
            "it approximates the loss, so compare the quality on a part of the data",
        )
    return Advice(exact, f"exact, and at {human_seconds(seconds(exact))} a step fast enough")


def human_bytes(value: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def human_seconds(value: float) -> str:
    """0.0123 -> "12.3 ms"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def human_count(value: float) -> str:
    """1234567 -> "1.23 M"."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"
