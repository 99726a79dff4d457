"""Measure what ftft.py trained: in distribution (ID), out of distribution (OOD), adversarially.

  python eval.py runs/a                  # score the run's models, if not yet done; show a table
  python eval.py runs/a runs/b runs/c    # several seeds of one setting: mean ± std
  python eval.py MODEL --test ood=b.csv  # any classifier, a folder or Hub id; by default on NLI

The kinds of set, with an item each of the NLI task:

  ID           premise     The new rights are nice enough
  (MultiNLI)   hypothesis  Everyone really likes the newest benefits
               label       neutral
  OOD          premise     The doctors thanked the scientist.
  (HANS)       hypothesis  The scientist thanked the doctors.
               label       non-entailment, though all words are shared
  adversarial  premise     a paragraph of Wikipedia or other prose
  (ANLI)       hypothesis  a sentence that a person wrote to mislead a trained model

The paper's own numbers for deberta-large on ANLI R1, R2 and R3: ERM 59.90, 45.10 and 42.08; FTFT
by deberta-small 59.38, 45.80 and 42.38, at 0.52 of the cost. Nothing is averaged across sets. In a
set labelled X and non-X, every predicted class but X counts as non-X.
"""
import argparse
import functools
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from ftft import (METHODS, NLI, RANK, Examples, built_in, data_map, encode, fingerprint, load,
                  load_dynamics, metrics, predict, read, refusing, require, say, settings, some,
                  write, write_json)

KINDS = {"id": "ID", "ood": "OOD", "adversarial": "adversarial"}
COLUMNS = {  # of the table on training: digits, and what it says
    "cost": (2, "training FLOPs relative to ERM, a reference's included"),
    "seconds": (0, "of training, without the reference's"),
    "dev": (1, "best dev score after the warm-up, in %"),
    "reached": (2, "share of ERM's steps at which it first was at ERM's best score; -: never"),
    "shared": (1, "share of its rows, in %, that ftft and dm both keep; by chance, --fraction")}


# ---------- scoring


def read_tests(cfg, training):
    """The test sets of a run, {(kind, name): Examples}. Of `training`, only the classes matter, and
    the texts, to count those that are in a test set, too."""
    tests, classes = {}, len(training.names)
    like = training._replace(names=training.names + [f"non-{name}" for name in training.names])
    for kind, _, source in (test.partition("=") for test in cfg.test):
        require(kind in KINDS and source, f"--test {kind}: write id=FILE, ood=.. or adversarial=..")
        name = os.fsencode(Path(source).stem.removeprefix("built-in:")).decode(errors="replace")
        require(name not in [other for _, other in tests],
                f"--test {source}: another set is called {name} too; rename the file")
        examples = tests[kind, name] = read(source, like)
        non_x = examples.labels.max().item()  # perhaps X / non-X, as in HANS: X's number + classes
        require(non_x < classes or {*examples.labels.tolist()} <= {non_x - classes, non_x},
                f"{source}: its labels must be the training set's, or X and non-X for one X")
    return tests


def score(name, folder, cfg, tests=None):
    """{"NAME/KIND/SET": (2, n)}: the predictions of the classifier in `folder` and, below, the gold
    labels, as class numbers. Without `tests` they are read by the names of its classes."""
    model, tokenizer = load(str(folder), cfg.device)
    classes = [model.config.id2label[i].lower() for i in range(model.config.num_labels)]
    tests, answers = tests or read_tests(cfg, Examples([], None, classes)), {}
    for (kind, test), examples in tests.items():
        predicted = predict(model, encode(model, tokenizer, examples, cfg), cfg).argmax(1)
        if (non_x := examples.labels.max()) >= len(classes):  # any class but X becomes non-X
            predicted[predicted != non_x - len(classes)] = non_x
        answers[f"{name}/{kind}/{test}"] = np.stack([predicted, examples.labels])
        found = metrics(predicted, examples.labels)[cfg.metric]
        say(f"{name} on {test}: {cfg.metric} {found:.2%}")
    return answers


