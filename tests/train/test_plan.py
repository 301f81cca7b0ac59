"""The planner's arithmetic, against the model's own sizes, and against figures that a reader can follow by hand."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch

import train.optim
import train.plan.memory
from bench.instruments import kept_for_backward
from mixtral import MixtralConfig
from mixtral.weights.names import unwrapped
from tests.train.helpers import SMALL, read_json, run_small
from train.cli import main
from train.compose import compose, recipes
from train.errors import ConfigError
from train.lora import trainable_model
from train.model import model_config
from train.plan.blocks import Blocks
from train.plan.figures import figures_of
from train.plan.hardware import Efficiency, device_of, table
from train.plan.kept import kept_of_layer
from train.plan.layout import NF4, Layout
from train.plan.load import Skew, seen, skews_of
from train.plan.memory import memory_of
from train.plan.refusal import refuse_too_large
from train.plan.report import found, report
from train.plan.search import best, candidates, changes, smallest
from train.plan.seconds import flops_per_token, step_of
from train.plan.verb import command, compose_plan

EVEN = Skew()
GB = 1e9
COMES_AND_GOES = ("gradients", "activations", "routed rows", "logits")
MODEL = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "num_local_experts", "tie_word_embeddings"),
)


def planned(*words, processes=1, on_gpu=True):
    return Layout(compose_plan(words).config, processes, on_gpu)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("model.tie_word_embeddings=true",),
        ("model.head_dim=10", "train.only=router,model.layers.1.self_attn.*"),
        ("lora.rank=4",),
        ("lora.rank=4", "lora.targets=q_proj,o_proj,gate,lm_head", "lora.experts=false"),
        ("lora.rank=4", "lora.experts=false", "lora.dora=true"),
        ("data.format=classification", "data.path=x", "data.labels=[a,b,c]"),
        ("data.format=regression", "data.path=x", "lora.rank=4"),
    ],
    ids=lambda words: " ".join(words) or "whole",
)
def test_the_parameters_are_the_models_own_in_name_order_shape_and_training(words):
    config = compose([*SMALL, *words]).config
    sizes = MixtralConfig(**{name: getattr(config.model, name) for name in MODEL})
    if config.data.format != "auto":
        sizes.problem_type, sizes.num_labels = "single_label_classification", len(config.data.labels) or 1
    model = trainable_model(config, sizes)
    theirs = [(unwrapped(name), tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    layout = Layout(config, 1)
    assert [(weight.name, weight.shape, weight.trained) for weight in layout.weights] == theirs
    assert flops_per_token(layout) == sizes.training_flops_per_token(config.data.sequence_length)


def test_counts_of_the_published_models_are_the_published_ones():
    for group, total, active in (("mixtral_8x7b", 46.70e9, 12.88e9), ("mixtral_8x22b", 140.62e9, 39.15e9)):
        count = planned(f"model={group}", "data.path=x", "train.max_steps=1").count
        assert count.total == pytest.approx(total, rel=1e-3)
        assert count.active == pytest.approx(active, rel=1e-3)


def test_what_a_layer_keeps_is_sonicmoes_figure_for_mixtrals_shape():
    # arXiv 2512.14080: X and the gate/up pre-activation of two experts, in bf16, 123 KB a token and layer
    layout = planned("model=mixtral_8x7b", "data.path=x", "train.max_steps=1", "data.sequence_length=16384")
    routed = kept_of_layer(layout, EVEN).routed.total / layout.tokens
    assert (routed + 2 * 4096) / 1e3 == pytest.approx(2 * (4096 + 2 * 2 * 14336) / 1e3, rel=0.01)
    assert (routed + 2 * 4096) / 1e3 == pytest.approx(123, rel=0.01)


SHAPE = ("train.micro_batch_size=4", "data.sequence_length=512", "model.hidden_size=64", "model.intermediate_size=128")


def kept_by_operations(words, dtype):
    """Bytes that a forward pass over packed rows saves for backward."""
    config = compose([*SMALL, *SHAPE, *words]).config
    model = trainable_model(config, model_config(config.model, None)).to_empty(device="cpu").to(dtype).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids, positions = torch.randint(300, (4, 512)), torch.arange(256).repeat(4, 2)
    with kept_for_backward(model) as kept:
        loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False, skip_logits=True).loss
    assert loss.requires_grad
    return kept[0]


@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("train.only=experts",),
        ("lora.rank=4",),
        ("lora.rank=4", "lora.targets=q_proj,gate"),
        ("lora.rank=4", "lora.dropout=0.1"),
    ],
    ids=lambda words: " ".join(words) or "whole",
)
def test_what_a_layer_keeps_is_what_its_operations_save(words, precision, backend):
    words = (f"train.precision={precision}", f"model.attn_implementation={backend}", *words)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    few, many = (kept_by_operations((*words, f"model.num_hidden_layers={layers}"), dtype) for layers in (2, 4))
    layout = Layout(compose([*SMALL, *SHAPE, *words]).config, 1, on_gpu=False)
    kept = kept_of_layer(layout, EVEN)
    # The plan has room for what the router's losses keep, which no op of the layer does, and fills up every expert.
    assert 0.88 <= (many - few) / 2 / (kept.dense.total + kept.routed.total) <= 1


KEPT = ("train.recompute=none", "train.micro_batch_size=1", "train.gradient_accumulation_steps=4")
FULL = ("recipe=sft_8x7b_full", "parallel.zero=2", *KEPT)


def test_full_fine_tuning_of_8x7b_needs_32_gpus_of_80_gb_unless_it_offloads_recomputes_or_is_tight():
    # bf16 weights: an eighth of 45.10 B experts, and 1.61 B others; fp32 gradients, masters and two moments of a share
    weights, state = 2 * (45.10 / 8 + 1.61), (4 + 4 + 8) * 46.70
    eight = memory_of(planned(*FULL, processes=8), EVEN)
    assert eight.parts["weights"] / GB == pytest.approx(weights, abs=0.05)  # 14.5 GB
    parts = ("gradients", "masters", "moments")
    assert sum(eight.parts[part] for part in parts) / GB == pytest.approx(state / 8, abs=0.1)  # 93.4 GB
    assert weights + state / 8 > 80  # before anything is computed
    plan = compose_plan(FULL).config
    h100 = device_of(plan.plan)
    fitting = {n: [one for one in best(plan, n, h100, most=10**6) if is_as_it_is(one)] for n in (8, 16, 32)}
    assert not fitting[8]
    assert fitting[16]  # at ZeRO-3: 5.8 + 46.7 GB of state, 15 GB of rows, 7.3 GB of buffers and overhead
    assert all(one.is_tight for one in fitting[16] if one.layout.config.parallel.expert > 1)
    assert not fitting[32][0].is_tight
    assert best(plan, 8, h100)  # with offloading eight are enough, slowly
    assert figures_of(planned(*FULL, processes=32), h100).spare / GB == pytest.approx(21, abs=0.5)


def is_as_it_is(figures):
    """Whether a layout neither offloads nor recomputes."""
    config = figures.layout.config
    return not config.parallel.offload_optimizer and config.train.recompute == "none"


def test_adapters_of_8x7b_fit_eight_gpus_of_80_gb_with_experts_over_eight():
    figures = figures_of(planned("recipe=sft_8x7b_lora", processes=8), device_of(compose_plan(FULL).config.plan))
    # 14.6 GB weights, 0.45 GB for 0.223 B adapters, and of each of 32 layers 4096 x (what is kept of a token)
    kept = 32 * 4096 * 2 * 2 * 2 * 14336 * 1.3  # gate and up of 2 rows a token, in bf16, 1.3 times an even share
    assert figures.high.parts["weights"] / GB == pytest.approx(14.57, abs=0.01)
    assert kept / GB < figures.high.parts["routed rows"] / GB < 1.7 * kept / GB
    assert figures.fits
    assert figures.spare / GB == pytest.approx(14.6, abs=0.5)


def test_adapters_of_8x22b_need_sixteen_gpus_of_80_gb_unless_they_offload_or_recompute():
    plan = compose_plan(["recipe=sft_8x22b_lora", *KEPT]).config
    h100 = device_of(plan.plan)
    # eight hold 281 GB of bf16 weights, 35 GB each; 2048 tokens keep 41 GB in 56 layers, with an even load; ZeRO-3's
    # bucket and the weights that it brings together are 2 GB each
    eight = memory_of(planned("recipe=sft_8x22b_lora", *KEPT, processes=8), EVEN).moments["loss"]
    assert 2 * 140.6 / 8 + 41 + 2 + 2 > 80
    assert eight["weights"] / GB == pytest.approx(2 * 140.6 / 8, rel=0.02)
    assert (eight["activations"] + eight["routed rows"]) / GB == pytest.approx(41, abs=1)
    fitting = {n: [one for one in best(plan, n, h100, most=10**6) if is_as_it_is(one)] for n in (8, 16)}
    assert not fitting[8]
    assert fitting[16]
    assert any(one.layout.config.train.recompute == "layers" for one in best(plan, 8, h100, most=10**6))


def test_what_is_held_at_the_step_falls_with_each_stage_and_with_more_processes():
    words = ("model=mixtral_8x7b", "data.path=x", "train.max_steps=1", "data.sequence_length=2048", "parallel.expert=8")

    def held(zero, processes):
        return sum(
            memory_of(planned(*words, f"parallel.zero={zero}", processes=processes), EVEN).moments["step"].values()
        )

    for processes in (16, 64):
        assert held(1, processes) > held(2, processes)
    assert held(2, 16) > held(2, 64) > held(2, 128)
    assert held(3, 16) > held(3, 64) > held(3, 128)


def test_skew_costs_memory_and_time_only_where_experts_are_split():
    words = ("model=mixtral_8x7b", "data.path=x", "train.max_steps=1", "data.sequence_length=2048")
    h100, skewed = device_of(compose_plan(FULL).config.plan), Skew(2.0, 2.0, 2.0, "a test")
    split = planned(*words, "parallel.expert=8", "parallel.zero=2", processes=8)
    even, uneven = memory_of(split, EVEN), memory_of(split, skewed)
    rows = 2048 * 2 * 32 * 2 * (2 * 14336 + 4096)  # bytes of gate, up and input of an even share
    moved = uneven.moments["loss"]["routed rows"] - even.moments["loss"]["routed rows"]
    assert moved == pytest.approx(rows, rel=0.01)
    assert step_of(split, h100, skewed).parts["experts"] == 2 * step_of(split, h100, EVEN).parts["experts"]
    one = skews_of(split.config, 1).high
    assert (one.mean, one.layer) == (1.0, 1.0)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("passes", [1, 2])
def test_masters_take_gradients_of_bf16_up_as_they_come_but_those_of_an_only_pass(passes, processes):
    words = ("train.precision=bf16", "train.max_steps=1", "data.path=x", f"train.gradient_accumulation_steps={passes}")
    layout = planned(*words, processes=processes)
    found = memory_of(layout, EVEN).moments["backward, first layer"]["gradients"]
    there = layout.differentiated(0)
    arrived, newest = (sum(map(layout.here, some)) for some in (there, [one for one in there if one.layer == 0]))
    alone = {(1, 1): 2 * arrived, (1, 2): 4 * arrived + 2 * newest}
    expected = alone.get((passes, processes), 4 * layout.trained_here + 2 * newest)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_load_of_a_run_is_read_by_ranks_and_percentiles(tmp_path):
    even, all_on_one = [[0.25] * 4] * 2, [[1.0, 0.0, 0.0, 0.0], [0.25] * 4]
    rows = [{"step": step, "expert_load": all_on_one if step == 7 else even} for step in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = seen(str(tmp_path), ranks=2, experts=4)
    assert (found.median.mean, found.median.layer) == (1.0, 1.0)
    assert (found.high.mean, found.high.layer) == (1.0, 1.0)  # which one step in a hundred exceeds
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:50]))
    found = seen(str(tmp_path), ranks=2, experts=4)
    assert (found.high.mean, found.high.layer, found.high.expert) == (1.5, 2.0, 4.0)
    with pytest.raises(ConfigError, match="has 4 experts, expected that of model.num_local_experts=8"):
        figures_of(planned(*FULL, f"plan.load_from={tmp_path}"), device_of(compose_plan(FULL).config.plan))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ConfigError, match="has no expert_load"):
        seen(str(tmp_path), ranks=2, experts=4)


def test_every_device_of_the_table_is_whole_and_has_a_source():
    rows = table()
    names = [name for name in rows if name != "efficiency"]
    assert {"a100-40g", "a100-80g", "h100-80g", "h200-141g", "b200-180g", "l40s-48g", "rtx4090-24g"} < {*names}
    for name in names:
        config = compose_plan([*FULL, f"plan.gpu={name}"]).config
        device = device_of(config.plan)
        assert device.source
        assert device.memory > 1e9
        assert device.bandwidth > device.inside >= device.between


def test_a_plan_is_written_without_torch_and_in_seconds(tmp_path):
    code = f"""
