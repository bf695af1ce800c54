"""_files.py -- heads to and from the files that the NumPy face reads and writes too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from widehead._core import DtypeError, ShapeError

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory (a copy where it is on a GPU); bfloat16 as its bits in uint16."""
    host = tensor.detach().cpu().contiguous()
    return host.view(torch.uint16).numpy() if host.dtype == torch.bfloat16 else host.numpy()


def to_tensor(array: NDArray[Any], device: Any = None, integer: bool = False) -> Tensor:
    """integer: whether an array of uint16 holds integers, not the bits of bfloat16."""
    bits = array.dtype == np.uint16 and not integer
    tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(array)
    return tensor.to(device)


def take_parameters(
    tensors: dict[str, NDArray[Any]], like: dict[str, Tensor], device: Any, integers: set[str]
) -> dict[str, Tensor]:
    """The parameters in a file's tensors, checked against a head's own. `integers`: see `HeadFile`.

    Raises:
        ShapeError, DtypeError: one is missing, left over, or of another shape or type. Optimiser state is passed over.
    """
    found = {name: array for name, array in tensors.items() if not name.startswith("optimizer.")}
    if set(found) != set(like):
        raise ShapeError(f"expected the tensors {sorted(like)}, got {sorted(found)}")
    taken = {name: to_tensor(array, device, name in integers) for name, array in found.items()}
    for name, tensor in taken.items():
        # A bias may be in any type that the core takes.
        kinds = [torch.float32, torch.bfloat16, torch.float64] if name.endswith("bias") else [like[name].dtype]
        right = tensor.dtype in kinds
        if tensor.shape != like[name].shape or not right:
            raise DtypeError(
                f"{name}: expected {list(like[name].shape)} {like[name].dtype}, got {list(tensor.shape)} {tensor.dtype}"
            )
    return taken
