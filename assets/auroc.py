"""Measure how well each model of a run ranks the texts by p(toxic), whatever its threshold.

  python assets/auroc.py RUN      # a run with its models, trained on CAD; writes RUN/auroc.json

AUROC is the chance that a toxic text gets the higher p(toxic) of a toxic and another text. Beside
it: macro-F1 if a model says "toxic" of as many texts as are. The files under assets/results were
made with older code (`git show ae9b1a6:assets/EVIDENCE.md` has this script as it ran then), and
their models are lost.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval  # not Python's eval but eval.py
import ftft


def main(folder):
    run = json.loads((folder / "run.json").read_text())
    cfg, found = argparse.Namespace(**run["config"] | {"out": str(folder)}), {}
    tests = eval.read_tests(cfg, ftft.read(cfg.train, limit=cfg.limit))
    for method in run["phases"]:
        model, tokenizer = ftft.load(str(folder / method), cfg.device)
        toxic, found[method] = model.config.label2id["toxic"], {}
        for (_, name), examples in tests.items():
            logits = ftft.predict(model, ftft.encode(model, tokenizer, examples, cfg), cfg)
            margin = (logits[:, toxic] - logits[:, 1 - toxic]).double().numpy()
            gold = examples.labels.numpy() == toxic
            _, which, counts = np.unique(margin, return_inverse=True, return_counts=True)
            rank = (counts.cumsum() - (counts - 1) / 2)[which]  # from 1; ties share their mean
            n = gold.sum()
            auroc = (rank[gold].sum() - n * (n + 1) / 2) / (n * (~gold).sum())
            said = margin >= np.sort(margin)[-n]  # "toxic" of as many texts as are
            found[method][name] = {"auroc": auroc, "macro-f1 at the true share":
                                   ftft.metrics(said, gold)["macro-f1"]}
    (folder / "auroc.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
