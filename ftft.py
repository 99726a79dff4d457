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

An example has one name for life, its row in the training list: `dynamics[:, row]`, `variability[row]` and the
numbers in selected.json speak of the same example, whichever model and tokenizer is at work.
"""
import argparse
import collections
import csv
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy
from tqdm import tqdm

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
    task: str = option(None, "nli (MultiNLI to HANS, WANLI and ANLI), hsd (CAD to DynaHate) or built-in")
    data: str = option(None, "folder with the task's files as their authors release them, instead of the Hub")
    train: str = option(None, "training file of your own: .jsonl, .csv or .tsv")
    dev: tuple = option((), "files to choose the best weights by, and to stop early")
    test: tuple = option((), "files to report on, each as id=FILE, ood=FILE or adversarial=FILE")
    limit: int = option(None, "take the first N training rows only")
    out: str = option(None, "folder for the run, a new one (default: runs/TASK-1, -2, ..)")
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
    device: str = option("auto", "cuda, cpu, ..; auto takes a GPU if there is one")
    amp: str = option("auto", "mixed precision; auto: bf16 where the GPU has it, else fp16; off on a CPU",
                      choices=["auto", "bf16", "fp16", "off"])


MODELS = {**{f"deberta-{s}": f"microsoft/deberta-v3-{s}" for s in ("xsmall", "small", "base", "large")},
          **{f"electra-{s}": f"google/electra-{s}-discriminator" for s in ("small", "base", "large")},
          "bert-tiny": "prajjwal1/bert-tiny",
          "bert-base": "google-bert/bert-base-uncased", "bert-large": "google-bert/bert-large-uncased",
          "roberta-base": "FacebookAI/roberta-base", "roberta-large": "FacebookAI/roberta-large"}
# Two transformers that train from scratch in seconds; that takes higher learning rates than fine-tuning does.
BUILT_IN = dict(task="built-in", ref="built-in-2x64", main="built-in-4x128", baselines=("erm", "random"),
                lr=5e-4, ref_lr=1e-3)


def require(condition, message):
    """Where a user's input falls short: one line on stderr that says what to mend, and exit code 2."""
    if not condition:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        raise SystemExit(2)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def settings(argv=None):
    """The command line as Settings, `auto` settled; what cannot work is refused here."""
    logging.disable(logging.WARNING)  # of the libraries: their new heads and retries ask nothing of a user
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: require(False, message)
    for field in dataclasses.fields(Settings):
        more = {**field.metadata, **(dict(nargs="+") if field.type is tuple else dict(type=field.type))}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **more)
    cfg = parser.parse_args(argv)
    named = cfg.ref or cfg.main or cfg.dynamics or cfg.data or cfg.train or cfg.dev or cfg.test
    if cfg.task == "built-in" or not (named or cfg.task):
        parser.set_defaults(**BUILT_IN)
        cfg = parser.parse_args(argv)
    own = cfg.data or cfg.train or cfg.dev or cfg.test or cfg.limit
    require(cfg.task != "built-in" or not own, "--task built-in has its own data; leave out other data")
    cfg.task = "custom" if cfg.train else cfg.task or "nli"
    uses_ref = cfg.select != "random" or {"hard", "easy"} & {*cfg.baselines}
    require(cfg.train or cfg.task in ("built-in", *TASKS), f"--task {cfg.task}: unknown; see --help")
    require(cfg.data or cfg.task != "hsd", "--task hsd: needs --data DIR, a folder with cad/ and dynahate/")
    require(cfg.main, "--main is missing: name the model to train, such as deberta-large")
    require(cfg.ref or cfg.dynamics or not uses_ref, "--ref is missing: name one, or give --dynamics")
    require(abs(cfg.seed) < 2**32, f"--seed {cfg.seed}: take one below 2^32")
    require(not cfg.out or not Path(cfg.out).exists(), f"--out {cfg.out}: exists; name another folder")
    require(0 < cfg.fraction <= 1, f"--fraction {cfg.fraction}: take a share such as 0.33")
    for name, value in vars(cfg).items():
        if isinstance(value, (int, float)) and name != "seed":
            require(0 < value < math.inf, f"--{name.replace('_', '-')} {value}: must be above 0")
    swings = "dm" in cfg.baselines or cfg.select == "ambiguous" and not cfg.dynamics
    require(cfg.epochs > 1 or not swings, f"--epochs {cfg.epochs}: p(gold) swings over 2 or more")
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=cfg.device).item()
    except (RuntimeError, AssertionError) as error:  # no such device, or not in this build of torch
        require(False, f"--device {cfg.device}: cannot be used ({first_line(error)}); leave it out")
    if cfg.amp == "auto" and cfg.device.startswith("cuda"):
        cfg.amp = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return Settings(**{**vars(cfg), "amp": cfg.amp.replace("auto", "off")})


