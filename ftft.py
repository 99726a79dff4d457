"""FTFT: fine-tune a large model on the training examples that a small model finds ambiguous.

Shortcuts solve most training examples, so models that learn them break on out-of-distribution and
adversarial input. A model becomes more robust if it trains on the examples that models keep
changing their mind about, and a much smaller model can find these examples. This is FTFT (Du,
Gatt and Nguyen, arXiv 2310.06588), in four steps:

  1. Fine-tune a small reference model on all n training examples, and log its training dynamics:
     `dynamics` (epochs, n, classes) holds each example's logits in each epoch, as it trains.
  2. Draw the data map: `confidence` and `variability` (n,) are the mean and the standard
     deviation of p(gold), the probability of the correct class, over the epochs.
  3. Keep `rows` (k,), the third of the examples with the highest variability.
  4. Fine-tune the large main model on those rows only, for fewer steps or with early stopping.

  python ftft.py                                            # built-in task, offline, on a CPU
  python ftft.py --ref deberta-small --main deberta-large   # MultiNLI; tested on ANLI, HANS, WANLI

The method ends with `main`; the rest is machinery. An example is always named by its row number
in the training list, whichever model and tokenizer is at work.
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

# ------------------------------ settings

# A phase trains one model: the reference, or the main model by one of the methods. keep: which rows
# it trains on (ambiguous: those of the highest variability); source: the phase whose data map
# chooses them; stops: it may stop early. The two that may not, the reference and plain fine-tuning
# (ERM), log their dynamics.
Method = collections.namedtuple("Method", "keep source stops")
METHODS = {"ref": Method("all", None, False),
           "erm": Method("all", None, False),
           "erm-es": Method("all", None, True),
           "random": Method("random", None, True),
           "easy": Method("easy", "ref", True),
           "hard": Method("hard", "ref", True),
           "dm": Method("ambiguous", "erm", True),  # dataset cartography: the main model chooses
           "ftft": Method("ambiguous", "ref", True)}
MODELS = {
    **{f"deberta-{s}": f"microsoft/deberta-v3-{s}" for s in ("xsmall", "small", "base", "large")},
    **{f"electra-{s}": f"google/electra-{s}-discriminator" for s in ("small", "base", "large")},
    **{f"roberta-{s}": f"FacebookAI/roberta-{s}" for s in ("base", "large")},
    **{f"bert-{s}": f"google-bert/bert-{s}-uncased" for s in ("base", "large")},
    "bert-tiny": "prajjwal1/bert-tiny"}
# Two untrained models, (layers, width), which need higher learning rates.
BUILT_IN_MODELS = {"built-in-2x64": (2, 64), "built-in-4x128": (4, 128)}
BUILT_IN = {"task": "built-in", "ref": "built-in-2x64", "main": "built-in-4x128",
            "methods": ["ftft", "erm", "random"], "lr": 5e-4, "ref_lr": 1e-3}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def settings(argv=None):
    """Read the command line. Returns the settings as a namespace, `cfg`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("method").add_argument
    add("--ref", help="reference model: a short name (deberta-small, ..), Hub id or local folder")
    add("--main", help="main model, likewise")
    add("--dynamics", metavar="DIR", help="an earlier reference to reuse, such as runs/a/ref")
    add("--methods", nargs="+", choices=[name for name in METHODS if name != "ref"],
        default=["ftft"], metavar="METHOD",
        help="models to train: ftft (default), erm, erm-es, random, easy, hard, dm")
    add("--fraction", type=float, default=0.33, help="share of the rows to keep (default: 0.33)")
    add("--skip-epochs", type=int, default=0, help="leave the first N epochs out of the data map")

    add = parser.add_argument_group("data").add_argument
    add("--task", choices=["nli", "hsd", "built-in"], help="the paper's nli (with --main) or hsd")
    add("--data", metavar="DIR", help="folder with the task's files, read instead of the Hub")
    add("--train", metavar="FILE", help="your data: .jsonl, .csv, .tsv or owner/name:split (Hub)")
    add("--dev", nargs="+", action="extend", default=[], metavar="FILE",
        help="sets for early stopping and for choosing the best weights")
    add("--test", nargs="+", action="extend", default=[], metavar="FILE",
        help="id=FILE, ood=FILE or adversarial=FILE, any number of each")
    add("--limit", type=int, help="read only the first N training rows")
    add("--metric", choices=["accuracy", "macro-f1"], help="default: accuracy; hsd: macro-f1")
    add("--out", metavar="DIR", help="new folder for the run (default: runs/TASK-1, -2, ..)")
    add("--resume", metavar="DIR", help="continue the run in this folder, with its own settings")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=4, help="of the reference and erm (default: 4)")
    add("--steps", type=int,
        help="steps of other methods (default: as erm; a third of that without dev sets)")
    add("--patience", type=int, default=2,
        help="stop after this many evaluations, of 12, without a new best score (default: 2)")
    add("--batch-size", type=int, default=32, help="rows in a step (default: 32)")
    add("--lr", type=float,
        help="learning rate of main models (default: 2e-5; over 200M backbone parameters, 1e-5)")
    add("--ref-lr", type=float, default=2e-5, help="that of the reference (default: 2e-5)")
    add("--max-length", type=int, default=300, help="cut inputs at N tokens (default: 300)")
    add("--seed", type=int, default=0, help="of new weights, order, dropout and random rows")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    add("--amp", choices=AMP, help="mixed precision (default: on cuda bf16 or fp16, else off)")
    add("--grad-accum", type=int, default=1, help="pieces to split a batch into, to save memory")
    return check(parser, argv)