import sys
from train.cli import main
words = ["plan", "recipe=sft_8x7b_lora", "plan.gpu=a100-40g", "plan.gpus=8", "run.dir={tmp_path}/plan"]
assert main(words) == 0
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    assert "it does NOT fit" in done.stdout
    assert "data.sequence_length=1024" in done.stdout.split("By itself, makes it fit:")[1]
    plan = read_json(tmp_path / "plan" / "plan.json")
    assert not plan["fits"]
    assert plan["spare"] < 0
    assert plan["hardware"]["source"].startswith("NVIDIA A100 data sheet")
    assert {"fp8": None, "bf16": 312e12}.items() <= plan["hardware"].items()
    assert plan["memory"]["p99"]["peak"] > plan["memory"]["median"]["peak"] > 40e9
    assert plan["step"]["seconds"] == pytest.approx(sum(plan["step"]["parts"].values()))
    assert (tmp_path / "plan" / "plots" / "plan.png").stat().st_size > 10_000
    assert read_json(tmp_path / "plan" / "exit.json")["code"] == 0


LARGE = ("model.hidden_size=8192", "model.intermediate_size=32768", "model.num_hidden_layers=64")


def test_a_run_that_cannot_fit_this_machine_ends_with_2_and_figures_and_may_be_started_all_the_same(tmp_path, capsys):
    # 64 layers of 8 experts of 3 x 8192 x 32768: 412 B parameters, 7 TB with gradients, masters and moments in bf16
    assert run_small(tmp_path / "run", *LARGE, "train.precision=bf16") == 2
    said = capsys.readouterr().err
    assert re.search(r"cannot fit: a process needs about (\d+)\.\d GB", said), said
    assert "plan.check=false" in said
    assert "without run.dir, plan.gpus=1 plan.gpu=cpu plan.calibrate=true and plan.search=true" in said
    assert read_json(tmp_path / "run" / "exit.json")["code"] == 2
    config = compose([*SMALL, *LARGE, "plan.check=false"]).config
    refuse_too_large(config, 1, 1e9, on_gpu=False)


