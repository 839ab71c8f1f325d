"""What a module cannot see of distributed training: whether others run it too, and where its parameters are."""

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


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` manages the module's parameters: what a forward writes into them is then lost."""
    if not distributed.is_available():
        return False
    from torch.distributed import _composable_state, fsdp

    # torch has no public list of such modules; this one is of all modules that a composable API manages.
    managed = getattr(_composable_state, "_module_state_mapping", ())
    roots = [each for each in managed if isinstance(each, fsdp.FSDPModule)]
    return any(each is module for root in roots for each in root.modules())  # type: ignore[attr-defined]


def total(values: Tensor, group: distributed.ProcessGroup | None) -> Tensor:
    """The sum of the values over the group's processes; the values where there is none. Changes them in place."""
    if group is not None:
        distributed.all_reduce(values, group=group)
    return values
