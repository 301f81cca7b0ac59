"""Streamed reading: what is asked for, nothing else, and each malformed file with its one error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral import MixtralConfig, MixtralForCausalLM, MixtralForSequenceClassification, MixtralModel
from mixtral.weights import WeightsError, load, names, read
from tests.conftest import SIZES


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture
def folder(tmp_path, make_model):
    """A sharded folder and the model that it holds."""
    model = make_model().eval()
    model.save_pretrained(tmp_path / "hub", max_shard_size="100KB")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 3
    return tmp_path / "hub", model


def pickled(folder: Path, shards: int = 1) -> None:
    """Turns a folder's safetensors into PyTorch files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors*")):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-{index % shards + 1:05}-of-{shards:05}.bin" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("kind", [MixtralForCausalLM, MixtralForSequenceClassification, MixtralModel])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 16}, {"tie_word_embeddings": True}], ids=str)
def test_the_expected_shapes_are_the_models(kind, changes):
    model = kind(MixtralConfig(**SIZES | changes, num_labels=3))
    head = {MixtralForCausalLM: "lm_head", MixtralForSequenceClassification: "score", MixtralModel: None}[kind]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert names.shapes(model.config, head) == shapes


@pytest.mark.parametrize("form", ["sharded", "one .bin", "sharded .bin"])
def test_read_yields_the_models_parameters_bit_for_bit(folder, form):
    path, model = folder
    if form != "sharded":
        pickled(path, 1 if form == "one .bin" else 3)
    expected = model.state_dict()
    found = dict(read(path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    halved = dict(read(path, dtype=torch.bfloat16))
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in halved.items())


@pytest.mark.parametrize("form", ["sharded", "one .bin"])
def test_a_half_read_gives_those_experts_in_that_order_and_touches_no_other_byte(folder, form):
    path, model = folder
    if form == "one .bin":
        pickled(path)
    state = model.state_dict()
    list(read(path))  # imports and caches are warm
    start = bytes_read()
    for name, tensor in read(path, experts=[6, 1, 4, 7], layers=[1]):
        assert torch.equal(tensor, state[name][[6, 1, 4, 7]] if names.is_stacked(name) else state[name]), name
    part = bytes_read() - start
    start = bytes_read()
    list(read(path, experts=[0], layers=[]))
    headers = bytes_read() - start
    layer = {name: tensor for name, tensor in state.items() if names.layer_of(name) == 1}
    kept = sum(tensor.nbytes // (2 if names.is_stacked(name) else 1) for name, tensor in layer.items())
    assert part - headers <= kept + 1024
    assert kept > 10_000


def test_experts_and_layers_that_are_not_there_are_refused(folder):
    with pytest.raises(ValueError, match=r"experts=\[8\].*has experts 0 to 7"):
        list(read(folder[0], experts=[8]))
    with pytest.raises(ValueError, match=r"layers=\[3\].*has layers 0 to 2"):
        list(read(folder[0], layers=[3]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_on_the_meta_device_is_filled_in_place(tmp_path, make_model, tied):
    model = make_model(tie_word_embeddings=tied).eval()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = MixtralForCausalLM(model.config).eval()
    load(empty, tmp_path)
    input_ids = torch.randint(0, 128, (2, 9))
    assert torch.equal(empty(input_ids).logits, model(input_ids).logits)


def test_a_model_of_another_shape_is_refused_untouched(folder, make_model):
    path, _ = folder
    other = make_model(intermediate_size=40)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(WeightsError, match=r"layers.0.mlp.experts.gate_up_proj: shape \[8, 96, 32\] in .*80, 32\]"):
        load(other, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of the shard that holds expert 3's w1 of layer 1."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][EXPERT]
    tensors = load_file(path)
    change(tensors, index["weight_map"])
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


def drop(tensors, weight_map):
    del tensors[EXPERT], weight_map[EXPERT]


def drop_from_shard(tensors, weight_map):
    del tensors[EXPERT]


def misshape(tensors, weight_map):
    tensors[EXPERT] = torch.zeros(48, 33)


def add_unknown(tensors, weight_map):
    tensors["model.layers.9.x"], weight_map["model.layers.9.x"] = torch.zeros(2), weight_map[EXPERT]


def quantize(tensors, weight_map):
    tensors[EXPERT] = tensors[EXPERT].to(torch.int8)


def mix(tensors, weight_map):
    tensors[EXPERT] = tensors[EXPERT].bfloat16()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, rf"tensor {EXPERT} is missing in .*hub: config.json expects it, of shape \[48, 32\]"),
        (drop_from_shard, rf"tensor {EXPERT} is missing in .*model-0.*safetensors, where .*index.json expects it"),
        (misshape, rf"tensor {EXPERT} in .*safetensors has shape \[48, 33\], but config.json expects \[48, 32\]"),
        (add_unknown, r"tensor model.layers.9.x in .*safetensors is unknown"),
        (quantize, rf"tensor {EXPERT} in .*safetensors has dtype I8, expected F64"),
        (mix, rf"tensor {EXPERT} in .* is torch.bfloat16, .*experts.0.w1.weight is torch.float32: give the dtype"),
    ],
)
def test_a_tensor_that_is_not_as_expected_is_named_with_its_file(folder, change, message):
    rewrite(folder[0], change)
    with pytest.raises(WeightsError, match=message):
        list(read(folder[0]))
