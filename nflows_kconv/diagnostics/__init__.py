"""Finds why a flow loses precision in a round trip: how much a layer amplifies errors, and at which step they grow.

docs/numerics.md explains the numbers and the remedies.
"""

from nflows_kconv.diagnostics.amplification import Conditioning, conditioning
from nflows_kconv.diagnostics.reconstruction import RoundTrip, StepError, round_trip

__all__ = ["Conditioning", "RoundTrip", "StepError", "conditioning", "round_trip"]
