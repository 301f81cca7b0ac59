"""The same steps taken by the reference and by one process: what a layout is compared with."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixtral import MixtralConfig, MixtralForCausalLM
from mixtral.losses import load_balancing_loss
from mixtral.ops.cross_entropy import IGNORE_INDEX
from mixtral.weights.names import trained_parameters
from train.config import Config
from train.data.packing import Batch, Row, make_row, stack
from train.lora import adapter_of, trainable_model, with_adapters
from train.model import generator_of, initial_weights
from train.objective import Coefficients, Parts, StepSize, objective_parts, predict, uniform_load
from train.optim import MasterWeights
from train.parallel.engine import place
from train.quantize import restored
from train.verify.compare import Values
from train.verify.reference import adapted, objective

STEPS, B_BOUND = 2, 0.05
MARGIN, SPREAD = 6.0, 0.5  # of router logits: by how much a token's experts lead, and how far the others scatter


@dataclass
class Step:
    """What a step should come to: scalars and, by parameter name, gradients and the masters after it."""

    loss: float
    router_loss: float
    grad_norm: float
    gradients: Values
    masters: Values
    gap: float = math.inf


def rate(config: Config) -> float:
    """Gives the learning rate: updates that rounding cannot hide, nor routers magnify where adapters are small."""
    return 1.0 if config.lora.rank else 8.0


def make_batches(config: Config, processes: int, seed: int) -> list[list[list[Batch]]]:
    """Draws the batches of each step as `[step][micro-step][process]`: packed documents of unequal length.

    The last row of a step is padding alone, in the last step a whole batch; some labels are not trained.
    """
    draw = np.random.default_rng(seed)
    train, length = config.train, config.data.sequence_length

    def row(*, empty: bool) -> Row:
        pieces = []
        left = 0 if empty else length - int(draw.integers(0, length // 4))
        while left > 0:
            size = min(left, int(draw.integers(1, length)))
            ids = draw.integers(0, config.model.vocab_size, size + 1)
            pieces.append((ids[:-1], np.where(draw.random(size) < 0.1, IGNORE_INDEX, ids[1:])))
            left -= size
        return make_row(pieces, length)

    def batch(*, last: bool, alone: bool) -> Batch:
        return stack([row(empty=last and (index > 0 or alone)) for index in range(train.micro_batch_size)])

    return [
        [
            [
                batch(
                    last=micro == train.gradient_accumulation_steps - 1 and process == processes - 1,
                    alone=step == STEPS - 1 and processes > 1,
                )
                for process in range(processes)
            ]
            for micro in range(train.gradient_accumulation_steps)
        ]
        for step in range(STEPS)
    ]


def decided_weights(config: Config, model: MixtralConfig, seed: int, experts: range) -> Iterator[tuple[str, Tensor]]:
    """Draws weights whose routers are decided and unequal; no adapter's B is zero.

    Every token id has experts of its own, some chosen more often than others: a feature of its embedding for each, that
    outlasts the layers and that the routers look for. So rounding sends no token elsewhere, in bf16 neither, and a
    wrong scale, load or destination shows. Where every expert is chosen there is nothing to decide: features that all
    tokens share would make these alike, and what attention learns of their differences would be lost in rounding.
    """
    deviation, hidden, chosen = model.initializer_range, model.hidden_size, model.num_experts_per_tok
    feature = 40 * deviation**2 * hidden  # attention adds about deviation^2 x hidden to an element
    normed = feature / math.sqrt(chosen * feature**2 / hidden + deviation**2)
    popularity_E = torch.arange(1.0, model.num_local_experts + 1)
    experts_VK = popularity_E.expand(model.vocab_size, -1).multinomial(chosen, generator=generator_of(seed, "experts"))
    chooses = chosen < model.num_local_experts

    def base(experts: range) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in initial_weights(model, seed, experts):
            if name == "model.embed_tokens.weight" and chooses:
                tensor = tensor.scatter_add(1, experts_VK, torch.full(experts_VK.shape, feature))
            elif ".gate." in name:
                tensor = tensor * (SPREAD / deviation / math.sqrt(hidden))
                tensor.diagonal().add_(MARGIN / normed if chooses else 0.0)
            yield name, tensor

    return with_adapters(base, config, model, b_bound=B_BOUND)(experts)


def uneven_load(config: MixtralConfig, device: torch.device) -> Tensor:
    """A load of the step before that has something to balance, for the scope that looks at it; in fp64."""
    even_LE = uniform_load(config, device).double()
    return even_LE * torch.linspace(0.5, 1.5, even_LE.shape[1], dtype=torch.float64, device=device)


def expected_steps(
    config: Config, model: MixtralConfig, batches: list[list[list[Batch]]], dtype: torch.dtype, seed: int
) -> tuple[Values, list[Step]]:
    """Takes the steps in fp64, by `train.reference`; returns what they start from too, frozen weights included."""
    experts = range(model.num_local_experts)
    drawn = decided_weights(config, model, seed, experts)
    start = {name: restored(name, tensor, model, dtype).to(dtype).double() for name, tensor in drawn}
    trained, steps = trained_parameters(trainable_model(config, model)), []
    masters = {name: tensor for name, tensor in start.items() if name in trained}
    adapter, load_LE = adapter_of(config.lora), uneven_load(model, torch.device("cpu"))
    for micro_steps in batches:
        weights = {name: tensor.to(dtype).double().requires_grad_() for name, tensor in masters.items()}
        whole = adapted(start | weights, adapter.scale) if adapter else start | weights
        figures = objective(whole, model, micro_steps, Coefficients.of(config), load_LE)
        gradients = dict(zip(weights, torch.autograd.grad(figures.objective, list(weights.values())), strict=True))
        masters, norm = descend(masters, gradients, config)
        load_LE = figures.load_LE
        steps.append(Step(figures.loss.item(), figures.router_loss.item(), norm, gradients, masters, figures.gap))
    return start, steps


def descend(masters: Values, gradients: Values, config: Config) -> tuple[Values, float]:
    """Takes a clipped step of gradient descent, matrices decaying; returns the new masters and the gradient's norm."""
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    limit = config.optim.max_grad_norm
    scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    decay = {name: config.optim.weight_decay if master.dim() > 1 else 0.0 for name, master in masters.items()}
    return {
        name: master - rate(config) * (scale * gradients[name] + decay[name] * master)
        for name, master in masters.items()
    }, norm


