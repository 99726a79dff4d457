"""What ftft.py and eval.py promise, checked by independent routes: python -m pytest (offline)."""
import copy
import csv
import json
import math
import pickle
import re
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
import sentencepiece
import torch
import torch.nn.functional as F
import transformers

import eval as measuring
import ftft

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEBERTA = dict(relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
               share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
               type_vocab_size=0)
WORDS = "red green blue cat dog bird runs sleeps sings here there now never".split()
NLI = ["contradiction", "entailment", "neutral"]  # label i goes with the word WORDS[i]
ABOUT = {"config": {"metric": "accuracy"}, "cost": {}, "phases": {}, "selected": {}}


def rows(n, seed=0):
    """n premise-hypothesis rows whose label follows from the first word of the hypothesis."""
    rng = np.random.default_rng(seed)
    some = lambda low, high: " ".join(rng.choice(WORDS[3:-1], rng.integers(low, high)))
    return [{"premise": some(2, 9), "hypothesis": f"{WORDS[i]} {some(1, 5)}", "label": NLI[i]}
            for i in rng.integers(3, size=n)]


def merge(label):
    return "entailment" if label == "entailment" else "non-entailment"


def relabelled(items, form):
    return [{**row, "label": form(row["label"])} for row in items]


def write(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = items[:1] if path.suffix in (".csv", ".tsv") else []  # the keys of the first
    with open(path, "w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(item) + "\n" for item in items)
        else:
            table = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            table.writerows([*header, *(item.values() for item in items)])
    return str(path)


def read_json(folder, name="run.json"):
    return json.loads(Path(folder, name).read_text())


def encoder(kind="bert", dropout=0.0, **more):
    """A random classifier of three classes."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                 intermediate_size=32, num_labels=3, hidden_dropout_prob=dropout,
                 attention_probs_dropout_prob=dropout)
    sizes |= DEBERTA if kind == "deberta-v2" else {"max_position_embeddings": 514}
    config = transformers.AutoConfig.for_model(kind, **sizes | more)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def vocabulary(pad=0, **more):
    """A tokenizer of 48 whole words whose padding has this number."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(str, range(30))]
    words.insert(pad, "[PAD]")
    return transformers.BertTokenizer({word: i for i, word in enumerate(words)}, **more)


def token_data(lengths, most, pad):
    """Encoded examples of these lengths, random tokens from 5 to most - 1."""
    rng = np.random.default_rng(0)
    tokens = [{"input_ids": rng.integers(5, most, length).astype(np.int32)} for length in lengths]
    labels = torch.arange(len(lengths)) % 3
    return ftft.Encoded(tokens, torch.tensor(lengths), labels, vocabulary(pad))


def save(folder, model, tokenizer=None, weights=None, **config):
    """A model's folder, perhaps with other weights or another config."""
    model.save_pretrained(folder, state_dict=weights)
    (tokenizer or vocabulary()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(read_json(folder, "config.json") | config))
    return str(folder)


def arguments(folder, models):
    """Arguments of a small run on files of its own: --ref first, --lr and --dev last, no --out."""
    return ["--ref", models[0], "--main", models[1],
            "--train", write(folder / "train.jsonl", rows(48)),
            "--test", "id=" + write(folder / "same.jsonl", rows(20, 2)),
            "ood=" + write(folder / "hans.csv", relabelled(rows(20, 3), merge)),
            "--batch-size", "8", "--epochs", "3", "--fraction", "0.5", "--skip-epochs", "1",
            "--ref-lr", "0.01", "--lr", "0.01", "--dev", write(folder / "dev.tsv", rows(20, 1))]


def main(argv):
    """What `python ftft.py` does with these arguments, up to the scoring."""
    cfg = ftft.settings(argv)
    measuring.read_tests(cfg)
    ftft.main(cfg)
    return cfg


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a reference and a main model, stored in fp16 without a classification head."""
    folder = tmp_path_factory.mktemp("models")
    return [save(folder / f"layers-{n}", encoder(dropout=0.1, num_hidden_layers=n).bert.half())
            for n in (1, 2)]


@pytest.fixture
def task(tmp_path, models):
    return arguments(tmp_path, models)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, models):
    """The settings of a run of several methods, done and scored. To be read, never changed."""
    folder = tmp_path_factory.mktemp("finished")
    cfg = main([*arguments(folder, models), "--out", f"{folder}/run",
                "--methods", "ftft", "hard", "easy", "random", "dm"])
    measuring.main([cfg.out])
    return cfg


@pytest.fixture
def refused(capfd):
    """Call something that is to end the program; returns the one line that it says."""
    def call(function, *args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            function(*args)
        said = capfd.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1, said
        return said
    return call


def settings(*more):
    return ftft.settings(["--ref=r", "--main=m", "--batch-size=8", "--device=cpu", *more])


def pairs(items):
    return [(row["premise"], row["hypothesis"]) for row in items]


def encoded(items, *more):
    labels = torch.tensor([NLI.index(row["label"]) for row in items])
    examples = ftft.Examples(pairs(items), labels, NLI)
    return ftft.encode(encoder(), vocabulary(), examples, settings(*more))


@pytest.fixture
def fit(tmp_path):
    """Train a model on all of its data as the phase `name`; returns the dynamics."""
    def train(model, data, steps, *more, name="ref"):
        cfg, n = settings("--out", str(tmp_path), *more), len(data.labels)
        dynamics = torch.full((steps, n, 3), -math.inf)
        ftft.train(name, model, data, [], torch.arange(n), steps, 0.01, cfg, dynamics)
        return dynamics
    return train


# ------------------------------ the training loop


def textbook(model, data, steps, overflow=None):
    """The same training with the tools of PyTorch and transformers; returns the dynamics."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-6, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    dynamics = torch.full((steps, len(data.labels), 3), -math.inf)
    order = [(epoch, batch) for epoch in range(steps) for batch in ftft.batches(
        torch.arange(len(data.labels)), data.lengths, 8, ftft.seed_for(0, "ref", epoch))]
    pad = transformers.DataCollatorWithPadding(data.tokenizer)
    model.train()
    for step, (epoch, batch) in enumerate(order[:steps]):
        logits = model(**pad([data.inputs[row] for row in batch])).logits
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
    model, plain, data = encoder(), encoder(), encoded(rows(20), "--max-length", "9")
    for twin in (model, plain):
        twin.classifier.weight.data *= 30  # for gradients that are clipped
    ours, theirs = fit(model, data, 21, "--grad-accum", pieces), textbook(plain, data, 21)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert ours[:7].isfinite().all() and len({*ours[:7, 0, 0].tolist()}) == 7
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_seed_and_the_phase_decide_and_erm_es_is_erm(fit):
    def train(*more, steps=3, **named):
        return fit(encoder(dropout=0.1), encoded(rows(20)), steps, *more, **named)
    dynamics = train()
    assert dynamics[0].isfinite().all() and (dynamics[1:] == -math.inf).all()
    assert torch.equal(train(steps=6), train(steps=6))
    assert not torch.equal(dynamics, train("--seed", "1"))
    assert not torch.equal(dynamics, train(name="erm"))
    assert torch.equal(train(name="erm"), train(name="erm-es"))


def test_an_fp16_step_that_overflows_is_skipped_and_uses_up_its_rate(fit):
    model, skipped, taken = encoder(), encoder(), encoder()
    data, steps = encoded(rows(20)), iter(range(99))
    model.classifier.weight.register_hook(lambda x: x * (math.inf if next(steps) == 2 else 1))
    fit(model, data, 9, "--amp", "fp16")
    textbook(skipped, data, 9, overflow=2)
    textbook(taken, data, 9)
    ours, skipped, taken = (torch.cat([p.detach().flatten() for p in model.parameters()])
                            for model in (model, skipped, taken))
    assert (ours - skipped).norm() < 0.1 * (ours - taken).norm()


def test_bf16_autocast_computes_in_bf16_with_float32_weights(fit):
    model, data = encoder(), encoded(rows(32))
    in_bf16, in_float32 = (ftft.predict(model, data, settings("--amp", amp))
                           for amp in ("bf16", "off"))
    assert not torch.equal(in_bf16, in_float32)
    torch.testing.assert_close(in_bf16, in_float32, atol=0.1, rtol=0.05)
    trained = fit(model, data, 8, "--amp", "bf16")
    assert torch.equal(trained, trained.bfloat16().float()) and model.dtype == torch.float32


# ------------------------------ what makes it fast


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("kind, heads, more", [
    ("deberta-v2", 6, {}), ("deberta-v2", 12, {}), ("deberta-v2", 16, {}),
    ("deberta-v2", 2, {"max_relative_positions": 140}),  # unusual: below position_buckets
    ("bert", 2, {}), ("roberta", 2, {}), ("electra", 2, {})])
def test_what_is_left_out_changes_neither_logits_nor_gradients(kind, heads, more, device):
    plain = encoder(kind, hidden_size=64 * heads, num_attention_heads=heads, num_hidden_layers=2,
                    **more)
    for name, weight in plain.named_parameters():
        if "query" in name or "key" in name:
            weight.data *= 6  # for attention that depends on positions
    fast = copy.deepcopy(plain)
    data = token_data([1, 2, 127, 128, 129, 255, 256, 257, 300], 48, plain.config.pad_token_id)
    ftft.compute_less(fast)
    for batch in ([0], [1, 0], [2, 3], [4, 1], [5, 2], [6, 3], [8, 0, 7]):
        results = []
        for model in (plain.to(device), fast.to(device)):
            logits = model(**ftft.collate(data, batch, device)).logits
            loss = F.cross_entropy(logits, data.labels[batch].to(device))
            slopes = torch.autograd.grad(loss, model.parameters(), materialize_grads=True)
            results.append([logits, *slopes])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["deberta-v2", "bert", "roberta", "electra"])
def test_less_is_computed(kind):
    model, seen = encoder(kind, num_hidden_layers=2), []
    for name, module in model.named_modules():
        if name.endswith(("intermediate.dense", "key_proj")):
            module.register_forward_pre_hook(lambda _, args: seen.append([*args[0].shape]))
    ftft.compute_less(model)
    model(**ftft.collate(token_data([5, 9], 48, model.config.pad_token_id), [0, 1], "cpu"))
    expected = [[2, 9, 16], [2, 1, 16]]  # the tokens, in the last layer the first of each
    if kind == "deberta-v2":  # before each: the tokens, and 2 * 9 relative positions, not 512
        keys = [[2, 9, 16], [1, 18, 16]]
        expected = [*keys, expected[0], *keys, expected[1]]
    assert seen == expected


@pytest.mark.parametrize("kind", ["deberta-v2", "bert", "roberta", "electra"])
def test_embeddings_not_in_use_are_left_out_and_put_back(kind, fit):
    plain = encoder(kind)
    before, fast = copy.deepcopy(plain), copy.deepcopy(plain)
    data = token_data([3, 9, 5, 4, 7, 8, 6, 5, 3, 9], 30, plain.config.pad_token_id)
    used = {plain.config.pad_token_id}.union(*(row["input_ids"].tolist() for row in data.inputs))
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


def test_a_shared_word_table_is_left_whole():
    model = encoder("bert")
    model.twin = torch.nn.Linear(16, 48, bias=False)
    model.twin.weight = model.get_input_embeddings().weight
    ftft.compact_embeddings(model, [token_data([5], 10, 0)])
    assert len(model.twin.weight) == len(model.get_input_embeddings().weight) == 48


# ------------------------------ data and selection


def test_the_data_map_equals_numpy_on_hand_written_logits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (4, 50, 3)).astype("f4"), rng.integers(3, size=50)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p_gold = np.stack([p[:, i, label] for i, label in enumerate(labels)], axis=1)
    expected = p_gold.mean(0), p_gold.std(0), (logits.argmax(-1) == labels).mean(0)
    stats = ftft.data_map(torch.from_numpy(logits), torch.from_numpy(labels))
    for ours, values in zip(stats, expected, strict=True):
        np.testing.assert_allclose(ours, values, atol=1e-6)
    logits[1, 4] = -math.inf
    with pytest.raises(AssertionError, match="not visited"):
        ftft.data_map(torch.from_numpy(logits), torch.from_numpy(labels))


