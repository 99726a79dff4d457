"""Print the tables of EVIDENCE.md that `python eval.py assets/results/..` does not print.

  python assets/tables.py cheap      # MPNet: all settings side by side; where patience 1 stops
  python assets/tables.py rates      # MPNet, seeds 10 and 11: ERM and FTFT at a rate of 5e-5
  python assets/tables.py mpnet      # MPNet: erm-es, random, ERM, FTFT; how soon each learns
  python assets/tables.py thirds     # MPNet: random thirds beside FTFT and ERM of the same seeds
  python assets/tables.py minilm     # MiniLM: kept rows, "toxic" said, AUROC
  python assets/tables.py epoch1     # dev scores with and without epoch 1
  python assets/tables.py size       # dev scores by fraction and by size
  python assets/tables.py wrong      # wrong labels among the 240 rows of lowest confidence; it
                                     # reads runs/built-in-0, which `python ftft.py` leaves

A row joins one method's runs, one a seed, from several folders; methods that lack a seed are left
out, and named. Scores and intervals are eval.py's.
"""
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval  # not Python's eval but eval.py

RESULTS = Path(__file__).parent / "results"
MPNET = {  # name: the places to look for it, as FOLDER/METHOD; N is the seed
    "erm": ["mpnet-N/erm"],
    "erm-es": ["mpnet-N-erm-es/erm-es", "mpnet-N/erm"],  # seed 1 never stops: it is ERM
    "erm-half": ["mpnet-N-erm-half/erm"],
    "random": ["mpnet-N-random/random"],
    "random-as-ftft": ["mpnet-N-random-as-ftft/random-as-ftft"],
    "ftft": ["mpnet-N/ftft"],
    "ftft-patience1": ["mpnet-N-patience1/ftft", "mpnet-N/ftft patience 1"],
    "ftft-ref2": ["mpnet-N-ref2/ftft"],
    "ftft-ref2-patience1": ["mpnet-N-ref2-patience1/ftft", "mpnet-N-ref2/ftft patience 1"],
    "ftft-fast": ["mpnet-N-fast/ftft"]}  # 278 steps at 5e-5


def read(folder):
    """(run.json, selected.json, predictions) of a run."""
    folder = RESULTS / folder
    selected = folder / "selected.json"
    return (json.loads((folder / "run.json").read_text()),
            json.loads(selected.read_text()) if selected.exists() else {},
            dict(np.load(folder / "predictions.npz")))


def evaluations(phase):
    """[(step, dev score)] of a phase, without those in the warm-up."""
    warmup = max(1, round(0.1 * phase["budget"]))
    return [(step, score) for step, score in phase["dev"] if step > warmup]


def stop(phase, patience):
    """(steps, best score): where a phase would have stopped with this patience."""
    best, waited, last = -1, 0, phase["steps"]
    for step, score in evaluations(phase):
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if waited >= patience:
            return step, best
    return last, best


def find(places, seed, erm_flops):
    """(phase, rows, predictions) of one method and seed, or None. The cost in the phase is made
    relative to `erm_flops`."""
    for place in places:
        folder, method = place.replace("N", str(seed)).split(" ")[0].split("/")
        if not (RESULTS / folder / "results.json").exists():
            continue
        run, selected, answers = read(folder)
        phase = run["phases"][method]
        source = phase["cost"] * phase["erm_flops"] - phase["flops"]  # what the reference took
        if place.endswith("patience 1"):
            steps, best = stop(phase, 1)
            if best < stop(phase, 2)[1]:  # it would have ended with other weights
                continue
            share = steps / phase["steps"]
            phase |= {"steps": steps, "flops": share * phase["flops"],
                      "seconds": share * phase["seconds"],
                      "dev": [pair for pair in phase["dev"] if pair[0] <= steps]}
        phase["cost"] = (source + phase["flops"]) / erm_flops
        return phase, selected.get(method), {key.split("/", 1)[1]: pair for key, pair in
                                             answers.items() if key.startswith(method + "/")}
    return None


