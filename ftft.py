"""FTFT: fine-tune a large model on the training examples that a small model finds ambiguous.

Shortcuts solve most training examples, so models that learn them break on out-of-distribution and
adversarial input. The idea: a model becomes more robust if it trains on the examples that models
keep changing their mind about, and a much smaller model can find them. FTFT (Du, Gatt and Nguyen,
arXiv 2310.06588) has four steps:

  1. Fine-tune a small reference model on all n training examples, and log its training dynamics:
     `dynamics` (epochs, n, classes) holds each example's logits in each epoch, as it trains.
  2. Draw the data map: `confidence` and `variability` (n,) are the mean and the standard
     deviation of p(gold), the probability of the correct class, over the epochs.
  3. Keep `rows` (k,), the third of the examples with the highest variability.
  4. Fine-tune the large main model on those rows only, for fewer steps or with early stopping.

  python ftft.py                                            # made-up task, offline, a CPU will do
  python ftft.py --ref deberta-small --main deberta-large   # MultiNLI; tested on ANLI, HANS, WANLI

The same command again goes on with a run that was cut short. The method ends with `main`.
"""
import argparse
import collections
import contextlib
import csv
import hashlib
import itertools
import json
import logging
import math
import os
import sys
import time
import zlib
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm
import transformers
from safetensors import SafetensorError

# ---------- settings

# How to train the main model: on which rows, and whose data map chooses them.
METHODS = {"erm": ("all", None),  # plain fine-tuning (empirical risk minimization)
           "erm-es": ("all", None),  # the same for fewer steps
           "random": ("random", None),
           "easy": ("highest confidence", "ref"),
           "hard": ("lowest confidence", "ref"),
           "ftft": ("highest variability", "ref"),
           "dm": ("highest variability", "erm")}  # dataset cartography: the main model's own map