def test_the_start_takes_a_second_copy_of_weights_where_deepspeed_makes_it_there_and_refuses_nothing_by_itself():
    words = ("model=mixtral_8x7b", "data.path=x", "train.max_steps=1", "data.sequence_length=256")

    def start(zero, on_gpu, precision="bf16"):
        layout = planned(*words, f"parallel.zero={zero}", f"train.precision={precision}", processes=64, on_gpu=on_gpu)
        return memory_of(layout, EVEN).moments["start"]["communication"] / GB

    assert [start(1, True), start(1, False), start(2, False)] == pytest.approx([2 * 46.7] * 3, rel=0.01)
    masters = [start(2, True), start(1, True, "fp32"), start(3, True)]
    assert masters == pytest.approx([4 * 46.7 / 64] * 3, rel=0.01)
    layout = planned(*words, "parallel.zero=2", "optim=sgd", processes=64, on_gpu=False)
    moments = memory_of(layout, EVEN).moments
    others = max(sum(parts.values()) for moment, parts in moments.items() if moment != "start")
    assert others < 0.8 * sum(moments["start"].values())
    refuse_too_large(layout.config, 64, others, on_gpu=False)


@pytest.mark.parametrize("words", [(), ("lora.rank=4", "lora.quantize=nf4", "train.precision=bf16")], ids=["", "nf4"])
def test_nothing_is_refused_that_only_may_not_fit(words):
    config = compose(["recipe=pretrain_tiny", *words]).config
    needed = memory_of(Layout(config, 1, on_gpu=False), EVEN).peak
    refuse_too_large(config, 1, 0.9 * needed, on_gpu=False)
    with pytest.raises(ConfigError, match="cannot fit"):
        refuse_too_large(config, 1, 0.8 * needed, on_gpu=False)