def join(table, names, seeds):
    """{seed: (run, predictions)} as eval.compare takes it, of the methods that have all seeds."""
    runs, missing = {seed: [{}, {}, {}] for seed in seeds}, []
    for name in names:
        found = {}
        for seed in seeds:
            folder, method = table["erm"][0].replace("N", str(seed)).split("/")
            erm_flops = read(folder)[0]["phases"][method]["erm_flops"]
            found[seed] = find(table[name], seed, erm_flops)
        if None in found.values():
            missing.append(f"{name} (seeds {[s for s in seeds if found[s] is None]})")
            continue
        for seed, (phase, rows, answers) in found.items():
            runs[seed][0][name] = phase
            runs[seed][2].update({f"{name}/{key}": pair for key, pair in answers.items()})
            if rows:
                runs[seed][1][name] = rows
    if missing:
        print("not there:", ", ".join(missing))
    config = {"metric": "macro-f1", "train": "train.jsonl", "limit": None}
    return {f"seed {seed}": ({"config": config, "phases": phases, "selected": selected}, answers)
            for seed, (phases, selected, answers) in runs.items()}


def show(runs, against, parts=("methods", "differences")):
    """Print eval.py's table of scores against each of these methods, then that on training."""
    for other in against:
        if other in next(iter(runs.values()))[0]["phases"]:
            found = eval.compare(runs, other)
            for part in {"methods", "runs", "differences"} - {*parts}:
                found[part] = {}
            print("\n" + eval.lay_out(eval.tables(found)[0], True))
            parts = ("differences",)
    print("\n" + eval.lay_out(eval.tables(found)[1], True))


def by_seed(runs, method, against):
    """Print the differences and the cost of each seed."""
    for seed, (run, answers) in runs.items():
        gaps = [100 * (eval.metrics(*answers[f"{method}/{key}"])["macro-f1"]
                       - eval.metrics(*answers[f"{against}/{key}"])["macro-f1"])
                for key in (k.split("/", 1)[1] for k in answers if k.startswith(method + "/"))]
        print(f"{method} - {against}, {seed}:", *(f"{gap:+.1f}" for gap in gaps),
              f"cost {run['phases'][method]['cost']:.2f}")


def learning(runs):
    """Print each seed's best dev score; when it was as high as ERM's best, as a share of ERM's
    steps and cost, the reference's included; ERM's best at no more than this method's cost."""
    for seed, (run, _) in runs.items():
        erm = run["phases"]["erm"]
        goal = max(score for _, score in evaluations(erm))
        for name, phase in run["phases"].items():
            own = phase["flops"] / phase["erm_flops"]
            first = next((step for step, score in evaluations(phase) if score >= goal), None)
            reached = "never" if first is None else (
                f"at {first / erm['budget']:.2f} of ERM's steps, "
                f"{phase['cost'] + own * (first / phase['steps'] - 1):.2f} of its cost")
            then = max((score for step, score in evaluations(erm)
                        if step / erm["budget"] <= phase["cost"]), default=np.nan)
            steps, best = stop(phase, 1)
            print(f"{seed} {name}: dev {100 * max(s for _, s in evaluations(phase)):.1f}, reached "
                  f"{reached}, ERM then {100 * then:.1f}; patience 1 stops at {steps} of "
                  f"{phase['steps']} steps, dev {100 * best:.1f}")


def kept(runs):
    """Print the shares of the kept rows: toxic, hardest, kept with another seed."""
    for name, phase in next(iter(runs.values()))[0]["phases"].items():
        notes = [run["phases"][name].get("kept") for run, _ in runs.values()]
        if all(notes):
            hardest = [100 * note["hardest"] for note in notes if note["hardest"] is not None]
            rows = [run["selected"][name] for run, _ in runs.values()]
            again = [100 * np.isin(a, b).mean() for a, b in itertools.combinations(rows, 2)]
            toxic = [[100 * share for share in note["classes"]["toxic"]] for note in notes]
            print(f"{name}: toxic {eval.spread([own for own, _ in toxic])} (of all rows "
                  f"{toxic[0][1]:.1f}), hardest {eval.spread(hardest)}, again "
                  f"{eval.spread(again)}: {np.round(again, 1)}")


def said(runs):
    """Print how often a model says "toxic" (class 1), in %: of all texts, the toxic, the others."""
    first = next(iter(runs.values()))
    for name in first[0]["phases"]:
        for key in (key for key in first[1] if key.startswith(name + "/")):
            pairs = [answers[key] == 1 for _, answers in runs.values()]
            shares = [(said.mean(), said[gold].mean(), said[~gold].mean()) for said, gold in pairs]
            print(f"{key}: said of {{:.1f}} of all, {{:.0f}} of the toxic, {{:.0f}} of the others; "
                  f"{100 * pairs[0][1].mean():.1f} are".format(*100 * np.mean(shares, 0)))