# ------------------------------ data map and selection


def data_map(dynamics, labels):
    """Statistics of each example over the epochs (Swayamdipta et al. 2020, section 2).

    dynamics: logits (epochs, n, classes); labels: gold classes (n,). Returns three tensors (n,):
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


# ------------------------------ the training loop


def seed_for(*what):
    """A seed for what is named, such as (0, "ftft", 3): the same in every process and run."""
    return zlib.crc32(" ".join(map(str, what)).encode())


def since_best(curve, warmup):
    """How many evaluations ago the dev score was highest: 0 for a new best, -1 if none counts.

    curve: [[step, score], ..]. Evaluations within the warm-up do not count; a tie is no new best.
    """
    scores = [score for step, score in curve if step > warmup]
    return len(scores) - 1 - scores.index(max(scores)) if scores else -1


def train(name, model, data, dev, rows, steps, lr, cfg, dynamics=None):
    """Fine-tune `model` in place; it ends with the weights that did best on the dev sets, if any.

    name: of the phase. data, dev: the tokenized training set and a list of dev sets (see Encoded).
    rows (k,): what to train on. steps: the budget, over which the learning rate decays, even if
    training stops early. dynamics (epochs, n, classes): where to log the logits. Returns counts.
    """
    (rank, world), device = ranks(), model.device  # this process's number, and how many there are
    seeds = (cfg.seed, "erm" if name == "erm-es" else name)  # erm-es: order and dropout of erm
    warmup, epoch_steps = max(1, round(0.1 * steps)), math.ceil(len(rows) / cfg.batch_size)
    points = {math.ceil(steps * i / 12) for i in range(1, 13)}  # after these, evaluate and save
    net = model if world == 1 else torch.nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=True, forward_sync_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr, eps=1e-6, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    done = {"steps": 0, "examples": 0, "tokens": 0, "seconds": 0.0, "dev": []}  # dev: a curve
    done, best = load_checkpoint(cfg, name, parts, dynamics) or (done, None)
    broken = torch.zeros((), device=device)  # above 0: a logit or a gradient was not finite
    order, began = None, time.perf_counter()
    bar = tqdm.tqdm(desc=name, total=steps, initial=done["steps"], unit="example", leave=False,
                    unit_scale=cfg.batch_size, disable=rank > 0 or None)  # None: if not a terminal
    for step in range(done["steps"], steps):
        if METHODS[name].stops and since_best(done["dev"], warmup) >= cfg.patience:
            break  # here, not after evaluating: a run may be resumed just after its last evaluation
        epoch, place = divmod(step, epoch_steps)
        if place == 0 or order is None:
            order = batches(rows, data.lengths, cfg.batch_size, seed_for(*seeds, epoch))
        batch = order[place]  # row numbers (b,), of rows of like length

        # Forward and backward. Each process works through every world-th row, in pieces. The
        # gradient is that of sum(losses) / len(batch): each example of the batch weighs the same.
        model.train()
        torch.manual_seed(seed_for(*seeds, step, rank))  # so dropout has no state to save
        mine, weight, loss = batch[rank::world], 1 / len(batch), 0.0
        if len(mine) == 0:  # no row left: join DDP's exchange with a row at weight 0
            mine, weight = batch[:1], 0.0
        pieces = mine.split(math.ceil(cfg.batch_size / world / cfg.grad_accum))
        for piece in pieces:
            net.require_backward_grad_sync = piece is pieces[-1]  # DDP: exchange once
            with torch.autocast(device.type, AMP[cfg.amp], enabled=cfg.amp != "off"):
                logits = net(**collate(data, piece, device)).logits.float()  # (piece, classes)
            labels = data.labels[piece].to(device)
            piece_loss = weight * F.cross_entropy(logits, labels, reduction="sum")
            scaler.scale(world * piece_loss).backward()  # DDP averages over the processes
            loss += piece_loss.detach()

            # Log the dynamics: in training mode (dropout is on) and before the update, as in
            # dataset cartography and the authors' code. Nothing is copied to the host.
            if dynamics is not None and weight:  # at weight 0, the row is another process's
                dynamics[epoch, piece] = logits.detach()
            broken += ~logits.isfinite().all()

        # Update. The rate is 0 in the first step, rises in the warm-up, then falls towards 0.
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warmup, (steps - step) / max(1, steps - warmup))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        broken += ~norm.isfinite() & (not scaler.is_enabled())
        scaler.step(optimizer)  # leaves out a step whose fp16 gradients overflowed
        scaler.update()
        optimizer.zero_grad()
        done["steps"] = after = step + 1
        done["examples"] += len(batch)
        done["tokens"] += int(data.lengths[batch].sum())
        bar.update()
        if step % 50 == 0 or after in points:  # only now does the host wait for the device
            loss = over_ranks(loss, dist.ReduceOp.SUM).item()
            bar.set_postfix(step=after, loss=f"{loss:.3f}")
        if after not in points:
            continue

        # Evaluate, keep the best. A tiny scale means that every fp16 step overflows.
        require(not over_ranks(broken).item() and scaler.get_scale() > 1e-3, f"{name}: overflow or "
                f"divergence by step {after}; start anew with a lower learning rate or --amp off")
        done["seconds"] += time.perf_counter() - began
        report = f"{name}: step {after:,} of {steps:,}, loss {loss:.3f}"
        if dev:
            score = np.mean([metrics(predict(model, one, cfg).argmax(1), one.labels)[cfg.metric]
                             for one in dev]).item()
            done["dev"].append([after, score])
            report += f", dev {100 * score:.1f}"
            if since_best(done["dev"], warmup) == 0:
                best = {key: value.cpu().clone() for key, value in model.state_dict().items()}
        say(cfg, report)

        # Checkpoint.
        if dynamics is not None:
            over_ranks(dynamics)  # the maximum: one process wrote a cell, the others have -inf
        save_checkpoint(cfg, name, parts, dynamics, done, best)
        began = time.perf_counter()
    bar.close()
    if best:
        model.load_state_dict(best)
    return done


# ------------------------------ the run


def main(cfg):
    """Run FTFT, and the methods to compare it with: they go through the same four steps.

    `fine_tune`, in the machinery, loads a pretrained model with a new head, seeded alike in each
    phase, makes `dynamics` (all -inf) where they are logged, calls `train`, and saves both. ERM
    takes --epochs passes over all rows; the others at most as many steps, without dev sets a third.
    """
    training, dev = load_task(cfg)
    run = open_run(cfg, training, dev)
    everything = torch.arange(len(training.labels))
    folders = {"ref": cfg.dynamics or f"{cfg.out}/ref", "erm": f"{cfg.out}/erm"}

    # Step 1. Fine-tune the small reference model on everything, and log its training dynamics.
    if not cfg.dynamics and "ref" in {METHODS[name].source for name in cfg.methods}:
        fine_tune("ref", everything, training, dev, cfg, run)

    for name in cfg.methods:
        keep, source, _ = METHODS[name]
        rows, confidence, source_flops = everything, None, 0
        if source:
            # Step 2. Draw the data map of the reference (for dm, of the main model after erm) from
            # all its epochs but those of --skip-epochs.
            dynamics, labels, source_flops = load_dynamics(folders[source], run)
            confidence, variability, _ = data_map(dynamics, labels)
            score = {"ambiguous": variability, "hard": -confidence, "easy": confidence}[keep]
        elif keep == "random":
            generator = torch.Generator().manual_seed(seed_for(cfg.seed, "random rows"))
            score = torch.rand(len(everything), generator=generator)
        if keep != "all":
            # Step 3. Keep the rows that the method favours: ftft those whose p(gold) swings most.
            rows = select(score, cfg.fraction)
            record_selection(name, rows, confidence, training, cfg)
        # Step 4. Fine-tune the large main model on those rows only (erm: on all).
        phase = fine_tune(name, rows, training, dev, cfg, run)
        run["cost"][name] = (source_flops + phase["flops"]) / phase["erm_flops"]
        write_json(Path(cfg.out, "run.json"), run)
    if ranks()[0] == 0:  # the run is complete
        Path(cfg.out, "checkpoint.pt").unlink(missing_ok=True)


# ------------------------------ machinery: models and batches

# Tokenized examples: inputs, n dictionaries of int32 arrays (tokens,), named as the model calls
# them; lengths (n,): in tokens; labels (n,); and the tokenizer, which pads them.
Encoded = collections.namedtuple("Encoded", "inputs lengths labels tokenizer")


def load(name, device, classes=()):
    """A pretrained model with a head for these classes, or as it is (none), and its tokenizer.

    Weights are float32 even if stored in fp16, as DeBERTa-v3's are. A model is refused if weights
    of its encoder would be random; a pooler may be, as it belongs to the head. A trained head stays
    only if it has these classes in this order.
    """
    names = {"id2label": dict(enumerate(classes))}
    names["label2id"] = {label: i for i, label in names["id2label"].items()}
    logging.disable(logging.WARNING)  # the libraries warn of new heads and retries
    transformers.utils.logging.disable_progress_bar()
    if name in BUILT_IN_MODELS:
        return built_in_model(name, names, device)
    with refusing(f"{name}: cannot be loaded on {device}", "give a short name, Hub id or folder"):
        hub, safe = MODELS.get(name, name), {"trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(hub, **safe)
        config = transformers.AutoConfig.from_pretrained(hub, **safe)
        same = [*map(str.lower, config.id2label.values())] == [*map(str.lower, classes)]
        config.update({"problem_type": None, **(names if classes else {})})
        config.pad_token_id = config.pad_token_id or tokenizer.pad_token_id
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            hub, config=config, dtype=torch.float32, ignore_mismatched_sizes=True,
            output_loading_info=True, **safe)
        model.to(device)
    base, missing = model.base_model_prefix + ".", info["missing_keys"]
    missing |= {key for key, *_ in info["mismatched_keys"]}
    if classes:
        missing = {key for key in missing if key.startswith(base) and "pooler" not in key}
        for key, layer in model.named_modules():
            if not same and not key.startswith(base) and hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    require(not missing, f"{name}: lacks {some(sorted(missing))}, which would be random")
    require(tokenizer.pad_token and tokenizer.padding_side == "right",
            f"{name}: does not pad on the right; take an encoder such as bert-tiny")
    for key, table in model.named_modules():
        if key.endswith("position_embeddings"):  # RoBERTa's positions begin after its padding's
            limit = table.num_embeddings - (table.padding_idx or -1) - 1
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return model, tokenizer


def encode(model, tokenizer, examples, cfg):
    """Examples as Encoded, each cut at --max-length or at what the model can take."""
    inputs, limit = [], min(cfg.max_length, tokenizer.model_max_length)
    for start in range(0, len(examples.texts), 10_000):  # lists of Python integers take memory
        columns = map(list, zip(*examples.texts[start:start + 10_000]))
        tokens = tokenizer(*columns, truncation=True, max_length=limit, return_attention_mask=False)
        inputs += [dict(zip(tokens, map(np.int32, row))) for row in zip(*tokens.values())]
    lengths = torch.tensor([len(row["input_ids"]) for row in inputs])
    largest = max(row["input_ids"].max() for row in inputs)
    require(largest < len(model.get_input_embeddings().weight),
            f"{tokenizer.name_or_path}: the model does not know token {largest}")
    return Encoded(inputs, lengths, examples.labels, tokenizer)


def collate(data, rows, device):
    """Model inputs for these rows, padded to the longest of them, each (rows, longest)."""
    return data.tokenizer.pad([data.inputs[row] for row in rows], return_tensors="pt").to(device)


def batches(rows, lengths, size, seed):
    """One epoch's batches of `size` rows: each row once, among rows of like length.

    Random batches of MultiNLI are 60% padding. So the shuffled rows are cut into pools. Each pool
    is sorted by length, with some noise to vary which rows meet, and cut into batches.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    key = lengths * (1 + 0.05 * torch.rand(len(lengths), generator=generator))
    cut = []
    for pool in rows.split(100 * size):
        cut += pool[key[pool].argsort()].split(size)
    return [cut[i] for i in torch.randperm(len(cut), generator=generator)]


