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
    scale = 2 if precision == "fp32" else 1  # DistributedDataParallel averages, so the engine's losses are scaled up
    collected, under_way = engine._collected, []
    engine.module.model.embed_tokens.weight.register_post_accumulate_grad_hook(
        lambda _: under_way.append(0 if collected is None else len(collected._under_way))
    )
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for number in range(PASSES):
        ids = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(engine.rank + 2 * number))
        inputs = {"input_ids": ids, "shifted_labels": shift_labels(ids), "skip_logits": True}
        own = torch.autograd.grad(scale * engine.module(**inputs).loss, parameters)
        for total, gradient in zip(sums, own, strict=True):
            total += gradient
        last = number == PASSES - 1
        with engine.one_pass(last=last):
            engine.backward(engine.model(**inputs).loss, last=last)
        if precision == "bf16":
            assert all(parameter.grad is None for parameter in parameters), "a gradient in bf16 is still there"
        for total in sums if last else ():
            dist.all_reduce(total)
            total /= scale
        for (name, found), expected in zip(engine.local("gradients"), sums, strict=True):
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7), f"{name} after pass {number}"
    # the embedding's gradient comes last of all: by then all others travel, in the last pass alone
    assert under_way == [0, 0, len(parameters) if precision == "bf16" else 0], under_way
    if engine.rank == 0:
        print("held")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
