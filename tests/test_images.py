"""Dequantisation, preprocessing, bits per dimension, and pictures."""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.functional import jacobian

from nflows_kconv.flows.images import (
    Affine,
    Logit,
    UniformDequantization,
    bits_per_dim,
    grid,
    importance_weighted_bound,
    to_uint8,
)

LEVELS = (2, 3, 10, 17, 49, 100, 200, 255, 256, 257, 1000, 65535, 65536)
REAL_DTYPES = (torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
PREPROCESSING = {
    "logit": Logit(),
    "logit, large alpha": Logit(0.05),
    "logit, alpha 0": Logit(0),
    "centre": Affine(),
    "affine": Affine(-2.5, 3.0),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=PREPROCESSING.values(), ids=PREPROCESSING)
def preprocessing(request):
    return request.param


def random_images(*shape: int, levels: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(levels, shape).to(dtype)


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


class TestUniformDequantization:
    @given(
        levels=st.sampled_from(LEVELS),
        batch=st.integers(0, 3),
        size=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    def test_round_trip(self, levels, batch, size, dtype, device):
        x = random_images(batch, *size, levels=levels, dtype=dtype).to(device)
        module = UniformDequantization(levels).to(device, dtype)
        y, log_abs_det = module(x)
        restored, inverse_log_abs_det = module.inverse(y)
        assert y.dtype == restored.dtype == log_abs_det.dtype == dtype
        assert y.shape == x.shape and log_abs_det.shape == inverse_log_abs_det.shape == (batch,)
        assert torch.equal(restored, x)
        if dtype == torch.float64:
            torch.testing.assert_close(log_abs_det, -inverse_log_abs_det, rtol=1e-7, atol=1e-5)

    @pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
    @pytest.mark.parametrize("levels", LEVELS)
    def test_extreme_noise_stays_in_its_cell(self, levels, draw, monkeypatch):
        x = torch.arange(levels).view(1, 1, 1, -1).float()
        module = UniformDequantization(levels)
        monkeypatch.setattr(torch, "rand_like", lambda input: torch.full_like(input, draw))
        y, _ = module(x)
        assert 0 < y.min() and y.max() < 1
        exact = y.double() * levels
        assert (exact > x.double()).all() and (exact < x.double() + 1).all()
        assert torch.equal(module.inverse(y)[0], x)

    @pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
    def test_dtypes(self, dtype):
        x = random_images(2, 3, 4, 4, levels=100, dtype=dtype)
        y, log_abs_det = UniformDequantization(100)(x)
        assert y.dtype == log_abs_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal((100 * y).floor(), x.to(y.dtype))

    def test_booleans_are_two_levels(self):
        x = torch.tensor([True, False]).view(1, 1, 1, 2)
        y, _ = UniformDequantization(2)(x)
        assert torch.equal(y >= 0.5, x)

    def test_inverse_clamps(self):
        y = torch.tensor([-1e9, -1e-3, 0, 0.1, 0.999, 1, 2, math.inf, -math.inf, math.nan]).view(1, 1, 1, -1)
        x, log_abs_det = UniformDequantization(10).inverse(y[..., :-1])
        assert log_abs_det.isfinite().all()
        assert x.flatten().tolist() == [0, 0, 0, 1, 9, 9, 9, 9, 0]
        assert UniformDequantization(10).inverse(y)[0].flatten()[-1].isnan()

    def test_compiles_and_maps(self):
        module, x = UniformDequantization(), random_images(4, 3, 6, 6)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.manual_seed(1)
        expected = module(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)

        def loss(image):
            y, log_abs_det = module(image[None])
            return y.sum() + log_abs_det.sum()

        assert torch.vmap(loss, randomness="different")(x).shape == (4,)
        gradients = torch.vmap(torch.func.grad(loss), randomness="different")(x)
        assert gradients.shape == x.shape

    def test_meta(self):
        y, log_abs_det = UniformDequantization().to("meta")(torch.empty(2, 3, 4, 6, device="meta"))
        assert y.device.type == log_abs_det.device.type == "meta"
        assert y.shape == (2, 3, 4, 6) and log_abs_det.shape == (2,)

    def test_code_for_a_gpu_checks_values(self):
        """What would run on a GPU can be seen without one."""
        with FakeTensorMode():
            x = torch.empty(2, 3, 4, 6, device="cuda")
            assert UniformDequantization()(x)[0].device.type == "cuda"
            program = torch.export.export(UniformDequantization(), (x,))
        assert "_assert_async" in program.graph_module.code

    def test_new_noise_at_each_call(self):
        module, x = UniformDequantization(), random_images(2, 3, 4, 4)
        assert not torch.equal(module(x)[0], module(x)[0])

    @pytest.mark.parametrize("value", [-1.0, 256.0, 1e9, 0.5, 254.5, math.nan, math.inf])
    def test_values(self, value):
        x = torch.zeros(2, 1, 3, 3)
        x[1, 0, 2, 0] = value
        with pytest.raises(ValueError, match=rf"whole numbers in 0\.\.255, got {value}"):
            UniformDequantization()(x)
        with pytest.raises(ValueError, match=r"whole numbers in 0\.\.9, got 10"):
            UniformDequantization(10)(torch.full((1, 1, 1, 1), 10))

    def test_the_first_batch_is_looked_at_where_looking_waits(self, monkeypatch, device):
        if device == "cpu":
            monkeypatch.setattr("nflows_kconv.checks.can_inspect_values", lambda tensor: False)  # as on a GPU
        module, wrong = UniformDequantization(), torch.full((3, 1, 2, 2), 0.5, device=device)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"whole numbers in 0\.\.255, got 0\.5"):
                module(wrong)
        module(2 * wrong.ceil())
        module(wrong)  # a second check would synchronize again

    def test_images_of_0_and_1_alone_get_a_warning(self, recwarn):
        x = random_images(2, 1, 4, 4, levels=2)
        for silent, levels in ((x.byte(), 256), (x, 2), (0 * x, 256), (x + 1, 256), (x[:0], 256)):
            UniformDequantization(levels)(silent)
        assert not recwarn
        with pytest.warns(UserWarning, match=r"only 0 and 1 .* scaled to 0\.\.1, multiply by 255"):
            UniformDequantization()(x)

    def test_images_in_0_to_1_get_a_hint(self):
        with pytest.raises(ValueError, match=r"got 0\.25; multiply images in 0\.\.1 by 255 and round"):
            UniformDequantization()(torch.full((1, 1, 1, 1), 0.25))

    def test_arguments(self):
        module = UniformDequantization()
        for function in (module, module.inverse):
            with pytest.raises(ValueError, match=r"4 dimensions \[B, C, H, W\], got shape \(3, 4, 4\)"):
                function(torch.zeros(3, 4, 4))
            with pytest.raises(TypeError, match="must be a tensor, got ndarray"):
                function(np.zeros((1, 3, 4, 4)))
            with pytest.raises(TypeError, match=r"must be real, got torch\.complex64"):
                function(torch.zeros(1, 3, 4, 4, dtype=torch.complex64))
        with pytest.raises(TypeError, match=r"must be floating-point, got torch\.uint8"):
            module.inverse(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            (dict(levels=1), ValueError, "levels must be between 2 and 65536, got 1"),
            (dict(levels=0), ValueError, "levels must be at least 1, got 0"),
            (dict(levels=65537), ValueError, "levels must be between 2 and 65536, got 65537"),
            (dict(levels=256.0), TypeError, r"levels must be an integer, got 256\.0"),
            (dict(levels=True), TypeError, "levels must be an integer, got True"),
        ],
    )
    def test_constructors(self, arguments, error, match):
        with pytest.raises(error, match=match):
            UniformDequantization(**arguments)

    def test_levels_of_numpy(self):
        y, _ = UniformDequantization(np.int64(256))(random_images(1, 1, 2, 2))
        assert y.max() < 1

    @pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
    def test_values_under_compile_and_export(self, compiler):
        module, wrong = UniformDequantization(), torch.full((3, 1, 2, 2), 0.5)
        exported = torch.export.export(module, (torch.ones(2, 1, 2, 2),), dynamic_shapes=({0: torch.export.Dim("B")},))
        for call in (torch.compile(module, backend=compiler, fullgraph=True), exported.module()):
            assert call(wrong.ceil())[0].shape == wrong.shape
            with pytest.raises(RuntimeError, match=r"whole numbers in 0\.\.255"):
                call(wrong)
        mapped = torch.vmap(lambda image: module(image[None])[0], randomness="different")
        # Nothing can be checked under vmap.
        assert torch.compile(mapped, backend=compiler)(wrong).shape == (3, 1, 1, 2, 2)

    def test_middle(self):
        x = random_images(2, 1, 4, 4, levels=7)
        module = UniformDequantization(7)
        y, log_abs_det = module.middle(x)
        torch.testing.assert_close(y, (x + 0.5) / 7)
        assert torch.equal(log_abs_det, module(x)[1]) and torch.equal(module.inverse(y)[0], x)
        with pytest.raises(ValueError, match=r"whole numbers in 0\.\.6, got 0\.5"):
            module.middle(torch.full((1, 1, 1, 1), 0.5))

    def test_noise_that_is_given_is_that_which_would_be_drawn(self):
        module, x = UniformDequantization(), random_images(2, 1, 4, 4)
        torch.manual_seed(1)
        drawn = module(x)
        torch.manual_seed(1)
        assert all(map(torch.equal, module.with_noise(x, torch.rand_like(x)), drawn))

    def test_noise_is_uniform(self, device):
        x = torch.tensor([0.0, 1.0, 128.0, 255.0], device=device).view(1, 4, 1, 1).expand(5000, 4, 2, 1)
        y, _ = UniformDequantization()(x)
        noise = as_numpy(256 * y - x)
        for channel in range(4):
            assert scipy.stats.kstest(noise[:, channel].ravel(), "uniform").pvalue > 1e-3
        correlations = np.corrcoef(noise.reshape(5000, -1), rowvar=False) - np.eye(8)
        assert np.abs(correlations).max() < 5 / 5000**0.5

    def test_log_abs_det(self):
        x = random_images(2, 1, 2, 3, levels=17, dtype=torch.float64)
        module = UniformDequantization(17)
        matrix = jacobian(lambda x: module(x)[0], x).reshape(2, 6, 2, 6)
        expected = torch.stack([matrix[n, :, n].slogdet().logabsdet for n in range(2)])
        torch.testing.assert_close(module(x)[1], expected)
        torch.testing.assert_close(module.inverse(x / 17)[1], -expected)

    def test_nothing_to_save(self):
        assert not UniformDequantization().state_dict()


class TestPreprocessing:
    @given(
        batch=st.integers(0, 3),
        size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    def test_round_trip(self, preprocessing, batch, size, dtype, device):
        x = torch.rand(batch, *size, dtype=dtype, device=device).clamp(1e-6, 1 - 1e-6)
        y, log_abs_det = preprocessing(x)
        restored, inverse_log_abs_det = preprocessing.inverse(y)
        assert y.dtype == restored.dtype == log_abs_det.dtype == dtype
        assert log_abs_det.shape == inverse_log_abs_det.shape == (batch,)
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(restored, x, rtol=0, atol=tolerance)
        torch.testing.assert_close(inverse_log_abs_det, -log_abs_det, rtol=tolerance, atol=1e6 * tolerance)

    def test_log_abs_det(self, preprocessing):
        x = torch.rand(2, 1, 2, 3, dtype=torch.float64)
        y, log_abs_det = preprocessing(x)
        for function, input, actual in (
            (preprocessing, x, log_abs_det),
            (preprocessing.inverse, y, preprocessing.inverse(y)[1]),
        ):
            matrix = jacobian(lambda input, function=function: function(input)[0], input).reshape(2, 6, 2, 6)
            expected = torch.stack([matrix[n, :, n].slogdet().logabsdet for n in range(2)])
            torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("alpha", [1e-6, 0.05])
    def test_logit_near_the_ends(self, alpha):
        """float32 agrees with float64 at 0, at 1 and as near as float32 gets."""
        x = torch.tensor([0, 1e-45, 2**-24, 1e-6, 1e-3, 0.5, 0.999, 1 - 1e-6, 1 - 2**-24, 1.0])[:, None]
        y, log_abs_det = Logit(alpha)(x)
        exact = x.double()
        expected, expected_log_abs_det = Logit(alpha)(exact)
        scipy_logit = scipy.special.logit(alpha + (1 - 2 * alpha) * as_numpy(x))
        np.testing.assert_allclose(as_numpy(expected), scipy_logit, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_abs_det.double(), expected_log_abs_det, rtol=1e-6, atol=1e-6)
        restored, inverse_log_abs_det = Logit(alpha).inverse(y)
        torch.testing.assert_close(restored, x, rtol=0, atol=2e-7)
        torch.testing.assert_close(inverse_log_abs_det, -log_abs_det, rtol=1e-6, atol=1e-6)

    def test_logit_of_any_latent(self):
        """Samples may be any real numbers."""
        y = torch.tensor([[-1e6, -200.0, 0.0, 200.0, 1e6]]).T.requires_grad_()
        x, log_abs_det = Logit().inverse(y)
        torch.testing.assert_close(x.detach(), torch.tensor([[0.0, 0, 0.5, 1, 1]]).T, rtol=0, atol=2e-6)
        torch.testing.assert_close(log_abs_det.detach(), -y.detach().abs()[:, 0], rtol=1e-3, atol=1.5)
        (x.sum() + log_abs_det.sum()).backward()
        assert y.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision(self, preprocessing, dtype):
        """It is computed in float32 and rounded once."""
        x = (torch.randint(1, 128, (2, 1, 200, 100)) / 128).to(dtype)
        for function, input in ((preprocessing, x), (preprocessing.inverse, preprocessing(x)[0])):
            output, log_abs_det = function(input)
            expected, expected_log_abs_det = function(input.float())
            assert output.dtype == dtype and log_abs_det.dtype == torch.float32
            assert torch.equal(output, expected.to(dtype))
            torch.testing.assert_close(log_abs_det, expected_log_abs_det)

    def test_arguments(self):
        for alpha in (-1e-9, 0.5, 1.0, math.nan):
            with pytest.raises(ValueError, match=f"alpha must be at least 0 and below 1/2, got {alpha}"):
                Logit(alpha)
        for function in (Logit(), Logit().inverse, Affine(2, 1), Affine(2, 1).inverse):
            with pytest.raises(TypeError, match=r"input must be a floating-point tensor, got torch\.int64"):
                function(torch.tensor([[0, 1]]))
            with pytest.raises(TypeError, match="input must be a tensor, got list"):
                function([0.5])
            with pytest.raises(ValueError, match=r"input must have the dimensions \[B, \.\.\.\], got shape \(\)"):
                function(torch.tensor(0.5))
            assert function(torch.tensor([0.25, 0.5]))[1].shape == (2,)
        for scale, shift in ((0, 0), (math.inf, 0), (math.nan, 0), (1, math.nan), (1, -math.inf)):
            with pytest.raises(ValueError, match=f"scale not 0, got scale {scale} and shift {shift}"):
                Affine(scale, shift)


class Categorical:
    """Independent pixels with known probabilities, as a density of y that is constant on each cell.

    Attributes:
        probabilities: [levels, C, H, W].
    """

    def __init__(self, levels, *size):
        logits = torch.randn(levels, *size, dtype=torch.float64)
        self.levels, self.size, self.probabilities = levels, size, logits.softmax(0)

    def log_prob(self, x):
        """Returns the log-probability of whole numbers, [B]."""
        return self.probabilities.gather(0, x.long()).log().flatten(1).sum(1)

    def log_density(self, y):
        """Returns the log-density of numbers in [0, 1), [B]."""
        return self.log_prob((self.levels * y).floor()) + y[0].numel() * math.log(self.levels)

    def entropy(self):
        """Returns the entropy in bits per dimension."""
        return scipy.stats.entropy(self.probabilities.numpy(), base=2, axis=0).mean()

    def images(self):
        """Returns all possible images."""
        values = itertools.product(range(self.levels), repeat=math.prod(self.size))
        return torch.tensor(list(values), dtype=torch.float64).view(-1, *self.size)


class TestBitsPerDim:
    @pytest.mark.parametrize("steps", [(), ("logit",), ("affine", "logit, large alpha", "centre")], ids=str)
    def test_known_entropy(self, steps):
        """The expectation over all images is the entropy, through any preprocessing."""
        model = Categorical(4, 2, 1, 2)
        dequantization = UniformDequantization(4)
        # These keep the ends of [0, 1] inside.
        preprocessing = [PREPROCESSING[name] if name != "affine" else Affine(0.9, 0.05) for name in steps]

        def log_density_of_latent(z):
            # The density of the latent: the known density of y times |dy/dz| by autograd.
            z = z.detach().requires_grad_()
            y = z
            for module in reversed(preprocessing):
                y, _ = module.inverse(y)
            derivative = torch.autograd.grad(y.sum(), z)[0] if preprocessing else torch.ones_like(z)
            return model.log_density(y.detach()) + derivative.log().flatten(1).sum(1)

        x = model.images()
        z, log_prob = dequantization(x)
        for module in preprocessing:
            z, log_abs_det = module(z)
            log_prob = log_prob + log_abs_det
        log_prob = log_prob + log_density_of_latent(z)
        torch.testing.assert_close(log_prob, model.log_prob(x))
        bits = bits_per_dim(log_prob, model.size)
        assert (bits * model.log_prob(x).exp()).sum().item() == pytest.approx(model.entropy())

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
    def test_guessing_takes_eight_bits(self, dtype):
        """The density 1 on [0, 1)."""
        _, log_prob = UniformDequantization()(random_images(5, 3, 32, 32, dtype=dtype))
        torch.testing.assert_close(bits_per_dim(log_prob, (3, 32, 32)), torch.full_like(log_prob, 8.0))

    def test_arguments(self):
        log_prob = torch.zeros(2)
        with pytest.raises(ValueError, match=r"\(C, H, W\), got \(2, 3, 4, 4\)"):
            bits_per_dim(log_prob, (2, 3, 4, 4))
        with pytest.raises(ValueError, match="height must be at least 1, got 0"):
            bits_per_dim(log_prob, torch.Size([3, 0, 4]))
        with pytest.raises(TypeError, match=r"channels must be an integer, got 3\.0"):
            bits_per_dim(log_prob, (3.0, 4, 4))


class TestImportanceWeightedBound:
    def test_mean_of_probabilities(self):
        """Also if the probabilities are below the smallest float."""
        samples = torch.tensor([-1e5, 3.0, -math.inf]) + 10 * torch.randn(7, 3)
        calls = iter(samples)
        actual = importance_weighted_bound(lambda images: next(calls), torch.zeros(3, 1, 1, 1), 7)
        expected = scipy.special.logsumexp(as_numpy(samples), axis=0) - math.log(7)
        np.testing.assert_allclose(as_numpy(actual), expected, rtol=1e-6)

    def test_no_gradient(self):
        seen = []

        def log_prob(images):
            seen.append(torch.is_grad_enabled())
            return images.flatten(1).sum(1)

        x = torch.zeros(2, 1, 2, 2, requires_grad=True)
        assert not importance_weighted_bound(log_prob, x, 3).requires_grad
        assert seen == [False] * 3

    def test_arguments(self):
        x, log_prob = torch.zeros(2, 1, 2, 2), lambda images: images.flatten(1).sum(1)
        with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
            importance_weighted_bound(log_prob, x, 0)
        with pytest.raises(TypeError, match=r"num_samples must be an integer, got 2\.0"):
            importance_weighted_bound(log_prob, x, 2.0)
        with pytest.raises(ValueError, match=r"one number per image, \[2\], got \(\)"):
            importance_weighted_bound(lambda images: images.mean(), x, 1)
        with pytest.raises(ValueError, match=r"\[B, C, H, W\], got shape \(1, 2, 2\)"):
            importance_weighted_bound(log_prob, x[0], 1)


class TestPictures:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_rounds_and_clamps(self, dtype):
        values = torch.tensor(
            [-math.inf, -3, -0.2, 0.4, 0.6, 127.3, 254.6, 255.2, 300, math.inf, math.nan], dtype=dtype
        )
        exact = values.double()
        expected = [round(min(max(value, 0), 255)) if value == value else 0 for value in exact.tolist()]
        assert to_uint8(values).dtype == torch.uint8
        assert to_uint8(values).tolist() == expected

    def test_a_pair_is_no_tensor(self):
        with pytest.raises(TypeError, match="images must be a tensor, got tuple"):
            to_uint8((torch.zeros(3), torch.zeros(1)))

    def test_integers(self):
        assert to_uint8(torch.tensor([-5, 7, 300])).tolist() == [0, 7, 255]
        every = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(to_uint8(every), every)

    @given(
        count=st.integers(1, 7),
        columns=st.integers(1, 8),
        size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    )
    def test_grid(self, count, columns, size):
        images = random_images(count, *size) + 0.3
        channels, height, width = size
        rows = -(-count // columns)
        expected = np.zeros((channels, rows * (height + 2) + 2, columns * (width + 2) + 2), np.uint8)
        for index in range(count):
            top, left = 2 + index // columns * (height + 2), 2 + index % columns * (width + 2)
            expected[:, top : top + height, left : left + width] = images[index].numpy().astype(np.uint8)
        picture = grid(images, columns)
        assert picture.dtype == torch.uint8
        np.testing.assert_array_equal(picture.numpy(), expected)

    def test_arguments(self):
        with pytest.raises(ValueError, match=r"at least one image, got shape \(0, 1, 2, 2\)"):
            grid(torch.zeros(0, 1, 2, 2), 3)
        with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
            grid(torch.zeros(1, 1, 2, 2), 0)
        with pytest.raises(ValueError, match=r"\[B, C, H, W\], got shape \(1, 2, 2\)"):
            grid(torch.zeros(1, 2, 2), 1)