@torch.no_grad()
def predict(model, data, cfg):
    """Logits (n, classes) in evaluation mode, float32, on the CPU. Processes share the work."""
    (rank, world), device = ranks(), model.device
    model.eval()
    logits = torch.full((len(data.labels), model.config.num_labels), -math.inf, device=device)
    longest_first = data.lengths.argsort(descending=True, stable=True)  # with little padding
    for rows in longest_first.split(2 * cfg.batch_size)[rank::world]:
        with torch.autocast(device.type, AMP[cfg.amp], enabled=cfg.amp != "off"):
            logits[rows] = model(**collate(data, rows, device)).logits.float()
    return over_ranks(logits).cpu()


def metrics(predicted, gold):
    """Accuracy, macro-F1 (mean over the classes that occur) and n, from class numbers (n,)."""
    predicted, gold = np.asarray(predicted), np.asarray(gold)
    classes = np.union1d(predicted, gold)[:, None]
    said, true = predicted == classes, gold == classes  # (classes, n)
    f1 = 2 * (said & true).sum(1) / (said.sum(1) + true.sum(1))  # (classes,)
    accuracy = (predicted == gold).mean()
    return {"accuracy": float(accuracy), "macro-f1": float(f1.mean()), "n": len(gold)}


def backbone_size(model):
    """Parameters that each token is multiplied with: all but the embedding tables."""
    count = lambda part: sum(p.numel() for p in part.parameters())
    tables = [part for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    size = count(model) - sum(map(count, tables))
    if model.config.model_type == "albert":  # passes each token through a layer several times
        repeats = model.config.num_hidden_layers // model.config.num_hidden_groups - 1
        size += repeats * count(model.albert.encoder.albert_layer_groups)
    return size


# ------------------------------ machinery: phases and runs


def fine_tune(name, rows, training, dev, cfg, run):
    """One phase: load a model, train it on these rows, save it in the run's folder under `name`,
    with its dynamics if it never stops early; enter it in run.json and return the entry."""
    folder, dynamics = Path(cfg.out, name), None
    if folder.exists():  # done, and whole, before the run was resumed
        return run["phases"][name]
    model_name, lr = (cfg.ref, cfg.ref_lr) if name == "ref" else (cfg.main, cfg.lr)
    torch.manual_seed(cfg.seed)  # for a new head: a model has the same one in all phases
    model, tokenizer = load(model_name, cfg.device, training.names)
    data, *dev = [encode(model, tokenizer, examples, cfg) for examples in (training, *dev)]
    n, size = len(data.labels), backbone_size(model)
    lr = lr or (1e-5 if size > 200e6 else 2e-5)
    steps = cfg.epochs * math.ceil(n / cfg.batch_size)
    if METHODS[name].stops:
        steps = cfg.steps or (steps if dev else max(1, round(steps / 3)))
    else:
        dynamics = torch.full((cfg.epochs, n, len(training.names)), -math.inf, device=cfg.device)
    compute_less(model)
    restore = compact_embeddings(model, [data, *dev])
    remedy = f"start anew with --grad-accum {2 * cfg.grad_accum}, and --dynamics if ref is done"
    with refusing(f"{name}: out of memory", remedy, torch.OutOfMemoryError):
        done = train(name, model, data, dev, rows, steps, lr, cfg, dynamics)
    restore()
    # For each parameter, a token takes two operations forward and four backward.
    flops, erm_tokens = 6 * size * done["tokens"], cfg.epochs * data.lengths.sum().item()
    run["phases"][name] = {"model": model_name, "lr": lr, "budget": steps, **done, "flops": flops,
                           "erm_flops": 6 * size * erm_tokens,
                           "examples_per_second": done["examples"] / done["seconds"]}
    write_json(Path(cfg.out, "run.json"), run)

    def save(partial):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if dynamics is not None:
            np.savez(partial / "dynamics.npz", logits=dynamics.cpu(), labels=training.labels,
                     fingerprint=run["fingerprints"][0], flops=flops)
    write(folder, save)
    return run["phases"][name]


def load_dynamics(folder, run):
    """(logits, labels, FLOPs) of a reference in `folder`, without the epochs of --skip-epochs."""
    with (refusing(f"{folder}: cannot be read", "name the ref folder of a run"),
          np.load(Path(folder, "dynamics.npz"), allow_pickle=False) as saved):
        logits, labels = torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"])
        flops, known = int(saved["flops"]), str(saved["fingerprint"])
    require(known == run["fingerprints"][0], f"{folder}: has another training set; give that")
    logits = logits[run["config"]["skip_epochs"]:]
    require(len(logits) > 1, f"{folder}: --skip-epochs leaves fewer than two epochs; lower it")
    return logits, labels, flops


def record_selection(name, rows, confidence, training, cfg):
    """Say how the kept rows differ from all rows, and enter it with them in selected.json."""
    share = lambda found: round(found.float().mean().item(), 4)
    classes = {label: [share(training.labels[rows] == i), share(training.labels == i)]
               for i, label in enumerate(training.names)}
    hardest = None if confidence is None else select(-confidence, cfg.fraction)
    overlap = None if hardest is None else share(torch.isin(rows, hardest))
    path = Path(cfg.out, "selected.json")
    selected = json.loads(path.read_text()) if path.exists() else {}
    selected[name] = {"rows": rows.tolist(), "fraction": cfg.fraction, "classes": classes,
                      "hardest": overlap}
    write_json(path, selected)
    balance = some([f"{kept:.0%} {label} (of all {every:.0%})"
                    for label, (kept, every) in classes.items()])
    say(cfg, f"{name}: keeps {len(rows):,} of {len(training.labels):,} rows: {balance}"
        + ("" if hardest is None else f"; {overlap:.0%} are among the hardest as well"))


def open_run(cfg, training, dev):
    """Make the run's folder, or read it on --resume. Returns what run.json holds; sets cfg.out."""
    run = {"config": vars(cfg), "processes": ranks()[1],
           "versions": {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)},
           "device": torch.cuda.get_device_name() if "cuda" in cfg.device else cfg.device,
           "fingerprints": [fingerprint(examples) for examples in (training, *dev)],
           "phases": {}, "cost": {}}
    if cfg.resume:
        saved = json.loads(Path(cfg.out, "run.json").read_text())
        require(all(saved[key] == run[key] for key in ("fingerprints", "processes")),
                f"--resume: the data or the number of processes ({saved['processes']}) has changed "
                "since; restore it")
        return saved
    n = len(training.labels)
    all_rows = {METHODS[name].keep for name in cfg.methods} == {"all"}
    require(all_rows or round(cfg.fraction * n) >= cfg.batch_size,
            f"--fraction {cfg.fraction} of {n:,} rows is less than a batch; lower --batch-size")
    if cfg.dynamics:
        load_dynamics(cfg.dynamics, run)
    for name in filter(None, (cfg.ref, cfg.main)):  # find a missing model now, not after days
        load(name, cfg.device, training.names)
    if ranks()[0] == 0:
        task = cfg.task or Path(cfg.train).stem
        free = (f"runs/{task}-{i}" for i in itertools.count(1))
        cfg.out = cfg.out or next(path for path in free if not Path(path).exists())
        with refusing(f"--out {cfg.out}: cannot be made", "name another or --resume this one"):
            Path(cfg.out).mkdir(parents=True)
    if dist.is_initialized():  # the first process names the folder
        names = [cfg.out]
        dist.broadcast_object_list(names)
        cfg.out, = names
    write_json(Path(cfg.out, "run.json"), run)
    counts = zip(training.labels.bincount().tolist(), training.names)
    say(cfg, f"{cfg.out}: {n:,} training rows: {some([f'{k:,} {label}' for k, label in counts])}")
    return run


