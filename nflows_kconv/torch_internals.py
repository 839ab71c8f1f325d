"""All that the package uses of torch without torch's promise to keep it, in one place."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "assert_async",
    "is_functorch_wrapped_tensor",
    "is_sharded",
    "is_under_torch_func",
    "process_group",
    "tree_leaves",
    "tree_map_only",
    "uncompiled",
]

assert_async = torch._assert_async
uncompiled = torch._disable_dynamo  # torch.compiler.disable would import the compiler along with this package


def is_under_torch_func() -> bool:
    """Whether a transformation of torch.func is at work, such as vmap; under torch.compile, too, which traces it."""
    return peek_interpreter_stack() is not None


# What torch.compiler.assume_constant_result does, which would import the compiler along with this package.
is_under_torch_func._dynamo_marked_constant = True  # type: ignore[attr-defined]


def process_group(module: nn.Module) -> distributed.ProcessGroup | None:
    """The processes that run the module right now, in a forward of DistributedDataParallel; None outside of one.

    Elsewhere a process cannot know whether the others take part, and would wait for them forever.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    # Should this name go, all processes are the better guess.
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", distributed.group.WORLD)
    if not isinstance(wrapper, DistributedDataParallel):
        return wrapper
    return wrapper.process_group if any(each is module for each in wrapper.module.modules()) else None


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` manages the module's parameters: what a forward writes into them is then lost."""
    if not distributed.is_available():
        return False
    from torch.distributed import _composable_state, fsdp

    # A list of all modules that a composable API manages.
    managed = getattr(_composable_state, "_module_state_mapping", ())
    roots = [each for each in managed if isinstance(each, fsdp.FSDPModule)]
    return any(each is module for root in roots for each in root.modules())  # type: ignore[attr-defined]
