"""Low-rank adapters on a frozen model: PEFT's on its linear layers, our own on experts and routers.

Shape letters: see `mixtral/modeling.py`; r is the rank.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixtral import MixtralConfig
from mixtral.moe import Experts, Router, SparseMoeBlock
from mixtral.ops.experts import LowRank, Projection
from mixtral.weights import WeightsError, names
from mixtral.weights.adapters import SCORE, Adapter, AdapterFolder, shapes
from mixtral.weights.read import WeightFolder
from train.config import Config, LoraConfig, trained_names, words_of
from train.data.hub import download
from train.data.labelled import Labels
from train.errors import CheckpointError
from train.inherit import scale_of
from train.model import empty_model, generator_of, head_of, model_config, starting_weights
from train.parallel.engine import DTYPES, Engine, Model, Weights, fill
from train.quantize import quantize, quantized

HUB_FILES = ["adapter_config.json", "adapter_model.safetensors"]


class AdaptedExperts(Experts):
    """Experts of which each adds to its projections what a pair of low-rank matrices of its own gives.

    Gate and up are one projection, with one A. The additions are computed on the routed rows: no W + BA is formed.

    Args:
        config: of the model.
        adapter: its rank and scale.
        dropout: share of the inputs that A does not see, in training.

    Source: arXiv 2106.09685.
    """

    def __init__(self, config: MixtralConfig, adapter: Adapter, dropout: float) -> None:
        super().__init__(config)
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_lora_A = nn.Parameter(torch.empty(experts, adapter.rank, hidden))
        self.gate_up_lora_B = nn.Parameter(torch.empty(experts, 2 * inner, adapter.rank))
        self.down_lora_A = nn.Parameter(torch.empty(experts, adapter.rank, inner))
        self.down_lora_B = nn.Parameter(torch.empty(experts, hidden, adapter.rank))
        self.scale, self.dropout = adapter.scale, dropout

    def projections(self) -> tuple[Projection, Projection]:
        dropout = self.dropout if self.training else 0.0
        gate_up = LowRank(self.gate_up_lora_A, self.gate_up_lora_B, self.scale, dropout)
        down = LowRank(self.down_lora_A, self.down_lora_B, self.scale, dropout)
        weights = self.matrices()
        return Projection(weights[0], gate_up), Projection(weights[1], down)


class AdaptedRouter(Router):
    """A router whose logits get a low-rank addition, in at least fp32 as they are.

    PEFT would form W + BA of it, and knows no dropout there. Arguments as of `AdaptedExperts`.
    """

    def __init__(self, config: MixtralConfig, adapter: Adapter, dropout: float) -> None:
        super().__init__(config)
        self.lora_A = _LinearOfInput(config.hidden_size, adapter.rank, bias=False)
        self.lora_B = _LinearOfInput(adapter.rank, config.num_local_experts, bias=False)
        self.scale, self.dropout = adapter.scale, dropout

    def logits(self, x_TH: Tensor) -> Tensor:
        seen_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
        if self.dropout:
            seen_TH = F.dropout(seen_TH, self.dropout, self.training)
        return super().logits(x_TH) + self.scale * self.lora_B(self.lora_A(seen_TH))


class _LinearOfInput(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def adapter_of(lora: LoraConfig) -> Adapter | None:
    """Reads from the configuration which adapter a run trains, if any."""
    if lora.rank == 0:
        return None
    return Adapter(lora.rank, scale_of(lora), words_of(lora.targets), lora.experts, lora.dora)


def trainable_model(config: Config, model: MixtralConfig) -> Model:
    """Builds a model without values, with the run's adapters, in which all is frozen that the run does not train.

    Raises:
        MachineError: when its frozen weights are to be quantized, and cannot be here.
    """
    module, adapter = empty_model(model), adapter_of(config.lora)
    if adapter is None:
        chosen = trained_names(config)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in chosen)
    else:
        adapt(module, adapter, config.lora.dropout)
    if config.train.recompute == "layers":
        # A layer computed to its end awaits all rows that it sent; or what NCCL has of them would be let go of late.
        stops = config.parallel.overlap_degree == 1
        options = {"use_reentrant": False, "early_stop": stops}
        module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    if config.lora.quantize == "nf4":
        quantize(module, DTYPES[config.train.precision])
    return module


def adapt(model: Model, adapter: Adapter, dropout: float = 0.0) -> None:
    """Puts an adapter into a model on the meta device, and freezes all else but a classifier's head."""
    linear = [target for target in adapter.targets if target != "gate"]
    if linear:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

        described = PeftConfig(
            r=adapter.rank,
            lora_alpha=adapter.scale * adapter.rank,  # type: ignore[arg-type]  # a real number is as good
            lora_dropout=dropout,
            target_modules=linear,
            use_dora=adapter.dora,
        )
        inject_adapter_in_model(described, model, low_cpu_mem_usage=True)
    for block in model.modules():
        if isinstance(block, SparseMoeBlock):
            with torch.device("meta"):
                if "gate" in adapter.targets:
                    block.gate = AdaptedRouter(model.config, adapter, dropout)
                if adapter.experts:
                    block.experts = AdaptedExperts(model.config, adapter, dropout)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name == SCORE)


def hold_model(
    engine: Engine, config: Config, tokenizer: PreTrainedTokenizerBase, labels: Labels | None = None
) -> None:
    """Gives an engine the model of a configuration, with its adapters, to be looked at and not trained.

    Raises:
        ConfigError, CheckpointError: when it cannot be used.
    """
    model = trainable_model(config, model_config(config.model, tokenizer, labels))
    engine.first_on_each_host(lambda: find_adapter(config.lora, model.config))
    engine.hold(model, with_adapters(starting_weights(config, model.config), config, model.config))


