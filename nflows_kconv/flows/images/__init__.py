"""Converts a density of real numbers to one of images, and samples to pictures.

The modules have `forward(x) -> (y, log_abs_det)` from data to latent and `inverse(y) -> (x, log_abs_det)`,
with log-determinants [B] in float32 at least, like those of `nflows_kconv.flows.steps`.
"""

from nflows_kconv.flows.images.dequantization import UniformDequantization
from nflows_kconv.flows.images.evaluation import bits_per_dim, importance_weighted_bound
from nflows_kconv.flows.images.pictures import grid, to_uint8
from nflows_kconv.flows.images.preprocessing import Affine, Logit

__all__ = ["Affine", "Logit", "UniformDequantization", "bits_per_dim", "grid", "importance_weighted_bound", "to_uint8"]
