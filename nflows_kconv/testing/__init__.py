"""Assertions and hypothesis strategies for invertible transformations of any library.

The assertions need only torch; `strategies` and `register_profiles` need hypothesis and raise an ImportError without
it.
"""

from importlib import import_module
from typing import Any

from nflows_kconv.testing.assertions import (
    assert_batch_independent,
    assert_deterministic,
    assert_gradients_match_finite_differences,
    assert_hooks_run,
    assert_invertible,
    assert_log_abs_det_matches_jacobian,
    assert_log_dets_cancel,
    assert_shape_and_dtype_preserved,
    assert_state_dict_round_trip,
    check_transform,
)

__all__ = [
    "assert_batch_independent",
    "assert_deterministic",
    "assert_gradients_match_finite_differences",
    "assert_hooks_run",
    "assert_invertible",
    "assert_log_abs_det_matches_jacobian",
    "assert_log_dets_cancel",
    "assert_shape_and_dtype_preserved",
    "assert_state_dict_round_trip",
    "check_transform",
    "register_profiles",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name in ("register_profiles", "strategies"):
        strategies = import_module("nflows_kconv.testing.strategies")
        return strategies if name == "strategies" else strategies.register_profiles
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
