"""Measure what ftft.py trained: in distribution (ID), out of distribution (OOD) and on adversarial sets.

  python eval.py runs/a                     # score the run's models, if that is still to do; show its table
  python eval.py runs/a runs/b runs/c       # several seeds of one setting: mean ± standard deviation
  python eval.py MODEL --task nli           # any classifier, a folder or Hub id, on the task's test sets
  python eval.py MODEL --test ood=b.csv     # or on sets of your own
  python eval.py --transfer runs/a runs/b   # do the runs' models agree on which rows to keep?

The kinds of set, by an item each of the NLI task:

  ID           premise     The new rights are nice enough
  (MultiNLI)   hypothesis  Everyone really likes the newest benefits
               label       neutral
  OOD          premise     The doctors thanked the scientist.
  (HANS)       hypothesis  The scientist thanked the doctors.
               label       non-entailment, though all words are shared
  adversarial  premise     a paragraph of Wikipedia or other prose
  (ANLI)       hypothesis  a sentence that a person wrote to mislead a trained model

The paper's own numbers for deberta-large on ANLI R1, R2 and R3: ERM 59.90, 45.10 and 42.08; FTFT from
deberta-small 59.38, 45.80 and 42.38, at 0.52 of the cost. Nothing is averaged across sets. A set labelled
X / non-X is scored on these two, after the model has chosen among all of its classes.
"""
import argparse
import functools
import itertools
import json
import logging
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

from ftft import (SHORT_LABELS, Examples, Settings, built_in, data_map, encode, fingerprint, load_dynamics,
                  load_task, metrics, predict, read, refusing, require, select, write, write_json)

KINDS = {"id": "ID", "ood": "OOD", "adversarial": "adversarial"}
METHODS = ["erm", "random", "easy", "hard", "dm", "ftft", "ref"]  # in this order in the table
TESTS = {  # kind, name, on the Hub, and the authors' own file under --data
    "nli": [*[("id", f"mnli_{half}", f"nyu-mll/multi_nli:validation_{half}",
               f"multinli_1.0/multinli_1.0_dev_{half}.jsonl") for half in ("matched", "mismatched")],
            ("ood", "hans", "tasksource/hans:validation", "heuristics_evaluation_set.jsonl"),
            ("ood", "wanli", "alisawuffles/WANLI:test", "wanli/test.jsonl"),
            *[("adversarial", f"anli_r{r}", f"facebook/anli:test_r{r}", f"anli_v1.0/R{r}/test.jsonl")
              for r in (1, 2, 3)]],
    "hsd": [("id", "cad_dev", None, "cad/cad_uid.dev"),
            *[("adversarial", f"dynahate_r{r}_{form}", None, f"dynahate/r{r}_{form}.test")
              for r in (2, 3, 4) for form in ("original", "perturbation")]]}


# ---------------------------------------------------------------- scoring


def read_tests(cfg, training=None):
    """The test sets of a run, {(kind, name): Examples}, and a line on each. --test replaces the task's.
    `training` is read, too, unless given; of a saved classifier only the names of its classes matter."""
    if cfg.task == "built-in":
        sets, _ = built_in()
        return {(kind, kind): sets[kind] for kind in KINDS}, []
    training = training or load_task(cfg)[0]
    wanted = [(kind, name, f"{cfg.data}/{file}" if cfg.data else hub or file)
              for kind, name, hub, file in TESTS.get(cfg.task, []) if not cfg.test]
    for kind, _, path in (test.partition("=") for test in cfg.test):
        require(kind in KINDS and path, f"--test {kind}: write id=FILE, ood=FILE or adversarial=FILE")
        wanted.append((kind, Path(path).stem, path))
    tests, lines, known, classes = {}, [], set(training.texts), len(training.names)
    like = training._replace(names=[*training.names, *(f"non-{name}" for name in training.names)])
    for kind, name, source in wanted:
        require(name not in [other for _, other in tests],
                f"--test {source}: results go by name, and another set is called {name}; rename the file")
        examples = tests[kind, name] = read(source, like)
        non_x = examples.labels.max().item()  # perhaps X / non-X, as in HANS: X's number + classes
        require(non_x < classes or {*examples.labels.tolist()} <= {non_x - classes, non_x},
                f"{source}: labels must be X and {like.names[non_x]} only, or the training set's own")
        lines.append(f"{kind} {name}: {len(examples.texts)} rows, {examples.dropped} more without a label")
        if twins := [row for row, text in enumerate(examples.texts) if text in known]:
            lines[-1] += f"; {len(twins)} also in the training set, such as its rows {str(twins[:9])[1:-1]}"
    return tests, lines