def plain_steps(
    config: Config, model: MixtralForCausalLM, batches: list[list[list[Batch]]], device: torch.device
) -> list[Step]:
    """Takes the steps in one process, in the model's own precision and kernels: the rounding that precision costs."""
    masters = MasterWeights(model.to(device).train())
    load_LE, found = uneven_load(model.config, device).float(), []
    for micro_steps in batches:
        total, tokens = _accumulate(config, model, masters, micro_steps, load_LE)
        statistics = total.statistics
        load_LE = (statistics.counts_LE / tokens).float()
        before = {name: master.detach().cpu().double() for name, master in masters.by_name.items()}
        gradients = {
            name: torch.zeros_like(before[name]) if master.grad is None else master.grad.cpu().double()
            for name, master in masters.by_name.items()
        }
        after, norm = descend(before, gradients, config)
        with torch.no_grad():
            for name, master in masters.by_name.items():
                master.copy_(after[name])
                master.grad = None
        masters.publish()
        router_loss = load_balancing_loss(statistics.counts_LE, statistics.probability_LE, tokens).item()
        found.append(Step(total.cross_entropy.item(), router_loss, norm, gradients, after))
    return found


def _accumulate(
    config: Config,
    model: MixtralForCausalLM,
    masters: MasterWeights,
    micro_steps: list[list[Batch]],
    load_LE: Tensor,
) -> tuple[Parts, int]:
    """Adds up the gradient of a step in the masters; returns its values and its tokens."""
    everything = [batch for micro_step in micro_steps for batch in micro_step]
    tokens = torch.stack([batch.token_mask.sum() for batch in everything]).sum()
    trained = torch.stack([(batch.shifted_labels != IGNORE_INDEX).sum() for batch in everything]).sum()
    size = StepSize(tokens.to(load_LE.device), trained.to(load_LE.device), parts=len(everything))
    coefficients, done = Coefficients.of(config), []
    for micro_step in micro_steps:
        joined = [Batch(*map(torch.cat, zip(*micro_step, strict=True)))]
        for batch in micro_step if coefficients.scope == "huggingface" else joined:
            placed = place(batch, model.config, load_LE.device)
            output = predict(model, placed, size.trained_tokens, routing=True)
            parts = objective_parts(output, placed, size, lambda tensor: tensor, coefficients, load_LE)
            parts.loss(coefficients).backward()
            masters.collect_gradients()
            done.append(parts.detached())
    return Parts.total(done, lambda tensor: tensor), int(tokens)
