"""The verb generate: its tokens are those of transformers' own model, its text is theirs, and bad prompts are named."""

import functools
import itertools
import json
import os
import random
import re
import sys

import pyarrow as pa
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from pyarrow import parquet

from tests.conftest import SIZES, skew_router
from tests.train.test_labelled import write
from train.cli import main
from train.config import Config, DataConfig, GenerateConfig, TrainConfig, check, check_generation
from train.data.templates import Encoder
from train.data.tokenizer import INSTRUCT_TEMPLATE, add_instruct_template, mixtral_tokenizer, train_bpe
from train.errors import ConfigError, DataError
from train.generate.asked import read_prompts
from train.generate.writing import Noise, Pieces, Sampling

TEXTS = ["the wind of the valley", "naïve 你好 🦊🦊\n  def f(x):", "Ωmega 👩‍👩‍👧 carries past", "a"]
GREEDY = ["train.precision=fp32", "generate.temperature=0", "generate.max_new_tokens=12"]
TEXT_ALONE = {"add_special_tokens": False, "split_special_tokens": True}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@functools.cache
def byte_level():
    rows = [{"text": text, "format": "text", "problem": None} for text in TEXTS]
    return train_bpe(Dataset.from_list(rows), 300)


def save_model(folder):
    """Saves transformers' Mixtral, with weights under which no two tokens nearly tie, and a tokenizer."""
    torch.manual_seed(1)
    tokenizer = byte_level()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = SIZES | {"vocab_size": 300, "initializer_range": 0.3, "max_position_embeddings": 512} | special
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    skew_router(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder, base):
    """Saves an adapter of a model, as PEFT draws it, and a folder in which PEFT merged the two."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(**LORA))
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "m")


def generate(model, *words):
    return main(["generate", f"model.init_from={model}", *GREEDY, *words])


def results(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected(model, prompts, tokens=12):
    """What transformers writes for a batch of texts: new tokens up to the end mark, and their text after the prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = byte_level()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    found = []
    for prompt, row in zip(prompts, written[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        stop = tokenizer.eos_token_id in row
        row = row[: row.index(tokenizer.eos_token_id) + 1] if stop else row
        ids = tokenizer(prompt)["input_ids"]
        start, text = tokenizer.batch_decode([ids, [*ids, *row]], skip_special_tokens=True)
        found.append((text[len(start) :].rstrip("�"), len(row), "stop" if stop else "length"))
    return found


def test_a_file_of_prompts_of_different_lengths_is_written_as_transformers_writes_it(tmp_path, model):
    prompts = [" ".join(TEXTS[n % 4].split(" ")[: 1 + n % 3]) + "x" * (n % 5) for n in range(11)]
    path = write(tmp_path / "p.jsonl", [{"prompt": prompt, "id": n} for n, prompt in enumerate(prompts)])
    output = tmp_path / "out.jsonl"
    assert generate(model, f"generate.prompts={path}", f"generate.output={output}", "generate.batch_size=4") == 0
    rows = results(output)
    assert [(row["prompt"], row["id"]) for row in rows] == [(prompt, n) for n, prompt in enumerate(prompts)]
    found = [(row["text"], row["tokens"], row["finish_reason"]) for row in rows]
    assert found == expected(model, prompts)
    assert {"stop", "length"} == {row["finish_reason"] for row in rows}
    assert not list(tmp_path.glob("*.partial"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "p.jsonl"]


def test_the_pieces_of_a_stream_are_whole_characters_and_make_the_text(model, capsys, monkeypatch):
    pieces = []
    show = lambda piece: (pieces.append(piece), sys.stdout.write(piece))  # noqa: E731
    monkeypatch.setattr("train.generate.verb.show", show)
    prompt = TEXTS[2] + " xx"
    assert generate(model, f"generate.prompt={prompt}", "generate.max_new_tokens=40") == 0
    ((text, tokens, reason),) = expected(model, [prompt], 40)
    assert "".join(pieces) == text + "\n"
    assert len(pieces) > 10
    shown = capsys.readouterr()
    assert shown.out == text + "\n"
    assert f"{tokens} tokens, finish_reason {reason}" in shown.err


@pytest.mark.parametrize("tokenizer", [byte_level, mixtral_tokenizer])
def test_a_character_of_several_tokens_comes_whole_and_the_space_before_a_word_stays(tokenizer):
    tokenizer = tokenizer()
    before, after = "one", " two 🦊 naïve\n  ⚙ 你 three"
    ids = tokenizer(before + after, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    pieces = [Pieces(tokenizer, ids[:start], is_answer=False)]
    found = [pieces[0].add(token) for token in ids[start:]]
    assert "".join(found) == after
    assert "" in found
    assert not any("�" in piece for piece in found)
    fox = next(place for place, piece in enumerate(found) if "🦊" in piece)
    cut = Pieces(tokenizer, ids[:start], is_answer=True)
    assert cut.text(ids[start : start + fox]).strip() == "two"  # a part of the fox is no text


@pytest.mark.parametrize("tokenizer", [byte_level, mixtral_tokenizer])
def test_any_tokens_give_the_text_that_the_tokenizer_decodes(tokenizer):
    tokenizer, draw = tokenizer(), random.Random(0)
    prompt = tokenizer("naïve 你")["input_ids"]
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    compared = 0
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 30))]
        whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)
        if whole.endswith("�"):  # cut in a character, whose whole run of bytes is no text to some
            continue
        compared += 1
        assert start + Pieces(tokenizer, prompt, is_answer=False).text(ids) == whole
    assert compared > 100


