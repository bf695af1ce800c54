"""tests/python/test_no_driver.py -- a build with CUDA where there is no device: the CPU works, CUDA says why not."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from dense_cases import make
from devices import claim_cuda
from test_dense import check
from widehead import BackendError, _core


def why_not() -> str | None:
    if not _core.cuda_built or _core.cuda_emulated:
        return "widehead was built without CUDA"
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return "there is a CUDA device"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_the_cpu_side_works() -> None:
    check(make((17, 97, 31)))


def test_cuda_memory_is_refused_with_the_reason() -> None:
    """Memory that only says that it is CUDA's: nothing may read it."""

    def gpu() -> dict:
        return {
            "stream": 0,
            "scratch": lambda n: claim_cuda(np.empty(n, np.int64).__dlpack__()),
            "faults": None,
            "refused": None,
        }

    arrays = {
        name: np.zeros(shape, np.float32)
        for name, shape in (("hidden", (2, 3)), ("weight", (4, 3)), ("logits", (2, 4)))
    }
    with pytest.raises(BackendError, match="no usable CUDA device"):
        _core.dense_logits(
            bias=None, gpu=gpu(), **{name: claim_cuda(array.__dlpack__()) for name, array in arrays.items()}
        )
    rows = np.zeros((4, 3), np.float32)
    with pytest.raises(BackendError, match="no usable CUDA device"):
        _core.init_uniform(out=claim_cuda(rows.__dlpack__()), low=-1.0, high=1.0, seed=1, gpu=gpu())
    assert not rows.any()
