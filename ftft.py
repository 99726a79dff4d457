"""FTFT: efficient and robust fine-tuning by transferring training dynamics, in one file.

Fine-tuned language models break on out-of-distribution and adversarial input, because shortcuts solve most of
their training examples. Training on the examples that a model keeps changing its mind about makes it more
robust, and a far smaller model can find them (Du, Gatt and Nguyen, arXiv 2310.06588). The four steps:

  1. fine-tune a small reference model on everything; `dynamics` (epochs, n, classes) takes all logits
  2. draw the data map: `confidence` and `variability` (n,), mean and spread of p(gold) over the epochs
  3. keep `rows` (k,): the third of the examples whose p(gold) swings most
  4. fine-tune the large main model on those rows only, for fewer steps

  python ftft.py                                            # built-in task, offline, 70 s on two CPU cores
  python ftft.py --ref deberta-small --main deberta-large   # MultiNLI, then HANS, WANLI and ANLI

An example has one name for life, its row in the training list, whichever model and tokenizer is at work.
"""
import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: faster on a CPU

# ---------------------------------------------------------------- settings


def option(default, help, **more):
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True)
class Settings:
    # the method
    ref: str = option(None, "reference: a short name (deberta-small, bert-tiny, ..), Hub id or folder")
    main: str = option(None, "main model, likewise")
    dynamics: str = option(None, "instead of --ref: an earlier reference to reuse, such as runs/a/ref")
    select: str = option("ambiguous", "default: ambiguous", choices=["ambiguous", "hard", "easy", "random"])
    fraction: float = option(0.33, "share of the training rows to keep (default: 0.33)")
    baselines: tuple = option((), "train these as well", choices=["erm", "random", "hard", "easy", "dm"])
    # the data
    task: str = option(None, "default: nli (MultiNLI); hsd: CAD", choices=["nli", "hsd", "built-in"])
    data: str = option(None, "folder with the task's files as their authors release them, instead of the Hub")
    train: str = option(None, "training file of your own: .jsonl, .csv or .tsv")
    dev: tuple = option((), "files to choose the best weights by, and to stop early")
    test: tuple = option((), "files to report on, each as id=FILE, ood=FILE or adversarial=FILE")
    limit: int = option(None, "take the first N training rows only")
    out: str = option(None, "folder for the run, a new one (default: runs/TASK-1, -2, ..)")
    resume: str = option(None, "continue the run in this folder; all other settings are its own")
    # the training
    epochs: int = option(4, "epochs of the reference model and of ERM (default: 4)")
    steps: int = option(None, "budget of the other models (default: ERM's; a third of it without dev sets)")
    patience: int = option(2, "stop after N of the 12 evaluations without a rise (default: 2); never ERM")
    batch_size: int = option(32, "rows a step (default: 32)")
    grad_accum: int = option(1, "work through each batch in N pieces: less memory, the same gradient")
    lr: float = option(None, "of main models (default: 2e-5; from 200M parameters beside embeddings 1e-5)")
    ref_lr: float = option(2e-5, "learning rate of the reference model (default: 2e-5)")
    max_length: int = option(300, "tokens after which an input is cut (default: 300)")
    seed: int = option(0, "seed of new weights, order of rows, dropout and random selection (default: 0)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "default: a GPU if there is one")
    amp: str = option(None, "default: bf16 on a GPU, or else fp16", choices=["bf16", "fp16", "off"])


MODELS = {**{f"deberta-{s}": f"microsoft/deberta-v3-{s}" for s in ("xsmall", "small", "base", "large")},
          **{f"electra-{s}": f"google/electra-{s}-discriminator" for s in ("small", "base", "large")},
          **{f"roberta-{s}": f"FacebookAI/roberta-{s}" for s in ("base", "large")},
          **{f"bert-{s}": f"google-bert/bert-{s}-uncased" for s in ("base", "large")},
          "bert-tiny": "prajjwal1/bert-tiny"}
# Two transformers that train from scratch in seconds; that takes higher learning rates than fine-tuning does.
BUILT_IN = dict(task="built-in", ref="built-in-2x64", main="built-in-4x128", baselines=("erm", "random"),
                lr=5e-4, ref_lr=1e-3)


def require(condition, message):
    """Where a user's input falls short: one line on stderr that says what to mend, and exit code 2."""
    if not condition:
        print(f"{Path(sys.argv[0]).name}:", *message.split(), file=sys.stderr)  # on one line
        raise SystemExit(2)


@contextlib.contextmanager
def refusing(what, remedy, errors=Exception):
    """What fails inside is the user's to mend: said in the line that `require` prints."""
    try:
        yield
    except errors as error:
        require(False, f"{what} ({error}); {remedy}")


def settings(argv=None):
    """The command line as Settings; what cannot work is refused here."""
    logging.disable(logging.WARNING)  # the libraries' warnings (new heads, retries) ask nothing of a user
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: require(False, message)
    for field in dataclasses.fields(Settings):
        more = {**field.metadata, **(dict(nargs="+") if field.type is tuple else dict(type=field.type))}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **more)
    cfg = parser.parse_args(argv)
    if cfg.resume:
        require(sum(value != parser.get_default(key) for key, value in vars(cfg).items()) == 1,
                "--resume: all settings are the run's; give no other")
        with refusing(f"--resume {cfg.resume}: cannot be read", "name the folder of a run"):
            config = json.loads(Path(cfg.resume, "run.json").read_text())["config"]
            return Settings(**config | {"out": cfg.resume, "resume": cfg.resume})
    data = cfg.data or cfg.train or cfg.dev or cfg.test
    if cfg.task == "built-in" or not (cfg.task or cfg.ref or cfg.main or cfg.dynamics or data):
        parser.set_defaults(**BUILT_IN)
        require(not (data or cfg.limit), "--task built-in has its own data; leave out other data")
    cfg = parser.parse_args(argv)
    cfg.task = "custom" if cfg.train else cfg.task or "nli"
    require(cfg.main and (cfg.ref or cfg.dynamics or {cfg.select, *cfg.baselines} <= {"random", "erm", "dm"}),
            "--ref or --main is missing: name two models, such as deberta-small and deberta-large")
    for name, value in vars(cfg).items():
        low, high = {"seed": (-1, 2**32), "epochs": (1, 999), "fraction": (0, 1)}.get(name, (0, 2**32))
        require(not isinstance(value, (int, float)) or low < value <= high,
                f"--{name.replace('_', '-')} {value}: must be above {low} and at most {high}")
    on_gpu = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cfg.amp = cfg.amp or ("off" if cfg.device == "cpu" else on_gpu)
    return Settings(**vars(cfg))