FULL = ("ref", "erm")  # these log dynamics and never stop early; `check` puts them first
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
# Which of torchrun's processes this is, and how many there are: alone, 0 and 1.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def settings(argv=None):
    """Read the command line into a namespace, `cfg`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("method").add_argument
    add("--ref", help="reference model: a short name (deberta-small, ..), Hub id or folder")
    add("--main", help="main model, likewise")
    add("--dynamics", metavar="DIR", help="an earlier reference to reuse, such as runs/a/ref")
    add("--methods", nargs="+", choices=METHODS, default=["ftft"], metavar="METHOD",
        help="how to train the main model: ftft (default), erm, erm-es, random, easy, hard, dm")
    add("--fraction", type=float, default=0.33, help="share of the rows to keep (0.33)")

    add = parser.add_argument_group("data").add_argument
    add("--train", metavar="FILE", help=".jsonl, .csv, .tsv or owner/name:split (Hub)")
    add("--dev", nargs="+", default=[], metavar="FILE", help="sets to stop and choose weights by")
    add("--test", nargs="+", default=[], metavar="KIND=FILE", help="KIND: id, ood or adversarial")
    add("--limit", type=int, help="use the first N training rows")
    add("--metric", choices=["accuracy", "macro-f1"], default="accuracy", help="(accuracy)")
    add("--out", metavar="DIR", help="folder of the run (runs/DATA-SEED)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=4, help="passes of erm over all rows (4)")
    add("--ref-epochs", type=int, help="those of the reference (as --epochs)")
    add("--steps", type=int, help="of methods but erm (as erm; without --dev a third)")
    add("--patience", type=int, default=2, help="stop after N of 12 evaluations without a rise (2)")
    add("--batch-size", type=int, default=32, help="rows in a step (32)")
    add("--lr", type=float, help="main model's learning rate (2e-5; above 200M weights 1e-5)")
    add("--ref-lr", type=float, default=2e-5, help="the reference's (2e-5)")
    add("--max-length", type=int, default=300, help="cut inputs at N tokens (300)")
    add("--seed", type=int, default=0, help="for new weights, order, dropout, random rows (0)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="such as cuda or cpu (a GPU, if there is one)")
    add("--amp", choices=AMP, help="mixed precision (on cuda bf16 or fp16, else off)")
    add("--grad-accum", type=int, default=1, help="pieces to split a batch into, for memory (1)")
    return check(parser, argv)


# ---------- data map and selection


def data_map(dynamics, labels):
    """Statistics of each example over the epochs (Swayamdipta et al. 2020, section 2).

    dynamics: logits (epochs, n, classes); labels: gold classes (n,). Returns, each (n,):
    confidence   mean of p(gold)
    variability  standard deviation of p(gold), dividing by the number of epochs
    correctness  share of the epochs in which the gold class had the highest logit
    """
    assert dynamics.isfinite().all(), "an example was not visited in every epoch"
    p_gold = dynamics.softmax(-1)[:, torch.arange(len(labels)), labels]  # (epochs, n)
    correct = dynamics.argmax(-1) == labels  # (epochs, n)
    return p_gold.mean(0), p_gold.std(0, correction=0), correct.float().mean(0)


def select(score, fraction):
    """The rows with the highest scores: exactly k = round(fraction * n) of them.

    score: (n,). Returns rows (k,), ascending. Ties go to the lower row number.
    """
    rows = score.argsort(descending=True, stable=True)[:round(fraction * len(score))]
    return rows.sort().values


# ---------- the training loop


def seed_for(*what):
    """A seed for what is named, such as (0, "ftft", 3): the same in every process."""
    return zlib.crc32(" ".join(map(str, what)).encode())


def train(name, model, data, dev, rows, steps, lr, cfg, dynamics=None):
    """Fine-tune `model` in place; it ends with the weights that did best on the dev sets, if any.

    data, dev: the training set and a list of dev sets, Encoded. rows (k,): what to train on.
    steps: the budget. dynamics (epochs, n, classes): where to log the logits. Returns `done`.
    """
    device, warmup = model.device, max(1, round(0.1 * steps))
    epochs = math.ceil(steps / math.ceil(len(rows) / cfg.batch_size))
    points = {math.ceil(steps * i / 12) for i in range(1, 13)}  # after these, evaluate and save
    # Row numbers go to the device before the loop, so that no step has to wait for them.
    order = [(epoch, batch, batch.to(device)) for epoch in range(epochs) for batch in
             batches(rows, data.lengths, cfg.batch_size, seed_for(cfg.seed, name, epoch))][:steps]
    net = model if WORLD == 1 else torch.nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr, eps=1e-6, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    done = {"steps": 0, "seconds": 0.0, "dev": [], "best": -1.0, "waited": 0}
    done, best_weights = load_checkpoint(cfg, name, parts, dynamics) or (done, None)
    broken = torch.zeros((), device=device)  # above 0: a logit or a gradient was not finite
    bar = tqdm.tqdm(order[done["steps"]:], name, steps, initial=done["steps"], unit="step",
                    leave=False, disable=RANK > 0 or None)  # None: if not a terminal
    model.train()
    began = time.perf_counter()
    for step, (epoch, batch, placed) in enumerate(bar, done["steps"]):
        if name not in FULL and done["waited"] >= cfg.patience:
            break  # here, as a run may go on with its patience used up

        # Forward and backward, in pieces. Each process works through every WORLD-th row, and DDP
        # averages their gradients: the result is the gradient of the batch's mean loss.
        torch.manual_seed(seed_for(cfg.seed, name, step, RANK))  # so dropout has no state to save
        mine, weight, loss = placed[RANK::WORLD], WORLD / len(batch), 0.0
        if len(mine) == 0:  # DDP waits for all: without a row, join in with one at weight 0
            mine, weight = placed[:1], 0.0
        longest = data.lengths[batch].max().item()
        pieces = mine.split(math.ceil(cfg.batch_size / WORLD / cfg.grad_accum))
        for piece in pieces:  # row numbers (b,)
            net.require_backward_grad_sync = piece is pieces[-1]  # DDP syncs once a step
            with torch.autocast(device.type, AMP[cfg.amp], enabled=cfg.amp != "off"):
                logits = net(**collate(data, piece, longest)).logits.float()  # (b, classes)
            piece_loss = weight * F.cross_entropy(logits, data.labels[piece], reduction="sum")
            scaler.scale(piece_loss).backward()
            loss += piece_loss.detach()

            # Log the dynamics: with dropout, before the update, as cartography and the authors do.
            if dynamics is not None and weight:  # at weight 0, the row is another process's
                dynamics[epoch, piece] = logits.detach()
            broken += ~logits.isfinite().all()

        # Update. As in transformers, the rate is 0 in the first step, rises, then falls to 0.
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warmup, (steps - step) / max(1, steps - warmup))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        broken += ~norm.isfinite() & (not scaler.is_enabled())
        scaler.step(optimizer)  # leaves out a step whose fp16 gradients overflowed
        scaler.update()
        optimizer.zero_grad()
        done["steps"] = after = step + 1
        if step % 50 == 0 or after in points:  # only now the host waits for the device
            bar.set_postfix(loss=loss.item())
        if after not in points:
            continue

        # Evaluate, keep the best. Each overflow in fp16 halves the scale, from 65,536.
        require(not ranks_max(broken).item() and scaler.get_scale() > 1e-3, f"{name}: overflow or "
                f"divergence by step {after}; give a lower rate or --amp off, and a new --out")
        done["seconds"] += time.perf_counter() - began
        report = f"{name}: step {after:,} of {steps:,}, loss {loss.item():.3f}"
        if dev:
            score = np.mean([metrics(predict(model, one, cfg).argmax(1), one.labels.cpu())[
                cfg.metric] for one in dev]).item()
            model.train()
            report += f", dev {100 * score:.1f}"
            done["dev"].append([after, score])
            done["waited"] += after > warmup  # in the warm-up, scores mean little
            if after > warmup and score > done["best"]:
                done["best"], done["waited"] = score, 0
                best_weights = {key: x.cpu().clone() for key, x in model.state_dict().items()}
        say(report)

        # Checkpoint.
        if dynamics is not None:
            ranks_max(dynamics)  # the maximum: one process wrote a cell, the others have -inf
        save_checkpoint(cfg, name, parts, dynamics, done, best_weights)
        began = time.perf_counter()
    bar.close()
    seen = torch.cat([batch for _, batch, _ in order[:done["steps"]]])
    done |= {"examples": len(seen), "tokens": data.lengths[seen].sum().item()}
    if best_weights:
        model.load_state_dict(best_weights)
    return done


# ---------- the run


def budget(name, n, cfg):
    """The most steps of a phase (ref or a method). ref and erm take their epochs over all n rows;
    the others --steps: by default as many as erm if dev sets can stop them, else a third."""
    epochs = cfg.ref_epochs if name == "ref" else cfg.epochs
    steps = epochs * math.ceil(n / cfg.batch_size)
    if name not in FULL:
        steps = cfg.steps or (steps if cfg.dev else round(steps / 3))
    require(steps > 1 and 0 < round(cfg.fraction * n) <= n,
            f"{name}: unfit steps or rows; change --epochs, --steps or --fraction")
    return steps


def main(cfg, training, dev):
    """Run FTFT, and the methods to compare it with, which skip the steps that they do not need.

    training: Examples; dev: a list of them. `fine_tune` loads a model, makes its `dynamics` (for
    ref and erm; at first all -inf), calls `train`, and saves both.
    """
    run, todo = open_run(cfg, training)
    everything = torch.arange(len(training.labels))

    # Step 1. Fine-tune the small reference model on everything, and log its training dynamics.
    if "ref" in todo:
        fine_tune("ref", everything, training, dev, cfg, run)
        todo.remove("ref")

    for name in todo:
        keep, source = METHODS[name]
        rows, source_flops = everything, 0
        if source:
            # Step 2. Draw the data map of the reference (for dm, of the main model by erm).
            folder = cfg.dynamics if source == "ref" and cfg.dynamics else Path(cfg.out, source)
            dynamics, labels, source_flops = load_dynamics(folder, run)
            confidence, variability, _ = data_map(dynamics, labels)
            score = {"highest variability": variability, "highest confidence": confidence,
                     "lowest confidence": -confidence}[keep]
        elif keep == "random":
            generator = torch.Generator().manual_seed(seed_for(cfg.seed, "random rows"))
            score = torch.rand(len(everything), generator=generator)
        if keep != "all":
            # Step 3. Keep the rows that the method favours: ftft those whose p(gold) swings most.
            rows = select(score, cfg.fraction)
            record_selection(name, rows, training, cfg)
        # Step 4. Fine-tune the large main model on those rows only (erm: on all).
        fine_tune(name, rows, training, dev, cfg, run, source_flops)
    if RANK == 0:  # the run is complete
        Path(cfg.out, "checkpoint.pt").unlink(missing_ok=True)


# ---------- machinery: models and batches

MODELS = {
    **{f"deberta-{s}": f"microsoft/deberta-v3-{s}" for s in ("xsmall", "small", "base", "large")},
    **{f"electra-{s}": f"google/electra-{s}-discriminator" for s in ("small", "base", "large")},
    **{f"roberta-{s}": f"FacebookAI/roberta-{s}" for s in ("base", "large")},
    **{f"bert-{s}": f"google-bert/bert-{s}-uncased" for s in ("base", "large")}}

# Tokenized examples. On the model's device: tokens {name: (all tokens,)}, those of row i from
# starts[i] to ends[i]; labels (n,). On the CPU: lengths (n,). pad: the padding's number.
Encoded = collections.namedtuple("Encoded", "tokens starts ends labels lengths pad")


def load(name, device, classes=()):
    """A pretrained model with a new head for these classes, or as it is (none), and its tokenizer.
    Weights are float32: DeBERTa-v3's are stored in fp16."""
    extra = {"id2label": dict(enumerate(classes)), "problem_type": None,
             "label2id": dict(zip(classes, range(len(classes))))} if classes else {}
    logging.disable(logging.WARNING)  # of new heads and retries
    transformers.utils.logging.disable_progress_bar()
    if name in BUILT_IN_MODELS:
        return built_in_model(name, extra, device)
    hub = name if Path(name).is_dir() else MODELS.get(name, name)
    with refusing(f"{name}: cannot be loaded", "give a short name, Hub id or folder"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(hub, trust_remote_code=False)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            hub, **extra, dtype=torch.float32, ignore_mismatched_sizes=True,
            output_loading_info=True, trust_remote_code=False)
        model.to(device)
    require(tokenizer.pad_token and tokenizer.padding_side == "right",
            f"{name}: has no padding token, or pads on the left; take one like bert-base")
    base = model.base_model_prefix + "."
    fresh = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if classes:  # the head, and the pooler that belongs to it, may be new
        fresh = [key for key in fresh if key.startswith(base) and "pooler" not in key]
    require(not fresh, f"{name}: lacks {some(sorted(fresh))}, which would be random")
    for key, part in model.named_parameters() if classes else ():  # as transformers does
        if not key.startswith(base) and "norm" not in key.lower():
            part.data.normal_(0, getattr(model.config, "initializer_range", 0.02) * (part.ndim > 1))
    return model, tokenizer