def test_weights_in_four_bits_are_counted_as_the_bytes_that_hold_them():
    config = compose([*SMALL, "lora.rank=4", "lora.quantize=nf4", "train.precision=bf16"]).config
    sizes = MixtralConfig(**{name: getattr(config.model, name) for name in MODEL})
    model = trainable_model(config, sizes)
    theirs = {unwrapped(name): p.numel() for name, p in model.named_parameters() if p.dtype is torch.uint8}
    layout = Layout(config, 1)
    mine = [weight for weight in layout.weights if layout.is_quantized(weight)]
    assert {weight.name for weight in mine} == theirs.keys()
    assert NF4 * sum(weight.elements for weight in mine) == pytest.approx(sum(theirs.values()), rel=0.02)
    # 45.10 B weights of the experts over 8 processes, and 1.34 B of attention, in 0.516 bytes each; 0.27 B others in 2
    words = ("recipe=sft_8x7b_lora", "parallel.zero=1", "lora.quantize=nf4")
    held = memory_of(planned(*words, processes=8), EVEN).moments["step"]["weights"]
    assert held / GB == pytest.approx(0.516 * (45.10 / 8 + 1.34) + 2 * (0.27 + 0.05), abs=0.05)
    refuse_too_large(compose_plan(words).config, 8, 45e9, on_gpu=True)  # in bf16 it would take 59 GB


