"""Bring the results of runs by older versions (up to commit ae9b1a6) to today's layout, in place.

  python assets/convert.py assets/results/mpnet-?
  python assets/convert.py assets/results/mpnet-?-ref2 --commit ae9b1a6    # enter what made them

run.json: one fingerprint (of the training set) in place of a list of them; each cost in its phase;
settings without --task, --data and --resume, and without --skip-epochs where that was 0; the built-
in task as the sets `built-in:..`. selected.json: {METHOD: [rows]}; what it also said of those rows
goes to "kept" of the phase in run.json (shares of each class in them and in all rows; share of them
that are among the hardest). predictions.npz and results.json stay as they are. What has today's
layout is left alone.
"""
import argparse
import copy
import json
from pathlib import Path


def convert(run, selected):
    """Change what run.json and selected.json hold to today's layout, in place."""
    if "fingerprints" in run:
        run["fingerprint"] = run.pop("fingerprints")[0]
    for method, cost in run.pop("cost", {}).items():
        run["phases"][method]["cost"] = cost
    config = run["config"]
    if config.pop("task", None) == "built-in":
        config["train"] = "built-in:train"
        config["test"] = [f"{kind}=built-in:{kind}" for kind in ("id", "ood", "adversarial")]
    if not config.get("skip_epochs"):
        config.pop("skip_epochs", None)
    for name in ("data", "resume"):
        config.pop(name, None)
    config.setdefault("ref_epochs", config["epochs"])
    for method, kept in selected.items():
        if isinstance(kept, dict):
            selected[method] = kept["rows"]
            run["phases"][method]["kept"] = {key: kept[key] for key in ("classes", "hardest")}


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--commit", help="the version that made these runs, where none is entered")
    args = parser.parse_args()
    for folder in args.folders:
        run_path, selected_path = folder / "run.json", folder / "selected.json"
        run = json.loads(run_path.read_text())
        selected = json.loads(selected_path.read_text()) if selected_path.exists() else {}
        before = copy.deepcopy((run, selected))
        convert(run, selected)
        if args.commit:
            run.setdefault("commit", args.commit)
        if run != before[0]:
            run_path.write_text(json.dumps(run, indent=1))
        if selected != before[1]:
            selected_path.write_text(json.dumps(selected))  # on one line: these are long
        print(f"{folder}: {'changed' if (run, selected) != before else 'nothing to do'}")


if __name__ == "__main__":
    main()
