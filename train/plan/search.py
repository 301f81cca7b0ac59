"""Looks for layouts: the fastest that fit, what would make one fit, and the fewest devices on which any does."""

import dataclasses
from collections.abc import Iterator

from train.config import Config, check, may_round
from train.errors import ConfigError
from train.plan.figures import Figures, figures_of
from train.plan.hardware import Device
from train.plan.layout import Layout
from train.plan.load import Skews, skews_of

RANK = 16
"""Of the adapters that are tried where a recipe trains whole weights."""
SHORT = 256
"""Tokens of the shortest row that is tried."""
MOST = 4096
"""Devices that are tried at most."""


def rows_of_each(config: Config, processes: int) -> int:
    """Rows of a step that each of so many processes takes so that all take what `plan.gpus` of them would, or about."""
    train = config.train
    return max(1, round(train.micro_batch_size * train.gradient_accumulation_steps * config.plan.gpus / processes))


def candidates(config: Config, processes: int) -> Iterator[Config]:
    """Yields every layout that trains what a configuration trains, on so many processes.

    Together they take as many rows a step as a configuration's `plan.gpus` do, where these divide by the processes.
    """
    for recompute in ("none", "layers"):
        yield from _layouts(
            dataclasses.replace(config, train=dataclasses.replace(config.train, recompute=recompute)), processes
        )


def _layouts(config: Config, processes: int) -> Iterator[Config]:
    train, parallel = config.train, config.parallel
    rows = rows_of_each(config, processes)
    experts = config.model.num_local_experts
    for expert in (n for n in range(1, experts + 1) if experts % n == 0 == processes % n):
        for zero in range(0 if expert == 1 else 1, 4):
            for micro in (n for n in range(1, rows + 1) if rows % n == 0):
                for offload, parameters in ((False, False), (True, False), (True, True)):
                    if (offload and zero == 0) or (parameters and zero < 3):
                        continue
                    changed = dataclasses.replace(
                        parallel,
                        expert=expert,
                        overlap_degree=parallel.overlap_degree if expert > 1 else 1,
                        zero=zero,
                        offload_optimizer=offload,
                        offload_parameters=parameters,
                    )
                    steps = dataclasses.replace(
                        train, micro_batch_size=micro, gradient_accumulation_steps=rows // micro
                    )
                    found = dataclasses.replace(config, parallel=changed, train=steps)
                    if _can_be_trained(found):
                        yield found


def _can_be_trained(config: Config) -> bool:
    """Whether training would not refuse a configuration."""
    try:
        check(config)
    except ConfigError:
        return False
    return True


def best(config: Config, processes: int, device: Device, most: int = 5) -> list[Figures]:
    """Returns the layouts that fit, the fastest first; of several alike, that with the simplest engine."""
    skews: dict[int, Skews] = {}
    found = []
    for candidate in candidates(config, processes):
        ranks = candidate.parallel.expert
        if ranks not in skews:
            skews[ranks] = skews_of(config, ranks)
        figures = figures_of(Layout(candidate, processes, device.is_gpu), device, skews[ranks])
        if figures.fits:
            found.append(figures)
    return sorted(found, key=lambda figures: -figures.step.tokens_per_second)[:most]


def smallest(config: Config, device: Device) -> Figures | None:
    """Returns the fastest layout on the fewest devices, of powers of two, on which any fits and is not tight."""
    processes = 1
    while processes <= MOST:
        if found := [figures for figures in best(config, processes, device, most=MOST) if not figures.is_tight]:
            return found[0]
        processes *= 2
    return None


def with_adapters(config: Config) -> Config:
    """Returns the same configuration, training adapters in place of the weights."""
    train = dataclasses.replace(config.train, only="all")
    return dataclasses.replace(config, train=train, lora=dataclasses.replace(config.lora, rank=RANK))


def changes(figures: Figures) -> list[tuple[str, Figures]]:
    """Lists single changes that make a layout fit, the least of each kind, with what it then comes to."""
    layout = figures.layout
    found: dict[str, tuple[str, Figures]] = {}
    for words, config, processes in _single_changes(layout):
        if not _can_be_trained(config):
            continue
        changed = figures_of(Layout(config, processes, layout.on_gpu), figures.device)
        if changed.fits:
            found.setdefault(words.partition("=")[0], (words, changed))
    return list(found.values())


def _single_changes(layout: Layout) -> Iterator[tuple[str, Config, int]]:
    config, processes = layout.config, layout.processes
    parallel, train = config.parallel, config.train

    def with_parallel(**values: object) -> Config:
        return dataclasses.replace(config, parallel=dataclasses.replace(parallel, **values))  # type: ignore[arg-type]

    for zero in range(max(1, parallel.zero + 1), 4):
        yield f"parallel.zero={zero}", with_parallel(zero=zero), processes
    for ranks in range(parallel.expert + 1, config.model.num_local_experts + 1):
        if config.model.num_local_experts % ranks == 0 == processes % ranks:
            zero = max(1, parallel.zero)
            extra = f" parallel.zero={zero}" if zero != parallel.zero else ""
            yield f"parallel.expert={ranks}{extra}", with_parallel(expert=ranks, zero=zero), processes
    if train.micro_batch_size % 2 == 0:
        micro, steps = train.micro_batch_size // 2, train.gradient_accumulation_steps * 2
        halved = dataclasses.replace(train, micro_batch_size=micro, gradient_accumulation_steps=steps)
        words = f"train.micro_batch_size={micro} train.gradient_accumulation_steps={steps}"
        yield words, dataclasses.replace(config, train=halved), processes
    if train.recompute == "none":
        again = dataclasses.replace(train, recompute="layers")
        yield "train.recompute=layers", dataclasses.replace(config, train=again), processes
    if parallel.zero > 0 and not parallel.offload_optimizer:
        yield "parallel.offload_optimizer=true", with_parallel(offload_optimizer=True), processes
    if config.optim.moments == "fp32" and may_round(config.optim):
        rounded = dataclasses.replace(config.optim, moments="bf16")
        yield "optim.moments=bf16", dataclasses.replace(config, optim=rounded), processes
    if config.lora.rank == 0 and config.model.init_from is not None:  # or there is nothing to adapt
        yield f"lora.rank={RANK}", with_adapters(config), processes
    length = config.data.sequence_length // 2
    while length >= SHORT:
        data = dataclasses.replace(config.data, sequence_length=length)
        yield f"data.sequence_length={length}", dataclasses.replace(config, data=data), processes
        length //= 2
    more = processes * 2
    while more <= min(MOST, 64 * processes):
        steps, rest = divmod(processes * train.gradient_accumulation_steps, more)
        if more % config.parallel.expert == 0:
            fewer = dataclasses.replace(train, gradient_accumulation_steps=steps) if rest == 0 else train
            extra = f" train.gradient_accumulation_steps={steps}" if rest == 0 else ""
            yield f"plan.gpus={more}{extra}", dataclasses.replace(config, train=fewer), more
        more *= 2