# ------------------------------ machinery: data

# The paper's tasks: the training set, then the dev sets, each on the Hub (hsd is not there) and as
# its authors' file in --data. As in the paper, the dev sets are out of distribution.
TASKS = {
    "nli": [("nyu-mll/multi_nli:train", "multinli_1.0/multinli_1.0_train.jsonl"),
            *[(f"facebook/anli:dev_r{r}", f"anli_v1.0/R{r}/dev.jsonl") for r in (1, 2, 3)]],
    "hsd": [(file, file) for file in ("cad/cad_uid.train", *(
        f"dynahate/r{r}_{form}.dev" for r in (2, 3, 4) for form in ("original", "perturbation")))]}
TEXTS = [("premise", "hypothesis"), ("sentence1", "sentence2"), ("context", "hypothesis"),
         ("text1", "text2"), ("text",), ("sentence",)]
LABELS = ["label", "gold_label", "gold", "labels"]
SHORT = {"e": "entailment", "n": "neutral", "c": "contradiction"}

# texts: n tuples, (premise, hypothesis) or (text,); labels (n,): class numbers; names: of classes
Examples = collections.namedtuple("Examples", "texts labels names")


def records(source):
    """Yield (number, {column: value}) for each line of a file, or row of owner/name:split."""
    number, kind = 0, Path(source).suffix
    try:
        if ":" in source and not Path(source).exists():
            path, split = source.rsplit(":", 1)
            table = datasets.load_dataset(path, split=split)
            for number, row in enumerate(table, 1):
                for name, column in table.features.items():  # each set numbers classes its own way
                    if isinstance(column, datasets.ClassLabel) and row[name] not in (None, -1):
                        row[name] = column.names[row[name]]
                yield number, row
            return
        if kind not in (".jsonl", ".csv", ".tsv", ".train", ".dev", ".test"):
            raise ValueError("give .jsonl, .csv, .tsv, or owner/name:split on the Hub")
        with open(source, encoding="utf-8-sig", newline="") as lines:
            if kind == ".jsonl":
                rows = ((i, json.loads(line)) for i, line in enumerate(lines, 1) if line.strip())
            else:  # CAD and DynaHate (.train, .dev, .test) are released without a header
                header = None if kind in (".csv", ".tsv") else ["labels", "text", "uid"]
                delimiter = "," if kind == ".csv" else "\t"
                table = csv.DictReader(lines, header, delimiter=delimiter, strict=True)
                rows = ((table.line_num, row) for row in table)
            for number, row in rows:
                yield number, row
    except Exception as error:  # no such file, no network, not JSON, a quote never closed, ..
        place = f" after line {number}" if number else ""
        require(False, f"{source}: cannot be read{place} ({error}); mend it or its name")


