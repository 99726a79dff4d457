"""What ftft.py and eval.py promise, checked by independent routes: python -m pytest (offline)."""
import contextlib
import copy
import csv
import json
import math
import os
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
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eval as measuring
import ftft

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
torch.accelerator.current_accelerator = lambda *_, **__: None  # whole runs take the CPU
DEBERTA = dict(relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
               share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
               type_vocab_size=0)
WORDS = "red green blue cat dog bird runs sleeps sings here there now never".split()
NLI = ["contradiction", "entailment", "neutral"]  # label i goes with the word WORDS[i]
HANS = dict(zip(NLI, ["non-entailment", "entailment", "non-entailment"]))
ABOUT = {"config": {"metric": "accuracy", "train": "x"}, "phases": {}, "selected": {}}
EVERY_WORD = ftft.Encoded({"input_ids": torch.arange(48)}, *5 * [0])  # all in use
Killed = GeneratorExit  # for SIGKILL: nothing catches it


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=cuda)])
def device(request):
    return request.param


def rows(n, seed=0):
    """n premise-hypothesis rows whose label follows from the first word of the hypothesis."""
    rng = np.random.default_rng(seed)
    some = lambda low, high: " ".join(rng.choice(WORDS[3:-1], rng.integers(low, high)))
    return [{"premise": some(2, 9), "hypothesis": f"{WORDS[i]} {some(1, 5)}", "label": NLI[i]}
            for i in rng.integers(3, size=n)]


def relabel(items, form):
    return [{**row, "label": form(row["label"])} for row in items]


def as_examples(items):
    texts = [(row["premise"], row["hypothesis"]) for row in items]
    return ftft.Examples(texts, torch.tensor([NLI.index(row["label"]) for row in items]), NLI)


def write(path, items):
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(item) + "\n" for item in items)
        else:
            table = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            table.writerows([items[0], *(item.values() for item in items)])
    return str(path)


def read_json(folder, name="run.json"):
    return json.loads(Path(folder, name).read_text())


def encoder(kind="bert", dropout=0.0, **more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                 intermediate_size=32, num_labels=3, hidden_dropout_prob=dropout,
                 attention_probs_dropout_prob=dropout)
    sizes |= DEBERTA if kind == "deberta-v2" else {"max_position_embeddings": 514}
    config = transformers.AutoConfig.for_model(kind, **sizes | more)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def vocabulary(words=WORDS, **more):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *map(str, range(30))]
    return transformers.BertTokenizer({word: i for i, word in enumerate(words)}, **more)


