"""The only file of these optimizers that imports torch.distributed: a mean over ranks, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over all ranks, in one message for each device and type.

    Every rank gives tensors of the same shapes in the same order. Nothing happens on a rank alone.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for members in alike.values():
        message = torch.cat([member.reshape(-1) for member in members])
        dist.all_reduce(torch.view_as_real(message) if message.is_complex() else message)
        message /= dist.get_world_size()
        for member, mean in zip(members, message.split([member.numel() for member in members]), strict=True):
            member.copy_(mean.view_as(member))
