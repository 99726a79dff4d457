"""What ftft.py and eval.py promise, checked by independent routes: python -m pytest (CPU, offline)."""
import argparse
import copy
import csv
import json
import math
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
import torch.nn.functional as F
import transformers

import eval as measuring
import ftft

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEBERTA = dict(relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
               pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0)
WORDS = "red green blue cat dog bird runs sleeps sings here there now never".split()
NLI = ["contradiction", "entailment", "neutral"]  # label i goes with the word WORDS[i]


def rows(n, seed=0):
    """n premise-hypothesis rows whose label follows from the first word of the hypothesis."""
    rng = np.random.default_rng(seed)
    some = lambda low, high: " ".join(rng.choice(WORDS[3:-1], rng.integers(low, high)))
    return [{"premise": some(2, 9), "hypothesis": f"{WORDS[i]} {some(1, 5)}", "label": NLI[i]}
            for i in rng.integers(3, size=n)]


def write(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(item) + "\n" for item in items)
        else:
            table = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            table.writerows([items[0]] * (path.suffix in (".csv", ".tsv")))  # the header: its keys
            table.writerows(item.values() for item in items)
    return str(path)


def encoder(kind, dropout=0.0, **more):
    """A random classifier of three classes."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3,
                 intermediate_size=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    sizes |= DEBERTA if kind == "deberta-v2" else {"max_position_embeddings": 514}  # RoBERTa: 512 and 2
    config = transformers.AutoConfig.for_model(kind, **sizes | more)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def tiny(dropout=0.0, layers=1):
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    model = encoder("bert", dropout, num_hidden_layers=layers, vocab_size=len(words))
    return model, transformers.BertTokenizer(words, model_max_length=32)


def padder(pad=0):
    """A tokenizer of 48 words whose padding has this number."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(43))]
    words.insert(pad, "[PAD]")
    return transformers.BertTokenizer({word: i for i, word in enumerate(words)})


def token_data(lengths, most, pad):
    """Encoded examples of these lengths, random tokens from 5 to most - 1."""
    rng = np.random.default_rng(0)
    tokens = [{"input_ids": rng.integers(5, most, length).astype(np.int32)} for length in lengths]
    labels = torch.arange(len(lengths)) % 3
    return ftft.Encoded(tokens, torch.tensor(lengths), labels, padder(pad))


def merge(label):
    return "entailment" if label == "entailment" else "non-entailment"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a reference and a main model, stored in fp16 without a classification head."""
    paths = []
    for name, layers in (("small", 1), ("large", 2)):
        paths.append(str(tmp_path_factory.mktemp("models") / name))
        model, tokenizer = tiny(0.1, layers)
        model.bert.half().save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
    return paths


@pytest.fixture
def task(tmp_path, models):
    """Arguments of a small run on files of our own, without --out."""
    test = write(tmp_path / "same.jsonl", rows(20, 2))
    hans = write(tmp_path / "hans.csv", [{**row, "label": merge(row["label"])} for row in rows(20, 3)])
    return ["--ref", models[0], "--main", models[1], "--train", write(tmp_path / "train.jsonl", rows(48)),
            "--dev", write(tmp_path / "dev.tsv", rows(20, 1)), "--test", f"id={test}", f"ood={hans}",
            "--batch-size", "8", "--epochs", "3", "--fraction", "0.5", "--lr", "0.01", "--ref-lr", "0.01"]


def settings(*more):
    return ftft.settings(["--ref", "r", "--main", "m", "--batch-size", "8", "--device", "cpu", *more])


def encoded(model, tokenizer, items, cfg):
    texts, labels = [(r["premise"], r["hypothesis"]) for r in items], [NLI.index(r["label"]) for r in items]
    return ftft.encode(model, tokenizer, ftft.Examples(texts, torch.tensor(labels), NLI), cfg)


@pytest.fixture
def fit(tmp_path):
    """Train a model on all of its data as the phase `name`; returns the dynamics."""
    def train(model, data, steps, *more, name="ref"):
        cfg, n = settings("--out", str(tmp_path), *more), len(data.labels)
        dynamics = torch.full((steps, n, 3), -math.inf)
        ftft.train(name, model, data, [], torch.arange(n), steps, 0.01, cfg, dynamics)
        return dynamics
    return train


def order(data, steps, name="ref", seed=0, size=8):
    """[(epoch, rows), ..] as training visits them."""
    rows = torch.arange(len(data.labels))
    found = [(epoch, batch) for epoch in range(steps) for batch in ftft.batches(
        rows, data.lengths, size, ftft.seed_for(seed, name, epoch))]
    return found[:steps]


def tokenize(tokenizer, items, **more):
    """Padded inputs by the tokenizer itself."""
    return tokenizer([r["premise"] for r in items], [r["hypothesis"] for r in items], padding=True,
                     return_tensors="pt", **more)


def main(argv):
    """What `python ftft.py` does with these arguments, up to the scoring."""
    cfg = ftft.settings(argv)
    measuring.read_tests(cfg)
    ftft.main(cfg)
    return cfg


def refused(argv, capfd):
    """The one line that ends these arguments' run."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1, said
    return said


def run_json(path):
    return json.loads((path / "run.json").read_text())


# ---------------------------------------------------------------- the training loop


