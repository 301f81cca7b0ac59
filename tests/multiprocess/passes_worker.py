"""One process of two that replicate the model: what is in the gradient after each pass of a step, in a precision."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mixtral.losses import shift_labels
from tests.train.helpers import SMALL
from train.compose import compose
from train.model import empty_model, model_config, starting_weights
from train.parallel.layout import open_engine

PASSES = 3


def main(precision: str) -> None:
    config = compose([*SMALL, f"train.precision={precision}"]).config
    engine = open_engine(config)
    model = empty_model(model_config(config.model, None))
    engine.prepare(model, starting_weights(config, model.config))
    assert isinstance(engine.model, DistributedDataParallel) == (precision == "fp32")
    parameters = list(engine.module.parameters())
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for number in range(PASSES):
        ids = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(engine.rank + 2 * number))
        inputs = {"input_ids": ids, "shifted_labels": shift_labels(ids), "skip_logits": True}
        own = torch.autograd.grad(2 * engine.module(**inputs).loss, parameters)
        for total, gradient in zip(sums, own, strict=True):
            total += gradient
        last = number == PASSES - 1
        with engine.one_pass(last=last):
            engine.backward(engine.model(**inputs).loss, last=last)
        for total in sums if last else ():
            dist.all_reduce(total)
            total /= 2
        for (name, found), expected in zip(engine.local("gradients"), sums, strict=True):
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7), f"{name} after pass {number}"
    if engine.rank == 0:
        print("held")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
