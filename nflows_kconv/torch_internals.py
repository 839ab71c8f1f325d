"""Everything this package uses of torch that is not public, in one place."""

from __future__ import annotations

import copy
import copyreg
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._C import (
    _get_dispatch_mode,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _TorchDispatchModeKey,
)
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_single_level_autograd_function_allowed,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
    set_single_level_autograd_function_allowed,
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.compiler import is_dynamo_compiling
from torch.distributions.transforms import _InverseTransform
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "EXTRA_STATE",
    "SingleLevelFunction",
    "TorchDispatchMode",
    "address",
    "apply_at_this_level",
    "assert_async",
    "below_autograd",
    "deep_copy",
    "forward_mode",
    "has_autocast",
    "is_any_autocast_on",
    "is_differentiating_forward",
    "is_exporting_to_onnx",
    "is_functorch_wrapped_tensor",
    "is_legacy_batchedtensor",
    "is_sharded",
    "is_traced",
    "is_under_torch_func",
    "is_under_vmap",
    "is_unobserved",
    "is_zero_tensor",
    "primal",
    "process_group",
    "tree_leaves",
    "tree_map_only",
    "uncompiled",
    "without_subclasses",
]

EXTRA_STATE = "_extra_state"  # key of `get_extra_state` in a state_dict
assert_async = torch._assert_async
uncompiled = torch._disable_dynamo  # torch.compiler.disable would import the compiler with this package


below_autograd = torch._C._AutoDispatchBelowAutograd
is_any_autocast_on = torch._C._is_any_autocast_enabled  # several times as fast as asking for one device
# Of the C++ object; a C++ tensor is a variable that holds it.
address = attrgetter("_cdata")
without_subclasses = torch._C.DisableTorchFunctionSubclass
is_zero_tensor = torch.Tensor._is_zerotensor  # a tensor without memory, as tangents may be
forward_mode = forward_ad._set_fwd_grad_enabled


_PLAIN = frozenset((Tensor, nn.Parameter))


def is_unobserved(*tensors: Tensor | None, recorded: bool = False) -> bool:
    """Returns whether nothing would see an operator on these tensors, and their memory has their values.

    Nor may autograd record it, unless `recorded`.

    Compilers, a `TorchDispatchMode`, `torch.jit.trace`, forward mode and torch.func see every operator.
    """
    # Every call of a layer comes through here: one loop, and the expressions of functions in place of calls.
    if (
        is_dynamo_compiling()
        or _len_torch_dispatch_stack()
        or _get_tracing_state()
        or peek_interpreter_stack()
        or forward_ad._current_level >= 0
    ):
        return False
    records = not recorded and torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg() or (records and tensor.requires_grad)):
            return False
    return True


def is_differentiating_forward() -> bool:
    """Returns whether forward mode is active. Graphs of torch.compile enter a torch.func level silently."""
    return forward_ad._current_level >= 0 or is_under_torch_func()


def primal(tensor: Tensor | None) -> Tensor | None:
    """Returns a tensor without its tangent of this level, whose number is always 0."""
    return None if tensor is None else forward_ad.unpack_dual(tensor, level=0).primal


def apply_at_this_level(function: Any, *args: Any) -> Tensor:
    """Applies a `SingleLevelFunction`, as torch.func's own levels do."""
    # torch's own context manager swallows a KeyboardInterrupt raised on entry.
    allowed = get_single_level_autograd_function_allowed()
    try:
        set_single_level_autograd_function_allowed(True)
        return function.apply(*args)
    finally:
        set_single_level_autograd_function_allowed(allowed)


def is_traced() -> bool:
    """Returns whether `make_fx` records operators, as in `torch.func.linearize`."""
    return _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None


def is_under_torch_func() -> bool:
    """Returns whether a torch.func transformation such as vmap is active, also under torch.compile."""
    return peek_interpreter_stack() is not None


def is_under_vmap() -> bool:
    """Returns whether vmap is among the active torch.func transformations, also under torch.compile."""
    return any(each.key() == TransformType.Vmap for each in get_interpreter_stack() or ())


def is_exporting_to_onnx() -> bool:
    """Returns whether `torch.onnx.export` is running, also under torch.compile, which it tries after an error."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def has_autocast(device: str) -> bool:
    """Returns whether a type of device has autocast, also under torch.compile, which in torch 2.10 cannot ask."""
    return torch.amp.is_autocast_available(device)


# torch.compiler.assume_constant_result does this but would import the compiler with this package.
_functions: tuple[Any, ...] = (has_autocast, is_under_torch_func, is_under_vmap, is_exporting_to_onnx)
for _function in _functions:
    _function._dynamo_marked_constant = True


def process_group(module: nn.Module) -> distributed.ProcessGroup | None:
    """Returns the process group of the DistributedDataParallel forward that is running; None outside one.

    Outside, a process cannot know whether the others take part, and might wait for them forever.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    # If torch drops this name, all processes are the best guess.
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", distributed.group.WORLD)
    if not isinstance(wrapper, DistributedDataParallel):
        return wrapper
    return wrapper.process_group if any(each is module for each in wrapper.module.modules()) else None


def is_sharded(module: nn.Module) -> bool:
    """Returns whether `fully_shard` manages the module's parameters, so that writes to them in forward are lost."""
    if not distributed.is_available():
        return False
    from torch.distributed import _composable_state, fsdp

    # All modules that a composable API manages.
    managed = getattr(_composable_state, "_module_state_mapping", ())
    roots = [each for each in managed if isinstance(each, fsdp.FSDPModule)]
    return any(each is module for root in roots for each in root.modules())  # type: ignore[attr-defined]


def deep_copy(value: Any) -> Any:
    """Returns a deep copy, also of what `copy.deepcopy` cannot copy.

    These are tensors with autograd history, which pruning, weight_norm and caches keep in modules, and the `inv` of a
    `torch.distributions.Transform`, which loses the transform.
    """
    registered = copyreg.dispatch_table.get(_InverseTransform)
    copyreg.pickle(_InverseTransform, lambda inverse: (object.__new__, (_InverseTransform,), vars(inverse)))
    try:
        with _CopyOfNonLeaves(), torch.inference_mode(False):
            return copy.deepcopy(value)
    finally:
        copyreg.dispatch_table.pop(_InverseTransform, None)
        if registered is not None:
            copyreg.dispatch_table[_InverseTransform] = registered


class _CopyOfNonLeaves(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))
