"""The verb evaluate, and prompts: the figures are those that transformers' own model gives by hand."""

import json
import math
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.train.helpers import SMALL, WORDS, metrics, read_json, run_small, write_corpus
from tests.train.test_labelled import labelled, write
from train.cli import main
from train.compose import recipes
from train.config import DataConfig
from train.data.templates import Encoder
from train.data.tokenizer import mixtral_tokenizer
from train.errors import ConfigError
from train.evaluate.models import find_model, find_models
from train.evaluate.prompts import Prompts

FREE = [word for word in SMALL if not word.startswith("model.")]


def evaluate(folder, *words):
    return main(["evaluate", *FREE, f"run.dir={folder}", *words])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl", 100)


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory):
    """A model, one that was trained on from it, and an adapter of it."""
    folder = tmp_path_factory.mktemp("models")
    assert run_small(folder / "a", f"data.path={corpus}", "schedule.warmup_steps=1", "optim.lr=5e-3") == 0
    base = f"model.init_from={folder / 'a' / 'export'}"
    for name, words in {"b": ["train.max_steps=12"], "lora": ["lora.rank=4"]}.items():
        words = [*FREE, f"data.path={corpus}", base, "schedule.warmup_steps=1", "optim.lr=5e-3", *words]
        assert main(["train", *words, f"run.dir={folder / name}"]) == 0
    return {name: folder / name / "export" for name in ("a", "b", "lora")}


def write_prompts(path, export):
    """Prompts of both kinds; of every other one to be written, the answer is what transformers writes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    rows = []
    for number in range(9):
        prompt = " ".join(WORDS[number % 7 : number % 7 + 1 + number % 4])
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[
            0, ids["input_ids"].shape[1] :
        ]
        answer = tokenizer.decode(written, skip_special_tokens=True).strip().splitlines()[0].strip()
        rows.append({"prompt": prompt, "answer": answer if number % 2 else "something else"})
        choices = [f" {WORDS[(number + k) % 12]} {'the ' * k}".rstrip() for k in range(3)]
        rows.append({"prompt": prompt, "choices": choices, "answer": number % 3})
    return write(path, rows)


def chosen(export, path, normalised):
    """The share of right choices, one choice at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(export)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    right = []
    for row in map(json.loads, path.read_text().splitlines()):
        scores = []
        for choice in row.get("choices", []):
            ids = tokenizer(row["prompt"] + choice, return_tensors="pt")["input_ids"]
            start = len(tokenizer(row["prompt"])["input_ids"])
            log = model(ids).logits[0].log_softmax(-1)
            score = sum(log[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))
            scores.append(score / len(choice.encode()) if normalised else score)
        if scores:
            right.append(scores.index(max(scores)) == row["answer"])
    return sum(right) / len(right)


