"""Held-out loss."""

import math

import torch

from mixtral.ops.cross_entropy import IGNORE_INDEX
from train.config import Config
from train.data.loader import Data, Share
from train.errors import NumericsError
from train.objective import predict
from train.parallel.engine import Engine


@torch.no_grad()
def evaluate(engine: Engine, config: Config, data: Data) -> dict[str, float]:
    """Computes the token-mean cross-entropy over all held-out rows, each counted once over all processes.

    Returns:
        `eval_loss` in nats per token and `eval_perplexity`, its exponential.

    Raises:
        NumericsError: when the loss is not finite, on every process.
    """
    size = config.evaluate.micro_batch_size or config.train.micro_batch_size
    module = engine.module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in data.evaluation(Share(engine.rank, engine.world_size, size)):
        batch = engine.place(batch)
        loss_sum = predict(module, batch, divisor=1).loss
        assert loss_sum is not None
        total += torch.stack([loss_sum.double(), (batch.shifted_labels != IGNORE_INDEX).sum()])
    cross_entropy, tokens = engine.sum(total).tolist()
    loss = cross_entropy / max(1.0, tokens)
    if not math.isfinite(loss):
        raise NumericsError(f"the held-out loss is {loss}: nothing is exported; lower optim.lr or look at the data")
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