def encode(model, tokenizer, examples, cfg):
    """Examples as Encoded, unless the tokenizer or the model cannot take them."""
    name, device = model.name_or_path, model.device
    lists = collections.defaultdict(list)
    for start in range(0, len(examples.texts), 10_000):  # to save memory
        part = tokenizer(*map(list, zip(*examples.texts[start:start + 10_000])), truncation=True,
                         max_length=min(cfg.max_length, tokenizer.model_max_length))
        for key in {*part} - {"attention_mask"}:
            lists[key] += [np.array(row, np.int32) for row in part[key]]
    tokens = {key: torch.from_numpy(np.concatenate(rows)).to(device) for key, rows in lists.items()}
    ids, lengths = tokens["input_ids"].cpu().numpy(), torch.tensor([*map(len, lists["input_ids"])])
    unique = len({row.tobytes() for row in lists["input_ids"]}) / len({*examples.texts})
    unknown = ids == tokenizer.unk_token_id
    words = unknown | ~np.isin(ids, tokenizer.all_special_ids)
    unknown = unknown.sum() / max(1, words.sum())
    require(unknown <= 0.5 <= unique and ids.max() < len(model.get_input_embeddings().weight),
            f"{name}: wrong tokenizer or low --max-length: {unknown:.0%} of the words are unknown, "
            f"{1 - unique:.0%} of the texts look the same")
    ends = lengths.cumsum(0).to(device)
    data = Encoded(tokens, ends - lengths.to(device), ends, examples.labels.to(device), lengths,
                   tokenizer.pad_token_id)
    with refusing(f"{name}: cannot take these texts", "try a lower --max-length"), torch.no_grad():
        row = lengths.argmax(0, keepdim=True)
        model(**collate(data, row.to(device), lengths[row].item())).logits.sum().item()
    return data


