"""The strategies draw what they promise, pass the assertions, and shrink to small cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nflows.transforms as nt
import oracles
import pytest
import torch
from hypothesis import Phase, example, find, given, settings
from hypothesis import strategies as st

import nflows_kconv.nflows
import nflows_kconv.normflows
from nflows_kconv import InvertibleConv2d, functional, testing
from nflows_kconv.testing import strategies

NAMES = ("TL", "TR", "BL", "BR", "T", "B", "L", "R")


@given(pictures=strategies.images(), exact=strategies.images(channels=3, batch=2, height=5, width=1, dtype=torch.uint8))
def test_images(pictures: torch.Tensor, exact: torch.Tensor):
    assert pictures.dtype == torch.float32
    assert all(1 <= size <= most for size, most in zip(pictures.shape, (3, 8, 6, 6), strict=True))
    assert (pictures.std((0, 2, 3)) > 0).all()
    assert (exact.shape, exact.dtype) == ((2, 3, 5, 1), torch.uint8)


@given(names=strategies.corners(), three=strategies.corners(3), size=strategies.kernel_sizes(5))
def test_corners_and_kernel_sizes(names: tuple[str, ...], three: tuple[str, ...], size: tuple[int, int]):
    assert 1 <= len(names) <= 4 and len(three) == 3
    assert set(names + three) <= set(NAMES)
    assert all(1 <= side <= 5 for side in size)


def amplification(weight: torch.Tensor, corners: tuple[str, ...], side: int) -> float:
    """Returns the maximum norm of the inverse."""
    matrices = oracles.matrices(weight, corners, (side, side))
    return max(torch.linalg.inv(matrix).abs().sum(1).max().item() for matrix in matrices)


@given(data=st.data(), corners=strategies.corners(), side=st.integers(1, 5))
def test_well_conditioned_weights_amplify_little(data: st.DataObject, corners: tuple[str, ...], side: int):
    weight = data.draw(strategies.weights("well", corners=corners))
    assert weight.shape[0] == weight.shape[1] * len(corners)
    for matrix in oracles.matrices(weight, corners, (side, side)):
        diagonal = matrix.diagonal().abs()
        assert (diagonal >= 0.5).all()
        assert (matrix.abs().sum(1) <= 1.5 * diagonal + 1e-6).all()  # so the inverse amplifies at most 4 times


@given(weight=strategies.weights("ill", corners=("TL",), per_group=2, kernel_size=(2, 2)))
def test_ill_conditioned_weights_amplify_more_the_larger_the_image(weight: torch.Tensor):
    by_side = [amplification(weight, ("TL",), side) for side in (1, 4, 8)]
    assert by_side[2] > 5 * by_side[1] > 10 * by_side[0]


def test_another_conditioning_is_refused():
    with pytest.raises(ValueError, match='conditioning must be "well" or "ill", got \'bad\''):
        any_of(strategies.weights("bad"))


@settings(max_examples=8)
@given(
    layer=st.one_of(
        strategies.layers(channels=4),
        strategies.layers(nflows_kconv.nflows.InvertibleConv2d, conditioning="ill", channels=4),
        strategies.layers(nflows_kconv.normflows.InvertibleConv2d, conditioning="ill", channels=4, dtype=torch.float64),
    ),
    images=strategies.images(channels=4, height=3),
)
def test_layers_pass(layer: InvertibleConv2d, images: torch.Tensor):
    testing.check_transform(layer, images.to(layer.raw_weight.dtype))


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated", "ignore:torch.triangular_solve is deprecated")
@settings(max_examples=5)
@example(images=strategies.noise((2, 4, 1, 1), 0))  # the smallest draw
@given(images=strategies.images(channels=4, width=1))
def test_drawn_images_initialise_the_act_norm_of_a_step(images: torch.Tensor):
    layers = [nflows_kconv.nflows.InvertibleConv2d(4), nt.ActNorm(4), nt.OneByOneConvolution(4)]
    testing.check_transform(nt.CompositeTransform(layers), images)


@given(layer=strategies.layers(channels=6))
def test_layers_have_the_conditioning_of_their_weights(layer: InvertibleConv2d):
    assert amplification(layer.weight.detach(), layer.corners, 4) <= 4 + 1e-4


@settings(max_examples=3)
@given(
    flow=st.sampled_from([nflows_kconv.nflows.finc_flow, nflows_kconv.normflows.finc_flow]).flatmap(strategies.flows),
    images=strategies.images(1, height=4, width=4, dtype=torch.uint8),
)
def test_flows_pass(flow: torch.nn.Module, images: torch.Tensor):
    testing.assert_invertible(flow, images)
    testing.assert_log_dets_cancel(flow, images)
    testing.assert_batch_independent(flow, images)


def any_of(strategy: st.SearchStrategy) -> Any:
    """Returns the first draw, not shrunk."""
    return find(strategy, lambda _: True, settings=settings(database=None, phases=[Phase.generate]))


def test_drawing_leaves_torchs_random_numbers_as_they_are():
    state = torch.get_rng_state()
    any_of(strategies.flows(nflows_kconv.nflows.finc_flow))
    any_of(strategies.layers())
    assert torch.equal(torch.get_rng_state(), state)


def smallest(strategy: st.SearchStrategy, condition: Callable[[Any], bool]) -> Any:
    """Returns the shrunk example, without using earlier runs."""
    return find(strategy, condition, settings=settings(database=None, max_examples=1000))


def test_cases_shrink_to_small_ones():
    assert smallest(strategies.images(), lambda images: True).shape == (2, 1, 1, 1)
    assert smallest(strategies.images(), lambda images: images.shape[3] > 2 * len(images)).shape == (1, 1, 1, 3)
    assert smallest(strategies.corners(), lambda corners: "BR" in corners) == ("BR",)
    assert smallest(strategies.kernel_sizes(), lambda size: size[0] > size[1]) == (2, 1)
    assert smallest(strategies.weights(corners=("TL",)), lambda weight: weight[0, 0, 0, 0] < 0).shape == (1, 1, 1, 1)
    layer = smallest(strategies.layers(), lambda layer: layer.bias is not None and layer.kernel_size[1] > 1)
    assert repr(layer).startswith("InvertibleConv2d(1, kernel_size=(1, 2), corners=('TL',), diagonal='unit', bias=True")
    images = smallest(
        strategies.images(1, height=2), lambda images: functional.conv2d_inverse(images, WEIGHT, corners="TL").max() > 5
    )
    assert images.shape == (1, 1, 2, 1)


WEIGHT = torch.tensor([[[[0.1]]]])


def test_a_failure_names_what_was_drawn_as_code():
    @settings(database=None)
    @given(images=strategies.images(2), weight=strategies.weights(corners=("TL",), per_group=3))
    def test(images: torch.Tensor, weight: torch.Tensor):
        raise AssertionError

    with pytest.raises(AssertionError) as failure:
        test()
    note = "\n".join(failure.value.__notes__)
    for code in ("images=noise((2, 2, 1, 1), 0)", "weight=weight('well', ('TL',), 3, (1, 1), 0, torch.float32)"):
        assert code in note
    assert "tensor(" not in note


def test_profiles_differ_in_depth(monkeypatch: pytest.MonkeyPatch):
    loaded = settings.get_current_profile_name()
    try:
        for environment, profile in ({"CI": "1"}, "ci"), ({}, "default"):
            monkeypatch.delenv("CI", raising=False)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            testing.register_profiles()
            assert settings.get_current_profile_name() == profile
    finally:
        settings.load_profile(loaded)
    assert settings.get_profile("ci").derandomize and settings.get_profile("ci").print_blob
    assert settings.get_profile("thorough").max_examples > 10 * settings.get_profile("default").max_examples