def token_data(lengths, most, pad, device="cpu"):
    """Encoded examples of these lengths and random tokens, 5 to most - 1."""
    tokens = torch.randint(5, most, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    lengths, labels = torch.tensor(lengths), torch.arange(len(lengths)) % 3
    ends = lengths.cumsum(0)
    place = (x.to(device) for x in (ends - lengths, ends, labels))
    return ftft.Encoded({"input_ids": tokens.int().to(device)}, *place, lengths, pad)


def batch_of(data, rows):
    rows = torch.tensor(rows)
    return ftft.collate(data, rows.to(data.labels.device), data.lengths[rows].max().item())


def save(folder, model, tokenizer=None, weights=None, **config):
    """A model's folder, perhaps with another config."""
    model.save_pretrained(folder, state_dict=weights)
    (tokenizer or vocabulary()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(read_json(folder, "config.json") | config))
    return str(folder)


def arguments(folder, models):
    """Arguments of a small run on files of its own: --ref first, --lr and --dev last, no --out."""
    return ["--ref", models[0], "--main", models[1],
            "--train", write(folder / "train.jsonl", rows(48)),
            "--test", "id=" + write(folder / "same.jsonl", rows(20, 2)),
            "ood=" + write(folder / "hans.csv", relabel(rows(20, 3), HANS.get)),
            *"--batch-size 8 --epochs 3 --fraction 0.5 --ref-lr 0.02 --lr 0.01 --dev".split(),
            write(folder / "dev.tsv", rows(20, 1))]


def main(argv, out):
    """What `python ftft.py` does with these arguments, up to the scoring."""
    cfg = ftft.settings([*argv, "--out", str(out)])
    training = ftft.read(cfg.train, limit=cfg.limit)
    dev = [ftft.read(source, training) for source in cfg.dev]
    measuring.read_tests(cfg, training)
    ftft.main(cfg, training, dev)
    return cfg


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a reference and a main model, in fp16 and without a head."""
    folder = tmp_path_factory.mktemp("models")
    return [save(folder / f"layers-{n}", encoder(dropout=0.1, num_hidden_layers=n).bert.half())
            for n in (1, 2)]


@pytest.fixture
def task(tmp_path, models):
    return arguments(tmp_path, models)


@pytest.fixture(scope="session")
def a_run(tmp_path_factory, models):
    """A run of several methods, done and scored; not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    argv = [*arguments(folder, models), "--methods", "ftft", "hard", "easy", "random", "dm"]
    cfg = main(argv, folder / "run")
    measuring.main([cfg.out])
    cfg.argv = argv
    return cfg


@pytest.fixture
def refused(capfd):
    """Call what is to end the program; returns the line that says why."""
    def call(function, *args):
        with pytest.raises(SystemExit, match="2"):
            function(*args)
        return capfd.readouterr().err.splitlines()[-1]
    return call


def settings(*more):
    return ftft.settings(["--train=t", "--ref=r", "--main=m", "--batch-size=8", *more])


def encoded(items, device="cpu"):
    cfg = settings("--max-length", "9")
    return ftft.encode(encoder().to(device), vocabulary(), as_examples(items), cfg)


@pytest.fixture
def fit(tmp_path):
    """Train a model on all of its data as the phase `name`; returns the dynamics."""
    def train(model, data, steps, *more, name="ref", dev=(), lr=0.01, out=None):
        cfg = settings("--out", str(out or tmp_path / str(time.time_ns())), *more)
        n = len(data.labels)
        dynamics = torch.full((steps, n, 3), -math.inf, device=model.device)
        ftft.train(name, model, data, dev, torch.arange(n), steps, lr, cfg, dynamics)
        return dynamics
    return train


# ---------- the training loop


def textbook(model, items, steps, overflow=None):
    """The same training with the tools of PyTorch and transformers; returns the dynamics."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-6, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    pairs, labels, _ = as_examples(items)
    inputs = [vocabulary()(*pair, truncation=True, max_length=9) for pair in pairs]
    lengths, every = torch.tensor([len(x["input_ids"]) for x in inputs]), torch.arange(len(items))
    dynamics = torch.full((steps, len(items), 3), -math.inf)
    order = [(epoch, batch) for epoch in range(steps)
             for batch in ftft.batches(every, lengths, 8, ftft.seed_for(0, "ref", epoch))]
    for step, (epoch, batch) in enumerate(order[:steps]):
        padded = vocabulary().pad([inputs[row] for row in batch], return_tensors="pt")
        logits = model(**padded.to(model.device)).logits
        F.cross_entropy(logits, labels[batch].to(model.device)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step != overflow:
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        dynamics[epoch, batch] = logits.detach().cpu()
    return dynamics


@pytest.mark.parametrize("pieces", ["1", "3"])
def test_training_and_dynamics_equal_a_textbook_loop(pieces, fit, device):
    model, plain, items = encoder().to(device), encoder().to(device), rows(20)
    for twin in (model, plain):
        twin.classifier.weight.data *= 30  # gradients are clipped
    ours = fit(model, encoded(items, device), 21, "--grad-accum", pieces)
    torch.testing.assert_close(ours.cpu(), textbook(plain, items, 21), atol=1e-5, rtol=1e-4)
    assert ours[:7].isfinite().all() and len({*ours[:7, 0, 0].tolist()}) == 7
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_dropout_is_on_and_its_own_in_each_step_phase_and_seed(fit):
    one, seen = encoded(rows(1)), []
    for name, seed in (("ref", "0"), ("erm", "0"), ("ref", "1")):
        for dev in [], [one]:  # evaluations in between change nothing
            model = encoder(dropout=0.2).eval()
            seen.append(fit(model, one, 6, "--seed", seed, name=name, dev=dev, lr=0.0)[:, 0, 0])
        assert torch.equal(*seen[-2:])
    assert len({*torch.cat(seen).tolist()}) == 3 * 6  # only dropout differs


def test_an_fp16_overflow_skips_the_step_and_uses_up_its_rate(fit, device):
    (model, skipped, taken), steps = (encoder().to(device) for _ in range(3)), iter(range(99))
    model.classifier.weight.register_hook(lambda x: x * (math.inf if next(steps) == 2 else 1))
    fit(model, encoded(rows(20), device), 9, "--amp", "fp16")
    textbook(skipped, rows(20), 9, overflow=2)
    textbook(taken, rows(20), 9)
    ours, skipped, taken = (torch.cat([p.detach().flatten() for p in model.parameters()])
                            for model in (model, skipped, taken))
    assert (ours - skipped).norm() < 0.1 * (ours - taken).norm()


def test_bf16_computes_in_bf16_on_float32_weights(fit, device):
    model, data = encoder().to(device), encoded(rows(32), device)
    trained, exact = (fit(model, data, 8, "--amp", amp, lr=1e-9) for amp in ("bf16", "off"))
    assert torch.equal(trained, trained.bfloat16().float()) and model.dtype == torch.float32
    torch.testing.assert_close(trained, exact, atol=0.1, rtol=0.05)
    assert not torch.equal(trained, exact)


def test_training_cut_anywhere_goes_on_to_the_same(fit, device, tmp_path, monkeypatch):
    def begin(out):
        model = encoder(dropout=0.1).to(device)
        model.classifier.weight.data *= 2000  # overflows until the scale falls
        return fit(model, data, 18, "--amp", "fp16", dev=[data], out=tmp_path / out), model
    def save_and_die(*args):
        save_checkpoint(*args)
        raise Killed
    data, save_checkpoint, cut, lives = encoded(rows(20), device), ftft.save_checkpoint, None, 0
    expected, whole = begin("whole")
    monkeypatch.setattr(ftft, "save_checkpoint", save_and_die)
    while cut is None and lives < 20:
        lives += 1
        with contextlib.suppress(Killed):
            found, cut = begin("cut")
    assert lives == 13 and torch.equal(found, expected)
    assert all(map(torch.equal, cut.parameters(), whole.parameters()))


def test_a_tie_is_no_new_best_score(fit, monkeypatch):
    model, data, weights = encoder(), encoded(rows(20)), []
    def score(*_):
        weights.append(model.classifier.weight.detach().clone())
        return {"accuracy": 0.5}
    monkeypatch.setattr(ftft, "metrics", score)
    fit(model, data, 24, name="ftft", dev=[data])
    # The first evaluation, after step 2, is within the warm-up; of the equal others one counts.
    assert len(weights) == 4 and torch.equal(model.classifier.weight, weights[1])


class Watch(TorchDispatchMode):
    """Notes what waits for the device `meta`, or mixes its tensors and the CPU's."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places = {x.device.type for x in tensors if x.dim()}
        waits = "_local_scalar_dense" in str(function) and tensors[0].is_meta  # .item()
        if tensors and (kwargs or {}).get("device"):
            places.add(kwargs["device"].type)
        if waits or len(places) > 1:
            self.noted[-1].append(function)
        return 0.0 if waits else function(*args, **kwargs or {})


@pytest.mark.parametrize("place", ["meta", pytest.param("cuda", marks=cuda)])
def test_within_a_step_the_host_never_waits(place, fit, monkeypatch, kind="deberta-v2"):
    printed = {1, 51, *range(5, 61, 5)}  # of 60 steps: these may wait
    watch, model, collate, adam = Watch(), encoder(kind, 0.1), ftft.collate, torch.optim.AdamW
    watch.noted = [[]]
    def begin_step(*args):
        if place == "cuda":
            torch.cuda.set_sync_debug_mode("default" if len(watch.noted) in printed else "error")
        watch.noted.append([])
        return collate(*args)
    if place == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        monkeypatch.setattr(torch.optim, "AdamW", lambda *x, **y: adam(*x, **y | {"fused": False}))
    monkeypatch.setattr(ftft, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(ftft, "collate", begin_step)
    ftft.leave_out(model, [EVERY_WORD])
    data = token_data([3, 9, 5, 4, 7, 8, 6, 5, 3, 9], 48, model.config.pad_token_id, place)
    with watch if place == "meta" else contextlib.nullcontext():
        fit(model.to(place), data, 60, "--batch-size", "5", "--amp", "bf16")
    waited = {step for step in range(1, 61) if watch.noted[step]}
    assert waited == (printed if place == "meta" else set())


# ---------- what makes it fast


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_a_batch_is_what_the_tokenizer_itself_pads(kind):
    words = dict(zip(["<s>", "<pad>", "</s>", "<unk>", *"Ġabcdefghijklmnopqrstuvwxyz"], range(48)))
    pieces = [(word, 0.0) for word in ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"▁abcdefghilnoprstuw"]]
    tokenizer = {"bert": vocabulary(), "roberta": transformers.RobertaTokenizer(words, []),
                 "deberta-v2": transformers.DebertaV2Tokenizer(pieces, unk_id=3)}[kind]
    pairs, labels, _ = as_examples(rows(30))
    for texts in (pairs, [pair[:1] for pair in pairs]):
        examples = ftft.Examples(texts, labels, NLI)
        data = ftft.encode(encoder(kind), tokenizer, examples, settings())
        for chosen in ([4], [29, 0, 7], [*range(30)]):
            theirs = tokenizer.pad([tokenizer(*texts[i]) for i in chosen], return_tensors="pt")
            ours = batch_of(data, chosen)
            assert {*ours} == {*theirs} and ours["input_ids"].dtype == torch.long
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("kind, heads, more", [
    ("deberta-v2", 6, {}), ("deberta-v2", 12, {}), ("deberta-v2", 16, {}),
    ("deberta-v2", 2, {"max_relative_positions": 140}),
    ("bert", 2, {}), ("roberta", 2, {}), ("electra", 2, {})])
def test_what_is_left_out_changes_no_logit_and_no_gradient(kind, heads, more, device):
    more |= {"hidden_size": 64 * heads, "num_attention_heads": heads, "num_hidden_layers": 2}
    plain = encoder(kind, **more)
    for name, weight in plain.named_parameters():
        if "query" in name or "key" in name:
            weight.data *= 6  # attention depends on positions
    fast, pad, seen = copy.deepcopy(plain), plain.config.pad_token_id, []
    data = token_data([1, 2, 127, 128, 129, 255, 256, 257, 300], 48, pad, device)
    ftft.leave_out(fast, [EVERY_WORD])
    for name, part in fast.named_modules():
        if name.endswith(("1.intermediate", "1.attention.self.key_proj")):
            part.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for batch in ([0], [1, 0], [2, 3], [4, 1], [5, 2], [6, 3], [8, 0, 7]):
        results = []
        for model in (plain.to(device), fast.to(device)):
            logits = model(**batch_of(data, batch)).logits
            loss = F.cross_entropy(logits, data.labels[batch])
            slopes = torch.autograd.grad(loss, model.parameters(), materialize_grads=True)
            results.append([logits, *slopes])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    # The last layer saw one token; of 512 positions, its keys saw two a token.
    assert seen[-3:] == [300, 512, 1] and seen[:3] == [1, 2, 1] if heads > 2 else seen[-1] == 1


@pytest.mark.parametrize("kind", ["deberta-v2", "bert", "roberta", "electra"])
def test_embeddings_not_in_use_are_left_out_and_put_back(kind, fit):
    before, plain, fast = (encoder(kind) for _ in range(3))
    pad = plain.config.pad_token_id
    whole, data = (token_data([3, 9, 5, 4, 7, 8, 6, 5, 3, 9], 30, pad) for _ in range(2))
    used = {*range(pad + 1), *data.tokens["input_ids"].tolist()}
    restore = ftft.leave_out(fast, [data])
    assert len(fast.get_input_embeddings().weight) == len(used) < 30
    fit(plain, whole, 6)
    fit(fast, data, 6)
    restore()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], weight, atol=1e-6, rtol=0)
    restored, first = (model.get_input_embeddings().weight for model in (fast, before))
    unseen = torch.tensor([i for i in range(48) if i not in used])
    assert torch.equal(restored[unseen], first[unseen]) and not torch.equal(restored, first)


