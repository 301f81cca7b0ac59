"""Frozen weights in four bits, against bitsandbytes itself and a plain model of the restored weights."""

import importlib
import inspect
import logging
import re
import shutil
import sys
import weakref
from logging.handlers import BufferingHandler

import pytest
import torch
import transformers
from bitsandbytes import functional
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mixtral import MixtralConfig, MixtralForCausalLM
from mixtral.ops.experts import Assignment, Projection, expert_ffn, reference
from mixtral.ops.permute import sort_rows
from mixtral.weights.names import trained_parameters, unwrapped
from tests.conftest import SIZES, skew_router
from tests.train.helpers import read_json, run_small, write_corpus
from tests.train.test_checkpoint import STEPS, assert_goes_on_bit_by_bit, state
from train.compose import compose
from train.config import QUANTIZED
from train.lora import adapt, adapter_of, initial_adapters, trainable_model
from train.merge import main as export
from train.model import empty_model, model_config
from train.parallel.engine import fill
from train.quantize import QuantizedMatrices, library, pack, quantize, quantized, unpack
from train.setup import NOTES, quiet_libraries

IDS = torch.arange(60).view(2, 30) * 7 % SIZES["vocab_size"]
LORA = ["lora.rank=4", "lora.targets=q_proj,v_proj", "schedule.warmup_steps=0", "evaluate.sample_tokens=2"]
NF4 = [*LORA, "lora.quantize=nf4"]
BOUND = 0.02  # of the held-out loss, relatively: what four bits may cost


def restore(matrix):
    """What bitsandbytes makes of a matrix, its own way with nested scales."""
    return functional.dequantize_4bit(*functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True))


def test_a_matrix_comes_back_as_bitsandbytes_itself_restores_it():
    draw = torch.Generator().manual_seed(0)
    for shape in ((64, 128), (66, 62), (2, 6), (1030, 1024)):  # whole blocks, odd ones, less than one, several chunks
        matrix = 0.02 * torch.randn(shape, generator=draw)
        packed, expected = pack(matrix), restore(matrix)
        found = unpack(packed, shape, torch.float32)
        assert (found - expected).norm() < 1e-4 * expected.norm()
        assert 0.01 < (found - matrix).norm() / matrix.norm() < 0.12
        assert torch.equal(unpack(packed, shape, torch.bfloat16), found.bfloat16())


def test_a_matrix_of_zeros_stays_one():
    assert not unpack(pack(torch.zeros(64, 32)), (64, 32), torch.float32).any()


def test_the_bytes_do_not_hang_on_the_number_of_threads():
    matrix, threads = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(pack(matrix))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted experts", "bare experts"])
