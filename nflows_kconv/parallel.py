"""Sums over the processes of a distributed training."""

from __future__ import annotations

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def process_group(module: nn.Module) -> distributed.ProcessGroup | None:
    """The processes that run the module right now, in a forward of DistributedDataParallel; None outside of one.

    Elsewhere a process cannot know whether the others take part, and would wait for them forever.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    # torch has no public name for it. Should this one go, all processes are the better guess.
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", distributed.group.WORLD)
    if not isinstance(wrapper, DistributedDataParallel):
        return wrapper
    return wrapper.process_group if any(each is module for each in wrapper.module.modules()) else None


def total(values: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """The sum of the values over the group's processes; the values where there is none. Changes them in place."""
    if group is not None:
        distributed.all_reduce(values, group=group)
    return values