def logits_of(p_gold):
    """Two-class logits (epochs, n, 2) whose softmax gives these p(gold) (n, epochs) to class 0."""
    p = torch.tensor(p_gold).T
    return torch.stack([p.log(), (1 - p).log()], dim=-1)


def test_selection_keeps_exactly_k_rows_and_ties_go_to_the_lower():
    logits = logits_of([[0.9, 0.9, 0.9], [0.1, 0.9, 0.5], [0.1, 0.1, 0.1], [0.1, 0.9, 0.5],
                        [0.4, 0.5, 0.6], [0.1, 0.9, 0.5]])
    confidence, variability, _ = ftft.data_map(logits, torch.zeros(6, dtype=torch.long))
    for score, fraction, rows in (
            (variability, 0.5, [1, 3, 5]), (variability, 0.33, [1, 3]),
            (variability, 4 / 6, [1, 3, 4, 5]), (confidence, 1 / 6, [0]),
            (confidence, 0.5, [0, 1, 3]), (-confidence, 1 / 6, [2]), (-confidence, 1, [*range(6)])):
        assert ftft.select(score, fraction).tolist() == rows


def test_batches_hold_every_row_once_and_rows_of_like_length_which_the_seed_changes():
    chosen = torch.arange(0, 900, 2)
    lengths = torch.from_numpy(np.random.default_rng(0).lognormal(3.5, 0.5, 900)).long()
    a, again, b = (ftft.batches(chosen, lengths, 8, seed) for seed in (0, 0, 1))
    assert sorted(map(len, a)) == [2] + [8] * 56 and torch.equal(torch.cat(a), torch.cat(again))
    assert all(torch.equal(torch.cat(some).sort().values, chosen) for some in (a, b))
    met, again = ({(i, j) for batch in some for i in batch.tolist() for j in batch.tolist()}
                  for some in (a, b))
    assert len(met & again) < len(met) / 2
    longest = [lengths[batch].max().item() for batch in a]
    padded = sum(len(batch) * most for batch, most in zip(a, longest))
    assert 1 - lengths[chosen].sum() / padded < 0.1 and longest != sorted(longest)