# ---------------------------------------------------------------- data

# The paper's tasks: the training set, then the dev sets, each on the Hub and as its authors' file in --data.
# eval.py has the test sets. As in the paper, dev data is out of distribution; it is never trained on.
TASKS = {
    "nli": [("nyu-mll/multi_nli:train", "multinli_1.0/multinli_1.0_train.jsonl"),
            *[(f"facebook/anli:dev_r{r}", f"anli_v1.0/R{r}/dev.jsonl") for r in (1, 2, 3)]],
    "hsd": [(file, file) for file in ("cad/cad_uid.train", *(  # not on the Hub: here, if not under --data
        f"dynahate/r{r}_{form}.dev" for r in "234" for form in ("original", "perturbation")))]}
TEXT_COLUMNS = [("premise", "hypothesis"), ("sentence1", "sentence2"), ("context", "hypothesis"),
                ("text1", "text2"), ("text",), ("sentence",)]
GOLD_COLUMNS = ["label", "gold_label", "gold", "labels"]
SHORT_LABELS = {"e": "entailment", "n": "neutral", "c": "contradiction"}

# texts: n tuples, (premise, hypothesis) or (text,); labels (n,): numbers into names, those of the classes;
# dropped: the number of rows left out because they have no gold label (they are labelled - or -1)
Examples = collections.namedtuple("Examples", "texts labels names dropped", defaults=[0])


def records(source):
    """Yield (line number, {column: value}) of a file, or of a data set on the Hub, as owner/name:split."""
    suffix, number, on_hub = Path(source).suffix, 0, ":" in source and not Path(source).exists()
    kinds = (".jsonl", ".csv", ".tsv", ".train", ".dev", ".test")
    require(on_hub or suffix in kinds, f"{source}: is of no kind that is read; give .jsonl, .csv or .tsv")
    try:
        lines = None if on_hub else open(source, encoding="utf-8-sig", newline="")
        if on_hub:
            path, split = source.split(":")
            table = datasets.load_dataset(path, split=split)
            names = {name: kind.names for name, kind in table.features.items() if hasattr(kind, "names")}
            rows = ((i, row | {k: v[row[k]] for k, v in names.items() if row[k] not in (None, -1)})
                    for i, row in enumerate(table, 1))  # names, as every set numbers its classes its own way
        elif suffix == ".jsonl":
            rows = ((i, json.loads(line)) for i, line in enumerate(lines, 1) if line.strip())
        else:  # CAD and DynaHate (.train, .dev, .test) are released without a header
            header = None if suffix in (".csv", ".tsv") else ["labels", "text", "uid"]
            table = csv.DictReader(lines, header, delimiter="," if suffix == ".csv" else "\t", strict=True)
            rows = ((table.line_num, row) for row in table)
        for number, row in rows:
            json.dumps(row, ensure_ascii=False).encode()  # fails on half a character, as JSON's \ud800 is
            yield number, row
    except Exception as error:  # no network, no such file, not JSON, a quote never closed, ..
        require(False, f"{source}: cannot be read after line {number} ({error}); mend it, or see --data")


