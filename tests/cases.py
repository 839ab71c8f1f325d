"""The one table of cases that every property runs over, and the strategy that draws more of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import oracles
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

CORNERS = ("TL", "TR", "BL", "BR")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Views of every kind that a kernel could take for contiguous memory, each of the shape of its argument. `expanded`
# gives every image the memory of the first one, all others keep the values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "batch_last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "strided": lambda t: t.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 3)[::2, ::2, :, ::2],
    "cropped": lambda t: torch.nn.functional.pad(t, (1, 2, 2, 1))[:, :, 2:-1, 1:-2],
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape) if len(t) else t,
}


@dataclass(frozen=True)
class Case:
    """An operator and a batch of images for it, drawn from the seed on demand."""

    corners: tuple[str, ...] = CORNERS
    per_group: int = 2
    kernel_size: tuple[int, int] = (3, 3)
    batch: int = 2
    height: int = 5
    width: int = 6
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0
    biased: bool = False  # for what is compiled with or without a bias

    @property
    def channels(self) -> int:
        return len(self.corners) * self.per_group

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.channels, self.per_group, *self.kernel_size

    def input(self, device: str = "cpu", seed: int = 1) -> Tensor:
        """Images of normal noise; another seed gives others."""
        noise = torch.randn(self.input_shape, generator=self._generator(seed), dtype=torch.float64)
        return LAYOUTS[self.layout](noise.to(self.dtype).to(device))

    def weight(self, device: str = "cpu") -> Tensor:
        """A well-conditioned weight with a diagonal of both signs.

        Its masked entries are as large as the others, so that a result that reads them is wrong.
        """
        generator = self._generator(0)
        weight = torch.rand(self.weight_shape, generator=generator, dtype=torch.float64) * 2 - 1
        weight *= 0.35 / (self.per_group * self.kernel_size[0] * self.kernel_size[1]) ** 0.5
        size = 0.8 + 0.7 * torch.rand(self.channels, generator=generator, dtype=torch.float64)
        sign = torch.where(torch.rand(self.channels, generator=generator) < 0.5, -1, 1)
        oracles.set_diagonal(weight, self.corners, size * sign)
        layout = "contiguous" if self.layout == "expanded" else self.layout
        return LAYOUTS[layout](weight.to(self.dtype).to(device))

    def bias(self, device: str = "cpu") -> Tensor:
        """Normal noise, one number for each channel."""
        return torch.randn(self.channels, generator=self._generator(2), dtype=torch.float64).to(self.dtype).to(device)

    def integers(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """An input and a weight of small integers, the diagonal of powers of two: float32 computes them exactly."""
        generator = self._generator(0)
        input = torch.randint(-3, 4, self.input_shape, generator=generator)
        weight = torch.randint(-1, 2, self.weight_shape, generator=generator)
        diagonal = torch.tensor([-2, -1, 1, 2])[torch.randint(4, (self.channels,), generator=generator)]
        oracles.set_diagonal(weight, self.corners, diagonal)
        return LAYOUTS[self.layout](input.to(self.dtype).to(device)), weight.to(self.dtype).to(device)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + stream)


TL, TR, BL, BR = CORNERS
_wide, _tall = dict(height=1, width=300), dict(height=300, width=1)

# No group has more than MAX_UNKNOWNS unknowns an image, so that the dense oracles stay quick.
MAX_UNKNOWNS = 1300
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
    Case(kernel_size=(9, 4), height=3, width=2),
    Case(kernel_size=(2, 11), height=2, width=3),
    # Sizes 0 and 1
    Case(batch=0),
    Case(height=0),
    Case(width=0),
    Case(batch=0, height=0, width=0),
    Case(batch=1, height=1, width=1),
    Case((TL,), per_group=1, batch=1, height=1, width=1, kernel_size=(1, 1)),
    Case(height=1),
    Case(width=1, kernel_size=(4, 4)),
    # Batches and rows about the widths of vectors
    *(Case((TL, BR), per_group=3, batch=batch) for batch in (1, 3, 7, 8, 9, 15, 16, 17, 31, 33)),
    *(Case((TR, BL), per_group=2, batch=batch, height=4, width=3) for batch in (63, 64, 65, 100, 130, 1030)),
    *(Case((BR, TR), per_group=1, batch=3, height=16 - i, width=16 + i) for i in (-1, 0, 1)),
    Case((BL,), per_group=1, batch=1, height=31, width=33),
    Case((TL,), per_group=1, batch=17, height=33, width=17, kernel_size=(2, 3)),
    # Channels
    *(Case((BR, TL), per_group=n, batch=9, height=4, width=5) for n in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)),
    *(Case((TR,), per_group=n, batch=5, height=5, width=4) for n in (16, 17, 32, 33)),
    Case((TL,), per_group=128, batch=3, height=3, width=3),
    Case((BR,), per_group=1024, batch=2, height=1, width=1, kernel_size=(2, 2)),
    Case((TL, BR) * 64, per_group=1, batch=3),
    # Long images
    Case((TL, BR), per_group=2, kernel_size=(3, 3), **_wide),
    Case((TR, BL), per_group=2, kernel_size=(3, 2), **_tall),
    Case((TR, BR), per_group=4, batch=17, kernel_size=(1, 3), **_wide),
    # Dtypes and memory layouts
    *(Case(dtype=dtype, batch=9) for dtype in DTYPES[1:]),
    *(Case((BR,), per_group=7, batch=17, dtype=dtype) for dtype in DTYPES[1:]),
    *(Case(layout=layout, batch=3) for layout in LAYOUTS),
    *(Case((TL, BR), batch=19, per_group=3, layout=layout, dtype=torch.float64) for layout in LAYOUTS),
    *(Case((TL,), batch=8, per_group=3, layout=layout, dtype=torch.float16) for layout in LAYOUTS),
    Case(layout="channels_last", batch=1, height=1, width=1),
)

_BATCHES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130)
_SIDES = (0, 1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 33)
_KERNEL_SIDES = st.sampled_from((1, 2, 3, 4, 5, 7, 12))
_PER_GROUP = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 32, 33)


@st.composite
def cases(draw: st.DrawFn, max_unknowns: int = 400) -> Case:
    """Any case with at most this many unknowns an image in each group."""
    per_group = draw(_up_to(_PER_GROUP, max_unknowns))
    height = draw(_up_to(_SIDES, max_unknowns // per_group))
    width = draw(_up_to(_SIDES, max_unknowns // (per_group * max(1, height))))
    return Case(
        corners=tuple(draw(st.lists(st.sampled_from(CORNERS), min_size=1, max_size=6))),
        per_group=per_group,
        kernel_size=draw(st.tuples(_KERNEL_SIDES, _KERNEL_SIDES)),
        batch=draw(st.sampled_from(_BATCHES)),
        height=height,
        width=width,
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(tuple(LAYOUTS))),
        seed=draw(st.integers(0, 10**6)),
    )


Test = TypeVar("Test", bound=Callable[..., None])


def over_cases(*more: Case) -> Callable[[Test], Test]:
    """Runs a property `test(case, ...)` over the table, over more cases, and over drawn ones."""

    def decorate(test: Test) -> Test:
        for case in (*CASES, *more):
            test = example(case=case)(test)
        return given(case=cases())(test)

    return decorate


def _up_to(values: tuple[int, ...], limit: int) -> st.SearchStrategy[int]:
    return st.sampled_from([value for value in values if value <= limit])
