"""`cierzo verify`: does this layout train what one process would? Two SGD steps, compared tensor by tensor."""

import contextlib
import copy
import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mixtral import MixtralConfig
from mixtral.losses import load_balancing_loss
from mixtral.weights.names import is_stacked, trained_parameters
from mixtral.weights.write import new_folder
from train.config import Config, trained_names
from train.data.packing import Batch
from train.errors import ConfigError, NumericsError
from train.export import exported_pieces, write_pieces
from train.folder import RunFolder
from train.loop import accumulate, step_size
from train.lora import trainable_model
from train.model import model_config
from train.objective import Coefficients, Parts
from train.parallel.engine import Engine, Piece, fill
from train.parallel.proof import Proof
from train.quantize import restored
from train.verify.compare import Bounds, Comparison, Row, Values, table
from train.verify.trajectories import (
    STEPS,
    Step,
    decided_weights,
    expected_steps,
    make_batches,
    plain_steps,
    rate,
    uneven_load,
)

BOUND_FP64, BOUND_FP32, BF16_STEP = 1e-10, 1e-5, 2**-8
BOUND_FROZEN = 1e-12  # a single bit is more
ADAPTER = "adapter_model.safetensors"
LEAST_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # of routers' logits: what lies closer, rounding may decide
ATTEMPTS = 20
NO_GRADIENT = 1e-12  # norm of what is zero but for the rounding of fp64