def test_what_is_not_modelled_is_said_and_refuses_nothing_but_what_is_known_not_to_fit():
    words = ("model=mixtral_8x7b", "data.path=x", "train.max_steps=1", "train.only=model.layers.31.*")
    layout = planned(*words)
    assert "train.only=model.layers.31.*" in layout.left_out[0]
    figures = figures_of(layout, device_of(layout.config.plan))
    assert "not modelled: train.only" in report(figures, [], "")
    known = memory_of(layout, EVEN).moments["step"]
    refuse_too_large(layout.config, 1, sum(known.values()), on_gpu=True)
    with pytest.raises(ConfigError, match="plan.gpus=1 plan.gpu=NAME"):
        refuse_too_large(layout.config, 1, 0.8 * known["weights"], on_gpu=True)
    assert not planned(*words[:3], "train.only=experts").left_out
    assert planned(*words[:3], "train.only=lm_head.weight").left_out


SMALL_8X7B = ("model=mixtral_8x7b", "data.path=x", "train.max_steps=1", "data.sequence_length=1024")
CANNOT = {
    "dora with ZeRO-3": ("recipe=sft_8x7b_lora", "lora.dora=true", "lora.experts=false", "parallel.zero=2"),
    "four bits with ZeRO-3": ("recipe=sft_8x7b_lora", "lora.quantize=nf4", "parallel.zero=2"),
    "experts alone at ZeRO-1": (*SMALL_8X7B, "train.only=experts", "parallel.expert=8", "parallel.zero=2"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_nothing_is_proposed_that_training_refuses(case):
    config = compose_plan(CANNOT[case]).config
    proposed = list(candidates(config, 16))
    zero = 1 if case.endswith("ZeRO-1") else 3
    assert {1, 2, 3} - {candidate.parallel.zero for candidate in proposed if candidate.parallel.expert == 8} == {zero}
    small = dataclasses.replace(device_of(config.plan), memory=20e9)
    assert all(way.layout.zero != 3 or zero != 3 for _, way in changes(figures_of(Layout(config, 16), small)))


def test_adapters_are_proposed_where_there_are_weights_to_adapt():
    small = dataclasses.replace(device_of(compose_plan(FULL).config.plan), memory=70e9)
    for words, expected in ((FULL, True), (SMALL_8X7B, False)):
        config = compose_plan([*words, "parallel.expert=8", "parallel.zero=1"]).config
        ways = [words for words, _ in changes(figures_of(Layout(config, 8), small))]
        assert ("lora.rank=16" in ways) == expected


@pytest.mark.parametrize("gpus", [6, 16])
def test_what_is_found_trains_the_batch_that_was_given_or_says_that_it_cannot(gpus):
    words = (*SMALL_8X7B, f"plan.gpus={gpus}", "train.micro_batch_size=1", "train.gradient_accumulation_steps=3")
    config = compose_plan(words).config
    device = device_of(config.plan)
    own = figures_of(Layout(config, gpus), device)
    assert own.layout.rows_of_step == 3 * gpus
    for processes in (2, 4, 8, 12):
        rows = {Layout(candidate, processes).rows_of_step for candidate in candidates(config, processes)}
        assert rows == ({3 * gpus} if 3 * gpus % processes == 0 else {processes * round(3 * gpus / processes)})
    least = smallest(config, device)
    assert least is not None
    assert least.layout.processes == 4  # which 48 rows divide by, and 18 do not
    said = found([], own, least, "a command")
    assert ("NOT the 18 that were given" in said) == (gpus == 6)
    assert said.endswith("to start it:\n  a command")


def test_more_gpus_are_proposed_with_fewer_passes_so_that_the_batch_stays_or_with_what_it_becomes():
    for passes, expected, rows in (
        (4, "plan.gpus=32 train.gradient_accumulation_steps=2", 64),
        (1, "plan.gpus=32", 32),
    ):
        own = planned(*FULL, f"train.gradient_accumulation_steps={passes}", processes=16)
        figures = figures_of(own, device_of(own.config.plan))
        ways = [(words, way) for words, way in changes(figures) if words.startswith("plan.gpus=")]
        assert [(words, way.layout.rows_of_step) for words, way in ways] == [(expected, rows)]
        line = next(line for line in report(figures, ways, "").splitlines() if "  plan.gpus=" in line)
        assert ("32 rows a step" in line) == (passes == 1)


def test_the_layout_that_was_given_has_a_row_with_the_memory_of_the_host_where_any_takes_it(tmp_path, capsys):
    words = [*FULL, "plan.gpus=8", "plan.search=true", f"run.dir={tmp_path / 'plan'}"]
    assert main(["plan", *words]) == 0
    table, least = capsys.readouterr().out.split("the best layouts that fit")[1].split("the fewest that do")
    given = [line for line in table.splitlines() if "as given" in line]
    assert len(given) == 1
    assert "does not fit" in given[0]
    assert "host GB" in table.splitlines()[0]
    # 12 bytes of masters and moments, a gradient in fp32 and a weight in bf16, of an eighth of 46.70 B parameters
    assert f"  {18 * 46.70 / 8:.1f}  " in table
    assert float(re.findall(r"and ([\d.]+) in host memory", least)[0]) == pytest.approx(18 * 46.70 / 4, abs=0.1)
    command = next(line for line in least.splitlines() if "torchrun" in line)
    assert "--nproc_per_node 4" in command
    assert "train.micro_batch_size=8 train.gradient_accumulation_steps=1" in command  # 4 rows of 8 before
    fits = figures_of(planned("recipe=sft_8x7b_lora", processes=8), device_of(compose_plan(FULL).config.plan))
    assert found([fits], fits, None, "").count("as given") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan.gpu=h10-80g",), "plan.gpu=h10-80g.*did you mean h100-80g"),
        (("plan.gpu=cpu",), "plan.calibrate=true"),
        (("plan.gpu=cpu", "plan.per_host=2"), "plan.per_host=2 is of hosts with GPUs"),
        (("plan.gpu=cpu", "plan.interconnect=2"), "plan.interconnect=2.0 is of hosts with GPUs"),
        (("plan.gpus=12",), "parallel.expert=8 does not divide plan.gpus=12"),
        (("plan.load_from=/nowhere",), "plan.load_from=/nowhere"),
        (("plan.gpuss=12",), "unknown key plan.gpuss.*did you mean plan.gpus"),
    ],
)
def test_what_cannot_be_planned_is_one_error(words, message, tmp_path, capsys):
    code = main(["plan", "recipe=sft_8x7b_lora", *words, f"run.dir={tmp_path / 'plan'}"])
    said = capsys.readouterr().err
    assert code == 2
    assert re.search(message, said), said