# ---------------------------------------------------------------- data

# The paper's tasks: training and dev sets on the Hub, and their authors' own files under --data; eval.py has
# the test sets. As in the paper, weights are chosen on out-of-distribution dev data, which is not trained on.
TASKS = {
    "nli": {"train": [("nyu-mll/multi_nli:train", "multinli_1.0/multinli_1.0_train.jsonl")],
            "dev": [(f"facebook/anli:dev_r{r}", f"anli_v1.0/R{r}/dev.jsonl") for r in (1, 2, 3)]},
    "hsd": {"train": [(None, "cad/cad_uid.train")],
            "dev": [(None, f"dynahate/r{r}_{form}.dev")
                    for r in (2, 3, 4) for form in ("original", "perturbation")]}}
TEXT_COLUMNS = [("premise", "hypothesis"), ("sentence1", "sentence2"), ("context", "hypothesis"),
                ("text1", "text2"), ("text",), ("sentence",)]
GOLD_COLUMNS = ["label", "gold_label", "gold", "labels"]
SHORT_LABELS = {"e": "entailment", "n": "neutral", "c": "contradiction"}


@dataclasses.dataclass
class Examples:
    texts: list           # n tuples: (premise, hypothesis) or (text,)
    labels: torch.Tensor  # (n,) numbers into names
    names: list           # label names
    dropped: int = 0      # rows left out because they have no gold label: they are labelled - or -1