def textbook(model, data, steps, overflow=None):
    """The same training with the tools of PyTorch and transformers; returns the dynamics."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-6, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    dynamics = torch.full((steps, len(data.labels), 3), -math.inf)
    model.train()
    for step, (epoch, batch) in enumerate(order(data, steps)):
        texts = [data.inputs[row] for row in batch]
        logits = model(**transformers.DataCollatorWithPadding(data.tokenizer)(texts)).logits
        F.cross_entropy(logits, data.labels[batch]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step != overflow:
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        dynamics[epoch, batch] = logits.detach()
    return dynamics


@pytest.mark.parametrize("pieces", ["1", "3"])
def test_training_and_dynamics_equal_a_textbook_loop(pieces, fit):
    (model, tokenizer), (plain, _) = tiny(), tiny()
    for twin in (model, plain):
        twin.classifier.weight.data *= 30  # for gradients that are clipped
    data = encoded(model, tokenizer, rows(20), settings("--max-length", "9"))
    ours, theirs = fit(model, data, 21, "--grad-accum", pieces), textbook(plain, data, 21)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert ours[:7].isfinite().all() and len({*ours[:7, 0, 0].tolist()}) == 7
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_cell_of_the_dynamics_is_written_in_its_epoch_and_the_seed_and_the_phase_decide(fit):
    def train(*more, steps=3, **named):
        model, tokenizer = tiny(0.1)
        return fit(model, encoded(model, tokenizer, rows(20), settings()), steps, *more, **named)
    dynamics = train()
    assert dynamics[0].isfinite().all() and (dynamics[1:] == -math.inf).all()
    assert torch.equal(train(steps=6), train(steps=6))
    assert not torch.equal(train(), train("--seed", "1"))
    assert not torch.equal(train(), train(name="erm")) and torch.equal(train(name="erm"), train(name="erm-es"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_processes_draw_dropout_of_their_own(dropout, fit, monkeypatch):
    def first_logits(rank):
        monkeypatch.setattr(ftft, "ranks", lambda: (rank, 2))
        monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, **_: model)
        model, tokenizer = tiny(dropout)
        return fit(model, encoded(model, tokenizer, rows(1) * 8, settings()), 1)[0, rank::2]
    monkeypatch.setattr(ftft, "batches", lambda rows, *_: [rows])  # in their order
    one, other = first_logits(0), first_logits(1)
    assert one.isfinite().all() and torch.equal(one, other) == (dropout == 0)


def test_an_fp16_step_that_overflows_is_skipped_and_uses_up_its_rate(fit):
    (model, tokenizer), (plain, _), backward = tiny(), tiny(), iter(range(99))
    data = encoded(model, tokenizer, rows(20), settings())
    model.classifier.weight.register_hook(lambda grad: grad * (math.inf if next(backward) == 2 else 1))
    fit(model, data, 9, "--amp", "fp16")
    textbook(plain, data, 9, overflow=2)
    straight, _ = tiny()
    textbook(straight, data, 9)
    ours, skipped, taken = (torch.cat([p.detach().flatten() for p in m.parameters()])
                            for m in (model, plain, straight))
    assert (ours - skipped).norm() < 0.1 * (ours - taken).norm()


def test_bf16_autocast_computes_in_bf16_with_float32_weights(fit):
    model, tokenizer = tiny()
    data, cfg = encoded(model, tokenizer, rows(32), settings()), settings("--amp", "bf16")
    in_bf16, in_float32 = ftft.predict(model, data, cfg), ftft.predict(model, data, settings())
    assert not torch.equal(in_bf16, in_float32)
    torch.testing.assert_close(in_bf16, in_float32, atol=0.1, rtol=0.05)
    trained = fit(model, data, 8, "--amp", "bf16")
    assert torch.equal(trained, trained.bfloat16().float()) and model.dtype == torch.float32


def test_evaluations_within_the_warm_up_do_not_count():
    curve = [[1, 0.9], [2, 0.1], [3, 0.3], [4, 0.2], [5, 0.3], [6, 0.25]]
    assert [ftft.since_best(curve[:n], warmup=1) for n in range(7)] == [-1, -1, 0, 0, 1, 2, 3]


# ---------------------------------------------------------------- what makes it fast


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("kind, heads", [("deberta-v2", 6), ("deberta-v2", 12), ("deberta-v2", 16),
                                         ("bert", 2), ("roberta", 2), ("electra", 2)])
def test_what_is_left_out_changes_neither_logits_nor_gradients(kind, heads, device):
    plain = encoder(kind, hidden_size=64 * heads, num_attention_heads=heads, num_hidden_layers=2)
    for name, weight in plain.named_parameters():
        weight.data *= 6 if "query" in name or "key" in name else 1  # for attention that depends on positions
    fast = copy.deepcopy(plain)
    data = token_data([1, 2, 127, 128, 129, 255, 256, 257, 300], 48, plain.config.pad_token_id)
    ftft.compute_less(fast)
    for batch in ([0], [1, 0], [2, 3], [4, 1], [5, 6], [7, 3], [8, 0, 4]):
        results = []
        for model in (plain.to(device), fast.to(device)):
            logits = model(**ftft.collate(data, batch, device)).logits
            loss = F.cross_entropy(logits, data.labels[batch].to(device))
            results.append([logits, *torch.autograd.grad(loss, model.parameters(), materialize_grads=True)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def shapes(model, data, *parts):
    """The shapes of what these parts of a model take in, over one batch."""
    seen = []
    for part in parts:
        model.get_submodule(part).register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    model(**ftft.collate(data, [0, 1], "cpu"))
    return seen


@pytest.mark.parametrize("kind", ["deberta-v2", "bert", "roberta", "electra", "distilbert"])
def test_less_is_computed(kind):
    model = encoder(kind, num_hidden_layers=2)
    data, layers = token_data([5, 9], 48, model.config.pad_token_id), f"{model.base_model_prefix}.encoder.layer."
    ftft.compute_less(model)
    if kind == "distilbert":  # is not among the tested types, and left as it is
        layers = "distilbert.transformer.layer."
        assert shapes(model, data, layers + "0.ffn", layers + "1.ffn") == [(2, 9, 16)] * 2
        return
    parts = [layers + "0.intermediate.dense", layers + "1.intermediate.dense"]
    assert shapes(model, data, *parts) == [(2, 9, 16), (2, 1, 16)]
    if kind == "deberta-v2":  # 2 * 9 relative positions, not 512; first the tokens themselves
        assert shapes(model, data, layers + "0.attention.self.key_proj")[-2:] == [(2, 9, 16), (1, 18, 16)]


def test_unusual_buckets_of_positions_are_left_alone():
    plain = encoder("deberta-v2", max_relative_positions=100, num_hidden_layers=2)  # below position_buckets
    fast, data = copy.deepcopy(plain), token_data([150, 9], 48, 0)
    ftft.compute_less(fast)
    logits = [model(**ftft.collate(data, [0, 1], "cpu")).logits for model in (plain, fast)]
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["deberta-v2", "bert", "roberta", "electra"])
def test_embeddings_not_in_use_are_left_out_and_put_back(kind, fit):
    plain = encoder(kind)
    before, fast = copy.deepcopy(plain), copy.deepcopy(plain)
    data = token_data([3, 9, 5, 4, 7, 8, 6, 5, 3, 9], 30, plain.config.pad_token_id)
    used = {plain.config.pad_token_id, *np.concatenate([row["input_ids"] for row in data.inputs]).tolist()}
    restore = ftft.compact_embeddings(fast, [data])
    assert len(fast.get_input_embeddings().weight) == len(used) < 30
    with pytest.raises(IndexError):
        fast(torch.tensor([[40]]))
    for model in (plain, fast):
        fit(model, data, 6)
    restore()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], weight, atol=1e-6, rtol=0)
    restored, first = (model.get_input_embeddings().weight for model in (fast, before))
    unseen = torch.tensor([[i for i in range(48) if i not in used]])
    assert torch.equal(restored[unseen], first[unseen]) and not torch.equal(restored, first)
    assert torch.allclose(fast.eval()(unseen).logits, plain.eval()(unseen).logits, atol=1e-5)


def test_a_shared_word_table_is_left_whole():
    model = encoder("bert")
    model.twin = torch.nn.Linear(16, 48, bias=False)
    model.twin.weight = model.get_input_embeddings().weight
    ftft.compact_embeddings(model, [token_data([5], 10, 0)])
    assert len(model.twin.weight) == len(model.get_input_embeddings().weight) == 48


# ---------------------------------------------------------------- data map and selection


def test_the_data_map_equals_numpy_on_hand_written_logits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 50, 3)).astype(np.float32) * 3, rng.integers(3, size=50)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p_gold = np.stack([p[:, i, label] for i, label in enumerate(labels)], axis=1)
    right = logits.argmax(-1) == labels
    stats = ftft.data_map(torch.from_numpy(logits), torch.from_numpy(labels))
    for ours, values in zip(stats, (p_gold.mean(0), p_gold.std(0), right.mean(0)), strict=True):
        np.testing.assert_allclose(ours, values, atol=1e-6)
    logits[1, 4] = -math.inf
    with pytest.raises(AssertionError, match="not visited"):
        ftft.data_map(torch.from_numpy(logits), torch.from_numpy(labels))


def logits_of(p_gold):
    """Two-class logits (epochs, n, 2) whose softmax gives these p(gold) (epochs, n) to class 0."""
    p = torch.tensor(p_gold).T
    return torch.stack([p.log(), (1 - p).log()], dim=-1)


SIX = [[0.9, 0.9, 0.9], [0.1, 0.9, 0.5], [0.1, 0.1, 0.1], [0.1, 0.9, 0.5], [0.4, 0.5, 0.6], [0.1, 0.9, 0.5]]


def rows_for(how, fraction, logits):
    """What `main` keeps for a method."""
    confidence, variability, _ = ftft.data_map(logits, torch.zeros(logits.shape[1], dtype=torch.long))
    return ftft.select({"ambiguous": variability, "easy": confidence, "hard": -confidence}[how], fraction).tolist()


@pytest.mark.parametrize("how, fraction, expected", [
    ("ambiguous", 0.5, [1, 3, 5]), ("ambiguous", 0.33, [1, 3]), ("ambiguous", 4 / 6, [1, 3, 4, 5]),
    ("easy", 1 / 6, [0]), ("easy", 0.5, [0, 1, 3]), ("hard", 1 / 6, [2]), ("hard", 1.0, [0, 1, 2, 3, 4, 5])])
def test_selection_keeps_exactly_k_rows_and_ties_go_to_the_lower(how, fraction, expected):
    assert rows_for(how, fraction, logits_of(SIX)) == expected


def test_selection_takes_swinging_rows_and_neither_steady_kind():
    level = np.repeat([0.95, 0.05, 0.5], 40)[:, None]
    noise = np.random.default_rng(0).uniform(-0.04, 0.04, (120, 5))
    p = level + noise + (level == 0.5) * np.array([-0.4, 0.4, -0.3, 0.3, 0.4])
    for how, group in (("ambiguous", 80), ("hard", 40), ("easy", 0)):
        assert rows_for(how, 1 / 3, logits_of(p.tolist())) == list(range(group, group + 40))


# ---------------------------------------------------------------- data


def test_batches_hold_every_row_once_and_rows_of_like_length_which_the_seed_changes():
    chosen = torch.arange(0, 900, 2)
    lengths = torch.from_numpy(np.random.default_rng(0).lognormal(3.5, 0.5, 900)).long()
    a, again, b = (ftft.batches(chosen, lengths, 8, seed) for seed in (0, 0, 1))
    assert sorted(map(len, a)) == [2] + [8] * 56 and torch.equal(torch.cat(a), torch.cat(again))
    assert torch.cat(a).sort().values.tolist() == chosen.tolist() == torch.cat(b).sort().values.tolist()
    met, again = ({(i, j) for cut in some for i in cut.tolist() for j in cut.tolist()} for some in (a, b))
    assert len(met & again) < len(met) / 2
    longest = [lengths[batch].max().item() for batch in a]
    padded = sum(len(batch) * most for batch, most in zip(a, longest))
    assert 1 - lengths[chosen].sum() / padded < 0.1 and longest != sorted(longest)


def renamed(items, columns, form):
    """The rows under other column names, beside a column of no use, with labels in another form."""
    return [{"uid": "x", **dict(zip(columns, (row["premise"], row["hypothesis"], form(row["label"]))))}
            for row in items]


def test_every_form_of_file_and_label_reads_the_same(tmp_path):
    items = rows(12)
    want = [(row["premise"], row["hypothesis"]) for row in items]
    forms = [("a.jsonl", ("premise", "hypothesis", "label"), str),
             ("b.csv", ("sentence1", "sentence2", "gold_label"), str),
             ("c.tsv", ("context", "hypothesis", "gold"), lambda label: label[0]),
             ("d.csv", ("text1", "text2", "labels"), NLI.index)]
    for name, columns, form in forms:
        read = ftft.read(write(tmp_path / name, renamed(items, columns, form)))
        assert read.texts == want and read.labels.tolist() == [NLI.index(row["label"]) for row in items]
        assert read.names == (["0", "1", "2"] if form == NLI.index else NLI)


def test_unlabelled_rows_are_dropped_and_later_rows_renumbered(tmp_path):
    items = [{"text": str(i), "label": label} for i, label in enumerate(["a", "-", "b", -1, "-1", "a"])]
    read = ftft.read(write(tmp_path / "x.jsonl", items))
    assert (read.texts, read.labels.tolist()) == ([("0",), ("2",), ("5",)], [0, 1, 0])
    for labels, names in (("nyn", ["n", "y"]), ("nn", ["neutral"])):  # spelt out if all are short
        items = [{"text": "a", "label": label} for label in labels]
        assert ftft.read(write(tmp_path / f"{labels}.jsonl", items)).names == names


def test_a_hub_data_set_goes_by_its_label_names(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # where a folder owner/name stands for the Hub's data set of that name
    (tmp_path / "owner" / "name").mkdir(parents=True)
    table = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 2, -1, 1]})
    table = table.cast_column("label", datasets.ClassLabel(names=["neutral", "entailment", "contradiction"]))
    table.to_parquet("owner/name/test.parquet")
    read = ftft.read("owner/name:test")
    assert [read.names[i] for i in read.labels] == ["neutral", "contradiction", "entailment"]
    assert read.texts == [("a",), ("b",), ("d",)]


def test_the_built_in_task_is_what_its_docstring_says():
    sets, planted = ftft.built_in()
    for kind, share in (("train", 0.88), ("id", 0.9), ("ood", 1 / 3), ("adversarial", 0.0)):
        day = [["monday", "tuesday", "wednesday"].index(text.split()[0]) for (text,) in sets[kind].texts]
        assert np.mean(day == sets[kind].labels.numpy()) == pytest.approx(share, abs=0.03 if share else 0)
    assert planted["shortcut-breaking"].mean() == pytest.approx(0.1, abs=0.01)
    assert planted["mislabelled"].mean() == pytest.approx(0.03, abs=0.01)

# ---------------------------------------------------------------- measuring


def test_metrics_equal_a_count_by_hand():
    result = ftft.metrics([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2])
    assert result == pytest.approx({"accuracy": 4 / 6, "macro-f1": (1 / 2 + 2 / 3 + 4 / 5) / 3, "n": 6})


def save_classifier(path, items, names=NLI):
    """A folder with a new model whose answers to these rows vary; how it answers them, by number."""
    model, tokenizer = tiny()
    model.config.id2label = dict(enumerate(names))
    with torch.no_grad():  # a new model gives most rows one class: centre its logits
        model.classifier.bias -= model.eval()(**tokenize(tokenizer, items)).logits.mean(0)
        answers = model(**tokenize(tokenizer, items)).logits.argmax(1).tolist()
    for part in (model, tokenizer):
        part.save_pretrained(path)
    return answers


def test_a_set_labelled_x_and_non_x_merges_the_other_classes(tmp_path):
    items = rows(40, 5)
    path = write(tmp_path / "hans.jsonl", [{**row, "label": merge(row["label"])} for row in items])
    answers = save_classifier(tmp_path / "model", items)
    cfg = settings("--train", write(tmp_path / "train.csv", rows(9)), "--test", f"ood={path}")
    said, true = measuring.score("m", tmp_path / "model", cfg, measuring.read_tests(cfg)[0])["m/ood/hans"]
    chosen, gold = [merge(NLI[i]) for i in answers], [merge(row["label"]) for row in items]
    number = {"entailment": 1, "non-entailment": 4}  # 4: that of entailment plus that of classes
    assert [said.tolist(), true.tolist()] == [[number[name] for name in names] for names in (chosen, gold)]
    right = {name: sum(a == b == name for a, b in zip(chosen, gold)) for name in number}
    f1 = [2 * right[name] / (chosen + gold).count(name) for name in right]
    assert ftft.metrics(said, true) == pytest.approx(
        {"accuracy": sum(right.values()) / 40, "macro-f1": np.mean(f1), "n": 40})


@pytest.mark.parametrize("names", [["ENTAILMENT", "Neutral", "contradiction"], ["c", "e", "n"]])
def test_any_classifier_is_scored_by_the_names_of_its_classes(names, tmp_path, capsys):
    items = rows(40, 5)
    answers = save_classifier(tmp_path / "model", items, names)
    own = [next(label for label in NLI if label[0] == names[i][0].lower()) for i in answers]
    test = write(tmp_path / "same.jsonl", items)
    hans = write(tmp_path / "hans.csv", [{**row, "label": merge(row["label"])} for row in items])
    measuring.main([str(tmp_path / "model"), "--test", f"id={test}", f"ood={hans}", "--json"])
    (scores,) = json.loads(capsys.readouterr().out)["methods"].values()
    for form, score in zip((str, merge), scores.values()):
        right = [form(a) == form(row["label"]) for a, row in zip(own, items)]
        assert score["score"] == pytest.approx(100 * np.mean(right))


def test_what_cannot_be_scored_is_refused_in_a_line(tmp_path, models, capsys):
    save_classifier(tmp_path / "numbered", rows(9), ["LABEL_0", "LABEL_1", "LABEL_2"])
    test = write(tmp_path / "same.jsonl", rows(9))
    for name, named in (("numbered", "label_0, label_1"), ("nothing", "cannot be loaded"), (models[0], "classifier.bias")):
        with pytest.raises(SystemExit) as stopped:
            capsys.readouterr()
            measuring.main([str(tmp_path / name), "--test", f"id={test}"])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and named in said


def answered(n, right, classes=2, seed=0):
    """Answers (2, n) of which a share is right."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(classes, size=n)
    return np.stack([np.where(np.arange(n) < right * n, gold, (gold + 1) % classes), gold])