def load_classifier(name, device):
    """(model, tokenizer, names of its classes, in lower case and with e as entailment) of a classifier."""
    with refusing(f"cannot load the classifier {name}", "give the folder or Hub id of a saved classifier"):
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    require(tokenizer.pad_token and not info["missing_keys"], f"{name}: has no trained head or no padding")
    labels = [model.config.id2label[i].lower() for i in range(model.config.num_labels)]
    return model.to(device), tokenizer, [SHORT_LABELS.get(label, label) for label in labels]


def score(name, folder, cfg, tests=None):
    """What the classifier in `folder` says and, below it, the gold labels, {"NAME/KIND/SET": (2, n)}, by the
    numbers of its classes. Without `tests`, sets are read by their names: models number them differently."""
    model, tokenizer, classes = load_classifier(folder, cfg.device)
    tests, answers = tests or read_tests(cfg, Examples([], None, classes))[0], {}
    for (kind, test), examples in tests.items():
        predicted = predict(model, encode(tokenizer, examples, cfg), cfg).argmax(1)
        if (non_x := examples.labels.max()) >= len(classes):  # any class but X becomes non-X
            predicted[predicted != non_x - len(classes)] = non_x
        answers[f"{name}/{kind}/{test}"] = np.stack([predicted, examples.labels])
        right, n = (predicted == examples.labels).sum(), len(predicted)
        print(f"{name} on {test}: {right}/{n} = {100 * right / n:.2f}%", file=sys.stderr)
    return answers


def score_run(folder, run):
    """Score each model of a run on each test set, write model cards, draw; results.json comes last."""
    here = run["config"]["device"] if torch.cuda.is_available() else "cpu"  # trained elsewhere, perhaps
    cfg = Settings(**{**run["config"], "out": str(folder), "device": here})
    training = load_task(cfg)[0]
    require(fingerprint(training) == run["fingerprints"][0], f"{folder}: restore its training set")
    tests, lines = read_tests(cfg, training)
    print(*lines, sep="\n", file=sys.stderr)
    answers, results = {}, {}
    for method in sorted(run["phases"], key=METHODS.index):
        answers |= score(method, folder / method, cfg, tests)
        results[method] = {kind: {test: metrics(*answers[f"{method}/{kind}/{test}"])
                                  for k, test in tests if k == kind} for kind in KINDS}
        write_card(folder / method, run, results[method])
    draw_data_map(folder, run)
    draw_learning_curves(folder, run)
    write(folder / "predictions.npz", lambda partial: np.savez(open(partial, "wb"), **answers))
    write_json(folder / "results.json", results)


def write_card(folder, run, results):
    """README.md of a saved model: what it is, what it cost, how it scores and how it was made."""
    cfg, phase, name = run["config"], run["phases"][folder.name], folder.name
    scores = [f"| {KINDS[kind]} | {test} | {100 * r['accuracy']:.2f} | {100 * r['macro_f1']:.2f} | {r['n']} |"
              for kind, tests in results.items() for test, r in tests.items()]
    flags = [shlex.join([f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])])
             for key, value in cfg.items() if value not in (None, [], "custom")]
    cost = f", {run['cost'][name]:.2f} of ERM's cost, reference included" if name in run["cost"] else ""
    (folder / "README.md").write_text("\n".join([
        f"# {phase['model']}, fine-tuned on {cfg['train'] or cfg['task']} ({name})", "",
        f"Trained with FTFT in one file (Du, Gatt and Nguyen, arXiv 2310.06588): {phase['steps']:,} steps on "
        f"{phase['examples']:,} examples, learning rate {phase['lr']}, seed {cfg['seed']}{cost}.", "",
        "| kind | set | accuracy | macro-F1 | n |", "|---|---|---|---|---|", *scores, "",
        "Made by:", "", "    python ftft.py " + " ".join(flags), ""]))