def score_classifiers(names, tests):
    """Score saved classifiers, as if they were the methods of one run."""
    cfg = settings(["--main", names[0], "--methods", "erm", "--test", *tests])
    answers = {}
    for name in names:
        require(not Path(name, "run.json").exists(), f"{name}: is a run; name {name}/ftft")
        answers |= score(name, name, cfg)
    return {"": ({"config": vars(cfg), "phases": {}, "selected": {}}, answers)}


def score_run(folder, run, answers):
    """Add what is not yet in `answers`: how each model of a run does on each test set. Write them,
    the scores, then the figures."""
    here = run["config"]["device"] if torch.cuda.is_available() else "cpu"  # no GPU here
    cfg = argparse.Namespace(**run["config"] | {"out": str(folder), "device": here})
    training = read(cfg.train, limit=cfg.limit)
    require(fingerprint(training) == run["fingerprint"], f"{folder}: restore its training set")
    tests, scored = read_tests(cfg, training), {key.split("/")[0] for key in answers}
    for method in run["phases"]:
        if method not in scored and tests:
            answers |= score(method, folder / method, cfg, tests)
    write(folder / "predictions.npz",
          lambda partial: np.savez_compressed(open(partial, "wb"), **answers))
    write_json(folder / "results.json", {method: {kind: {
        test: metrics(*answers[f"{method}/{kind}/{test}"]) for k, test in tests if k == kind}
        for kind in KINDS} for method in run["phases"]})
    for draw in (draw_data_map, draw_learning_curves) if RANK == 0 else ():
        try:
            draw(folder, run)
        except Exception as error:
            say(f"{draw.__name__}: no figure ({error})")
    return answers


# ---------- the tables


def load_runs(folders):
    """{folder: (run.json, answers)} of runs of one setting; scores them if need be."""
    runs, first = {}, None
    for folder in map(Path, folders):
        with refusing(f"{folder}: is no run", "for a classifier, add --test"):
            run = json.loads((folder / "run.json").read_text())
        require({*run["config"]["methods"]} <= {*run["phases"]},
                f"{folder}: did not finish; give its command again")
        run["selected"], results = (json.loads((folder / name).read_text()) if (
            folder / name).exists() else {} for name in ("selected.json", "results.json"))
        predicted = folder / "predictions.npz"
        answers = dict(np.load(predicted, allow_pickle=False)) if predicted.exists() else {}
        if {*run["phases"]} != {*results}:
            answers = score_run(folder, run, answers)
        golds = {key: gold.tolist() for key, (_, gold) in answers.items()}
        about = {**run["config"], "training set": run["fingerprint"], "test sets": golds,
                 "models": [*run["phases"]]}
        first = first or about
        unlike = [key for key in first | about if about.get(key) != first.get(key)
                  and key not in ("seed", "out", "device", "dynamics", "grad_accum")]
        require(not unlike, f"{folder}: differs from {folders[0]} in {some(unlike)}; show it alone")
        runs[str(folder)] = run, answers
    return runs


@functools.lru_cache
def resamples(n, draws=1000):
    """How often each of n examples is in the data itself (once: row 0) and in each bootstrap
    resample, (1 + draws, n); the same for all methods and runs, so that scores are paired."""
    rng = np.random.default_rng(0)
    counts = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws))
    return np.stack([np.ones(n, "f4"), *map(np.float32, counts)])


def bootstrap(predicted, gold, metric):
    """The metric in % on each of the resamples, (1 + draws,), the first being the data's own."""
    classes = np.union1d(predicted, gold)[:, None]
    said, true = predicted == classes, gold == classes  # (classes, n)
    hits, said, true = (resamples(len(gold)) @ part.T for part in (said & true, said, true))
    if metric == "accuracy":
        return 100 * hits.sum(1, dtype=float) / len(gold)
    present = np.where(said + true, said + true, np.nan)  # NaN: the class is in neither
    return 100 * np.nanmean(2 * hits / present, axis=1, dtype=float)