def read(source, like=None, limit=None):
    """Read one set as Examples: in the form and with the label names of `like`, where that is given."""
    texts, golds, dropped, columns = [], [], 0, None
    for number, row in itertools.islice(records(source), limit):
        where = f"{source}, line {number}"
        require(isinstance(row, dict) and None not in row, f"{where}: has no columns, or too many; mend it")
        if columns is None:
            columns = next((names for names in TEXT_COLUMNS if {*names} <= {*row}), ())
            gold = next((name for name in GOLD_COLUMNS if name in row), None)
            require(columns and gold, f"{source}: has no text or no label column; name them text and label")
            require(not (like and like.texts) or len(columns) == len(like.texts[0]),
                    f"{source}: mixes pairs and single texts")
        text, label = tuple(row.get(name) for name in columns), row.get(gold)
        label = str(label).strip() if isinstance(label, (str, int)) else ""
        require(label and all(isinstance(part, str) for part in text),
                f"{where}: {' and '.join(columns)} must be text, {gold} text or an integer, - for none")
        if label in ("-", "-1"):
            dropped += 1
            continue
        if like:
            label = label if label in like.names else SHORT_LABELS.get(label.lower(), label.lower())
            require(label in like.names, f"{where}: {label} is none of {', '.join(like.names)}; rename it")
        texts.append(text)
        golds.append(label)
    require(golds, f"{source}: has no labelled row; give a file with at least one")
    if not like and {*golds} <= {*SHORT_LABELS}:
        golds = [SHORT_LABELS[label] for label in golds]
    # Integers are numbered by their size, other labels by the alphabet.
    names = like.names if like else sorted({*golds}, key=lambda name: (len(name) * name.isdecimal(), name))
    return Examples(texts, torch.tensor([names.index(label) for label in golds]), names, dropped)


def load_task(cfg):
    """(training Examples, [dev Examples, ..]), read and checked."""
    if cfg.task == "built-in":
        return built_in()[0]["train"], []
    sources = [f"{cfg.data}/{file}" if cfg.data else hub for hub, file in TASKS.get(cfg.task, [])]
    source, *dev = sources or [cfg.train]
    training = read(source, limit=cfg.limit)
    require(len(training.names) > 1, f"{source}: has one class only; give rows of two or more")
    return training, [read(path, training) for path in cfg.dev or dev]


def fingerprint(examples):
    """A hash that two training lists share only if they hold the same rows in the same order."""
    digest = hashlib.sha256(repr(examples.names).encode())
    for row in zip(examples.texts, examples.labels.tolist()):
        digest.update(repr(row).encode())
    return digest.hexdigest()


WORDS = ["monday", "tuesday", "wednesday", *(f"thing{i}" for i in range(600))]


def built_in():
    """A task of which everything is known: which place was visited, told from eight things seen there?

    Four of them belong to places, each in 8 of 10 cases to the one visited, else to another; four belong to
    none. So no single word decides. Beside this rule stands a *shortcut*: the day, named first, agrees with
    the place in 90% of the training and ID texts, is random in the OOD test and always wrong in the
    adversarial one. 3% of the training labels are wrong. A text reads "monday thing12 thing597 ..", its
    label coast. Returns the sets {name: Examples}, and which training rows hold what is planted.
    """
    rng = np.random.default_rng(0)  # fixed: --seed varies the training, never the data
    days, things = np.array(WORDS[:3]), np.array(WORDS[3:])  # 150 things of each place and 150 of none

    def draw(n, agreement, wrong=0.0):
        place = rng.integers(3, size=n)
        *elsewhere, false_day, mistake = (place + rng.integers(1, 3, size=(6, n))) % 3  # (n,) each, not place
        owner = np.where(rng.random((4, n)) < 0.8, place, elsewhere)                # (4, n)
        owner = np.concatenate([owner, np.full((4, n), 3)]).T                       # (n, 8); 3 for none
        seen = things[rng.permuted(150 * owner + rng.integers(150, size=(n, 8)), axis=1)]
        day, mislabelled = np.where(rng.random(n) < agreement, place, false_day), rng.random(n) < wrong
        texts = [(" ".join(words),) for words in np.column_stack([days[day], seen])]
        labels = torch.from_numpy(np.where(mislabelled, mistake, place))
        planted = {"shortcut-breaking": day != place, "mislabelled": mislabelled}
        return Examples(texts, labels, ["coast", "forest", "village"]), planted

    training, planted = draw(8000, 0.9, wrong=0.03)
    return {"train": training, "id": draw(2000, 0.9)[0], "ood": draw(2000, 1 / 3)[0],
            "adversarial": draw(2000, 0.0)[0]}, planted


# ---------------------------------------------------------------- models and batches


def load(name, classes, device):
    """The pretrained model `name` on `device`, with a head for these classes, and its tokenizer. The head is
    new, unless the checkpoint has one for as many classes.

    Weights are float32 whatever the checkpoint holds: DeBERTa-v3's are fp16, which GradScaler refuses.
    """
    hub = MODELS.get(name, name)
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    remedy = "give a short name, a Hub id or a folder with config.json, weights and tokenizer"
    with refusing(f"cannot load the model {name} on {device}", remedy):
        if name in (BUILT_IN["ref"], BUILT_IN["main"]):
            layers, width = map(int, name.removeprefix("built-in-").split("x"))
            words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
            tokenizer = transformers.BertTokenizer(words, model_max_length=64)  # whole words: word-level
            model = transformers.BertForSequenceClassification(transformers.BertConfig(
                vocab_size=len(words), num_hidden_layers=layers, num_attention_heads=width // 32,
                hidden_size=width, intermediate_size=4 * width, **labels))
        else:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                hub, dtype=torch.float32, ignore_mismatched_sizes=True, trust_remote_code=False, **labels)
            tokenizer = transformers.AutoTokenizer.from_pretrained(hub, trust_remote_code=False)
        model.to(device)
    require(tokenizer.pad_token, f"the model {name} has no padding token; take an encoder such as bert-tiny")
    return model, tokenizer