# ---------- data and selection


def test_selection_keeps_exactly_k_rows_and_ties_go_to_the_lower():
    score = torch.tensor([0.0, 0.3, 0.0, 0.3, 0.1, 0.3])
    for fraction, kept in ((0.5, [1, 3, 5]), (0.33, [1, 3]), (5 / 6, [0, 1, 3, 4, 5]),
                           (1 / 6, [1]), (1, [*range(6)])):
        assert ftft.select(score, fraction).tolist() == kept
    with pytest.raises(AssertionError, match="not visited"):
        ftft.data_map(torch.full((4, 1, 3), -math.inf), torch.tensor([0]))


def test_batches_hold_each_row_once_beside_its_like_and_the_largest_is_first():
    chosen = torch.arange(0, 900, 2)
    lengths = torch.from_numpy(np.random.default_rng(0).lognormal(3.5, 0.5, 900)).long()
    a, again, b = (ftft.batches(chosen, lengths, 8, seed) for seed in (0, 0, 1))
    assert sorted(map(len, a)) == [2] + [8] * 56 and torch.equal(torch.cat(a), torch.cat(again))
    for some in (a, b):
        cells = [len(batch) * lengths[batch].max().item() for batch in some]
        assert torch.equal(torch.cat(some).sort().values, chosen)
        assert lengths[chosen].sum() / sum(cells) > 0.9  # the rest is padding
        assert cells[0] == max(cells) and cells[1:] != sorted(cells[1:])
    met, met_again = ({frozenset(batch.tolist()) for batch in some} for some in (a, b))
    assert len(met & met_again) < 5