# ---------------------------------------------------------------- the tables


def load_runs(folders):
    """{folder: (run.json, answers)} of runs of one setting; those not yet scored are scored first."""
    runs, first = {}, {}
    for folder in map(Path, folders):
        with refusing(f"{folder}: is no run", "for a classifier, add --task or --test"):
            run = json.loads((folder / "run.json").read_text())
            cfg = run["config"] | {"training set": run["fingerprints"]}
        first = first or cfg
        unlike = {key for key in cfg if cfg[key] != first.get(key)} - {"seed", "out", "device", "dynamics"}
        require(not unlike, f"{folder}: differs from {folders[0]} in {', '.join(unlike)}; show it alone")
        require(run["cost"] and not (folder / "checkpoint").exists(),
                f"{folder}: did not finish; continue it: python ftft.py --resume {folder}")
        if not ((folder / "predictions.npz").exists() and (folder / "results.json").exists()):
            score_run(folder, run)
        runs[str(folder)] = run, dict(np.load(folder / "predictions.npz", allow_pickle=False))
    return runs


@functools.lru_cache
def resamples(n, draws=1000):
    """How often each of n examples is in the data itself (once: row 0) and in each bootstrap resample of it,
    (1 + draws, n). They are the same for all methods and runs: hence scores on a resample are paired."""
    rng = np.random.default_rng(0)
    counts = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws))
    return np.stack([np.ones(n, "f4"), *map(np.float32, counts)])


def bootstrap(predicted, gold, metric):
    """The metric in % on each of the resamples, (1 + draws,), the first being the data's own."""
    classes = np.union1d(predicted, gold)[:, None]
    said, true = predicted == classes, gold == classes                          # (classes, n)
    hits, said, true = (resamples(len(gold)) @ part.T for part in (said & true, said, true))
    if metric == "accuracy":
        return 100 * hits.sum(1, dtype=float) / len(gold)
    return 100 * np.nanmean(2 * hits / np.where(said + true, said + true, np.nan), axis=1, dtype=float)


def summary(scores):
    """Of scores (runs, 1 + draws): mean and sample deviation; of one run its 95% bootstrap interval."""
    if len(scores) > 1:
        return {"score": scores[:, 0].mean(), "std": scores[:, 0].std(ddof=1)}
    low, high = np.percentile(scores[0, 1:], [2.5, 97.5])
    return {"score": scores[0, 0], "low": low, "high": high}


def compare(runs, against):
    """What is known of runs {folder: (run.json, answers)}, as --json prints it. Intervals of a run are over
    examples; those of a method's difference to `against`, over examples and runs: too narrow for few runs."""
    infos = [run for run, _ in runs.values()]
    spent = {method: {"cost": [run["cost"][method] for run in infos if method in run["cost"]], **{
        key: [run["phases"][method][key] for run in infos] for key in ("examples", "seconds")}}
        for method in sorted(infos[0]["phases"], key=METHODS.index)}
    found = {"metric": "macro_f1" if infos[0]["config"]["task"] == "hsd" else "accuracy", "sets": {},
             "methods": {method: {} for method in spent}, "runs": {}, "differences": {}, "spent": spent}
    scores = {}  # of a method on a set: (runs, 1 + draws)
    for key, pair in (item for _, answers in runs.values() for item in answers.items()):
        method, kind, test = key.rsplit("/", 2)  # that method may be a model on the Hub, with a slash
        found["sets"][test] = {"kind": kind, "n": pair.shape[1]}
        scores.setdefault((method, test), []).append(bootstrap(*pair, found["metric"]))
    picked = np.random.default_rng(0).integers(len(runs), size=(len(runs), len(resamples(1))))
    picked[:, 0] = range(len(runs))  # each resample is of some runs, the data itself of each once
    for (method, test), own in scores.items():
        found["methods"].setdefault(method, {})[test] = summary(np.stack(own))
        for folder, one in zip(runs, own) if len(runs) > 1 else ():
            found["runs"].setdefault(f"{method}, {folder}", {})[test] = summary(one[None])
        if method != against and (against, test) in scores:
            gaps = np.take_along_axis(np.subtract(own, scores[against, test]), picked, axis=0).mean(0)
            found["differences"].setdefault(f"{method} - {against}", {})[test] = summary(gaps[None])
    return found