def backbone_size(model):
    """Parameters that every token is multiplied with: all but the embedding tables."""
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    return sum(p.numel() for p in model.parameters()) - tables


# Tokenized examples. inputs: input_ids and, if any, token_type_ids, each a flat int32 array (1 + tokens,) of
# the padding, in place 0, and all examples; starts (n + 1,): where each begins and the last ends; lengths
# (n,): in tokens; labels (n,). All are on the device but lengths, which the host needs at each step.
Encoded = collections.namedtuple("Encoded", "inputs starts lengths labels")


def encode(tokenizer, examples, cfg):
    pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    flat = {name: [np.int32([pad])] for name, pad in pads.items() if name in tokenizer.model_input_names}
    lengths, limit = [], min(cfg.max_length, tokenizer.model_max_length)
    for start in range(0, len(examples.texts), 10_000):  # in chunks: tokens in Python lists take much memory
        columns = map(list, zip(*examples.texts[start:start + 10_000]))
        tokens = tokenizer(*columns, truncation=True, max_length=limit)
        lengths += map(len, tokens["input_ids"])
        for name in flat:
            flat[name].append(np.concatenate(tokens[name], dtype=np.int32))
    lengths = torch.tensor(lengths)
    starts = F.pad(lengths.cumsum(0), (1, 0)) + 1
    inputs = {name: torch.from_numpy(np.concatenate(parts)).to(cfg.device) for name, parts in flat.items()}
    return Encoded(inputs, starts.to(cfg.device), lengths, examples.labels.to(cfg.device))


def collate(data, rows):
    """Model inputs for these rows, padded to the longest of them, each (rows, longest)."""
    columns = torch.arange(data.lengths[rows].max(), device=data.starts.device)
    rows = rows.to(data.starts.device, non_blocking=True)
    place = data.starts[rows, None] + columns
    mask = (place < data.starts[rows + 1, None]).long()  # times 0 gives place 0, the padding
    return {"attention_mask": mask, **{name: flat[place * mask].long() for name, flat in data.inputs.items()}}


def batches(rows, lengths, size, seed, epoch):
    """This epoch's batches: each row once, among rows of like length, as random batches are half padding.

    The rows are shuffled, cut into pools, sorted by length in each pool and cut into batches, and the batches
    are shuffled. A little noise in the lengths varies which rows meet.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    shuffle = lambda items: items[torch.randperm(len(items), generator=generator)]
    key = lengths * (1 + 0.05 * torch.rand(len(lengths), generator=generator))
    cut = [part for pool in shuffle(rows).split(100 * size) for part in pool[key[pool].argsort()].split(size)]
    return [cut[i] for i in shuffle(torch.arange(len(cut)))]


# ---------------------------------------------------------------- training


def autocast(cfg):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.amp)
    return torch.autocast(torch.device(cfg.device).type, dtype, enabled=dtype is not None)


def ranks():
    """(number of this process, how many there are): (0, 1), unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def train(model, data, rows, steps, lr, cfg, dynamics=(), saved={}):
    """Fine-tune `model` in place on these rows. A generator: after each step it yields (step, rows, loss,
    parts), so that the caller can count, evaluate, save and stop. `parts` {name: ..} are what a checkpoint
    must hold by their state_dict(); given such a checkpoint as `saved`, training goes on after its step.

    `dynamics` (epochs, n, classes), where given, takes the logits that the loop has anyway: in training mode
    (dropout on) and before the update, as in dataset cartography and the authors' code.
    """
    rank, world = ranks()
    if world > 1:  # each rank trains on its share of every batch
        model = torch.nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-6, weight_decay=0.0, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, max(1, round(0.1 * steps)), steps)
    scaler = torch.amp.GradScaler(torch.device(cfg.device).type, enabled=cfg.amp == "fp16")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    for name in parts.keys() & saved.keys():
        parts[name].load_state_dict(saved.pop(name))
    done = saved.get("step", 0)
    order = ((epoch, batch) for epoch in itertools.count()
             for batch in batches(rows, data.lengths, cfg.batch_size, cfg.seed, epoch))
    for step, (epoch, batch) in enumerate(itertools.islice(order, done, steps), done + 1):
        model.train()  # at every step, since the caller may evaluate in between
        torch.manual_seed(cfg.seed + 1_000_003 * (step * world + rank))  # so dropout has no state to save
        # Losses are summed, then divided by the whole step's rows: each weighs the same, however the batch is
        # cut. (Times world, as ranks are averaged; a rank without rows takes one along at no weight.)
        mine, weight = (batch[rank::world], world / len(batch)) if rank < len(batch) else (batch[:1], 0.0)
        pieces, loss = mine.split(math.ceil(cfg.batch_size / world / cfg.grad_accum)), 0.0
        for part in pieces:
            model.require_backward_grad_sync = part is pieces[-1]  # DDP: add up the ranks but once
            inputs, there = collate(data, part), part.to(data.labels.device, non_blocking=True)
            with autocast(cfg):
                logits = model(**inputs).logits.float()                         # (rows, classes)
            part_loss = F.cross_entropy(logits, data.labels[there], reduction="sum") * weight
            scaler.scale(part_loss).backward()
            if weight and epoch < len(dynamics):
                dynamics[epoch, there] = logits.detach()
            loss += part_loss.detach()
        scaler.unscale_(optimizer)  # so that clipping sees the true gradients
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # a smaller scale means that fp16 overflowed and no step was taken
            schedule.step()
        optimizer.zero_grad()
        yield step, batch, loss, parts