def collate(data, rows, longest):
    """Model inputs for these rows, each (rows, longest), gathered on the device."""
    at = data.starts[rows, None] + torch.arange(longest, device=rows.device)
    real = at < data.ends[rows, None]  # (rows, longest)
    inputs = {key: column[at * real].long() * real for key, column in data.tokens.items()}
    inputs["input_ids"] += data.pad * ~real
    return inputs | {"attention_mask": real.long()}


def batches(rows, lengths, size, seed):
    """One epoch's batches of rows of like length: random batches of MultiNLI are 60% padding.
    Shuffled rows are cut into pools; each is sorted by length, with some noise, and cut. The
    largest batch comes first: if memory runs out, then mostly at once."""
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    key = lengths * (1 + 0.05 * torch.rand(len(lengths), generator=generator))
    cut = [batch for pool in rows.split(100 * size)
           for batch in pool[key[pool].argsort()].split(size)]
    cut = [cut[i] for i in torch.randperm(len(cut), generator=generator)]
    largest = max(range(len(cut)), key=lambda i: len(cut[i]) * lengths[cut[i]].max())
    return [cut.pop(largest), *cut]


@torch.no_grad()
def predict(model, data, cfg):
    """Logits (n, classes) in evaluation mode, on the CPU. Processes share the work."""
    device = model.device
    model.eval()
    logits = torch.full((len(data.labels), model.config.num_labels), -math.inf, device=device)
    longest_first = data.lengths.argsort(descending=True, stable=True)
    for rows in longest_first.split(2 * cfg.batch_size)[RANK::WORLD]:
        longest, rows = data.lengths[rows[0]].item(), rows.to(device)
        with torch.autocast(device.type, AMP[cfg.amp], enabled=cfg.amp != "off"):
            logits[rows] = model(**collate(data, rows, longest)).logits.float()
    return ranks_max(logits).cpu()


def metrics(predicted, gold):
    """Accuracy, macro-F1 (mean over the classes that occur) and n, from class numbers (n,)."""
    predicted, gold = map(np.asarray, (predicted, gold))
    classes = np.union1d(predicted, gold)[:, None]
    said, true = predicted == classes, gold == classes  # (classes, n)
    f1 = 2 * (said & true).sum(1) / (said.sum(1) + true.sum(1))
    return {"accuracy": float((said & true).sum() / len(gold)), "macro-f1": float(f1.mean()),
            "n": len(gold)}


# ---------- machinery: phases and runs