def test_intervals_are_those_of_the_normal_approximation():
    n, runs = 2000, {}
    for folder, seed in (("a", 0), ("b", 1)):
        one, other = (answered(n, share, seed=seed) for share in (0.8, 0.7))  # 10% of the answers differ
        runs[folder] = {"config": {"metric": "accuracy"}, "cost": {}, "phases": {}}, {
            "org/one/id/x": one, "erm/id/x": other}
    width = lambda p, variance: [p - 196 * (variance / n) ** 0.5, p + 196 * (variance / n) ** 0.5]
    single = measuring.compare({"a": runs["a"]}, "erm")
    both = measuring.compare(runs, "erm")
    for found, expected in ((single["methods"]["org/one"], width(80, 0.8 * 0.2)),
                            (single["differences"]["org/one - erm"], width(10, 0.1 * 0.9)),
                            (both["runs"]["erm, b"], width(70, 0.7 * 0.3)),
                            (both["differences"]["org/one - erm"], width(10, 0.1 * 0.9))):
        assert [found["x"]["low"], found["x"]["high"]] == pytest.approx(expected, abs=0.25)
        assert found["x"]["score"] == pytest.approx(np.mean(expected))


def test_differences_vary_with_the_runs_as_well():
    def difference(*shares):
        about = {"config": {"metric": "accuracy"}, "cost": {}, "phases": {}}
        answers = [{"ftft/id/x": answered(5000, share), "erm/id/x": answered(5000, 0.5)} for share in shares]
        found = measuring.compare({i: (about, given) for i, given in enumerate(answers)}, "erm")
        return found["differences"]["ftft - erm"]["x"]
    steady, wavering = difference(0.6, 0.6, 0.6, 0.6), difference(0.4, 0.5, 0.6, 0.9)
    assert steady["score"] == wavering["score"] == pytest.approx(10) and steady["low"] > 9
    assert wavering["low"] < 0 and wavering["high"] > 20