def with_adapters(base: Weights, config: Config, model: MixtralConfig, b_bound: float = 0.0) -> Weights:
    """Adds a run's adapters to the weights they adapt: new ones, or those that it goes on from.

    The weights are quantized where the run asks for that.

    Args:
        base: yields the weights alone.
        config: of the run.
        model: whose weights they are.
        b_bound: of the values of a new B; with 0 the adapted model begins as the given one.
    """
    adapter = adapter_of(config.lora)
    if adapter is None:
        return base
    if config.lora.quantize == "nf4":
        base = quantized(base)

    def both(experts: range) -> Iterator[tuple[str, Tensor]]:
        expected = shapes(model, adapter)
        source = None if config.lora.init_from is None else open_adapter(config.lora, model)
        for name, tensor in base(experts):
            if name == SCORE and source is not None and SCORE in source.shapes:
                tensor = source.tensor(name, experts)
            yield name, tensor
            magnitude = f"{name.removesuffix('.weight')}.lora_magnitude_vector.weight"
            if magnitude in expected and config.lora.init_from is None:
                yield magnitude, tensor.float().norm(dim=1)
        if source is None:
            yield from initial_adapters(model, adapter, config.run.seed, experts, b_bound)
        else:
            yield from ((name, source.tensor(name, experts)) for name in expected)

    return both


def initial_adapters(
    config: MixtralConfig, adapter: Adapter, seed: int, experts: range, b_bound: float = 0.0
) -> Iterator[tuple[str, Tensor]]:
    """Draws new adapters as PEFT does, A uniformly and B zero; like new weights, the same in every layout.

    Magnitudes are those of the weights, and not drawn.

    Args:
        config: of the model.
        adapter: what is drawn.
        seed: of the run.
        experts: those to draw.
        b_bound: B is drawn uniformly up to this value.
    """

    def draw(name: str, shape: tuple[int, ...], bound: float) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator_of(seed, name))

    for name, shape in shapes(config, adapter).items():
        bound = 1 / math.sqrt(shape[-1]) if "lora_A" in name else b_bound
        if names.is_stacked(name):
            yield name, torch.stack([draw(f"{name}/{expert}", shape[1:], bound) for expert in experts])
        elif "lora_magnitude" not in name:
            yield name, draw(name, shape, bound)


def find_adapter(lora: LoraConfig, model: MixtralConfig) -> None:
    """Fetches the adapter to go on from where it is on the hub, and checks the files that this host has.

    Raises:
        MachineError: when it is not to be had.
        CheckpointError: when it cannot be used.
    """
    if lora.init_from is None:
        return
    if not Path(lora.init_from).is_dir():
        lora.init_from = str(download(lora.init_from, HUB_FILES, "lora.init_from"))
    source = open_adapter(lora, model)
    try:
        for name, shape in source.shapes.items():
            source.tensor(name, range(shape[0]) if names.is_stacked(name) else [])
    except WeightsError as error:
        raise CheckpointError(f"lora.init_from={lora.init_from}: {error}") from None


def open_adapter(lora: LoraConfig, model: MixtralConfig) -> AdapterFolder:
    """Opens the adapter to go on from.

    Raises:
        CheckpointError: when it does not fit the model.
    """
    adapter = adapter_of(lora)
    assert lora.init_from is not None
    assert adapter is not None
    try:
        return AdapterFolder(lora.init_from, model, adapter)
    except WeightsError as error:
        raise CheckpointError(f"lora.init_from={lora.init_from}: {error}") from None


@torch.no_grad()
def logits_by_layer(
    folder: Path,
    lora: LoraConfig | None,
    ids: Tensor,
    described: MixtralConfig | None = None,
    score: Tensor | None = None,
) -> Tensor:
    """Runs a folder's weights, with or without an adapter, holding one layer of them at a time, in fp32.

    Args:
        folder: in the hub's layout.
        lora: an adapter in `init_from`, and what it says of itself.
        ids: (B, S) tokens; taken modulo the vocabulary.
        described: configuration of the model; by default the folder's.
        score: head of a classifier, where the folder has none or another.

    Returns:
        (B, S, V); of a classifier (B, labels), of the last token of each row.
    """
    source = WeightFolder(folder)
    described = described or source.config
    config = copy.deepcopy(described)
    config.num_hidden_layers, config._attn_implementation, config.tie_word_embeddings = 1, "sdpa", False
    adapter = None if lora is None else adapter_of(lora)
    experts = range(config.num_local_experts)

    def values(layer: int) -> Iterator[tuple[str, Tensor]]:
        there = f"layers.{layer}."
        for name in names.shapes(config, head_of(config)):
            if name == SCORE and score is not None:
                yield name, score
                continue
            stored = name.replace("layers.0.", there)
            if stored == "lm_head.weight" and source.config.tie_word_embeddings:
                stored = "model.embed_tokens.weight"
            yield name, source.tensor(stored, experts, torch.float32)
        if adapter is not None and lora is not None:
            adapters = open_adapter(lora, described)
            for name in shapes(config, adapter):
                yield name, adapters.tensor(name.replace("layers.0.", there), experts)

    entering: list[Tensor] = []  # the norm after each layer, which only the last one's output goes through
    for layer in range(source.config.num_hidden_layers):
        model = empty_model(config)
        if adapter is not None:
            adapt(model, adapter)
        for _ in fill(model, values(layer), torch.float32):
            pass
        model.model.norm.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
        hidden = entering[-1] if entering else model.model.embed_tokens(ids % config.vocab_size)
        output = model.eval()(inputs_embeds=hidden, use_cache=False)
    logits: Tensor = output.logits
    return logits
