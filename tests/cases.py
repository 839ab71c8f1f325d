"""The table of cases that every property runs over, and a strategy that draws more."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial, wraps
from typing import Any, TypeVar

import oracles
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import SIDES
from torch import Tensor

from nflows_kconv import functional, ops, stencil

CORNERS = ("TL", "TR", "BL", "BR")
CORNERS_3D = ("NTL", "NTR", "NBL", "NBR", "FTL", "FTR", "FBL", "FBR")
STENCILS = {1: ("L", "R"), 2: CORNERS + SIDES, 3: CORNERS_3D}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Views of every kind that a kernel could mistake for contiguous memory, in the shape of the argument. `expanded` gives
# every image the memory of the first one; all others keep the values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda t: t.mT.contiguous().mT,
    "batch_last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "strided": lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, -1)[::2, ::2, ..., ::2],
    "cropped": lambda t: torch.nn.functional.pad(t, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape) if len(t) else t,
}


@dataclass(frozen=True)
class Case:
    """An operator and a batch of images, drawn from the seed on demand."""

    corners: tuple[str, ...] = CORNERS
    per_group: int = 2
    kernel_size: tuple[int, ...] = (3, 3)
    batch: int = 2
    size: tuple[int, ...] = (5, 6)  # of an image
    dilation: int | tuple[int, ...] = 1
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0
    biased: bool = False  # some kernels are compiled with or without a bias

    @property
    def dimensions(self) -> int:
        return len(self.size)

    @property
    def channels(self) -> int:
        return len(self.corners) * self.per_group

    @property
    def unknowns(self) -> int:
        """Unknowns of an image per group."""
        return self.per_group * math.prod(self.size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.batch, self.channels, *self.size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.channels, self.per_group, *self.kernel_size

    @property
    def stencils(self) -> list[int]:
        return stencil.parse(self.corners, self.dimensions)

    @property
    def transposes(self) -> tuple[bool, ...]:
        """Whether the operators take the case directly, so that it has transposes."""
        return (False, True) if self.dimensions > 1 else (False,)

    @property
    def is_plain(self) -> bool:
        """Whether it has contiguous images or volumes in full precision."""
        whole = self.dtype in (torch.float32, torch.float64)
        return self.dimensions > 1 and whole and self.layout == "contiguous"

    @property
    def has_sides(self) -> bool:
        return any(oracles.is_side(name, self.dimensions) for name in self.corners)

    @property
    def steps(self) -> tuple[int, ...]:
        """The dilation, one number per axis."""
        return functional.parse_dilation(self.dilation, self.dimensions)

    @property
    def dilated(self) -> bool:
        return max(self.steps) > 1

    @property
    def conv(self) -> Callable[..., Tensor]:
        """Returns `functional.conv2d` for this case, a function of input, weight and bias."""
        return self._function(f"conv{self.dimensions}d")

    @property
    def inverse(self) -> Callable[..., Tensor]:
        """Returns `functional.conv2d_inverse` for this case."""
        return self._function(f"conv{self.dimensions}d_inverse")

    def operators(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        log_diagonal: Tensor | None = None,
        unit_diagonal: bool = False,
    ) -> Sequence[Callable[..., Tensor]]:
        """Returns the convolution and its inverse as functions of (input, transpose)."""
        arguments = weight, bias, log_diagonal, self.stencils

        def function(operation: ops.Operation, input: Tensor, transpose: bool = False) -> Tensor:
            if transpose:
                operator = {"conv": ops.conv, "solve": ops.solve}[operation]
                return operator(input, *arguments, self.steps, unit_diagonal, True)
            return functional.run(operation, input, *arguments, unit_diagonal, self.steps)

        return partial(function, "conv"), partial(function, "solve")

    def of_channels(self, vector: Tensor) -> Tensor:
        """Reshapes numbers, [C], to broadcast over images."""
        return vector.view(-1, *[1] * self.dimensions)

    def input(self, device: str = "cpu", seed: int = 1) -> Tensor:
        """Returns images of normal noise; another seed gives others."""
        noise = torch.randn(self.input_shape, generator=self._generator(seed), dtype=torch.float64)
        return LAYOUTS[self.layout](noise.to(self.dtype).to(device))

    def weight(self, device: str = "cpu") -> Tensor:
        """Returns a well-conditioned weight with a diagonal of both signs.

        Masked entries are as large as the others, so results that read them are wrong.
        """
        layout = "contiguous" if self.layout == "expanded" else self.layout
        return LAYOUTS[layout](_weight(self).to(self.dtype, copy=True).to(device))

    def bias(self, device: str = "cpu") -> Tensor:
        """Draws normal noise, one number per channel."""
        return torch.randn(self.channels, generator=self._generator(2), dtype=torch.float64).to(self.dtype).to(device)

    def integers(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Returns an input and a weight of small integers with powers of two on the diagonal, exact in float32."""
        generator = self._generator(0)
        input = torch.randint(-3, 4, self.input_shape, generator=generator)
        weight = torch.randint(-1, 2, self.weight_shape, generator=generator)
        diagonal = torch.tensor([-2, -1, 1, 2])[torch.randint(4, (self.channels,), generator=generator)]
        oracles.set_diagonal(weight, self.corners, diagonal)
        return LAYOUTS[self.layout](input.to(self.dtype).to(device)), weight.to(self.dtype).to(device)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis' own way takes as long as many of the calls

    def _function(self, name: str) -> Callable[..., Tensor]:
        return partial(getattr(functional, name), corners=self.corners, dilation=self.dilation)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + stream)


