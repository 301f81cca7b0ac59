"""The recipes: each composes in full for the processes that its header starts, and fits where it says that it fits."""

import json
import math
import re

import pytest
import yaml

from mixtral import MixtralConfig
from train.compose import compose, recipes
from train.config import PROBLEMS, check_training, keys
from train.lora import adapter_of, shapes
from train.parallel.launcher import check_launch
from train.plan.figures import figures_of
from train.plan.hardware import device_of
from train.plan.layout import Layout

SIZES = {  # as the hub's config.json say
    "mistralai/Mixtral-8x7B-v0.1": {"max_position_embeddings": 32768},
    "mistralai/Mixtral-8x22B-v0.1": {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "max_position_embeddings": 65536,
    },
}
LARGE = [
    name for name, path in recipes().items() if re.search(r"^# Needs \d+ GPUs", path.read_text(), flags=re.MULTILINE)
]


def composed(name, folder, *more):
    """Composes a recipe as its header's launch command does, the hub's weights described in a folder."""
    recipe, words = yaml.safe_load(recipes()[name].read_text()), []
    source = recipe.get("model", {}).get("init_from")
    if source is not None:
        described = MixtralConfig(**SIZES[source]).to_dict()
        (folder / "config.json").write_text(json.dumps(described))
        words = [f"model.init_from={folder}"]
    return compose([f"recipe={name}", *words, *(["data.path=x"] if name in LARGE else []), *more]).config


def test_the_published_sizes_all_have_a_recipe():
    assert len(LARGE) == 6
    found = {yaml.safe_load(recipes()[name].read_text()).get("model", {}).get("init_from") for name in LARGE}
    assert found == {*SIZES, None}


@pytest.mark.parametrize("name", recipes())
def test_every_key_that_a_recipe_sets_exists_and_reaches_the_configuration(name, tmp_path):
    tree = yaml.safe_load(recipes()[name].read_text())
    config = composed(name, tmp_path)
    known = {item.name for item in keys()}
    for section, values in tree.items():
        for leaf, value in values.items() if section != "defaults" else ():
            assert f"{section}.{leaf}" in known
            if leaf != "init_from":
                assert getattr(getattr(config, section), leaf) == value


@pytest.mark.parametrize("name", LARGE)
def test_a_header_starts_as_many_processes_as_it_says_and_they_fit_the_layout(name, tmp_path, monkeypatch):
    text, config = recipes()[name].read_text(), composed(name, tmp_path)
    (gpus,) = map(int, re.findall(r"^# Needs (\d+) GPUs", text, flags=re.MULTILINE))
    hosts, (each,) = re.findall(r"--nnodes (\d+)", text) or ["1"], re.findall(r"--nproc_per_node (\d+)", text)
    assert int(hosts[0]) * int(each) == gpus
    assert int(each) % config.parallel.expert == 0  # rows stay within a host
    assert f"-m train recipe={name} " in text
    check_training(config)
    places = {"WORLD_SIZE": gpus, "RANK": 1, "LOCAL_RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    for variable, value in places.items():
        monkeypatch.setenv(variable, str(value))
    check_launch(config)


@pytest.mark.parametrize("name", LARGE)
def test_the_memory_in_a_header_is_that_of_its_layout(name, tmp_path):
    text, config = recipes()[name].read_text(), composed(name, tmp_path)
    gpus, size = map(int, re.findall(r"^# Needs (\d+) GPUs of (\d+) GB. .* computed, not run", text, re.MULTILINE)[0])
    said = {part: float(figure) for part, figure in re.findall(r"^#   (\w+) .* = ([\d.]+) GB$", text, re.MULTILINE)}
    model = config.model
    sizes = {field: getattr(model, field) for field in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    full = MixtralConfig(**sizes, num_attention_heads=model.num_attention_heads)
    count = full.count_parameters()
    others = count.total - count.experts - (count.head if config.data.format in PROBLEMS else 0)
    adapter = adapter_of(config.lora)
    trained = sum(map(math.prod, shapes(full, adapter).values())) if adapter else count.total
    whole = config.parallel.zero < 3
    weights = count.experts / config.parallel.expert + others if whole else (count.experts + others) / gpus
    tokens = config.train.micro_batch_size * config.data.sequence_length
    rows = 20 if adapter else 11  # with adapters and their dropout, and without
    layer, layers = 4 * full.intermediate_size + rows * full.hidden_size, full.num_hidden_layers
    per_token = full.hidden_size * layers + layer if config.train.recompute == "layers" else layer * layers
    assert config.parallel.zero >= 2  # which shares gradients and moments out
    bytes_of = {
        "weights": 2 * weights,
        "gradients": 4 * trained / gpus,
        "masters": 4 * trained / gpus,
        "moments": 8 * trained / gpus,
        "activations": 2 * per_token * tokens,
    }
    assert said.keys() == bytes_of.keys()
    for part, figure in bytes_of.items():
        assert said[part] == pytest.approx(figure / 1e9, abs=0.006), part
    assert sum(said.values()) < 0.85 * size
    (total,) = re.findall(r"^#   in all +([\d.]+) GB", text, re.MULTILINE)
    assert float(total) == pytest.approx(sum(said.values()), abs=0.06)


@pytest.mark.parametrize("name", LARGE)
def test_no_recipe_is_planned_to_spend_its_step_on_traffic(name, tmp_path):
    text, config = recipes()[name].read_text(), composed(name, tmp_path)
    (gpus,) = map(int, re.findall(r"^# Needs (\d+) GPUs", text, flags=re.MULTILINE))
    figures = figures_of(Layout(config, gpus, on_gpu=True), device_of(config.plan))
    assert figures.fits
    assert not figures.is_tight
    said = re.findall(r"`cierzo plan` says (\d+) to (\d+) GB", text)
    assert len(said) == (config.train.recompute == "layers")
    for peaks in said:
        assert [*map(int, peaks)] == [round(memory.peak / 1e9) for memory in (figures.median, figures.high)]
    assert figures.step.parts["ZeRO traffic"] < 0.1 * figures.step.seconds


@pytest.mark.parametrize("name", LARGE)
def test_what_a_header_advises_for_larger_gpus_fits_them_and_is_planned_to_be_faster(name, tmp_path):
    text, config = recipes()[name].read_text(), composed(name, tmp_path)
    (gpus,) = map(int, re.findall(r"^# Needs (\d+) GPUs", text, flags=re.MULTILINE))
    advice = re.findall(r"^# On GPUs of 141 GB, (.*?) is faster", text, re.MULTILINE | re.DOTALL)
    assert len(advice) == (name == "sft_8x22b_lora")
    for words in advice:
        larger = composed(name, tmp_path, "plan.gpu=h200-141g", *re.findall(r"[\w.]+=\w+", words))
        rows = {one.train.gradient_accumulation_steps * one.train.micro_batch_size for one in (larger, config)}
        assert len(rows) == 1  # of a step, the same
        advised, plain = (
            figures_of(Layout(one, gpus, on_gpu=True), device_of(larger.plan)) for one in (larger, config)
        )
        assert advised.fits
        assert not advised.is_tight
        assert advised.step.seconds < plain.step.seconds