def test_two_models_are_compared_on_held_out_rows_and_prompts(tmp_path, corpus, models, capsys):
    path = write_prompts(tmp_path / "prompts.jsonl", models["a"])
    pair = [str(models["a"]), str(models["b"])]
    words = [f"data.path={corpus}", f"evaluate.prompts={path}", "evaluate.answer_tokens=6"]
    assert (
        evaluate(tmp_path / "run", *words, f"evaluate.compare=[{','.join(pair)}]", "evaluate.micro_batch_size=4") == 0
    )
    shown = capsys.readouterr().out
    found = read_json(tmp_path / "run" / "evaluation.json")["models"]
    assert list(found) == pair
    for name in ("a", "b"):
        figures = found[str(models[name])]
        assert figures["eval_loss"] == pytest.approx(metrics(models[name].parent)[-1]["eval_loss"], abs=1e-6)
        assert figures["eval_perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
        assert figures["eval_choice_accuracy"] == chosen(models[name], path, normalised=False)
        assert figures["eval_choice_accuracy_normalised"] == chosen(models[name], path, normalised=True)
    assert found[pair[0]]["eval_exact_match"] == pytest.approx(4 / 9)
    line = next(line for line in shown.splitlines() if line.startswith("loss "))
    losses = [found[name]["eval_loss"] for name in pair]
    assert line.split()[1:] == [f"{losses[0]:.4f}", f"{losses[1]:.4f}", f"{losses[1] - losses[0]:+.4f}"]
    assert read_json(tmp_path / "run" / "exit.json")["message"] == "2 evaluated"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_adapter_is_evaluated_on_the_weights_that_it_names(tmp_path, corpus, models):
    pair = [str(models["a"]), str(models["lora"])]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(recipes()["pretrain_tiny"].read_text() + "\nlora:\n  rank: 4\n  dropout: 0.1\n")
    words = [*FREE[1:], f"recipe={recipe}", f"data.path={corpus}", f"evaluate.compare=[{','.join(pair)}]"]
    assert main(["evaluate", *words, f"run.dir={tmp_path / 'run'}"]) == 0
    found = read_json(tmp_path / "run" / "evaluation.json")["models"]
    for name in ("a", "lora"):
        expected = metrics(models[name].parent)[-1]["eval_loss"]
        assert found[str(models[name])]["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert found[pair[0]]["eval_loss"] != found[pair[1]]["eval_loss"]


def test_a_model_that_is_named_besides_those_to_compare_changes_none_of_them(models):
    words = [*FREE, "data.path=x", f"model.init_from={models['a']}"]
    found = find_models([*words, f"evaluate.compare=[{models['a']},{models['lora']}]"])
    base, adapted = (found[str(models[name])].config for name in ("a", "lora"))
    assert base.model == adapted.model
    assert (base.lora.rank, base.lora.init_from) == (0, None)
    assert (adapted.lora.rank, adapted.lora.init_from) == (4, str(models["lora"]))
    (quantized,) = find_models([*words[:-1], f"evaluate.compare=[{models['lora']}]", "lora.quantize=nf4"]).values()
    assert quantized.config.lora.quantize == "nf4"


@pytest.mark.parametrize("word", ["lora.quantize=nf4", "lora.rank=4"])
def test_a_word_of_adapters_is_refused_for_a_model_that_has_none(models, word, tmp_path, capsys):
    base = f"model.init_from={models['a']}"
    compared = f"evaluate.compare=[{models['lora']},{models['a']}]"
    for words in (["evaluate", *FREE, base], ["evaluate", *FREE, compared], ["generate", base, "generate.prompt=a"]):
        assert main([*words, "data.path=x", word]) == 2
        assert f"{word} is of an adapter, and {models['a']} has none" in capsys.readouterr().err
    recipe = tmp_path / "mine.yaml"
    text = recipes()["sft_8x7b_lora"].read_text()
    recipe.write_text(text.replace("mistralai/Mixtral-8x7B-v0.1", str(models["a"])))
    assert find_model([f"recipe={recipe}"], "generate").config.lora.rank == 0  # which needs no data either
    with pytest.raises(ConfigError, match=word):
        find_model([f"recipe={recipe}", word], "generate")
    with pytest.raises(ConfigError, match="data.path is needed"):
        find_models([f"recipe={recipe}"])


def test_every_source_has_a_perplexity_of_its_own_weighted_by_tokens(tmp_path, models):
    short = write(tmp_path / "short.jsonl", [{"text": f"wind {n}"} for n in range(30)])
    long = write_corpus(tmp_path / "long.jsonl", 60)
    base = f"model.init_from={models['a']}"
    both = f"data.sources=[{{path: {short}}}, {{path: {long}}}]"
    assert evaluate(tmp_path / "run", both, base, "data.held_out_fraction=0.5") == 0
    (found,) = read_json(tmp_path / "run" / "evaluation.json")["models"].values()
    by_hand, tokens = {}, {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["a"])
    assert main(["train", *FREE, both, base, "data.held_out_fraction=0.5", f"run.dir={tmp_path / 't'}"]) == 0
    first = metrics(tmp_path / "t")[0]
    rows = [json.loads(line) for line in (tmp_path / "t" / "export" / "held_out.jsonl").read_text().splitlines()]
    for name in (short, long):
        mine = write(tmp_path / f"only-{name.name}", [row for row in rows if row["source"].startswith(str(name))])
        words = [f"data.held_out_path={mine}", f"data.path={long}", base]
        assert evaluate(tmp_path / f"run-{name.stem}", *words) == 0
        (alone,) = read_json(tmp_path / f"run-{name.stem}" / "evaluation.json")["models"].values()
        by_hand[name] = alone["eval_loss"]
        texts = [json.loads(line)["text"] for line in mine.read_text().splitlines()]
        tokens[name] = sum(len(tokenizer(text)["input_ids"]) for text in texts)
        for figures in (found, first):
            assert figures[f"eval_loss/{name}"] == pytest.approx(by_hand[name], abs=1e-6)
            assert figures[f"eval_perplexity/{name}"] == pytest.approx(math.exp(by_hand[name]), rel=1e-6)
    total = sum(by_hand[name] * tokens[name] for name in tokens) / sum(tokens.values())
    assert found["eval_loss"] == pytest.approx(total, abs=1e-6)
    assert first["eval_loss"] == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("kind", ["text", "classification"])
def test_the_weights_of_sources_change_no_figure_of_held_out_documents(tmp_path, corpus, models, kind):
    rows = [{"text": f"wind {n}"} if kind == "text" else row for n, row in enumerate(labelled("classification", 20))]
    kept = write(tmp_path / "kept.jsonl", rows)
    words = [f"data.held_out_path={kept}", f"model.init_from={models['a']}"]
    sources = [corpus, write_corpus(tmp_path / "b.jsonl", 90)]
    if kind == "classification":
        sources = [write(tmp_path / f"{n}.jsonl", labelled("classification", 60 + n)) for n in range(2)]
        words += ["data.format=classification", "data.too_long=cut"]
    given = (f"{{path: {path}, weight: {weight}}}" for path, weight in zip(sources, (1, 99), strict=True))
    words.append(f"data.sources=[{','.join(given)}]")
    assert main(["train", *FREE, *words, "train.max_steps=1", f"run.dir={tmp_path / 'trained'}"]) == 0
    words.append(f"model.init_from={tmp_path / 'trained' / 'export'}")
    assert evaluate(tmp_path / "run", *(word for word in words if str(models["a"]) not in word)) == 0
    (found,) = read_json(tmp_path / "run" / "evaluation.json")["models"].values()
    assert found["eval_loss"] == pytest.approx(metrics(tmp_path / "trained")[-1]["eval_loss"], abs=1e-6)


def test_prompts_are_answered_at_the_evaluations_of_a_run(tmp_path, corpus, models):
    path = write_prompts(tmp_path / "prompts.jsonl", models["a"])
    words = [*FREE, f"data.path={corpus}", f"model.init_from={models['a']}", f"evaluate.prompts={path}"]
    words += ["evaluate.answer_tokens=6", "train.max_steps=1", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *words]) == 0
    rows = metrics(tmp_path / "run")
    assert rows[0]["eval_exact_match"] == pytest.approx(4 / 9)
    assert read_json(tmp_path / "run" / "summary.json")["eval_choice_accuracy"] == rows[-1]["eval_choice_accuracy"]


def test_the_end_marks_that_a_models_folder_names_end_an_answer_in_every_evaluation(tmp_path, corpus, models):
    folders = {name: shutil.copytree(models[name], tmp_path / name) for name in ("a", "lora")}
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["a"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["a"])
    for prompt in (f"{first} {second}" for first in WORDS for second in WORDS):
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        written = written[0, ids["input_ids"].shape[1] :].tolist()
        end = max(map(written.index, written))
        if end and (answer := tokenizer.decode(written[:end]).strip()):
            break
    transformers.GenerationConfig(eos_token_id=[2, written[end]]).save_pretrained(folders["a"])
    adapter = folders["lora"] / "adapter_config.json"
    adapter.write_text(json.dumps(read_json(adapter) | {"base_model_name_or_path": str(folders["a"])}))
    weights = folders["lora"] / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    path = write(tmp_path / "p.jsonl", [{"prompt": prompt, "answer": answer}] * 2)
    words = [f"data.path={corpus}", f"evaluate.prompts={path}", "evaluate.answer_tokens=6", "train.precision=fp32"]
    compared = [str(folders["a"]), str(folders["lora"]), str(models["a"])]
    assert evaluate(tmp_path / "run", *words, f"evaluate.compare=[{','.join(compared)}]") == 0
    found = read_json(tmp_path / "run" / "evaluation.json")["models"]
    assert [found[name]["eval_exact_match"] for name in compared] == [1, 1, 0]
    words += [f"model.init_from={folders['a']}", "train.max_steps=1", f"run.dir={tmp_path / 'trained'}"]
    assert main(["train", *FREE, *words]) == 0
    assert metrics(tmp_path / "trained")[0]["eval_exact_match"] == 1
    exported = transformers.GenerationConfig.from_pretrained(tmp_path / "trained" / "export")
    assert exported.eos_token_id == [2, written[end]]
    assert transformers.GenerationConfig.from_pretrained(models["a"]).eos_token_id == 2


def test_generation_settings_that_cannot_be_read_end_a_run_before_its_first_step(tmp_path, corpus, models, capsys):
    folder = shutil.copytree(models["a"], tmp_path / "a")
    (folder / "generation_config.json").write_text('{"eos_token_id": [')
    words = [*FREE, f"data.path={corpus}", f"model.init_from={folder}", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *words]) == 4
    assert f"{folder / 'generation_config.json'} cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_messages_are_written_by_the_chat_template(tmp_path, corpus, models):
    messages = [{"role": "user", "content": "the wind"}]
    common = [f"data.path={corpus}", f"model.init_from={models['a']}", "evaluate.answer_tokens=4"]
    found = []
    for number, prompt in enumerate((messages, "[INST] the wind [/INST]")):
        rows = [{"prompt": prompt, "choices": [" past", " row the", " of"], "answer": 1}]
        path = write(tmp_path / f"{number}.jsonl", rows)
        words = [*common, f"evaluate.prompts={path}", "data.chat_template=mixtral"]
        assert evaluate(tmp_path / f"run{number}", *words) == 0
        found += read_json(tmp_path / f"run{number}" / "evaluation.json")["models"].values()
    assert found[0] == found[1]


