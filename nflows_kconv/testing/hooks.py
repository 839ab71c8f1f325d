"""Checks that a transform calls its parts and does not bypass their hooks."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from nflows_kconv import bijection
from nflows_kconv.testing.subject import Subject

__tracebackhide__ = True  # pytest shows the line of the test that called, not ours


def check_hooks(t: Subject, direction: str, argument: Tensor) -> None:
    """Asserts that every part's `forward` runs through its `__call__`, which runs its hooks.

    Ignores parts that call their own forward, and code of the libraries that `bijection` supports.

    Args:
        t: The transform, unusable afterwards.
        direction: "forward" or "inverse".
        argument: The argument of the call.
    """
    around: set[str] = set()

    def watch(name: str, part: nn.Module) -> None:
        forward = part.forward

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                caller = sys._getframe(1)
                own = caller.f_locals.get("self") is part
                if not (own or bijection.is_of_a_library(caller.f_globals.get("__name__", ""))):
                    around.add(f"{caller.f_code.co_name} calls {name}.forward")
            return forward(*args, **kwargs)

        part.forward = watched

    for name, part in t.transform.named_modules():
        if part is not t.transform:
            watch(name, part)
    t.call(direction, argument)
    if around:
        calls = " and ".join(sorted(around))
        raise AssertionError(f"in direction {direction} {calls}, bypassing its hooks: call the module instead")
