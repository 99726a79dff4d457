"""Measure what ftft.py trained: in distribution (ID), out of distribution (OOD) and on adversarial sets.

  python eval.py runs/a              # score the run's models, if that is still to do, and show its table
  python eval.py runs/a runs/b       # several seeds of one setting: mean ± standard deviation over the runs

The kinds of set, by an item each of the NLI task:

  ID           MultiNLI   premise     Your contribution helped make it possible for us to provide our students
                                      with a quality education.
                          hypothesis  Your contributions were of no help with our students' education.
                          label       contradiction
  OOD          HANS       premise     The doctors thanked the scientist.
                          hypothesis  The scientist thanked the doctors.
                          label       non-entailment, though all words are shared
  adversarial  ANLI       premise     a paragraph of Wikipedia or other prose
                          hypothesis  a sentence that a person wrote to mislead a trained model
                          label       entailment, neutral or contradiction

What to expect of deberta-large trained on MultiNLI, in the paper's own numbers (accuracy; cost of ERM = 1):

  method                      ANLI R1   ANLI R2   ANLI R3     cost
  ERM                           59.90     45.10     42.08   1.0000
  FTFT, from deberta-small      59.38     45.80     42.38   0.5197

Each set is scored by itself; nothing is averaged across sets. A set labelled X / non-X is scored on these
two, after the model has chosen among all of its classes.
"""
import argparse
import json
import shlex
from pathlib import Path

import matplotlib
import numpy as np
import torch
import transformers

from ftft import (Settings, built_in, data_map, encode, load_task, metrics, predict, read, require, say,
                  write_json)

matplotlib.use("Agg")  # draws to files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402

KINDS = {"id": "ID", "ood": "OOD", "adversarial": "adversarial"}
METHODS = ["erm", "random", "easy", "hard", "dm", "ftft", "ref"]  # in this order in the table
TESTS = {  # kind, name, on the Hub, and the authors' own file under --data
    "nli": [("id", "mnli_matched", "nyu-mll/multi_nli:validation_matched",
             "multinli_1.0/multinli_1.0_dev_matched.jsonl"),
            ("id", "mnli_mismatched", "nyu-mll/multi_nli:validation_mismatched",
             "multinli_1.0/multinli_1.0_dev_mismatched.jsonl"),
            ("ood", "hans", "tasksource/hans:validation", "heuristics_evaluation_set.jsonl"),
            ("ood", "wanli", "alisawuffles/WANLI:test", "wanli/test.jsonl"),
            *[("adversarial", f"anli_r{r}", f"facebook/anli:test_r{r}", f"anli_v1.0/R{r}/test.jsonl")
              for r in (1, 2, 3)]],
    "hsd": [("id", "cad_dev", None, "cad/cad_uid.dev"),
            *[("adversarial", f"dynahate_r{r}_{form}", None, f"dynahate/r{r}_{form}.test")
              for r in (2, 3, 4) for form in ("original", "perturbation")]]}


# ---------------------------------------------------------------- scoring


def read_tests(cfg):
    """The test sets of a run, {(kind, name): Examples}, and a line on each. --test replaces the task's."""
    if cfg.task == "built-in":
        sets, _ = built_in()
        return {(kind, kind): sets[kind] for kind in KINDS}, []
    training, _ = load_task(cfg)
    given = [test.partition("=")[::2] for test in cfg.test]
    for kind, path in given:
        require(kind in KINDS and path, f"--test {kind}: write id=FILE, ood=FILE or adversarial=FILE")
    wanted = [(kind, Path(path).stem, path) for kind, path in given]
    if not wanted:
        wanted = [(kind, name, f"{cfg.data}/{file}" if cfg.data else hub or file)
                  for kind, name, hub, file in TESTS.get(cfg.task, [])]
    tests, lines, known = {}, [], set(training.texts)
    classes = len(training.names)
    like = training._replace(names=[*training.names, *(f"non-{name}" for name in training.names)])
    for kind, name, source in wanted:
        require(name not in [other for _, other in tests],
                f"--test {source}: results go by name, and another set is called {name}; rename the file")
        examples = tests[kind, name] = read(source, like)
        non_x = examples.labels.max().item()  # X / non-X, as HANS is labelled: non-X has X's number + classes
        require(non_x < classes or {*examples.labels.tolist()} <= {non_x - classes, non_x},
                f"{source}: labels must be X and {like.names[non_x]} only, or the training set's own")
        twins = [row for row, text in enumerate(examples.texts) if text in known]
        shared = f"; {len(twins)} also in the training set: its rows {str(twins[:9])[1:-1]}" * bool(twins)
        shared += ", .." * (len(twins) > 9)
        counts = f"{len(examples.texts)} rows, {examples.dropped} more dropped as unlabelled"
        lines.append(f"{kind} {name}: {counts}{shared}")
    return tests, lines