@torch.no_grad()
def predict(model, data, cfg):
    """Logits (n, classes) in evaluation mode, float32, on the CPU."""
    logits = torch.empty(len(data.lengths), model.config.num_labels)
    model.eval()
    for rows in data.lengths.argsort(descending=True, stable=True).split(2 * cfg.batch_size):  # less padding
        with autocast(cfg):
            logits[rows] = model(**collate(data, rows)).logits.float().cpu()
    return logits


def metrics(predicted, labels):
    """Accuracy, macro-F1 (mean over the classes in either) and n, from two arrays (n,) of class numbers."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    f1 = [2 * np.sum((predicted == c) & (labels == c)) / (np.sum(predicted == c) + np.sum(labels == c))
          for c in np.union1d(predicted, labels)]
    return {"accuracy": float(np.mean(predicted == labels)), "macro_f1": float(np.mean(f1)), "n": len(labels)}


# ---------------------------------------------------------------- the method: data map and selection


def data_map(dynamics, labels):
    """Statistics of each example over the epochs, each (n,) (Swayamdipta et al. 2020, section 2).

    confidence   mean of p(gold)
    variability  standard deviation of p(gold), dividing by the number of epochs
    correctness  share of epochs in which the gold label was predicted
    forgetting   how often it was predicted in one epoch and no longer in the next (Toneva et al. 2019)
    """
    assert dynamics.isfinite().all(), "an example was not visited in every epoch"
    gold = labels.expand(len(dynamics), -1)[..., None]                          # (epochs, n, 1)
    p_gold = dynamics.softmax(-1).gather(-1, gold).squeeze(-1)                  # (epochs, n)
    right = dynamics.argmax(-1) == labels                                       # (epochs, n)
    return {"confidence": p_gold.mean(0), "variability": p_gold.std(0, correction=0),
            "correctness": right.float().mean(0), "forgetting": (right[:-1] & ~right[1:]).sum(0)}


def select(how, fraction, seed, labels, dynamics=None):
    """The rows (k,) to keep, ascending, and the statistic of the last one let in. Keeps exactly
    k = round(fraction * n) rows; of equals the lower row comes first."""
    if how == "random":
        score = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    else:
        statistics = data_map(dynamics, labels)
        score = {"ambiguous": statistics["variability"],  # p(gold) swings
                 "hard": -statistics["confidence"],       # p(gold) stays low
                 "easy": statistics["confidence"]}[how]   # p(gold) stays high
    rows = score.argsort(descending=True, stable=True)[:round(fraction * len(labels))]
    return rows.sort().values, abs(score[rows[-1]].item())  # abs: hard is scored by minus confidence


# ---------------------------------------------------------------- making it fast, exactly

# Work whose result is known or never used is left out; what is computed stays the same. The first such change
# is in `batches`: with rows of like length together, little of a batch is padding.

def compact_embeddings(model, ids):
    """The second: train those rows of the word-embedding table that stand in `ids`, and no others.

    The others get no gradient, and AdamW without weight decay leaves a row without gradients alone. Returns
    the share kept and a function that restores the table. One whose weights are shared is left whole.
    """
    names = [name for name, weight in model.named_parameters(remove_duplicate=False)
             if weight.ndim == 2 and len(weight) == getattr(model.config, "vocab_size", None)]
    table = model.get_submodule(names[0].removesuffix(".weight")) if len(names) == 1 else None
    if type(table) is not torch.nn.Embedding:
        return 1.0, lambda: None
    whole, padding = table.weight.detach().cpu(), table.padding_idx
    used = torch.zeros(len(whole), dtype=torch.bool, device=ids.device)
    used[ids.long()] = used[padding or 0] = True
    place = torch.where(used, used.cumsum(0) - 1, len(whole))  # not in use: an error, not a wrong row
    table.weight = torch.nn.Parameter(table.weight.detach()[used])
    table.padding_idx = padding if padding is None else place[padding].item()
    # In the table, not in the batch: RoBERTa tells positions by which ids are padding.
    hook = table.register_forward_pre_hook(lambda _, inputs: place[inputs[0]])

    def restore():
        hook.remove()
        whole[used.cpu()] = table.weight.detach().cpu()
        table.weight, table.padding_idx = torch.nn.Parameter(whole), padding
    return used.float().mean().item(), restore


def position_scores(self, query, key, buckets, embeddings, scale_factor):
    """What transformers' DisentangledSelfAttention.disentangled_attention_bias computes for DeBERTa: how much
    tokens attend to each other for their distance alone, (batch * heads, n, n), given `query` and `key`
    (batch * heads, n, size), `buckets` of distances (1, n, n) and the buckets' `embeddings` (512, hidden).

    There, each token is multiplied with all 512 buckets, and the result gathered from that; here, with the
    distances n, .., -n only: of 3 2 1 0 -1 -2 -3, row 0 wants 0 -1 -2, row 1 wants 1 0 -1, row 2 wants 2 1 0.
    So each row begins one place further left, which a stride of 2n instead of 2n + 1 gives without a copy.
    """
    n, heads, span = query.shape[1], self.num_attention_heads, self.pos_ebd_size
    bucket = torch.cat([buckets[0, :, 0].flip(0), buckets[0, 0, 1:]]) + span  # of distances n - 1, .., 1 - n
    bucket = F.pad(bucket.clamp(0, 2 * span - 1), (1, 1))                     # n and -n are not used
    scale = math.sqrt(query.shape[2] * scale_factor)

    def scores(content, position):
        content, position = content.unflatten(0, (-1, heads)), position.unflatten(1, (heads, -1)) / scale
        product = torch.einsum("bhis,dhs->hbid", content, position).contiguous()  # d: the distances
        return product.as_strided((*product.shape[:3], n), (*product.stride()[:2], 2 * n, 1), n)

    of_query = scores(query, self.key_proj(embeddings[bucket]))
    of_key = scores(key, self.query_proj(embeddings[bucket.flip(0)]))  # distances from the key
    return (of_query + of_key.transpose(2, 3)).transpose(0, 1).flatten(0, 1)


def dropout(self, x):
    """torch.nn.Dropout with p in 16 bits: four values share a draw; one each is a tenth of a CPU's step."""
    if not self.training:
        return x
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    return x * ((bits[:x.numel()].view(x.shape) >= 2**16 * self.p - 2**15) / (1 - self.p))