def test_every_form_of_file_and_label_reads_the_same(tmp_path, capfd):
    items, initial = rows(12), lambda label: label[0]
    texts, labels, _ = as_examples(items)
    words, letters = (ftft.read(write(tmp_path / "train.jsonl", relabel(items, form)))
                      for form in (str, initial))
    assert words.names == NLI and letters.names == ["c", "e", "n"]
    for file, columns, form in (("a.jsonl", "premise hypothesis label", str),
                                ("b.csv", "sentence1 sentence2 gold_label", str.upper),
                                ("c.tsv", "context hypothesis gold", initial),
                                ("d.tsv", "question sentence label", str),
                                ("e.csv", "text1 text2 labels", NLI.index)):
        path = write(tmp_path / file, [{"uid": "x", **dict(zip(columns.split(), row.values()))}
                                       for row in relabel(items, form)])
        for like in (words, letters) if file != "e.csv" else [None]:
            read = ftft.read(path, like)
            assert read.texts == texts and read.names == (like.names if like else [*"012"])
            assert torch.equal(read.labels, labels)
            assert "uid" in capfd.readouterr().err.splitlines()[-1]  # a column that is not used


LONG = "red " * 40_000  # over 131,072 characters
LEGAL = [  # a file, its content, texts and labels
    ("a.csv", "id, text, label\n1, red, a\n2, blue, b\n", [" red", " blue"], ["a", "b"]),
    ("b.csv", f"text,label\n{LONG},a\nblue,b\n", [LONG, "blue"], ["a", "b"]),
    ("c.csv", '\ufefftext,label\n"red\n""so""",a\n\nblue,b\n', ['red\n"so"', "blue"], ["a", "b"]),
    ("d.csv", "text,label\nred,10.0\nblue,2\nnow,1.0\n", ["red", "blue", "now"], ["10", "2", "1"]),
    ("e.tsv", 'text\tlabel\r\n"red\ta\r\n"so" he\tb\r\nblue"\ta\r\n',
     ['"red', '"so" he', 'blue"'], ["a", "b", "a"]),
    ("f.tsv", "text\tlabel\nred\tn\nblue\tc\n", ["red", "blue"], ["n", "c"]),
    ("g.jsonl", '{"text": "red", "label": true}\n\n{"text": "so", "label": false}', ["red", "so"],
     ["True", "False"])]


@pytest.mark.parametrize("file, content, texts, labels", LEGAL, ids=[one[0] for one in LEGAL])
def test_unusual_files_are_read_as_meant(file, content, texts, labels, tmp_path):
    (tmp_path / file).write_bytes(content.encode())
    read = ftft.read(str(tmp_path / file))
    assert read.texts == [(text,) for text in texts]
    assert [read.names[i] for i in read.labels] == labels
    assert read.names == sorted({*labels}, key=lambda x: int(x) if x.isdigit() else x)


def test_unlabelled_rows_are_dropped_and_told(tmp_path, capfd, refused):
    golds = ["-", -1, "-1", "-1.0", -1.0, math.nan, None, "", " - ", *"ab" * 41]
    items = [{"text": str(i), "label": gold} for i, gold in enumerate(golds)]
    read = ftft.read(write(tmp_path / "x.jsonl", items))
    assert read.texts == [(str(i),) for i in range(9, 91)] and read.names == ["a", "b"]
    assert re.search(r"\b82\b.*\b9\b", capfd.readouterr().err)
    ftft.read(write(tmp_path / "y.csv", items[80:] + [{"text": "new", "label": "a"}]), read)
    assert re.search(r"\b12\b.*\b11\b", capfd.readouterr().err)
    assert "x.jsonl: 9 of 89" in refused(ftft.read, write(tmp_path / "x.jsonl", items[:-2]))