def test_adapters_have_the_gradients_of_a_plain_model_with_the_restored_weights(adapted):
    config = MixtralConfig(**SIZES)
    plain = MixtralForCausalLM(config)
    skew_router(plain)
    lora = compose(["train.max_steps=1", *LORA, f"lora.experts={str(adapted).lower()}"]).config.lora
    adapter = adapter_of(lora)
    weights = plain.state_dict()
    values = dict(initial_adapters(config, adapter, 0, range(8), b_bound=0.3))

    def again(matrix):
        return unpack(pack(matrix), matrix.shape, torch.float32)  # a bit beside bitsandbytes' own may route elsewhere

    restored = {
        name: (torch.stack([*map(again, tensor)]) if tensor.dim() == 3 else again(tensor))
        for name, tensor in weights.items()
        if QUANTIZED.fullmatch(name)
    }
    assert len(restored) == config.num_hidden_layers * 6
    models = [empty_model(config) for _ in range(2)]
    for model in models:
        adapt(model, adapter)
    quantize(models[0], torch.float32)
    held = [dict(quantized(lambda _: iter(weights.items()))(range(8))), weights | restored]
    for model, base in zip(models, held, strict=True):
        for _ in fill(model, iter((base | values).items()), torch.float32):
            pass
    outputs = [model.train()(IDS, labels=IDS, output_router_logits=True) for model in (*models, plain)]
    losses = [output.loss for output in outputs[:2]]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert (outputs[0].logits - outputs[2].logits).norm() > 1e-3 * outputs[2].logits.norm()
    for loss in losses:
        loss.backward()
    found, expected = (trained_parameters(model) for model in models)
    assert found.keys() == expected.keys() == values.keys()
    for name, parameter in expected.items():
        assert (found[name].grad - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


def test_matrices_that_are_made_compute_what_their_reference_does_and_one_is_there_at_a_time(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    x_TH, experts_TK = torch.randn(40, 64, generator=draw), torch.randint(0, 4, (40, 2), generator=draw)
    assignment = Assignment(*sort_rows(experts_TK, num_experts=4), torch.rand(40, 2, generator=draw))
    shapes = (96, 64), (64, 48)
    gate_up, down = (
        Projection(QuantizedMatrices(torch.stack([pack(torch.randn(shape)) for _ in range(4)]), shape, torch.float32))
        for shape in shapes
    )
    alive, made = [], []

    def counting(packed, shape, dtype):
        assert not any(reference() is not None for reference in alive), "two matrices at once"
        matrix = unpack(packed, shape, dtype)
        alive[:] = [weakref.ref(matrix)]
        made.append(shape)
        return matrix

    expected = reference(x_TH, assignment, gate_up, down, torch.nn.functional.silu)
    monkeypatch.setattr("train.quantize.unpack", counting)
    found = expert_ffn(x_TH.requires_grad_(), assignment, gate_up, down, torch.nn.functional.silu)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert len(made) == 4 * 2 * 2


def test_the_frozen_weights_of_mixtral_8x7b_take_a_quarter_of_the_memory():
    words = ["model=mixtral_8x7b", "data.path=x", "train.max_steps=1", "lora.rank=16"]
    found = []
    for choice in ("none", "nf4"):
        config = compose([*words, f"lora.quantize={choice}"]).config
        model = trainable_model(config, model_config(config.model, None)).to(torch.bfloat16)
        held = {unwrapped(name): parameter for name, parameter in model.named_parameters()}
        sizes = [held[name].numel() * held[name].element_size() for name in held if QUANTIZED.fullmatch(name)]
        assert len(sizes) == 32 * 6
        found.append(sum(sizes))
        assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in held.items())
    assert found[0] > 90e9
    assert found[1] <= 0.27 * found[0]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model that has learned something, and its corpus."""
    folder = tmp_path_factory.mktemp("given")
    corpus = write_corpus(folder / "corpus.jsonl")
    words = ["train.max_steps=40", "optim.lr=1e-2", "schedule.warmup_steps=4"]
    assert run_small(folder / "run", f"data.path={corpus}", *words) == 0
    return [f"model.init_from={folder / 'run' / 'export'}", f"data.path={corpus}"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_beside_four_bits_at_about_the_same_loss_and_its_adapter_goes_onto_the_whole_weights(
    given, tmp_path, precision
):
    summaries = {}
    for name, words in {"plain": LORA, "nf4": NF4}.items():
        words = [*given, *words, f"train.precision={precision}", "optim.lr=1e-2"]
        assert run_small(tmp_path / name, *words) == 0
        summaries[name] = read_json(tmp_path / name / "summary.json")
    for figure in ("first_eval_loss", "eval_loss"):
        assert summaries["nf4"][figure] == pytest.approx(summaries["plain"][figure], rel=BOUND)
        assert summaries["nf4"][figure] != summaries["plain"][figure]
    assert summaries["nf4"]["eval_loss"] < summaries["nf4"]["first_eval_loss"]
    adapter, merged = tmp_path / "nf4" / "export", tmp_path / "merged"
    assert "held in 4 bits (nf4)" in (adapter / "README.md").read_text()
    assert export([f"adapter={adapter}", f"output_dir={merged}", f"dtype={precision}"]) == 0
    assert "held in 4 bits (nf4)" in (merged / "README.md").read_text()
    base = given[0].partition("=")[2]
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (base, merged))
    name = "model.layers.0.self_attn.k_proj.weight"  # no target
    assert torch.equal(after[name], before[name].to(after[name].dtype))
    if precision == "fp32":
        model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
        whole = transformers.AutoModelForCausalLM.from_pretrained(merged)
        with torch.no_grad():
            assert torch.allclose(model(IDS).logits, whole(IDS).logits, atol=1e-4)
        again = [*given, *NF4, f"lora.init_from={adapter}", "train.max_steps=1"]
        assert run_small(tmp_path / "again", *again) == 0
        first = read_json(tmp_path / "again" / "summary.json")["first_eval_loss"]
        assert first == pytest.approx(summaries["nf4"]["eval_loss"], rel=1e-5)


def test_a_run_goes_on_bit_by_bit_with_the_same_bytes_and_no_others(given, tmp_path, capsys):
    words = [*given, *NF4, "lora.dropout=0.1"]
    assert_goes_on_bit_by_bit(tmp_path, words)
    assert len(state(tmp_path / "whole", 8)["frozen"]) == 3 + 2 * (7 + 2 * 8)
    base = given[0].partition("=")[2]
    shutil.copytree(base, tmp_path / "other")
    weights = load_file(f"{base}/model.safetensors")
    weights["model.layers.1.block_sparse_moe.experts.5.w2.weight"] *= 1.5
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path / "died").glob("*/config.yaml"):
        path.unlink()
    more = [*STEPS, *words, "train.max_steps=9"]
    assert run_small(tmp_path / "died", *more, "lora.quantize=none") == 2
    assert "lora.quantize=nf4 -> none" in capsys.readouterr().err
    shutil.rmtree(base)
    shutil.copytree(tmp_path / "other", base)
    assert run_small(tmp_path / "died", *more) == 4
    assert "layers.1.mlp.experts.down_proj/5 differs, and 0 more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "lora.quantize=nf4 needs adapters: set lora.rank"),
        (["train.only=experts"], "lora.quantize=nf4 needs adapters: set lora.rank"),
        (["lora.rank=4", "train.only=experts"], "train.only=experts with lora.rank=4"),
        (["lora.rank=4", "parallel.zero=3"], "lora.quantize=nf4 does not go with parallel.zero=3"),
        (["lora.rank=4", "parallel.offload_parameters=true"], "parallel.offload_parameters=true needs parallel.zero=3"),
        (["lora.rank=4", "lora.dora=true", "lora.experts=false"], "lora.quantize=nf4 does not go with lora.dora=true"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name(given, tmp_path, capsys, words, message):
    assert run_small(tmp_path / "run", *given, "lora.quantize=nf4", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_a_machine_without_bitsandbytes_ends_with_code_6_before_any_data_is_read(
    given, tmp_path, capsys, monkeypatch, fault
):
    library.cache_clear()
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    else:
        monkeypatch.setattr(functional, "quantize_4bit", lambda *_, **__: torch.ops.bitsandbytes.there_is_none())
    try:
        assert run_small(tmp_path / "run", given[0], *NF4, "data.path=nowhere.jsonl") == 6
    finally:
        library.cache_clear()
    said = capsys.readouterr().err
    assert re.search(r"lora.quantize=nf4 needs bitsandbytes, which cannot be used on this cpu: .*\[quantize\]", said)
    assert not (tmp_path / "run").exists()


SAID_IN = {"DeepSpeed": "deepspeed.runtime.engine"}  # by a logger that is named otherwise


@pytest.mark.parametrize("name", NOTES)
def test_a_librarys_note_that_says_nothing_is_not_shown_and_others_are(name, monkeypatch):
    quiet_libraries()
    note, code = NOTES[name], inspect.getsource(importlib.import_module(SAID_IN.get(name, name)))
    assert f'"{note}' in code, f"{name} says it otherwise now, or no more"
    logger, said = logging.getLogger(name), BufferingHandler(10)
    monkeypatch.setattr(logger, "handlers", [said])
    logger.warning(f"{note} from kernels-community: %s", "why")
    logger.warning("something else")
    assert [record.getMessage() for record in said.buffer] == ["something else"]