@lru_cache(1024)
def _weight(case: Case) -> Tensor:
    generator = case._generator(0)
    weight = torch.rand(case.weight_shape, generator=generator, dtype=torch.float64) * 2 - 1
    weight *= 0.35 / weight[0].numel() ** 0.5
    size = 0.8 + 0.7 * torch.rand(case.channels, generator=generator, dtype=torch.float64)
    sign = torch.where(torch.rand(case.channels, generator=generator) < 0.5, -1, 1)
    oracles.set_diagonal(weight, case.corners, size * sign)
    return weight


TL, TR, BL, BR = CORNERS
_wide, _tall = dict(size=(1, 300)), dict(size=(300, 1))

# No group has more than MAX_UNKNOWNS unknowns per image, to keep the dense oracles fast.
MAX_UNKNOWNS = 1300
# Numbers at which kernels take another branch; the reference has no such branches, and is slow.
CASES_OF_KERNELS = (
    # Images with many rows or columns, which a kernel cuts into strips
    Case((TL, "B"), per_group=2, kernel_size=(2, 6), batch=64, size=(100, 6), dilation=(40, 1)),
    Case((BR, "L"), per_group=2, kernel_size=(6, 2), batch=64, size=(6, 100), dilation=(1, 40)),
    # Batches and rows around the widths of vectors
    *(Case((TL, BR), per_group=3, batch=batch) for batch in (1, 3, 7, 8, 9, 15, 16, 17, 31, 33)),
    *(Case((TR, BL), per_group=2, batch=batch, size=(4, 3)) for batch in (63, 64, 65, 100, 130, 1030)),
    *(Case((BR, TR), per_group=1, batch=3, size=(16 - i, 16 + i)) for i in (-1, 0, 1)),
    Case((BL,), per_group=1, batch=1, size=(31, 33)),
    Case((TL,), per_group=1, batch=17, size=(33, 17), kernel_size=(2, 3)),
    # Channels
    *(Case((BR, TL), per_group=n, batch=9, size=(4, 5)) for n in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)),
    *(Case((TR,), per_group=n, batch=5, size=(5, 4)) for n in (16, 17, 32, 33)),
    Case((TL,), per_group=128, batch=3, size=(3, 3)),
    Case((BR,), per_group=300, batch=2, size=(1, 1), kernel_size=(2, 2)),
    Case(("T",), per_group=200, batch=2, kernel_size=(2, 5), size=(2, 3)),
    Case((TL, BR) * 20, per_group=1, batch=3),
    # Repeated groups, as for images with their own weights: lanes are images, rows or channels
    Case((TL, "B") * 20, per_group=3, batch=1),
    Case((TR,) * 17, per_group=7, batch=1, kernel_size=(2, 2), dtype=torch.float64),
    Case(("L",) * 9, per_group=12, batch=1, size=(6, 5)),
    Case((BR, TL) * 2, per_group=33, batch=1, kernel_size=(2, 2), size=(3, 3)),
    # Long images
    Case((TL, BR), per_group=2, kernel_size=(3, 3), **_wide),
    Case((TR, BL), per_group=2, kernel_size=(3, 2), **_tall),
    Case((TR, BR), per_group=4, batch=17, kernel_size=(1, 3), **_wide),
)
CASES = (
    Case(),
    *(Case((corner,), per_group=3) for corner in CORNERS),
    # Lists of corners
    Case((TL, BR), per_group=3),
    Case((BR, TL, TL), per_group=2, kernel_size=(2, 3)),
    Case((TR, TR), per_group=4),
    Case((BL, BR, TL, TR, BL), per_group=1),
    Case((TL, TR, BL, BR, BR, BL, TR, TL, TL, TL, TL, BR, BR), per_group=1, kernel_size=(2, 2)),
    # Kernels: 1 x 1, even, oblong, larger than the image
    Case(kernel_size=(1, 1), per_group=5),
    Case(kernel_size=(1, 1), per_group=1),
    Case(kernel_size=(2, 2)),
    Case(kernel_size=(4, 3)),
    Case(kernel_size=(1, 4)),
    Case(kernel_size=(5, 1)),
    Case(kernel_size=(7, 7), per_group=1),
    Case(kernel_size=(9, 4), size=(3, 2)),
    Case(kernel_size=(2, 11), size=(2, 3)),
    # Sizes 0 and 1
    Case(batch=0),
    Case(size=(0, 6)),
    Case(size=(5, 0)),
    Case(batch=0, size=(0, 0)),
    Case(batch=1, size=(1, 1)),
    Case((TL,), per_group=1, batch=1, size=(1, 1), kernel_size=(1, 1)),
    Case(size=(1, 6)),
    Case(size=(5, 1), kernel_size=(4, 4)),
    # Sides: odd, even and 1-wide kernels, larger than the image, mixed with corners
    *(Case((side,), per_group=3) for side in SIDES),
    *(Case(SIDES, kernel_size=size) for size in ((2, 3), (1, 1), (1, 3), (3, 1), (2, 4), (4, 2), (1, 2), (5, 5))),
    Case(SIDES, kernel_size=(6, 9), size=(3, 2), per_group=1),
    Case(SIDES, kernel_size=(2, 8), size=(1, 3)),
    Case(("T", "L", "TR", "B"), batch=9),
    Case(("BL", "R", "R"), kernel_size=(4, 3), dtype=torch.float64),
    Case(("R", "T"), size=(0, 3)),
    Case(("L", "T"), per_group=8, batch=17, layout="channels_last", dtype=torch.float16),
    # One dimension and three
    *(Case((name,), per_group=3, kernel_size=(3,), size=(9,)) for name in STENCILS[1]),
    Case(("R", "L", "R"), kernel_size=(1,), size=(4,), dtype=torch.float64),
    Case(("L", "R"), kernel_size=(6,), size=(5,), batch=9, dtype=torch.bfloat16),
    Case(("L", "R"), kernel_size=(2,), size=(0,)),
    Case(CORNERS_3D, per_group=1, kernel_size=(2, 2, 2), size=(2, 3, 4)),
    Case(("FTR", "NBL"), kernel_size=(3, 1, 2), size=(4, 2, 3), dtype=torch.float64),
    Case(("NBR", "FTL", "FTL"), kernel_size=(1, 3, 2), size=(3, 4, 2), batch=9, dtype=torch.float16),
    Case(("FBR",), per_group=5, kernel_size=(4, 2, 3), size=(2, 1, 5), layout="channels_last"),
    Case(("NTL", "FBR"), kernel_size=(2, 2, 2), size=(0, 2, 3)),
    # Dilation: sizes that it divides, that it does not divide, and smaller sizes
    Case(dilation=2, size=(6, 8)),
    Case(dilation=3, size=(7, 8), dtype=torch.float64),
    Case(dilation=(1, 2), layout="channels_last"),
    Case(dilation=(5, 4), size=(2, 3)),
    Case(dilation=2, size=(0, 5)),
    Case(SIDES, dilation=2, batch=9),
    Case(("T", "R", "BR"), kernel_size=(2, 4), dilation=(3, 2), size=(7, 9), dtype=torch.float16),
    Case(("R", "L"), kernel_size=(3,), size=(11,), dilation=2),
    Case(CORNERS_3D[2:6], per_group=1, kernel_size=(2, 2, 2), size=(3, 5, 4), dilation=(2, 1, 3)),
    Case((TL, "T", "L"), per_group=1, batch=2, size=(35, 18), dilation=(2, 3)),
    # Dtypes and memory layouts
    *(Case(dtype=dtype, batch=9) for dtype in DTYPES[1:]),
    *(Case((BR,), per_group=7, batch=17, dtype=dtype) for dtype in DTYPES[1:]),
    *(Case(layout=layout, batch=3) for layout in LAYOUTS),
    *(Case((TL, BR), batch=19, per_group=3, layout=layout, dtype=torch.float64) for layout in LAYOUTS),
    *(Case((TL,), batch=8, per_group=3, layout=layout, dtype=torch.float16) for layout in LAYOUTS),
    Case(layout="channels_last", batch=1, size=(1, 1)),
    *CASES_OF_KERNELS,
)