def test_blanks_at_the_end_of_a_prompt_belong_to_the_choices(tmp_path):
    encoder = Encoder(mixtral_tokenizer(), DataConfig(), 32_000)
    cities = ["London City", "Paris City"]
    rows = [
        {"prompt": "The capital is ", "choices": cities, "answer": 1},
        {"prompt": "The capital is", "choices": [f" {city}" for city in cities], "answer": 1},
        {"prompt": "A list:\n\n", "choices": cities, "answer": 1},
        {"prompt": "A list:", "choices": [f"\n\n{city}" for city in cities], "answer": 1},
        {"prompt": "  ", "choices": cities, "answer": 1},
    ]
    apart, joined, broken, begun, blank = Prompts(str(write(tmp_path / "p.jsonl", rows)), encoder, 64, 4, [2]).rows
    assert (apart.ids, apart.choices) == (joined.ids, joined.choices)
    assert (broken.ids, broken.choices) == (begun.ids, begun.choices)
    assert apart.choices[0][0] != apart.choices[1][0]
    assert blank.ids == encoder.prompt("  ")
    assert apart.sizes == broken.sizes == [len(city) for city in cities]


BAD = {
    "no answer": ({"prompt": "a"}, "missing column"),
    "no text": ({"prompt": "a", "answer": 3}, "wrong type: 'answer' is 3"),
    "one choice": ({"prompt": "a", "choices": ["x"], "answer": 0}, "wrong type: 'choices' is no list"),
    "out of range": ({"prompt": "a", "choices": ["x", "y"], "answer": 2}, "answer out of range: 2, expected"),
    "messages": ({"prompt": [{"role": "user", "content": "a"}], "answer": "x"}, "no chat template"),
    "too long": ({"prompt": "a " * 5000, "answer": "x"}, "too long"),
}