def summary(scores):
    """Of scores (runs, 1 + draws): mean and deviation; of one run its 95% interval."""
    if len(scores) > 1:
        return {"score": scores[:, 0].mean(), "std": scores[:, 0].std(ddof=1)}
    low, high = np.percentile(scores[0, 1:], [2.5, 97.5])
    return {"score": scores[0, 0], "low": low, "high": high}


def compare(runs, against):
    """What is known of runs {folder: (run.json, answers)}, as --json prints it. Intervals of a run
    are over examples; those of a difference, over examples and runs: too narrow for few runs."""
    infos = [run for run, _ in runs.values()]
    found = {"metric": infos[0]["config"]["metric"], "sets": {}, "runs": {}, "differences": {},
             "methods": {method: {} for method in infos[0]["phases"]}, "training": {}}
    for method in infos[0]["phases"]:
        told = [about_training(method, run) for run in infos]
        found["training"][method] = {key: [one[key] for one in told] for key in told[0]}
    scores = {}  # of a method on a set: (runs, 1 + draws)
    for _, answers in runs.values():
        for key, pair in answers.items():
            method, kind, test = key.rsplit("/", 2)  # a model on the Hub has a slash in its name
            found["sets"][test] = {"kind": kind, "n": pair.shape[1]}
            scores.setdefault((method, test), []).append(bootstrap(*pair, found["metric"]))
    picked = np.random.default_rng(0).integers(len(runs), size=(len(runs), len(resamples(1))))
    picked[:, 0] = range(len(runs))  # each draw picks runs with replacement; the first: each once
    for (method, test), own in scores.items():
        found["methods"].setdefault(method, {})[test] = summary(np.stack(own))
        for folder, one in zip(runs, own) if len(runs) > 1 else ():
            found["runs"].setdefault(f"{method}, {folder}", {})[test] = summary(one[None])
        if method != against and (against, test) in scores:
            gaps = np.subtract(own, scores[against, test])
            gaps = np.take_along_axis(gaps, picked, axis=0).mean(0)
            found["differences"].setdefault(f"{method} - {against}", {})[test] = summary(gaps[None])
    return found


def about_training(method, run):
    """{column: number or None}: what COLUMNS explains, and which rows are planted."""
    phase, erm, selected = run["phases"][method], run["phases"].get("erm"), run["selected"]
    told = {"cost": phase.get("cost"), "seconds": phase["seconds"]}
    if erm and erm["dev"]:
        own, its = ([(step / erm["budget"], 100 * score) for step, score in one["dev"]
                     if step > max(1, round(0.1 * one["budget"]))] for one in (phase, erm))
        goal = max((score for _, score in its), default=np.inf)
        told["dev"] = max((score for _, score in own), default=None)
        told["reached"] = next((share for share, score in own if score >= goal), None)
    other = {"ftft": "dm", "dm": "ftft"}.get(method)
    if other in selected:
        told["shared"] = 100 * np.isin(selected[method], selected[other]).mean()
    if run["config"]["train"] == "built-in:train":
        rows = selected.get(method, slice(run["config"]["limit"]))
        told |= {f"{name} rows": 100 * mask[rows].mean() for name, mask in built_in()[1].items()}
    return told


def spread(values, digits=1):
    """mean ± sample standard deviation of the values but None, and how many if not all."""
    known = [value for value in values if value is not None]
    deviation = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    share = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{np.mean(known):,.{digits}f}{deviation}{share}" if known else "-"


def tables(found):
    """What `compare` found as rows of cells, headers first: scores, and training."""
    sets, training = found["sets"], found["training"]
    rows = [["", *(KINDS[test["kind"]] for test in sets.values())],
            ["", *sets], ["n", *(f"{test['n']:,}" for test in sets.values())]]
    for part, sign in (("methods", ""), ("differences", "+"), ("runs", "")):
        for name, scores in found[part].items():
            rows.append([name, *(f"{s['score']:{sign}.1f} " + (
                f"± {s['std']:.1f}" if "std" in s else
                f"[{s['low']:{sign}.1f}, {s['high']:{sign}.1f}]") for s in scores.values())])
    keys = [*dict.fromkeys(key for told in training.values() for key in told)]
    cells = ([spread(told.get(key, []), COLUMNS.get(key, [1])[0]) for key in keys]
             for told in training.values())
    return rows, [["", *keys], *([name, *own] for name, own in zip(training, cells))]


