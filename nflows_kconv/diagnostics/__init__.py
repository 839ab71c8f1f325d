"""Finds why a flow errs in a round trip: how much a layer amplifies, and at which step errors grow.

docs/numerics.md explains the numbers, and what helps.
"""

from nflows_kconv.diagnostics.amplification import Conditioning, conditioning
from nflows_kconv.diagnostics.reconstruction import RoundTrip, StepError, round_trip

__all__ = ["Conditioning", "RoundTrip", "StepError", "conditioning", "round_trip"]
