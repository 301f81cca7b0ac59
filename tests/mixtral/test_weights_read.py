"""Streamed reading: what is asked for, nothing else, and each malformed file with its one error."""

import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral import MixtralConfig, MixtralForCausalLM, MixtralForSequenceClassification, MixtralModel
from mixtral.weights import WeightsError, load, names, read
from mixtral.weights.files import pickle_header
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


@pytest.fixture
def single(tmp_path, make_model):
    """A folder with one safetensors file."""
    make_model().save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def refused(folder, message, file=""):
    with pytest.raises(WeightsError, match=message) as caught:
        list(read(folder))
    assert file in str(caught.value)


@pytest.mark.parametrize("cut", [1, 4000])
def test_a_truncated_file_is_refused(single, cut):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    refused(
        single, rf"model.safetensors has {path.stat().st_size} bytes, its header expects {path.stat().st_size + cut}"
    )


def test_a_file_that_shrinks_while_it_is_read_is_refused(single):
    parameters = read(single)
    next(parameters)
    path = single / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    with pytest.raises(WeightsError, match=r"model.safetensors ends \d+ bytes before its tensors do"):
        list(parameters)


@pytest.mark.parametrize(
    ("length", "header", "message"),
    [
        (10**12, b"{}", "a safetensors header of 1000000000000 bytes cannot be, in a file of 10 bytes"),
        (2**63 + 5, b"{}", "a safetensors header of .* bytes cannot be"),
        (2, b"[]", "header is malformed .*not an object"),
        (2, b"\xff{", "header is malformed"),
        (4, b"    ", "header is malformed"),
        (13, b'{"a":1,"a":2}', "header is malformed .*a key appears twice"),
        (9, b'{"a":"b"}', "header is malformed"),
    ],
)
def test_a_header_that_is_not_one_is_refused(single, length, header, message):
    (single / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header)
    refused(single, rf"model.safetensors: (the safetensors )?.*{message}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_offsets": [0, 4]}, r"tensor a in .*has 4 bytes, but its shape \[2\] and dtype F32 expect 8"),
        ({"data_offsets": [4, 12]}, r"tensor a begins at byte .* of .*, expected"),
        ({"shape": [-2]}, "integers from 0 up"),
        ({"shape": [2.0]}, "integers from 0 up"),
        ({"data_offsets": [8, 0]}, r"tensor a in .*has -8 bytes"),
        ({"dtype": "F8_E4M3"}, "tensor a in .*has dtype F8_E4M3, expected F64 .*quantized weights cannot be used"),
    ],
    ids=str,
)
def test_a_tensor_that_lies_about_its_place_is_refused(single, fields, message):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}).encode()
    (single / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    refused(single, message)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/x.safetensors", "..", ""])
def test_an_index_that_points_outside_of_the_folder_is_refused(folder, name):
    path, _ = folder
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"][EXPERT] = name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, rf"index.json names the file '{name}', which is not inside of the folder")


def test_a_link_out_of_the_folder_is_refused_but_the_hubs_cache_is_read(single, tmp_path):
    weights = single / "model.safetensors"
    (tmp_path / "blobs").mkdir()
    weights.rename(tmp_path / "blobs" / "0123")
    weights.symlink_to(tmp_path / "blobs" / "0123")
    refused(single, "hub names the file 'model.safetensors', which is not inside of the folder")
    (tmp_path / "snapshots").mkdir()
    single.rename(tmp_path / "snapshots" / "main")
    assert dict(read(tmp_path / "snapshots" / "main"))


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}], ids=str)
def test_an_index_without_a_map_is_refused(folder, weight_map):
    (folder[0] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder[0], "index.json: weight_map must map tensor names to file names")


def test_a_missing_shard_and_a_stray_tensor_are_refused(folder):
    path, _ = folder
    index = json.loads((path / "model.safetensors.index.json").read_text())
    other = next(name for name in index["weight_map"].values() if name != index["weight_map"][EXPERT])
    changed = index["weight_map"] | {EXPERT: other}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
    refused(path, rf"tensor {EXPERT} lies in .*safetensors, but .*index.json says '{other}'")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / other).unlink()
    refused(path, f"{other} is missing, which .*index.json names")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_refused_and_does_not_run(single, tmp_path):
    (single / "model.safetensors").unlink()
    torch.save({"a": Bomb(tmp_path / "ran")}, single / "pytorch_model.bin")
    torch.load(single / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # the bomb is live
    (tmp_path / "ran").unlink()
    # the end of the message: torch's own goes on with how to run the code
    refused(
        single, "pytorch_model.bin cannot be read as plain tensors, and nothing in it was run: it asks for getattr$"
    )
    assert not (tmp_path / "ran").exists()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3000])


def not_a_dictionary(path):
    torch.save([torch.zeros(2)], path)


def not_a_tensor(path):
    torch.save({"a": "b"}, path)


def not_contiguous(path):
    torch.save({"a": torch.zeros(3, 4).T}, path)


def old_format(path):
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


