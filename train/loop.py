"""The training loop: `train` and `train_step`."""

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtral.losses import load_balancing_loss
from train.balance import Balance
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.preemption import Preemption
from train.config import Config
from train.data.labelled import AnyBatch
from train.data.loader import Data, Prefetch
from train.data.share import Share
from train.errors import Preempted
from train.evaluate.evaluations import Evaluations
from train.objective import Coefficients, Parts, StepSize, objective_parts, predict
from train.observe.observer import Observer
from train.optim import learning_rate
from train.parallel.engine import Engine
from train.parallel.exchange import Traffic


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, summed over processes."""

    parts: Parts
    tokens: int
    grad_norm: float
    traffic: Traffic

    @property
    def load(self) -> Tensor:
        """Routed rows per token of each expert: (L, E)."""
        return (self.parts.statistics.counts_LE / max(1, self.tokens)).float()

    def figures(self) -> dict[str, object]:
        """The step's figures under their names in metrics.jsonl."""
        statistics = self.parts.statistics
        counts_LE = statistics.counts_LE
        routed, taken, crossing = self.traffic
        return {
            "loss": self.parts.cross_entropy.item(),
            "router_loss": load_balancing_loss(counts_LE, statistics.probability_LE, self.tokens).item(),
            "router_objective": self.parts.router_objective.item(),
            "router_z_loss": self.parts.router_z_loss.item(),
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
        Preempted: on every process, once a SIGTERM was met by a checkpoint.
    """
    share = Share(
        engine.rank, engine.world_size, config.train.micro_batch_size, config.train.gradient_accumulation_steps
    )
    coefficients = Coefficients.of(config)
    balance = Balance(engine.module, config.train.router_bias_rate, engine.device)
    checkpoints.carry("router", balance)
    checkpoints.carry("figures", observer)
    checkpoints.carry("best", evaluations.best)
    checkpoints.seed(config.run.seed + 1)  # dropout differs between processes
    prefetch = Prefetch(data.steps(share, checkpoints.step))
    with contextlib.closing(prefetch) as steps, Preemption(engine, enabled=checkpoints.enabled) as preemption:
        if checkpoints.step == 0:
            observer.log(0, evaluations.figures())
        elif observer.postponed:
            observer.log_postponed(evaluated := evaluations.figures())
            evaluations.hear(checkpoints.step, evaluated)
        ending = evaluations.are_over()
        for step in range(checkpoints.step + 1, max_steps + 1):
            if ending:
                break
            started = time.perf_counter()
            micro_batches = next(steps)
            waited = time.perf_counter() - started
            lr = learning_rate(step, max_steps, config.optim.lr, config.schedule)
            result = train_step(engine, micro_batches, lr, coefficients, balance.load_LE)
            balance.follow(result.load, steps_left=max_steps - step)
            observer.count(result.tokens, seconds=time.perf_counter() - started, waited=waited)
            stopping = preemption.agreed()
            evaluating = step == max_steps or (config.evaluate.every and step % config.evaluate.every == 0)
            if evaluating or step % config.train.log_every == 0 or step == 1:
                figures = {**result.figures(), "lr": lr, **observer.speed(engine)}
                if evaluating and stopping:
                    observer.postpone(step, figures)
                else:
                    evaluated = evaluations.figures() if evaluating else {}
                    observer.log(step, figures | evaluated)
                    ending = bool(evaluated) and evaluations.hear(step, evaluated)
            ending |= step == max_steps
            if stopping or checkpoints.is_due(step, last=ending):
                checkpoints.save(step, wait=stopping or ending)
            else:
                checkpoints.poll()
            if stopping:
                raise Preempted(f"stopped by SIGTERM after step {step}, which is saved", signal.SIGTERM)


def train_step(
    engine: Engine, micro_batches: Sequence[AnyBatch], lr: float, coefficients: Coefficients, load_LE: Tensor
) -> StepResult:
    """Takes one optimizer step over this process's micro-batches.

    Args:
        engine: holds model and optimizer.
        micro_batches: as many on every process.
        lr: learning rate of this step.
        coefficients: of the objective.
        load_LE: of the step before.

    Raises:
        NumericsError: when the gradient is not finite; no weight has changed then.
    """
    parts, size = accumulate(engine, micro_batches, coefficients, load_LE)
    traffic = Traffic(*engine.sum(torch.tensor(engine.traffic(), dtype=torch.float64, device=engine.device)).tolist())
    return StepResult(Parts.total(parts, engine.sum), int(size.tokens), engine.step(lr), traffic)


def accumulate(
    engine: Engine, micro_batches: Sequence[AnyBatch], coefficients: Coefficients, load_LE: Tensor
) -> tuple[list[Parts], StepSize]:
    """Computes the gradient of a step; returns this process's shares of its values, and its size."""
    engine.model.train()
    size = step_size(engine, micro_batches)
    done: list[Parts] = []
    for index, batch in enumerate(micro_batches):
        batch = engine.place(batch)
        output = predict(engine.model, batch, size.trained_tokens, routing=True)
        parts = objective_parts(output, batch, size, engine.sum, coefficients, load_LE)
        engine.backward(parts.loss(coefficients), last=index == len(micro_batches) - 1)
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
