"""_exact_memory.py -- the core's state of an exact head beside the parameters it works in.

Weight and bias are views of one matrix `[D, d + 1]`, as the bias is the weight of a feature that is always 1; without a
bias the matrix is the weight. Velocities of momentum lie in another one like it. Between two consolidations the matrix
holds a factor of the weights, which only the core can read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from widehead._core import Error
from widehead.options import ExactOptions

from . import _device
from ._device import on_gpu
from ._exact_device import DeviceCore
from ._exact_host import HostCore


def joined(parts: list[Tensor]) -> Tensor | None:
    """The matrix that weight `[D, d]` and, if there is one, bias `[D]` are views of; None where they lie apart."""
    weight = parts[0].detach()
    if len(parts) == 1:
        return weight if weight.is_contiguous() else None
    bias, columns = parts[1].detach(), weight.shape[1] + 1
    beside = (
        weight.stride() == (columns, 1)
        and bias.stride() == (columns,)
        and weight.dtype == bias.dtype
        and bias.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        and bias.data_ptr() == weight.data_ptr() + weight.shape[1] * weight.element_size()
    )
    return weight.as_strided((len(weight), columns), (columns, 1)) if beside else None


def views(matrix: Tensor, n: int) -> list[Tensor]:
    """The one or two parts of a matrix."""
    return [matrix] if n == 1 else [matrix[:, :-1], matrix[:, -1]]


def join(parts: list[Tensor]) -> Tensor:
    """A new matrix that holds the parts."""
    weight = parts[0].detach()
    matrix = weight.new_empty(len(weight), weight.shape[1] + len(parts) - 1)
    for view, part in zip(views(matrix, len(parts)), parts, strict=True):
        view.copy_(part)
    return matrix


def version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class ExactMemory:
    """The core's state over the parameters and the velocities of a head.

    Attributes:
        core: the state. retired: it is the head's no more.
    """

    def __init__(self, parameters: list[Tensor], velocities: list[Tensor], options: ExactOptions) -> None:
        """The parameters and the velocities, none without momentum, lie joined already."""
        self._parameters, self._velocities = parameters, velocities
        matrix, velocity = joined(parameters), joined(velocities) if velocities else None
        assert matrix is not None and (velocity is not None or not velocities)
        kind = DeviceCore if on_gpu(matrix) else HostCore
        self.core: HostCore | DeviceCore = kind(matrix, velocity, options)
        self.retired = False
        self._settled = True
        # A step was captured in a CUDA graph: whether the tensors hold the weights, the host does not know.
        self._replayable = False
        self._record()

    @property
    def momentum(self) -> bool:
        return bool(self._velocities)

    def lies_in(self, parameters: list[Tensor], velocities: list[Tensor]) -> bool:
        """Whether it works in these very tensors."""
        mine, theirs = self._parameters + self._velocities, parameters + velocities
        return (
            len(mine) == len(theirs)
            and len(velocities) == len(self._velocities)
            and all(a is b for a, b in zip(mine, theirs, strict=True))
            and [t.data_ptr() for t in theirs] == self._places
        )

    def edited(self) -> bool:
        """Whether somebody else has written to the tensors."""
        return [version(t) for t in self._parameters + self._velocities] != self._versions

    def check_unedited(self) -> None:
        if self.edited():
            raise Error(
                "the weights (or velocities) were written to since the forward pass or the last step: drop what waits "
                "for step() with zero_grad(), and run the forward pass again"
            )

    def consolidate(self) -> None:
        """Makes the tensors hold weights and velocities."""
        if self._settled and not self._replayable:
            return
        if self.edited():
            if not self._holds_weights():
                raise Error(
                    "weight was written to through a reference from before the last step, when it held a factor of the "
                    "weights: take head.weight anew before writing to it; load_state_dict() makes the head whole again"
                )
            if not self.core.pending():
                self.refresh()
            return
        self.core.consolidate()
        self._settled = True
        self._watch()

    @property
    def refreshable(self) -> bool:
        """Whether it can start again in the same place: on a GPU, as captured graphs have its address."""
        return isinstance(self.core, DeviceCore)

    def refresh(self) -> bool:
        """Starts again from what the tensors hold, without the gradient that waits; False: it cannot."""
        if not isinstance(self.core, DeviceCore):
            return False
        self.core.drop_pending()
        self.core.refresh()
        self._settled = True
        self._watch()
        self._record()
        return True

    def step(self, **how: Any) -> Tensor | int:
        """Takes the step; returns whether it counts."""
        taken = self.core.step(**how)
        self._settled = False
        self._watch()
        for tensor in self._parameters + self._velocities:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)  # a graph that has kept it must not be walked any more
        self._record()
        return taken

    def _watch(self) -> None:
        self._replayable = self._replayable or _device.capturing(self._parameters[0].device)

    def _holds_weights(self) -> bool:
        if not self._replayable or not isinstance(self.core, DeviceCore):
            return self._settled
        return self.core.steps_in_log() == 0

    def _record(self) -> None:
        tensors = self._parameters + self._velocities
        self._places = [t.data_ptr() for t in tensors]
        self._versions = [version(t) for t in tensors]
