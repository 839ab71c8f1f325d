"""Finds state of a transform outside its state_dict."""

from __future__ import annotations

import io
import math
import warnings
from itertools import chain

import torch
from torch import Tensor, nn

from nflows_kconv.testing.probe import Probe
from nflows_kconv.testing.subject import Subject
from nflows_kconv.torch_internals import tree_leaves

__tracebackhide__ = True  # pytest shows the line of the test that called, not ours


def training_step(parameter: Tensor) -> Tensor:
    """Returns a parameter as after an optimiser step: 0 to 10 % smaller, with small values instead of zeros."""
    noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(parameter)
    zeros = 0.1 * (2 * noise - 1) / max(1, math.prod(parameter.shape[1:])) ** 0.5
    return torch.where(parameter == 0, zeros, parameter * (1 - 0.1 * noise))


def load_saved(target: Subject, source: Subject) -> None:
    """Loads the state of another transform through a file."""
    file = io.BytesIO()
    try:
        torch.save(source.transform.state_dict(), file)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a module may warn about unusual parameters
            target.transform.load_state_dict(torch.load(file, weights_only=True))
        target.step()
    except Exception as error:
        raise AssertionError(
            f"a state_dict must be saved, loaded with weights_only=True and taken over, got {error!r}"
        ) from error


def copy_in_place(target: Subject, source: Subject) -> None:
    """Copies parameters and buffers of another transform in place."""
    values = dict(_tensors(source))
    with torch.no_grad():
        for name, tensor in _tensors(target):
            if name in values and values[name].shape == tensor.shape:
                tensor.copy_(values[name])
    target.step()


def emptied(t: Subject, device: torch.device) -> Subject:
    """Returns a copy as if built on the meta device and emptied: in new memory filled with garbage.

    `reset_parameters` may rebuild what loading does not. If that fails, returns a plain copy.
    """
    other = t.copy()
    try:
        other.transform.to("meta").to_empty(device=device)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for _, tensor in _tensors(other):
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
            for part in reversed(list(other.transform.modules())):
                if callable(reset := getattr(part, "reset_parameters", None)):
                    reset()
    except Exception:
        return t.copy()
    return other


def lost_buffers(t: Subject) -> str:
    """Returns the names of buffers outside the state_dict."""
    names = {name for name, _ in t.transform.named_buffers()} - t.transform.state_dict().keys()
    return f", which {', '.join(sorted(names))} is not in" if names else ""


def _tensors(t: Subject) -> list[tuple[str, Tensor]]:
    return _tensors_of(t.transform)


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(chain(module.named_parameters(), module.named_buffers()))


def check_for_lost_tensors(probe: Probe, t: Subject, x: Tensor) -> None:
    """Asserts that results do not depend on tensors outside the state_dict, unless they are caches or masks.

    Args:
        probe: The transform before its parameters changed.
        t: The transform after.
        x: Inputs.
    """
    expected, own = probe.results(t, x), {id(tensor) for _, tensor in _tensors(probe.given)}
    for name, tensor in _unregistered(probe.given).items():
        is_parameter = isinstance(tensor, nn.Parameter)
        if id(tensor) in own or (_is_mask(tensor) and not is_parameter):
            continue
        changed = t.copy()
        after = _unregistered(changed).get(name)
        if after is None or not torch.equal(after, tensor):
            continue  # it follows the parameters, as a cache does
        after.data = training_step(tensor) if is_parameter else tensor.flatten().roll(1).view_as(tensor)
        try:
            results = probe.results(changed, x)
            lost = not all(torch.equal(results[key], value) for key, value in expected.items())
        except AssertionError:
            lost = True
        if lost:
            raise AssertionError(
                f"results depend on {name}, which is not in the state_dict: register it (a buffer, nn.ModuleList, "
                "nn.ParameterList), or pass rebuild if the constructor always makes the same one"
            )


def _unregistered(t: Subject) -> dict[str, Tensor]:
    """Returns tensors in plain attributes, and in lists, tuples, dictionaries and modules that are plain attributes."""
    found, registered = {}, set(t.transform.modules())
    for path, part in t.transform.named_modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            for index, leaf in enumerate(tree_leaves(value)):
                place = f"{path}.{name}".lstrip(".") + (f"[{index}]" if leaf is not value else "")
                if isinstance(leaf, Tensor):
                    found[place] = leaf
                elif isinstance(leaf, nn.Module) and leaf not in registered:
                    found |= {f"{place}.{inner}": tensor for inner, tensor in _tensors_of(leaf)}
    return found


def _is_mask(tensor: Tensor) -> bool:
    values = set(tensor.unique().tolist())
    return len(values) < 2 or values <= {-1, 0, 1}