def test_a_chat_is_written_by_the_template_and_answered_without_white_space(tmp_path, model, capsys):
    messages = [
        {"role": "user", "content": "the wind"},
        {"role": "assistant", "content": "of"},
        {"role": "user", "content": "carries"},
    ]
    path = write(tmp_path / "p.jsonl", [{"prompt": messages}, {"prompt": "the valley"}])
    words = [f"generate.prompts={path}", "generate.chat=true", "data.chat_template=mixtral"]
    assert generate(model, *words) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = ["[INST] the wind [/INST] of</s>[INST] carries [/INST]", "[INST] the valley [/INST]"]
    for row, (text, tokens, reason) in zip(rows, expected(model, texts), strict=True):
        assert (row["tokens"], row["finish_reason"]) == (tokens, reason)
        assert row["text"] == text.lstrip()
    assert rows[0]["prompt"] == messages


def test_marks_in_a_prompt_are_text_and_those_of_the_template_are_marks():
    tokenizer = byte_level()
    encoder = Encoder(tokenizer, DataConfig(path="x"), 300)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "</s>"]
    assert encoder.prompt("</s>") == [1, *letters]
    tokenizer = byte_level.__wrapped__()
    add_instruct_template(tokenizer)
    encoder = Encoder(tokenizer, DataConfig(path="x"), 300)
    turns = [{"role": role, "content": "</s>"} for role in ("user", "assistant", "user")]
    ids = encoder.prompt(turns, more="</s>")
    written = [[1], "[INST] </s> [/INST] </s>", [2], "[INST] </s> [/INST]</s>"]
    expected = [part if isinstance(part, list) else tokenizer(part, **TEXT_ALONE)["input_ids"] for part in written]
    assert ids == list(itertools.chain(*expected))


def test_draws_depend_on_the_seed_and_on_no_prompt_beside(tmp_path, model):
    path = write(tmp_path / "p.jsonl", [{"prompt": "the wind" + "x" * (n % 3)} for n in range(7)])
    found = []
    for size, seed in ((1, 0), (4, 0), (4, 1)):
        output = tmp_path / f"{size}-{seed}"
        words = ["generate.temperature=3", f"generate.batch_size={size}", f"run.seed={seed}"]
        assert generate(model, f"generate.prompts={path}", f"generate.output={output}", *words) == 0
        found.append([row["text"] for row in results(output)])
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == 7  # those of equal prompts too


def test_one_token_to_choose_from_is_the_likeliest():
    scores = torch.randn(3, 50)
    for sampling in (Sampling(9.0, top_k=1), Sampling(0.1, top_p=1e-4), Sampling(0.0)):
        drawn = sampling.processors([0, 1, 2])(torch.zeros(3, 1, dtype=torch.long), scores).argmax(-1)
        assert torch.equal(drawn, scores.argmax(-1))
    likeliest = scores.topk(5).indices
    for seed in range(50):
        drawn = Sampling(9.0, top_k=5, seed=seed).processors([0, 1, 2])(None, scores).argmax(-1)
        assert (drawn[:, None] == likeliest).any(-1).all()


def test_the_greatest_score_is_drawn_as_often_as_its_probability_says():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    noise = Noise(0, range(4))
    draws = torch.cat([noise(torch.empty(0), scores.expand(4, -1)).argmax(-1) for _ in range(5000)])
    share, expected = draws.bincount(minlength=5) / len(draws), scores.softmax(-1)
    assert (share - expected).abs().max() < 5 * (0.25 / len(draws)) ** 0.5
    assert share[-1] == 0