def test_processes_on_a_processor_share_the_memory_of_one_host(tmp_path):
    known = ("bf16", "fp32", "bandwidth", "inside", "between", "host")
    efficiency = dict.fromkeys((field.name for field in dataclasses.fields(Efficiency)), 1.0)
    measured = {"name": "cpu", "memory": 8e9, "host_memory": 8e9, "per_host": 2, "fp8": None, "source": "a test"}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**measured, **dict.fromkeys(known, 1e10), "efficiency": efficiency}))
    plan = compose_plan([*SMALL, "plan.gpu=cpu", f"plan.calibration={path}"]).config
    for processes in (1, 2, 8):
        figures = figures_of(Layout(plan, processes, on_gpu=False), device_of(plan.plan))
        assert figures.spare == 8e9 / processes - figures.high.peak
        assert figures.described()["hosts"] == 1
        assert f"{processes} x cpu of {8 / processes:.0f} GB, 1 host" in report(figures, [], "")
        assert "--nnodes" not in command(figures, [])


def test_on_a_processor_the_heap_stays_as_large_as_all_blocks_below_64_mb_once_made_it():
    assert Blocks.of([1e6, 40e6, 100e6]) == Blocks(total=141e6, small=1e6, fitting=41e6)
    words = ("recipe=pretrain_tiny", "train.precision=fp32", "model.hidden_size=768", "parallel.zero=1")
    for expert, holes in ((1, 0.2), (2, 0.4)):
        memory = memory_of(planned(*words, f"parallel.expert={expert}", processes=2, on_gpu=False), EVEN)
        moments = [parts for name, parts in memory.moments.items() if name != "start"]
        most = max(sum(moment[kind] for kind in COMES_AND_GOES if kind in moment) for moment in moments[:3])
        assert memory.moments["reduction"]["overhead"] == pytest.approx((1 + holes) * most)