def lay_out(rows, markdown):
    """Rows of cells, the first of them a header, as aligned text or as a Markdown table."""
    if markdown:
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


# ---------- figures


def draw_data_map(folder, run):
    """data_map.png: the examples; those that one method keeps stand out."""
    method = next((name for name in ("ftft", "dm", "hard", "easy") if name in run["phases"]), None)
    if method is None:
        return
    source = METHODS[method][1]
    path = run["config"]["dynamics"] if source == "ref" else None
    logits, labels, _ = load_dynamics(path or folder / source, run)
    y, x, correctness = map(np.asarray, data_map(logits, labels))
    kept = np.isin(np.arange(len(x)), run["selected"][method])
    figure = Figure((5.5, 4), layout="constrained")
    axes = figure.subplots()
    for rows, alpha in ((~kept, 0.3), (kept, 1)):
        hexagons = axes.hexbin(x[rows], y[rows], correctness[rows], gridsize=50, vmin=0, vmax=1,
                               extent=(0, x.max(), 0, 1), alpha=alpha, linewidths=0.1)
    figure.colorbar(hexagons, label="correctness (share of epochs)")
    axes.set(xlabel="variability: deviation of p(gold)   (right: ambiguous)", ylim=(0, 1),
             ylabel="confidence: mean of p(gold)   (top: easy)",
             title=f"{method} keeps {kept.sum():,} of {len(x):,} examples (full colour)")
    figure.savefig(folder / "data_map.png", dpi=200)
    return figure


def draw_learning_curves(folder, run):
    """learning_curves.png: dev score against cost, the reference's included."""
    figure = Figure((5.5, 4), layout="constrained")
    axes = figure.subplots()
    curves = [(name, phase) for name, phase in run["phases"].items() if "cost" in phase]
    curves = [(name, phase) for name, phase in curves if phase["dev"]]
    for (name, phase), marker in zip(curves, itertools.cycle("osD^vP*")):
        steps, scores = np.transpose(phase["dev"])
        own = phase["flops"] / phase["erm_flops"]  # spent in the end
        cost = phase["cost"] + own * (steps / phase["steps"] - 1)
        line, = axes.plot(cost, 100 * scores, marker=marker, markersize=4, label=name)
        if phase["steps"] < phase["budget"]:
            axes.plot(cost[-1], 100 * scores[-1], "x", markersize=11, color=line.get_color())
    axes.set(xlabel="cost relative to ERM", ylabel="mean dev score (%)")
    if curves:
        figure.legend(loc="outside right upper", title="x: stopped early")
        figure.savefig(folder / "learning_curves.png", dpi=200)


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.error, add = lambda message: require(False, message), parser.add_argument
    add("names", nargs="+", help="folders of runs; or classifiers, folders or Hub ids")
    add("--test", nargs="+", default=[], help="score classifiers on id=FILE, ood=FILE, ..")
    add("--against", default="erm", help="compare the others with this method (default: erm)")
    add("--json", action="store_true", help="print all numbers as JSON")
    add("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args(argv)
    is_run = Path(args.names[0], "run.json").exists()
    runs = load_runs(args.names) if is_run and not args.test else score_classifiers(
        args.names, args.test or NLI["test"])
    found = compare(runs, args.against)
    known = [*found["methods"]]
    require(args.against in ("erm", *known), f"--against: give one of {some(known)}")
    scores, training = tables(found)
    text = [f"\n{found['metric']} in %, [95% interval], mean ± standard deviation over runs\n",
            lay_out(scores, args.markdown), ""]
    if found["training"]:
        text += [f"{key}: {COLUMNS[key][1]}" for key in training[0] if key in COLUMNS]
        text += ["", lay_out(training, args.markdown)]
    if RANK == 0:
        sys.stdout.reconfigure(errors="backslashreplace")  # if ± fails
        print(json.dumps(found, indent=1) if args.json else "\n".join(text))


if __name__ == "__main__":
    main()