def test_an_adapter_writes_what_peft_writes_with_it_and_what_the_merged_model_writes(tmp_path, model):
    adapter, merged = save_adapter(tmp_path, model)
    path = write(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in TEXTS])
    found = {}
    for name, words in {
        "merged": [f"model.init_from={merged}"],
        "folder": [f"model.init_from={adapter}"],
        "both": [f"model.init_from={model}", f"lora.init_from={adapter}"],
    }.items():
        words = [f"generate.prompts={path}", f"generate.output={tmp_path / 'of'}-{name}", *GREEDY, *words]
        assert main(["generate", *words]) == 0
        found[name] = [(row["text"], row["tokens"], row["finish_reason"]) for row in results(tmp_path / f"of-{name}")]
    assert found["folder"] == found["both"] == found["merged"] == expected(merged, TEXTS)
    assert found["merged"] != expected(model, TEXTS)
    theirs = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model), adapter)
    ids = byte_level()(TEXTS[0], return_tensors="pt")
    written = theirs.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert byte_level().decode(written[0], skip_special_tokens=True).rstrip("�") == TEXTS[0] + found["folder"][0][0]


def test_a_chat_template_comes_with_the_adapter_that_learned_it(tmp_path, model, capsys):
    adapter, _ = save_adapter(tmp_path, model)
    words = ["generate.prompt=wind", "generate.chat=true"]
    assert generate(adapter, *words) == 2
    assert "generate.prompt: no chat template" in capsys.readouterr().err
    tokenizer = byte_level().__class__.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(adapter)
    assert generate(adapter, *words) == 0


def test_the_end_marks_that_the_folder_names_end_a_text_too(tmp_path, capsys):
    prompt = TEXTS[2] + "xx"
    folder = save_model(tmp_path / "m")
    written = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
        **byte_level()(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    third = int(written[0, -10])
    assert third not in written[0, -12:-10]
    transformers.GenerationConfig(eos_token_id=[2, third]).save_pretrained(folder)
    assert generate(folder, f"generate.prompt={prompt}") == 0
    assert "3 tokens, finish_reason stop" in capsys.readouterr().err


BAD = {
    "no prompt": ({"text": "a"}, "missing column: expected"),
    "no object": (["a"], "missing column: expected"),
    "no text": ({"prompt": 3}, "wrong type: the prompt is 3, neither"),
    "no messages": ({"prompt": []}, "no messages"),
    "no content": ({"prompt": [{"role": "user"}]}, "missing key: message 1 has no 'content'"),
    "answered": ({"prompt": [{"role": "assistant", "content": "a"}]}, "wrong role order: the last message is"),
    "two users": ({"prompt": [{"role": "user", "content": "a"}] * 2}, "refused by the chat template"),
    "too long": ({"prompt": "a" * 600}, "too long: 601 tokens and generate.max_new_tokens=12; the model takes 512"),
    "half": ({"prompt": "a\ud800"}, "half a character"),
    "taken": ({"prompt": "a", "tokens": 3}, "column taken: 'tokens'"),
    "half elsewhere": ({"prompt": "a", "note": "\ud800"}, "not JSON: the row cannot be written with its result"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, case):
    row, problem = BAD[case]
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, row])
    encoder = Encoder(byte_level(), DataConfig(path="x", chat_template=None), 300)
    encoder.template = INSTRUCT_TEMPLATE
    with pytest.raises(DataError, match=re.escape(f"{path}:2: {problem}")):
        read_prompts(encoder, GenerateConfig(prompts=str(path), output="x", max_new_tokens=12), 512)


def test_a_bad_row_ends_with_3_before_anything_is_written(tmp_path, model, capsys):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}])
    assert generate(model, f"generate.prompts={path}", f"generate.output={tmp_path / 'out'}") == 3
    assert f"{path}:2: no chat template" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_a_row_that_is_no_json_ends_with_3_before_anything_is_written(tmp_path, model, capsys):
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"prompt": ["a"], "when": pa.array([0], pa.timestamp("us"))}), path)
    for words in ([], [f"generate.output={tmp_path / 'out'}"]):
        assert generate(model, f"generate.prompts={path}", *words) == 3
        shown = capsys.readouterr()
        assert f"{path}:1: not JSON: the row cannot be written with its result (Object of type datetime" in shown.err
        assert not shown.out
    assert os.listdir(tmp_path) == ["p.parquet"]


def test_half_a_character_is_escaped_on_standard_output(tmp_path, model, capsys):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "note": "\ud800"}])
    assert generate(model, f"generate.prompts={path}") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["note"] == "\ud800"