def test_zero_3_empties_its_bucket_when_gradients_of_split_experts_follow_others():
    words = ("recipe=pretrain_tiny", "train.precision=fp32", "parallel.zero=3", "parallel.persistent_elements=0")
    for expert in (1, 2):
        layout = planned(*words, f"parallel.expert={expert}", processes=2, on_gpu=False)
        model = layout.config.model
        experts = 3 * model.num_local_experts // 2 * model.hidden_size * model.intermediate_size  # of a layer
        last = [one for one in layout.trained if "embed_tokens" in one.name or (one.layer == 0 and not one.is_expert)]
        run = max(experts, sum(weight.elements for weight in last))
        assert layout.longest_run == (layout.trained_here if expert == 1 else run)


def test_a_machine_that_cannot_be_measured_ends_the_plan_with_6(tmp_path, capsys, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr("train.plan.verb.run_processes", lambda *_: failed)
    words = ["plan.gpu=cpu", "plan.calibrate=true", f"run.dir={tmp_path / 'plan'}"]
    assert main(["plan", "recipe=pretrain_tiny", *words]) == 6
    assert "this machine cannot be measured: no network" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [name for name, path in recipes().items() if re.search("^# Needs", path.read_text(), re.MULTILINE)]
)
def test_a_recipe_fits_the_gpus_that_its_header_names_with_the_state_that_it_says(name):
    text = recipes()[name].read_text()
    gpus = int(re.findall(r"^# Needs (\d+) GPUs", text, re.MULTILINE)[0])
    said = {part: float(figure) for part, figure in re.findall(r"^#   (\w+) .* = ([\d.]+) GB$", text, re.MULTILINE)}
    figures = figures_of(planned(f"recipe={name}", processes=gpus), device_of(compose_plan(FULL).config.plan))
    assert figures.fits
    for part in ("masters", "moments"):
        assert figures.high.moments["step"][part] / GB == pytest.approx(said[part], abs=0.01)
    adapters = 0.25 if figures.layout.config.lora.rank else 0.0  # which the header leaves out of the weights
    assert said["weights"] - 0.01 < figures.high.moments["step"]["weights"] / GB < said["weights"] + 0.01 + adapters


def test_the_command_to_start_it_names_the_data_that_a_plan_does_without(tmp_path, capsys):
    words = ["recipe=sft_8x7b_lora", "plan.gpus=8"]
    for number, (given, said) in enumerate((([], "data.path=DATA"), (["data.path=x"], "data.path=x"))):
        assert main(["plan", *words, *given, f"run.dir={tmp_path / str(number)}"]) == 0
        command = capsys.readouterr().out.split("to start it:\n")[1].splitlines()[0]
        assert command == f"  torchrun --nproc_per_node 8 -m train recipe=sft_8x7b_lora {said}"


@pytest.mark.parametrize("gpus", [8, 12, 16, 20])
def test_the_commands_of_all_hosts_start_as_many_processes_as_were_planned(gpus):
    words = (*FULL, f"plan.gpus={gpus}", "parallel.expert=4", "data.path=x")
    config = compose_plan(words).config
    said = command(figures_of(Layout(config, gpus), device_of(config.plan)), words)
    hosts = int((re.findall(r"--nnodes (\d+)", said) or [1])[0])
    each, *rest = map(int, re.findall(r"--nproc_per_node (\d+)", said))
    assert (hosts - 1) * each + (rest or [each])[0] == gpus
    assert each <= 8


def test_moments_of_bf16_take_half_and_are_proposed_where_they_may_be():
    plans = [planned(*FULL, *words, processes=32) for words in ((), ("optim.moments=bf16",))]
    wide, half = (memory_of(layout, EVEN).parts["moments"] for layout in plans)
    assert half == wide / 2
    assert wide / GB == pytest.approx(8 * 46.70 / 32, abs=0.05)
    h100 = device_of(compose_plan(FULL).config.plan)
    for words, proposed in (((), True), (("optim.beta2=0.999",), False)):
        figures = figures_of(planned(*FULL, *words, processes=16), h100)
        assert not figures.fits
        assert ("optim.moments=bf16" in [words for words, _ in changes(figures)]) is proposed


