"""The configuration: every file composes, every mistake is refused by its full key."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from train.compose import compose, conf_folder, groups, recipes, to_yaml
from train.config import Config, check, keys
from train.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_every_choice_of_every_group_composes():
    choices = [(group, choice) for group, names in groups().items() for choice in names]
    assert len(choices) == 24
    assert len(list(conf_folder().glob("*/*.yaml"))) == len(choices)
    assert {path.name for path in conf_folder().glob("*.yaml")} == {"config.yaml", "hardware.yaml"}
    for group, choice in choices:
        needed = ["data.path=x"] if choice in ("files", "hub") else []
        compose([f"{group}={choice}", "train.max_steps=1", *needed])


def test_every_recipe_says_in_its_first_line_what_it_is_and_how_long_it_trains():
    assert len(recipes()) == 10
    for path in recipes().values():
        train = yaml.safe_load(path.read_text())["train"]
        assert train.get("max_steps") or train.get("epochs")
        assert path.read_text().startswith("# ")


def test_the_defaults_pass_their_own_checks():
    config = Config()
    config.train.max_steps, config.data.path = 1, "x"
    check(config)


def test_every_key_is_documented_and_read():
    read = {
        node.attr
        for path in [*ROOT.glob("train/**/*.py")]
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    for item in keys():
        assert len(item.help) > 5, item.name
        if not item.name.startswith("model."):  # those are handed to MixtralConfig as one
            assert item.name.split(".")[1] in read, f"{item.name} is read nowhere"


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_groups(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults:\n  - override /optim: sgd\noptim:\n  lr: 0.5\ntrain:\n  max_steps: 7\n")
    config = compose([f"recipe={recipe}", "train.max_steps=9"]).config
    assert (config.optim.name, config.optim.lr, config.train.max_steps) == ("sgd", 0.5, 9)
    assert compose([f"+recipe={recipe}", "optim=adamw"]).config.optim.name == "adamw"
    recipe.write_text("defaults:\ntrain:\n  max_steps: 7\n")
    assert compose([f"recipe={recipe}"]).config.train.max_steps == 7


def test_a_recipe_by_relative_path_composes_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("defaults:\n  - override /optim: sgd\ntrain:\n  max_steps: 7\n")
    monkeypatch.chdir(tmp_path)
    composed = compose(["recipe=mine.yaml"])
    assert (composed.recipe, composed.config.optim.name, composed.config.train.max_steps) == ("mine", "sgd", 7)


def test_the_written_configuration_is_a_recipe_of_the_same_run(tmp_path):
    config = compose(["recipe=demo", "optim.lr=0.0123", "model.head_dim=64"]).config
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert compose([f"recipe={tmp_path / 'again.yaml'}"]).config == config


MISTAKES = {
    "train.max_step=3": "unknown key train.max_step .*did you mean train.max_steps",
    "+data.seqence_length=8": "data.seqence_length .*did you mean data.sequence_length",
    "++data.seqence_length=8": "data.seqence_length .*did you mean data.sequence_length",
    "model.attn=tiled": "model.attn .*did you mean model.attn_implementation",
    "model.hiden_size=64": "model.hiden_size .*did you mean model.hidden_size",
    "recpie=demo": "recpie .*did you mean recipe",
    "max_steps=3": "max_steps .*did you mean train.max_steps",
    "optim.lr=abc": "optim.lr.*abc.*expected float > 0",
    "optim.lr=nan": "optim.lr=nan",
    "optim.lr=inf": "optim.lr=inf: expected float > 0",
    "optim.beta1=1": "optim.beta1=1.0: expected float >= 0 and < 1",
    "run.seed=99999999999": "run.seed=99999999999",
    "optim.lr=0": "optim.lr=0.0: expected float > 0",
    "optim.lr=1,2": "optim.lr=1,2.*sweep",
    "train.lr=1": "train.lr .*did you mean optim.lr",
    "evaluate.sample_tokens=5000": "evaluate.sample_tokens=5000 .* model.max_position_embeddings",
    "train.max_steps=2.5": "train.max_steps.*expected int or null >= 1",
    "train.max_steps=-1": "train.max_steps=-1: expected int or null >= 1",
    "train.precision=fp16": "train.precision=fp16: expected bf16 | fp32",
    "data.shuffle=maybe": "data.shuffle.*expected bool",
    "schedule=cosin": "schedule=cosin .*did you mean cosine",
    "model.vocab_size=null": "model.vocab_size",
    "model={hidden_size: 3}": "model .*section",
    "~train.max_steps": "is not KEY=VALUE",
    "~train.max_steps=3": "cannot be removed",
    "--max-steps": "is not KEY=VALUE",
    "optim.lr=[": "cannot be read",
    "data=files": "data.path is needed",
    "recipe=dmeo": "recipe=dmeo: .*did you mean demo",
    "recipe=no/such.yaml": "recipe=no/such.yaml: no such file",
    "model.num_key_value_heads=4": "model.num_attention_heads=6 .* model.num_key_value_heads=4",
    "model.hidden_size=100": "model.hidden_size=100 .* model.num_attention_heads",
    "parallel.dispatch=deepspeed_capacity": "parallel.dispatch=deepspeed_capacity .* parallel.expert=1",
    "model.head_dim=7": "model.head_dim.* must be even",
    "model.num_experts_per_tok=9": "model.num_experts_per_tok=9 .* model.num_local_experts=8",
    "data.sequence_length=9999": "data.sequence_length=9999 .* model.max_position_embeddings",
    "train.epochs=1": "train.max_steps and train.epochs are both given",
    "train.max_steps=null": "train.max_steps and train.epochs are both null",
    "data.streaming=true": "data.tokenizer=train_bpe reads the whole corpus",
    "model.attn_implementation=windowed": "windowed needs a model.sliding_window",
    "model.attn_implementation=flash_attention_2": "flash_attention_2 needs half precision",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_refused_by_its_full_key(word):
    words = [word] if word.startswith("recipe=") else ["recipe=demo", word]
    with pytest.raises(ConfigError, match=MISTAKES[word]) as caught:
        compose(words)
    assert "\n" not in str(caught.value)


def test_tiled_attention_has_no_dropout():
    with pytest.raises(ConfigError, match="model.attn_implementation=tiled needs model.attention_dropout=0"):
        compose(["recipe=demo", "model.attn_implementation=tiled", "model.attention_dropout=0.1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim=sgd"], "optim.moments=bf16: optim.name=sgd keeps none"),
        (["optim.beta2=0.999"], r"optim.beta2=0.999 is too slow for .* bf16 .* set optim.beta2=0\.99 or less"),
        (["optim.beta1=0.995"], "optim.beta1=0.995 is too slow"),
    ],
)
def test_moments_of_bf16_are_refused_where_they_would_be_none_or_stand_still(words, message):
    with pytest.raises(ConfigError, match=message):
        compose(["recipe=demo", "optim.moments=bf16", *words])


RECIPE_MISTAKES = {
    "train:\n  max_step: 3\n": "unknown key train.max_step in recipe .*mine.yaml; did you mean train.max_steps",
    "trian:\n  max_steps: 3\n": "trian in recipe .*mine.yaml",
    "max_steps: 3\n": "max_steps in recipe .*mine.yaml.*did you mean train.max_steps",
    "train: 3\n": "train in recipe .*section",
    "model: tiny\n": "model in recipe .*`defaults:` with `- override /model: tiny`",
    "train:\n  max_steps: abc\n": "train.max_steps.*abc",
    "defaults:\n  - override /modle: tiny\n": "override /modle.* in recipe .*mine.yaml",
    "defaults:\n  - override /model: tniy\n": "model=tniy in recipe .*did you mean tiny",
    "defaults:\n  - model: tiny\n": "expected `override /GROUP`",
    "on: 3\n": "not text .YAML reads on",
    "train:\n  1: 3\n": "not text .YAML reads on",
    "a: [": "mine.yaml cannot be read",
    "- a\n": "mine.yaml holds no keys",
}


@pytest.mark.parametrize("word", ["parallel.zero=3", "parallel.expert=1", "train.router_bias_rate=0.1"])
def test_the_capacity_layer_is_refused_where_deepspeed_has_none(word):
    words = ["recipe=demo", "parallel.expert=2", "parallel.zero=2", "parallel.dispatch=deepspeed_capacity"]
    assert compose(words).config.parallel.dispatch == "deepspeed_capacity"
    with pytest.raises(ConfigError, match=word.split("=")[0] + "="):
        compose([*words, word])


@pytest.mark.parametrize("words", [["parallel.expert=1"], ["parallel.dispatch=deepspeed_capacity", "parallel.zero=2"]])
def test_overlap_is_refused_where_there_is_none(words):
    given = ["recipe=demo", "parallel.expert=2", "parallel.zero=1", "parallel.overlap_degree=2"]
    assert compose(given).config.parallel.overlap_degree == 2
    with pytest.raises(ConfigError, match="parallel.overlap_degree=2 is of no effect with .*" + words[0]):
        compose([*given, *words])
    with pytest.raises(ConfigError, match="parallel.overlap_degree=999999, but a pass has"):
        compose([*given, "parallel.overlap_degree=999999"])


@pytest.mark.parametrize("text", RECIPE_MISTAKES)
def test_a_mistake_in_a_recipe_is_refused_by_file_and_key(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=RECIPE_MISTAKES[text]):
        compose([f"recipe={tmp_path / 'mine.yaml'}", "train.max_steps=1"])


TEXTS = [
    *("~/texts", "a,b (1)=x.jsonl", 'say "hi", {you}', "C:\\x", "", "'a' or 'b'", '"', "two\nlines\\\n"),
    *("2026_11_28", "1.10", "1e3", "true", "0x10", "nan", "Null"),
    *("a ${model.hidden_size} b", "echo ${HOME}", r"\${x} \\${y}", "${", r"${x}\\"),
]


@pytest.mark.parametrize("value", TEXTS)
def test_text_needs_no_quotes_of_its_own_and_repeats_itself(value, tmp_path):
    config = compose(["recipe=demo", f"data.path={value}", f"evaluate.sample_prompt={value}"]).config
    assert (config.data.path, config.evaluate.sample_prompt) == (value, value)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert yaml.safe_load((tmp_path / "again.yaml").read_text())["data"]["path"] == value
    assert compose([f"recipe={tmp_path / 'again.yaml'}"]).config == config


def test_texts_of_lists_and_maps_need_no_quotes_either(tmp_path):
    values = [text for text in TEXTS if text and not {",", '"', "\n"} & set(text)] + ["a:b", "it's", "one two"]
    words = [f"evaluate.compare=[ {' ,'.join(values)},'x, y']", "data.columns={text: 1e3 , completion:on,prompt: a:b}"]
    config = compose(["recipe=demo", *words]).config
    assert config.evaluate.compare == [*values, "x, y"]
    assert config.data.columns == {"text": "1e3", "completion": "on", "prompt": "a:b"}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert compose([f"recipe={tmp_path / 'again.yaml'}"]).config == config


def test_what_is_no_list_or_map_of_texts_is_refused_or_empty():
    assert compose(["recipe=demo", "evaluate.compare=[]", "data.columns={}"]).config.evaluate.compare == []
    maps = ("data.columns={text}", "data.columns={text: }", "data.columns=[text: a]")
    for word in ("evaluate.compare=[a,,b]", "evaluate.compare=a", *maps):
        with pytest.raises(ConfigError, match=word.partition("=")[0]):
            compose(["recipe=demo", word])


def test_what_the_user_or_a_recipe_writes_for_hydra_is_still_its_own(tmp_path):
    config = compose(["recipe=demo", "run.dir=null", "data.path='a \"b\"'"]).config
    assert (config.run.dir, config.data.path) == (None, 'a "b"')
    with pytest.raises(ConfigError, match="tracker.project: .*not Optional; expected str"):
        compose(["recipe=demo", "tracker.project=null"])
    assert compose(["recipe=demo", 'run.dir="w${model.hidden_size}"']).config.run.dir == "w192"
    (tmp_path / "mine.yaml").write_text("run:\n  dir: w${model.hidden_size}\nmodel:\n  hidden_size: 192\n")
    assert compose([f"recipe={tmp_path / 'mine.yaml'}", "train.max_steps=1"]).config.run.dir == "w192"


def computed():
    """Seconds that ended child processes computed; those that they waited for others say nothing of them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--help"], 0, "pretrain_tiny"),
        (["train.max_step=3"], 2, "train.max_steps"),
        (["+data.seqence_length=8"], 2, "data.sequence_length"),
        (["model.hiden_size=64"], 2, "model.hidden_size"),
        (["recpie=demo"], 2, "recipe"),
        (["recipe=demo", "model.num_key_value_heads=4"], 2, "model.num_key_value_heads"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_help_and_mistakes_answer_in_seconds_without_torch(words, code, named):
    before = computed()
    command = [sys.executable, "-X", "importtime", "-m", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert computed() - before < 3
    assert done.returncode == code
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "train.compose" in imported
    assert not imported & {"torch", "transformers", "datasets", "accelerate", "deepspeed"}
    said = done.stdout + "".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert named in said


def test_only_the_first_process_speaks():
    command = [sys.executable, "-m", "train", "train.max_step=3"]
    done = subprocess.run(command, capture_output=True, text=True, env={"RANK": "1"}, cwd=ROOT, timeout=30)
    assert (done.returncode, done.stdout + done.stderr) == (2, "")


@pytest.mark.parametrize("key", ["lora.targets", "train.only"])
@pytest.mark.parametrize("value", ["[norms,gate]", "[norms, gate]", "['norms', \"gate\"]", "norms,gate"])
def test_words_may_be_a_list(key, value, tmp_path):
    words = {"lora.targets": "q_proj,gate", "train.only": "norms,router"}[key]
    first, second = words.split(",")
    value = value.replace("norms", first).replace("gate", second)
    section, leaf = key.split(".")
    path = tmp_path / "mine.yaml"
    path.write_text(f"{section}:\n  {leaf}: {value}\n")
    more = ["lora.rank=2"] if section == "lora" else []
    for given in ([f"{key}={value}"], [f"recipe={path}"]):
        base = ["data.path=a", "train.max_steps=1"] if given[0].startswith("recipe") else ["recipe=demo"]
        assert getattr(getattr(compose([*base, *more, *given]).config, section), leaf) == words


@pytest.mark.parametrize("words", [["lora.targets=[q_proj,", "v_proj]"], ["lora.targets=", "q_proj"]])
def test_a_value_that_the_shell_divided_is_told_apart_from_a_word_of_its_own(words):
    with pytest.raises(ConfigError, match=r"if it belongs to lora.targets, write that without spaces or in quotes"):
        compose(["recipe=demo", *words])
    with pytest.raises(ConfigError, match="'stray' is not KEY=VALUE; see --help"):
        compose(["recipe=demo", "stray"])
