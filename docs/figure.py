"""Draw the shift of channels between frames, and its place in a ResNet block.

docs/method.svg: the paper's shift; docs/better-shift.svg: neighbors and a mean, before both convolutions.
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLORS = ("#4878d0", "#ee854a", "#6acc64", "#d65f5f")
GROUPS = ("first third", "rest", "last third")
STEPS = ("GroupNorm", "SiLU", "shift", "Conv 3x3", "GroupNorm", "SiLU", "Conv 3x3")
STEPS_OF_BOTH = ("GroupNorm", "SiLU", "shift", "Conv 3x3", "GroupNorm", "SiLU", "shift", "Conv 3x3")


def draw_box(
    axes: Axes, x: float, y: float, text: str, *, width: float = 1.0, color: str = "white", bold: bool = False
) -> None:
    axes.add_patch(plt.Rectangle((x, y), width, 0.5, facecolor=color, edgecolor="#333333", linewidth=0.8))
    axes.text(
        x + width / 2,
        y + 0.25,
        text,
        ha="center",
        va="center",
        fontsize=9,
        fontweight="bold" if bold else "normal",
    )


def draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "#333333"
) -> None:
    axes.annotate(
        "",
        end,
        start,
        arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0},
    )


def draw_channels(axes: Axes) -> None:
    """Draw four frames as stacks of three channel groups: above as they come in, below as they leave the shift."""
    num_frames = len(COLORS)
    for frame in range(num_frames):
        x = 1.5 * frame
        axes.text(x + 0.5, 5.0, f"frame {frame + 1}", ha="center", fontsize=9)
        for group, source in enumerate((frame - 1, frame, frame + 1)):
            draw_box(axes, x, 4.3 - 0.5 * group, str(frame + 1), color=COLORS[frame])
            inside = 0 <= source < num_frames
            draw_box(
                axes,
                x,
                1.3 - 0.5 * group,
                str(source + 1) if inside else "0",
                color=COLORS[source] if inside else "white",
            )
            if inside:
                draw_arrow(axes, (1.5 * source + 0.5, 3.3), (x + 0.5, 1.82), COLORS[source])
    for group, name in enumerate(GROUPS):
        axes.text(-0.15, 4.55 - 0.5 * group, name, ha="right", va="center", fontsize=9)
        axes.text(-0.15, 1.55 - 0.5 * group, name, ha="right", va="center", fontsize=9)
    axes.text(2.75, 5.45, "channels of each frame", ha="center", fontsize=10, fontweight="bold")
    axes.text(
        2.75,
        -0.1,
        "after the shift: a 2D convolution sees three frames",
        ha="center",
        fontsize=10,
        fontweight="bold",
    )


def draw_neighbors_and_mean(axes: Axes) -> None:
    """Draw what the channels of one of seven frames become: a sixth each of the frame before, the frame after, and a mean."""
    frames, middle = mpl.colormaps["tab10"].colors[:7], 3
    for frame, color in enumerate(frames):
        draw_box(axes, frame, 4.3, str(frame + 1), width=0.8, color=color)
    axes.text(3.4, 5.05, "seven frames", ha="center", fontsize=9)
    groups = (
        ("previous", 1, [middle - 1]),
        ("own", 3, [middle]),
        ("mean", 1, list(range(7))),
        ("next", 1, [middle + 1]),
    )
    x = 0.4
    for name, width, sources in groups:
        stripe = width / len(sources)
        for part, source in enumerate(sources):
            left = x + part * stripe
            axes.add_patch(plt.Rectangle((left, 1.6), stripe, 0.5, facecolor=frames[source]))
            draw_arrow(axes, (source + 0.4, 4.3), (left + stripe / 2, 2.12), frames[source])
        axes.add_patch(plt.Rectangle((x, 1.6), width, 0.5, fill=False, edgecolor="#333333", linewidth=0.8))
        axes.text(
            x + width / 2, 1.5, f"{name}\n{width}/6", ha="center", va="top", fontsize=9, linespacing=1.4
        )
        x += width
    axes.text(3.4, 5.45, "channels of frame 4 after the shift", ha="center", fontsize=10, fontweight="bold")
    axes.text(
        3.4, 0.4, "in each layer, the channels that cost\nthe image model least are shifted", ha="center", va="center", fontsize=9
    )  # fmt: skip


def draw_block(axes: Axes, x: float, steps: tuple[str, ...] = STEPS) -> None:
    """Draw the residual branch of a ResNet block from top to bottom, with its shortcut."""
    axes.text(x + 0.9, 5.45, "ResNet block", ha="center", fontsize=10, fontweight="bold")
    for step, name in enumerate(steps):
        y = 4.35 - 0.65 * step
        draw_box(
            axes,
            x,
            y,
            name,
            width=1.4,
            color="#ffe699" if name == "shift" else "#eeeeee",
            bold=name == "shift",
        )
        draw_arrow(axes, (x + 0.7, y + 0.65), (x + 0.7, y + 0.5))
    bottom = 4.35 - 0.65 * len(steps)
    draw_arrow(axes, (x + 0.7, bottom + 0.65), (x + 0.7, bottom + 0.42))
    axes.text(x + 0.7, bottom + 0.25, "+", ha="center", va="center", fontsize=14)
    axes.plot([x + 0.7, x + 1.8, x + 1.8], [5.0, 5.0, bottom + 0.25], color="#333333", linewidth=1.1)
    draw_arrow(axes, (x + 1.8, bottom + 0.25), (x + 0.85, bottom + 0.25))


def main() -> None:
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "method", "font.family": "sans-serif"})
    for name, steps, bottom in (("method", STEPS, -0.5), ("better-shift", STEPS_OF_BOTH, -1.0)):
        figure, axes = plt.subplots(figsize=(8.4, 4.6))
        if steps is STEPS:
            draw_channels(axes)
            draw_block(axes, 6.6)
        else:
            draw_neighbors_and_mean(axes)
            draw_block(axes, 7.6, steps)
        axes.set(xlim=(-1.3, 9.7 if steps is STEPS_OF_BOTH else 8.7), ylim=(bottom, 5.8))
        axes.axis("off")
        output = Path(__file__).with_name(f"{name}.svg")
        figure.savefig(output, bbox_inches="tight", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
