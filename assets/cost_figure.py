"""Draw assets/cost.png: score on HateCheck and on DynaHate against cost, MPNet trained on CAD.

  python assets/cost_figure.py

Each mark is a mean over SEEDS, its bars are standard deviations over them. A method is drawn once
it has results of all seeds under assets/results; tables.py says where they are looked for.
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import tables

SEEDS = range(4)
PANELS = {"HateCheck": "adversarial/adversarial_hatecheck",
          "DynaHate": "adversarial/adversarial_dynahate"}
LOOKS = {  # name in tables.MPNET: label, mark, colour
    "erm": ("ERM, 2 epochs", "o", "#5d6772"),
    "erm-half": ("ERM, 1 epoch", "s", "#5d6772"),
    "erm-es": ("ERM, stopped early", "D", "#5d6772"),
    "random": ("random third", "X", "#2f6fb3"),
    "ftft": ("FTFT", "o", "#e07b1a"),
    "ftft-patience1": ("FTFT, patience 1", "D", "#e07b1a"),
    "ftft-fast": ("FTFT, 278 steps at 5e-5", "*", "#e07b1a"),
    "ftft-ref2": ("FTFT, reference of 2 epochs", "s", "#e07b1a"),
    "ftft-ref2-patience1": ("the same, patience 1", "^", "#e07b1a")}


def main(path):
    runs = tables.join(tables.MPNET, list(LOOKS), SEEDS)
    there = next(iter(runs.values()))[0]["phases"]
    figure = Figure((10, 5.6), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, (name, test) in zip(panels, PANELS.items()):
        for method, (label, mark, color) in LOOKS.items():
            if method in there:
                points = np.array([(run["phases"][method]["cost"], 100 * tables.eval.metrics(
                    *answers[f"{method}/{test}"])["macro-f1"]) for run, answers in runs.values()])
                (cost, score), (wide, high) = points.mean(0), points.std(0, ddof=1)
                axes.errorbar(cost, score, high, wide, mark, color=color, markersize=11,
                              elinewidth=1.2, capsize=3, label=label)
        axes.set_title(name, size=16)
        axes.set_xlabel("training cost relative to ERM", size=14)
        axes.set(xlim=(0, 1.25))
        axes.tick_params(labelsize=14)
        axes.grid(color="#e6e9ed")
    panels[0].set_ylabel(f"macro-F1 in %, {len(SEEDS)} seeds", size=14)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend([handle[0] for handle in handles], labels, loc="outside lower center", ncols=2,
                  fontsize=14, frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:] or [Path(__file__).with_name("cost.png")])