def score(model, tokenizer, examples, cfg):
    """Accuracy, macro-F1 and n of `model` on examples whose labels are numbered as the model's classes; in a
    set labelled X / non-X, non-X has the number of X plus that of classes."""
    predicted = predict(model, encode(tokenizer, examples, cfg), cfg).argmax(1).numpy()
    non_x = examples.labels.max().item()
    if non_x >= model.config.num_labels:  # any class but X becomes non-X
        predicted = np.where(predicted == non_x - model.config.num_labels, predicted, non_x)
    return metrics(predicted, examples.labels)


def score_run(folder):
    """Score each model of a run on each test set; writes results.json last, after figures and model cards."""
    run = json.loads((folder / "run.json").read_text())
    here = run["config"]["device"] if torch.cuda.is_available() else "cpu"  # trained elsewhere, perhaps
    cfg = Settings(**{**run["config"], "out": str(folder), "device": here})
    tests, lines = read_tests(cfg)
    for line in lines:
        say(cfg, line)
    results = {}
    for method in sorted(run["phases"], key=METHODS.index):
        model, tokenizer = (auto.from_pretrained(folder / method, trust_remote_code=False) for auto in (
            transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer))
        model.to(cfg.device)
        results[method] = {kind: {} for kind in KINDS}
        for (kind, name), examples in tests.items():
            result = results[method][kind][name] = score(model, tokenizer, examples, cfg)
            right = round(result["accuracy"] * result["n"])
            say(cfg, f"{method} on {name}: {right}/{result['n']} = {100 * result['accuracy']:.2f}%, "
                     f"macro-F1 {100 * result['macro_f1']:.2f}")
        write_card(folder / method, run, results[method])
    draw_data_map(folder, cfg)
    draw_learning_curves(folder, run)
    write_json(folder / "results.json", results)


def write_card(folder, run, results):
    """README.md of a saved model: what it is, what it cost, how it scores and how it was made."""
    cfg, phase, name = run["config"], run["phases"][folder.name], folder.name
    scores = [f"| {KINDS[kind]} | {test} | {100 * r['accuracy']:.2f} | {100 * r['macro_f1']:.2f} | {r['n']} |"
              for kind, tests in results.items() for test, r in tests.items()]
    flags = [shlex.join([f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])])
             for key, value in cfg.items() if value not in (None, [])]
    cost = f", {run['cost'][name]:.2f} of ERM's cost, reference included" if name in run["cost"] else ""
    (folder / "README.md").write_text("\n".join([
        f"# {phase['model']}, fine-tuned on {cfg['train'] or cfg['task']} ({name})", "",
        f"Trained with FTFT in one file (Du, Gatt and Nguyen, arXiv 2310.06588): {phase['steps']:,} steps on "
        f"{phase['examples']:,} examples, learning rate {phase['lr']}, seed {cfg['seed']}{cost}.", "",
        "| kind | set | accuracy | macro-F1 | n |", "|---|---|---|---|---|", *scores, "",
        "Made by:", "", "    python ftft.py " + " ".join(flags), ""]))


# ---------------------------------------------------------------- the table


def finished(run):
    """Whether every phase that the settings ask for was trained: the cost of each is entered last."""
    cfg = run["config"]
    return {"ftft" if cfg["select"] == "ambiguous" else cfg["select"], *cfg["baselines"]} <= {*run["cost"]}


def load_run(folder):
    """(run.json, results.json) of a folder; a run that is trained but not yet scored is scored first."""
    folder = Path(folder)
    require((folder / "run.json").exists(), f"{folder}: no run.json there; name the folder of a run")
    if not (folder / "results.json").exists():
        run = json.loads((folder / "run.json").read_text())
        require(finished(run), f"{folder}: did not finish; continue it: python ftft.py --resume {folder}")
        score_run(folder)
    return json.loads((folder / "run.json").read_text()), json.loads((folder / "results.json").read_text())


