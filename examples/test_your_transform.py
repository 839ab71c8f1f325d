"""Property tests of your own transform, with `nflows_kconv.testing`.

    pytest examples/test_your_transform.py

hypothesis draws the images; `check_transform` checks round trips, log-determinants and gradients. The second test shows
how it finds a mistake, a wrong factor that an image of one pixel would not reveal.
"""

import pytest
import torch
from hypothesis import given, settings
from nflows.transforms import Transform
from torch import nn

from nflows_kconv.testing import check_transform, strategies

CHANNELS = 3


class ChannelScale(Transform):
    """y = exp(log_scale) x, with one scale per channel."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(0.1 * torch.randn(CHANNELS))

    def log_abs_det(self, inputs):
        """Returns the sum over pixels and channels."""
        batch, _, height, width = inputs.shape
        return (height * width * self.log_scale.sum()).expand(batch)

    def forward(self, inputs, context=None):
        """Transforms data to noise."""
        return inputs * self.log_scale.exp()[:, None, None], self.log_abs_det(inputs)

    def inverse(self, inputs, context=None):
        """Transforms noise to data."""
        return inputs * self.log_scale.neg().exp()[:, None, None], -self.log_abs_det(inputs)


class WrongChannelScale(ChannelScale):
    """Forgets that there are several pixels."""

    def log_abs_det(self, inputs):
        """Returns the log-determinant of one pixel."""
        return self.log_scale.sum().expand(len(inputs))


@settings(deadline=None)  # busy machines exceed hypothesis' 200 ms
@given(images=strategies.images(CHANNELS))
def test_channel_scale(images):
    """The transform is sound."""
    check_transform(ChannelScale(), images)


@settings(deadline=None)
@given(images=strategies.images(CHANNELS, height=2))
def test_the_mistake_is_found(images):
    """Hypothesis finds it."""
    with pytest.raises(AssertionError, match="Jacobian"):
        check_transform(WrongChannelScale(), images)
