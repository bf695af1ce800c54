"""_owner.py -- the link between a head and the fused optimiser that owns its weights."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from widehead._core import Error

if TYPE_CHECKING:
    from ._head import Head
    from .optim import FusedOptimizer

# Slots of the control tensor of an owned head, int64 on the CPU. It travels through autograd and compiled graphs in
# place of the owner: the op finds the owner by its handle when it runs, so no learning rate, step number or moment is
# ever frozen into a graph.
HANDLE = 0
PENDING = 1  # 1 from the update in backward until the optimiser's step()

_handles = itertools.count(1)
_owners: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()


class Owner:
    """One head in the hands of one fused optimiser.

    `anchor` is a 0-d leaf that requires grad: it makes backward reach the head when neither the weights nor the hidden
    states do. Its gradient is the head's report: 0 after an update, infinity when an overflow kept everything as it
    was. `applied` is what a fused backward on a GPU leaves for step(): 1, or 0 where the device has refused the step.
    `closed` counts the steps that step() has closed: on a GPU the refused ones too, which the host does not know of.
    """

    def __init__(self, head: Head, optimizer: FusedOptimizer, group_index: int) -> None:
        self.head = head
        self.optimizer = optimizer
        self.group_index = group_index
        self.anchor = torch.zeros((), dtype=torch.float32, device=head._stored().device, requires_grad=True)
        self.control = torch.tensor([next(_handles), 0], dtype=torch.int64, device="cpu")
        self.applied: Tensor | None = None
        self.closed = 0
        _owners[int(self.control[HANDLE])] = self

    @property
    def name(self) -> str:
        return f"{type(self.head).__name__}({self.head.in_features}, {self.head.n_classes})"

    def update(self, layer: int = 0) -> dict[str, Any]:
        """What the core needs to know of the optimiser's next step on a layer of this head (one of `Head.layers()`):
        numbers, names and state tensors.
        """
        return self.optimizer.core_update(self, layer)

    def slots(self) -> dict[str, Tensor]:
        """The optimiser's state of the head's weight that has a number a weight, by the core's names."""
        return self.optimizer.slots(self)

    def steps(self) -> int:
        """How many steps the optimiser has taken on this head; waits for a GPU."""
        return self.optimizer.steps(self)

    def step_count(self) -> Tensor:
        """The same as int64 `[1]`, where the weights of a head on a GPU are."""
        return self.optimizer.step_count(self)

    def scaler(self) -> Any | None:
        scaler = self.optimizer.grad_scaler
        return scaler if scaler is not None and scaler.is_enabled() else None


def owner_of(control: Tensor) -> Owner:
    owner = _owners.get(int(control[HANDLE]))
    if owner is None:
        raise Error("the fused optimiser that owned this head is gone: run the forward pass again")
    return owner


def refuse_second_backward(name: str) -> Error:
    return Error(
        f"second backward through {name} before its optimiser's step(): in fused mode backward itself updates the "
        "weights, so gradient accumulation, retain_graph and a second use of the same graph are refused; call step() "
        "after each backward, or train the head in plain mode with a torch.optim optimiser"
    )