def open_run(cfg, training):
    """Start a run, or go on with one. Returns what run.json holds, and the phases to do."""
    path, saved = Path(cfg.out, "run.json"), None
    run = {"config": vars(cfg), "processes": WORLD, "fingerprint": fingerprint(training),
           "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)},
           "device": torch.cuda.get_device_name() if "cuda" in cfg.device else cfg.device,
           "phases": {}}
    if path.exists():
        saved = json.loads(path.read_text())
        was, now = (one["config"] | {"processes": one["processes"], "data": one["fingerprint"]}
                    for one in (saved, run))
        unlike = [key for key in now if was.get(key) != now[key]
                  and key not in ("methods", "out", "device", "grad_accum", "dynamics")]
        require(not unlike, f"{cfg.out}: a run with other {some(unlike)}; name another --out")
        cfg.methods = [*dict.fromkeys(saved["config"]["methods"] + cfg.methods)]
        run = saved | {"config": saved["config"] | {"methods": cfg.methods}}
    todo = [name for name in cfg.methods if not Path(cfg.out, name).exists()]
    if todo:  # a fault shows before training
        for name in cfg.methods:
            budget(name, len(training.labels), cfg)
        for name in filter(None, (cfg.ref, cfg.main)):
            encode(*load(name, cfg.device, training.names), training, cfg)
        if cfg.dynamics:
            load_dynamics(cfg.dynamics, run)
    ranks_max(torch.zeros(1))  # before the first process writes, all have read
    if run != saved:
        write_json(path, run)
    return run, todo


def fine_tune(name, rows, training, dev, cfg, run, source_flops=0):
    """Load, train and save a model: a phase. source_flops: what choosing its rows took."""
    model_name, epochs, lr = cfg.main, cfg.epochs, cfg.lr
    if name == "ref":
        model_name, epochs, lr = cfg.ref, cfg.ref_epochs, cfg.ref_lr
    torch.manual_seed(cfg.seed)  # for a new head: the same in all phases
    model, tokenizer = load(model_name, cfg.device, training.names)
    data, *dev = [encode(model, tokenizer, examples, cfg) for examples in (training, *dev)]
    n, size = len(data.labels), model.num_parameters(exclude_embeddings=True)
    steps, dynamics = budget(name, n, cfg), None
    lr = lr or (1e-5 if size > 200e6 else 2e-5)
    if name in FULL:
        dynamics = torch.full((epochs, n, len(training.names)), -math.inf, device=cfg.device)
    restore = leave_out(model, [data, *dev])
    remedy = f"give the same command with --grad-accum {2 * cfg.grad_accum}"
    with refusing(f"{model_name}: out of memory", remedy, torch.OutOfMemoryError):
        done = train(name, model, data, dev, rows, steps, lr, cfg, dynamics)
    restore()
    # Per parameter, a token takes two operations forward and four backward.
    phase = {"model": model_name, "lr": lr, "budget": steps, **done,
             "examples_per_second": done["examples"] / done["seconds"],
             "flops": 6 * size * done["tokens"],
             "erm_flops": 6 * size * cfg.epochs * data.lengths.sum().item()}
    if name != "ref":
        phase["cost"] = (source_flops + phase["flops"]) / phase["erm_flops"]
    run["phases"][name] = phase
    write_json(Path(cfg.out, "run.json"), run)

    def save(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if dynamics is None:
            return
        logits, gold = dynamics.cpu(), training.labels
        np.savez(folder / "dynamics.npz", logits=logits, labels=gold, flops=phase["flops"],
                 fingerprint=run["fingerprint"])
        table = zip(range(n), [training.names[label] for label in gold],
                    *(values.tolist() for values in data_map(logits, gold)))
        with open(folder / "data_map.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(
                [["row", "label", "confidence", "variability", "correctness"], *table])
    write(Path(cfg.out, name), save)


def load_dynamics(folder, run):
    """(logits, labels, FLOPs) of the phase in `folder`."""
    with refusing(f"{folder}: cannot be read", "name the ref folder of a run"):
        saved = np.load(Path(folder, "dynamics.npz"), allow_pickle=False)
        logits, labels = torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"])
        flops, known = int(saved["flops"]), saved["fingerprint"]
    require(known == run["fingerprint"] and len(logits) > 1,
            f"{folder}: is of another training set, or of one epoch")
    return logits, labels, flops


def record_selection(name, rows, training, cfg):
    """Enter the kept rows in selected.json; say their classes' shares."""
    path, gold = Path(cfg.out, "selected.json"), training.labels
    selected = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, selected | {name: rows.tolist()})
    shares = [f"{label} {(gold[rows] == i).float().mean():.0%} (of all "
              f"{(gold == i).float().mean():.0%})" for i, label in enumerate(training.names)]
    say(f"{name}: keeps {len(rows):,} of {len(gold):,} rows: {some(shares)}")


# ---------- machinery: data