def leave_out(model, data):
    """The third and fourth: compute position_scores in DeBERTa, and in an encoder's last layer only the first
    token, all that a head reads; on a CPU, dropout too. False where logits change: an unlike architecture."""
    rows = data.lengths.argsort()[[0, -1]]  # the shortest beside the longest, hence much padding
    with torch.no_grad():
        expected = model.eval()(**collate(data, rows)).logits
        try:
            last = model.base_model.encoder.layer[-1].attention
            last.output.register_forward_pre_hook(lambda _, args: tuple(x[:, :1] for x in args))
            for module in model.modules():
                if type(module) is torch.nn.Dropout and model.device.type == "cpu":
                    module.forward = dropout.__get__(module)
                if getattr(module, "share_att_key", False) and len(module.pos_att_type) == 2:
                    module.disentangled_attention_bias = position_scores.__get__(module)
            return torch.allclose(model(**collate(data, rows)).logits, expected, atol=1e-5)
        except Exception:  # no such layers, other arguments or shapes
            return False


# ---------------------------------------------------------------- files, signals and other processes

# Not the method: what a run of days needs. Stopped at any moment, it can go on to the very same result.

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def write(path, put):
    """Have `put` write a file or folder beside `path`, then flush and rename it: whoever looks at `path`, at
    whatever moment the run is killed, finds it whole. Of several processes only the first writes."""
    partial = path.with_name(path.name + ".partial")
    if ranks()[0] == 0:
        with refusing(f"{path}: cannot be written", "make room, then continue with --resume"):
            path.parent.mkdir(exist_ok=True)
            put(partial)
            for file in partial.iterdir() if partial.is_dir() else [partial]:
                with open(file, "rb+") as written:
                    os.fsync(written)
            partial.replace(path)


def write_json(path, value):
    write(path, lambda partial: partial.write_text(json.dumps(value, indent=1)))


def say(cfg, line):
    if ranks()[0] == 0:
        print(line, flush=True)
        with refusing(f"{cfg.out}: cannot be written", "make room"), open(f"{cfg.out}/log.txt", "a") as log:
            print(line, file=log)


def leave(cfg, number, _=None):
    """What SIGINT (Ctrl-C) and SIGTERM (a scheduler) do."""
    launcher = "python" if ranks()[1] == 1 else f"torchrun --nproc-per-node {ranks()[1]}"
    say(cfg, f"stopped; to continue: {launcher} ftft.py --resume {cfg.out}")
    raise SystemExit(128 + number)


def max_over_ranks(tensor):
    """Each number's largest over all processes, NaN counting as none: in place, in every process."""
    if dist.is_initialized():
        dist.all_reduce(tensor.nan_to_num_(-math.inf, neginf=-math.inf), dist.ReduceOp.MAX)
    return tensor


def newest_checkpoint(cfg, name):
    """The newest of this phase that is whole; None without one. Nothing in it is executed."""
    for path in sorted(Path(cfg.out, "checkpoint").glob(f"{name}-*.pt"), reverse=True):
        with contextlib.suppress(Exception):
            if not zipfile.ZipFile(path).testzip():  # torch.load does not look at checksums
                return torch.load(path, map_location="cpu", weights_only=True)
        say(cfg, f"{path}: is broken; going back to the one before")


# ---------------------------------------------------------------- the run


