"""Classifiers: what a labelled row is, the batches it comes in, the loss, the figures, and runs of one process."""

import json
import random
import sys
from collections import Counter

import numpy as np
import peft
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error

from mixtral import MixtralConfig, MixtralForSequenceClassification
from tests.conftest import SIZES
from tests.train.helpers import SMALL, metrics, read_json, run_small
from train.cli import main
from train.config import Config, DataConfig, SourceConfig
from train.data.build import open_documents, pack
from train.data.formats import RowError
from train.data.labelled import WINDOW, LabelledBatch, LabelledRows, Labels, labels_of
from train.data.share import Share
from train.data.tokenized import ENCODED
from train.data.tokenizer import open_tokenizer
from train.evaluate.classifier import ClassifierSums
from train.objective import Coefficients, StepSize, objective_parts, predict

WORDS = {"wind": ["gale", "air", "blows"], "sun": ["warm", "light", "south"], "rain": ["wet", "drop", "cloud"]}
PROBLEM = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


def labelled(kind, count=200):
    """Random rows whose label can be read off their words."""
    draw = random.Random(0)
    for _ in range(count):
        names = sorted(draw.sample(sorted(WORDS), draw.randint(0, 3) if kind == "multi_label" else 1))
        words = draw.choices(["the", "of", "and"], k=draw.randint(1, 12))
        words += [draw.choice(WORDS[name]) for name in names for _ in range(4)]
        draw.shuffle(words)
        value = words.count("the") / 4
        label = {"classification": names[:1], "multi_label": [names], "regression": [value]}[kind]
        yield {"text": " ".join(words), "labels" if kind == "multi_label" else "label": label[0]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples(lengths, target=lambda index: [index % 3]):
    rows = [
        {
            "input_ids": [3 + index % 100] * length,
            "trained": [0] * length,
            "trained_tokens": 0,
            "target": target(index),
            "is_cut": False,
            "problem": None,
            "source": f"row {index}",
            "part": 0,
        }
        for index, length in enumerate(lengths)
    ]
    return Dataset.from_list(rows, features=ENCODED)


CLASSES = Labels("single_label_classification", ("a", "b", "c"))


def test_every_row_is_seen_once_an_epoch_and_those_of_a_batch_are_nearly_as_long():
    lengths = np.random.default_rng(0).integers(1, 60, 333).tolist()
    rows = LabelledRows(samples(lengths), 64, CLASSES, 0, seed=1, shuffle=True, epochs=2)
    share = Share(0, 1, 4, 2)
    batches = [batch for step in range(-(-len(rows) // 8)) for batch in rows.step(step, share)]
    seen = [
        tuple(ids[mask].tolist())
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.token_mask, strict=True)
    ]
    expected = [tuple([3 + index % 100] * length) for index, length in enumerate(lengths)] * 2
    assert sorted(filter(None, seen)) == sorted(expected)
    padded = sum(batch.token_mask.numel() for batch in batches)
    assert sum(lengths) * 2 / padded > 0.88
    shuffled = np.random.default_rng(0).permutation(333)[:332].reshape(-1, 4)
    assert sum(lengths) / sum(4 * max(lengths[i] for i in four) for four in shuffled) < 0.7
    assert not rows.step(100, share)[0].is_row.any()
    first = [rows.step(step, share)[0].input_ids.shape[1] for step in range(WINDOW)]
    assert first != sorted(first)


@pytest.mark.parametrize("epochs", [None, 0.3, 1, 1.7])
@pytest.mark.parametrize("shuffle", [False, True])
def test_fullness_is_that_of_the_batches_and_labels_are_counted(shuffle, epochs):
    lengths = np.random.default_rng(0).integers(1, 60, 333).tolist()
    rows = LabelledRows(samples(lengths), 64, CLASSES, 0, seed=1, shuffle=shuffle, epochs=epochs)
    for size in (1, 4, 7, 41, 500):
        steps = [rows.step(step, Share(0, 1, size))[0].token_mask for step in range(-(-333 // size))]
        laid = sum(mask.numel() for mask in steps if mask.any())
        assert rows.fullness(size) == sum(int(mask.sum()) for mask in steps) / laid
    assert rows.histogram() == Counter(CLASSES.names[int(rows.target(sample)[0])] for sample in range(333))


def test_figures_of_an_epoch_cost_no_python_call_a_text():
    rows = LabelledRows(samples([1, 2] * 5000), 64, CLASSES, 0, seed=1, shuffle=True, epochs=1)
    calls = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        rows.fullness(2)
        rows.histogram()
    finally:
        sys.setprofile(None)
    assert calls["call"] + calls["c_call"] < 1000


@pytest.mark.parametrize("layout", [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 1, 2)])
def test_the_rows_of_a_step_do_not_depend_on_how_it_is_split(layout):
    processes, micro_batch, accumulation = layout
    lengths = np.random.default_rng(0).integers(1, 60, 50).tolist()
    rows = LabelledRows(samples(lengths), 64, CLASSES, 0, seed=1, shuffle=True, epochs=3)

    def taken(step, *split):
        shares = [Share(rank, split[0], *split[1:]) for rank in range(split[0])]
        parts = [rows.step(step, share) for share in shares]
        for micro_step in zip(*parts, strict=True):  # messages between ranks may be of one size
            assert len({batch.input_ids.shape for batch in micro_step}) == 1
        found = [batch for part in parts for batch in part]
        return sorted(
            (row[mask].tolist(), int(label))
            for batch in found
            for row, mask, label in zip(batch.input_ids, batch.token_mask, batch.labels, strict=True)
        )

    for step in (0, 7, 18, 30):
        assert taken(step, processes, micro_batch, accumulation) == taken(step, 1, 8, 1)


def test_evaluation_takes_each_row_once_on_any_number_of_processes():
    lengths = np.random.default_rng(0).integers(1, 60, 37).tolist()
    rows = LabelledRows(samples(lengths), 64, CLASSES, 0)
    for processes in (1, 3):
        parts = [list(rows.evaluation(Share(rank, processes, 4))) for rank in range(processes)]
        assert len({len(part) for part in parts}) == 1
        assert sum(int(batch.trained) for part in parts for batch in part) == 37


def batch_of(problem, rows, length=9):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 128, (rows, length), generator=draw)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=draw)
    mask[-1] = False  # a row that is padding
    if problem == "single_label_classification":
        labels = torch.randint(0, 3, (rows,), generator=draw)
        labels[-1] = -100
    else:
        labels = torch.randint(0, 2, (rows, 3), generator=draw).double()
        labels[-1] = torch.nan
    return LabelledBatch(ids.where(mask, 0), torch.arange(length).expand(rows, -1), labels, mask)


@pytest.mark.parametrize("problem", PROBLEM.values())
def test_the_loss_and_its_gradient_do_not_depend_on_how_rows_are_split_or_padded(problem):
    config = MixtralConfig(**SIZES, num_labels=3, problem_type=problem, pad_token_id=0)
    model = MixtralForSequenceClassification(config).double()
    batch = batch_of(problem, 9)
    size = StepSize(batch.token_mask.sum(), batch.trained, parts=1)
    assert size.trained_tokens == 8
    coefficients = Coefficients(0.0, 0.0, "document")

    def gradient(parts):
        model.zero_grad()
        total = 0.0
        for part in parts:
            output = predict(model, part, size.trained_tokens, routing=True)
            shares = objective_parts(output, part, size, lambda tensor: tensor, coefficients, torch.zeros(3, 8))
            shares.loss(coefficients).backward()
            total += shares.cross_entropy.item()
        return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole_loss, whole = gradient([batch])
    longer = LabelledBatch(
        *(torch.nn.functional.pad(tensor, (0, 5)) if tensor is not batch.labels else tensor for tensor in batch)
    )
    for parts in ([LabelledBatch(*(tensor[rows] for tensor in batch)) for rows in (slice(2), slice(2, 9))], [longer]):
        loss, found = gradient(parts)
        assert loss == pytest.approx(whole_loss, abs=1e-10)
        assert (found - whole).norm() <= 1e-10 * whole.norm()
    rows = batch.is_row  # the published mean, where every row is one
    published = transformers.MixtralForSequenceClassification(transformers.MixtralConfig(**config.to_dict())).double()
    published.set_experts_implementation("eager")
    published.load_state_dict(model.state_dict())
    expected = published(batch.input_ids[rows], attention_mask=batch.token_mask[rows].long(), labels=batch.labels[rows])
    assert whole_loss == pytest.approx(expected.loss.item(), abs=1e-6)


@pytest.mark.parametrize("problem", PROBLEM.values())
def test_the_figures_are_sklearns(problem):
    draw = torch.Generator().manual_seed(0)
    labels = Labels(problem, ("a", "b", "c", "d"))
    sums, logits, truths = ClassifierSums(labels, torch.device("cpu")), [], []
    for _ in range(3):
        given = torch.randn(20, 4, generator=draw)
        if problem == "single_label_classification":
            given[:, 2] = -9  # neither said nor true
            truth = torch.tensor([0, 1, 3])[torch.randint(0, 3, (20,), generator=draw)]
            truth[-1] = -100
        else:
            truth = torch.randint(0, 2, (20, 4), generator=draw).float()
            truth[:, 3] = 0
            truth[-1] = torch.nan
        mask = torch.ones(20, 1, dtype=torch.bool)
        mask[-1] = False
        sums.add(torch.tensor(19 * 0.5), given, LabelledBatch(mask.long(), mask.long(), truth, mask))
        logits.append(given[:-1])
        truths.append(truth[:-1])
    said, true = torch.cat(logits), torch.cat(truths)
    figures = sums.figures(lambda tensor: tensor)
    assert figures.pop("eval_loss") == pytest.approx(0.5)
    if problem == "regression":
        assert figures == {"eval_mse": pytest.approx(mean_squared_error(true, said))}
        return
    said = said.argmax(-1) if problem.startswith("single") else said > 0
    assert figures == {
        "eval_accuracy": pytest.approx(accuracy_score(true, said)),
        "eval_macro_f1": pytest.approx(f1_score(true, said, average="macro", zero_division=0)),
    }


BAD = {
    "unknown label": (
        {"text": "a", "label": "fog"},
        ["data.labels=[rain,sun,wind]"],
        "'fog' is none of rain, sun, wind",
    ),
    "label out of range": ({"text": "a", "label": 3}, ["data.labels=[rain,sun,wind]"], "the 3 labels from 0 on"),
    "unknown label  ": ({"text": "a", "label": "1" * 5000}, ["data.labels=[rain,sun,wind]"], "is none of rain, sun"),
    "unknown label ": (
        {"text": "a", "label": 3},
        ["data.labels=[sun,rain,wind,1]"],
        "3 is none of sun, rain, wind, 1",
    ),
    "wrong type": ({"text": "a", "label": None}, [], "'label' holds null, neither a label's name nor its number"),
    "missing column": ({"text": "a", "lable": "sun"}, [], "no 'label'; it has lable, text"),
    "empty label": ({"text": "a", "label": " "}, [], "names none"),
    "too long": ({"text": "word " * 200, "label": "sun"}, [], "data.sequence_length=32"),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_row_stops_the_run_by_file_and_line_or_is_counted(tmp_path, problem, capsys):
    row, words, what = BAD[problem]
    problem = problem.strip()
    path = write(tmp_path / "a.jsonl", [*labelled("classification", 40), row])
    words = [f"data.path={path}", "data.format=classification", *words]
    assert run_small(tmp_path / "run", *words) == 3
    error = capsys.readouterr().err
    assert f"{path}:41: {problem}: " in error
    assert what in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    inspecting = ["inspect_data", *SMALL, *words, f"run.dir={tmp_path / 'seen'}"]
    assert main(inspecting) == 3
    assert f"bad row  {path}:41: {problem}: " in capsys.readouterr().out
    assert run_small(tmp_path / "run", *words, "data.bad_rows=skip", "data.too_long=skip", "train.max_steps=1") == 0
    assert read_json(tmp_path / "run" / "summary.json")["left_out"] == {problem: 1}


NO_CLASSES = {
    "names and numbers": (["sun", 1, "rain"], "some labels are names ('rain') and some numbers (1)"),
    "numbers with a gap": ([0, 1, 3], "the labels 0, 1, 3, ... are not the numbers from 0 on"),
    "numbers and their texts, with a gap": ([0, "0", "2"], "the labels 0, 2, ... are not the numbers from 0 on"),
    "all alike": (["sun", "sun", "sun"], "every row has the label sun"),
}


@pytest.mark.parametrize("case", NO_CLASSES)
def test_labels_that_are_no_classes_are_refused(tmp_path, case, capsys):
    labels, what = NO_CLASSES[case]
    path = write(tmp_path / "a.jsonl", [{"text": f"t {n}", "label": labels[n % 3]} for n in range(30)])
    assert run_small(tmp_path / "run", f"data.path={path}", "data.format=classification") == 3
    assert what in capsys.readouterr().err


def test_numbers_of_a_csv_and_names_of_a_dataset_are_the_same_classes(tmp_path):
    rows = [(f"text {n}", n % 3) for n in range(12)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    config = DataConfig(path=str(tmp_path / "a.csv"), format="classification")
    assert labels_of(open_documents(config)[0], config).names == ("0", "1", "2")
    named = Labels("single_label_classification", ("x", "y", "z"))
    assert [named.target(label) for label in ("y", "2", 0)] == [[1], [2], [0]]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["low", "mid", "high"])})
    Dataset.from_dict({"text": [t for t, _ in rows], "label": [n for _, n in rows]}, features=features).save_to_disk(
        tmp_path / "saved"
    )
    config = DataConfig(path=str(tmp_path / "saved"), format="classification")
    assert labels_of(open_documents(config)[0], config).names == ("high", "low", "mid")
    several = Features({"text": Value("string"), "labels": List(ClassLabel(names=["low", "mid"]))})
    Dataset.from_dict({"text": list("abcd"), "labels": [[0, 1]] * 4}, features=several).save_to_disk(tmp_path / "many")
    config = DataConfig(path="", sources=[SourceConfig(path=str(tmp_path / "many"))], format="multi_label")
    assert labels_of(open_documents(config)[0], config).names == ("low", "mid")


@pytest.mark.parametrize("names", [["1", "2", "3", "4", "5"], ["5", "3", "1", "2", "4"], ["-1", "0", "1", "2", "3"]])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_whole_numbers_are_the_names_that_they_are_written_as(tmp_path, names, streaming, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_text("text,label\n" + "".join(f"text {name},{name}\n" for name in names * 8))
    else:
        write(path, [{"text": f"text {name}", "label": int(name)} for name in names * 8])
    config = Config(data=DataConfig(path=str(path), held_out_path=str(path), format="classification", labels=names))
    config.data.streaming, config.data.shuffle = streaming, False
    tokenizer = open_tokenizer("mixtral", 32_000)
    data = pack(*open_documents(config.data), tokenizer, config)
    (batch,) = next(iter(data.steps(Share(0, 1, 40))))
    for ids, label in zip(batch.input_ids, batch.labels, strict=True):
        text = tokenizer.decode(ids[1:], skip_special_tokens=True).replace("<unk>", "")
        assert text == f"text {names[int(label)]}"


def test_a_number_is_an_index_where_no_name_is_a_number():
    stars = Labels("multi_label_classification", ("1", "2", "3"))
    assert [stars.target(labels) for labels in ([1, 3], ["2"], [" 3", 3])] == [[0, 2], [1], [2]]
    for label in (0, 4, "0", "many"):
        with pytest.raises(RowError, match="unknown label"):
            stars.target([label])
    with pytest.raises(RowError, match="unknown label"):
        Labels("single_label_classification", ("1.0", "2.0")).target(1)
    words = Labels("single_label_classification", ("one star", "2 stars"))
    assert [words.target(label) for label in (1, "0", "2 stars")] == [[1], [0], [1]]


REFUSED = {
    "data.format=regression data.labels=[a,b]": "data.format=regression has none",
    "data.format=classification data.labels=[a,a]": "'a' is there twice",
    "data.labels=[a,b]": "of no effect with data.format=auto",
    "data.columns={label:y}": "of no effect with data.format=auto",
    "data.format=classification lora.rank=4 lora.targets=lm_head": "has no lm_head",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_go_with_labels_is_refused_by_name(tmp_path, words, capsys):
    assert run_small(tmp_path / "run", "data.path=a.jsonl", *words.split()) == 2
    assert REFUSED[words] in capsys.readouterr().err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model to start from."""
    folder = tmp_path_factory.mktemp("base")
    path = write(folder / "a.jsonl", [{"text": row["text"]} for row in labelled("classification")])
    assert run_small(folder / "run", f"data.path={path}", "train.max_steps=2") == 0
    return folder / "run" / "export"


TRAINED = [
    "train.micro_batch_size=16",
    "schedule.warmup_steps=4",
    "optim.lr=5e-3",
    "evaluate.every=20",
    "data.too_long=cut",
]
KINDS = {
    "classification": ("train.max_steps=40", "eval_accuracy", 0.9, 1.0),
    "multi_label": ("train.max_steps=60", "eval_accuracy", 0.5, 1.0),
    "regression": ("train.max_steps=60", "eval_mse", 0.0, 0.12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_learns_and_transformers_gives_its_export_the_same_figures(tmp_path, base, kind):
    steps, figure, least, most = KINDS[kind]
    path = write(tmp_path / "a.jsonl", labelled(kind, 600))
    words = [f"data.path={path}", f"data.format={kind}", f"model.init_from={base}", *TRAINED, steps]
    small = [word for word in SMALL if not word.startswith("model.")]
    assert main(["train", *small, *words, f"run.dir={tmp_path / 'run'}"]) == 0
    rows = metrics(tmp_path / "run")
    assert least <= rows[-1][figure] <= most
    assert rows[-1]["eval_loss"] < 0.7 * rows[0]["eval_loss"]
    assert read_json(tmp_path / "run" / "summary.json")[figure] == rows[-1][figure]
    export = tmp_path / "run" / "export"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(export)
    assert type(model) is transformers.MixtralForSequenceClassification
    assert model.config.problem_type == PROBLEM[kind]
    names = ["value"] if kind == "regression" else sorted(WORDS)
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {name: number for number, name in enumerate(names)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    held_out = [json.loads(line) for line in (export / "held_out.jsonl").read_text().splitlines()]
    given = tokenizer(
        [row["text"] for row in held_out], padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    logits = model(**given).logits.detach()
    if kind == "regression":
        found = mean_squared_error([row["label"] for row in held_out], logits[:, 0])
    elif kind == "classification":
        found = accuracy_score([names.index(row["label"]) for row in held_out], logits.argmax(-1))
    else:
        found = accuracy_score([[name in row["labels"] for name in names] for row in held_out], logits > 0)
    assert found == pytest.approx(rows[-1][figure], rel=1e-4)
    ours = MixtralForSequenceClassification.from_pretrained(export)
    assert (ours(**given).logits - logits).abs().max() < 1e-5


def test_adapters_train_a_classifier_that_peft_reads_and_a_run_goes_on_from(tmp_path, base):
    path = write(tmp_path / "a.jsonl", labelled("classification", 400))
    small = [word for word in SMALL if not word.startswith("model.")]
    words = ["train", *small, f"data.path={path}", "data.format=classification", f"model.init_from={base}", *TRAINED]
    adapters = ["lora.rank=4", "lora.targets=q_proj,v_proj,gate"]
    for form in ("portable", "fused"):
        run = tmp_path / form
        assert main([*words, *adapters, f"lora.format={form}", "train.max_steps=40", f"run.dir={run}"]) == 0
        rows = metrics(run)
        assert rows[-1]["eval_loss"] < 0.9 * rows[0]["eval_loss"]
        config = transformers.AutoConfig.from_pretrained(run / "export")
        assert config.id2label == {0: "rain", 1: "sun", 2: "wind"}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, config=config)
        model = peft.PeftModel.from_pretrained(model, run / "export").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
        held_out = [json.loads(line) for line in (run / "export" / "held_out.jsonl").read_text().splitlines()]
        texts = [row["text"] for row in held_out]
        given = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        truth = torch.tensor([config.label2id[row["label"]] for row in held_out])
        with torch.no_grad():
            logits = model(**given).logits
        loss = torch.nn.functional.cross_entropy(logits, truth)
        assert loss.item() == pytest.approx(rows[-1]["eval_loss"], abs=1e-5)
        assert main(["export", f"adapter={run / 'export'}", f"output_dir={run / 'merged'}", "dtype=fp32"]) == 0
        merged = transformers.AutoModelForSequenceClassification.from_pretrained(run / "merged")
        assert merged.config.id2label == config.id2label
        with torch.no_grad():
            assert (merged(**given).logits - logits).abs().max() < 1e-4
        again = [*words, f"lora.init_from={run / 'export'}", "train.max_steps=1", f"run.dir={tmp_path / 'on'}-{form}"]
        assert main(again) == 0
        assert metrics(tmp_path / f"on-{form}")[0]["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_a_classifier_goes_on_from_a_classifier_with_its_labels_alone(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", labelled("classification", 200))
    words = [f"data.path={path}", "data.format=classification", "train.max_steps=3", "data.too_long=cut"]
    assert run_small(tmp_path / "one", *words, "data.labels=[wind,sun,rain,fog]") == 0
    small = [word for word in SMALL if not word.startswith("model.")]
    words = ["train", *small, *words, f"model.init_from={tmp_path / 'one' / 'export'}"]
    assert main([*words, f"run.dir={tmp_path / 'two'}"]) == 0
    assert read_json(tmp_path / "two" / "export" / "config.json")["label2id"]["fog"] == 3
    last, first = metrics(tmp_path / "one")[-1], metrics(tmp_path / "two")[0]
    assert first["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-6)
    capsys.readouterr()
    assert main([*words, f"run.dir={tmp_path / 'three'}", "data.labels=[wind,sun,rain]"]) == 2
    assert "the classifier to go on from has ['wind', 'sun', 'rain', 'fog']" in capsys.readouterr().err
    numbers = write(tmp_path / "n.jsonl", labelled("regression", 40))
    words = [*words, f"data.path={numbers}", "data.format=regression"]
    assert main([*words, f"run.dir={tmp_path / 'three'}"]) == 4
    assert "tells 4 labels apart, and the data has 1" in capsys.readouterr().err


def test_the_labels_are_counted_in_what_inspect_data_prints(tmp_path, capsys):
    rows = [*labelled("classification", 60)]
    path = write(tmp_path / "a.jsonl", rows)
    words = [f"data.path={path}", "data.format=classification", "data.too_long=cut", f"run.dir={tmp_path / 'run'}"]
    assert main(["inspect_data", *SMALL, *words]) == 0
    shown = capsys.readouterr().out
    held_out = 6
    figures = read_json(tmp_path / "run" / "data.json")
    counted = [int(word.split()[1]) for word in figures["labels"].split(", ")]
    assert sum(counted) == 60 - held_out
    assert "packed" not in figures
    assert any(line.endswith(("-> rain", "-> sun", "-> wind")) for line in shown.splitlines())


def test_only_some_weights_and_the_head_are_trained_in_any_precision(tmp_path, base, capsys):
    path = write(tmp_path / "a.jsonl", labelled("classification", 60))
    small = [word for word in SMALL if not word.startswith("model.")]
    words = [f"data.path={path}", "data.format=classification", "data.too_long=cut", f"model.init_from={base}"]
    words += ["train.only=router", "train.precision=bf16", "schedule.warmup_steps=1", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *small, *words]) == 0
    assert "at most 128 tokens: 1 process x 4 rows" in capsys.readouterr().out
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    after = MixtralForSequenceClassification.from_pretrained(tmp_path / "run" / "export", dtype=torch.bfloat16)
    moved = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.get(name, tensor * 2))
    }
    assert moved == {"score.weight", *(f"model.layers.{layer}.mlp.gate.weight" for layer in range(2))}


def test_a_bad_row_of_the_held_out_file_is_found_too(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", labelled("classification", 40))
    held_out = write(tmp_path / "h.jsonl", [{"text": "a", "label": "wind"}, {"text": "b", "label": "fog"}])
    words = [f"data.path={path}", f"data.held_out_path={held_out}", "data.format=classification", "data.too_long=cut"]
    assert run_small(tmp_path / "run", *words) == 3
    assert f"{held_out}:2: unknown label: 'fog' is none of rain, sun, wind" in capsys.readouterr().err