def test_a_file_of_prompts_is_of_a_kind_that_has_rows(tmp_path, corpus, capsys):
    (tmp_path / "p.yaml").write_text("prompt: a")
    assert run_small(tmp_path / "run", f"data.path={corpus}", f"evaluate.prompts={tmp_path / 'p.yaml'}") == 3
    assert "expected a file that ends in one of .txt, .jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("case", BAD)
def test_a_bad_prompt_ends_with_3_and_its_line(tmp_path, corpus, case, capsys):
    row, problem = BAD[case]
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "b"}, row])
    assert run_small(tmp_path / "run", f"data.path={corpus}", f"evaluate.prompts={path}") == 3
    assert f"{path}:2: {problem}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


REFUSED = {
    "": "evaluate needs a model",
    "evaluate.compare=[x,x]": "names a model twice",
    "evaluate.prompts=nowhere.jsonl": "evaluate.prompts=nowhere.jsonl: no such file",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_evaluated_is_refused_before_torch(tmp_path, corpus, words, capsys):
    assert evaluate(tmp_path / "run", f"data.path={corpus}", *words.split()) == 2
    assert REFUSED[words] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_classifier_and_its_adapter_are_evaluated_with_their_labels(tmp_path, models, capsys):
    path = write(tmp_path / "a.jsonl", labelled("classification", 200))
    words = [*FREE, f"data.path={path}", "data.format=classification", "data.too_long=cut", "train.max_steps=3"]
    words.append("data.labels=[wind,sun,rain,fog]")
    base = f"model.init_from={models['a']}"
    assert main(["train", *words, base, f"run.dir={tmp_path / 'whole'}"]) == 0
    assert main(["train", *words, base, "lora.rank=4", f"run.dir={tmp_path / 'lora'}"]) == 0
    asked = [f"data.path={path}", "data.format=classification", "data.too_long=cut"]
    for name in ("whole", "lora"):
        run = tmp_path / f"run-{name}"
        assert evaluate(run, *asked, f"evaluate.compare=[{tmp_path / name / 'export'}]") == 0
        (found,) = read_json(run / "evaluation.json")["models"].values()
        last = metrics(tmp_path / name)[-1]
        assert found == {figure: pytest.approx(last[figure], abs=1e-6) for figure in last if "eval_" in figure}
    described = read_json(tmp_path / "whole" / "export" / "config.json")
    del described["problem_type"]  # which transformers writes of models that were given labels alone
    (tmp_path / "whole" / "export" / "config.json").write_text(json.dumps(described))
    assert evaluate(tmp_path / "run-silent", *asked, f"model.init_from={tmp_path / 'whole' / 'export'}") == 0
    silent, whole = (read_json(tmp_path / f"run-{name}" / "evaluation.json")["models"] for name in ("silent", "whole"))
    assert [*silent.values()] == [*whole.values()]
    capsys.readouterr()
    assert evaluate(tmp_path / "run", *asked, base) == 4
    assert "holds no classifier" in capsys.readouterr().err


def test_evaluation_changes_no_weight_and_needs_no_optimizer(tmp_path, corpus, models):
    from train.compose import compose
    from train.evaluate.verb import evaluate_model
    from train.parallel.replicated import ReplicatedEngine

    words = [*FREE, f"data.path={corpus}", f"model.init_from={models['a']}"]
    engine = ReplicatedEngine(compose(words).config)
    evaluate_model(engine, compose(words).config)
    assert not hasattr(engine, "optimizer")
    weights = transformers.AutoModelForCausalLM.from_pretrained(models["a"]).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in engine.module.state_dict().items())