def learn(name, model, data, dev, rows, steps, lr, cfg, state):
    """Train, evaluate 12 times, keep the best weights in `state` and stop when they stay the best. `state` is
    saved then, too, and after each epoch; one that was loaded goes on where it was saved."""
    count, dynamics = state["count"], state["dynamics"].to(cfg.device)
    points = {math.ceil(steps * i / 12) for i in range(1, 13)}
    saves = points | {*range(0, steps, math.ceil(len(rows) / cfg.batch_size))}
    metric = "macro_f1" if cfg.task == "hsd" else "accuracy"
    began, stopped, folder = time.perf_counter(), [0], Path(cfg.out, "checkpoint")
    # Signals are noted only, since a step is taken whole or not at all.
    usual = [signal.signal(number, lambda number, _: stopped.append(number)) for number in SIGNALS]
    for step, batch, loss, parts in train(model, data, rows, steps, lr, cfg, dynamics, state):
        count.update(steps=1, examples=len(batch), tokens=int(data.lengths[batch].sum()),
                     padded_tokens=len(batch) * int(data.lengths[batch].max()))
        stop = max_over_ranks(torch.tensor(stopped[-1])).item()
        if step % 50 and step not in saves and not stop:
            continue  # only now and then does the host wait for the device, to look at its numbers
        require(loss.isfinite(), f"{name}: the loss is not finite at step {step}; lower its learning rate")
        require(parts["scaler"].get_scale() > 1e-3, f"{name}: fp16 overflows at every step; try --amp off")
        count["seconds"] += time.perf_counter() - began  # evaluation is not counted
        if dev and step in points:
            score = [metrics(predict(model, part, cfg).argmax(1), part.labels.cpu())[metric] for part in dev]
            score = torch.tensor(np.mean(score) if ranks()[0] == 0 else -math.inf, dtype=torch.float64)
            state["dev"].append([step, max_over_ranks(score).item()])  # the first's: all stop alike
            scores = [score for _, score in state["dev"]]
            since_best = len(scores) - 1 - scores.index(max(scores))
            if since_best == 0:
                state["best"] = {key: value.cpu().clone() for key, value in model.state_dict().items()}
            if since_best == cfg.patience and not len(dynamics):  # never the reference or ERM, which log them
                break
        if step in saves or stop:
            say(cfg, f"{name}: step {step} of {steps}, loss {loss:.3f}")
            max_over_ranks(dynamics)  # each rank has visited other rows
            state |= {"step": step, "dynamics": dynamics}
            checkpoint = state | {key: part.state_dict() for key, part in parts.items()}
            write(folder / f"{name}-{step:09}.pt", functools.partial(torch.save, checkpoint))
            for old in {*folder.glob("*.pt")} - {*sorted(folder.glob(f"{name}-*.pt"))[-2:]}:
                old.unlink(missing_ok=True)  # all but two, should the newest be broken
        if stop:
            leave(cfg, stop)
        began = time.perf_counter()
    if stop := max_over_ranks(torch.tensor(stopped[-1])).item():  # during the last evaluation
        leave(cfg, stop)
    for number, action in zip(SIGNALS, usual):
        signal.signal(number, action)
    state["dynamics"] = dynamics.cpu()


def fine_tune(name, rows, training, dev, cfg, run):
    """One phase: load a model, train it on these rows, keep the weights that did best on the dev sets, save
    them under `name`, enter it in run.json. The reference and ERM train on everything for whole epochs and
    return their training dynamics (epochs, n, classes); the others train for at most cfg.steps."""
    everything, n, folder = name in ("ref", "erm"), len(training.labels), Path(cfg.out, name)
    if cfg.resume and folder.exists():
        return load_dynamics(folder, run["fingerprints"][0])[0] if everything else None
    model_name, lr = (cfg.ref, cfg.ref_lr) if name == "ref" else (cfg.main, cfg.lr)
    steps = cfg.epochs * math.ceil(n / cfg.batch_size) if everything else cfg.steps
    torch.manual_seed(cfg.seed)  # in every phase, so that none depends on what was trained before it
    model, tokenizer = load(model_name, training.names, cfg.device)
    data, *dev = [encode(tokenizer, examples, cfg) for examples in (training, *dev)]
    if not leave_out(model, data):
        say(cfg, f"{name}: computed in transformers' own way, which is slower")
        model, _ = load(model_name, training.names, cfg.device)
    used_rows, restore = compact_embeddings(model, torch.cat([d.inputs["input_ids"] for d in (data, *dev)]))
    state = newest_checkpoint(cfg, name) or {
        "count": collections.Counter(), "dev": [], "best": None,  # NaN: not visited yet
        "dynamics": torch.full((cfg.epochs if everything else 0, n, model.num_labels), math.nan)}
    with refusing(f"{name}: out of memory", "start anew with --grad-accum 2 or more", torch.OutOfMemoryError):
        learn(name, model, data, dev, rows, steps, lr, cfg, state)
    count, best = state["count"], state["best"] or model.state_dict()
    require(all(w.isfinite().all() for w in best.values()), f"{name}: diverged; lower its learning rate")
    model.load_state_dict(best)
    restore()
    per_token = 6 * backbone_size(model)  # a multiplication and an addition, forward once and backward twice
    run["phases"][name] = {
        "model": model_name, "lr": lr, "budget": steps, **count, "used_rows": used_rows, "dev": state["dev"],
        "examples_per_second": count["examples"] / count["seconds"], "flops": per_token * count["tokens"],
        "erm_flops": per_token * data.lengths.sum().item() * cfg.epochs}  # what ERM costs with this model
    write_json(Path(cfg.out, "run.json"), run)

    def save(partial):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if everything:
            np.savez(partial / "dynamics.npz", logits=state["dynamics"], labels=training.labels,
                     fingerprint=run["fingerprints"][0], flops=run["phases"][name]["flops"])
    write(folder, save)
    say(cfg, f"{name}: {count['steps']} steps, {count['examples']:,} examples, {count['seconds']:.0f} s")
    return state["dynamics"]