def spread(values, digits=1):
    """mean ± sample standard deviation, or the value itself where there is one run only."""
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def table(runs):
    """The lines that compare the methods of these runs [(run.json, results.json), ..], one row a method."""
    results = [result for _, result in runs]
    metric = "macro_f1" if runs[0][0]["config"]["task"] == "hsd" else "accuracy"
    sets = [(kind, name) for kind in KINDS for name in results[0][next(iter(results[0]))][kind]]
    rows = [["", *(KINDS[kind] for kind, _ in sets), "cost", "examples", "seconds"]]
    if any(kind != name for kind, name in sets):
        rows.append(["", *(name for _, name in sets), "", "", ""])
    for method in (m for m in METHODS if all(m in result for result in results)):
        phases = [run["phases"][method] for run, _ in runs]
        costs = [run["cost"][method] for run, _ in runs if method in run["cost"]]
        scores = [spread([100 * r[method][kind][name][metric] for r in results]) for kind, name in sets]
        rows.append([method, *scores, spread(costs, 2) if costs else "",
                     spread([p["examples"] for p in phases], 0), spread([p["seconds"] for p in phases], 0)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    over = f", mean ± standard deviation over {len(runs)} runs" if len(runs) > 1 else ""
    return [f"{metric.replace('_', '-')} in %{over}; cost relative to ERM, the reference's included; "
            "examples and seconds of the method's own training",
            *("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:]))])
              for first, *cells in rows)]


def planted_line(folders):
    """Of the built-in task the truth is known: how much of what was planted is among the kept rows?"""
    shares, selected = [], [json.loads((Path(f) / "selected.json").read_text())["rows"] for f in folders]
    for name, planted in built_in()[1].items():
        kept = spread([100 * planted[rows].mean() for rows in selected])
        shares.append(f"{kept}% {name} (training set: {100 * planted.mean():.1f}%)")
    return f"among the kept rows: {', '.join(shares)}"


# ---------------------------------------------------------------- figures


def draw_data_map(folder, cfg, most=20_000):
    """data_map.png: examples by variability and confidence, coloured by correctness, and where the cut is."""
    path = Path(cfg.dynamics or folder / "ref") / "dynamics.npz"
    if not path.exists():
        return
    with np.load(path, allow_pickle=False) as saved:
        stats = data_map(torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"]))
    n = len(stats["confidence"])
    shown = np.random.default_rng(0).permutation(n)[:most]
    x, y, colour = (stats[name].numpy()[shown] for name in ("variability", "confidence", "correctness"))
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    points = axes.scatter(x, y, c=colour, s=4, cmap="viridis", vmin=0, vmax=1, alpha=0.6, linewidths=0)
    figure.colorbar(points, label="correctness (share of epochs)")
    chosen = json.loads((folder / "selected.json").read_text())
    if chosen["select"] != "random":
        draw, side = {"ambiguous": (axes.axvline, "right of"), "hard": (axes.axhline, "below"),
                      "easy": (axes.axhline, "above")}[chosen["select"]]
        label = f"kept: {side} the line, {len(chosen['rows']):,} rows"
        draw(chosen["threshold"], color="crimson", label=label)
        axes.legend(loc="upper right")
    axes.set(xlabel="variability (standard deviation of p(gold) over epochs)", xlim=(0, None), ylim=(0, 1),
             ylabel="confidence (mean of p(gold) over epochs)",
             title=f"data map of {n:,} examples" + f" ({most:,} shown)" * (n > most))
    figure.savefig(folder / "data_map.png", dpi=150)
    plt.close(figure)


def draw_learning_curves(folder, run):
    """learning_curves.png: dev score against cost, the reference's included; a cross at an early stop."""
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    for method in (m for m in METHODS if m in run["cost"] and run["phases"][m]["dev"]):
        phase = run["phases"][method]
        steps, scores = np.array(phase["dev"]).T
        own = phase["flops"] / phase["erm_flops"]
        cost = run["cost"][method] - own + own * steps / phase["steps"]
        curve, = axes.plot(cost, 100 * scores, marker=".", label=method)
        if phase["steps"] < phase["budget"]:
            axes.plot(cost[-1], 100 * scores[-1], marker="x", markersize=10, color=curve.get_color())
    if axes.lines:
        axes.set(xlabel="cost relative to ERM", ylabel="mean dev score (%)")
        axes.legend(title="x: stopped early")
        figure.savefig(folder / "learning_curves.png", dpi=150)
    plt.close(figure)


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.error = lambda message: require(False, message)
    parser.add_argument("runs", nargs="+", help="folders of runs, such as runs/a")
    folders = parser.parse_args(argv).runs
    transformers.utils.logging.disable_progress_bar()
    runs = [load_run(folder) for folder in folders]
    first = runs[0][0]["config"]
    for folder, (run, _) in zip(folders, runs):
        unlike = [key for key, value in run["config"].items()
                  if key not in ("seed", "out", "device", "dynamics") and value != first.get(key)]
        require(not unlike, f"{folder}: differs from {folders[0]} in {', '.join(unlike)}; show it alone")
    print("", *table(runs), sep="\n")
    if all(run["config"]["task"] == "built-in" for run, _ in runs):
        print(planted_line(folders))


if __name__ == "__main__":
    main()
