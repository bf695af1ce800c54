"""tests/python/conftest.py -- fixtures: instruction sets, thread counts, devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from devices import no_cuda
from widehead import _core

THREADS = (1, 2, 4)


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set that this processor has."""
    before = _core.current_isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture(params=[*_core.supported_isas(), pytest.param("cuda", marks=pytest.mark.gpu)])
def unit(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set, and on a GPU; gives the device, "cpu" or "cuda"."""
    if request.param == "cuda":
        if reason := no_cuda():
            pytest.skip(reason)
        yield "cuda"
        return
    before = _core.current_isa()
    _core.set_isa(request.param)
    yield "cpu"
    _core.set_isa(before)


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test once for each thread count."""
    before = _core.get_num_threads()
    _core.set_num_threads(request.param)
    yield request.param
    _core.set_num_threads(before)


@pytest.fixture(autouse=True)
def _leave_settings() -> Iterator[None]:
    """No test leaves another thread count or instruction set behind."""
    before = _core.get_num_threads(), _core.current_isa()
    yield
    if before[0] != _core.get_num_threads():
        _core.set_num_threads(before[0])
    if before[1] != _core.current_isa():
        _core.set_isa(before[1])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on the CPU and, where there is one, on a GPU; skipped by name otherwise.

    Modules test_torch_* get the device of their tensors: where the backend is emulated "cpu" (see torch_devices.py).
    """
    if request.param == "cpu":
        yield "cpu"
        return
    if reason := no_cuda():
        pytest.skip(reason)
    if not request.module.__name__.startswith("test_torch"):
        yield "cuda"
        return
    import torch_devices

    if _core.cuda_emulated:
        torch_devices.emulate(monkeypatch)
    yield "cpu" if _core.cuda_emulated else "cuda"
    torch_devices.read_faults()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how many tests wanted a GPU and had none."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if "gpu" in report.keywords
    )
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} GPU tests skipped: {reason}")