_DIMENSIONS = st.sampled_from((2, 2, 2, 2, 1, 3))
_BATCHES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130)
_SIZES = (0, 1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 33)
_KERNEL_SIZES = (1, 2, 3, 4, 5, 7, 12)
_PER_GROUP = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 32, 33)


@st.composite
def cases(draw: st.DrawFn, max_unknowns: int = 400) -> Case:
    """Draws a case with at most this many unknowns per image and group."""
    dimensions = draw(_DIMENSIONS)
    per_group = draw(_up_to(_PER_GROUP, max_unknowns))
    size: tuple[int, ...] = ()
    for _ in range(dimensions):
        size += (draw(_up_to(_SIZES, max_unknowns // (per_group * max(1, math.prod(size))))),)
    return Case(per_group=per_group, size=size, **draw(_others(dimensions)))


@cache  # to make a strategy takes longer than to draw from it
def _others(dimensions: int) -> st.SearchStrategy[dict[str, Any]]:
    kernel_sizes = st.sampled_from(_KERNEL_SIZES[: 3 if dimensions == 3 else None])
    return st.fixed_dictionaries(
        {
            "corners": st.lists(st.sampled_from(STENCILS[dimensions]), min_size=1, max_size=6).map(tuple),
            "kernel_size": st.tuples(*[kernel_sizes] * dimensions),
            "batch": st.sampled_from(_BATCHES),
            "dilation": st.sampled_from((1, 1, 2)) | st.tuples(*[st.sampled_from((1, 2, 3, 7))] * dimensions),
            "dtype": st.sampled_from(DTYPES),
            "layout": st.sampled_from(tuple(LAYOUTS)),
            "seed": st.integers(0, 10**6),
        }
    )


@cache
def _up_to(values: tuple[int, ...], limit: int) -> st.SearchStrategy[int]:
    return st.sampled_from([value for value in values if value <= limit])


Test = TypeVar("Test", bound=Callable[..., None])
Value = TypeVar("Value")


def over_cases(*more: Case) -> Callable[[Test], Test]:
    """Runs a property `test(case, ...)` over the table, more cases and drawn ones."""

    def decorate(test: Test) -> Test:
        @wraps(test)
        def once(case: Case, **others: Any) -> None:
            # One instruction set suffices for strides, half precision, and sequences, which become images before a
            # kernel sees them.
            backend = others.get("backend", others.get("kernel"))
            if backend in ("cpu-baseline", "cpu-avx2") and not case.is_plain:
                return
            if backend == "reference" and case in CASES_OF_KERNELS:
                return
            test(case=case, **others)

        drawn = given(case=cases())(once)

        @wraps(drawn)
        def all_cases(**others: Any) -> None:
            for case in (*CASES, *more):
                once(case=case, **others)
            drawn(**others)

        return all_cases

    return decorate


def one_of(values: Sequence[Value], case: Case, backend: str) -> Value:
    """Returns one of the values: each for a share of the cases, and another for the same case on another backend."""
    # Different modulo 2 and 3 for the reference and the instruction sets that some cases run on alone.
    place = {"reference": 0, "cpu-avx512": 1, "cuda": 2, "cpu-avx2": 5, "cpu-baseline": 5}[backend]
    return values[(zlib.crc32(repr(case).encode()) + place) % len(values)]