def load_dynamics(folder, expected):
    """(dynamics, labels, flops) of a reference saved in `folder`; refused if they are of other rows."""
    with (refusing(f"{folder}: cannot be read", "name the ref of a run"),
          np.load(Path(folder, "dynamics.npz"), allow_pickle=False) as saved):
        logits, labels = (torch.from_numpy(saved[name]) for name in ("logits", "labels"))
        flops, same = int(saved["flops"]), str(saved["fingerprint"]) == expected
    require(same, f"{folder}: belongs to another training set; give the rows it was logged on")
    return logits, labels, flops


def main(cfg):
    """Train all that the settings ask for. Returns them with the run's folder, budget and learning rate."""
    training, dev = load_task(cfg)
    n, dynamics, flops = len(training.labels), {}, {}
    fingerprints = [fingerprint(examples) for examples in (training, *dev)]
    require(round(cfg.fraction * n) >= cfg.batch_size, f"--fraction {cfg.fraction}: keeps fewer than a batch")
    if cfg.dynamics:
        dynamics["ref"], _, flops["ref"] = load_dynamics(cfg.dynamics, fingerprints[0])
    sizes = [backbone_size(load(name, training.names, cfg.device)[0]) for name in (cfg.ref, cfg.main) if name]
    lr = cfg.lr or (1e-5 if sizes[-1] > 200e6 else 2e-5)  # and better to miss a model now than after days
    free = next(path for i in itertools.count(1) if not (path := Path(f"runs/{cfg.task}-{i}")).exists())
    erm_steps = cfg.epochs * math.ceil(n / cfg.batch_size)
    steps = cfg.steps or (erm_steps if dev else max(1, round(erm_steps / 3)))
    cfg = dataclasses.replace(cfg, out=cfg.out or str(free), lr=lr, steps=steps)
    run = {"config": dataclasses.asdict(cfg), "processes": ranks()[1], "fingerprints": fingerprints,
           "versions": {lib.__name__: lib.__version__ for lib in (torch, transformers, datasets, np)},
           "device": torch.cuda.get_device_name(cfg.device) if cfg.device.startswith("cuda") else cfg.device,
           "phases": {}, "cost": {}}
    if cfg.resume:
        run = json.loads(Path(cfg.out, "run.json").read_text())
        require(run.get("fingerprints") == fingerprints, f"--resume {cfg.out}: the data changed; restore it")
        require(run["processes"] == ranks()[1],
                f"--resume {cfg.out}: the number of processes was {run['processes']}; start as many")
    elif ranks()[0] == 0:
        with refusing(f"--out {cfg.out}: cannot be made", "name another folder, or --resume this one"):
            Path(cfg.out).mkdir(parents=True)
    write_json(Path(cfg.out, "run.json"), run)
    say(cfg, f"{cfg.out}: {n:,} training rows, {training.dropped:,} more dropped as unlabelled")
    for number in SIGNALS:
        signal.signal(number, functools.partial(leave, cfg))

    method = "ftft" if cfg.select == "ambiguous" else cfg.select
    methods = list(dict.fromkeys([method, *["erm"] * ("dm" in cfg.baselines), *cfg.baselines]))
    # Whose dynamics choose a method's rows; in dataset cartography (dm) those of ERM, the main model itself.
    source = {"ftft": "ref", "hard": "ref", "easy": "ref", "dm": "erm"}
    if "ref" in map(source.get, methods) and not cfg.dynamics:
        methods = ["ref", *methods]
    for name in methods:
        if name in ("ref", "erm"):
            # 1. Fine-tune on everything, logging the training dynamics: the reference and, to compare, ERM.
            rows = torch.arange(n)
        else:
            # 2. and 3. Draw the data map and keep the rows that it favours.
            how = {"ftft": "ambiguous", "dm": "ambiguous"}.get(name, name)
            logged = dynamics.get(source.get(name))
            rows, threshold = select(how, cfg.fraction, cfg.seed, training.labels, logged)
            if name == method:
                write_json(Path(cfg.out, "selected.json"), {
                    "rows": rows.tolist(), "select": how, "fraction": cfg.fraction, "threshold": threshold})
        # 4. Fine-tune the main model on those rows only.
        dynamics[name] = fine_tune(name, rows, training, dev, cfg, run)
        flops[name] = run["phases"][name]["flops"]
        if name != "ref":
            spent = flops.get(source.get(name), 0) + flops[name]
            run["cost"][name] = spent / run["phases"][name]["erm_flops"]
            write_json(Path(cfg.out, "run.json"), run)
    if ranks()[0] == 0:
        shutil.rmtree(Path(cfg.out, "checkpoint"), ignore_errors=True)
    return cfg


if __name__ == "__main__":
    import eval  # not Python's eval but eval.py: measuring is a program of its own
    wanted = settings()
    if dist.is_torchelastic_launched():  # torchrun started several processes
        if wanted.device != "cpu":
            with refusing("torchrun --nproc-per-node", "start one process a GPU"):
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo" if wanted.device == "cpu" else "cpu:gloo,cuda:nccl")
    eval.read_tests(wanted)  # first, so that a bad test file is not found out after days of training
    out, rank = main(wanted).out, ranks()[0]
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        eval.main([out])
