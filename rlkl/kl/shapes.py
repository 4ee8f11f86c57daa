"""Whether tensors per token fit their mask, before torch broadcasts those that do not."""

import torch
from torch import Tensor


def check_per_token(mask: Tensor, **tensors: Tensor) -> None:
    """Refuses tensors, by their names, that have not the shape [B, T] of a bool mask.

    Raises:
        ValueError: says which shapes there are, or how a mask of numbers becomes one of bools.
    """
    if mask.ndim != 2 or any(x.shape != mask.shape for x in tensors.values()):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors.values())
        raise ValueError(  # [B, T, 1], as gather leaves it, would be broadcast
            f"{', '.join(tensors)} and mask have shapes {shapes} and {tuple(mask.shape)}; each "
            "must be [B, T]"
        )
    check_bool(mask)


def check_bool(mask: Tensor) -> None:
    """Refuses a mask of numbers.

    Raises:
        ValueError: says how it becomes one of bools.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; pass a bool one, True = real token: mask.bool()")