def test_overlapped_rows_travel_while_experts_compute():
    words = (*FULL, "data.path=x", "parallel.expert=8", "plan.gpu=h100-80g")

    def planned_with(degree):
        layout = planned(*words, f"parallel.overlap_degree={degree}", processes=32)
        device = device_of(layout.config.plan)
        return step_of(layout, device, EVEN), memory_of(layout, EVEN), layout

    (whole, before, layout), (parts, after, _) = planned_with(1), planned_with(4)
    travel = whole.parts["all-to-all"]
    assert travel < whole.parts["experts"]
    assert layout.config.train.recompute == "none"
    assert parts.parts["all-to-all"] == pytest.approx(travel / 4)
    own = sum(layout.here(weight) for weight in layout.trained if weight.layer == 0 and weight.is_expert)
    device, layers = device_of(layout.config.plan), layout.config.model.num_hidden_layers
    passes = layout.config.train.gradient_accumulation_steps
    added = 3 * 3 * passes * layers * layout.bytes * own / (device.efficiency.memory * device.bandwidth)
    assert parts.parts["gradients"] - whole.parts["gradients"] == pytest.approx(added)
    assert parts.seconds > whole.seconds  # inside a host it does not pay
    moment = "backward, first layer"
    assert after.moments[moment]["gradients"] - before.moments[moment]["gradients"] == layout.bytes * own


def test_tiled_attention_saves_time_in_bf16_on_a_processor_alone():
    gpu = device_of(compose_plan(FULL).config.plan)
    processor = dataclasses.replace(gpu, name="cpu")

    def seconds(device, *words):
        attention = {}
        for backend in ("sdpa", "tiled"):
            backend_words = (f"model.attn_implementation={backend}", "data.sequence_length=1024", *words)
            layout = planned("recipe=pretrain_tiny", *backend_words, on_gpu=device.is_gpu)
            attention[backend] = step_of(layout, device, EVEN).parts["attention"]
        return attention

    half = seconds(processor, "train.precision=bf16")
    assert half["tiled"] < half["sdpa"]
    for one in (seconds(processor, "train.precision=fp32"), seconds(gpu, "train.precision=bf16")):
        assert one["tiled"] == one["sdpa"]
    windowed = seconds(gpu, "model.sliding_window=256")
    assert windowed["tiled"] < windowed["sdpa"]


def test_moments_of_bf16_cost_time():
    words = (*FULL, "plan.gpu=h100-80g")
    device = device_of(compose_plan(FULL).config.plan)
    whole, half = (
        step_of(planned(*words, f"optim.moments={kind}", processes=32), device, EVEN) for kind in ("fp32", "bf16")
    )
    assert half.parts["optimizer"] == pytest.approx(whole.parts["optimizer"] * (52 + 8 + 2) / (28 + 8 + 2))


def test_what_is_widened_at_a_time_is_what_the_trainer_widens():
    assert train.plan.memory.PART == train.optim.PART


def test_overlap_sends_more_when_recomputing_and_makes_frozen_experts_again_in_each_part():
    words = ("recipe=sft_8x7b_lora", "parallel.expert=8", "parallel.zero=1", "plan.gpu=h100-80g", "lora.quantize=nf4")

    def step_with(*more):
        layout = planned(*words, *more, processes=8)
        return step_of(layout, dataclasses.replace(device_of(layout.config.plan), name="cpu"), EVEN).parts

    whole, twice = step_with("parallel.overlap_degree=1"), step_with("parallel.overlap_degree=2")
    assert twice["elementwise"] > whole["elementwise"]
    assert twice["launches"] > whole["launches"]
    assert twice["all-to-all"] == whole["all-to-all"]  # a processor hides nothing
    again = [step_with("train.recompute=layers", f"parallel.overlap_degree={degree}") for degree in (1, 2)]
    assert again[0]["all-to-all"] == pytest.approx(whole["all-to-all"] * 5 / 4)
    assert again[1]["all-to-all"] == pytest.approx(whole["all-to-all"] * 6 / 4)


def test_what_starts_the_fewest_devices_can_be_started_with_overlap_or_without(tmp_path, capsys):
    """A given overlap is left out where the experts of a layout that was found are not split."""
    words = ["recipe=pretrain_tiny", "plan.gpus=2", "plan.gpu=h100-80g", "plan.search=true"]
    words += ["parallel.expert=2", "parallel.zero=1", "parallel.overlap_degree=2"]
    assert main(["plan", *words, f"run.dir={tmp_path / 'plan'}"]) == 0
    said = capsys.readouterr().out
    layout = re.search(r"^  layout  (.*)$", said, re.MULTILINE)
    assert layout is not None
    assert "parallel.expert=2 parallel.overlap_degree=2" in layout[1]
    smallest_layout = read_json(tmp_path / "plan" / "plan.json")["smallest"]["layout"]
    assert smallest_layout["expert"] == smallest_layout["overlap_degree"] == 1
    (found_command,) = re.findall(r"^ *python -m train (.*)$", said, re.MULTILINE)
    assert compose(found_command.split()).config.parallel.overlap_degree == 1