def renamed(items, columns, form=str):
    """The rows under other column names, beside a column of no use, labels in another form."""
    return [{"uid": "x", **dict(zip(columns, (row["premise"], row["hypothesis"], row["label"])))}
            for row in relabelled(items, form)]


def test_every_form_of_file_and_label_reads_the_same(tmp_path):
    items = rows(12)
    for file, columns, form in (("a.jsonl", ("premise", "hypothesis", "label"), str),
                                ("b.csv", ("sentence1", "sentence2", "gold_label"), str),
                                ("c.tsv", ("context", "hypothesis", "gold"), lambda x: x[0]),
                                ("d.csv", ("text1", "text2", "labels"), NLI.index)):
        read = ftft.read(write(tmp_path / file, renamed(items, columns, form)))
        assert read.texts == pairs(items)
        assert read.labels.tolist() == [NLI.index(row["label"]) for row in items]
        assert read.names == (["0", "1", "2"] if form == NLI.index else NLI)


def test_unlabelled_rows_are_dropped_and_later_rows_renumbered(tmp_path):
    golds = ["a", "-", "b", -1, "-1", "a"]
    items = [{"text": str(i), "label": gold} for i, gold in enumerate(golds)]
    read = ftft.read(write(tmp_path / "x.jsonl", items))
    assert (read.texts, read.labels.tolist()) == ([("0",), ("2",), ("5",)], [0, 1, 0])
    for labels, names in (("nyn", ["n", "y"]), ("nn", ["neutral"])):  # spelt out if all are short
        items = [{"text": "a", "label": label} for label in labels]
        assert ftft.read(write(tmp_path / f"{labels}.jsonl", items)).names == names


def test_a_hub_data_set_goes_by_its_label_names(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # where a folder owner/name stands for the Hub's data set
    (tmp_path / "owner" / "name").mkdir(parents=True)
    table = datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 2, -1, 1]})
    labels = datasets.ClassLabel(names=["neutral", "entailment", "contradiction"])
    table.cast_column("label", labels).to_parquet("owner/name/test.parquet")
    read = ftft.read("owner/name:test")
    assert [read.names[i] for i in read.labels] == ["neutral", "contradiction", "entailment"]
    assert read.texts == [("a",), ("b",), ("d",)]


def test_the_built_in_task_is_what_its_docstring_says():
    sets, planted = ftft.built_in()
    for kind, share in (("train", 0.88), ("id", 0.9), ("ood", 1 / 3), ("adversarial", 0.0)):
        day = ["mtw".index(text[0]) for (text,) in sets[kind].texts]  # monday, tuesday, wednesday
        right = np.mean(day == sets[kind].labels.numpy())
        assert right == pytest.approx(share, abs=0.03 if share else 0)
    assert planted["shortcut-breaking"].mean() == pytest.approx(0.1, abs=0.01)
    assert planted["mislabelled"].mean() == pytest.approx(0.03, abs=0.01)


# ------------------------------ measuring


@pytest.mark.parametrize("names", [["ENTAILMENT", "Neutral", "contradiction"], ["c", "e", "n"]])
def test_any_classifier_is_scored_by_the_names_of_its_classes(names, tmp_path, capsys):
    model, items = encoder(), rows(40, 5)
    with torch.no_grad():  # a new model gives most rows one class: centre its logits
        inputs = vocabulary()(pairs(items), padding=True, return_tensors="pt")
        model.classifier.bias -= model.eval()(**inputs).logits.mean(0)
        answers = model(**inputs).logits.argmax(1).tolist()
    folder = save(tmp_path / "model", model, id2label=dict(enumerate(names)))
    test = write(tmp_path / "same.jsonl", items)
    hans = write(tmp_path / "hans.csv", relabelled(items, merge))
    measuring.main([folder, "--test", f"id={test}", f"ood={hans}", "--json"])
    (scores,) = json.loads(capsys.readouterr().out)["methods"].values()
    said = [next(label for label in NLI if label[0] == names[i][0].lower()) for i in answers]
    for form, score in zip((str, merge), scores.values(), strict=True):
        right = [form(a) == form(row["label"]) for a, row in zip(said, items)]
        assert score["score"] == pytest.approx(100 * np.mean(right))


def test_what_cannot_be_scored_is_refused_in_a_line(tmp_path, models, refused):
    test = write(tmp_path / "same.jsonl", rows(9))
    for folder, named in ((models[0], "classifier.bias"), (f"{tmp_path}/0", "cannot be loaded"),
                          (save(tmp_path / "numbered", encoder()), "label_0, label_1")):
        assert named in refused(measuring.main, [folder, "--test", f"id={test}"])


