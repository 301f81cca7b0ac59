"""What several test modules share: no network, no GPU where there is none, and tiny models."""

import atexit
import gc
import os
import shutil
import signal
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="cierzo-tests-")  # caches of the tests go with them
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

for ignored in (signal.SIGINT, signal.SIGHUP):  # by nohup, or a shell in the background, and in what tests start too
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL)

gc.disable()  # while what stays to the end is imported

import pytest
import torch
import transformers

from mixtral import MixtralConfig, MixtralForCausalLM

gc.enable()

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "max_position_embeddings": 128,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_collection_finish() -> None:
    """Leaves all that was imported out of the collections that runs ask for, which were a quarter of their tests."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def skew_router(model: torch.nn.Module) -> None:
    """Makes the routers decided and unequal, so that mistakes in routing and load show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20.0)


def logits_in_parts(model, input_ids, attention_mask, spans, past=None):
    """Runs a batch span by span through a cache; positions follow the mask. Returns the logits of all of it."""
    positions, parts = (attention_mask.cumsum(-1) - 1).clamp(min=0), []
    for start, end in spans:
        output = model(
            input_ids[:, start:end],
            attention_mask=attention_mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


OURS_ALONE = ("windowed", "tiled")


@pytest.fixture
def make_pair():
    """Builds transformers' Mixtral and ours with the same weights."""

    def make(**changes):
        implementation = changes.pop("attn_implementation", "sdpa")
        sizes = SIZES | changes
        theirs = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **sizes, attn_implementation="sdpa" if implementation in OURS_ALONE else implementation
            )
        )
        skew_router(theirs)
        ours = MixtralForCausalLM(MixtralConfig(**sizes, attn_implementation=implementation))
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    return make


@pytest.fixture
def make_model():
    """Builds our model with a skewed router."""

    def make(dtype=torch.float32, **changes):
        model = MixtralForCausalLM(MixtralConfig(**SIZES | changes)).to(dtype)
        skew_router(model)
        return model

    return make
