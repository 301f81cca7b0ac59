"""The training loop: `train` and `train_step`."""

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mixtral.losses import load_balancing_loss
from train.balance import Balance
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.preemption import Preemption
from train.config import Config
from train.data.labelled import AnyBatch
from train.data.loader import Data
from train.data.prefetch import Prefetch
from train.data.share import Share
from train.drift import Drift
from train.errors import NumericsError, Preempted
from train.evaluate.evaluations import Evaluations
from train.failures import Failures
from train.guard import Guard, Skip
from train.objective import Coefficients, Parts, StepSize, objective_parts, predict
from train.observe.observer import Observer
from train.optim import learning_rate
from train.parallel.engine import Engine
from train.parallel.exchange import Traffic
from train.parallel.replicas import Replicas
from train.rewind import Rewind

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, summed over processes.

    Attributes:
        parts: of the step's values.
        tokens: that are no padding.
        traffic: of rows between processes.
        grad_norm: before clipping; None of a step that was skipped.
        skip: why it was.
    """

    parts: Parts
    tokens: int
    traffic: Traffic
    grad_norm: float | None
    skip: Skip | None

    @property
    def load(self) -> Tensor | None:
        """Routed rows per token of each expert: (L, E); None of a step that was skipped."""
        return None if self.skip else (self.parts.statistics.counts_LE / max(1, self.tokens)).float()

    def figures(self) -> dict[str, object]:
        """The step's figures under their names in metrics.jsonl; none of a step that was skipped."""
        if self.skip:
            return {}
        statistics = self.parts.statistics
        counts_LE = statistics.counts_LE
        routed, taken, crossing = self.traffic
        drift = self.parts.router_drift
        return {
            "loss": self.parts.cross_entropy.item(),
            "router_loss": load_balancing_loss(counts_LE, statistics.probability_LE, self.tokens).item(),
            "router_objective": self.parts.router_objective.item(),
            "router_z_loss": self.parts.router_z_loss.item(),
            **({} if drift is None else {"router_drift_loss": drift.item()}),
            "grad_norm": self.grad_norm,
            "expert_load": (counts_LE / counts_LE.sum(dim=-1, keepdim=True).clamp(min=1)).tolist(),
            "dropped_fraction": 1 - taken / routed if routed else 0.0,
            "cross_rank_fraction": crossing / routed if routed else 0.0,
            "router_entropy": (statistics.entropy_L / max(1, self.tokens)).tolist(),
        }


def train(
    engine: Engine,
    config: Config,
    data: Data,
    max_steps: int,
    observer: Observer,
    checkpoints: Checkpoints,
    evaluations: Evaluations,
) -> None:
    """Trains, evaluating before the first step, every `evaluate.every` steps and after the last.

    Goes on from the step that was restored, and ends before `max_steps` where patience does.

    Raises:
        Preempted, RewoundError: on every process, once a SIGTERM was met by a checkpoint, or a spike sends it back.
        NumericsError: on every process, once too many steps in a row were skipped, or when what several processes hold
            alike is not.
    """
    share = Share.of(config.train, engine.rank, engine.world_size)
    coefficients = Coefficients.of(config)
    balance = Balance(engine.module, config.train.router_bias_rate, engine.device)
    replicas = Replicas(engine, config.train.check_replicas_every, checkpoints.step)
    guard = Guard(config.train, replicas)
    failures = Failures(engine, config, data, share, observer, guard, rewind := Rewind(engine, config, checkpoints))
    checkpoints.carry(router=balance, figures=observer, guard=guard, rewind=rewind, **evaluations.parts())
    checkpoints.seed(config.run.seed + 1)  # dropout differs between processes
    prefetch = Prefetch(data.steps(share, checkpoints.step + rewind.left_out))
    with contextlib.closing(prefetch) as steps, Preemption(engine, enabled=checkpoints.enabled) as preemption:
        ending = evaluate_first(checkpoints.step, max_steps, observer, evaluations)
        for step in range(checkpoints.step + 1, max_steps + 1):
            if ending:
                break
            started = time.perf_counter()
            is_read_up_to = data.rows is None and step == checkpoints.step + 1  # a stream, which may take long
            micro_batches, waited = next_batches(engine, steps, step, limited=not is_read_up_to)
            lr = learning_rate(step, max_steps, config.optim.lr, config.schedule)
            result = train_step(engine, micro_batches, lr, coefficients, balance.load_LE, guard, evaluations.drift)
            balance.follow(result.load, steps_left=max_steps - step)
            observer.count(result.tokens, seconds=time.perf_counter() - started, waited=waited)
            failure = failures.report(step, result.skip, micro_batches, lr)
            stopping = preemption.agreed()
            evaluating = failure is None and evaluations.are_due(step, last=step == max_steps)
            if evaluating or result.skip or guard.alarm or step % config.train.log_every == 0 or step == 1:
                figures = {**result.figures(), "lr": lr, **guard.figures(), **observer.speed(engine)}
                if evaluating and stopping:
                    observer.postpone(step, figures)
                else:
                    evaluated = evaluations.figures() if evaluating else {}
                    observer.log(step, figures | evaluated)
                    ending = bool(evaluated) and evaluations.hear(step, evaluated)
            if failure is not None:
                raise failure
            ending |= step == max_steps
            if stopping or checkpoints.is_due(step, last=ending):
                replicas.compare()
                checkpoints.save(step, wait=stopping or ending)
            else:
                checkpoints.poll()
            if stopping:
                raise Preempted(f"stopped by SIGTERM after step {step}, which is saved", signal.SIGTERM)