def shrink(config: Config) -> None:
    """Turns a recipe into its proof: SGD, clipping and decay at work, nothing random, small unless `verify.full`."""
    model = config.model
    model.init_from = None  # weights are drawn: routers that are decided and unequal
    model.attention_dropout = model.router_jitter_noise = config.lora.dropout = 0.0
    config.lora.init_from, config.lora.format = None, "portable"
    config.data.format = "auto"  # of a classifier, the decoder is proved, under a language model's head and loss
    if config.parallel.dispatch == "deepspeed_capacity":
        config.parallel.capacity_factor = None  # what is dropped, one process would not have dropped
    config.optim.name, config.optim.weight_decay, config.optim.max_grad_norm = "sgd", 0.01, 0.1
    config.optim.moments = "fp32"  # of which that keeps none
    if config.verify.full:
        return
    shared = model.num_attention_heads // model.num_key_value_heads
    model.num_attention_heads, model.num_key_value_heads = 4, {1: 4, 2: 2, 4: 1}.get(min(shared, 4), 2)
    config.parallel.persistent_elements = 0  # a small model's weights come and go as a large one's do
    model.hidden_size = max(64, -(-model.num_local_experts // 8) * 8)  # a feature for each expert
    model.intermediate_size, model.head_dim = 48, None
    model.num_hidden_layers, model.vocab_size = _fewest_layers(config), 128
    config.data.sequence_length, config.train.micro_batch_size = 48, min(config.train.micro_batch_size, 2)
    model.sliding_window = None if model.sliding_window is None else 8


def _fewest_layers(config: Config) -> int:
    """Two, or as many more as `train.only` needs for each of its words to choose something."""
    most = config.model.num_hidden_layers
    for layers in range(min(most, 2), most):
        smaller = replace(config, model=replace(config.model, num_hidden_layers=layers))
        with contextlib.suppress(ConfigError):
            trained_names(smaller)
            return layers
    return most


class Verification:
    """A layout's steps beside the reference's.

    Args:
        engine: of the layout.
        config: shrunk.

    Attributes:
        comparison: what was found; on the main process.
    """

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine, self._config = engine, config
        self._model = model_config(config.model, None)
        self._coefficients = Coefficients.of(config)
        self._start: Values = {}
        self._expected = [Step(math.nan, math.nan, math.nan, {}, {})] * STEPS  # known to the main process alone
        self._seed = engine.on_main(self._find_seed)
        batches = make_batches(config, engine.world_size, self._seed)
        self._mine = [[micro_step[engine.rank] for micro_step in step] for step in batches]
        self._bounds = engine.on_main(lambda: self._find_bounds(batches))
        self.comparison = Comparison()

    def _weights(self, experts: range) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in decided_weights(self._config, self._model, self._seed, experts):
            yield name, tensor.to(self._engine.dtype) if tensor.is_floating_point() else tensor

    def _find_seed(self) -> int:
        """Takes the steps in the reference; with another seed where routing would hang on rounding."""
        first = self._config.run.seed
        least = LEAST_GAP[self._engine.dtype]
        for seed in range(first, first + ATTEMPTS):
            batches = make_batches(self._config, self._engine.world_size, seed)
            self._start, self._expected = expected_steps(self._config, self._model, batches, self._engine.dtype, seed)
            if max(step.grad_norm for step in self._expected) < NO_GRADIENT:
                raise ConfigError(f"nothing to compare: what is trained, {_trained(self._config)}, has no gradient")
            gap = min(step.gap for step in self._expected)
            if gap >= least:
                return seed
        raise NumericsError(
            f"of {ATTEMPTS} seeds none routes every token by more than {least} (the last by {gap:.1e}): "
            "rounding would decide, so nothing was compared; lower data.sequence_length or train.micro_batch_size"
        )

    def _find_bounds(self, batches: list[list[list[Batch]]]) -> Bounds:
        """Measures how far one process in the recipe's precision is off the reference; in fp32 the bound is fixed."""
        if self._engine.dtype is not torch.bfloat16:
            return Bounds(BOUND_FP32)
        model = trainable_model(self._config, self._model)
        for _ in fill(model, self._weights(range(self._model.num_local_experts)), torch.bfloat16):
            pass
        steps = plain_steps(self._config, model, batches, self._engine.device)
        unbounded, plain = Bounds(math.inf), Comparison()
        for number, (got, wanted) in enumerate(zip(steps, self._expected, strict=True), start=1):
            step = f"step {number}"
            for name in ("loss", "router_loss", "grad_norm"):
                plain.scalar(f"{step}/{name}", "number", getattr(got, name), getattr(wanted, name), unbounded)
            plain.pieces(f"{step} gradient", "", split(got.gradients), wanted.gradients, unbounded)
            plain.pieces(f"{step} update", "", split(got.masters), wanted.masters, unbounded, self._start)
        plain.pieces("export", "", split(rounded(steps[-1].masters)), rounded(self._expected[-1].masters), unbounded)
        worst: dict[str, float] = {}  # of alike parameters: each one's own error is chance, as is a single number's
        for row in plain.rows:
            worst[_alike(row)] = max(row.max_rel, worst.get(_alike(row), 0.0))
        least = {row.name: BF16_STEP / 2 if row.kind == "number" else 0.0 for row in plain.rows}
        return Bounds(BOUND_FP32, {row.name: max(worst[_alike(row)], least[row.name]) for row in plain.rows})

    def covered(self) -> dict[str, str]:
        """Says what the comparison is about, the attention behind each half of its rows, and what it leaves out."""
        parallel, terms = self._config.parallel, self._coefficients
        offloaded = [name for name in ("optimizer", "parameters") if getattr(parallel, f"offload_{name}")]
        return {
            "dispatch": parallel.dispatch,
            "overlap_degree": str(parallel.overlap_degree),
            "recompute": self._config.train.recompute,
            "offloaded": " and ".join(offloaded) or "nothing",
            "objective": f"{terms.scope}, router_aux_loss_coef {terms.router_loss:g}, z {terms.router_z_loss:g}",
            "left_out": "dropout, jitter, router bias, the routers' drift, dropped rows, the optimizer's moments, "
            "given weights, a classifier's head",
            "model": "full" if self._config.verify.full else "shrunk",
            "trained": _trained(self._config),
            "attention": str(self._model._attn_implementation),
            "attention_in_fp64": str(without_flash(self._model)._attn_implementation),
        }

    def prove(self) -> None:
        """Compares the mathematics of a step: dispatch, losses, gradients and their norm, in fp64.

        The load of the step before is one that is not even: from a uniform one, its scope would have no gradient.
        """
        proof = Proof(self._engine, trainable_model(self._config, without_flash(self._model)), self._weights)
        size = step_size(self._engine, self._mine[0])
        total = proof.step(self._mine[0], size, self._coefficients, uneven_load(self._model, self._engine.device))
        norm, pieces, bounds = proof.norm(), proof.gradients(), Bounds(BOUND_FP64)
        wanted, compare = self._expected[0], self.comparison
        compare.scalar("fp64/loss", "fp64 loss", total.cross_entropy.item(), wanted.loss, bounds)
        compare.scalar("fp64/router_loss", "fp64 loss", _router_loss(total, size.tokens), wanted.router_loss, bounds)
        compare.scalar("fp64/grad_norm", "fp64 norm", norm, wanted.grad_norm, bounds)
        compare.pieces("fp64 gradient", "fp64 gradient", pieces, wanted.gradients, bounds)

    def train(self) -> None:
        """Compares the engine's steps: losses, gradients, norm and masters."""
        engine, bounds, compare = self._engine, self._bounds, self.comparison
        engine.prepare(trainable_model(self._config, self._model), self._weights)
        load_LE = uneven_load(self._model, engine.device).float()
        for number, (micro_batches, wanted) in enumerate(zip(self._mine, self._expected, strict=True), start=1):
            parts, size = accumulate(engine, micro_batches, self._coefficients, load_LE)
            total = Parts.total(parts, engine.sum)
            load_LE = (total.statistics.counts_LE / size.tokens).float()
            step = f"step {number}"
            compare.scalar(f"{step}/loss", "loss", total.cross_entropy.item(), wanted.loss, bounds)
            router_loss = _router_loss(total, size.tokens)
            compare.scalar(f"{step}/router_loss", "router loss", router_loss, wanted.router_loss, bounds)
            compare.pieces(f"{step} gradient", "gradient", engine.pieces("gradients"), wanted.gradients, bounds)
            compare.scalar(
                f"{step}/grad_norm", "gradient norm", engine.step(rate(self._config)), wanted.grad_norm, bounds
            )
            masters = engine.pieces("masters")
            compare.pieces(f"{step} update", "update", masters, wanted.masters, bounds, start=self._start)

    def export(self, folder: Path | None) -> None:
        """Compares the files that an export writes, by the hub's names."""
        pieces = exported_pieces(self._engine, self._config)

        def write() -> None:
            assert folder is not None
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier proof
            try:
                with new_folder(folder) as partial:
                    write_pieces(partial, self._config, self._model, pieces, self._engine.dtype)
            finally:
                for _ in pieces:
                    pass

        if folder is None:
            for _ in pieces:
                pass
        self._engine.on_main(write)
        if folder is not None:
            least = BOUND_FP32 if self._engine.dtype is torch.float32 else BF16_STEP
            masters, bounds = self._expected[-1].masters, Bounds(least, self._bounds.plain)
            if self._config.lora.rank:
                exported, wanted = _adapter_by_hub_name(load_file(folder / ADAPTER), self._model), masters
            else:
                exported = _by_hub_name(_read_all(folder), self._model)
                wanted = self._start | masters
            self.comparison.pieces("export", "export", exported, rounded(wanted, self._engine.dtype), bounds)

    def frozen(self) -> None:
        """Compares what is not trained with what it was; the steps must have left its every bit."""
        trained = trained_parameters(trainable_model(self._config, self._model))
        pieces = (self._restored(piece) for piece in self._engine.pieces() if piece.name not in trained)
        start = {name: tensor for name, tensor in self._start.items() if name not in trained}
        self.comparison.pieces("frozen", "frozen", pieces, start, Bounds(BOUND_FROZEN))

    def _restored(self, piece: Piece) -> Piece:
        if piece.tensor is None:
            return piece
        return piece._replace(tensor=restored(piece.name, piece.tensor, self._model, self._engine.dtype))


def _trained(config: Config) -> str:
    lora = config.lora
    if lora.rank == 0:
        return config.train.only
    experts = " and the experts" if lora.experts else ""
    more = f"{', DoRA' if lora.dora else ''}{f', beside {lora.quantize} weights' if lora.quantize != 'none' else ''}"
    return f"adapters of rank {lora.rank} on {lora.targets or 'no layer'}{experts}{more}"


def _read_all(folder: Path) -> Values:
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def _alike(row: Row) -> str:
    """Names the group of a row: a number itself, or dense, router or expert parameters of a step."""
    return row.name if row.kind == "number" else row.name.split("/")[0] + row.kind


def without_flash(model: MixtralConfig) -> MixtralConfig:
    """The same model for fp64, which flash attention does not know."""
    if not str(model._attn_implementation).startswith("flash"):
        return model
    plain = copy.deepcopy(model)
    plain._attn_implementation = "sdpa"
    return plain


def rounded(masters: Values, dtype: torch.dtype = torch.bfloat16) -> Values:
    """Rounds masters as the weights are rounded."""
    return {name: master.to(dtype).double() for name, master in masters.items()}


def split(values: Values) -> Iterator[Piece]:
    """Takes stacked parameters apart, expert by expert."""
    for name, tensor in values.items():
        if is_stacked(name):
            yield from (Piece(name, expert, part) for expert, part in enumerate(tensor))
        else:
            yield Piece(name, None, tensor)


def _router_loss(total: Parts, tokens: Tensor) -> float:
    return load_balancing_loss(total.statistics.counts_LE, total.statistics.probability_LE, tokens).item()


def _by_hub_name(files: Values, model: MixtralConfig) -> Iterator[Piece]:
    """Reads the published names, as any other program would."""
    for name, tensor in files.items():
        if ".experts." not in name:
            yield Piece(name.replace("block_sparse_moe", "mlp"), None, tensor)
    for layer in range(model.num_hidden_layers):
        for expert in range(model.num_local_experts):
            on_disk = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            gate, down, up = (files[f"{on_disk}w{number}.weight"] for number in (1, 2, 3))
            in_memory = f"model.layers.{layer}.mlp.experts."
            yield Piece(f"{in_memory}gate_up_proj", expert, torch.cat([gate, up]))
            yield Piece(f"{in_memory}down_proj", expert, down)


def _adapter_by_hub_name(files: Values, model: MixtralConfig) -> Iterator[Piece]:
    """Reads an adapter by the names that PEFT gives it, a pair per matrix."""
    files = {name.removeprefix("base_model.model."): tensor for name, tensor in files.items()}
    for name, tensor in files.items():
        if ".experts." not in name:
            magnitude = ".weight" if name.endswith("lora_magnitude_vector") else ""
            yield Piece(name.replace("block_sparse_moe", "mlp") + magnitude, None, tensor)
    for layer, expert in itertools.product(range(model.num_hidden_layers), range(model.num_local_experts)):
        on_disk = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
        if f"{on_disk}w1.lora_A.weight" not in files:
            continue
        (gate_a, gate_b), (down_a, down_b), (up_a, up_b) = (
            [files[f"{on_disk}w{number}.lora_{side}.weight"] for side in "AB"] for number in (1, 2, 3)
        )
        in_memory = f"model.layers.{layer}.mlp.experts."
        yield Piece(f"{in_memory}gate_up_lora_A", expert, torch.where(gate_a == up_a, gate_a, math.nan))
        yield Piece(f"{in_memory}gate_up_lora_B", expert, torch.cat([gate_b, up_b]))
        yield Piece(f"{in_memory}down_lora_A", expert, down_a)
        yield Piece(f"{in_memory}down_lora_B", expert, down_b)


def verify(engine: Engine, folder: RunFolder | None, config: Config) -> str:
    """Compares a layout with one process, prints the table and writes `certificate.json`.

    Raises:
        NumericsError: on every process, when a row is out of its bound.
    """
    verification = Verification(engine, config)
    verification.prove()
    verification.train()
    verification.export(folder.path / "export" if folder else None)
    if config.lora.rank or config.train.only != "all":
        verification.frozen()
    rows = verification.comparison.rows

    def conclude() -> None:
        assert folder is not None
        ok = all(row.ok for row in rows)
        layout = {"processes": engine.world_size, "expert": config.parallel.expert, "zero": config.parallel.zero}
        layout["accumulation"] = config.train.gradient_accumulation_steps
        described = {"ok": ok, "layout": layout, "dtype": config.train.precision} | verification.covered()
        folder.write_json("certificate.json", described | {"rows": [asdict(row) for row in rows]})
        print(", ".join(f"{name} {value}" for name, value in layout.items()), config.train.precision, sep=", ")
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in verification.covered().items()))
        print(table(rows))
        if not ok:
            raise NumericsError("this layout does not train what one process would: see the rows that do not hold")
        print(f"verified: {len(rows)} comparisons hold, written to {folder.path / 'certificate.json'}")

    engine.on_main(conclude)
    return "verified"
