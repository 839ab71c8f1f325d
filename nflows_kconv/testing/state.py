"""What becomes of a transform when its parameters change, and whether its state_dict is all of it."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor

from nflows_kconv.testing.interface import Bijection
from nflows_kconv.testing.probe import Probe


def training_step(parameter: Tensor) -> Tensor:
    """What an optimiser may make of a parameter: 0 to 10 % smaller, and small values in place of zeros."""
    noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(parameter)
    zeros = 0.1 * (2 * noise - 1) / max(1, parameter[:1].numel()) ** 0.5
    return torch.where(parameter == 0, zeros, parameter * (1 - 0.1 * noise))


def load_saved(probe: Probe, target: Bijection, source: Bijection) -> None:
    """Loads the state of another transform, by way of a file."""
    file = io.BytesIO()
    try:
        torch.save(source.transform.state_dict(), file)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as a module may say that parameters are unusual
            target.transform.load_state_dict(torch.load(file, weights_only=True))
        target.step()
    except Exception as error:
        probe.fail(f"a state_dict must be saved, loaded with weights_only=True and taken over, got {error!r}")


def check_for_lost_tensors(probe: Probe, t: Bijection, x: Tensor) -> None:
    """Asserts that results do not depend on tensors outside the state_dict, unless they are caches or masks.

    Args:
        probe: The transform before its parameters changed.
        t: The transform after.
        x: Inputs.
    """
    saved, expected = t.transform.state_dict(), probe.results(t, x)
    for path, part in probe.given.transform.named_modules():
        for name, tensor in {**vars(part), **part._buffers}.items():
            full_name = f"{path}.{name}".lstrip(".")
            if not isinstance(tensor, Tensor) or full_name in saved or _is_mask(tensor):
                continue
            changed = t.copy()
            owner = changed.transform.get_submodule(path)
            if not torch.equal(getattr(owner, name), tensor):
                continue  # it follows the parameters, as a cache
            setattr(owner, name, tensor.flatten().roll(1).view_as(tensor))
            try:
                results = probe.results(changed, x)
                lost = not all(torch.equal(results[key], value) for key, value in expected.items())
            except AssertionError:
                lost = True
            if lost:
                probe.fail(
                    f"results depend on {full_name}, which is not in the state_dict: make it a buffer, or give rebuild "
                    "if the same arguments always make the same of it"
                )


def _is_mask(tensor: Tensor) -> bool:
    values = set(tensor.unique().tolist())
    return len(values) < 2 or values <= {-1, 0, 1}