def answered(n, right, classes=2, seed=0):
    """Answers (2, n) of which a share is right."""
    gold = np.random.default_rng(seed).integers(classes, size=n)
    return np.stack([np.where(np.arange(n) < right * n, gold, (gold + 1) % classes), gold])


def test_intervals_are_those_of_the_normal_approximation():
    n, runs = 2000, {}
    for folder, seed in (("a", 0), ("b", 1)):
        one, other = (answered(n, share, seed=seed) for share in (0.8, 0.7))  # 10% differ
        runs[folder] = ABOUT, {"org/one/id/x": one, "erm/id/x": other}
    single, both = measuring.compare({"a": runs["a"]}, "erm"), measuring.compare(runs, "erm")
    for found, mean, variance in ((single["methods"]["org/one"], 80, 0.8 * 0.2),
                                  (single["differences"]["org/one - erm"], 10, 0.1 * 0.9),
                                  (both["runs"]["erm, b"], 70, 0.7 * 0.3),
                                  (both["differences"]["org/one - erm"], 10, 0.1 * 0.9)):
        half = 196 * (variance / n) ** 0.5
        interval = [found["x"]["low"], found["x"]["high"]]
        assert interval == pytest.approx([mean - half, mean + half], abs=0.25)
        assert found["x"]["score"] == pytest.approx(mean)


def test_differences_vary_with_the_runs_as_well():
    def difference(*shares):
        runs = {i: (ABOUT, {"ftft/id/x": answered(5000, share), "erm/id/x": answered(5000, 0.5)})
                for i, share in enumerate(shares)}
        return measuring.compare(runs, "erm")["differences"]["ftft - erm"]["x"]
    steady, wavering = difference(0.6, 0.6, 0.6, 0.6), difference(0.4, 0.5, 0.6, 0.9)
    assert steady["score"] == wavering["score"] == pytest.approx(10) and steady["low"] > 9
    assert wavering["low"] < 0 and wavering["high"] > 20


@pytest.mark.parametrize("metric", ["accuracy", "macro-f1"])
def test_scores_on_resamples_equal_metrics_on_repeated_examples(metric):
    said, true = answered(50, 0.6, classes=3)
    draws, scores = measuring.resamples(50), measuring.bootstrap(said, true, metric)
    for times, score in zip(draws[:20], scores):
        repeated = [np.repeat(part, times.astype(int)) for part in (said, true)]
        assert times.sum() == 50 and score == pytest.approx(100 * ftft.metrics(*repeated)[metric])
    assert (draws[0] == 1).all() and draws[1:].std() > 0.9


def a_run(scores, **more):
    """run.json of a run with these dev scores after 10, 20, .. of 120 steps."""
    phases = {name: {"examples": 10, "seconds": 1.0, "budget": 120, "erm_flops": 12,
                     "steps": 10 * len(curve), "flops": len(curve),
                     "dev": [[10 * i, score] for i, score in enumerate(curve, 1)]}
              for name, curve in scores.items()}
    costs = {"erm": 1.0, "ftft": 0.35, "random": 0.1}
    return ABOUT | {"phases": phases, "cost": {name: costs[name] for name in scores}} | more


def test_the_tables_give_mean_and_sample_deviation_over_runs():
    run = a_run({"erm": [0.5]})  # within the warm-up
    runs = {share: (run, {"erm/id/x": answered(20, share)}) for share in (0.5, 0.6, 0.8)}
    scores, training = measuring.tables(measuring.compare(runs, "erm"))
    assert scores[:4] == [["", "ID"], ["", "x"], ["n", "20"], ["erm", "63.3 ± 15.3"]]
    assert training == [["", "cost", "examples", "seconds", "dev", "reached", "ERM then"],
                        ["erm", "1.00 ± 0.00", "10 ± 0", "1 ± 0", "-", "-", "-"]]
    assert len(scores) == 7 and measuring.lay_out(scores, True).splitlines()[:3] == [
        "|  | ID |", "| --- | --- |", "|  | x |"]


def test_the_speed_of_learning_is_read_off_the_dev_curves():
    # The first score of each is within the warm-up and does not count.
    run = a_run({"erm": [0.9, 0.5, 0.4, 0.6, 0.7, *[0.5] * 7], "ftft": [0.9, 0.6, 0.75, 0.7, 0.7],
                 "random": [0.8, 0.6, 0.5]})
    told = measuring.compare({"a": (run, {}), "b": (run, {})}, "erm")["training"]
    for name, *wanted in (("erm", 70, 5 / 12, 70), ("ftft", 75, 1 / 4, 60),
                          ("random", 60, None, None)):
        found = [told[name][key] for key in ("dev", "reached", "ERM then")]
        assert found == [[pytest.approx(number)] * 2 for number in wanted]


def test_what_is_planted_and_what_runs_agree_on_is_told_of_the_kept_rows():
    breaking = np.flatnonzero(ftft.built_in()[1]["shortcut-breaking"]).tolist()
    runs, config = {}, ABOUT["config"] | {"task": "built-in"}
    for name, rows in ("a", breaking[:8]), ("b", breaking[2:8] + [0, 1]):
        kept = {"ftft": {"rows": rows, "hardest": None, "classes": {}}}
        runs[name] = a_run({"erm": [], "ftft": []}, config=config, selected=kept), {}
    told = measuring.compare(runs, "erm")["training"]
    assert told["ftft"]["shortcut-breaking"] == [100, 75] and told["ftft"]["again"] == [75]
    assert told["erm"]["shortcut-breaking"] == pytest.approx([9.8, 9.8], abs=0.1)


def test_test_labels_go_by_name_and_rows_of_the_training_set_are_counted(tmp_path):
    labels = "Spam not-x x non-x non-x non-x".split()
    items = [{"text": word, "label": label} for word, label in zip(WORDS, labels)]
    test = write(tmp_path / "test.csv", [*items[2:], {"text": "now", "label": "SPAM"}])
    cfg = settings("--train", write(tmp_path / "train.csv", items[:5]), "--test", f"ood={test}")
    tests, lines = measuring.read_tests(cfg)
    assert tests["ood", "test"].labels.tolist() == [3, 1, 1, 1, 0]  # a class, not all but x
    assert len(lines) == 1 and "5 rows; 3 are training rows, too: ('blue',)" in lines[0]