# The paper's task: the defaults if models are named, but no --train.
NLI = {"train": "nyu-mll/multi_nli:train", "dev": [f"facebook/anli:dev_r{r}" for r in (1, 2, 3)],
       "test": [*[f"id=nyu-mll/multi_nli:validation_{m}" for m in ("matched", "mismatched")],
                "ood=tasksource/hans:validation", "ood=alisawuffles/WANLI:test",
                *[f"adversarial=facebook/anli:test_r{r}" for r in (1, 2, 3)]]}
TEXTS = [("premise", "hypothesis"), ("sentence1", "sentence2"), ("context", "hypothesis"),
         ("text1", "text2"), ("question", "sentence"), ("text",), ("sentence",)]
LABELS = ["label", "gold_label", "gold", "labels"]
LONG = {"e": "entailment", "n": "neutral", "c": "contradiction", "non-e": "non-entailment"}

# texts: n tuples, (premise, hypothesis) or (text,); labels (n,): class numbers; names: of classes
Examples = collections.namedtuple("Examples", "texts labels names")


def records(source):
    """Yield {column: value} for each row of a file, of owner/name:split or of built-in:SET."""
    kind, (name, _, split) = Path(source).suffix, source.rpartition(":")
    if name == "built-in":
        examples = built_in()[0][split]
        for (text,), label in zip(examples.texts, examples.labels):
            yield {"text": text, "label": examples.names[label]}
    elif name and not Path(source).exists():
        table = datasets.load_dataset(name, split=split)
        classes = {column: feature.names for column, feature in table.features.items()
                   if isinstance(feature, datasets.ClassLabel)}
        for row in table:  # by name: sets number their classes in different ways
            yield row | {column: names[row[column]] for column, names in classes.items()
                         if row[column] not in (None, -1)}
    else:
        require(kind in (".jsonl", ".csv", ".tsv") and Path(source).is_file(),
                f"{source}: no such file; give .jsonl, .csv, .tsv or owner/name:split")
        with open(source, encoding="utf-8-sig", newline="\n") as lines:
            if kind == ".jsonl":
                yield from (json.loads(line) for line in lines if line.strip())
                return
            csv.field_size_limit(2**31 - 1)
            table = csv.reader(lines, strict=True)
            if kind == ".tsv":  # a line is a row, though a text may begin with a quote
                table = (line.rstrip("\r\n").split("\t") for line in lines)
            header = [column.strip() for column in next(table, [])]
            for row in filter(any, table):
                if len(row) != len(header):
                    raise ValueError(f"it has {len(row)} columns, the header {len(header)}")
                yield dict(zip(header, row))


def read(source, like=None, limit=None):
    """The labelled of the first `limit` rows, as Examples. like: the training set."""
    texts, golds, columns, total = [], [], None, 0
    try:
        for row in itertools.islice(records(source), limit):
            if not isinstance(row, dict):
                raise ValueError("write one object a line")
            if columns is None:
                widths = {len(text) for text in like.texts[:1]} if like else set()
                columns = next((c for c in TEXTS if {*c} <= {*row} and widths <= {len(c)}), None)
                gold = next((name for name in LABELS if name in row), None)
                if not (columns and gold):
                    raise ValueError(f"it has {some([*map(repr, row)])}; in all files, name the "
                                     "columns label and text, or label, premise and hypothesis")
                unused = [name for name in row if name not in (*columns, gold)]
            text, label = tuple(row[column] for column in columns), row.get(gold)
            if isinstance(label, (list, dict)):
                raise ValueError("its label is a list")
            label = "" if label is None else str(label).strip().removesuffix(".0")
            " ".join((*text, label)).encode()  # fails unless all are valid text
            if label not in ("", "-", "-1", "nan"):
                texts.append(text)
                golds.append(label)
            total += 1
    except Exception as error:  # no network, not JSON, ..
        require(False, f"{source}, row {total + 1}: {error}; mend it")
    dropped = total - len(texts)
    require(golds and 10 * dropped <= total, f"{source}: {dropped:,} of {total:,} rows have no "
            "label (-, -1 and nan mean none); drop them, or rename the class")
    line = (f"{source}: {len(texts):,} rows; columns {', '.join(columns)}, {gold}; not used "
            f"{some(unused) or 'none'}; without a label {dropped:,}")
    spelled_out = lambda label: LONG.get(label.lower(), label.lower())
    if like:
        names, seen = like.names, {*like.texts}
        line += f"; also in training {sum(text in seen for text in texts):,}" if seen else ""
        # If two names are alike, the first wins: a class, not the non-X that eval.py adds.
        known = {spelled_out(name): name for name in reversed(names)}
        golds = [known.get(spelled_out(label), label) for label in golds]
        others = sorted({*golds} - {*names})
        require(not others, f"{source}: label {some(others)} is none of {some(names)}")
    else:  # numbers by size, words by the alphabet
        names = sorted({*golds}, key=lambda name: (len(name) * name.isdecimal(), name))
        require(len({*map(spelled_out, names)}) == len(names) > 1, f"{source}: has the classes "
                f"{some(names)}; give two or more, unlike in more than case")
    say(line)
    return Examples(texts, torch.tensor([names.index(label) for label in golds]), names)


