"""Property tests of a transform of your own, with `nflows_kconv.testing`.

    pytest examples/test_your_transform.py

hypothesis draws the images; `check_transform` compares round trips, log-determinants and gradients with what they must
be. The second test shows how a mistake is found: one wrong factor, and an image of one pixel would not show it.
"""

import pytest
import torch
from hypothesis import given, settings
from nflows.transforms import Transform
from torch import nn

from nflows_kconv.testing import check_transform, strategies

CHANNELS = 3


class ChannelScale(Transform):
    """y = exp(log_scale) x, with one scale for each channel."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(0.1 * torch.randn(CHANNELS))

    def log_abs_det(self, inputs):
        """Every pixel has the determinant of its channels."""
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
        """Returns that of one pixel."""
        return self.log_scale.sum().expand(len(inputs))


@settings(deadline=None)  # busy machines take longer than the 200 ms that hypothesis allows
@given(images=strategies.images(CHANNELS))
def test_channel_scale(images):
    """The transform is sound."""
    check_transform(ChannelScale(), images)


@settings(deadline=None)
@given(images=strategies.images(CHANNELS, height=2))
def test_the_mistake_is_found(images):
    """Hypothesis finds it whatever the images are."""
    with pytest.raises(AssertionError, match="Jacobian"):
        check_transform(WrongChannelScale(), images)