def test_learning_curves_begin_after_the_reference_and_end_at_the_cost(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(measuring.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    run = a_run({"ftft": [0.5, 0.5, 0.6], "erm": [0.5, 0.7, *[0.8] * 10]})
    measuring.draw_learning_curves(tmp_path, run)
    curve, cross, _ = figures[0].axes[0].lines  # of the cost of 0.35, 0.1 is the reference's
    assert [*curve.get_xdata()] == pytest.approx([0.1 + i / 12 for i in (1, 2, 3)])
    assert (cross.get_marker(), *cross.get_data()) == ("x", [0.35], [60])
    (drop,), = (lines.get_segments() for lines in figures[0].axes[0].collections)
    np.testing.assert_allclose(drop, [[0.35, 60], [0.35, 80]])  # to what ERM had reached


# ------------------------------ whole runs


def test_a_run_leaves_what_the_readme_lists_and_its_models_answer_as_scored(finished):
    assert {path.name for path in Path(finished.out).iterdir()} == {
        "ref", "ftft", "hard", "easy", "random", "erm", "dm", "run.json", "selected.json",
        "predictions.npz", "results.json", "log.txt", "data_map.png", "learning_curves.png"}
    command = re.search("ftft.py (.*)", Path(finished.out, "ftft", "README.md").read_text())[1]
    assert ftft.settings(shlex.split(command)) == finished
    for name, scores in read_json(finished.out, "results.json").items():
        classify = transformers.pipeline("text-classification", f"{finished.out}/{name}", device=-1)
        for form, items, found in ((str, rows(20, 2), scores["id"]["same"]),
                                   (merge, rows(20, 3), scores["ood"]["hans"])):
            said = [form(classify({"text": premise, "text_pair": hypothesis})["label"])
                    for premise, hypothesis in pairs(items)]
            gold = [form(row["label"]) for row in items]
            right = [a for a, b in zip(said, gold) if a == b]
            f1 = [2 * right.count(label) / (said + gold).count(label) for label in {*said, *gold}]
            assert found == pytest.approx(
                {"accuracy": len(right) / 20, "macro-f1": np.mean(f1), "n": 20})


def test_runs_that_differ_are_not_shown_as_one(finished, tmp_path, refused):
    run, first = read_json(finished.out), tmp_path / "first"
    shutil.copytree(finished.out, first)
    phases = {name: phase for name, phase in run["phases"].items() if name != "easy"}
    for named, changes in (("models", {"phases": phases}), ("training set", {"fingerprints": []}),
                           ("epochs", {"config": run["config"] | {"epochs": 9}}),
                           ("did not finish", {"cost": {}})):
        (first / "run.json").write_text(json.dumps(run | changes))
        assert named in refused(measuring.main, [finished.out, str(first)])
    (first / "run.json").write_text(json.dumps(run | {"config": run["config"] | {"seed": 1}}))
    measuring.main([finished.out, str(first)])
    for wrong, named in (("--against erm-s", "give one of"), ("--test id=x", "is a run; name")):
        assert named in refused(measuring.main, [str(first), *wrong.split()])
    answers = np.load(first / "predictions.npz")
    np.savez(first / "predictions.npz", **{name: answers[name][:, ::-1] for name in answers})
    assert "test sets" in refused(measuring.main, [finished.out, str(first)])


def test_a_figure_that_fails_costs_no_score(finished, tmp_path, monkeypatch, refused, capfd):
    monkeypatch.setattr(measuring, "draw_data_map", lambda *_: 1 / 0)
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    (run / "results.json").unlink()
    measuring.main([str(run)])
    assert "no figure (division by zero)" in capfd.readouterr().err
    assert read_json(run, "results.json") == read_json(finished.out, "results.json")
    (run / "results.json").unlink()
    (run / "run.json").write_text(json.dumps(read_json(run) | {"fingerprints": ["another"]}))
    assert "restore its training set" in refused(measuring.main, [str(run)])


def test_selected_rows_are_those_of_the_data_map_and_described(finished):
    selected = read_json(finished.out, "selected.json")
    told = measuring.compare(measuring.load_runs([finished.out]), "erm")["training"]
    labels = [row["label"] for row in rows(48)]
    for method, source in (("ftft", "ref"), ("dm", "erm"), ("hard", "ref"), ("easy", "ref")):
        saved = np.load(Path(finished.out, source, "dynamics.npz"))
        p = np.exp(saved["logits"][1:]) / np.exp(saved["logits"][1:]).sum(-1, keepdims=True)
        p = np.take_along_axis(p, saved["labels"][None, :, None], -1)[..., 0]  # without epoch 1
        score = {"hard": p.mean(0), "easy": -p.mean(0)}.get(method, -p.std(0))
        kept, hardest = (np.argsort(x, kind="stable")[:24] for x in (score, p.mean(0)))
        found = selected[method]
        assert found["rows"] == sorted(kept.tolist()) and found["fraction"] == 0.5
        assert found["hardest"] == pytest.approx(len({*kept} & {*hardest}) / 24, abs=1e-4)
        for name, shares in found["classes"].items():
            mine = [labels[row] for row in kept].count(name) / 24
            assert shares == pytest.approx([mine, labels.count(name) / 48], abs=1e-4)
            shown = told[method][name] + told["erm"][name] + told[method]["hardest"]
            assert shown == [100 * share for share in (*shares, found["hardest"])]
    chosen = selected["random"]["rows"]
    assert chosen == sorted({*chosen}) and len(chosen) == 24


def test_costs_count_real_tokens_and_the_reference(finished):
    run = read_json(finished.out)
    tokens = 3 * sum(map(len, vocabulary()(pairs(rows(48)))["input_ids"]))  # in 3 epochs
    for phase in (run["phases"]["ref"], run["phases"]["erm"]):
        assert (phase["tokens"], phase["examples"]) == (tokens, 3 * 48)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(f"{finished.out}/erm")
    size = sum(p.numel() for name, p in model.named_parameters() if "embeddings.w" not in name)
    flops = {name: phase["flops"] for name, phase in run["phases"].items()}
    assert flops["erm"] == 6 * size * tokens
    sources = {"ftft": flops["ref"], "hard": flops["ref"], "easy": flops["ref"],
               "dm": flops["erm"], "random": 0, "erm": 0}
    assert run["cost"] == pytest.approx(
        {name: (flops[name] + source) / flops["erm"] for name, source in sources.items()})


def test_large_main_models_learn_at_half_the_rate(task, tmp_path, monkeypatch):
    for size, lr in ((199e6, 2e-5), (201e6, 1e-5)):
        monkeypatch.setattr(ftft, "backbone_size", lambda model: size)
        cfg = main([*task[2:-4], "--methods", "erm", "--epochs", "1", "--out", f"{tmp_path}/{lr}"])
        assert read_json(cfg.out)["phases"]["erm"]["lr"] == lr


def test_layers_that_are_used_twice_count_twice():
    one, four = (encoder("albert", num_hidden_layers=n, embedding_size=8) for n in (1, 4))
    layer = sum(p.numel() for p in four.albert.encoder.albert_layer_groups.parameters())
    assert ftft.backbone_size(four) - ftft.backbone_size(one) == 3 * layer


def results(folder):
    """What a run of ftft is for, to the byte."""
    names = ("ref/dynamics.npz", "ref/model.safetensors", "ftft/model.safetensors")
    contents = [Path(folder, name).read_bytes() for name in names]
    return contents, read_json(folder, "selected.json")["ftft"], read_json(folder)["cost"]["ftft"]


def test_saved_dynamics_serve_a_run_on_the_same_rows_only(task, finished, tmp_path, refused):
    reuse = [*task[2:], "--dynamics", f"{finished.out}/ref"]
    out = Path(main([*reuse, "--out", f"{tmp_path}/run"]).out)
    (out / "ref").symlink_to(Path(finished.out, "ref"))  # the rest is of its own
    assert results(out) == results(finished.out)  # the same, whatever ran between
    assert "another training set" in refused(main, [*reuse, "--limit", "47"])


def test_early_stopping_keeps_the_best_weights_and_erm_runs_on(task, tmp_path):
    wrong = dict(zip(NLI, NLI[1:] + NLI[:1]))  # as training goes on, the dev score falls
    unseen = [{**row, "premise": "never"} for row in rows(60, 1)]  # a word not trained on
    dev = write(tmp_path / "dev.tsv", relabelled(unseen, wrong.get))
    cfg = main([*task, "--methods", "ftft", "erm", "erm-es", "--epochs", "12",
                "--metric", "macro-f1", "--out", f"{tmp_path}/run"])
    phases = read_json(cfg.out)["phases"]
    scores = {name: [score for _, score in phases[name]["dev"]] for name in cfg.methods}
    assert [step for step, _ in phases["erm"]["dev"]] == [6 * i for i in range(1, 13)]
    assert scores["erm-es"] == scores["erm"][:len(scores["erm-es"])]
    for name, counted in scores.items():
        counted = counted[1:]  # the first, after 6 steps, is within the warm-up of 7
        best = counted.index(max(counted))
        assert len(counted) == (11 if name == "erm" else best + 3)  # patience is 2
        assert phases[name]["steps"] == 6 * (1 + len(counted))
        answers = measuring.score(name, Path(cfg.out, name), cfg, {("id", ""): ftft.read(dev)})
        assert ftft.metrics(*answers[f"{name}/id/"])["macro-f1"] == max(counted)
    assert phases["ftft"]["steps"] < 72 == phases["erm-es"]["budget"]


def test_an_unusual_model_trains_and_without_a_dev_set_for_a_third_of_erms_steps(task, tmp_path):
    odd = save(tmp_path / "odd", encoder("distilbert"))
    main([*task[:-2], "--main", odd, "--out", f"{tmp_path}/run"])
    assert read_json(tmp_path / "run")["phases"]["ftft"]["steps"] == 6  # ERM's: 3 epochs of 6


def test_the_files_of_their_authors_train_and_score(tmp_path, models):
    sentences, dash = ("sentence1", "sentence2", "gold_label"), lambda x: x.replace("neutral", "-")
    files = {"multinli_1.0/multinli_1.0_train": (sentences, str),
             "multinli_1.0/multinli_1.0_dev_matched": (sentences, dash),
             "multinli_1.0/multinli_1.0_dev_mismatched": (sentences, dash),
             "heuristics_evaluation_set": (sentences, merge),
             "wanli/test": (("premise", "hypothesis", "gold"), str)}
    for part in ("R1/dev", "R2/dev", "R3/dev", "R1/test", "R2/test", "R3/test"):
        files[f"anli_v1.0/{part}"] = ("context", "hypothesis", "label"), lambda label: label[0]
    for path, (columns, form) in files.items():
        write(tmp_path / f"{path}.jsonl", renamed(rows(30), columns, form))
    texts = [{"labels": i % 2, "text": f'{WORDS[i]} "q"'} for i in (0, 1, 2) * 10]
    rounds = [f"r{r}_{form}" for r in (2, 3, 4) for form in ("original", "perturbation")]
    for path in ("cad/cad_uid", *(f"dynahate/{name}" for name in rounds)):
        for part in ("train", "dev", "test"):
            write(tmp_path / f"{path}.{part}", texts)
    for options, sets in (([], measuring.TESTS["nli"]),
                          (["--task", "hsd", "--out", f"{tmp_path}/b"], measuring.TESTS["hsd"])):
        cfg = main(["--ref", models[0], "--main", models[1], "--data", str(tmp_path), "--epochs",
                    "2", "--batch-size", "8", "--out", f"{tmp_path}/a", *options])
        measuring.main([cfg.out])
        assert [*np.load(f"{cfg.out}/predictions.npz")] == [
            f"{name}/{kind}/{test}" for name in ("ref", "ftft") for kind, test, *_ in sets]


def test_a_folder_laid_out_as_deberta_v3_on_the_hub_loads_in_float32(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(row["hypothesis"] for row in rows(200)), minloglevel=2, vocab_size=30,
        model_prefix=f"{tmp_path}/spm", pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]")
    encoder("deberta-v2").config.to_json_file(tmp_path / "config.json")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    stored = encoder("deberta-v2").deberta.half().state_dict()
    torch.save({f"deberta.{name}": weight for name, weight in stored.items()},
               tmp_path / "pytorch_model.bin")
    model, tokenizer = ftft.load(str(tmp_path), "cpu", NLI)
    torch.testing.assert_close(model.deberta.embeddings.word_embeddings.weight,
                               stored["embeddings.word_embeddings.weight"].float())
    decoded = tokenizer.decode(tokenizer("red cat", "dog")["input_ids"])
    assert decoded == "[CLS] red cat[SEP] dog[SEP]" and model.dtype == torch.float32


@pytest.mark.parametrize("prefix, config, tokenizer, named", [
    ("own.", {}, None, "would be random"), ("bert.", {"vocab_size": 99}, None, "would be random"),
    ("bert.", {"num_hidden_layers": 2}, None, "would be random"),
    ("bert.", {}, vocabulary(padding_side="left"), "pad on the right"),
    ("bert.", {}, None, "token 47")])
def test_a_model_unlike_its_files_is_refused(prefix, config, tokenizer, named, tmp_path, refused):
    model = encoder(vocab_size=40)
    weights = {prefix + key: weight for key, weight in model.bert.state_dict().items()}
    folder = save(tmp_path / "model", model, tokenizer, weights, **config)
    examples = ftft.Examples([("never 29",)], torch.tensor([0]), NLI)
    said = refused(lambda: ftft.encode(*ftft.load(folder, "cpu", NLI), examples, settings()))
    assert named in said and folder in said and said.count(",") < 6  # five names at most


@pytest.mark.parametrize("names, stays", [
    (["Contradiction", "ENTAILMENT", "neutral"], True),
    (["entailment", "neutral", "contradiction"], False), (NLI[:2], False)])
def test_a_trained_head_stays_only_with_the_same_classes_in_the_same_order(names, stays, tmp_path):
    model = encoder("bert", num_labels=len(names), problem_type="regression")
    folder = save(tmp_path, model, id2label=dict(enumerate(names)), pad_token_id=None)
    loaded, _ = ftft.load(folder, "cpu", NLI)
    assert torch.equal(loaded.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert stays == torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert loaded.classifier.out_features == 3 and loaded.config.pad_token_id == 0
    assert [*loaded.config.id2label.values()] == NLI and loaded.config.problem_type is None


@pytest.mark.parametrize("kind, most", [("bert", 20), ("roberta", 18), ("deberta-v2", 40)])
def test_inputs_are_cut_at_what_the_model_and_the_tokenizer_can_take(kind, most, tmp_path):
    text = ftft.Examples([("7 " * 60,)], torch.tensor([0]), NLI)
    tokenizer = vocabulary(1 if kind == "roberta" else 0)
    short = save(tmp_path / "a", encoder(kind, max_position_embeddings=20), tokenizer)
    model, tokenizer = ftft.load(short, "cpu", NLI)
    data = ftft.encode(model, tokenizer, text, settings("--max-length", "40"))
    assert data.lengths.item() == most
    assert model(**ftft.collate(data, [0], "cpu")).logits.isfinite().all()
    tokenizer.model_max_length = 12
    long = ftft.load(save(tmp_path / "b", encoder(kind), tokenizer), "cpu", NLI)
    assert ftft.encode(*long, text, settings()).lengths.item() == 12


def test_the_readme_gives_the_lines_of_the_sections_of_ftft():
    path, rule = Path(ftft.__file__), "# " + 30 * "-" + " "
    lines = enumerate(path.read_text().splitlines(), 1)
    sections = [(str(i), line.removeprefix(rule)) for i, line in lines if line.startswith(rule)]
    told = re.findall(r"^\| (\d+) \| ([^|]+) \|", path.with_name("README.md").read_text(), re.M)
    assert told == sections and len(told) == 10


# ------------------------------ crashes, several processes and bad input


def start(argv, *launcher):
    """`python ftft.py` as a process of its own, which heeds SIGINT even in a background job."""
    return subprocess.Popen([sys.executable, *launcher, ftft.__file__, *argv], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_a_run_stopped_again_and_again_goes_on_to_the_same_bytes(task, finished, tmp_path):
    out, ends, said = tmp_path / "cut", [], []
    for stop, awaited, delay in (  # in training, then at about a checkpoint, between two phases, ..
            (signal.SIGINT, "checkpoint.pt", 0), (signal.SIGKILL, "*/*", 0.4),
            (signal.SIGKILL, "*/*", 0.1), (None, "", 0)):
        known = {*out.rglob("*")}
        run = start(["--resume", str(out)] if known else [*task, "--out", str(out)])
        while stop and run.poll() is None and not {*out.glob(awaited)} - known:
            time.sleep(0.001)
        time.sleep(delay)
        if stop:
            run.send_signal(stop)
        said.append(run.communicate()[0])
        ends.append(run.returncode)
    assert said[0].endswith(f"stopped; to continue: python ftft.py --resume {out}\n"), said
    assert ends[:2] == [130, -signal.SIGKILL] and ends[-1] == 0, said
    assert "Traceback" not in said[0] and results(out) == results(finished.out)
    assert (out / "results.json").exists() and not (out / "checkpoint.pt").exists()


def test_after_a_full_disk_a_run_goes_on_as_it_was(task, finished, tmp_path, monkeypatch, refused):
    out, numbers, save = tmp_path / "cut", iter(range(1, 99)), torch.save
    def save_four(state, path):
        if next(numbers) == 5:
            raise OSError(28, "No space left on device")
        save(state, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_four)
        assert "--resume" in refused(main, [*task, "--out", str(out)])
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["done"]["steps"] == 6  # the fourth of 12 points in 18 steps
    write(tmp_path / "train.jsonl", rows(47))
    assert "the data or" in refused(main, ["--resume", str(out)])
    write(tmp_path / "train.jsonl", rows(48))
    main(["--resume", str(out)])
    assert results(out) == results(finished.out) and not [*out.glob("*.p*t*")]


def test_two_processes_give_what_one_gives(task, tmp_path, monkeypatch, refused):
    model = encoder("big_bird", attention_type="original_full")
    model.classifier.out_proj.weight.data *= 3  # to clip some gradients: AdamW sees no scale
    steady = save(tmp_path / "steady", model)  # this model's pooler gets no gradient
    monkeypatch.chdir(tmp_path)  # 41 rows: the last batch has one, and a process none
    task += ["--ref", steady, "--main", steady, "--limit", "41", "--grad-accum", "2"]
    two = start(task, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said, _ = two.communicate()
    assert two.returncode == 0 and said.count("cost: relative to ERM") == 1, said
    assert [*map(str, Path("runs").iterdir())] == ["runs/train-1"]  # the processes agree on it
    assert main(task).out == "runs/train-2"
    logits, selected, losses = [], [], []
    for run in ("runs/train-1", "runs/train-2"):
        logits.append(np.load(f"{run}/ref/dynamics.npz")["logits"])
        selected.append(read_json(run, "selected.json"))
        lines = Path(run, "log.txt").read_text().split("loss ")[1:]
        losses.append([float(line.split(",")[0]) for line in lines])
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert selected[0] == selected[1] and len(losses[1]) > 12
    assert losses[0] == pytest.approx(losses[1], abs=0.002)  # of all rows, not of a share
    assert "number of processes (2)" in refused(main, ["--resume", "runs/train-1"])


@pytest.mark.parametrize("part, wanted, amp, named", [
    ("memory", [0], "off", "--grad-accum"), ("gradient", [35], "off", "by step 36"),
    ("gradient", range(99), "fp16", "or divergence"), ("logit", [2], "off", "ref: overflow"),
    ("logit", [2], "fp16", "start anew with a lower learning rate")])
def test_a_step_that_fails_ends_the_run_in_a_line(
        part, wanted, amp, named, task, tmp_path, monkeypatch, refused):
    steps, load = iter(range(99)), ftft.load
    def spoil(tensor):
        if next(steps) not in wanted:
            return tensor
        if part == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tensor.index_fill(1, torch.tensor([2]), math.inf)  # one class or one column
    def load_faulty(*args):
        model, tokenizer = load(*args)
        if part == "logit":
            model.classifier.register_forward_hook(lambda _, inputs, logits: spoil(logits))
        else:
            model.classifier.weight.register_hook(spoil)
        return model, tokenizer
    monkeypatch.setattr(ftft, "load", load_faulty)
    argv = [*task[:-2], "--epochs", "6", "--amp", amp, "--out", f"{tmp_path}/run"]  # 36 steps
    assert named in refused(main, argv)
    assert not read_json(tmp_path / "run")["phases"] and not (tmp_path / "run" / "ref").exists()


class Bomb(str):  # a path, where a file is made as soon as this is unpickled
    def __reduce__(self):
        return open, (str(self), "w")


def test_nothing_in_a_file_is_executed(task, tmp_path, refused):
    hit, code, objects = tmp_path / "hit", tmp_path / "code", tmp_path / "objects"
    weights = Path(save(tmp_path / "weights", encoder()))
    (weights / "model.safetensors").unlink()
    (weights / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(hit), 2))
    save(code, encoder(), model_type="own", auto_map={
        "AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"})
    (code / "own.py").write_text(f"open({str(hit)!r}, 'w')\nclass Own: pass\n")
    objects.mkdir()
    np.savez(objects / "dynamics.npz", logits=np.array([Bomb(hit)], object))
    for argv in ([*task, "--main", str(weights)], [*task, "--main", str(code)],
                 [*task[2:], "--dynamics", str(objects)]):
        assert argv[-1] in refused(main, argv) and not hit.exists()


ONE = {"text": "red", "label": "a"}
BAD = {  # more arguments or what the training file holds, and what the line must name
    "missing file": ("--train nowhere.jsonl", "nowhere.jsonl: cannot be read ("),
    "empty file": ([], "labelled row"), "not utf-8": ("--train latin.jsonl", "cannot be read"),
    "a quote that is never closed": ("--train open.csv", "cannot be read"),
    "no label column": ([{"text": "red"}], "has columns text; name them label"),
    "a line that is no object": ([ONE, [1]], "line 2"),
    "labels that differ in case": ([ONE, {**ONE, "label": "A"}], "differ in case only, of A, a;"),
    "settings beside those of a run": ("--resume . --seed 0", "give no other"),
    "a label that is a list": ([ONE, {"text": "red", "label": []}], "line 2"),
    "more fields than columns": ("--train wide.csv", "line 3: has a wrong count"),
    "one class only": ([ONE] * 40, "one class"),
    "single texts against pairs": ([{**ONE, "label": label} for label in NLI * 20], "the same in"),
    "a label unknown to training": ("--test id=odd.jsonl", "line 2: label other is none of"),
    "a test set without a kind": ("--test odd.jsonl", "id=FILE"),
    "two sets of one name": ("--test ood=same.jsonl", "called same"),
    "a fraction below a batch": ("--fraction 0.1", "less than a batch"),
    "no reference": ("--ref ''", "--ref"), "no training set": ("--train ''", "--train is missing"),
    "the built-in task and data": ("--train '' --task built-in", "--task built-in"),
    "own data and a task": ("--task hsd", "--train: leave out --task"),
    "a built-in model on other data": ("--main built-in-4x128", "built-in task only"),
    "a reference and another's dynamics": ("--dynamics .", "--dynamics replaces --ref"),
    "dynamics of no use": ("--dynamics . --ref '' --methods random", "none of the --methods"),
    "too short inputs": ("--max-length 7", "--max-length 7: must be at least 8"),
    "too many names": ("--test id=odd.jsonl --train many.jsonl", "and 15 more"),
    "an epoch too many left out": ("--skip-epochs 2", "--epochs 3: a data map needs two"),
    "no such device": ("--device abacus", "abacus"),
    "a model folder without config": ("--main .", ".: cannot be loaded"),
    "a folder that exists": ("--out .", "--out")}


@pytest.mark.parametrize("bad, named", BAD.values(), ids=BAD)
def test_bad_input_ends_in_a_line_and_exit_code_2(bad, named, task, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wide.csv").write_text("text,label\nred,a\nred, green,b\n")
    (tmp_path / "open.csv").write_text('text,label\n"red,a\n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xff", "label": "a"}\n')
    write(tmp_path / "odd.jsonl", [*rows(1), *relabelled(rows(1), lambda label: "other")])
    write(tmp_path / "many.jsonl", [{**rows(1)[0], "label": i} for i in range(20)] * 2)
    more = shlex.split(bad) if isinstance(bad, str) else []
    if not more:
        write(tmp_path / "train.jsonl", bad)
    before = sorted(tmp_path.rglob("*"))
    assert named in refused(main, [*task, "--out", "run", *more])
    assert sorted(tmp_path.rglob("*")) == before
