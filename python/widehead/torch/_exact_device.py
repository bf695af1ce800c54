"""_exact_device.py -- the core of an exact head on a GPU, over tensors: nothing waits, and bad values refuse the step.

A batch keeps in its own memory what the core wants of it between forward pass and step. The core steps by one batch; if
several wait, they are joined to one, in a second forward pass.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from widehead import _core
from widehead._core import BackendError, Error, ShapeError
from widehead.options import ExactOptions

from . import _device
from ._device import NUMBERS, aligned, capsule, faults_of, gpu_of
from ._exact_goal import Goal
from ._exact_host import HALVES
from ._glue import rows, scale_on

if TYPE_CHECKING:
    from .exact_ops import Job

NAMES = ("grad_A", "grad_q", "grad_s")
NUMBERS_OF_STATE = ("steps_in_log", "steps", "matrices", "fetched", "row_products", "weight_norm2")
CHUNK = 1 << 16


class DeviceBatch:
    """One batch in the core.

    Attributes:
        memory: what the core keeps of it. refused: int32 `[1]`, 1 once a bad value was met.
        hidden, goal: copies of its own, to join it with others; None where it does not train.
        pieces: the derivatives by A, q and s that wait for a step, or None. loaded: `memory` has these very ones.
        quiet: under a GradScaler, to which an overflow is nothing to complain of.
        captured: they were written in the capture of a CUDA graph.
    """

    def __init__(self, memory: Tensor, examples: int, targets: int, quiet: bool) -> None:
        self.memory, self.examples, self.targets, self.quiet = memory, examples, targets, quiet
        self.refused = torch.zeros(1, dtype=torch.int32, device=memory.device)
        self.hidden: Tensor | None = None
        self.goal: Goal | None = None
        self.pieces: list[Tensor] | None = None
        self.loaded = self.captured = False

    def counts(self) -> dict[str, Any]:
        return {"batch": self.memory, "examples": self.examples, "targets": self.targets}


class DeviceCore:
    """The functions of the core over a state in memory of torch's; methods as `HostCore` has them.

    Attributes:
        spoilt: 0-d bool on the device, or None: as of `HostCore`.
        time: changes with every step, and when somebody has written to the rows.
    """

    def __init__(self, weight: Tensor, velocity: Tensor | None, options: ExactOptions) -> None:
        if options.method != "blocked":
            raise BackendError(
                f"method: expected 'blocked' on {weight.device}, got {options.method!r}, for the CPU only"
            )
        self._weight, self.device = weight, weight.device
        if _device.capturing(self.device):
            raise BackendError(
                "the weights, velocities or options of an exact head are new to it inside the capture of a CUDA graph; "
                "run one step before it"
            )
        self._head: dict[str, Any] = {"weight": weight, "velocity": velocity, "wide": options.wide()}
        bytes_ = self._call(_core.exact_state_bytes)
        self._head["state"] = aligned(bytes_ // 8, self.device).zero_()
        self._waiting: list[DeviceBatch] = []
        self._joined: DeviceBatch | None = None
        self.spoilt: Tensor | None = None
        self.time = self._new_at = 0
        self._call(_core.exact_init)

    def _call(
        self, function: Any, refused: Tensor | None = None, faults: Tensor | None = None, **arguments: Any
    ) -> Any:
        given = {**self._head, **arguments}
        if function in (_core.exact_state_bytes, _core.exact_batch_bytes):
            given.pop("state", None)
        ready = {name: capsule(v) if isinstance(v, Tensor) else v for name, v in given.items()}
        return function(**ready, gpu=gpu_of(self._weight, refused, faults))

    def _record(self, quiet: bool) -> Tensor | None:
        return torch.zeros(NUMBERS, dtype=torch.int64, device=self.device) if quiet else None

    def _report(self, record: Tensor | None) -> None:
        if record is not None:
            faults_of(self.device).add(record, unless=_core.NON_FINITE)

    def _make(self, examples: int, targets: int, quiet: bool) -> DeviceBatch:
        size = self._call(_core.exact_batch_bytes, examples=examples, targets=targets)
        return DeviceBatch(aligned(size // 8, self.device), examples, targets, quiet)

    def _forward(
        self, batch: DeviceBatch, record: Tensor | None, hidden: Tensor, goal: Goal, **outputs: Tensor
    ) -> None:
        labels = goal.capsules(values=False)
        self._call(
            _core.exact_forward, batch.refused, record, batch=batch.memory, hidden=rows(hidden), **labels, **outputs
        )

    def forward(self, job: Job, hidden: Tensor, A: Tensor, q: Tensor, s: Tensor) -> DeviceBatch:
        job.time = self.time
        batch = self._make(len(hidden), len(job.goal.indices), job.scaler is not None)
        record = self._record(batch.quiet)
        self._forward(batch, record, hidden, job.goal, A=A, q=q, s=s)
        self._report(record)
        if job.train:
            # The caller may write to his own before the step.
            batch.hidden, batch.goal = hidden.clone(), job.goal.own_classes()
        return batch

    def backward(self, job: Job, grads: dict[str, Tensor], grad_hidden: Tensor | None) -> Tensor:
        batch: DeviceBatch = job.batch
        if job.train and job.time < self._new_at:
            raise Error("the head's weights were written to since this batch's forward pass")
        if job.train and job.time < self.time:
            raise Error("backward: the weights have taken a step since this batch's forward pass")
        scale = None if job.scaler is None else scale_on(job.scaler, self.device)
        if scale is None:
            pieces = [grads[name].clone(memory_format=torch.contiguous_format) for name in NAMES]
        else:
            inverse = scale.double().reciprocal()
            pieces = [grads[name] * inverse for name in NAMES]
        wide = grad_hidden
        if scale is not None and grad_hidden is not None and grad_hidden.dtype in HALVES:
            wide = torch.empty_like(grad_hidden, dtype=torch.float32)
        record = self._record(batch.quiet or not job.train)
        self._load(batch, pieces, record, wide)
        self._report(record)
        if grad_hidden is not None and wide is not None:
            if scale is not None:
                grad_hidden.copy_(wide.mul_(scale))
                batch.refused.bitwise_or_((~torch.isfinite(grad_hidden).all()).to(torch.int32))
            # As a fused head's: a backbone without a scaler is not to take what the head refuses.
            blank = 0.0 if job.train and scale is None else torch.nan
            grad_hidden.masked_fill_(batch.refused != 0, blank)
        if job.train:
            self._append(batch, pieces)
        if scale is None:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        return torch.where(batch.refused[0] != 0, torch.inf, 0.0).to(torch.float32)

    def _load(
        self, batch: DeviceBatch, pieces: list[Tensor], record: Tensor | None, grad_hidden: Tensor | None = None
    ) -> None:
        """Puts the pieces in the place of those that the batch's memory has."""
        given = dict(zip(NAMES, pieces, strict=True))
        self._call(_core.exact_backward, batch.refused, record, batch=batch.memory, **given, grad_hidden=grad_hidden)
        batch.loaded = False

    def _append(self, batch: DeviceBatch, pieces: list[Tensor]) -> None:
        self._joined = None
        batch.captured = _device.capturing(self.device)
        if batch.pieces is None:
            batch.pieces, batch.loaded = pieces, True
            self._waiting.append(batch)
        else:  # the same graph again
            batch.pieces = [old + new for old, new in zip(batch.pieces, pieces, strict=True)]

    def _ready(self) -> DeviceBatch:
        """One batch whose memory has the whole gradient that waits."""
        if len(self._waiting) == 1:
            batch = self._waiting[0]
        else:
            batch = self._joined = self._joined or self._join()
        if not batch.loaded:
            assert batch.pieces is not None
            record = self._record(batch.quiet)
            self._load(batch, batch.pieces, record)
            batch.loaded = True
        return batch

    def _join(self) -> DeviceBatch:
        """All that wait as the rows of one batch, those without a target last in its list of targets."""
        hidden: list[Tensor] = []
        indices: list[Tensor] = []
        owners: list[Tensor] = []
        first, total = 0, sum(batch.examples for batch in self._waiting)
        for batch in self._waiting:
            assert batch.hidden is not None and batch.goal is not None
            owner = batch.goal.owners(batch.examples)
            owners.append(torch.where(owner < batch.examples, owner + first, total))
            hidden.append(batch.hidden.to(self._weight.dtype))
            indices.append(batch.goal.indices)
            first += batch.examples
        owner, order = torch.cat(owners).sort(stable=True)
        indptr = torch.searchsorted(owner, torch.arange(total + 1, device=self.device))
        goal = Goal(indptr, torch.cat(indices)[order])
        joined = self._make(total, len(owner), any(batch.quiet for batch in self._waiting))
        joined.refused = torch.stack([batch.refused for batch in self._waiting]).amax(0)
        outputs = [torch.empty(n, dtype=torch.float64, device=self.device) for n in (len(owner), total, total)]
        # What is bad has been recorded when it came.
        self._forward(joined, self._record(True), torch.cat(hidden), goal, **dict(zip("Aqs", outputs, strict=True)))
        pieces = [torch.cat(each) for each in zip(*(batch.pieces or [] for batch in self._waiting), strict=True)]
        joined.pieces = [pieces[0][order], *pieces[1:]]
        return joined

    def step(
        self,
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        device_lr: Tensor | None = None,
        column_scale: Tensor | None = None,
        refused: Tensor | None = None,
    ) -> Tensor:
        """Takes the step, unless `refused` (0-d bool) or what waits refuses it: 0-d int64, whether it counts."""
        if not _device.capturing(self.device) and any(batch.captured for batch in self._waiting):
            raise Error(
                "step: the backward pass of this gradient was captured in a CUDA graph, whose replays leave nothing to "
                "an optimiser outside of it: capture its step() too"
            )
        batch = self._ready()
        flag = batch.refused.clone()
        for sign in (refused, self.spoilt):
            if sign is not None:
                flag.bitwise_or_(sign.to(device=self.device, dtype=torch.int32, non_blocking=True))
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "device_lr": device_lr}
        self._call(_core.exact_step, flag, **batch.counts(), **options, column_scale=column_scale)
        self.time += 1
        self.drop_pending()
        return (1 - flag[0]).to(torch.int64)

    def pending(self) -> int:
        return sum(batch.examples for batch in self._waiting)

    def _refused(self, batch: DeviceBatch) -> Tensor:
        bad = batch.refused[0] != 0
        return bad if self.spoilt is None else bad | self.spoilt

    def grad_norm(self) -> Tensor:
        if not self._waiting:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        batch, norm2 = self._ready(), torch.empty(1, dtype=torch.float64, device=self.device)
        self._call(_core.exact_gradient, **batch.counts(), norm2=norm2)
        return torch.where(self._refused(batch), torch.inf, norm2[0]).sqrt()

    def grad_columns(self) -> Tensor:
        """0 where the step will be refused."""
        columns = torch.zeros(self._weight.shape[1], dtype=torch.float64, device=self.device)
        if not self._waiting:
            return columns
        batch = self._ready()
        self._call(_core.exact_gradient, **batch.counts(), columns=columns)
        return torch.where(self._refused(batch), 0.0, columns)

    def scale_grad(self, factor: float | Tensor) -> None:
        if isinstance(factor, Tensor):
            factor = factor.to(device=self.device, non_blocking=True)
        elif not math.isfinite(factor):
            raise ShapeError(f"factor: expected a finite number, got {factor}")
        for batch in (*self._waiting, *([] if self._joined is None else [self._joined])):
            assert batch.pieces is not None
            batch.pieces = [piece * factor for piece in batch.pieces]
            batch.loaded = False

    def spoil(self, norm: Tensor, scaled: bool) -> None:
        """Without a scaler the next step is refused with an error, as one of a NaN is."""
        bad = ~torch.isfinite(norm.to(device=self.device, non_blocking=True))
        self.spoilt = bad if self.spoilt is None else self.spoilt | bad
        if not scaled:
            self.scale_grad(torch.where(bad, torch.nan, 1.0))

    def drop_pending(self) -> None:
        for batch in self._waiting:
            batch.pieces = None
        self._waiting, self._joined, self.spoilt = [], None, None

    def rows(self, ids: Tensor, out: Tensor) -> None:
        self._call(_core.exact_rows, ids=ids, out=out)

    def consolidate(self) -> None:
        self._call(_core.exact_consolidate)

    def refresh(self) -> None:
        """Takes the rows for the weights, whoever has written to them; the address of the state stays."""
        self._call(_core.exact_init)
        self.time += 1
        self._new_at = self.time

    def steps_in_log(self) -> int:
        """Steps since the rows were the weights; waits for the device."""
        return int(self._head["state"][0])

    def diagnostics(self) -> dict[str, float]:
        out = torch.empty(len(NUMBERS_OF_STATE), dtype=torch.float64, device=self.device)
        self._call(_core.exact_diagnostics, out=out)
        numbers = dict(zip(NUMBERS_OF_STATE, out.tolist(), strict=True))
        return {"blocks": numbers["steps"], **numbers, "gram_error": self._gram_error()}

    def _gram_error(self) -> float:
        """max |Q p - W'(W p)| / |Q p| for a probe p; streams all rows."""
        classes, columns = self._weight.shape
        width = columns * (1 if self._head["velocity"] is None else 2)
        squares = torch.empty(width * width, dtype=torch.float64, device=self.device)
        self._call(_core.exact_gram, squares=squares)
        probe = torch.linspace(1.0, 2.0, columns, dtype=torch.float64, device=self.device)
        kept = squares.reshape(width, width)[:columns, :columns] @ probe
        found = torch.zeros_like(probe)
        for lo in range(0, classes, CHUNK):
            ids = torch.arange(lo, min(lo + CHUNK, classes), device=self.device)
            part = torch.empty(len(ids), columns, dtype=torch.float64, device=self.device)
            self.rows(ids, part)
            found += part.T @ (part @ probe)
        return float((kept - found).abs().max() / kept.norm().clamp(min=torch.finfo(torch.float64).tiny))