def fingerprint(examples):
    """A hash of the rows and their order."""
    content = repr((examples.names, examples.texts, examples.labels.tolist()))
    return hashlib.sha256(content.encode()).hexdigest()


# ---------- machinery: the built-in task

# The defaults if nothing is named. The models, of (layers, width), are untrained.
BUILT_IN_MODELS = {"built-in-2x64": (2, 64), "built-in-4x128": (4, 128)}
BUILT_IN = {"train": "built-in:train", "ref": "built-in-2x64", "main": "built-in-4x128",
            "test": [f"{kind}=built-in:{kind}" for kind in ("id", "ood", "adversarial")],
            "methods": ["ftft", "erm", "random"], "lr": 5e-4, "ref_lr": 1e-3}
WORDS = ["monday", "tuesday", "wednesday", *(f"thing{i}" for i in range(600))]


def built_in():
    """A task with known rules: each text lists things seen at a place; predict the place.

    A text is "monday thing12 thing597 ..", its label "coast". Of eight things, four belong to a
    place, each in 8 of 10 cases to the right one. As a shortcut, the day agrees with the place in
    90% of training and ID texts, by chance in OOD, never in adversarial ones. 3% of the training
    labels are wrong. Returns {set: Examples} and what is planted in training, {name: mask (n,)}.
    """
    rng = np.random.default_rng(0)  # whatever --seed is
    days, things = np.array(WORDS[:3]), np.array(WORDS[3:])  # 150 things a place and 150 of none

    def draw(n, agreement, wrong=0.0):
        place = rng.integers(3, size=n)
        *elsewhere, false_day, mistake = (place + rng.integers(1, 3, size=(6, n))) % 3
        owner = np.where(rng.random((4, n)) < 0.8, place, elsewhere)  # (4, n)
        owner = np.concatenate([owner, np.full((4, n), 3)]).T  # (n, 8); 3: none
        seen = things[rng.permuted(150 * owner + rng.integers(150, size=(n, 8)), axis=1)]
        day = np.where(rng.random(n) < agreement, place, false_day)
        mislabelled = rng.random(n) < wrong
        texts = [(" ".join(words),) for words in np.column_stack([days[day], seen])]
        labels = torch.from_numpy(np.where(mislabelled, mistake, place))
        planted = {"shortcut-breaking": day != place, "mislabelled": mislabelled}
        return Examples(texts, labels, ["coast", "forest", "village"]), planted

    training, planted = draw(8000, 0.9, wrong=0.03)
    return {"train": training, "id": draw(2000, 0.9)[0], "ood": draw(2000, 1 / 3)[0],
            "adversarial": draw(2000, 0.0)[0]}, planted


def built_in_model(name, extra, device):
    """A BERT with random weights and a tokenizer of whole words."""
    layers, width = BUILT_IN_MODELS[name]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=len(words), num_hidden_layers=layers, num_attention_heads=width // 32,
        hidden_size=width, intermediate_size=4 * width, name_or_path=name, **extra))
    tokens = {word: i for i, word in enumerate(words)}
    return model.to(device), transformers.BertTokenizer(tokens, model_max_length=64)


# ---------- machinery: fast, exactly


def leave_out(model, sets):
    """Leave out what no head reads and no text uses, in the model types for which this is tested.

    sets: Encoded; their tokens are renumbered. Returns a function that puts the words back.
    """
    if model.config.model_type not in ("deberta-v2", "bert", "roberta", "electra"):
        return lambda: None

    # The head reads the first token only. So the last layer computes only that token, once it has
    # attended to all: the hook cuts (what attention found, the layer's input).
    last = model.base_model.encoder.layer[-1].attention
    last.output.register_forward_pre_hook(lambda _, states: tuple(x[:, :1] for x in states))

    def nearest_positions(attention, args, kwargs):
        # Of DeBERTa's table of relative positions, n tokens use the middle 2n.
        table = kwargs["rel_embeddings"]  # (2 * span, hidden)
        span = len(table) // 2
        attention.pos_ebd_size = width = min(args[0].shape[1], span)
        return args, kwargs | {"rel_embeddings": table[span - width:span + width]}

    for module in model.modules():
        if hasattr(module, "pos_ebd_size") and (
                module.position_buckets <= module.max_relative_positions):
            module.register_forward_pre_hook(nearest_positions, with_kwargs=True)

    # Without weight decay, AdamW never moves the words that no text has. So train a table of the
    # others. Numbers up to the padding's stay: RoBERTa tells positions by which tokens are padding.
    words = model.get_input_embeddings()
    ids = [torch.arange(sets[0].pad + 1, device=model.device),
           *(one.tokens["input_ids"] for one in sets)]
    used, new_ids = torch.cat(ids).unique(return_inverse=True)
    for one, part in zip(sets, new_ids.split([*map(len, ids)])[1:]):
        one.tokens["input_ids"] = part
    few = torch.nn.Embedding.from_pretrained(words.weight.detach()[used], freeze=False)
    model.set_input_embeddings(few)

    def restore():
        words.weight.data[used] = few.weight.detach()
        model.set_input_embeddings(words)
    return restore


