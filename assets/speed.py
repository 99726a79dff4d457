"""Measure the speed of ftft.py, of a textbook loop and of transformers.Trainer: examples/s, memory.

  pip install accelerate                                    # Trainer needs it
  python assets/speed.py prepare work PAIRS.jsonl google-bert/bert-base-uncased 128100
  for program in textbook trainer grouped ours; do python assets/speed.py $program work; done

One epoch on 1,536 pairs as long as MultiNLI's, made of shorter ones (each line of PAIRS.jsonl has a
premise, a hypothesis and a label), batch 32, float32, with an untrained DeBERTa-v3 of 6 layers and
width 384 and this vocabulary. Loading and tokenizing are left out. Each program is a process of its
own; run them in turns, in several rounds.
"""
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding


def prepare(folder, pairs, tokenizer, vocabulary):
    """1,536 pairs as long as MultiNLI's, made of shorter ones, and a small untrained DeBERTa-v3."""
    torch.manual_seed(0)
    transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(
        vocab_size=int(vocabulary), hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
        intermediate_size=1536, type_vocab_size=0, relative_attention=True, position_buckets=256,
        max_relative_positions=-1, norm_rel_ebd="layer_norm", share_att_key=True, num_labels=3,
        pos_att_type=["p2c", "c2p"], position_biased_input=False)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    rows, rng = [json.loads(line) for line in open(pairs)], np.random.default_rng(0)
    with open(f"{folder}/train.jsonl", "w") as file:
        for words in rng.lognormal(3.15, 0.6, 1536):
            row = dict(rows[rng.integers(len(rows))])
            while len((row["premise"] + row["hypothesis"]).split()) < words - 6:
                row["premise"] += " " + rows[rng.integers(len(rows))]["premise"]
            file.write(json.dumps(row) + "\n")


def load(folder):
    rows = [json.loads(line) for line in open(f"{folder}/train.jsonl")]
    names = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [[row[name] for row in rows] for name in ("premise", "hypothesis")]
    tokens = tokenizer(*texts, truncation=True, max_length=300, return_token_type_ids=False)
    data = [{"input_ids": ids, "attention_mask": mask, "labels": names.index(row["label"])}
            for ids, mask, row in zip(tokens["input_ids"], tokens["attention_mask"], rows)]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model, data, DataCollatorWithPadding(tokenizer)


def textbook(folder):
    model, data, collate = load(folder)
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, eps=1e-6, weight_decay=0.0)
    model.train()
    dynamics, began = [], time.perf_counter()
    for batch in loader:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        torch.nn.functional.cross_entropy(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dynamics.append(logits.detach().float().cpu())
    return len(data) / (time.perf_counter() - began)


def trainer(folder, sampling="random"):  # needs accelerate
    model, data, collate = load(folder)
    args = transformers.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=32, num_train_epochs=1, learning_rate=2e-5,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**6,
        train_sampling_strategy=sampling)
    runner = transformers.Trainer(model, args, train_dataset=data, data_collator=collate)
    began = time.perf_counter()
    runner.train()
    return len(data) / (time.perf_counter() - began)


def grouped(folder):
    return trainer(folder, "group_by_length")


def ours(folder):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import ftft
    out = tempfile.mkdtemp() + "/run"
    cfg = ftft.settings(["--train", f"{folder}/train.jsonl", "--main", folder, "--out", out,
                         "--methods", "erm", "--epochs", "1"])
    ftft.main(cfg, ftft.read(cfg.train), [])
    return json.load(open(f"{out}/run.json"))["phases"]["erm"]["examples_per_second"]


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    result = globals()[name](*arguments)
    if result:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux
        print(f"{name} {arguments[0]}: {result:.2f} examples/s, at most {kib / 2**20:.1f} GiB")
