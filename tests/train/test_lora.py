"""Adapters in one process, against PEFT on transformers' Mixtral; with several: tests/multiprocess/test_lora.py."""

import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mixtral import MixtralConfig, MixtralForCausalLM
from mixtral.weights.adapters import Adapter, AdapterFolder, AdapterWriter, peft_config, shapes
from mixtral.weights.names import trained_parameters
from tests.conftest import SIZES, skew_router
from tests.train.helpers import read_json, run_small, write_corpus
from train.config import Config, LoraConfig, trained_names
from train.data.tokenizer import mixtral_tokenizer
from train.errors import CheckpointError
from train.inherit import inherit_adapter
from train.lora import adapt, adapter_of, find_adapter, initial_adapters, logits_by_layer
from train.merge import main as export
from train.model import empty_model
from train.parallel.engine import fill

EVERYWHERE = Adapter(4, 0.7, ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "gate"), experts=True)
DORA = Adapter(4, 0.7, ("q_proj", "o_proj"), experts=False, dora=True)
IDS = torch.arange(60).view(2, 30) * 7 % SIZES["vocab_size"]


@pytest.fixture
def base(tmp_path):
    """A folder with a model whose routers are decided, in fp32."""
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES))
    skew_router(model)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def values_of(config, adapter, base):
    """New adapters whose B is not zero, and magnitudes that are not the weights' own."""
    values = dict(initial_adapters(config, adapter, 0, range(config.num_local_experts), b_bound=0.3))
    weights = MixtralForCausalLM.from_pretrained(base).state_dict()
    for name in shapes(config, adapter).keys() - values.keys():
        values[name] = 1.3 * weights[name.replace("lora_magnitude_vector.", "")].norm(dim=1)
    return values


def adapted_model(base, adapter, values, dtype=torch.float32):
    weights = MixtralForCausalLM.from_pretrained(base)
    model = empty_model(weights.config)
    adapt(model, adapter)
    for _ in fill(model, iter([*weights.state_dict().items(), *values.items()]), dtype):
        pass
    return model


def write(folder, config, adapter, values, *, fused, base=None):
    folder.mkdir()
    with AdapterWriter(folder, config, adapter, torch.float32, base, fused=fused) as writer:
        for name, tensor in values.items():
            if ".experts." in name:
                for expert, part in enumerate(tensor):
                    writer.add_piece(name, expert, part)
            else:
                writer.add_piece(name, None, tensor)
    return folder


@pytest.fixture
def case(base, tmp_path, request):
    """The base, the adapter, its values, and its folder in the form asked for."""
    adapter, form = request.param
    config = MixtralConfig.from_pretrained(base)
    values = values_of(config, adapter, base)
    return base, adapter, values, write(tmp_path / form, config, adapter, values, fused=form == "fused", base=str(base))


