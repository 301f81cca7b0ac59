"""Held-out figures: the loss, of each source too, how good a classifier is, and what becomes of prompts."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from train.config import Config
from train.data.labelled import AnyBatch, LabelledBatch
from train.data.loader import Data
from train.data.share import Share
from train.errors import NumericsError
from train.evaluate.classifier import ClassifierSums
from train.evaluate.prompts import Prompts
from train.objective import predict
from train.parallel.engine import Engine


@torch.no_grad()
def evaluate(engine: Engine, config: Config, data: Data, prompts: Prompts | None = None) -> dict[str, float]:
    """Computes the loss over all held-out rows, each counted once over all processes.

    Args:
        engine: holds the model.
        config: of the run.
        data: whose held-out rows are taken.
        prompts: that are answered besides.

    Returns:
        `eval_loss`, the token-mean cross-entropy in nats, and `eval_perplexity`, its exponential, both also of each
        source as `eval_loss/NAME` where there are several; of a classifier, the mean over rows and what
        `ClassifierSums.figures` says. With prompts, what `Prompts.figures` says.

    Raises:
        NumericsError: when the loss is not finite, on every process.
    """
    size = config.evaluate.micro_batch_size or config.train.micro_batch_size
    engine.module.eval()
    share = Share(engine.rank, engine.world_size, size)
    figures = (_token_figures if data.labels is None else _row_figures)(engine, data, share)
    if not math.isfinite(figures["eval_loss"]):
        raise NumericsError(
            f"the held-out loss is {figures['eval_loss']}: nothing is exported; lower optim.lr or look at the data"
        )
    return figures | (prompts.figures(engine, size) if prompts else {})


def _losses(engine: Engine, batches: Iterator[AnyBatch]) -> Iterator[tuple[AnyBatch, Tensor, Tensor | None]]:
    """Yields batches, the sum of their losses, and a classifier's logits."""
    for batch in batches:
        placed = engine.place(batch)
        output = predict(engine.module, placed, divisor=1)
        assert output.loss is not None
        yield placed, output.loss, output.logits


def _token_figures(engine: Engine, data: Data, share: Share) -> dict[str, float]:
    names = list(data.held_out_sources)
    totals = torch.zeros(len(names), 2, dtype=torch.float64, device=engine.device)
    for number, rows in enumerate(data.held_out_sources.values()):
        for batch, loss, _ in _losses(engine, data.evaluation(share, rows)):
            totals[number] += torch.stack([loss.double(), batch.trained])
    totals = engine.sum(totals)
    figures = _mean(*totals.sum(dim=0).tolist())
    if len(names) > 1:
        for name, total in zip(names, totals.tolist(), strict=True):
            figures |= {f"{figure}/{name}": value for figure, value in _mean(*total).items()}
    return figures


def _mean(cross_entropy: float, tokens: float) -> dict[str, float]:
    loss = cross_entropy / max(1.0, tokens)
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}


def _row_figures(engine: Engine, data: Data, share: Share) -> dict[str, float]:
    assert data.labels is not None
    sums = ClassifierSums(data.labels, engine.device)
    for batch, loss, logits in _losses(engine, data.evaluation(share)):
        assert isinstance(batch, LabelledBatch)
        assert logits is not None
        sums.add(loss, logits, batch)
    return sums.figures(engine.sum)
