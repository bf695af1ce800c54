"""tests/python/torch_tape.py -- a CUDA graph's rules without a GPU: a step's work done again without its Python.

In the emulation (torch_devices.py) a `Tape` records the operators of torch and the calls of the core that a step makes,
and repeats them on the same tensors. Numbers that the step has read back, and decisions of the host, stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from widehead import _core
from widehead.torch import _device

FUNCTIONS = ("exact_forward", "exact_backward", "exact_gradient", "exact_step", "exact_consolidate", "spherical_loss")


class Shown:
    """A tensor in the place of its capsule, which serves one call only."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tape]:
    """What is inside goes on the tape, and knows that it is captured."""
    tape, export = Tape(), _device._export

    def real(value: Any) -> Any:
        if isinstance(value, Shown):
            return export(value.tensor)
        if isinstance(value, dict):
            return {name: real(v) for name, v in value.items()}
        return (lambda n: real(value(n))) if callable(value) else value

    def on_tape(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> None:
            function(**{name: real(v) for name, v in arguments.items()})

        def told(**arguments: Any) -> None:
            call(**arguments)
            tape.calls.append((call, (), arguments, None))

        return told

    with monkeypatch.context() as during:
        for name in FUNCTIONS:
            during.setattr(_core, name, on_tape(getattr(_core, name)))
        size = _core.exact_batch_bytes
        during.setattr(_core, "exact_batch_bytes", lambda **given: size(**{n: real(v) for n, v in given.items()}))
        during.setattr(_device, "_export", Shown)
        during.setattr(_device, "capturing", lambda device: True)
        with tape:
            yield tape
