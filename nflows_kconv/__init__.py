"""Invertible k x k convolutions for PyTorch's normalizing-flow libraries."""

from importlib.metadata import version

from nflows_kconv import functional
from nflows_kconv.backends import available_backends, use_backend
from nflows_kconv.conditional import (
    ConditionalInvertibleConv1d,
    ConditionalInvertibleConv2d,
    ConditionalInvertibleConv3d,
)
from nflows_kconv.layer import InvertibleConv1d, InvertibleConv2d, InvertibleConv3d
from nflows_kconv.periodic import PeriodicConv1d, PeriodicConv2d, PeriodicConv3d
from nflows_kconv.precompile import warmup

__all__ = [
    "ConditionalInvertibleConv1d",
    "ConditionalInvertibleConv2d",
    "ConditionalInvertibleConv3d",
    "InvertibleConv1d",
    "InvertibleConv2d",
    "InvertibleConv3d",
    "PeriodicConv1d",
    "PeriodicConv2d",
    "PeriodicConv3d",
    "__version__",
    "available_backends",
    "functional",
    "use_backend",
    "warmup",
]
__version__ = version("nflows-kconv")