def read(source, like=None, limit=None):
    """The first `limit` rows of a file or of owner/name:split (Hub), as Examples. Rows without a
    gold label (- or -1) are left out. `like`: Examples whose form and classes are to be kept."""
    texts, golds, columns = [], [], None
    known = {name.lower(): name for name in like.names} if like else {}
    for number, row in itertools.islice(records(source), limit):
        where = f"{source}, line {number}"
        require(isinstance(row, dict) and None not in row, f"{where}: has a wrong count of columns")
        if columns is None:
            widths = {len(text) for text in like.texts[:1]} if like else set()
            columns = next((c for c in TEXTS if {*c} <= {*row} and widths <= {len(c)}), None)
            gold = next((name for name in LABELS if name in row), None)
            require(columns and gold, f"{source}: has columns {some([*row])}; name them label and "
                    "text, or label, premise and hypothesis, the same in all files")
        text, label = tuple(row.get(name) for name in columns), row.get(gold)
        label = str(label).strip() if isinstance(label, (str, int)) else ""
        require(label and {*map(type, text)} == {str}, f"{where}: {' and '.join(columns)} must be "
                f"text, {gold} text or an integer (- for none)")
        if label in ("-", "-1"):
            continue
        if like and label not in like.names:
            lower = label.lower()
            label = known.get(lower) or known.get(SHORT.get(lower), label)
            require(label in like.names, f"{where}: label {label} is none of {some(like.names)}")
        texts.append(text)
        golds.append(label)
    require(golds, f"{source}: has no labelled row; give a file with at least one")
    if not like and {*golds} <= {*SHORT}:
        golds = [SHORT[label] for label in golds]
    # Integers are in the order of their size, other names in that of the alphabet.
    names = like.names if like else sorted({*golds}, key=lambda x: (len(x) * x.isdecimal(), x))
    require(like or len({*map(str.lower, names)}) == len(names),
            f"{source}: has labels that differ in case only, of {some(names)}; make them the same")
    # index finds the first: a class that is called non-X, before the non-X that eval.py adds.
    return Examples(texts, torch.tensor([names.index(label) for label in golds]), names)