@pytest.mark.parametrize("metric", ["accuracy", "macro-f1"])
def test_scores_on_resamples_equal_metrics_on_repeated_examples(metric):
    said, true = answered(50, 0.6, classes=3)
    for times, score in list(zip(measuring.resamples(50), measuring.bootstrap(said, true, metric)))[:20]:
        repeated = [np.repeat(part, times.astype(int)) for part in (said, true)]
        assert times.sum() == 50 and score == pytest.approx(100 * ftft.metrics(*repeated)[metric])
    assert (measuring.resamples(50)[0] == 1).all() and measuring.resamples(50)[1:].std() > 0.9


def test_the_table_gives_mean_and_sample_deviation_over_runs():
    phase = {"examples": 10, "seconds": 1.0}
    runs = {str(a): ({"config": {"metric": "accuracy"}, "cost": {"erm": 1.0}, "phases": {"erm": phase}},
                     {"erm/id/x": answered(20, a)}) for a in (0.5, 0.6, 0.8)}
    table = measuring.table(measuring.compare(runs, "erm"))
    assert table[:4] == [["", "ID", "cost", "examples", "seconds"], ["", "x"], ["n", "20"],
                         ["erm", "63.3 ± 15.3", "1.00 ± 0.00", "10 ± 0", "1 ± 0"]]
    assert len(table) == 7 and measuring.lay_out(table, True).splitlines()[:3] == [
        "|  | ID | cost | examples | seconds |", "| --- | --- | --- | --- | --- |", "|  | x |"]