def records(source):
    """Yield (line number, {column: value}) of a file, or of a data set on the Hub, as owner/name:split."""
    suffix, number, on_hub = Path(source).suffix, 0, ":" in source and not Path(source).exists()
    kinds = (".jsonl", ".csv", ".tsv", ".train", ".dev", ".test")
    require(on_hub or suffix in kinds, f"{source}: is of no kind that is read; give .jsonl, .csv or .tsv")
    try:
        if on_hub:
            path, split = source.split(":")
            table = datasets.load_dataset(path, split=split)
            names = {name: kind.names for name, kind in table.features.items() if hasattr(kind, "names")}
            for number, row in enumerate(table, 1):  # class numbers become names: every set has its own order
                yield number, row | {k: v[row[k]] for k, v in names.items() if row[k] not in (None, -1)}
            return
        with open(source, encoding="utf-8-sig", newline="") as file:
            if suffix == ".jsonl":
                rows = ((number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip())
            else:  # CAD and DynaHate (.train, .dev, .test) are released without a header
                csv.field_size_limit(2**31 - 1)  # a text may be long
                header = None if suffix in (".csv", ".tsv") else ["labels", "text", "uid"]
                table = csv.DictReader(file, header, delimiter="," if suffix == ".csv" else "\t", strict=True)
                rows = ((table.line_num, row) for row in table)
            for number, row in rows:
                yield number, row
    except Exception as error:  # no network, no such file, not JSON, a quote never closed, ..
        after = f" after line {number}" if number else ""
        remedy = "give a folder by --data, or run python ftft.py alone" if on_hub else "mend it or the path"
        require(False, f"{source}: cannot be read{after} ({first_line(error)}); {remedy}")


def read(source, like=None, limit=None):
    """Read one set as Examples: in the form and with the classes of the training set, where `like` gives it.

    A test set may be labelled X / non-X (HANS: entailment / non-entailment): non-X then takes the next
    number, and eval.py merges predictions to match.
    """
    texts, golds, dropped, columns = [], [], 0, None
    for number, row in records(source):
        where = f"{source}, line {number}"
        require(isinstance(row, dict), f'{where}: is no object like {{"text": "..", "label": ".."}}; mend it')
        if columns is None:
            columns = next((names for names in TEXT_COLUMNS if {*names} <= {*row}), ())
            gold = next((name for name in GOLD_COLUMNS if name in row), None)
            require(columns, f"{source}: has no text column; name it text, or a pair premise and hypothesis")
            require(gold, f"{source}: has no label column; name it {' or '.join(GOLD_COLUMNS)}")
            require(not like or len(columns) == len(like.texts[0]), f"{source}: mixes pairs and single texts")
        text, label = tuple(row.get(name) for name in columns), row.get(gold)
        label = str(label).strip() if isinstance(label, (str, int)) else ""
        require(all(isinstance(part, str) for part in text), f"{where}: {' and '.join(columns)} must be text")
        require(label, f"{where}: {gold} must be text or an integer, - if there is none")
        if label in ("-", "-1"):
            dropped += 1
            continue
        if like and label not in like.names:
            label = SHORT_LABELS.get(label, label)
        known = not like or label in like.names or label.removeprefix("non-") in like.names
        require(known, f"{where}: the training set has no label {label}; mend or remove the row")
        texts.append(text)
        golds.append(label)
        if len(golds) == limit:
            break
    require(golds, f"{source}: has no labelled row; give a file with at least one")
    if not like and {*golds} <= {*SHORT_LABELS}:
        golds = [SHORT_LABELS[label] for label in golds]
    found = {*golds}  # integers are numbered by size; of X / non-X, non-X comes after the classes
    names = like.names if like else sorted(found, key=lambda name: (len(name) * name.isdecimal(), name))
    merged = sorted(found - {*names})
    pair = {merged[0], merged[0].removeprefix("non-")} if merged else found
    require(found <= pair, f"{source}: labels must be {' and '.join(sorted(pair))} only")
    number = {name: i for i, name in enumerate([*names, *merged])}
    return Examples(texts, torch.tensor([number[label] for label in golds]), [*number], dropped)


def load_task(cfg):
    """(training Examples, [dev Examples, ..]), read and checked."""
    if cfg.task == "built-in":
        return built_in()[0]["train"], []
    table = {kind: [str(Path(cfg.data) / file) if cfg.data else hub for hub, file in places]
             for kind, places in TASKS.get(cfg.task, {}).items()}
    source = cfg.train or table["train"][0]
    training = read(source, limit=cfg.limit)
    require(len(training.names) > 1, f"{source}: has one class only; give rows of two or more")
    dev = [read(path, training) for path in cfg.dev or table.get("dev", [])]
    require(all(part.names == training.names for part in dev), "--dev: needs the training set's own labels")
    return training, dev


def fingerprint(examples):
    """A hash that two training lists share only if they hold the same rows in the same order."""
    digest = hashlib.sha256(repr(examples.names).encode())
    for row in zip(examples.texts, examples.labels.tolist()):
        digest.update(repr(row).encode())
    return digest.hexdigest()


def built_in():
    """A task of which everything is known: which place was visited, told from eight things seen there?

    Four of them belong to places, each in 8 of 10 cases to the one visited, else to another; four belong to
    none. So no single word decides. Beside this rule stands a *shortcut*: the day, named first, agrees with
    the place in 90% of the training and ID texts, is random in the OOD test and always wrong in the
    adversarial one. 3% of the training labels are wrong. A text reads "monday riverbell moonbird ..", its
    label coast. Returns the sets {name: Examples}, and which training rows hold what is planted.
    """
    rng = np.random.default_rng(0)  # fixed: --seed varies the training, never the data
    days, places = np.array(["monday", "tuesday", "wednesday"]), ["coast", "forest", "village"]
    first = "sun moon star rain snow wind sand sea river lake hill wood stone iron gold fire ice fog dew day"
    last = ("light bird fish flower house ship path gate tower bell horse fox bear tree root leaf berry well "
            "bridge wheel rope drum knife cup song ring stick boat wall market")
    things = np.array([a + b for a in first.split() for b in last.split()])  # 600: 150 a place, 150 of none

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
        return Examples(texts, labels, places), planted

    training, planted = draw(8000, 0.9, wrong=0.03)
    tests = {"id": draw(2000, 0.9)[0], "ood": draw(2000, 1 / 3)[0], "adversarial": draw(2000, 0.0)[0]}
    return {"train": training, **tests}, planted


# ---------------------------------------------------------------- models and batches


def load(name, classes):
    """The pretrained model `name` with a classification head for `classes`, and its tokenizer. The head is
    new, unless the checkpoint has one for as many classes.

    Weights are float32 whatever the checkpoint holds: DeBERTa-v3's are fp16, whose gradients GradScaler
    refuses, and which bf16 autocast would go on training as fp16.
    """
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    if name in (BUILT_IN["ref"], BUILT_IN["main"]):
        layers, width = map(int, name.removeprefix("built-in-").split("x"))
        words = sorted({word for (text,) in built_in()[0]["train"].texts for word in text.split()})
        words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(
            vocab_size=len(words), num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width,
            num_attention_heads=width // 32, max_position_embeddings=64, **labels))
        return model, transformers.BertTokenizer(words, model_max_length=64)  # whole words: word-level
    path = MODELS.get(name, name)
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, ignore_mismatched_sizes=True, **labels)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # no config.json, an unknown architecture, a broken file, no network, ..
        require(False, f"cannot load the model {name} ({first_line(error)}); give a short name, a Hub "
                       "id or a folder with config.json, weights and tokenizer, or run python ftft.py alone")
    require(tokenizer.pad_token, f"the model {name} has no padding token; take an encoder such as bert-tiny")
    return model, tokenizer


def backbone_size(model):
    """Parameters that every token is multiplied with: all but the embedding tables."""
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    return sum(p.numel() for p in model.parameters()) - tables


@dataclasses.dataclass
class Encoded:
    """Tokenized examples, end to end in one flat array for each model input; place 0 holds the padding."""
    inputs: dict           # input_ids, and token_type_ids if any: (1 + tokens,) int32, on the device
    starts: torch.Tensor   # (n,) where each example begins
    lengths: torch.Tensor  # (n,) in tokens
    labels: torch.Tensor   # (n,) on the device


def encode(tokenizer, examples, cfg):
    pads = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    flat = {name: [np.array([pad])] for name, pad in pads.items() if name in tokenizer.model_input_names}
    lengths, limit = [], min(cfg.max_length, tokenizer.model_max_length)
    for start in range(0, len(examples.texts), 10_000):  # in chunks: tokens in Python lists take much memory
        columns = map(list, zip(*examples.texts[start:start + 10_000]))
        tokens = tokenizer(*columns, truncation=True, max_length=limit)
        lengths += map(len, tokens["input_ids"])
        for name in flat:
            flat[name].append(np.fromiter(itertools.chain.from_iterable(tokens[name]), np.int32))
    lengths = torch.tensor(lengths)
    inputs = {name: torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(cfg.device)
              for name, parts in flat.items()}
    return Encoded(inputs, 1 + lengths.cumsum(0) - lengths, lengths, examples.labels.to(cfg.device))


def collate(data, rows):
    """Model inputs for these rows, padded to the longest of them, each (rows, longest)."""
    place = torch.arange(data.lengths[rows].max())
    mask = place < data.lengths[rows, None]
    place = ((data.starts[rows, None] + place) * mask).to(data.labels.device)  # 0, padding, past a text's end
    return {**{name: flat[place].long() for name, flat in data.inputs.items()},
            "attention_mask": mask.long().to(place.device)}


def batches(rows, size, seed, epoch):
    """The rows in this epoch's order, cut into batches; the last may be smaller, so that no row is lost."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return rows[torch.randperm(len(rows), generator=generator)].split(size)


# ---------------------------------------------------------------- training


def autocast(cfg):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.amp)
    return torch.autocast(torch.device(cfg.device).type, dtype, enabled=dtype is not None)


def train(model, data, rows, steps, lr, cfg, dynamics=None):
    """Fine-tune `model` in place on these rows. A generator: after each step it yields (rows, padded tokens,
    loss), so that the caller can count, evaluate and stop.

    `dynamics` (epochs, n, classes), where given, takes the logits that the loop has anyway: in training mode
    (dropout on) and before the update, as in dataset cartography and the authors' code.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-6, weight_decay=0.0)
    warmup = max(1, round(0.1 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / warmup, (steps - step) / max(1, steps - warmup)))
    scaler = torch.amp.GradScaler(torch.device(cfg.device).type, enabled=cfg.amp == "fp16")
    order = ((epoch, batch) for epoch in itertools.count()
             for batch in batches(rows, cfg.batch_size, cfg.seed, epoch))
    model.train()
    for epoch, batch in itertools.islice(order, steps):
        padded, loss = 0, 0.0
        for part in batch.split(math.ceil(cfg.batch_size / cfg.grad_accum)):
            inputs = collate(data, part)
            with autocast(cfg):
                logits = model(**inputs).logits.float()                         # (rows, classes)
            # Summed, then divided by the whole step's rows: each weighs the same, however the batch is cut.
            part_loss = cross_entropy(logits, data.labels[part], reduction="sum") / len(batch)
            scaler.scale(part_loss).backward()
            if dynamics is not None:
                dynamics[epoch, part] = logits.detach()
            padded, loss = padded + inputs["input_ids"].numel(), loss + part_loss.detach()
        scaler.unscale_(optimizer)  # so that clipping sees the true gradients
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # a smaller scale means that fp16 overflowed and no step was taken
            schedule.step()
        optimizer.zero_grad()
        yield batch, padded, loss


@torch.no_grad()
def predict(model, data, cfg):
    """Logits (n, classes) in evaluation mode, float32, on the CPU; leaves the model in the mode it was in."""
    training, logits = model.training, torch.empty(len(data.lengths), model.config.num_labels)
    model.eval()
    for rows in data.lengths.argsort(descending=True, stable=True).split(2 * cfg.batch_size):  # less padding
        with autocast(cfg):
            logits[rows] = model(**collate(data, rows)).logits.float().cpu()
    model.train(training)
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
    assert not dynamics.isnan().any(), "an example was not visited in every epoch"
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


# ---------------------------------------------------------------- the run


def write_json(path, value):
    """Write under another name, then rename: whoever looks at `path`, whenever, finds a whole file."""
    Path(f"{path}.partial").write_text(json.dumps(value, indent=1))
    os.replace(f"{path}.partial", path)


def say(cfg, line):
    print(line, flush=True)
    with open(Path(cfg.out) / "log.txt", "a") as log:
        print(line, file=log)


def fine_tune(name, model_name, rows, steps, lr, training, dev, cfg, run, patience=0, log=False):
    """One phase: load a model, train it on these rows, keep the weights that did best on the dev sets, save
    it under `name`, enter it in run.json. Returns its training dynamics (epochs, n, classes), if logged."""
    torch.manual_seed(cfg.seed)  # in every phase, so that none depends on what was trained before it
    model, tokenizer = load(model_name, training.names)
    model.to(cfg.device)
    data, *dev = [encode(tokenizer, examples, cfg) for examples in (training, *dev)]
    points = {math.ceil(steps * i / 12) for i in range(1, 13)} if dev else set()
    metric = "macro_f1" if cfg.task == "hsd" else "accuracy"
    shape = (cfg.epochs, len(data.lengths), len(training.names))
    dynamics = torch.full(shape, math.nan, device=cfg.device) if log else None  # NaN: not visited yet
    losses, scores, best = torch.zeros(steps, device=cfg.device), [], None
    count, seconds, began = collections.Counter(), 0.0, time.perf_counter()
    bar = tqdm(total=steps, desc=name, unit="step", disable=None, leave=False)  # None: on a terminal only
    for step, (batch, padded, loss) in enumerate(train(model, data, rows, steps, lr, cfg, dynamics), 1):
        count.update(steps=1, examples=len(batch), padded_tokens=padded)
        count["tokens"] += data.lengths[batch].sum().item()
        losses[step - 1] = loss
        bar.update()
        if step % 50 and step != steps and step not in points:
            continue  # only now and then does the host wait for the device, to look at its numbers
        finite = losses[:step].isfinite().cumprod(0).sum().item()  # steps before the first that is not
        require(finite == step, f"{name}: loss not finite at step {finite + 1}; lower its learning rate")
        seconds += time.perf_counter() - began
        mean = losses[:step][-50:].mean()
        bar.set_postfix_str(f"loss {mean:.3f}, {count['examples'] / seconds:.0f} examples/s")
        if step in points:
            scores.append(np.mean([metrics(predict(model, part, cfg).argmax(1), part.labels.cpu())[metric]
                                   for part in dev]))
            since_best = len(scores) - 1 - int(np.argmax(scores))
            if since_best == 0:
                best = {key: value.cpu().clone() for key, value in model.state_dict().items()}
            if since_best == patience > 0:
                break
        began = time.perf_counter()  # evaluation is not counted
    bar.close()
    model.load_state_dict(best or model.state_dict())
    per_token = 6 * backbone_size(model)  # a multiplication and an addition, forward once and backward twice
    flops, tokens = per_token * count["tokens"], data.lengths.sum().item()
    run["phases"][name] = {
        "model": model_name, "lr": lr, "budget": steps, **count, "flops": flops, "seconds": seconds,
        "examples_per_second": count["examples"] / seconds, "dev": [*map(list, zip(sorted(points), scores))],
        "erm_flops": per_token * tokens * cfg.epochs}  # what ERM would cost with this model
    dynamics = dynamics.cpu() if log else None
    save(Path(cfg.out) / name, model, tokenizer, training, dynamics, flops)
    write_json(Path(cfg.out) / "run.json", run)
    say(cfg, f"{name}: {step} steps, {count['examples']:,} examples, {seconds:.0f} s")
    return dynamics


def save(folder, model, tokenizer, training, dynamics, flops):
    """What from_pretrained and pipeline load and, if logged, the dynamics; renamed when whole."""
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if dynamics is not None:
        np.savez(partial / "dynamics.npz", logits=dynamics.numpy(), labels=training.labels.numpy(),
                 fingerprint=fingerprint(training), flops=flops)
    partial.rename(folder)


def load_dynamics(folder, training):
    """(dynamics, flops) of a reference saved in `folder`; refused unless they are of these very rows."""
    try:
        with np.load(Path(folder) / "dynamics.npz", allow_pickle=False) as saved:
            logits, flops = torch.from_numpy(saved["logits"]), int(saved["flops"])
            same = str(saved["fingerprint"]) == fingerprint(training)
    except Exception as error:  # missing, cut short or something else; nothing in it is ever executed
        require(False, f"--dynamics {folder}: cannot be read ({first_line(error)}); name the ref of a run")
    require(same, f"--dynamics {folder}: belongs to another training set; give the rows it was logged on")
    require(len(logits) > 1, f"--dynamics {folder}: holds one epoch; selection takes 2 or more")
    return logits, flops


def main(cfg):
    """Train all that the settings ask for. Returns them with the run's folder and learning rate filled in."""
    training, dev = load_task(cfg)
    n = len(training.labels)
    kept = round(cfg.fraction * n)
    require(kept >= cfg.batch_size, f"--fraction {cfg.fraction}: keeps {kept} rows, fewer than a batch")
    ref_dynamics, ref_flops = load_dynamics(cfg.dynamics, training) if cfg.dynamics else (None, 0)
    for name in filter(None, (cfg.ref, cfg.main)):  # better found missing now than after days of training
        model, _ = load(name, training.names)
    lr = cfg.lr or (1e-5 if backbone_size(model) > 200e6 else 2e-5)  # of the main model, loaded last
    free = next(path for i in itertools.count(1) if not (path := Path(f"runs/{cfg.task}-{i}")).exists())
    cfg = dataclasses.replace(cfg, out=cfg.out or str(free), lr=lr)
    try:
        Path(cfg.out).mkdir(parents=True)
    except OSError as error:
        require(False, f"--out {cfg.out}: cannot be made ({error.strerror}); name another folder")
    run = {"config": dataclasses.asdict(cfg), "phases": {}, "cost": {},
           "versions": {lib.__name__: lib.__version__ for lib in (torch, transformers, datasets, np)},
           "device": torch.cuda.get_device_name() if cfg.device.startswith("cuda") else cfg.device}
    write_json(Path(cfg.out) / "run.json", run)
    say(cfg, f"{cfg.out}: {n:,} training rows, {training.dropped:,} more dropped as unlabelled")

    method = "ftft" if cfg.select == "ambiguous" else cfg.select
    methods = list(dict.fromkeys([method, *["erm"] * ("dm" in cfg.baselines), *cfg.baselines]))
    all_rows, erm_steps = torch.arange(n), cfg.epochs * math.ceil(n / cfg.batch_size)
    budget = cfg.steps or (erm_steps if dev else max(1, round(erm_steps / 3)))
    common = training, dev, cfg, run
    # 1. Fine-tune the reference on everything, logging its training dynamics.
    if ref_dynamics is None and {"ftft", "hard", "easy"} & {*methods}:
        ref_dynamics = fine_tune("ref", cfg.ref, all_rows, erm_steps, cfg.ref_lr, *common, log=True)
        ref_flops = run["phases"]["ref"]["flops"]
    for name in methods:
        if name == "erm":  # plain fine-tuning of the main model, which makes it its own reference for dm
            dm_dynamics = fine_tune("erm", cfg.main, all_rows, erm_steps, lr, *common, log=True)
        else:
            # 2. and 3. Draw the data map and keep the rows that it favours.
            how = {"ftft": "ambiguous", "dm": "ambiguous"}.get(name, name)
            dynamics = dm_dynamics if name == "dm" else ref_dynamics
            rows, threshold = select(how, cfg.fraction, cfg.seed, training.labels, dynamics)
            if name == method:
                write_json(Path(cfg.out) / "selected.json", {
                    "rows": rows.tolist(), "select": how, "fraction": cfg.fraction, "threshold": threshold})
            # 4. Fine-tune the main model on those rows only.
            fine_tune(name, cfg.main, rows, budget, lr, *common, patience=cfg.patience)
        phase = run["phases"][name]
        reference = {"erm": 0, "random": 0, "dm": phase["erm_flops"]}.get(name, ref_flops)
        run["cost"][name] = (reference + phase["flops"]) / phase["erm_flops"]
        write_json(Path(cfg.out) / "run.json", run)
    return cfg


if __name__ == "__main__":
    import eval  # not Python's eval but eval.py: measuring is a program of its own
    wanted = settings()
    eval.read_tests(wanted)  # first, so that a bad test file is not found out after days of training
    eval.main([main(wanted).out])