CASES = [(EVERYWHERE, "portable"), (EVERYWHERE, "fused"), (DORA, "portable")]
CASES += [(Adapter(2, 1.5, (), experts=True), form) for form in ("portable", "fused")]


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_both_forms_load_through_peft_with_our_logits(case):
    base, adapter, values, folder = case
    ours = adapted_model(base, adapter, values)
    theirs = peft.PeftModel.from_pretrained(transformers.MixtralForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        got, expected = ours.eval()(IDS).logits, theirs(IDS).logits
        alone = MixtralForCausalLM.from_pretrained(base)(IDS).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert (got - alone).norm() > 0.1 * alone.norm()


@pytest.mark.parametrize("case", CASES[1:2], indirect=True)
def test_loss_and_gradients_are_those_of_peft_with_target_parameters(case):
    base, adapter, values, folder = case
    ours = adapted_model(base, adapter, values)
    theirs = peft.PeftModel.from_pretrained(
        transformers.MixtralForCausalLM.from_pretrained(base), folder, is_trainable=True
    )
    losses = [model(IDS, labels=IDS, output_router_logits=True).loss for model in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    experts, found = SIZES["num_local_experts"], {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "").replace("mlp.experts.base_layer", "E")
            side, gradient = name[-8], parameter.grad
            if ".E." in name or "mlp.experts." in name:
                name = name.replace(".E.", ".mlp.experts.gate_up_").replace(
                    ".mlp.experts.lora", ".mlp.experts.down_lora"
                )
                name = name.removesuffix(".weight")
                stacked = gradient.unflatten(0, (experts, -1)) if side == "A" else gradient.unflatten(1, (-1, experts))
                gradient = stacked if side == "A" else stacked.permute(2, 0, 1)
            found[name] = gradient
    mine = trained_parameters(ours)
    assert found.keys() == mine.keys()
    for name, parameter in mine.items():
        error = (parameter.grad - found[name]).norm() / found[name].norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_what_is_written_is_read_back_bit_for_bit_whatever_experts_are_asked_for(case):
    base, adapter, values, folder = case
    config = MixtralConfig.from_pretrained(base)
    source = AdapterFolder(folder, config, adapter)
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in values.items()}
    for name, tensor in values.items():
        assert torch.equal(source.tensor(name, [5, 2]), tensor[[5, 2]] if ".experts." in name else tensor), name
    lora = LoraConfig(init_from=str(folder))
    inherit_adapter(lora, ())
    found = adapter_of(lora)
    assert (found.rank, found.experts, found.dora) == (adapter.rank, adapter.experts, adapter.dora)
    assert (set(found.targets), found.scale) == (set(adapter.targets), pytest.approx(adapter.scale))


@pytest.mark.parametrize("case", [*CASES[:3]], indirect=True)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_weights_compute_what_the_unmerged_do(case, dtype, tmp_path, capsys):
    base, adapter, values, folder = case
    assert export([f"adapter={folder}", f"output_dir={tmp_path / 'merged'}", f"dtype={dtype}"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        got, expected = merged(IDS).logits, adapted_model(base, adapter, values).eval()(IDS).logits
    error = ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
    assert error < {"fp32": 1e-5, "bf16": 2e-2}[dtype]
    stored = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert stored == {{"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]}
    assert "logits differ by" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES[3:4], indirect=True)
def test_a_card_in_another_encoding_does_not_cost_the_merged_weights(case, tmp_path):
    folder = case[3]
    (folder / "README.md").write_bytes("| caf\u00e9 | 1 |\n".encode("latin-1"))
    assert export([f"adapter={folder}", f"output_dir={tmp_path / 'merged'}"]) == 0
    assert "| caf\ufffd | 1 |" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES[3:4], indirect=True)
def test_a_tokenizer_that_cannot_be_carried_is_refused_before_weights_are_merged(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.merge.write_merged", lambda *_: pytest.fail("the weights came first"))
    (tmp_path / "tokenizer.json").write_text("{}")
    (case[3] / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert export([f"adapter={case[3]}", f"output_dir={tmp_path / 'merged'}"]) == 4
    assert "'tokenizer.json', which is not inside of the folder" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("case", CASES[3:4], indirect=True)
def test_folders_named_after_their_settings_are_merged_however_they_are_given(case, tmp_path):
    base, *_, folder = case
    sweep = folder.rename(tmp_path / "lr=0.1,rank=2")
    given = ["--adapter", str(sweep), f"base={base}", "--dtype", "fp32"]
    assert export([*given, f"--output_dir={tmp_path / 'a=1'}"]) == 0
    assert export([f"adapter={sweep}", "dtype=fp32", "--output_dir", str(tmp_path / "b=2")]) == 0
    assert (tmp_path / "a=1" / "model.safetensors").is_file()
    assert (tmp_path / "b=2" / "model.safetensors").is_file()


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
@pytest.mark.parametrize("own", [True, False], ids=["the adapter's", "the base's"])
def test_a_merged_model_has_one_tokenizer_and_no_file_of_the_other(case, tmp_path, own):
    """Of what transformers 4 wrote of special tokens, transformers 5 takes the word over `tokenizer_config.json`."""
    base, *_, folder = case
    theirs, mine = mixtral_tokenizer(), mixtral_tokenizer()
    theirs.chat_template, mine.eos_token = "{{ messages }}", "<unk>"
    theirs.save_pretrained(base)
    (base / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    if own:
        mine.save_pretrained(folder)
    assert export([f"adapter={folder}", f"output_dir={tmp_path / 'merged'}"]) == 0
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (merged.eos_token, merged.chat_template) == (("<unk>", None) if own else ("</s>", "{{ messages }}"))


def test_a_model_run_layer_by_layer_has_its_logits(base):
    model = MixtralForCausalLM.from_pretrained(base)
    with torch.no_grad():
        assert torch.allclose(logits_by_layer(base, None, IDS), model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("case", CASES[:1], indirect=True)
def test_a_merge_that_went_wrong_leaves_nothing_and_ends_with_code_5(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.merge.added", lambda weight, pair, scale: weight)
    assert export([f"adapter={case[3]}", f"output_dir={tmp_path / 'merged'}"]) == 5
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


LORA = ["lora.rank=4", "lora.targets=q_proj,v_proj,gate", "schedule.warmup_steps=0", "evaluate.sample_tokens=2"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A run's export to start from, and the corpus."""
    folder = tmp_path_factory.mktemp("given")
    corpus = write_corpus(folder / "corpus.jsonl")
    assert run_small(folder / "run", f"data.path={corpus}", "train.max_steps=2") == 0
    return folder / "run" / "export", corpus


def test_a_run_exports_adapters_that_peft_loads_at_its_held_out_loss_and_goes_on_from_them(given, tmp_path):
    export_folder, corpus = given
    words = [f"model.init_from={export_folder}", f"data.path={corpus}", "optim.lr=1e-2", "train.precision=bf16"]
    assert run_small(tmp_path / "one", *words, *LORA) == 0
    folder = tmp_path / "one" / "export"
    summary = read_json(tmp_path / "one" / "summary.json")
    assert summary["eval_loss"] < summary["first_eval_loss"]
    assert "rank 4 on q_proj, v_proj, gate, the experts" in (folder / "README.md").read_text()
    assert not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()
    config = MixtralConfig.from_pretrained(export_folder)
    source = AdapterFolder(folder, config, Adapter(4, 8.0, ("q_proj", "v_proj", "gate"), True))
    assert all(source.tensor(name, [0]).abs().sum() > 0 for name in source.shapes)  # every B has moved
    again = ["lora.format=fused", f"lora.init_from={folder}", "lora.dropout=0.1"]
    assert run_small(tmp_path / "two", *words, *again) == 0
    assert read_json(tmp_path / "two" / "summary.json")["first_eval_loss"] == pytest.approx(summary["eval_loss"])
    third = [f"lora.init_from={tmp_path / 'two' / 'export'}", "train.max_steps=1"]
    assert run_small(tmp_path / "three", *words, *third) == 0
    ended = read_json(tmp_path / "two" / "summary.json")["eval_loss"]
    assert read_json(tmp_path / "three" / "summary.json")["first_eval_loss"] == pytest.approx(ended)
    assert export([f"adapter={folder}", f"output_dir={tmp_path / 'merged'}", "dtype=fp32"]) == 0
    assert "held-out loss" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("only", ["router", "experts", "norms", "model.layers.1.self_attn.*,lm_head.weight"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exactly_the_chosen_weights_move(given, tmp_path, only, precision):
    export_folder, corpus = given
    words = [f"model.init_from={export_folder}", f"data.path={corpus}", "optim.lr=1e-2", f"train.only={only}"]
    words += [f"train.precision={precision}", "schedule.warmup_steps=0", "train.max_steps=2"]
    assert run_small(tmp_path / "run", *words) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (export_folder, tmp_path / "run" / "export"))
    chosen = {"router": "gate", "experts": ".experts.", "norms": "norm"}.get(only, "layers.1.self_attn")
    for name, tensor in after.items():
        moved = not torch.equal(tensor, before[name].to(tensor.dtype))
        assert moved == (chosen in name or (only not in ("router", "experts", "norms") and "lm_head" in name)), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.rank=4"], "lora.rank=4 adapts given weights: set model.init_from"),
        (["lora.rank=4", "lora.targets=q_prj"], "lora.targets: 'q_prj'.*did you mean q_proj"),
        (["lora.rank=4", "lora.targets=", "lora.experts=false"], "lora.targets is empty"),
        (["lora.rank=4", "train.only=norms"], "train.only=norms with lora.rank=4"),
        (["lora.rank=4", "lora.dora=true"], "lora.dora=true with lora.experts=true"),
        (["lora.rank=4", "lora.dora=true", "lora.experts=false", "parallel.zero=3"], "parallel.zero to 2"),
        (["lora.rank=4", "lora.targets=lm_head", "model.tie_word_embeddings=true"], "shares its matrix"),
        (
            ["train.only=experts", "train.precision=bf16", "parallel.expert=2", "parallel.zero=1"],
            "only the experts are",
        ),
        (["lora.dropout=0.1"], "lora.dropout=0.1 needs adapters: set lora.rank"),
        (["lora.targets=q_proj,v_proj"], "lora.targets=q_proj,v_proj needs adapters: set lora.rank"),
        (["train.only=attn"], "train.only: 'attn' chooses no weight.*router.*model.layers.*.self_attn.q_proj.weight"),
        (["train.only="], "train.only: '' chooses no weight"),
        (["lora.init_from=."], "adapter_config.json is no adapter's"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(tmp_path, capsys, words, message):
    assert run_small(tmp_path / "run", *words) in (2, 4)
    assert re.search(message, capsys.readouterr().err)


PLAIN = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj"]).to_dict()


def describe(folder, **changes):
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words", "code", "message"),
    [
        ({}, ["lora.rank=8"], 2, "lora.rank=8, but lora.init_from=.* has 4"),
        ({}, ["lora.alpha=16"], 2, "lora.alpha=16.0 scales adapters by 4, but .* has 2"),
        ({"use_rslora": True}, ["lora.alpha=8"], 2, "scales adapters by 2, but .* has 4"),
        ({"use_rslora": True}, ["lora.rslora=false"], 2, "scales adapters by 8, but .* has 4: leave the key out"),
        ({"use_rslora": True}, ["lora.rslora=true"], 4, "holds no adapter"),
        ({}, ["lora.rslora=true"], 2, "with lora.rslora scales adapters by 16, but .* has 2: leave the keys out"),
        ({"target_modules": ["q_proj", "w1"]}, [], 4, "adapts w1, expected"),
        ({"target_modules": ["embed_tokens"]}, [], 4, "adapts embed_tokens, expected"),
        ({"rank_pattern": {"q_proj": 2}}, [], 4, "rank_pattern set, expected plain LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, [], 4, "init_lora_weights=pissa_niter_4 set.* on unchanged weights"),
        ({"init_lora_weights": "olora"}, [], 4, "init_lora_weights=olora set"),
        ({"alora_invocation_tokens": [5]}, [], 4, "alora_invocation_tokens set"),
        ({"of_a_later_peft": 1}, [], 4, "of_a_later_peft set"),
        (json.loads(json.dumps(PLAIN, default=sorted)), [], 4, "holds no adapter: expected adapter_model.safetensors"),
        ({"peft_type": "IA3"}, [], 4, "describes IA3"),
        ({"r": 0}, [], 4, "is no adapter's"),
        ({}, [], 4, "holds no adapter: expected adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(given, tmp_path, capsys, changes, words, code, message):
    adapter = describe(tmp_path / "adapter", **changes)
    words = [f"model.init_from={given[0]}", f"data.path={given[1]}", f"lora.init_from={adapter}", *words]
    assert run_small(tmp_path / "run", *words) == code
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("case", [(EVERYWHERE, "portable")], indirect=True)
def test_an_adapter_of_which_a_later_expert_has_two_as_is_refused_before_anything_is_filled(case):
    base, adapter, _, folder = case
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if "layers.1." in name and "experts.5.w3.lora_A" in name]
    lora = LoraConfig(rank=adapter.rank, targets=",".join(adapter.targets), init_from=str(folder))
    find_adapter(lora, MixtralConfig.from_pretrained(base))
    save_file(tensors | {name: tensors[name] + 1}, file)
    with pytest.raises(CheckpointError, match=r"experts\.5\.w1\.lora_A.* differ, expected equal ones"):
        find_adapter(lora, MixtralConfig.from_pretrained(base))


def test_the_names_that_train_only_chooses_from_are_the_models_own():
    for tied in (False, True):
        model = MixtralForCausalLM(MixtralConfig(**SIZES, tie_word_embeddings=tied))
        config = Config()
        config.model.num_hidden_layers, config.model.tie_word_embeddings = SIZES["num_hidden_layers"], tied
        assert trained_names(config) == {name for name, _ in model.named_parameters()}


def test_rslora_scales_by_the_root_of_the_rank_and_is_written_as_the_scale_it_is():
    lora = LoraConfig(rank=16, alpha=8.0, rslora=True)
    assert adapter_of(lora).scale == 2.0
    described = peft_config(adapter_of(lora), None, fused=False)
    assert (described["lora_alpha"], described["r"], described["use_rslora"]) == (32.0, 16, False)


def test_new_adapters_change_nothing_and_are_the_same_for_any_split_of_the_experts():
    config = MixtralConfig(**SIZES)
    whole = dict(initial_adapters(config, EVERYWHERE, 3, range(8)))
    part = dict(initial_adapters(config, EVERYWHERE, 3, range(4, 6)))
    for name, tensor in whole.items():
        assert torch.equal(part[name], tensor[4:6] if ".experts." in name else tensor)
        assert ("lora_B" in name) == (not tensor.any())
