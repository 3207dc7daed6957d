"""The pictures of docs/maths.md, drawn at each build: python docs/pictures.py DIRECTORY."""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from ncmi_kernels import ncmi_loss, ncmi_terms, nsf

BLUE, ORANGE, GREEN, GREY = "#3366bb", "#dd7722", "#338855", "#888888"


def _box(axes: Axes, at: tuple[float, float], width: float, height: float, depth: float, colour: str) -> None:
    """A box in oblique projection; with depth 0 a sheet."""
    x, y = at
    dx, dy = 0.6 * depth, 0.45 * depth
    front = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    top = [(x, y + height), (x + width, y + height), (x + width + dx, y + height + dy), (x + dx, y + height + dy)]
    side = [(x + width, y), (x + width + dx, y + dy), (x + width + dx, y + height + dy), (x + width, y + height)]
    for corners, alpha in ((front, 0.35), (top, 0.2), (side, 0.5)) if depth else ((front, 0.35),):
        axes.add_patch(Polygon(corners, facecolor=colour, alpha=alpha))
        axes.add_patch(Polygon(corners, fill=False, edgecolor=colour, linewidth=1.2))


def collapse() -> Figure:
    """The [B, C, M] box of the definition against one row of statistics."""
    figure = Figure(figsize=(8.4, 3.4))
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set(xlim=(-0.9, 6.4), ylim=(-1.15, 4.4), aspect="equal")
        axes.axis("off")

    left.set_title("the definition: [B, C, M]", fontsize=10)
    _box(left, (0, 0), 2.2, 2.2, 3.2, ORANGE)
    left.text(1.1, -0.35, "M features", ha="center")
    left.text(-0.2, 1.1, "B samples", ha="center", va="center", rotation=90)
    left.text(3.55, 0.45, "C classes", ha="center", va="center", rotation=37)
    left.text(1.1, 1.1, "$p_{ik}\\,\\log\\,\\dfrac{p_{ik}}{q_{vk}}$", ha="center", va="center", fontsize=13)
    left.text(2.4, -0.95, "B = 4096, C = M = 1000, float32: 16.4 GB", ha="center", color=ORANGE)

    right.set_title("collapsed: [C, M], then [B, M]", fontsize=10)
    _box(right, (0, 2.5), 2.9, 1.2, 0, GREEN)
    right.text(1.45, 3.1, "$\\log q_{ck}$", ha="center", va="center", fontsize=12)
    right.text(-0.2, 3.1, "C", ha="center", va="center")
    _box(right, (0, 1.75), 2.9, 0.18, 0, BLUE)
    right.annotate("", (1.45, 1.98), (1.45, 2.45), arrowprops={"arrowstyle": "->", "color": GREY})
    right.text(3.05, 1.84, "$r_k$, the mean over classes", va="center", color=BLUE)
    _box(right, (0, 0), 2.9, 1.2, 0, ORANGE)
    right.annotate("", (1.45, 1.25), (1.45, 1.7), arrowprops={"arrowstyle": "->", "color": GREY})
    right.text(1.45, 0.6, "$p_{ik}\\,(\\log p_{ik} - r_k)$", ha="center", va="center", fontsize=12)
    right.text(-0.2, 0.6, "B", ha="center", va="center")
    right.text(1.45, -0.35, "M features", ha="center")
    right.text(2.4, -0.95, "the same: 16 MB, 4 MB and 4 kB", ha="center", color=BLUE)
    figure.tight_layout()
    return figure


def _plane(p: torch.Tensor) -> tuple[list[float], list[float]]:
    """Distributions over three outcomes as points of an equilateral triangle."""
    x = p[:, 1] + 0.5 * p[:, 2]
    return x.tolist(), (3**0.5 / 2 * p[:, 2]).tolist()


def simplex() -> Figure:
    """Samples of three classes around their centroids, before and after training, with CMI, Gamma and NCMI."""
    generator = torch.Generator().manual_seed(1)
    centroid_logits = 10 * torch.eye(3)
    target = torch.arange(3).repeat_interleave(12)
    noise = torch.randn(len(target), 3, generator=generator)
    figure = Figure(figsize=(8.4, 4.2))
    stages = ("early", 1.2, 1.2), ("late", 5.0, 0.4)
    for axes, (title, reached, spread) in zip(figure.subplots(1, 2), stages, strict=True):
        features = reached * torch.eye(3)[target] + spread * noise
        concentration, separation = ncmi_terms(features, target, centroid_logits)
        ncmi = ncmi_loss(features, target, centroid_logits)
        axes.plot(*_plane(torch.eye(3)[[0, 1, 2, 0]]), color=GREY, linewidth=1)
        p, q = _plane(nsf(features)), _plane(nsf(centroid_logits))
        for label, colour in enumerate((BLUE, ORANGE, GREEN)):
            own = [i for i in range(len(target)) if target[i] == label]
            for i in own:
                axes.plot([p[0][i], q[0][label]], [p[1][i], q[1][label]], color=colour, linewidth=0.6, alpha=0.6)
            axes.scatter([p[0][i] for i in own], [p[1][i] for i in own], s=14, color=colour)
            axes.scatter(q[0][label], q[1][label], s=120, marker="*", color=colour, edgecolor="black", zorder=3)
        for other in (1, 2):  # of one sample of the first class
            arrow = {"arrowstyle": "->", "color": "black", "linestyle": ":"}
            axes.annotate("", (q[0][other], q[1][other]), (p[0][0], p[1][0]), arrowprops=arrow)
        axes.set_title(
            f"{title}\nCMI {concentration.mean():.4f}, Γ {separation.mean():.4f}, NCMI {ncmi:.3f}", fontsize=10
        )
        axes.set(aspect="equal", xlim=(-0.02, 1.02), ylim=(-0.02, 0.9))
        axes.axis("off")
    figure.tight_layout(pad=1.5)
    return figure


PICTURES = {"collapse.svg": collapse, "simplex.svg": simplex}


def draw(directory: Path) -> None:
    """Draw all pictures into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        with matplotlib.rc_context({"svg.hashsalt": "ncmi_kernels"}):  # the same file at each build
            picture().savefig(directory / name, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
