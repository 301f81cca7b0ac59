"""Held-out figures: the loss, and how good a classifier is."""

import math

import torch

from train.config import Config
from train.data.labelled import LabelledBatch
from train.data.loader import Data
from train.data.share import Share
from train.errors import NumericsError
from train.metrics import ClassifierSums
from train.objective import predict
from train.parallel.engine import Engine


@torch.no_grad()
def evaluate(engine: Engine, config: Config, data: Data) -> dict[str, float]:
    """Computes the loss over all held-out rows, each counted once over all processes.

    Returns:
        `eval_loss`, the token-mean cross-entropy in nats, and `eval_perplexity`, its exponential; of a classifier, the
        mean over rows and what `ClassifierSums.figures` says.

    Raises:
        NumericsError: when the loss is not finite, on every process.
    """
    size = config.evaluate.micro_batch_size or config.train.micro_batch_size
    module = engine.module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    sums = None if data.labels is None else ClassifierSums(data.labels, engine.device)
    for batch in data.evaluation(Share(engine.rank, engine.world_size, size)):
        batch = engine.place(batch)
        output = predict(module, batch, divisor=1)
        assert output.loss is not None
        if isinstance(batch, LabelledBatch):
            assert sums is not None
            sums.add(output.loss, output.logits, batch)
        else:
            total += torch.stack([output.loss.double(), batch.trained])
    if sums is not None:
        figures = sums.figures(engine.sum)
    else:
        cross_entropy, tokens = engine.sum(total).tolist()
        loss = cross_entropy / max(1.0, tokens)
        figures = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
    if not math.isfinite(figures["eval_loss"]):
        raise NumericsError(
            f"the held-out loss is {figures['eval_loss']}: nothing is exported; lower optim.lr or look at the data"
        )
    return figures