def load_task(cfg):
    """(training Examples, [dev Examples, ..])."""
    if cfg.task == "built-in":
        return built_in()[0]["train"], []
    sources = [f"{cfg.data}/{file}" if cfg.data else hub for hub, file in TASKS.get(cfg.task, [])]
    source, *dev = sources or [cfg.train]
    training = read(source, limit=cfg.limit)
    require(len(training.names) > 1, f"{source}: has one class; give rows of two or more")
    return training, [read(path, training) for path in cfg.dev or dev]


def fingerprint(examples):
    """A hash that two sets share only if they hold the same rows in the same order."""
    content = repr((examples.names, examples.texts, examples.labels.tolist()))
    return hashlib.sha256(content.encode()).hexdigest()


# ------------------------------ machinery: the built-in task

WORDS = ["monday", "tuesday", "wednesday", *(f"thing{i}" for i in range(600))]


def built_in():
    """A task with known rules: each text lists things seen at a place; predict the place.

    A text reads "monday thing12 thing597 ..", its label coast. Of eight things, four belong to a
    place, each in 8 of 10 cases to the right one: no single word decides. There is also
    a shortcut: the day agrees with the place in 90% of the training and ID texts, by chance in the
    OOD set, never in the adversarial one. 3% of the training labels are wrong. Returns the sets
    {name: Examples} and what is planted in the training rows, {name: mask (n,)}.
    """
    rng = np.random.default_rng(0)  # fixed: --seed varies the training, never the data
    days, things = np.array(WORDS[:3]), np.array(WORDS[3:])  # 150 things a place and 150 of none

    def draw(n, agreement, wrong=0.0):
        place = rng.integers(3, size=n)
        others = (place + rng.integers(1, 3, size=(6, n))) % 3  # never the place
        *elsewhere, false_day, mistake = others
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