def next_batches(engine: Engine, steps: Iterator[T], step: int, *, limited: bool) -> tuple[T, float]:
    """Takes this process's micro-batches of a step; says how many seconds it waited for them."""
    engine.watchdog.enter("waiting for data", step, limited=limited)
    started = time.perf_counter()
    micro_batches = next(steps)
    waited = time.perf_counter() - started
    engine.watchdog.enter("a training step")
    return micro_batches, waited


def evaluate_first(step: int, max_steps: int, observer: Observer, evaluations: Evaluations) -> bool:
    """Evaluates what the run begins with, or the step it left to be evaluated; says whether it is over already.

    That is a step before which it was told to stop, or one that is its last only now.
    """
    evaluations.engine.watchdog.enter("an evaluation", step)
    if step == 0:
        observer.log(0, evaluations.figures())
    elif observer.postponed:
        observer.log_postponed(evaluated := evaluations.figures())
        evaluations.hear(step, evaluated)
    elif step >= max_steps and observer.evaluated < step:
        observer.log(step, evaluated := evaluations.figures())
        evaluations.hear(step, evaluated)
    return evaluations.are_over()


def train_step(
    engine: Engine,
    micro_batches: Sequence[AnyBatch],
    lr: float,
    coefficients: Coefficients,
    load_LE: Tensor,
    guard: Guard,
    drift: Drift | None = None,
) -> StepResult:
    """Takes one optimizer step over this process's micro-batches, or skips it on every process.

    Args:
        engine: holds model and optimizer.
        micro_batches: as many on every process.
        lr: learning rate of this step.
        coefficients: of the objective.
        load_LE: of the step before.
        guard: which judges whether it is taken.
        drift: of the routers, where it is held down.

    Raises:
        NumericsError: see `Replicas.compare`.
    """
    parts, size = accumulate(engine, micro_batches, coefficients, load_LE, drift)
    traffic, faults = exchange(engine, torch.stack([part.loss(coefficients) for part in parts]))
    total = Parts.total(parts, engine.sum)
    loss = total.cross_entropy.item()
    skip, grad_norm = guard.judge(loss, faults), None
    if skip is None:
        try:
            grad_norm = engine.step(lr)
        except NumericsError:  # only the engine's own reductions told
            skip = Skip("the gradient norm is not finite", tuple(range(engine.world_size)))
    else:
        engine.discard()
    guard.count(loss, skip)
    return StepResult(total, int(size.tokens), traffic, grad_norm, skip)


def exchange(engine: Engine, losses: Tensor) -> tuple[Traffic, list[list[float]]]:
    """Adds up the traffic of a step, and tells every process what is not finite on which; see `Guard.judge`."""
    traffic = torch.tensor(engine.traffic(), dtype=torch.float64, device=engine.device)
    faults = torch.zeros(engine.world_size, 3, dtype=torch.float64, device=engine.device)
    faults[engine.rank, 0] = ~losses.isfinite().all()
    faults[engine.rank, 1:] = engine.faults()
    figures = engine.sum(torch.cat([traffic, faults.flatten()])).tolist()
    return Traffic(*figures[:3]), [figures[start : start + 3] for start in range(3, len(figures), 3)]


def accumulate(
    engine: Engine,
    micro_batches: Sequence[AnyBatch],
    coefficients: Coefficients,
    load_LE: Tensor,
    drift: Drift | None = None,
) -> tuple[list[Parts], StepSize]:
    """Computes the gradient of a step; returns this process's shares of its values, and its size."""
    engine.model.train()
    size = step_size(engine, micro_batches)
    done: list[Parts] = []
    for index, batch in enumerate(micro_batches):
        batch, last = engine.place(batch), index == len(micro_batches) - 1
        with engine.one_pass(last=last):
            output = predict(engine.model, batch, size.trained_tokens, routing=True)
            base_logits = drift.base_logits() if drift else None
            parts = objective_parts(output, batch, size, engine.sum, coefficients, load_LE, base_logits)
            engine.backward(parts.loss(coefficients), last=last)
        done.append(parts.detached())
    return done, size


def step_size(engine: Engine, micro_batches: Sequence[AnyBatch]) -> StepSize:
    """Counts the tokens of a step, and what of it is trained, over all processes."""
    counts = torch.tensor(
        [
            sum(int(batch.token_mask.sum()) for batch in micro_batches),
            sum(int(batch.trained) for batch in micro_batches),
        ],
        device=engine.device,
    )
    tokens, trained = engine.sum(counts).clamp(min=1)
    return StepSize(tokens, trained, parts=engine.world_size * len(micro_batches))