# ---------- machinery: files, errors and processes


def require(condition, message):
    """Unless this holds, tell the user in one line what to mend; exit with code 2."""
    if not condition:
        print(f"{Path(sys.argv[0]).name}:", *message.split(), file=sys.stderr)  # on one line
        raise SystemExit(2)


@contextlib.contextmanager
def refusing(what, remedy, errors=Exception):
    """Turn an error into a line, as `require` does."""
    try:
        yield
    except errors as error:
        require(False, f"{what} ({error}); {remedy}")


def some(names):
    """The first five names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check(parser, argv):
    """Parse the command line; refuse what cannot work; fill in what depends on the rest."""
    parser.error = lambda message: require(False, message)
    cfg = parser.parse_args(argv)
    if cfg.train is None:
        parser.set_defaults(**NLI if cfg.ref or cfg.main or cfg.dynamics else BUILT_IN)
        cfg = parser.parse_args(argv)
    maps = {METHODS[name][1] for name in cfg.methods} - ({"ref"} if cfg.dynamics else set())
    cfg.methods = [*dict.fromkeys([name for name in FULL if name in maps] + cfg.methods)]
    cfg.ref_epochs = cfg.ref_epochs or cfg.epochs
    cfg.out = cfg.out or f"runs/{Path(cfg.train.split(':')[0]).stem}-{cfg.seed}"
    require(not (cfg.ref and cfg.dynamics), "--dynamics replaces --ref; give one")
    require(cfg.main and (cfg.ref or "ref" not in maps),
            "name two models, as --ref deberta-small --main deberta-large")
    least = {"seed": 0, "max_length": 8, "fraction": 0, "lr": 1e-9, "ref_lr": 1e-9,
             "epochs": 1 + ("erm" in maps),  # a data map needs two
             "ref_epochs": 1 + ("ref" in maps)}
    for name, value in vars(cfg).items():
        require(not isinstance(value, (int, float)) or value >= least.get(name, 1),
                f"--{name.replace('_', '-')} {value}: must be at least {least.get(name, 1)}")
    cfg.device = cfg.device or str(torch.accelerator.current_accelerator(True) or "cpu")
    with refusing(f"--device {cfg.device}", "give cuda or cpu"):
        torch.empty(1, device=cfg.device)
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cfg.amp = cfg.amp or (half if "cuda" in cfg.device else "off")
    return cfg


def write(path, put):
    """Let `put` write to another name, then rename: a killed run leaves all of a file or folder,
    or nothing. The first process writes."""
    if RANK == 0:
        partial = path.with_name(path.name + ".partial")
        with refusing(f"{path}: cannot be written", "make room; give the same command again",
                      (OSError, RuntimeError, SafetensorError)):  # of Python, torch, safetensors
            path.parent.mkdir(parents=True, exist_ok=True)
            put(partial)
            for file in (partial, *partial.rglob("*")):
                handle = os.open(file, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            partial.replace(path)
    ranks_max(torch.zeros(1))  # the others wait


def write_json(path, value):
    write(path, lambda partial: partial.write_text(json.dumps(value, indent=1)))


def say(line):
    """Tell how the run goes, on stderr."""
    if RANK == 0:
        tqdm.tqdm.write(line, file=sys.stderr)


def save_checkpoint(cfg, name, parts, dynamics, done, best):
    """Save all that `train` needs to go on."""
    state = {key: part.state_dict() for key, part in parts.items()}
    state |= {"phase": name, "dynamics": dynamics, "done": done, "best": best}
    write(Path(cfg.out, "checkpoint.pt"), lambda partial: torch.save(state, partial))


def load_checkpoint(cfg, name, parts, dynamics):
    """Fill parts and dynamics; return (done, best), or None for a new phase."""
    path = Path(cfg.out, "checkpoint.pt")
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    if saved.get("phase") != name:
        return None
    for key, part in parts.items():
        part.load_state_dict(saved[key])
    if dynamics is not None:
        dynamics.copy_(saved["dynamics"])
    say(f"{name}: goes on after step {saved['done']['steps']:,}")
    return saved["done"], saved["best"]


def ranks_max(tensor):
    """The largest of each number over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


if __name__ == "__main__":
    import eval  # eval.py, not Python's eval
    if WORLD > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # one process a GPU
    cfg = settings()
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in cfg.device else "cpu:gloo")
    training = read(cfg.train, limit=cfg.limit)
    dev = [read(source, training) for source in cfg.dev]
    eval.read_tests(cfg, training)  # a fault shows before training
    main(cfg, training, dev)
    eval.main([cfg.out])
    if WORLD > 1:
        dist.destroy_process_group()
