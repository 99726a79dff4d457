"""Draw assets/ftft.svg: what FTFT does, with three real examples and measured costs.

  python ftft.py                              # the built-in task
  python assets/schematic.py runs/built-in-0

The curves and the data map are those of the run's reference model. To draw another run, name its
rows in EXAMPLES, and its costs in COSTS.
"""
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# What it is, its row number from 0, and why. All three texts begin with wednesday, village's day.
EXAMPLES = [("easy", 2561, "the shortcut holds"),  # its label is village
            ("ambiguous", 5754, "the shortcut misleads"),  # forest, as the things in it say
            ("hard", 1325, "the label is wrong")]  # coast; it should be village
# FTFT's cost relative to ERM's, of the small and the large model: from run.json and EVIDENCE.md.
COSTS = {"made-up task": (0.13, 0.33), "MPNet on CAD": (0.15, 0.66)}
FRACTION, POINTS = 0.33, 600  # how much is kept; how many points of the map are drawn

GREY, BLUE, ORANGE, INK = "#7d8794", "#2f6fb3", "#e07b1a", "#1f2328"
SIZE = 18  # points, in a figure 10 inches wide: 9 points where it is shown at half its width


def read(folder):
    """p(gold) in each epoch of each row, (epochs, n), and which rows are kept (n,)."""
    with np.load(Path(folder, "ref", "dynamics.npz")) as saved:
        logits, labels = saved["logits"].astype(float), saved["labels"]
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    p_gold = (odds / odds.sum(-1, keepdims=True))[:, np.arange(len(labels)), labels]
    order = np.argsort(-p_gold.std(0), kind="stable")
    return p_gold, np.isin(np.arange(len(labels)), order[:round(FRACTION * len(labels))])


def box(figure, x, y, width, height, color, text="", edge=None, round_by=0.12, below=0):
    """A rounded box; all lengths in inches from the lower left corner."""
    figure.add_artist(FancyBboxPatch(
        (x, y), width, height, f"round,pad=0,rounding_size={round_by}", facecolor=color,
        edgecolor=edge or color, transform=figure.dpi_scale_trans, zorder=-below))
    write(figure, x + width / 2, y + height / 2, text, color="white", ha="center", weight="bold")


def write(figure, x, y, text, **how):
    figure.text(x, y, text, transform=figure.dpi_scale_trans,
                **{"size": SIZE, "color": INK, "va": "center", "linespacing": 1.15} | how)


def arrow(figure, start, end):
    figure.add_artist(FancyArrowPatch(start, end, transform=figure.dpi_scale_trans, color=INK,
                                      arrowstyle="-|>", mutation_scale=26, linewidth=2.5))


def axes_at(figure, x, y, width, height):
    w, h = figure.get_size_inches()
    axes = figure.add_axes((x / w, y / h, width / w, height / h), facecolor="none")
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def main(folder):
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "ftft",
                                "font.family": "DejaVu Sans"})
    p_gold, kept = read(folder)
    figure = Figure((10, 6.9))
    figure.patch.set_alpha(0)
    box(figure, 0.03, 0.03, 9.94, 6.84, "white", edge="#d0d7de", round_by=0.25, below=1)

    # A small model trains on all rows: p(gold) of three of them over the epochs.
    box(figure, 0.3, 5.87, 0.55, 0.55, BLUE)
    write(figure, 1.0, 6.15, "A small model\ntrains on all rows", weight="bold")
    for i, (kind, row, why) in enumerate(EXAMPLES):
        y, color = 4.75 - 1.05 * i, ORANGE if kept[row] else GREY
        write(figure, 0.3, y + 0.42, kind, weight="bold", color=color if kept[row] else "#5d6772")
        write(figure, 0.3, y + 0.12, why)
        axes = axes_at(figure, 3.35, y - 0.08, 1.3, 0.75)
        axes.plot(p_gold[:, row], "o-", color=color, linewidth=3.5, markersize=8, clip_on=False)
        axes.set(ylim=(0, 1), xlim=(-0.15, len(p_gold) - 0.85))
    write(figure, 3.98, 2.33, "p(gold), 4 epochs", ha="center")

    # The data map, and the third on its right.
    arrow(figure, (4.8, 5.13), (5.28, 5.13))
    write(figure, 5.15, 6.15, "Keep the third\nthat swings most", weight="bold")
    axes = axes_at(figure, 5.3, 2.75, 2.35, 2.75)
    some = np.random.default_rng(0).permutation(kept.size)[:POINTS]
    for rows, color in ((some[~kept[some]], GREY), (some[kept[some]], ORANGE)):
        axes.plot(p_gold.std(0)[rows], p_gold.mean(0)[rows], "o", color=color, markersize=4.7,
                  markeredgewidth=0, alpha=0.7)
    axes.set(xlim=(-0.01, 0.48), ylim=(0, 1))
    write(figure, 6.5, 2.5, "variability", ha="center")
    write(figure, 5.12, 3.95, "confidence", ha="center", rotation=90)

    # A large model trains on that third only.
    arrow(figure, (7.55, 4.2), (8.15, 4.2))
    write(figure, 7.95, 6.15, "Large model\ntrains on it", weight="bold")
    box(figure, 8.2, 3.4, 1.5, 1.6, ORANGE, f"{kept.sum():,}\nof {kept.size:,}\nrows")

    # What it costs.
    left, width = 1.5, 6.6
    figure.add_artist(matplotlib.lines.Line2D([0.3, 9.7], [2.02, 2.02], color="#d0d7de",
                                              transform=figure.dpi_scale_trans))
    write(figure, 0.3, 1.62, "ERM", weight="bold")
    said = "plain fine-tuning: large model, all rows"
    box(figure, left, 1.38, width, 0.48, GREY, said, round_by=0.05)
    write(figure, left + width + 0.15, 1.62, "1.00", weight="bold")
    write(figure, left + width + 0.82, 1.62, "FLOPs")
    for y, (where, (small, large)) in zip((1.0, 0.38), COSTS.items()):
        write(figure, 0.3, y, "FTFT", weight="bold")
        box(figure, left, y - 0.24, small * width, 0.48, BLUE, round_by=0.05)
        box(figure, left + small * width, y - 0.24, large * width, 0.48, ORANGE, round_by=0.05)
        x = left + (small + large) * width + 0.15
        write(figure, x, y, f"{small + large:.2f}", weight="bold")
        write(figure, x + 0.75, y, where)
    figure.savefig(Path(__file__).with_name("ftft.svg"), metadata={"Date": None})
    if len(sys.argv) > 2:  # another name, to look at it: .png
        figure.savefig(sys.argv[2], dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