def compressed(path):
    torch.save({"a": torch.zeros(1000)}, path)
    records = {record: zipfile.ZipFile(path).read(record) for record in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            packed = zipfile.ZIP_DEFLATED if "/data/" in record else zipfile.ZIP_STORED
            archive.writestr(record, content, compress_type=packed)


def shortened_record(path):
    torch.save({"a": torch.zeros(1000)}, path)
    records = {record: zipfile.ZipFile(path).read(record) for record in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content[:100] if "/data/" in record else content)


def on_no_device(path):
    torch.save({"a": torch.zeros(3, device="meta")}, path)


def negated(path):
    torch.save({"a": torch._neg_view(torch.arange(3.0))}, path)
    assert torch.load(path)["a"].tolist() == [0, -1, -2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (on_no_device, "tensor a in .* is on no device, or a negative view"),
        (negated, "tensor a in .* is on no device, or a negative view"),
        (cut_short, "cannot be read as plain tensors.*: it is damaged"),
        (not_a_dictionary, "holds a list, expected a dictionary of tensors"),
        (not_a_tensor, "'a' is a str, expected a tensor"),
        (not_contiguous, r"tensor a in .*strides \(1, 4\), expected .*contiguous"),
        (old_format, "cannot be read as plain tensors.* before PyTorch 1.6"),
        (compressed, "tensor a in .*: its record is damaged or compressed"),
        (shortened_record, "tensor a in .*: its record is damaged or compressed"),
    ],
)
def test_a_damaged_pickle_is_refused(single, damage, message):
    pickled(single)
    damage(single / "pytorch_model.bin")
    refused(single, message, file="pytorch_model.bin")


def test_a_pickle_with_a_flipped_bit_in_its_description_is_read_or_refused(single):
    pickled(single)
    path, chance = single / "pytorch_model.bin", random.Random(0)
    whole = path.read_bytes()
    (description,) = [record for record in zipfile.ZipFile(path).infolist() if record.filename.endswith("data.pkl")]
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[description.header_offset + chance.randrange(description.file_size)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            pickle_header(path)
        except WeightsError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds a list, expected a JSON object"),
        ("\ud800", "config.json is not JSON"),
        ('{"model_type": "llama"}', "config.json: model_type='llama', expected 'mixtral'"),
        ('{"model_type": "mixtral", "hidden_size": "32"}', "config.json: hidden_size='32', expected a whole number"),
        ('{"model_type": "mixtral", "num_experts_per_tok": 9}', "config.json: num_experts_per_tok=9 must lie between"),
        ('{"model_type": "mixtral", "num_hidden_layers": 999999999}', "config.json: num_hidden_layers=999999999 times"),
        ('{"model_type": "mixtral", "num_local_experts": 999999999}', "times num_local_experts=999999999, expected"),
        ('{"model_type": "mixtral", "tie_word_embeddings": "no"}', "config.json: tie_word_embeddings='no', expected"),
        ('{"model_type": "mixtral", "quantization_config": {"bits": 4}}', "config.json: quantization_config is set"),
        ('{"model_type": "mixtral", "id2label": 3}', "config.json: 'int' object has no attribute 'items'"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(single, text, message):
    (single / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(single, message)


def test_a_folder_without_configuration_or_weights_is_refused(single, tmp_path):
    (single / "model.safetensors").unlink()
    refused(single, "hub holds no weights: expected model.safetensors or pytorch_model.bin")
    (single / "config.json").unlink()
    refused(single, "config.json is missing")


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_tied_embeddings_must_equal_them(tmp_path, make_model, equal):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if equal:
        assert "lm_head.weight" not in dict(read(tmp_path))
    else:
        refused(tmp_path, "tensor lm_head.weight in .* differs from model.embed_tokens.weight")


@pytest.mark.parametrize("kind", [MixtralForSequenceClassification, MixtralModel])
def test_other_heads_are_read_too(tmp_path, kind):
    model = kind(MixtralConfig(**SIZES, num_labels=3))
    model.save_pretrained(tmp_path)
    other = kind(MixtralConfig(**SIZES, num_labels=3))
    load(other, tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "one .bin"])
def test_a_load_holds_at_its_peak_what_it_keeps(tmp_path, form):
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 8192}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    model.save_pretrained(tmp_path)
    if form == "one .bin":
        pickled(tmp_path)
    code = (
        "import re, sys, torch\nfrom mixtral import MixtralConfig, MixtralForCausalLM, weights\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "with torch.device('meta'): model = MixtralForCausalLM(MixtralConfig.from_pretrained(sys.argv[1]))\n"
        "before = peak()\nweights.load(model, sys.argv[1])\nprint(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept = sum(parameter.nbytes for parameter in model.parameters())
    assert kept > 150_000_000
    assert 0.9 * kept < int(done.stdout.split()[-1]) <= 1.1 * kept


def test_a_raw_folder_is_sent_to_convert(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(WeightsError, match="Mistral's raw files: .*cierzo convert"):
        next(read(tmp_path))