def spread(values, digits=1):
    """mean ± sample standard deviation, or the value itself where there is one only."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):,.{digits}f}{deviation}"


def table(found):
    """What `compare` found as rows of cells, the first a header: methods, single runs, differences."""
    sets, spent = found["sets"], found["spent"]
    rows = [["", *(KINDS[test["kind"]] for test in sets.values()), *next(iter(spent.values()), ())],
            ["", *sets], ["n", *(f"{test['n']:,}" for test in sets.values())]]
    for part, sign in (("methods", ""), ("runs", ""), ("differences", "+")):
        for name, scores in found[part].items():
            cells = [f"{s['score']:{sign}.1f} " + (f"± {s['std']:.1f}" if "std" in s else
                     f"[{s['low']:{sign}.1f}, {s['high']:{sign}.1f}]") for s in scores.values()]
            rows.append([name, *cells, *(spread(values, 2 * (key == "cost")) if values else ""
                                         for key, values in spent.get(name, {}).items())])
    return rows


def lay_out(rows, markdown):
    """Rows of cells, the first of them a header, as aligned text or as a Markdown table."""
    if markdown:
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def planted_line(folders):
    """Of the built-in task the truth is known: how much of what was planted is among the kept rows?"""
    kept = [json.loads((Path(folder) / "selected.json").read_text())["rows"] for folder in folders]
    shares = (f"{spread([100 * planted[rows].mean() for rows in kept])}% {name} (training set: "
              f"{100 * planted.mean():.1f}%)" for name, planted in built_in()[1].items())
    return f"among the kept rows: {', '.join(shares)}"


def average_ranks(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def transfer(folders):
    """Of each pair of models with dynamics in these runs: the share of the rows kept as ambiguous by one that
    the other keeps, too, what chance gives, and Spearman's rank correlation of statistics of all rows."""
    paths = sorted({path.parent for folder in folders for path in Path(folder).glob("*/dynamics.npz")})
    require(len(paths) > 1, f"--transfer {folders}: fewer than two models with dynamics; name more runs")
    run, kept, ranks = json.loads((paths[0].parent / "run.json").read_text()), {}, {}
    for path in map(str, paths):
        logits, labels, _ = load_dynamics(path, run["fingerprints"][0])
        statistics = data_map(logits, labels)
        kept[path] = {*select("ambiguous", run["config"]["fraction"], 0, labels, logits)[0].tolist()}
        ranks[path] = {key: average_ranks(statistics[key]) for key in ("variability", "confidence")}
    return [{"a": a, "b": b, "overlap": round(len(kept[a] & kept[b]) / len(kept[a]), 3),
             "chance": run["config"]["fraction"], **{
                 f"rho_{key}": round(np.corrcoef(ranks[a][key], ranks[b][key])[0, 1], 3) for key in ranks[a]}}
            for a, b in itertools.combinations(kept, 2)]


# ---------------------------------------------------------------- figures