def built_in_model(name, names, device):
    """A BERT with random weights, of the size in its name, and a tokenizer of whole words."""
    layers, width = BUILT_IN_MODELS[name]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=len(words), num_hidden_layers=layers, num_attention_heads=width // 32,
        hidden_size=width, intermediate_size=4 * width, **names))
    tokens = {word: i for i, word in enumerate(words)}
    return model.to(device), transformers.BertTokenizer(tokens, model_max_length=64)


# ------------------------------ machinery: fast, exactly


def compute_less(model):
    """Leave out what no head reads, in the model types for which this is tested."""
    if model.config.model_type not in ("deberta-v2", "bert", "roberta", "electra"):
        return
    # The head reads the first token only. So the last layer computes only that token, once it has
    # attended to all: the hook cuts (what attention found, the layer's input).
    last = model.base_model.encoder.layer[-1].attention
    last.output.register_forward_pre_hook(lambda _, states: tuple(x[:, :1] for x in states))
    for module in model.modules():
        if hasattr(module, "pos_ebd_size") and (
                module.position_buckets <= module.max_relative_positions):
            module.register_forward_pre_hook(nearest_positions, with_kwargs=True)


def nearest_positions(attention, args, kwargs):
    """Give DeBERTa's attention only the relative positions that occur: n tokens use the middle 2n
    of the table's 2 * span."""
    table = kwargs["rel_embeddings"]  # (2 * span, hidden)
    span = len(table) // 2
    attention.pos_ebd_size = width = min(args[0].shape[1], span)
    return args, kwargs | {"rel_embeddings": table[span - width:span + width]}


def compact_embeddings(model, sets):
    """Train only the rows of the word table that these Encoded sets use: without weight decay,
    AdamW never moves a row of zero gradient. Returns a function that puts the others back."""
    table = model.get_input_embeddings()
    tied = [p for _, p in model.named_parameters(remove_duplicate=False) if p is table.weight]
    if type(table) is not torch.nn.Embedding or len(tied) > 1:
        return lambda: None
    used = [row["input_ids"] for data in sets for row in data.inputs]
    used = np.union1d(np.concatenate(used), sets[0].tokenizer.pad_token_id)
    new_id = torch.full((len(table.weight),), len(used))  # unused ids raise an error
    new_id[used] = torch.arange(len(used))
    new_id = new_id.to(model.device)
    small = torch.nn.Embedding.from_pretrained(table.weight.detach()[used], freeze=False)
    # Translated in the table, not in the batch: RoBERTa tells positions by which ids are padding.
    small.register_forward_pre_hook(lambda _, ids: new_id[ids[0]])
    model.set_input_embeddings(small)
    table.cpu()

    def restore():
        table.weight.data[used] = small.weight.detach().cpu()
        model.set_input_embeddings(table.to(model.device))
    return restore


# ------------------------------ machinery: files and errors


def require(condition, message):
    """If a user's input is wrong, say in one line on stderr what to mend; exit with code 2."""
    if not condition:
        print(f"{Path(sys.argv[0]).name}:", *message.split(), file=sys.stderr)  # on one line
        raise SystemExit(2)


@contextlib.contextmanager
def refusing(what, remedy, errors=Exception):
    """Turn an error inside, which is the user's to mend, into the line that `require` prints."""
    try:
        yield
    except errors as error:
        require(False, f"{what} ({error}); {remedy}")