def test_a_hub_data_set_goes_by_its_label_names(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # whose folder owner/name stands for the Hub
    Path("owner/name").mkdir(parents=True)
    table = datasets.Dataset.from_dict({"text": [*"abcdefghij"], "label": [0, 2, -1] + [1] * 7})
    table = table.cast_column("label", datasets.ClassLabel(names=["new", "extra", "common"]))
    table.to_parquet("owner/name/test.parquet")
    read = ftft.read("owner/name:test")
    assert [read.names[i][0] for i in read.labels] == [*"nceeeeeee"]
    assert read.texts == [(letter,) for letter in "abdefghij"]


def test_the_defaults_are_those_of_the_paper():
    cfg = vars(ftft.settings(["--ref", "deberta-small", "--main", "deberta-large"]))
    anli = [f"facebook/anli:{part}_r{i}" for part in ("dev", "test") for i in (1, 2, 3)]
    mnli = [f"id=nyu-mll/multi_nli:validation_{part}" for part in ("matched", "mismatched")]
    ood = ["ood=tasksource/hans:validation", "ood=alisawuffles/WANLI:test"]
    wanted = {"train": "nyu-mll/multi_nli:train", "dev": anli[:3], "methods": ["ref", "ftft"],
              "test": [*mnli, *ood, *(f"adversarial={test}" for test in anli[3:])], "patience": 2,
              "epochs": 4, "ref_epochs": 4, "batch_size": 32, "ref_lr": 2e-5, "max_length": 300,
              "seed": 0, "fraction": 0.33, "out": "runs/multi_nli-0"}
    assert {key: cfg[key] for key in wanted} == wanted


def test_ftft_keeps_the_rows_of_the_built_in_task_that_break_its_shortcut(tmp_path):
    sets, planted = ftft.built_in()
    for kind, share in (("train", 0.88), ("id", 0.9), ("ood", 1 / 3), ("adversarial", 0.0)):
        day = ["mtw".index(text[0]) for (text,) in sets[kind].texts]  # monday, tuesday, wednesday
        assert np.mean(day == sets[kind].labels.numpy()) == pytest.approx(share, abs=0.03)
    main(["--limit", "3000", "--methods", "ftft", "--steps", "12"], tmp_path)
    kept = read_json(tmp_path, "selected.json")["ftft"]
    breaking = planted["shortcut-breaking"][:3000]
    assert len(kept) == 990 and breaking[kept].mean() > 1.5 * breaking.mean() > 0.13


# ---------- measuring


@pytest.mark.parametrize("names", [["ENTAILMENT", "Neutral", "contradiction"], ["c", "e", "n"]])
def test_any_classifier_is_scored_by_the_names_of_its_classes(names, tmp_path, capsys):
    model, items = encoder(id2label=dict(enumerate(names))), rows(40, 5)
    test = write(tmp_path / "same.jsonl", items)
    hans = write(tmp_path / "hans.csv", relabel(items, HANS.get))
    for i, name in enumerate(names):
        model.classifier.bias.data.copy_(9 * F.one_hot(torch.tensor(i), 3))  # always says this
        folder = save(tmp_path / "model", model)
        measuring.main([folder, "--test", f"id={test}", f"ood={hans}", "--json"])
        (scores,) = json.loads(capsys.readouterr().out)["methods"].values()
        said = next(label for label in NLI if label[0] == name[0].lower())
        for form, score in zip((str, HANS.get), scores.values(), strict=True):
            right = [form(said) == form(row["label"]) for row in items]
            assert score["score"] == pytest.approx(100 * np.mean(right))


def test_a_classifier_is_scored_on_nli_or_refused(tmp_path, models, refused, monkeypatch, capfd):
    numbered, test = save(tmp_path / "a", encoder()), write(tmp_path / "same.jsonl", rows(9))
    for name, named in ((models[0], "classifier.bias"), (numbered, "label_0, label_1")):
        assert named in refused(measuring.main, [name, "--test", f"id={test}"])
    monkeypatch.setattr(measuring, "read", lambda source, like: as_examples(rows(9)))
    measuring.main([numbered, "--markdown"])
    assert "| ID | ID | OOD | OOD | adversarial | adv" in capfd.readouterr().out


def answered(n, right, classes=2, seed=0):
    """Answers (2, n) of which a share is right."""
    gold = np.random.default_rng(seed).integers(classes, size=n)
    return np.stack([np.where(np.arange(n) < right * n, gold, (gold + 1) % classes), gold])


def test_intervals_are_normal_approximations_and_widen_as_runs_differ():
    n, runs = 2000, {}
    for folder, seed in (("a", 0), ("b", 1)):
        one, other = (answered(n, share, seed=seed) for share in (0.8, 0.7))  # 10% differ
        runs[folder] = ABOUT, {"org/one/id/x": one, "erm/id/x": other}
    single, both = measuring.compare({"a": runs["a"]}, "erm"), measuring.compare(runs, "erm")
    for found, mean, variance in ((single["methods"]["org/one"], 80, 0.8 * 0.2),
                                  (single["differences"]["org/one - erm"], 10, 0.1 * 0.9),
                                  (both["differences"]["org/one - erm"], 10, 0.1 * 0.9)):
        half, found = 196 * (variance / n) ** 0.5, found["x"]
        assert [found["low"], found["score"], found["high"]] == pytest.approx(
            [mean - half, mean, mean + half], abs=0.25)
    unlike = {share: (ABOUT, {"a/id/x": answered(n, share), "erm/id/x": answered(n, 0.5)})
              for share in (0.4, 0.5, 0.6, 0.9)}
    found = measuring.compare(unlike, "erm")["differences"]["a - erm"]["x"]
    assert found["low"] < 0 and found["score"] == pytest.approx(10) and found["high"] > 20


def test_the_tables_tell_scores_and_how_fast_a_method_learns():
    # Of 12 evaluations, the first is within the warm-up and does not count.
    curves = {"erm": [0.9, 0.5, 0.4, 0.6, 0.7, *[0.5] * 7], "ftft": [0.9, 0.6, 0.75, 0.7, 0.7],
              "random": [0.8, 0.6, 0.5]}
    phases = {name: {"seconds": 1.0, "budget": 120, "cost": len(curve) / 12,
                     "dev": [[10 * i, score] for i, score in enumerate(curve, 1)]}
              for name, curve in curves.items()}
    runs = {share: (ABOUT | {"phases": phases}, {"erm/id/x": answered(20, share)})
            for share in (0.5, 0.6, 0.8)}
    scores, training = measuring.tables(measuring.compare(runs, "erm"))
    assert scores[:4] == [["", "ID"], ["", "x"], ["n", "20"], ["erm", "63.3 ± 15.3"]]
    assert training == [["", "cost", "seconds", "dev", "reached"],
                        ["erm", "1.00 ± 0.00", "1 ± 0", "70.0 ± 0.0", "0.42 ± 0.00"],
                        ["ftft", "0.42 ± 0.00", "1 ± 0", "75.0 ± 0.0", "0.25 ± 0.00"],
                        ["random", "0.25 ± 0.00", "1 ± 0", "60.0 ± 0.0", "-"]]


# ---------- whole runs and models


def test_a_run_leaves_what_the_readme_lists_and_models_that_answer_as_scored(a_run):
    assert {path.name for path in Path(a_run.out).iterdir()} == {
        "ref", "ftft", "hard", "easy", "random", "erm", "dm", "run.json", "selected.json",
        "predictions.npz", "results.json", "data_map.png", "learning_curves.png"}
    for name, scores in read_json(a_run.out, "results.json").items():
        classify = transformers.pipeline("text-classification", f"{a_run.out}/{name}", device=-1)
        for form, items, found in ((str, rows(20, 2), scores["id"]["same"]),
                                   (HANS.get, rows(20, 3), scores["ood"]["hans"])):
            said = [form(classify({"text": premise, "text_pair": hypothesis})["label"])
                    for premise, hypothesis in as_examples(items).texts]
            gold = [form(row["label"]) for row in items]
            right = [a for a, b in zip(said, gold) if a == b]
            f1 = [2 * right.count(label) / (said + gold).count(label) for label in {*said, *gold}]
            both = {"accuracy": len(right) / 20, "macro-f1": np.mean(f1)}
            assert found == pytest.approx(both | {"n": 20})
            for metric in both:
                draws = measuring.bootstrap(np.array(said), np.array(gold), metric)
                assert draws[0] == pytest.approx(100 * both[metric]) and draws.std() > 1


def test_runs_that_differ_are_not_shown_as_one(a_run, tmp_path, refused, monkeypatch, capfd):
    run, first = read_json(a_run.out), tmp_path / "first"
    shutil.copytree(a_run.out, first)
    for named, changes in (("training set", {"fingerprint": ""}), ("did not", {"phases": {}}),
                           ("epochs", {"config": run["config"] | {"epochs": 9}})):
        (first / "run.json").write_text(json.dumps(run | changes))
        assert named in refused(measuring.main, [a_run.out, str(first)])
    assert "give one of" in refused(measuring.main, [a_run.out, "--against", "erm-s"])
    (first / "run.json").write_text(json.dumps(run | {"config": run["config"] | {"seed": 1}}))
    for name in ("results.json", "predictions.npz"):
        (first / name).unlink()
    monkeypatch.setattr(measuring, "draw_data_map", lambda *_: 1 / 0)
    measuring.main([a_run.out, str(first)])
    assert "no figure (division by zero)" in capfd.readouterr().err
    assert read_json(first, "results.json") == read_json(a_run.out, "results.json")


def test_selected_rows_follow_from_the_data_map_in_its_table(a_run):
    selected, labels = read_json(a_run.out, "selected.json"), [row["label"] for row in rows(48)]
    for method, source in (("ftft", "ref"), ("dm", "erm"), ("hard", "ref"), ("easy", "ref")):
        saved = np.load(Path(a_run.out, source, "dynamics.npz"))
        logits, gold = saved["logits"], saved["labels"]
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        p = np.take_along_axis(p, gold[None, :, None], -1)[..., 0]  # (epochs, n)
        score = {"hard": p.mean(0), "easy": -p.mean(0)}.get(method, -p.std(0))
        assert selected[method] == sorted(np.argsort(score, kind="stable")[:24].tolist())
        with open(Path(a_run.out, source, "data_map.csv"), newline="") as file:
            header, *table = csv.reader(file)
        assert header == "row label confidence variability correctness".split()
        assert [(int(row), label) for row, label, *_ in table] == [*enumerate(labels)]
        values = np.array([row[2:] for row in table], float).T
        stats = [p.mean(0), p.std(0), (logits.argmax(-1) == gold).mean(0)]
        np.testing.assert_allclose(values, stats, atol=1e-5)
    told = measuring.compare(measuring.load_runs([a_run.out]), "erm")["training"]["ftft"]["shared"]
    assert told == [pytest.approx(100 * len({*selected["ftft"]} & {*selected["dm"]}) / 24)]
    figure = measuring.draw_data_map(Path(a_run.out), read_json(a_run.out) | {"selected": selected})
    ends = np.concatenate([part.get_offsets() for part in figure.axes[0].collections]).max(0)
    np.testing.assert_allclose(ends, [p.std(0).max(), p.mean(0).max()], atol=0.03)


def test_costs_count_real_tokens_and_the_reference(a_run):
    phases = read_json(a_run.out)["phases"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(f"{a_run.out}/erm")
    tables = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    size = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    tokens = 3 * sum(map(len, vocabulary()(as_examples(rows(48)).texts)["input_ids"]))  # 3 epochs
    flops = {name: phase["flops"] for name, phase in phases.items()}
    assert flops["erm"] == 6 * size * tokens and phases["ref"]["tokens"] == tokens
    assert (phases["ref"]["lr"], phases["erm"]["lr"]) == (0.02, 0.01)
    for name, source in (("ftft", flops["ref"]), ("dm", flops["erm"]), ("random", 0), ("erm", 0)):
        assert phases[name]["cost"] == pytest.approx((flops[name] + source) / flops["erm"])


def test_the_seed_decides_on_rows_and_head_the_size_on_the_rate(task, tmp_path, monkeypatch):
    begun, done = [], {"steps": 1, "examples": 1, "tokens": 1, "seconds": 1.0, "dev": []}
    def no_training(name, model, data, dev, rows, steps, lr, *_):
        begun.append((model.classifier.weight.sum().item(), rows.tolist(), steps, lr))
        return done
    monkeypatch.setattr(ftft, "train", no_training)
    for run, seed, size in ((1, "0", 199e6), (2, "0", 199e6), (3, "1", 201e6)):
        monkeypatch.setattr(transformers.PreTrainedModel, "num_parameters", lambda *_, **__: size)
        main([*task[2:-4], "--methods", "random", "erm-es", "--seed", seed], tmp_path / str(run))
    (head, kept, _, _), *again, (other_head, other_kept, _, low), _ = begun
    random, erm_es = (head, kept, 6, 2e-5), (head, [*range(48)], 6, 2e-5)
    assert again == [erm_es, random, erm_es]
    assert head != other_head and kept != other_kept and low == 1e-5


def results(folder):
    """What a run of ftft is for, to the byte."""
    names = ("ref/dynamics.npz", "ref/data_map.csv", "ref/model.safetensors",
             "ftft/model.safetensors", "selected.json")
    *contents, selected = [Path(folder, name).read_bytes() for name in names]
    return contents, json.loads(selected)["ftft"], read_json(folder)["phases"]["ftft"]["cost"]


def test_saved_dynamics_serve_a_run_on_the_same_rows_only(task, a_run, tmp_path, refused):
    reuse, out = [*task[2:], "--dynamics", f"{a_run.out}/ref"], tmp_path / "run"
    assert "another training set" in refused(main, [*reuse, "--limit", "47"], out)
    main(reuse, out)
    (out / "ref").symlink_to(Path(a_run.out, "ref"))  # the rest is of its own
    assert results(out) == results(a_run.out)


def test_early_stopping_keeps_the_best_weights_and_erm_runs_on(task, tmp_path):
    wrong = dict(zip(NLI, NLI[1:] + NLI[:1]))  # the dev score falls
    unseen = [{**row, "premise": "never"} for row in rows(60, 1)]
    dev = write(tmp_path / "dev.tsv", relabel(unseen, wrong.get))
    cfg = main([*task, "--methods", "ftft", "erm", "erm-es", "--epochs", "12", "--ref-epochs", "3",
                "--metric", "macro-f1"], tmp_path / "run")
    phases, tests = read_json(cfg.out)["phases"], {("id", ""): ftft.read(dev, as_examples(rows(3)))}
    assert [step for step, _ in phases["erm"]["dev"]] == [6 * i for i in range(1, 13)]
    for name in ("ftft", "erm", "erm-es"):
        _, *counted = (score for _, score in phases[name]["dev"])  # the warm-up takes 7 steps
        best = counted.index(max(counted))
        assert len(counted) == (11 if name == "erm" else best + 3)
        assert phases[name]["steps"] == 6 * (1 + len(counted))
        answers = measuring.score(name, Path(cfg.out, name), cfg, tests)
        assert ftft.metrics(*answers[f"{name}/id/"])["macro-f1"] == max(counted)
    assert phases["ftft"]["steps"] < 72 == phases["erm-es"]["budget"]
    assert phases["ref"]["steps"] == 18


UNFIT = [  # sizes of a model, other names of its weights, config, and tokenizer; what is named
    ({}, "own.", {}, {}, "be random"), ({}, "", {"num_hidden_layers": 2}, {}, "be random"),
    ({}, "", {}, {"padding_side": "left"}, "pads on the left"), ({}, "", {}, None, "100%"),
    ({"kind": "roberta"}, "", {}, None, "9.%"), ({}, "", {}, {"words": ["red"]}, "9.%"),
    ({"vocab_size": 20}, "", {}, {"words": WORDS * 2}, "wrong tokenizer"),
    ({"type_vocab_size": 1}, "", {}, {}, "cannot take"),
    ({"kind": "roberta", "max_position_embeddings": 9}, "", {}, {}, "--max-length")]


@pytest.mark.parametrize("sizes, prefix, config, words, named", UNFIT)
def test_an_unfit_model_is_refused(sizes, prefix, config, words, named, tmp_path, refused):
    model = encoder(**{"type_vocab_size": 2} | sizes).base_model
    weights = {prefix + name: weight for name, weight in model.state_dict().items()}
    save(tmp_path, model, vocabulary(**words or {}), weights, **config)
    for file in tmp_path.glob("*token*") if words is None else ():
        file.unlink()  # transformers makes an empty tokenizer
    said = refused(lambda: ftft.encode(*ftft.load(str(tmp_path), "cpu", NLI),
                                       as_examples(rows(40)), settings()))
    assert re.search(named, said) and str(tmp_path) in said and said.count(",") < 6  # few names


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
@pytest.mark.parametrize("names", [NLI, [], NLI[:2]])  # trained before, or not
def test_a_head_begins_anew_as_in_transformers(kind, names, tmp_path):
    model = encoder(kind, hidden_size=512, initializer_range=0.05, num_labels=len(names) or 3)
    for part in model.parameters():
        part.data.fill_(7)
    model = (model if names else model.base_model).half()
    loaded, _ = ftft.load(save(tmp_path, model, id2label=dict(enumerate(names))), "cpu", NLI)
    new = {name: part for name, part in loaded.named_parameters() if (part != 7).any()}
    assert len(new) == (2 if kind == "bert" else 4)
    for name, part in new.items():
        shares = [((part / 0.05).abs() < z).float().mean().item() for z in (0.5, 1, 2)]
        normal = [1, 1, 1] if name.endswith("bias") else [0.383, 0.683, 0.954]
        assert shares == pytest.approx(normal, abs=0.05)
    assert [*loaded.config.id2label.values()] == NLI and loaded.dtype == torch.float32


def test_a_local_folder_comes_before_a_short_name_and_inputs_are_cut(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"type_vocab_size": 1, "pad_token_id": 0, "max_position_embeddings": 20}
    save(tmp_path / "bert-base", encoder("roberta", **sizes))
    model, tokenizer = ftft.load("bert-base", "cpu", NLI)
    texts = ftft.Examples([("7 " * 60,), ("8",)], torch.tensor([0, 1]), NLI)
    data = ftft.encode(model, tokenizer, texts, settings("--max-length", "19"))
    assert model(**batch_of(data, [0, 1])).logits.isfinite().all() and max(data.lengths) == 19


def test_the_readme_gives_the_lines_of_the_sections_of_ftft():
    path, rule = Path(ftft.__file__), "# ---------- "
    readme = " ".join(path.with_name("README.md").read_text().split())
    sections = [f"{line.removeprefix(rule).removeprefix('machinery: ')} ({i})" for i, line in
                enumerate(path.read_text().splitlines(), 1) if line.startswith(rule)]
    assert len(sections) > 5 and all(section in readme for section in sections)


# ---------- the same command again, several processes


def start(argv, out, *launcher, awaited=None, **environment):
    """`python ftft.py`, perhaps killed when a new file is there."""
    known = {*Path(out).glob("*")}
    run = subprocess.Popen([sys.executable, *launcher, ftft.__file__, *argv, "--out", out],
                           text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env=os.environ | {"CUDA_VISIBLE_DEVICES": "", **environment})
    while awaited and run.poll() is None and not {*Path(out).glob(awaited)} - known:
        time.sleep(0.001)
    if awaited:  # of torchrun, what it began
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        for process in children.read_text().split() if launcher else [run.pid]:
            os.kill(int(process), signal.SIGKILL)
    said, _ = run.communicate()
    assert bool(run.returncode) == bool(awaited), said
    return said


def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(task, tmp_path):
    words = dict(zip(NLI, ("спорит", "следует", "неясно")))  # in a locale without these letters
    for option, seed, kind in ("--train", 0, ""), ("--dev", 1, ""), ("--test", 2, "id="):
        path = write(tmp_path / f"поезд{seed}.csv", relabel(rows(48, seed), words.get))
        task += [option, kind + path]
    whole, cut = f"{tmp_path}/whole", f"{tmp_path}/cut"
    main(task, whole)
    said = [start(task, cut, awaited=name, LC_ALL="C", PYTHONUTF8="0")
            for name in ("checkpoint.pt", "ref*", "ftft*", None)]
    assert "ref: goes on" in said[1] and results(cut) == results(whole)
    assert Path(cut, "results.json").exists() and not [*Path(cut).glob("*.p*t*")]
    assert "следует" in Path(cut, "ref", "data_map.csv").read_text("utf-8")


def test_two_processes_give_what_one_gives_and_go_on(task, tmp_path, monkeypatch):
    model = encoder("big_bird", attention_type="original_full")
    model.classifier.out_proj.weight.data *= 3  # to clip some gradients: AdamW sees no scale
    steady = save(tmp_path / "steady", model)  # this model's pooler gets no gradient
    monkeypatch.chdir(tmp_path)
    task += ["--ref", steady, "--main", steady, "--limit", "41", "--grad-accum", "2"]
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    main([*task, "--grad-accum", "1"], "one")
    assert start(task, "two", *torchrun).count("accuracy in %") == 1
    a, b = (np.load(f"{run}/ref/dynamics.npz")["logits"] for run in ("one", "two"))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert read_json("one", "selected.json") == read_json("two", "selected.json")
    start(task, "cut", *torchrun, awaited="ref*")
    start(task, "cut", *torchrun)
    assert results("cut") == results("two")


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in Path(folder).rglob("*") if path.is_file()}


def test_a_finished_run_stays_as_it_is_but_may_grow(a_run, tmp_path, capfd, monkeypatch):
    out, grown = tmp_path / "run", [*a_run.argv, "--methods", "erm-es", "random"]
    shutil.copytree(a_run.out, out)
    before = files(out)
    main([*a_run.argv, "--grad-accum", "2"], out)
    measuring.main([str(out)])
    assert files(out) == before and "hans" in capfd.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch, "save", lambda *_: 1 / 0)  # not told as a full disk
        main(grown, out)
    main(grown, out)
    measuring.main([str(out)])
    after = files(out)
    assert all(path.parent == out or after[path] == before[path] for path in before)
    methods = read_json(out)["config"]["methods"]
    assert methods == [*a_run.methods, "erm-es"] == [*read_json(out, "results.json")]
    assert read_json(out, "selected.json") == read_json(a_run.out, "selected.json")


