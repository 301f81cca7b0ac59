"""Layers that are computed again in backward: the same figures, less memory."""

import torch
from torch.profiler import ProfilerActivity, profile

from tests.train.helpers import SMALL, metrics, run_small, write_corpus
from train.compose import compose
from train.lora import trainable_model
from train.model import initial_weights, model_config
from train.parallel.engine import fill


def test_figures_are_bit_for_bit_the_same(tmp_path):
    """Dropout drops the same again."""
    corpus, found = write_corpus(tmp_path / "corpus.jsonl"), []
    words = [f"data.path={corpus}", "train.max_steps=3", "model.router_jitter_noise=0.1"]
    words += ["model.attn_implementation=eager", "model.attention_dropout=0.2"]
    for recompute in ("none", "layers"):
        folder = tmp_path / recompute
        assert run_small(folder, *words, f"train.recompute={recompute}") == 0
        figures = ("loss", "router_loss", "grad_norm", "expert_load", "eval_loss")
        found.append([[row.get(name) for name in figures] for row in metrics(folder)])
    assert found[0] == found[1]


def kept_bytes(recompute):
    """Bytes that a forward pass allocates and keeps."""
    config = compose([*SMALL, "model.num_hidden_layers=4", f"train.recompute={recompute}"]).config
    model = trainable_model(config, shape := model_config(config.model, None)).train()
    for _ in fill(model, initial_weights(shape, 0, range(8)), torch.float32):
        pass
    ids = torch.randint(320, (4, 32))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


def test_a_layer_keeps_little_but_its_input():
    plain, recomputed = kept_bytes("none"), kept_bytes("layers")
    saved_by_a_layer = (plain - recomputed) / 4
    rows = 4 * 32
    assert saved_by_a_layer > 4 * rows * (32 + 2 * 2 * 32)  # tokens, and gate and up of two experts, in fp32
    assert recomputed < 0.4 * plain


def test_a_layer_is_computed_to_its_end_again_only_where_rows_travel_beside_it():
    """What it sent in parts is all awaited then; without overlap nothing is computed that nobody wants."""
    for degree, ends in ((1, 1), (2, 2)):
        words = ["train.recompute=layers", "parallel.expert=2", "parallel.zero=1", f"parallel.overlap_degree={degree}"]
        config = compose([*SMALL, *words]).config
        model = trainable_model(config, shape := model_config(config.model, None)).train()
        for _ in fill(model, initial_weights(shape, 0, range(8)), torch.float32):
            pass
        ended = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_, ended=ended: ended.append(1))
        ids = torch.randint(320, (2, 16))
        model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss.backward()
        assert len(ended) == ends
