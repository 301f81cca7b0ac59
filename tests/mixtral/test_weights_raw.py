"""Mistral's raw release files, against a forward pass written from their own description."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from mixtral.weights import WeightsError
from mixtral.weights.raw import Place, RawFolder
from train.convert import main

PARAMS = {
    "dim": 32,
    "n_layers": 3,
    "head_dim": 16,
    "hidden_dim": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 128,
    "rope_theta": 10_000.0,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}


def raw_tensors(params=PARAMS):
    """Random weights under the names of the later releases."""
    dim, inner, width = params["dim"], params["hidden_dim"], params["head_dim"]
    shapes = {"tok_embeddings.weight": (params["vocab_size"], dim), "output.weight": (params["vocab_size"], dim)}
    for layer in range(params["n_layers"]):
        start = f"layers.{layer}"
        for matrix, heads in (("wq", "n_heads"), ("wk", "n_kv_heads"), ("wv", "n_kv_heads")):
            shapes[f"{start}.attention.{matrix}.weight"] = (params[heads] * width, dim)
        shapes[f"{start}.attention.wo.weight"] = (dim, params["n_heads"] * width)
        shapes[f"{start}.feed_forward.gate.weight"] = (params["moe"]["num_experts"], dim)
        for expert in range(params["moe"]["num_experts"]):
            for matrix, shape in (("w1", (inner, dim)), ("w2", (dim, inner)), ("w3", (inner, dim))):
                shapes[f"{start}.feed_forward.experts.{expert}.{matrix}.weight"] = shape
    found = {name: torch.randn(shape) * (1.0 if "gate" in name else 0.15) for name, shape in shapes.items()}
    norms = [
        f"layers.{layer}.{kind}_norm.weight" for layer in range(params["n_layers"]) for kind in ("attention", "ffn")
    ]
    return found | {name: 1 + 0.2 * torch.randn(dim) for name in [*norms, "norm.weight"]}


def fuse(tensors, params=PARAMS):
    """The same weights as in the first release: experts one below the other, w2 transposed."""
    found = {name: tensor for name, tensor in tensors.items() if "feed_forward" not in name}
    for layer in range(params["n_layers"]):
        start = f"layers.{layer}"
        found[f"{start}.block_sparse_moe.gate.weight"] = tensors[f"{start}.feed_forward.gate.weight"]
        for matrix in ("w1", "w2", "w3"):
            experts = [
                tensors[f"{start}.feed_forward.experts.{expert}.{matrix}.weight"]
                for expert in range(params["moe"]["num_experts"])
            ]
            rows = [expert.T if matrix == "w2" else expert for expert in experts]
            found[f"{start}.block_sparse_moe.{matrix}"] = torch.cat(rows)
    return found


def write(folder, layout, tensors, params=PARAMS):
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    if layout == "experts":
        save_file(tensors, folder / "consolidated.safetensors")
    elif layout == "sharded experts":
        files = {name: f"consolidated-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        fused = fuse(tensors, params)
        shards = 8 if layout == "eight fused" else 1
        suffix = "pt" if layout == "eight fused" else "pth"
        for index in range(shards):
            names = list(fused)[index::shards]
            torch.save({name: fused[name] for name in names}, folder / f"consolidated.{index:02}.{suffix}")
    return folder


LAYOUTS = ["experts", "sharded experts", "fused", "eight fused"]


def interleaved_forward(tensors, params, input_ids):
    """Mixtral as mistral-inference computes it: rotary pairs are neighbours, turned as complex numbers."""
    width, eps = params["head_dim"], params["norm_eps"]

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    length = len(input_ids)
    frequencies = params["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    turns = torch.polar(torch.ones(length, width // 2), torch.outer(torch.arange(length), frequencies))
    hidden = tensors["tok_embeddings.weight"][input_ids]
    for layer in range(params["n_layers"]):
        get = {name.removeprefix(f"layers.{layer}."): value for name, value in tensors.items()}
        x = norm(hidden, get["attention_norm.weight"])
        q, k, v = ((x @ get[f"attention.w{m}.weight"].T).unflatten(-1, (-1, width)) for m in "qkv")
        q, k = (
            torch.view_as_real(torch.view_as_complex(w.unflatten(-1, (-1, 2)).contiguous()) * turns[:, None]).flatten(2)
            for w in (q, k)
        )
        k, v = (w.repeat_interleave(params["n_heads"] // params["n_kv_heads"], dim=1) for w in (k, v))
        scores = torch.einsum("shd,thd->hst", q, k) * width**-0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf")).softmax(-1)
        hidden = hidden + torch.einsum("hst,thd->shd", scores, v).flatten(1) @ get["attention.wo.weight"].T
        x = norm(hidden, get["ffn_norm.weight"])
        weights, chosen = (x @ get["feed_forward.gate.weight"].T).topk(params["moe"]["num_experts_per_tok"])
        for row, (mixture, experts) in enumerate(zip(weights.softmax(-1), chosen, strict=True)):
            for weight, expert in zip(mixture, experts.tolist(), strict=True):
                w1, w2, w3 = (get[f"feed_forward.experts.{expert}.w{m}.weight"] for m in (1, 2, 3))
                hidden[row] += weight * (w2 @ (F.silu(w1 @ x[row]) * (w3 @ x[row])))
    return norm(hidden, tensors["norm.weight"]) @ tensors["output.weight"].T


def run(*words):
    return main([str(word) for word in words])


def to_hub(raw, hub):
    assert run("--input_dir", raw, "--output_dir", hub) == 0
    return transformers.AutoModelForCausalLM.from_pretrained(hub).eval()


def difference(model, tensors, params=PARAMS):
    input_ids = torch.randint(0, 128, (40,))
    with torch.no_grad():
        return (model(input_ids[None]).logits[0] - interleaved_forward(tensors, params, input_ids)).abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_converted_weights_compute_in_transformers_what_the_raw_ones_say(tmp_path, layout):
    tensors = raw_tensors()
    model = to_hub(write(tmp_path / "raw", layout, tensors), tmp_path / "hub")
    assert type(model) is transformers.MixtralForCausalLM
    assert difference(model, tensors) <= 1e-5


def test_without_the_rotary_permutation_they_would_not(tmp_path, monkeypatch):
    monkeypatch.setattr(Place, "to_hub", lambda place, tensor: tensor.T if place.transposed else tensor)
    tensors = raw_tensors()
    model = to_hub(write(tmp_path / "raw", "experts", tensors), tmp_path / "hub")
    assert difference(model, tensors) > 1e-2


@pytest.mark.parametrize("groups", [1, 4])
def test_multi_query_and_multi_head_weights_convert_too(tmp_path, groups):
    params = PARAMS | {"n_kv_heads": groups}
    tensors = raw_tensors(params)
    model = to_hub(write(tmp_path / "raw", "fused", tensors, params), tmp_path / "hub")
    assert difference(model, tensors, params) <= 1e-5


def all_tensors(folder):
    found = {}
    for path in folder.glob("consolidated*"):
        if path.suffix == ".safetensors":
            found |= load_file(path)
        elif path.suffix in (".pt", ".pth"):
            found |= torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_to_hub_to_raw_gives_every_tensor_back_bit_for_bit(tmp_path, layout, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in raw_tensors().items()}
    raw = write(tmp_path / "raw", layout, tensors)
    kind = "mistral-fused" if "fused" in layout else "mistral"
    bound = ["--max_shard_size", "20KB"] if layout in ("sharded experts", "eight fused") else []
    to_hub(raw, tmp_path / "hub")
    assert run("--input_dir", tmp_path / "hub", "--output_dir", tmp_path / "again", "--to", kind, *bound) == 0
    expected, found = all_tensors(raw), all_tensors(tmp_path / "again")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    again = json.loads((tmp_path / "again" / "params.json").read_text())
    assert again == PARAMS | {"max_seq_len": 32768}
    assert len(list((tmp_path / "again").glob("consolidated*"))) > 2 if bound else 1


@pytest.mark.parametrize("layout", ["experts", "fused"])
def test_every_expert_of_every_layer_lands_under_its_own_name(tmp_path, layout):
    tensors = raw_tensors()
    for name, tensor in tensors.items():
        if ".experts." in name:
            _, layer, _, _, expert, matrix, _ = name.split(".")
            tensor.fill_(100 * int(layer) + 10 * int(expert) + int(matrix[1]))
    to_hub(write(tmp_path / "raw", layout, tensors), tmp_path / "hub")
    found = load_file(tmp_path / "hub" / "model.safetensors")
    for layer in range(3):
        for expert in range(8):
            for matrix in (1, 2, 3):
                tensor = found[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{matrix}.weight"]
                assert (tensor == 100 * layer + 10 * expert + matrix).all()


def test_a_model_with_tied_embeddings_is_written_with_both(tmp_path, make_model):
    model = make_model(tie_word_embeddings=True).eval()
    model.save_pretrained(tmp_path / "hub")
    assert run("--input_dir", tmp_path / "hub", "--output_dir", tmp_path / "raw", "--to", "mistral") == 0
    params = json.loads((tmp_path / "raw" / "params.json").read_text())
    assert difference(model, all_tensors(tmp_path / "raw"), params) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "theta", "window"),
    [({}, 1e6, None), ({"sliding_window": "64"}, 1e4, 64), ({"sliding_window": 64, "rope_theta": 5e5}, 5e5, 64)],
    ids=str,
)
def test_params_default_as_in_mistral_inference(tmp_path, changes, theta, window):
    params = {key: value for key, value in PARAMS.items() if key != "rope_theta"} | changes
    config = RawFolder(write(tmp_path / "raw", "experts", raw_tensors(), params)).config
    assert (config.rope_theta, config.sliding_window, config.num_experts_per_tok) == (theta, window, 2)
    assert config.max_position_embeddings == 32768


def test_params_in_the_hubs_spelling_are_read(tmp_path):
    params = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128,
        "num_local_experts": 8,
        "sliding_window": "64",
    }
    raw = write(tmp_path / "raw", "fused", raw_tensors())
    (raw / "params.json").write_text(json.dumps(params))
    config = RawFolder(raw).config
    assert (config.rope_theta, config.sliding_window, config.attention_head_dim) == (1e4, 64, 16)


@pytest.mark.parametrize("layout", ["experts", "fused"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dim": 64},
            r"tensor tok_embeddings.weight in .*consolidated\S* has shape \[128, 32\], but params.json .*64\]",
        ),
        (
            {"n_heads": 8},
            r"tensor layers.0.attention.wq.weight in .* has shape \[64, 32\], but params.json .*\[128, 32\]",
        ),
        ({"n_layers": 4}, r"tensor layers.3.attention.wq.weight is missing in .*raw: params.json expects it"),
        ({"n_layers": 2}, r"tensor layers.2.attention.wk.weight in .* is unknown: params.json expects no such tensor"),
        (
            {"moe": {"num_experts": 4, "num_experts_per_tok": 2}},
            r"layers.0.*(gate.weight|w1).* shape .*params.json expects",
        ),
        ({"hidden_dim": 40}, r"tensor layers.0.\S*w1\S* in .* has shape .*(48|384).*, but params.json expects .*"),
        ({"moe": None}, r"params.json: moe=None, expected an object"),
        ({"moe": {"num_experts": 8}}, r"params.json: num_experts_per_tok is missing"),
        ({"lora": {"rank": 8}}, r"params.json: lora=.* is unknown"),
        ({"norm_eps": "tiny"}, r"params.json: norm_eps='tiny', expected a number above 0"),
        ({"dim": 0}, r"params.json: dim=0, expected a whole number above 0"),
        ({"sliding_window": "all"}, r"params.json: sliding_window='all', expected a whole number above 0"),
        ({"n_kv_heads": 3}, r"params.json: num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ],
    ids=str,
)
def test_params_that_contradict_the_tensors_or_say_too_little_are_refused(tmp_path, layout, changes, message):
    raw = write(tmp_path / "raw", layout, raw_tensors())
    (raw / "params.json").write_text(json.dumps(PARAMS | changes))
    with pytest.raises(WeightsError, match=message):
        RawFolder(raw)


def test_shards_that_disagree_on_a_tensor_are_refused_and_equal_ones_accepted(tmp_path):
    raw = write(tmp_path / "raw", "eight fused", raw_tensors())
    shard = torch.load(raw / "consolidated.03.pt", weights_only=True)
    shard["norm.weight"] = all_tensors(raw)["norm.weight"].clone()
    torch.save(shard, raw / "consolidated.03.pt")
    RawFolder(raw)
    shard["norm.weight"][0] += 1
    torch.save(shard, raw / "consolidated.03.pt")
    with pytest.raises(WeightsError, match="tensor norm.weight in .*differs from that in .*consolidated.03.pt"):
        RawFolder(raw)
    shard["norm.weight"] = torch.ones(3)
    torch.save(shard, raw / "consolidated.03.pt")
    with pytest.raises(WeightsError, match="tensor norm.weight in .*differs from that in"):
        RawFolder(raw)


def test_a_setting_that_the_raw_format_cannot_say_is_refused(tmp_path, make_model, capsys):
    make_model(hidden_act="gelu").save_pretrained(tmp_path / "hub")
    assert run("--input_dir", tmp_path / "hub", "--output_dir", tmp_path / "raw", "--to", "mistral") == 4
    assert "hidden_act='gelu' cannot be said in params.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