@pytest.mark.parametrize("more, named", [
    ("--seed 1", "seed"), ("--batch-size 9", "batch_size"), ("--fraction 0.4", "fraction"),
    ("--ref-epochs 2", "ref_epochs"), ("--limit 47", "data"), ("", "processes")])
def test_a_run_with_another_setting_is_refused(more, named, a_run, refused, monkeypatch):
    before = files(a_run.out)
    monkeypatch.setattr(ftft, "WORLD", 1 if more else 2)
    said = refused(main, [*a_run.argv, *more.split()], a_run.out)
    assert re.search(rf"{a_run.out}.*\b{named}\b", said) and files(a_run.out) == before


@pytest.mark.parametrize("file", ["run.json", "checkpoint.pt", "ref"])
def test_after_a_full_disk_the_same_command_goes_on(file, task, a_run, tmp_path, refused):
    out, file = tmp_path / "cut", f"{file}.partial" + ("/dynamics.npz" if file == "ref" else "")
    (out / file).parent.mkdir(parents=True)
    (out / file).symlink_to("/dev/full")
    assert f"{out}/{file.split('.part')[0]}: cannot be written" in refused(main, task, out)
    (out / file).unlink()
    main(task, out)
    assert results(out) == results(a_run.out) and not [*out.glob("*.p*t*")]


