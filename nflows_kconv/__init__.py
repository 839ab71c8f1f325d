"""Invertible k x k convolutions for PyTorch's normalizing-flow libraries."""

from importlib.metadata import version

from nflows_kconv import functional
from nflows_kconv.backends import available_backends
from nflows_kconv.layer import InvertibleConv2d
from nflows_kconv.precompile import warmup

__all__ = ["InvertibleConv2d", "__version__", "available_backends", "functional", "warmup"]
__version__ = version("nflows-kconv")
