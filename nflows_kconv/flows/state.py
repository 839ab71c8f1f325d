"""Converts state_dicts of the image flow between the libraries.

Both flows hold the same steps, and a mean and a log-scale per latent number and class:

    nflows       _transform._transforms.1._transforms.{level}._transforms.1.step...    level 0 next to the data
                 _distribution._context_encoder.weight   [classes, 2 D]: means, then log-scales, in the latent's order
    normflows    flows.{L - 1 - level}.0.step...
                 q0.{L - 1 - level}.loc, .log_scale      [C, H, W, classes]; zeros [1, C, H, W] without classes
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from nflows_kconv.flows.image_flow import Architecture

# Names of tensors, given the level and the name inside its stack of steps.
_NFLOWS = "_transform._transforms.1._transforms.{}._transforms.1.{}"
_NORMFLOWS = "flows.{}.0.{}"
_CLASSES = "_distribution._context_encoder.weight"


def for_nflows(state_dict: Mapping[str, Any], architecture: Architecture) -> Mapping[str, Any]:
    """Converts a state_dict of normflows' flow to the names of nflows' flow; returns any other unchanged."""
    renamed = _renamed(state_dict, _NORMFLOWS, _NFLOWS, architecture.levels)
    if renamed is None:
        return state_dict
    levels = reversed(range(architecture.levels))
    bases = [[renamed.pop(f"q0.{level}.{part}", None) for part in ("loc", "log_scale")] for level in levels]
    if architecture.num_classes is not None and all(value is not None for base in bases for value in base):
        parts = [torch.cat([value.movedim(-1, 0).flatten(1) for value in part], 1) for part in zip(*bases, strict=True)]
        renamed[_CLASSES] = torch.cat(parts, 1)
    return renamed


def for_normflows(state_dict: Mapping[str, Any], architecture: Architecture) -> Mapping[str, Any]:
    """Converts a state_dict of nflows' flow to the names of normflows' flow; returns any other unchanged."""
    renamed = _renamed(state_dict, _NFLOWS, _NORMFLOWS, architecture.levels)
    if renamed is None:
        return state_dict
    shapes = architecture.latent_shapes
    like = next(value for value in renamed.values() if value.is_floating_point())  # files may have another order
    weight = renamed.pop(_CLASSES, None)
    if architecture.num_classes is None:
        weight = torch.zeros(1, 2 * sum(map(math.prod, shapes)), dtype=like.dtype, device=like.device)
    if weight is not None:
        parts = weight.split([math.prod(shape) for shape in (*shapes, *shapes)], 1)
        for index, (part, shape) in enumerate(zip(parts, (*shapes, *shapes), strict=True)):
            level, name = architecture.levels - 1 - index % len(shapes), ("loc", "log_scale")[index // len(shapes)]
            value = part.unflatten(1, shape)
            renamed[f"q0.{level}.{name}"] = value if architecture.num_classes is None else value.movedim(0, -1)
    return renamed


def _renamed(state_dict: Mapping[str, Any], source: str, target: str, levels: int) -> OrderedDict[str, Any] | None:
    """Returns a copy with renamed steps, including metadata; None if there are no such steps."""
    if not isinstance(state_dict, Mapping):
        return None  # torch's error
    before, between, _ = map(re.escape, source.split("{}"))
    pattern = re.compile(rf"{before}(\d+){between}(.*)")
    if not any(map(pattern.fullmatch, state_dict)):
        return None

    def rename(old: str) -> str:
        match = pattern.fullmatch(old)
        return old if match is None else target.format(levels - 1 - int(match[1]), match[2])

    renamed = OrderedDict((rename(old), value) for old, value in state_dict.items())
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        renamed._metadata = {rename(old): value for old, value in metadata.items()}  # type: ignore[attr-defined]
    return renamed