@pytest.mark.parametrize("part, steps, amp, named", [
    ("memory", [0], "off", "--grad-accum 2"), ("gradient", [35], "off", "by step 36"),
    ("gradient", range(99), "fp16", "or divergence"), ("logit", [2], "fp16", "a lower rate")])
def test_a_failed_step_ends_a_run(part, steps, amp, named, task, tmp_path, monkeypatch, refused):
    count = iter(range(99))
    def spoil(kind, tensor):
        if part not in (kind, "memory") or next(count) not in steps:
            return tensor
        if part == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tensor.index_fill(1, torch.tensor([2]), math.inf)  # one class or one column
    def make_faulty(model, _):
        model.classifier.register_forward_hook(lambda *x: spoil("logit", x[2]))
        return model.classifier.weight.register_hook(lambda x: spoil("gradient", x)).remove
    monkeypatch.setattr(ftft, "leave_out", make_faulty)
    argv = [*task[:-2], "--epochs", "6", "--amp", amp]  # 36 steps
    assert named in refused(main, argv, tmp_path / "run")
    assert not (tmp_path / "run" / "ref").exists()


ONE = {"text": "red", "label": "a"}
BAD = [  # more arguments, or the training rows; and what the line must name
    ("--train no.jsonl", "no.jsonl: no such"), ([], "have no label"), ("--train open.csv", "row 1"),
    ("--train wide.csv", "row 2"), ("--main .", ".: cannot be load"), ([{"text": "a"}], "'text'"),
    ("--train semi.csv", "'text;label'"), ([ONE, [1]], "row 2"), ([ONE] * 40, "two or more"),
    ([ONE, {**ONE, "text": "\ud83d"}], "row 2"), ("--test id=half.jsonl", "half.jsonl, row 2"),
    ([ONE, {**ONE, "text": None}], "row 2"), ([ONE, {**ONE, "label": []}], "row 2"),
    ([ONE, {**ONE, "label": "A"}], "A, a;"), ("--ref ''", "--ref"), ("--test odd.jsonl", "id=FILE"),
    ([{**ONE, "label": x} for x in NLI * 20], "in all files"), ("--train thin.csv", "row 2"),
    ("--test id=odd.jsonl", "label other"), ("--test id=same.jsonl ood=same.jsonl", "called same"),
    ("--steps 1", "unfit"), ("--fraction 33", "--fraction"), ("--main nopairs", "nopairs: cannot"),
    ("--ref-epochs 1", "ref-epochs 1: must"), ("--device odd", "odd"), ("--dynamics .", "replaces"),
    ("--methods dm --epochs 1", "least 2"), ("--ref '' --dynamics .", "read"), ("--lr 0", "--lr")]


@pytest.mark.parametrize("bad, named", BAD)
def test_bad_input_ends_in_a_line_and_exit_code_2(bad, named, task, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    for file, content in (("wide.csv", "text,label\nred,a\na,b,c"), ("open.csv", 'text,label\n"a'),
                          ("semi.csv", "text;label\n1;a"), ("thin.csv", "text,label\nred,a\nso")):
        Path(file).write_text(content)
    save(tmp_path / "nopairs", encoder(type_vocab_size=1))
    np.savez("dynamics.npz", logits=np.array([ONE], object))  # nothing is unpickled
    for name, odd in (("half", {"premise": "\ud83d"}), ("odd", {"label": "other"})):
        write(tmp_path / f"{name}.jsonl", [*rows(1), {**rows(1)[0], **odd}])
    if not isinstance(bad, str):
        bad = "--train " + write(tmp_path / "bad.jsonl", bad)
    before = sorted(tmp_path.rglob("*"))
    assert named in refused(main, [*task, *shlex.split(bad)], "run")
    assert sorted(tmp_path.rglob("*")) == before
