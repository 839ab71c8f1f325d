"""Draws docs/images/layer.png: how the layer reads, how its inverse runs, why its log-determinant is one line."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

from nflows_kconv import InvertibleConv2d

BLUE, ORANGE, GREY = "#3a6ea5", "#e07b39", "#d9d9d9"


def draw_corners(axes: plt.Axes) -> None:
    """Returns the taps of a 3 x 3 kernel in each corner around the pixel they belong to."""
    for name, (right, down) in {"TL": (0, 0), "TR": (1, 0), "BL": (0, 1), "BR": (1, 1)}.items():
        x0, y0 = 6 * right, 6 * down
        for row in range(5):
            for column in range(5):
                tap = (column <= 2) != bool(right) or column == 2
                tap = tap and ((row <= 2) != bool(down) or row == 2)
                pivot = row == column == 2
                color = ORANGE if pivot else BLUE if tap else "white"
                axes.add_patch(Rectangle((x0 + column, y0 + row), 1, 1, facecolor=color, edgecolor=GREY))
        axes.text(x0 + 2.5, y0 - 0.25, name, ha="center", va="bottom", fontsize=9)
    axes.set_xlim(-0.2, 11.2)
    axes.set_ylim(11.2, -1)
    axes.set_title("a corner a channel group\n(orange: pivot, the pixel itself)", fontsize=9)


def draw_wavefront(axes: plt.Axes, size: int = 8) -> None:
    """Returns the step in which the inverse finds each pixel."""
    steps = torch.arange(size)[:, None] + torch.arange(size)
    axes.imshow(steps, cmap="Blues", vmin=-8)
    for row in range(size):
        for column in range(size):
            color = "white" if steps[row, column] > size else "black"
            axes.text(column, row, int(steps[row, column]), ha="center", va="center", fontsize=7, color=color)
    axes.set_title("the inverse, H + W - 1 steps:\nan anti-diagonal at once", fontsize=9)


def draw_jacobian(axes: plt.Axes) -> None:
    """Returns the non-zeros of a real Jacobian, in raster order."""
    torch.manual_seed(0)
    layer = InvertibleConv2d(3, corners="TL")
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], torch.zeros(1, 3, 4, 4))
    raster = jacobian[0, :, :, :, 0].permute(1, 2, 0, 4, 5, 3).reshape(48, 48)
    image = (raster != 0).float()
    axes.imshow(image + torch.eye(48), cmap=plt.matplotlib.colors.ListedColormap(["white", BLUE, ORANGE]))
    axes.set_title("the Jacobian is triangular:\nlog |det| = H W Σ log |diagonal|", fontsize=9)


def main() -> None:
    """Draws the three panels side by side."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.3), dpi=150)
    for draw, axes in zip((draw_corners, draw_wavefront, draw_jacobian), panels, strict=True):
        draw(axes)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
    for side in panels[0].spines.values():
        side.set_visible(False)
    figure.tight_layout()
    target = Path(__file__).parent / "images" / "layer.png"
    figure.savefig(target, bbox_inches="tight", metadata={"Software": None})
    print(f"written to {target}")


if __name__ == "__main__":
    main()
