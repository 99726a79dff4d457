"""Train the two controls of class balance in a run of ftft.py, after the methods of that run.

  python assets/controls.py OPTIONS                        # those of ftft.py, ftft among --methods
  python assets/controls.py --rows SELECTED.json OPTIONS   # random-as-ftft, on the rows named there

random-as-ftft: a random third with the class shares of FTFT's third. If it does as well as FTFT,
FTFT's gain is class balance. ftft-per-class: the rows of highest variability within each class,
with the class shares of the training set. If it does as well as FTFT, the gain is not that.

The results under assets/results were made with older code: `git show ae9b1a6:assets/EVIDENCE.md`
has this script as it ran then.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval  # not Python's eval but eval.py
import ftft


def choose(logits, labels, classes, cfg):
    """{name of the control: its rows (k,), ascending}."""
    variability = ftft.data_map(logits, labels)[1]
    ambiguous = ftft.select(variability, cfg.fraction)
    generator = torch.Generator().manual_seed(ftft.seed_for(cfg.seed, "random rows"))
    noise = torch.rand(len(labels), generator=generator)
    chosen = {"random-as-ftft": [], "ftft-per-class": []}
    for label in range(classes):
        those = (labels == label).nonzero().squeeze(1)  # rows of this class
        share = (labels[ambiguous] == label).sum().item() / len(those)  # of them, what FTFT keeps
        chosen["random-as-ftft"].append(those[ftft.select(noise[those], share)])
        chosen["ftft-per-class"].append(those[ftft.select(variability[those], cfg.fraction)])
    return {name: torch.cat(rows).sort().values for name, rows in chosen.items()}


def main(argv):
    given = json.loads(Path(argv[1]).read_text()) if argv[:1] == ["--rows"] else None
    cfg = ftft.settings(argv[2:] if given else argv)
    training = ftft.read(cfg.train, limit=cfg.limit)
    dev = [ftft.read(source, training) for source in cfg.dev]
    eval.read_tests(cfg, training)
    ftft.main(cfg, training, dev)
    run, flops = json.loads(Path(cfg.out, "run.json").read_text()), 0
    if given:
        chosen = {"random-as-ftft": torch.tensor(given["random-as-ftft"])}
    else:
        logits, labels, flops = ftft.load_dynamics(cfg.dynamics or Path(cfg.out, "ref"), run)
        chosen = choose(logits, labels, len(training.names), cfg)
    for name, rows in chosen.items():
        if not Path(cfg.out, name).exists():
            ftft.record_selection(name, rows, training, cfg)
            used = flops if name == "ftft-per-class" else 0  # shares can be had without a reference
            ftft.fine_tune(name, rows, training, dev, cfg, run, used)
    eval.main([cfg.out])


if __name__ == "__main__":
    main(sys.argv[1:])
