"""_sampled_gpu.py -- the choice of sampled softmax's classes on a GPU: no waiting, and shapes that no data decides.

The same classes, offsets and positions as widehead.sampling gives for the same seed (there is the mathematics), up to
the last bit of a logarithm.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from widehead import _core
from widehead.sampling import IGNORED, Proposal

from ._device import capsule, faults_of, gpu_of

# A proposal's tables on each device that has asked for them.
_tables: weakref.WeakKeyDictionary[Proposal, dict[torch.device, dict[str, Tensor]]] = weakref.WeakKeyDictionary()


def tables_on(proposal: Proposal, device: torch.device) -> dict[str, Tensor]:
    """The proposal's arrays there; empty for one without. Waits the first time."""
    known = _tables.setdefault(proposal, {})
    if device not in known:
        arrays = {} if proposal.weight is None else {**proposal.table, "weight": proposal.weight}
        known[device] = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return known[device]


def _log_probability(proposal: Proposal, classes: Tensor) -> Tensor:
    """Proposal.log_probability on the device."""
    if proposal.weight is not None:
        weight = tables_on(proposal, classes.device)["weight"]
        return torch.log(weight[classes]) - proposal.log_total
    if proposal.name == "uniform":
        return torch.full(classes.shape, -math.log(proposal.n_classes), dtype=torch.float64, device=classes.device)
    return torch.log(torch.log1p(1.0 / (classes.double() + 1.0))) - math.log(math.log1p(proposal.n_classes))


def _record_bad(bad: Tensor, any_bad: Tensor, indices: Tensor, n_classes: int) -> None:
    """The first label out of range goes to the device's record."""
    at = bad.to(torch.uint8).argmax().reshape(1)
    kind = (any_bad * _core.LABEL_RANGE).reshape(1)
    target = torch.zeros_like(kind)  # the argument at fault
    limit = torch.full_like(kind, n_classes)
    record = torch.cat([kind, target, at, indices.gather(0, at), limit])
    faults_of(indices.device).add(record, unless=0)


def sample_on_gpu(
    proposal: Proposal, negatives: int, indices: Tensor, seed: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `sample_rows`. A label out of range is recorded; then no row is one, so that the step is refused."""
    device, n_classes, n = indices.device, proposal.n_classes, negatives + indices.shape[0]
    draws = torch.empty(negatives, dtype=torch.int64, device=device)
    table = {name: capsule(t) for name, t in tables_on(proposal, device).items() if name != "weight"}
    _core.sample_classes(
        draws=capsule(draws), n_classes=n_classes, proposal=proposal.name, seed=0, step=0,
        device_seed=capsule(seed.to(device).reshape(1)), gpu=gpu_of(indices), **table,
    )  # fmt: skip
    drawn = draws.sort().values
    ignored = torch.zeros_like(indices, dtype=torch.bool) if ignore_index is None else indices == ignore_index
    bad = ((indices < 0) | (indices >= n_classes)) & ~ignored
    any_bad = bad.any()
    if indices.shape[0]:
        _record_bad(bad, any_bad, indices, n_classes)
    # What does not count becomes n_classes, which sorts behind every class; so do repeats.
    labels = torch.where(ignored | bad, n_classes, indices)
    every = torch.cat([drawn, labels]).sort().values
    repeated = torch.zeros_like(every, dtype=torch.bool)
    repeated[1:] = every[1:] == every[:-1]
    classes = torch.where(repeated, n_classes, every).sort().values
    padding = classes == n_classes
    count = torch.searchsorted(drawn, classes, right=True) - torch.searchsorted(drawn, classes)
    log_q = _log_probability(proposal, classes.clamp(max=n_classes - 1))
    offset = (torch.log(count.double() / negatives) - log_q).to(torch.float32)  # never drawn: the logarithm of 0
    positions = torch.searchsorted(classes, labels)
    positions = torch.where(ignored, IGNORED, torch.where(bad, -1, positions))
    rows = torch.where(any_bad, -2, torch.where(padding, -1, classes))
    return rows, offset.masked_fill(padding, -torch.inf), positions, torch.tensor(n, device="cpu")