def some(names):
    """The first five of the names, in a line."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check(parser, argv):
    """Parse the command line, refuse what cannot work, fill in what depends on other settings."""
    parser.error = lambda message: require(False, message)
    cfg = parser.parse_args(argv)
    if cfg.resume:
        words = sys.argv[1:] if argv is None else argv
        require(sum(word.startswith("--") for word in words) == 1, "--resume: give no other option")
        with refusing(f"--resume {cfg.resume}: cannot be read", "name the folder of a run"):
            config = json.loads(Path(cfg.resume, "run.json").read_text())["config"]
        return argparse.Namespace(**config | {"out": cfg.resume, "resume": cfg.resume})
    own = cfg.data or cfg.train or cfg.dev or cfg.test or cfg.limit
    if cfg.task == "built-in" or not (cfg.task or cfg.ref or cfg.main or cfg.dynamics or own):
        require(not own, "--task built-in has its own data; leave out other data and --limit")
        parser.set_defaults(**BUILT_IN | ({"ref": None} if cfg.dynamics else {}))
        cfg = parser.parse_args(argv)
    require(not (cfg.train and (cfg.task or cfg.data)), "--train: leave out --task and --data")
    require(cfg.train or cfg.task or not (cfg.dev or cfg.test),
            "--train is missing; give the training set, or --task nli for the paper's")
    cfg.task = cfg.task or (None if cfg.train else "nli")
    require(cfg.task != "hsd" or cfg.data, "--task hsd: is not on the Hub; give --data")
    require(cfg.task == "built-in" or not {cfg.ref, cfg.main} & {*BUILT_IN_MODELS},
            "the built-in models know the words of the built-in task only; name others")
    if "dm" in cfg.methods:  # it needs the dynamics of erm
        cfg.methods = ["erm", *cfg.methods]
    cfg.methods = [*dict.fromkeys(cfg.methods)]
    sources = {METHODS[name].source for name in cfg.methods}
    require(not (cfg.ref and cfg.dynamics), "--dynamics replaces --ref; give one of the two")
    require(not cfg.dynamics or "ref" in sources, "--dynamics: none of the --methods needs it")
    require(cfg.main and (cfg.ref or cfg.dynamics or "ref" not in sources),
            "--ref or --main is missing; name two models, such as deberta-small and deberta-large")
    least = {"seed": 0, "skip_epochs": 0, "max_length": 8, "fraction": 0, "lr": 1e-9,
             "ref_lr": 1e-9}
    for name, value in vars(cfg).items():
        require(not isinstance(value, (int, float)) or value >= least.get(name, 1),
                f"--{name.replace('_', '-')} {value}: must be at least {least.get(name, 1)}")
    require(cfg.fraction <= 1, f"--fraction {cfg.fraction}: must be at most 1")
    reused = {None, "ref"} if cfg.dynamics else {None}
    require(sources <= reused or cfg.epochs > cfg.skip_epochs + 1,
            f"--epochs {cfg.epochs}: a data map needs two besides those of --skip-epochs")
    cfg.device = cfg.device or str(torch.accelerator.current_accelerator(True) or "cpu")
    with refusing(f"--device {cfg.device}: cannot be used", "give cuda or cpu"):
        torch.empty(1, device=cfg.device)
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cfg.amp = cfg.amp or (half if "cuda" in cfg.device else "off")
    cfg.metric = cfg.metric or ("macro-f1" if cfg.task == "hsd" else "accuracy")
    return cfg


def write(path, put):
    """Let `put` write a file or folder under another name, then rename it to `path`: a run killed
    at any moment leaves the whole or nothing. The first process writes, the others wait."""
    if ranks()[0] == 0:
        partial = path.with_name(path.name + ".partial")
        with refusing(f"{path}: cannot be written", "make room, then continue with --resume"):
            put(partial)
            partial.replace(path)
    if dist.is_initialized():
        dist.barrier()


def write_json(path, value):
    write(path, lambda partial: partial.write_text(json.dumps(value, indent=1)))


def say(cfg, line):
    """Print a line, and add it to log.txt."""
    if ranks()[0] == 0:
        tqdm.tqdm.write(line)
        sys.stdout.flush()  # so that a log file shows it now
        with open(Path(cfg.out, "log.txt"), "a") as log:
            print(line, file=log)


def save_checkpoint(cfg, name, parts, dynamics, done, best):
    """Save all that `train` needs to go on from here to the same result."""
    state = {key: part.state_dict() for key, part in parts.items()}
    state |= {"phase": name, "dynamics": dynamics, "done": done, "best": best}
    write(Path(cfg.out, "checkpoint.pt"), lambda partial: torch.save(state, partial))


def load_checkpoint(cfg, name, parts, dynamics):
    """Fill parts and dynamics in place; return (done, best). None if this phase left nothing."""
    path, saved = Path(cfg.out, "checkpoint.pt"), {}
    if cfg.resume and path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if saved.get("phase") != name:
        return None
    for key, part in parts.items():
        part.load_state_dict(saved[key])
    if dynamics is not None:
        dynamics.copy_(saved["dynamics"])
    return saved["done"], saved["best"]


def ranks():
    """(number of this process, how many there are): (0, 1), unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(tensor, operation=dist.ReduceOp.MAX):
    """Each number's largest (or the sum) over all processes: in place, in every process."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


if __name__ == "__main__":
    import eval  # not Python's eval but eval.py, which measures what this file trained
    several = dist.is_torchelastic_launched()  # torchrun started several processes
    if several and torch.cuda.is_available():
        with refusing("torchrun --nproc-per-node", "start one process a GPU"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    wanted = settings()
    if several:
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in wanted.device else "cpu:gloo")
    try:
        _, lines = eval.read_tests(wanted)  # finds a bad test file now, not after days
        for line in lines if ranks()[0] == 0 else ():
            print(line)
        main(wanted)
        rank, _ = ranks()
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank == 0:
            eval.main([wanted.out])
    except KeyboardInterrupt:
        local = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = f"torchrun --nproc-per-node {local}" if local else "python"
        command = f"{launcher} ftft.py --resume {wanted.out}"
        if Path(wanted.out or "", "run.json").exists() and ranks()[0] == 0:
            print(f"stopped; to continue: {command}", file=sys.stderr)
        raise SystemExit(130)
