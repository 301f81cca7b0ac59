"""One process of two whose gradients ZeRO-1 reduces in bf16: in place, and as DeepSpeed would have done it."""

import torch
import torch.distributed as dist

from mixtral.losses import shift_labels
from tests.train.helpers import SMALL
from train.compose import compose
from train.model import empty_model, model_config, starting_weights
from train.parallel.layout import open_engine


def main() -> None:
    config = compose([*SMALL, "train.precision=bf16", "parallel.expert=2", "parallel.zero=1"]).config
    engine = open_engine(config)
    model = empty_model(model_config(config.model, None))
    engine.prepare(model, starting_weights(config, model.config))
    optimizer = engine.model.optimizer
    found = []
    for ours in (True, False):
        if not ours:
            del engine.model.allreduce_and_copy, optimizer._update_hp_grad  # which hid DeepSpeed's own
        joined = note_joined(engine.model)
        for micro_step in range(2):
            generator = torch.Generator().manual_seed(engine.rank + 2 * micro_step)
            ids = torch.randint(0, config.model.vocab_size, (2, 16), generator=generator)
            loss = engine.model(input_ids=ids, shifted_labels=shift_labels(ids), skip_logits=True).loss
            engine.backward(loss, last=micro_step == 1)
        found.append([flat.clone() for flat in optimizer.fp32_groups_gradients_flat])
        assert any(joined) != ours, "ours joins no tensors, and DeepSpeed's own some"
        optimizer.zero_grad()
    for mine, other in zip(*found, strict=True):
        assert mine.abs().sum() > 0
        assert torch.equal(mine, other)
    if engine.rank == 0:
        print("held")
    dist.destroy_process_group()


def note_joined(engine) -> list[bool]:
    """Notes of every flattening whether it joined several tensors."""
    joined: list[bool] = []
    flatten = engine.flatten

    def noting(tensors):
        joined.append(len(tensors) > 1)
        return flatten(tensors)

    engine.flatten = noting
    return joined


if __name__ == "__main__":
    main()