REFUSED = {
    "generate.prompt and generate.prompts are both given": {"prompt": "a", "prompts": "FILE"},
    "generate.prompts=nowhere.jsonl: no such file": {"prompts": "nowhere.jsonl"},
    "exists already: name another file": {"prompt": "a", "output": "FILE"},
    "generate.output=nowhere/x: there is no such folder": {"prompt": "a", "output": "nowhere/x"},
    "generate.output=x is for what follows a prompt": {"output": "x"},
    "generate.top_p=0: expected float > 0 and <= 1": {"prompt": "a", "top_p": 0},
    "generate.temperature=-1: expected float >= 0": {"prompt": "a", "temperature": -1},
    "set generate.prompt, or generate.prompts to a file": {},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_cannot_be_written_is_refused_with_its_key(tmp_path, problem):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    words = {name: str(path) if value == "FILE" else value for name, value in REFUSED[problem].items()}
    config = Config(generate=GenerateConfig(**words), train=TrainConfig(max_steps=1))
    config.data.path = "x"
    with pytest.raises(ConfigError, match=re.escape(problem)):  # noqa: PT012
        check(config)
        check_generation(config, can_chat="output" in words)
    check_generation(Config(), can_chat=True)


WORDS = {
    "": "there is nothing to go on from",
    "generate.prompt=a data.format=classification": "data.format=classification is a classifier's, which writes",
    "generate.prompt=a data.tokenizer=train_bpe": "a model has a tokenizer already",
    "generate.prompt=a parallel.expert=2 parallel.zero=1": "parallel.expert=2 needs as many processes",
    "generate.prompt=a generate.chat=true": "generate.prompt: no chat template",
}


@pytest.mark.parametrize("words", WORDS)
def test_words_that_cannot_be_used_end_with_2(model, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    assert generate(model, *words.split()) == 2
    assert WORDS[words] in capsys.readouterr().err


def test_a_verb_without_a_model_says_where_to_name_it(capsys):
    assert main(["generate", "generate.prompt=a"]) == 2
    assert "generate needs a model: name it in model.init_from" in capsys.readouterr().err


def test_a_classifier_and_its_adapter_write_nothing(tmp_path, model, capsys):
    base = transformers.MixtralForSequenceClassification.from_pretrained(model, num_labels=2)
    get_peft_model(base, LoraConfig(**LORA, task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    transformers.MixtralForSequenceClassification.from_pretrained(model, num_labels=2).save_pretrained(tmp_path / "c")
    byte_level().save_pretrained(tmp_path / "c")
    assert generate(tmp_path / "c", "generate.prompt=a") == 4
    assert "holds a classifier, expected a causal language model" in capsys.readouterr().err
    assert generate(tmp_path / "adapter", "generate.prompt=a") == 4
    assert "is a classifier's adapter" in capsys.readouterr().err


def test_a_chat_on_a_terminal_goes_on_until_its_end(model, capsys, monkeypatch):
    keyboard, terminal = os.openpty()
    os.write(keyboard, b"the wind\ncarries\n\x04")
    with os.fdopen(terminal, encoding="utf-8") as stdin, monkeypatch.context() as patched:
        patched.setattr("sys.stdin", stdin)
        assert generate(model, "data.chat_template=mixtral") == 0
        first = "[INST] the wind [/INST]"
        ((text, *_),) = expected(model, [first])
        second = f"{first} {text.lstrip()}</s>[INST] carries [/INST]"
        assert generate(model) == 2
    os.close(keyboard)
    shown = capsys.readouterr()
    (then,) = expected(model, [second])
    assert shown.out == f"> {text.lstrip()}\n> {then[0].lstrip()}\n> "
    assert "there is no chat template to chat with: set data.chat_template" in shown.err


def test_a_message_that_the_template_refuses_is_dropped_and_asked_for_again(tmp_path, model, capsys, monkeypatch):
    template = tmp_path / "template.jinja"
    refused = "{% if 'no' in messages[-1].content %}{{ raise_exception('not that') }}{% endif %}"
    template.write_text(refused + INSTRUCT_TEMPLATE)
    keyboard, terminal = os.openpty()
    os.write(keyboard, b"no\nthe wind\n" + b"x" * 1000 + b"\nnever\n")
    with os.fdopen(terminal, encoding="utf-8") as stdin, monkeypatch.context() as patched:
        patched.setattr("sys.stdin", stdin)
        assert generate(model, f"data.chat_template={template}") == 0
    os.close(keyboard)
    shown = capsys.readouterr()
    ((text, *_),) = expected(model, ["[INST] the wind [/INST]"])
    assert shown.out == f"> > {text.lstrip()}\n> "
    assert re.search("refused by the chat template: not that.*\ntoo long: ", shown.err)


def test_a_reader_that_has_gone_ends_the_verb_with_6(model, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patched, os.fdopen(writer, "w") as closed:
        patched.setattr("sys.stdout", closed)
        assert generate(model, "generate.prompt=the wind") == 6
    assert "standard output: Broken pipe" in capsys.readouterr().err