def auroc(folders):
    """Print the mean AUROC of each model on each set, from auroc.json, and the seeds'."""
    found = [json.loads((RESULTS / folder / "auroc.json").read_text()) for folder in folders]
    for method, sets in found[0].items():
        for name in sets:
            values = [100 * one[method][name]["auroc"] for one in found]
            print(f"AUROC {method}, {name}: {eval.spread(values)} {np.round(values, 1)}")


def dev(pattern, seeds=("",), erm=None):
    """Print the best dev score of each method in these folders."""
    for seed in seeds:
        run = read(pattern.replace("N", str(seed)))[0]
        for name, phase in run["phases"].items():
            cost, note = phase.get("cost"), phase.get("kept")
            if erm and cost:
                cost *= phase["erm_flops"] / read(erm.replace("N", str(seed)))[0][
                    "phases"]["erm"]["erm_flops"]
            more = (f", toxic {note['classes']['toxic'][0]:.1%}"
                    f", hardest {note['hardest'] or np.nan:.1%}") if note else ""
            print(f"{pattern.replace('N', str(seed))} {name}: dev "
                  f"{100 * max(s for _, s in evaluations(phase)):.1f}, steps {phase['steps']} of "
                  f"{phase['budget']}" + (f", cost {cost:.2f}" if cost else "") + more)


def main(section):
    if section == "cheap":
        names = [name for name in MPNET if name != "random-as-ftft"]
        runs = join(MPNET, names, range(4))
        show(runs, ["erm", "erm-half", "ftft"])
        learning(runs), kept(runs)
        for seed, (run, _) in runs.items():
            if "ftft-ref2" in run["selected"]:
                both = np.isin(run["selected"]["ftft-ref2"], run["selected"]["ftft"]).mean()
                print(f"{seed}: {both:.1%} of ftft-ref2's rows are ftft's")
        for name in list(run["phases"])[1:]:
            by_seed(runs, name, "erm")
    elif section == "rates":
        dev("mpnet-N", (10, 11))
        table = {"erm": ["mpnet-N-lr5/erm"], "erm-half": ["mpnet-N-half-lr5/erm"],
                 "ftft-fast": ["mpnet-N-fast/ftft"]}
        runs = join(table, table, (10, 11))
        show(runs, ["erm", "erm-half"])
        by_seed(runs, "ftft-fast", "erm"), learning(runs)
    elif section == "mpnet":
        runs = join(MPNET, ["erm", "erm-es", "random", "ftft"], range(4))
        show(runs, ["erm", "erm-es", "random"])
        by_seed(runs, "ftft", "erm"), by_seed(runs, "erm-es", "erm")
        learning(runs), kept(runs), said(runs)
        auroc(["mpnet-2", "mpnet-3"]), auroc(["mpnet-2-erm-es", "mpnet-3-erm-es"])
    elif section == "thirds":
        runs = join(MPNET, ["erm", "random", "random-as-ftft", "ftft"], range(2))
        show(runs, ["erm", "random", "random-as-ftft"])
        learning(runs), kept(runs), said(runs)
    elif section == "wrong":
        wrong = eval.built_in()[1]["mislabelled"]
        path = "runs/built-in-0/ref/data_map.csv"
        confidence = np.loadtxt(path, delimiter=",", skiprows=1, usecols=2)
        found = wrong[confidence.argsort(kind="stable")[:240]].sum()
        print(f"{found} of the 240 rows of lowest confidence are mislabelled, of {wrong.sum()}")
    elif section == "minilm":
        names = ["erm", "erm-es", "random", "random-as-ftft", "ftft", "ftft-per-class", "dm"]
        runs = join({name: [f"cad-N/{name}"] for name in names}, names, range(4))
        by_seed(runs, "ftft", "erm"), learning(runs), kept(runs), said(runs)
        auroc([f"cad-{seed}" for seed in range(4)])
    elif section == "epoch1":
        for folder in ("epoch1-N", "epoch1-N-skip1", "epoch1-N-ref6", "epoch1-N-ref6-skip1"):
            dev(folder, range(10, 13), "epoch1-N")
    elif section == "size":
        for folder in ("size-1666", "size-3332", "size-6664", "size-random", "fraction-0.17",
                       "fraction-0.5", "epoch1-10"):
            dev(folder)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