def test_transfer_gives_overlap_and_rank_correlations(tmp_path, capsys):
    places = {"a": [(0.5, 0.4), (0.6, 0.3), (0.7, 0.2), (0.8, 0.1)],     # confidence, variability: 0, 1 kept
              "b": [(0.7, 0.1), (0.6, 0.3), (0.5, 0.2), (0.4, 0.35)]}    # 1, 3 kept
    run = json.dumps({"fingerprints": ["f"], "config": {"fraction": 0.5, "skip_epochs": 0}})
    for name, values in places.items():
        (tmp_path / name / "ref").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(run)
        np.savez(tmp_path / name / "ref" / "dynamics.npz", labels=np.zeros(4, int), fingerprint="f", flops=1,
                 logits=logits_of([[c - v, c + v] for c, v in values]))
    measuring.main(["--transfer", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    ((_, _, *numbers),) = map(dict.values, json.loads(capsys.readouterr().out))
    # by Spearman's formula, 1 - 6 * (sum of squared differences of ranks, 18 and 20) / (4 * (16 - 1))
    assert numbers == pytest.approx([0.5, 0.5, -0.8, -1])


def test_test_rows_that_are_in_the_training_set_are_counted_and_named(tmp_path):
    items = rows(30)
    train, test = write(tmp_path / "train.csv", items), write(tmp_path / "test.csv", rows(5, 9) + items[3:5])
    _, lines = measuring.read_tests(settings("--train", train, "--test", f"ood={test}"))
    assert len(lines) == 1 and "2 are also training rows, such as [5, 6]" in lines[0]


def test_the_planted_line_tells_the_share_among_the_kept_rows(tmp_path):
    breaking = ftft.built_in()[1]["shortcut-breaking"]
    for name, kept in (("a", breaking), ("b", ~breaking)):
        (tmp_path / name).mkdir()
        selected = {"ftft": {"rows": np.flatnonzero(kept).tolist()}}
        (tmp_path / name / "selected.json").write_text(json.dumps(selected))
    assert "100.0% shortcut-breaking (training set: 9.8%)" in measuring.planted_line([tmp_path / "a"])
    assert "50.0 ± 70.7% shortcut-breaking" in measuring.planted_line([tmp_path / "a", tmp_path / "b"])


def test_learning_curves_begin_after_the_reference_and_end_at_the_cost(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(measuring.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    phase = {"steps": 60, "budget": 72, "flops": 600, "erm_flops": 1000, "dev": [[30, 0.5], [60, 0.6]]}
    measuring.draw_learning_curves(tmp_path, {"phases": {"ftft": phase}, "cost": {"ftft": 0.9}})
    curve, cross = figures[0].axes[0].lines  # the reference cost 300
    assert [*curve.get_xdata()] == pytest.approx([0.6, 0.9]) and [*curve.get_ydata()] == [50, 60]
    assert (cross.get_marker(), *cross.get_xdata(), *cross.get_ydata()) == ("x", pytest.approx(0.9), 60)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", ["ftft", "hard", "easy", "random"])
def test_a_run_leaves_what_the_readme_lists(method, task, tmp_path, capsys):
    out = tmp_path / "run"
    cfg = main([*task, "--methods", method, "--out", str(out)])
    measuring.main([cfg.out])
    shown = capsys.readouterr().out
    files = {"run.json", "selected.json", "predictions.npz", "results.json", "log.txt", method}
    files |= {"learning_curves.png"} | ({"ref", "data_map.png"} if method != "random" else set())
    assert {path.name for path in out.iterdir()} == files
    phase, chosen = run_json(out)["phases"][method], json.loads((out / "selected.json").read_text())[method]
    assert len(set(chosen["rows"])) == 24 and chosen["rows"] == sorted(chosen["rows"]) and phase["dev"]
    result = json.loads((out / "results.json").read_text())[method]
    classify = transformers.pipeline("text-classification", str(out / method), device="cpu")
    right = [classify({"text": row["premise"], "text_pair": row["hypothesis"]})["label"] == row["label"]
             for row in rows(20, 2)]
    assert result["id"]["same"]["accuracy"] == pytest.approx(np.mean(right))
    measuring.main([str(out)])
    assert capsys.readouterr().out.strip() in shown  # the same table, from disk
    command = (out / method / "README.md").read_text().split("python ftft.py ")[1]
    assert ftft.settings(shlex.split(command)) == cfg
    (out / "results.json").unlink()
    write(tmp_path / "train.jsonl", rows(49))
    with pytest.raises(SystemExit):
        measuring.main([str(out)])
    assert "restore its training set" in capsys.readouterr().err


def told(*argv, capfd):
    """The line with which eval.py refuses these arguments."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        measuring.main([*map(str, argv)])
    assert stopped.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


def test_runs_that_differ_are_not_shown_as_one(task, tmp_path, monkeypatch, capfd):
    def broken(*_):
        raise ValueError("no fonts")
    monkeypatch.setattr(measuring, "draw_data_map", broken)  # a figure that fails costs no score
    runs = [tmp_path / name for name in ("a", "b", "c", "d")]
    main([*task, "--out", str(runs[0])])
    for run in runs[1:]:
        shutil.copytree(runs[0], run)
    measuring.main([str(runs[0]), str(runs[1])])
    assert capfd.readouterr().err.count("no figure (no fonts)") == 2 and (runs[0] / "results.json").exists()
    assert "models" in told(runs[0], with_phase(runs[2], "erm"), capfd=capfd)
    write(tmp_path / "same.jsonl", rows(10, 2))
    assert "test sets" in told(runs[0], runs[3], capfd=capfd)
    assert "--against erm-s" in told(runs[0], "--against", "erm-s", capfd=capfd)
    assert "did not finish" in told(unfinished(runs[2]), capfd=capfd)


def with_phase(folder, name):
    """The run, as if it had trained another model, too."""
    run = run_json(folder)
    run["phases"] = {name: run["phases"]["ftft"], **run["phases"]}
    shutil.copytree(folder / "ftft", folder / name)
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def unfinished(folder):
    run = run_json(folder)
    (folder / "run.json").write_text(json.dumps(run | {"cost": {}}))
    return folder


def test_selected_rows_are_those_of_the_data_map_and_described(task, tmp_path, capsys):
    main([*task, "--methods", "ftft", "dm", "hard", "--skip-epochs", "1", "--out", f"{tmp_path}/run"])
    selected, labels = json.loads((tmp_path / "run/selected.json").read_text()), [r["label"] for r in rows(48)]
    for method, source in (("ftft", "ref"), ("dm", "erm"), ("hard", "ref")):
        saved = np.load(tmp_path / "run" / source / "dynamics.npz")
        p = np.exp(saved["logits"][1:]) / np.exp(saved["logits"][1:]).sum(-1, keepdims=True)  # skip epoch 1
        p = np.take_along_axis(p, saved["labels"][None, :, None], -1)[..., 0]
        hardest = np.argsort(p.mean(0), kind="stable")[:24]
        kept = hardest if method == "hard" else np.argsort(-p.std(0), kind="stable")[:24]
        found = selected[method]
        assert found["rows"] == sorted(kept.tolist()) and found["fraction"] == 0.5
        assert found["hardest"] == pytest.approx(len({*kept} & {*hardest}) / 24, abs=1e-4)
        for name, shares in found["classes"].items():
            mine = [labels[row] for row in kept].count(name) / 24
            assert shares == pytest.approx([mine, labels.count(name) / 48], abs=1e-4)
    assert "among the hardest" in capsys.readouterr().out


def test_costs_count_real_tokens_and_the_reference(task, tmp_path, models):
    cfg = main([*task, "--methods", "ftft", "erm", "random", "dm", "--out", str(tmp_path / "run")])
    run, tokenizer = run_json(tmp_path / "run"), transformers.AutoTokenizer.from_pretrained(models[0])
    tokens = cfg.epochs * tokenize(tokenizer, rows(48))["attention_mask"].sum().item()
    for name in ("ref", "erm"):
        phase = run["phases"][name]
        assert (phase["tokens"], phase["examples"]) == (tokens, 3 * 48)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "erm")
    size = sum(p.numel() for name, p in model.named_parameters() if "embeddings.weight" not in name)
    assert run["phases"]["erm"]["flops"] == 6 * size * tokens
    flops = {name: phase["flops"] for name, phase in run["phases"].items()}
    spent = {"ftft": flops["ref"] + flops["ftft"], "erm": flops["erm"], "random": flops["random"],
             "dm": flops["erm"] + flops["dm"]}
    assert run["cost"] == pytest.approx({name: own / flops["erm"] for name, own in spent.items()})


@pytest.mark.parametrize("size, lr", [(199e6, 2e-5), (201e6, 1e-5)])
def test_large_main_models_learn_at_half_the_rate(size, lr, task, tmp_path, monkeypatch):
    monkeypatch.setattr(ftft, "backbone_size", lambda model: size)
    task = task[:task.index("--lr")]
    main([*task, "--methods", "random", "--epochs", "1", "--out", f"{tmp_path}/run"])
    assert run_json(tmp_path / "run")["phases"]["random"]["lr"] == lr


def test_layers_that_are_used_twice_count_twice():
    sizes = [ftft.backbone_size(encoder("albert", num_hidden_layers=n, embedding_size=8)) for n in (1, 4)]
    albert = encoder("albert", num_hidden_layers=4, embedding_size=8).albert.encoder
    assert sizes[1] - sizes[0] == 3 * sum(p.numel() for p in albert.albert_layer_groups.parameters())


def test_saved_dynamics_serve_another_run_and_only_on_the_same_rows(task, tmp_path, capfd):
    main([*task, "--out", str(tmp_path / "a")])
    reuse = ["--dynamics", str(tmp_path / "a" / "ref"), *task[2:]]
    main([*reuse, "--out", str(tmp_path / "b")])
    a, b = (json.loads((tmp_path / run / "selected.json").read_text()) for run in "ab")
    assert a == b and run_json(tmp_path / "a")["cost"] == run_json(tmp_path / "b")["cost"]
    weights = [(tmp_path / run / "ftft" / "model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]  # a phase does not depend on what ran before it
    assert "another training set" in refused([*reuse, "--limit", "47"], capfd)


def test_early_stopping_keeps_the_best_weights_and_erm_runs_on(task, tmp_path):
    turned = dict(zip(NLI, NLI[1:] + NLI[:1]))  # wrong dev labels: what is learnt makes the dev score fall
    dev = write(tmp_path / "dev.tsv", [{**row, "premise": "never", "label": turned[row["label"]]}
                                       for row in rows(60, 1)])  # a word that is not trained on
    cfg = main([*task, "--methods", "ftft", "erm", "erm-es", "--epochs", "12", "--metric", "macro-f1",
                "--out", f"{tmp_path}/run"])
    phases = run_json(tmp_path / "run")["phases"]
    scores = {name: [score for _, score in phases[name]["dev"]] for name in ("ftft", "erm", "erm-es")}
    assert [step for step, _ in phases["erm"]["dev"]] == [6 * i for i in range(1, 13)]
    assert scores["erm-es"] == scores["erm"][:len(scores["erm-es"])] and phases["erm-es"]["budget"] == 72
    for name, counted in scores.items():
        counted = counted[1:]  # the first, after 6 steps, is within the warm-up of 7
        best = counted.index(max(counted))
        assert len(counted) == (11 if name == "erm" else best + 3)  # patience is 2
        assert phases[name]["steps"] == 6 * len(scores[name])
        answers = measuring.score(name, tmp_path / "run" / name, cfg, {("id", "dev"): ftft.read(dev)})
        assert ftft.metrics(*answers[f"{name}/id/dev"])["macro-f1"] == max(counted)
    assert phases["ftft"]["steps"] < 72 and scores["erm"][-1] < max(scores["erm"])


def test_without_a_dev_set_a_third_of_erms_steps_is_trained_by_an_unusual_model_too(task, tmp_path):
    odd = tmp_path / "odd"
    encoder("distilbert", vocab_size=18).save_pretrained(odd)
    tiny()[1].save_pretrained(odd)
    main([*task[:6], *task[8:], "--main", str(odd), "--out", str(tmp_path / "run")])
    assert run_json(tmp_path / "run")["phases"]["ftft"]["steps"] == 6  # ERM's would be 3 epochs of 6


def test_the_nli_files_of_their_authors_train_and_score(tmp_path, models):
    def put(path, columns, n, form=str):
        write(tmp_path / "data" / path, renamed(rows(n), columns, form))
    sentences = ("sentence1", "sentence2", "gold_label")
    put("multinli_1.0/multinli_1.0_train.jsonl", sentences, 40)
    for half in ("matched", "mismatched"):
        drop = lambda label: label.replace("neutral", "-")
        put(f"multinli_1.0/multinli_1.0_dev_{half}.jsonl", sentences, 9, drop)
    for part in ("R1/dev", "R2/dev", "R3/dev", "R1/test", "R2/test", "R3/test"):
        put(f"anli_v1.0/{part}.jsonl", ("context", "hypothesis", "label"), 9, lambda label: label[0])
    put("heuristics_evaluation_set.jsonl", sentences, 9, merge)
    put("wanli/test.jsonl", ("premise", "hypothesis", "gold"), 9)
    cfg = main(["--ref", models[0], "--main", models[1], "--data", f"{tmp_path}/data", "--batch-size", "8",
                "--epochs", "2", "--out", str(tmp_path / "run")])
    measuring.main([cfg.out])
    result = json.loads((tmp_path / "run" / "results.json").read_text())["ftft"]
    assert {kind: list(sets) for kind, sets in result.items()} == {
        "id": ["mnli_matched", "mnli_mismatched"], "ood": ["hans", "wanli"],
        "adversarial": ["anli_r1", "anli_r2", "anli_r3"]}
    assert result["id"]["mnli_matched"]["n"] < result["ood"]["hans"]["n"] == 9


def test_the_hsd_files_of_their_authors_train_and_score(tmp_path, models):
    items = [{"labels": NLI.index(row["label"]) % 2, "text": f'{row["hypothesis"]} "q"'} for row in rows(40)]
    sets = [f"r{r}_{form}" for r in (2, 3, 4) for form in ("original", "perturbation")]
    files = [f"dynahate/{name}.{part}" for name in sets for part in ("dev", "test")]
    for path in ("cad/cad_uid.train", "cad/cad_uid.dev", *files):
        write(tmp_path / "data" / path, items)
    cfg = main(["--task", "hsd", "--data", f"{tmp_path}/data", "--ref", models[0], "--main", models[1],
                "--epochs", "2", "--batch-size", "8", "--out", str(tmp_path / "run")])
    measuring.main([cfg.out])
    result = json.loads((tmp_path / "run" / "results.json").read_text())["ftft"]
    assert [*result["id"], *result["adversarial"]] == ["cad_dev", *[f"dynahate_{name}" for name in sets]]


def test_a_folder_laid_out_as_deberta_v3_on_the_hub_loads_in_float32(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(row["hypothesis"] for row in rows(200)), model_prefix=f"{tmp_path}/spm",
        vocab_size=30, minloglevel=2, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]")
    encoder("deberta-v2").config.to_json_file(tmp_path / "config.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
    stored = encoder("deberta-v2").deberta.half().state_dict()
    torch.save({f"deberta.{name}": value for name, value in stored.items()}, tmp_path / "pytorch_model.bin")
    model, tokenizer = ftft.load(str(tmp_path), "cpu", NLI)
    torch.testing.assert_close(model.deberta.embeddings.word_embeddings.weight,
                               stored["embeddings.word_embeddings.weight"].float())
    assert tokenizer.decode(tokenizer("red cat", "dog")["input_ids"]) == "[CLS] red cat[SEP] dog[SEP]"
    assert model.dtype == torch.float32


def save(folder, model, tokenizer=None, weights=None, **config):
    """A model's folder, with other weights or another config."""
    model.save_pretrained(folder)
    (tokenizer or tiny()[1]).save_pretrained(folder)
    if weights:
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


@pytest.mark.parametrize("case", ["renamed", "another vocabulary", "more layers", "left padding", "unknown token"])
def test_a_model_that_does_not_fit_its_files_is_refused(case, tmp_path, capfd):
    (model, tokenizer), weights, config = tiny(), None, {}
    if case == "renamed":
        weights = {key.replace("bert.", "own."): value.contiguous() for key, value in model.state_dict().items()}
    elif case == "left padding":
        tokenizer = transformers.BertTokenizer(tokenizer.get_vocab(), padding_side="left")
    elif case == "unknown token":
        tokenizer = padder()
    else:
        config = {"vocab_size": 99} if case == "another vocabulary" else {"num_hidden_layers": 2}
    folder = save(tmp_path / "model", model, tokenizer, weights, **config)
    with pytest.raises(SystemExit) as stopped:
        loaded = ftft.load(folder, "cpu", NLI)
        ftft.encode(*loaded, ftft.Examples([("40 41",)], torch.tensor([0]), NLI), settings())
    said = capfd.readouterr().err
    remedies = {"left padding": "pad on the right", "unknown token": "token 46"}
    assert stopped.value.code == 2 and said.count("\n") == 1 and remedies.get(case, "would be random") in said
    assert folder in said and said.count(",") < 6  # five names at most


@pytest.mark.parametrize("names, stays", [(["Contradiction", "ENTAILMENT", "neutral"], True),
                                          (["entailment", "neutral", "contradiction"], False), (NLI[:2], False)])
def test_a_trained_head_stays_only_with_the_same_classes_in_the_same_order(names, stays, tmp_path):
    model = encoder("bert", vocab_size=18, num_labels=len(names), problem_type="regression")
    folder = save(tmp_path / "model", model, id2label=dict(enumerate(names)), pad_token_id=None)
    loaded, _ = ftft.load(folder, "cpu", NLI)
    assert torch.equal(loaded.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    head = loaded.classifier.weight
    assert stays == (head.shape == model.classifier.weight.shape and torch.equal(head, model.classifier.weight))
    assert [*loaded.config.id2label.values()] == NLI and loaded.config.problem_type is None
    assert loaded.config.pad_token_id == 0


@pytest.mark.parametrize("kind, most", [("bert", 20), ("roberta", 18), ("deberta-v2", 40)])
def test_inputs_are_cut_at_what_the_model_and_the_tokenizer_can_take(kind, most, tmp_path):
    pad, text = {"roberta": 1}.get(kind, 0), ftft.Examples([("7 " * 60,)], torch.tensor([0]), NLI)
    tokenizer = padder(pad)
    loaded = ftft.load(save(tmp_path / "a", encoder(kind, max_position_embeddings=20), tokenizer), "cpu", NLI)
    data = ftft.encode(*loaded, text, settings("--max-length", "40"))
    assert data.lengths.item() == most and loaded[0](**ftft.collate(data, [0], "cpu")).logits.isfinite().all()
    tokenizer.model_max_length = 12
    loaded = ftft.load(save(tmp_path / "b", encoder(kind), tokenizer), "cpu", NLI)
    assert ftft.encode(*loaded, text, settings()).lengths.item() == 12


# ---------------------------------------------------------------- crashes and several processes


def start(argv, *launcher):
    """`python ftft.py` as a process of its own."""
    return subprocess.Popen([sys.executable, *launcher, ftft.__file__, *argv], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def results(folder):
    """The bytes of what a run is for."""
    names = ("ref/dynamics.npz", "selected.json", "ref/model.safetensors", "ftft/model.safetensors")
    return [(folder / name).read_bytes() for name in names]


def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(task, tmp_path):
    out, moments, ends = tmp_path / "cut", random.Random(0), []
    for kills_left in (3, 2, 1, 0):
        known = {*out.rglob("*")}
        run = start(["--resume", str(out)] if known else [*task, "--out", str(out)])
        while kills_left and run.poll() is None and not {*out.glob("*/*")} - known:
            time.sleep(0.001)
        if kills_left:  # a file has just appeared: in training, in a checkpoint, between two phases, ..
            time.sleep(0.5 * moments.random())
            run.kill()
        said, _ = run.communicate()
        ends.append(run.returncode)
    assert ends[0] == -signal.SIGKILL and ends[-1] == 0, said
    main([*task, "--out", f"{tmp_path}/whole"])
    assert results(out) == results(tmp_path / "whole")
    assert (out / "results.json").exists() and not (out / "checkpoint.pt").exists()


@pytest.mark.parametrize("how", ["full disk", "Ctrl-C"])
def test_an_interrupted_run_leaves_its_last_checkpoint_and_goes_on_the_same_way(
        how, task, tmp_path, monkeypatch, capfd):
    cut, numbers = tmp_path / "cut", iter(range(1, 99))

    def save(state, path, save=torch.save):
        if next(numbers) == 5:
            raise KeyboardInterrupt if how == "Ctrl-C" else OSError(28, "No space left on device")
        save(state, path)
    with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)):
        patch.setattr(torch, "save", save)
        main([*task, "--out", str(cut)])
    assert how == "Ctrl-C" or "--resume" in capfd.readouterr().err
    assert torch.load(cut / "checkpoint.pt", weights_only=True)["done"]["steps"] == 6  # the fourth of 12 points
    main(["--resume", str(cut)])
    main([*task, "--out", f"{tmp_path}/whole"])
    assert results(cut) == results(tmp_path / "whole") and not [*cut.glob("*.p*t*")]


def test_ctrl_c_prints_the_command_that_continues(task, tmp_path):
    run = start([*task, "--epochs", "99", "--out", f"{tmp_path}/run"])
    while not (tmp_path / "run" / "checkpoint.pt").exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate()
    assert run.returncode == 130 and "Traceback" not in said
    assert said.endswith(f"stopped; to continue: python ftft.py --resume {tmp_path}/run\n"), said


def test_two_processes_give_what_one_gives(task, tmp_path, monkeypatch, capfd):
    model, tokenizer = encoder("big_bird", vocab_size=18, attention_type="original_full"), tiny()[1]
    model.classifier.out_proj.weight.data *= 3  # for some gradients that are clipped, as AdamW sees no scale
    for part in (model, tokenizer):  # this model's pooler gets no gradient
        part.save_pretrained(tmp_path / "steady")
    monkeypatch.chdir(tmp_path)  # 41 rows: the last batch has one, and a process none
    task = ["--ref", "steady", "--main", "steady", *task[4:], "--limit", "41", "--grad-accum", "2"]
    two = start(task, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said, _ = two.communicate()
    assert two.returncode == 0 and said.count("cost relative to ERM") == 1, said
    (folder,) = (tmp_path / "runs").iterdir()  # the processes agree on its name
    assert main(task).out == "runs/train-2" and folder.name == "train-1"
    one, two = (np.load(f"runs/train-{i}/ref/dynamics.npz")["logits"] for i in (2, 1))
    np.testing.assert_allclose(two, one, atol=1e-5)
    one, two = (json.loads(Path(f"runs/train-{i}/selected.json").read_text()) for i in (2, 1))
    assert one == two
    one, two = ([line for line in Path(f"runs/train-{i}/log.txt").read_text().split("\n") if "loss" in line]
                for i in (2, 1))
    losses = [[float(line.split("loss ")[1].split(",")[0]) for line in lines] for lines in (one, two)]
    assert len(one) > 12 and losses[1] == pytest.approx(losses[0], abs=0.002)  # of all rows, not of a share
    assert "start 2 processes" in refused(["--resume", "runs/train-1"], capfd)


def out_of_memory(step):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("factor, amp, named", [
    (lambda step: math.inf, "fp16", "overflow or divergence"), (out_of_memory, "off", "--grad-accum"),
    (lambda step: math.inf if step == 35 else 1, "off", "by step 36")])
def test_a_step_that_fails_ends_the_run_in_a_line(factor, amp, named, task, tmp_path, monkeypatch, capfd):
    steps = iter(range(99))

    def load(*args, load=ftft.load):
        model, tokenizer = load(*args)
        model.classifier.weight.register_hook(lambda gradient: gradient * factor(next(steps)))
        return model, tokenizer
    monkeypatch.setattr(ftft, "load", load)
    task = [*task[:6], *task[8:], "--epochs", "6", "--amp", amp]  # 36 steps
    assert named in refused([*task, "--out", f"{tmp_path}/run"], capfd)
    assert not (tmp_path / "run" / "ref").exists()


@pytest.mark.parametrize("amp, dev", [("off", []), ("fp16", ["--dev", "dev.tsv"])])
def test_a_single_logit_that_is_not_finite_is_refused_in_the_phase(amp, dev, task, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def load(*args, load=ftft.load):
        model, tokenizer = load(*args)
        steps = iter(range(99))
        model.classifier.register_forward_hook(lambda layer, _, logits: logits.index_fill(
            1, torch.tensor([2]), math.inf) if layer.training and next(steps) == 2 else logits)
        return model, tokenizer
    monkeypatch.setattr(ftft, "load", load)
    said = refused([*task[:6], *task[8:], *dev, "--amp", amp, "--out", "run"], capfd)
    assert "ref: overflow" in said and "--amp off" in said
    assert not (tmp_path / "run" / "ref").exists()


# ---------------------------------------------------------------- bad input


class Bomb:
    """Makes a file of this name where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_executed(task, tmp_path, capfd):
    hit, code, objects = tmp_path / "hit", tmp_path / "code", tmp_path / "objects" / "dynamics.npz"
    for part in tiny():
        for folder in ("code", "weights"):
            part.save_pretrained(tmp_path / folder)
    (tmp_path / "weights" / "model.safetensors").unlink()
    (tmp_path / "weights" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(hit), 2))
    config = json.loads((code / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
    (code / "config.json").write_text(json.dumps(config))
    (code / "own.py").write_text(f"open({str(hit)!r}, 'w')\nclass Own: pass\n")
    objects.parent.mkdir()
    np.savez(objects, logits=np.array([Bomb(hit)]))
    for option, folder in (("--main", "weights"), ("--main", "code"), ("--dynamics", "objects")):
        start = 2 if option == "--dynamics" else 0
        said = refused([*task[start:], option, str(tmp_path / folder)], capfd)
        assert folder in said and not hit.exists()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_a_garbled_file_is_read_or_refused_in_one_line(kind, tmp_path, capfd):
    dice, path = random.Random(kind), tmp_path / f"garbled.{kind}"
    pieces = b'\0 \xff \xef\xbb\xbf " , \t \r \n\n { NaN null [1] \xe2\x80\xa8'.split(b" ")
    pieces += [b"9" * 5000, b"x" * 200_000, b""]
    for _ in range(60):
        content = open(write(path, rows(6)), "rb").read()
        for _ in range(dice.randint(1, 3)):
            place = dice.randrange(len(content))
            content = content[:place] + dice.choice(pieces) + content[place + dice.choice([0, 1, 99]):]
        path.write_bytes(content)
        try:
            ftft.encode(*tiny(), ftft.read(str(path)), settings())
        except SystemExit:
            assert capfd.readouterr().err.count("\n") == 1


ONE = {"text": "red", "label": "a"}
BAD = {  # what the training file holds, or which arguments are changed -> what the line must name
    "missing file": ({"--train": "nowhere.jsonl"}, "nowhere.jsonl"),
    "empty file": ([], "labelled row"),
    "not utf-8": (b'{"text": "\xff", "label": "a"}\n', "cannot be read"),
    "no label column": ([{"text": "red"}], "no label or no text column"),
    "a line that is no object": ([ONE, [1]], "line 2"),
    "settings beside those of a run": ({"--resume": ".", "--seed": "0"}, "give no other"),
    "a folder below a file": ({"--out": "train.jsonl/run"}, "--out train.jsonl/run"),
    "a folder in place of a file": ({"--dev": "folder.csv"}, "folder.csv"),
    "a label that is a list": ([ONE, {"text": "red", "label": []}], "line 2"),
    "more fields than columns": ({"--train": "wide.csv"}, "line 3: has no or too many columns"),
    "one class only": ([ONE] * 40, "one class"),
    "single texts against pairs": ([{**ONE, "label": label} for label in NLI * 20], "pairs"),
    "a label unknown to training": ({"--test": "id=odd.jsonl"}, "line 2: other is none of contradiction"),
    "a test set without a kind": ({"--test": "odd.jsonl"}, "id=FILE"),
    "two sets of one name": ({"--test": ["id=same.jsonl", "ood=same.jsonl"]}, "called same"),
    "a fraction below a batch": ({"--fraction": "0.1"}, "less than a batch"),
    "one epoch": ({"--epochs": "1"}, "--epochs 1: a data map needs two"),
    "no reference": ({"--ref": None}, "--ref"),
    "an unknown task": ({"--train": None, "--task": "qa"}, "invalid choice: 'qa'"),
    "the built-in task with other data": ({"--train": None, "--task": "built-in"}, "--task built-in"),
    "own data and a task": ({"--task": "hsd"}, "--train: leave out --task"),
    "own data and the authors' files": ({"--data": "."}, "--train: leave out --task and --data"),
    "a built-in model on other data": ({"--main": "built-in-4x128"}, "built-in task only"),
    "a reference and another's dynamics": ({"--dynamics": "."}, "--dynamics replaces --ref"),
    "dynamics of no use": ({"--dynamics": ".", "--ref": None, "--methods": "random"}, "none of the --methods"),
    "too short inputs": ({"--max-length": "7"}, "--max-length 7: must be at least 8"),
    "too many names": ({"--test": "id=odd.jsonl", "--train": "many.jsonl"}, "and 15 more"),
    "an epoch too many left out": ({"--skip-epochs": "2"}, "--epochs 3: a data map needs two"),
    "an unknown option": ({"--frobnicate": "1"}, "--frobnicate"),
    "no such device": ({"--device": "abacus"}, "abacus"),
    "a model folder without config": ({"--main": "."}, ".: cannot be loaded"),
    "a folder that exists": ({"--out": "."}, "--out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_exit_code_2(case, task, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    bad, named = BAD[case]
    (tmp_path / "wide.csv").write_text("text,label\nred,a\nred, green,b\n")
    (tmp_path / "folder.csv").mkdir()
    write(tmp_path / "many.jsonl", [{**rows(1)[0], "label": str(i)} for i in range(20)] * 2)
    write(tmp_path / "odd.jsonl", [*rows(1), {**rows(1)[0], "label": "other"}])
    args, key = {"--out": ["run"]}, None
    for word in task:
        key = word if word.startswith("--") else key
        args.setdefault(key, []).extend([] if word is key else [word])
    if isinstance(bad, dict):
        args |= {name: value if isinstance(value, list) else [value] for name, value in bad.items()}
    else:
        text = bad if isinstance(bad, (str, bytes)) else "".join(json.dumps(row) + "\n" for row in bad)
        (tmp_path / "train.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = sorted(tmp_path.rglob("*"))
    argv = [word for name, values in args.items() if values != [None] for word in (name, *values)]
    assert named in refused(argv, capfd)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_loss_that_is_no_number_ends_the_run_which_is_not_scored(task, tmp_path, capfd):
    said = refused([*task, "--lr", "4e9", "--out", str(tmp_path / "run")], capfd)
    assert "step 3" in said and "learning rate" in said
    assert (tmp_path / "run" / "ref" / "dynamics.npz").exists() and not (tmp_path / "run" / "ftft").exists()
    assert list(run_json(tmp_path / "run")["phases"]) == ["ref"]
    with pytest.raises(SystemExit) as stopped:
        measuring.main([str(tmp_path / "run")])
    assert stopped.value.code == 2 and "did not finish" in capfd.readouterr().err