def draw_data_map(folder, run):
    """data_map.png: the examples by variability and confidence, in hexagons, each in the colour of its mean
    correctness and the paler the fewer it holds; red around those with kept rows."""
    path = Path(run["config"]["dynamics"] or folder / "ref")
    if not path.exists():
        return
    logits, labels, _ = load_dynamics(path, run["fingerprints"][0])
    y, x, correctness, _ = map(np.asarray, data_map(logits, labels).values())
    kept = json.loads((folder / "selected.json").read_text())["rows"]
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    grid = dict(gridsize=60, mincnt=1, extent=(0, x.max(), 0, 1))
    colours = axes.hexbin(x, y, correctness, vmin=0, vmax=1, linewidths=0, **grid)
    counts = axes.hexbin(x, y, visible=False, **grid).get_array()
    colours.set_alpha(0.3 + 0.7 * np.log(counts) / np.log(counts.max() + 1))
    frames = axes.hexbin(x[kept], y[kept], **grid)
    frames.set(array=None, facecolor="none", edgecolor="crimson", linewidth=0.5)
    figure.colorbar(colours, label="correctness (share of epochs)")
    axes.set(xlabel="variability (spread of p(gold) over epochs)", ylabel="confidence (mean of p(gold))",
             title=f"{len(x):,} examples (paler: fewer), {len(kept):,} kept (red)")
    figure.savefig(folder / "data_map.png", dpi=150)


def draw_learning_curves(folder, run):
    """learning_curves.png: dev score against cost, the reference's included; a cross at an early stop."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for method in (m for m in METHODS if m in run["cost"] and run["phases"][m]["dev"]):
        phase = run["phases"][method]
        steps, scores = np.array(phase["dev"]).T
        # what was spent in the end, less what was still to be trained
        cost = run["cost"][method] + phase["flops"] / phase["erm_flops"] * (steps / phase["steps"] - 1)
        curve, = axes.plot(cost, 100 * scores, marker=".", label=method)
        if phase["steps"] < phase["budget"]:
            axes.plot(cost[-1], 100 * scores[-1], marker="x", markersize=10, color=curve.get_color())
    if axes.lines:
        axes.set(xlabel="cost relative to ERM", ylabel="mean dev score (%)")
        axes.legend(title="x: stopped early")
        figure.savefig(folder / "learning_curves.png", dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: require(False, message)
    parser.add_argument("names", nargs="+", help="folders of runs; or classifiers, with --task or --test")
    parser.add_argument("--task", choices=list(TESTS), help="score classifiers on the test sets of this task")
    parser.add_argument("--data", help="folder with these as their authors release them, instead of the Hub")
    parser.add_argument("--test", nargs="+", default=(), help="or on id=FILE, ood=FILE, adversarial=FILE ..")
    parser.add_argument("--against", default="erm", help="compare the others with this method (default: erm)")
    parser.add_argument("--transfer", action="store_true", help="compare the training dynamics of these runs")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # the libraries' (new heads, retries)
    transformers.utils.logging.disable_progress_bar()
    if args.transfer:
        found = transfer(args.names)
        lines = ["overlap of the kept rows, what chance gives, and Spearman's rank correlations"]
        rows = [[*found[0]], *([*map(str, pair.values())] for pair in found)]
    else:
        if args.task or args.test:
            cfg = Settings(task=args.task, data=args.data, test=args.test)
            answers = {key: pair for name in args.names for key, pair in score(name, name, cfg).items()}
            runs = {"": ({"config": vars(cfg), "phases": {}, "cost": {}}, answers)}
        else:
            runs = load_runs(args.names)
        found = compare(runs, args.against)
        lines = [f"{found['metric']} in %, [95% interval], and mean ± standard deviation over runs",
                 "cost relative to ERM, the reference's included; examples and seconds of the method alone"]
        rows = table(found)
        if all(run["config"]["task"] == "built-in" for run, _ in runs.values()):
            lines.append(planted_line(runs))
    text = "\n".join(["", *lines, "", lay_out(rows, args.markdown)])
    print(json.dumps(found, indent=1) if args.json else text)


if __name__ == "__main__":
    main()
