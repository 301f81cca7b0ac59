"""The model of a run, built from its configuration: empty, with values that any layout draws alike."""

import copy
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixtral import MixtralConfig, MixtralForCausalLM, MixtralForSequenceClassification
from mixtral.weights import WeightsError, read
from mixtral.weights.names import shapes
from mixtral.weights.read import WeightFolder, read_config
from train.config import Config, ModelConfig
from train.data.hub import download
from train.data.labelled import Labels
from train.errors import CheckpointError, ConfigError, MachineError
from train.parallel.engine import Model, Weights

HEADS: dict[str, type[Model]] = {"lm_head": MixtralForCausalLM, "score": MixtralForSequenceClassification}
NO_SIZES = ("init_from", "attn_implementation")
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model"]  # no pickles


def model_config(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None, labels: Labels | None = None
) -> MixtralConfig:
    """Translates the run's keys, over what the weights it starts from say; the special tokens are its tokenizer's.

    With labels it is a classifier's, which finds the last token of a row by the padding.
    """
    described = {} if config.init_from is None else read_config(Path(config.init_from)).to_dict()
    sizes = {key: value for key, value in dataclasses.asdict(config).items() if key not in NO_SIZES}
    if described:
        del sizes["rope_theta"]  # with all that may go with it, in rope_parameters
    own = {
        "bos_token_id": None if tokenizer is None else tokenizer.bos_token_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_token_id,
        "pad_token_id": None,  # a padding id would freeze that row of the embedding
        "use_cache": True,
        "problem_type": None,
    }
    if labels is not None:
        assert tokenizer is not None
        names = dict(enumerate(labels.names))
        own |= {"pad_token_id": tokenizer.pad_token_id, "problem_type": labels.problem, "num_labels": len(names)}
        own |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return MixtralConfig(**described | sizes | own, attn_implementation=config.attn_implementation)


def head_of(config: MixtralConfig) -> str:
    """Names the head of a run's model: `score` of a classifier, or `lm_head`."""
    return "lm_head" if config.problem_type is None else "score"


def write_config(folder: Path, config: MixtralConfig, dtype: torch.dtype) -> None:
    """Writes a model's `config.json`."""
    described = copy.deepcopy(config)
    described.architectures, described.dtype = [HEADS[head_of(config)].__name__], dtype
    described.save_pretrained(folder)


def find_weights(config: ModelConfig, *, classifier: bool = False) -> None:
    """Fetches the weights to start from where they are on the hub, and checks the files that this host has.

    Args:
        config: says where they are.
        classifier: whether a classifier is trained, which may start from a language model.

    Raises:
        MachineError: when they are not to be had.
        CheckpointError: when they cannot be used.
    """
    if config.init_from is None:
        return
    if not Path(config.init_from).is_dir():
        config.init_from = str(download(config.init_from, HUB_FILES, "model.init_from"))
    try:
        head = WeightFolder(config.init_from).head
    except WeightsError as error:
        raise CheckpointError(f"model.init_from={config.init_from}: {error}") from None
    if head != "lm_head" and not (classifier and head == "score"):
        found = "a classifier" if head == "score" else "a decoder without a head"
        raise CheckpointError(f"model.init_from={config.init_from} holds {found}, expected a causal language model")


def starting_weights(config: Config, model: MixtralConfig) -> Weights:
    """Gives what fills a model: a folder's weights, of which each process reads its experts alone, or new ones."""
    source = config.model.init_from
    if source is None:
        return lambda experts: initial_weights(model, config.run.seed, experts)

    def read_folder(experts: range) -> Iterator[tuple[str, Tensor]]:
        wanted = shapes(model, head_of(model))
        try:
            for name, tensor in read(source, experts=experts):
                if name == "score.weight" and tensor.shape != wanted.get(name, tensor.shape):
                    raise WeightsError(f"it tells {len(tensor)} labels apart, and the data has {model.num_labels}")
                if wanted.pop(name, None) is not None:
                    yield name, tensor
        except WeightsError as error:
            raise CheckpointError(f"model.init_from={source}: {error}") from None
        if wanted:  # a new head on a language model
            yield "score.weight", draw(model, config.run.seed, "score.weight", wanted["score.weight"])

    return read_folder


def empty_model(config: MixtralConfig) -> Model:
    """Builds a model without values, on the meta device.

    Raises:
        ConfigError, MachineError: when the attention backend cannot run here.
    """
    if config._attn_implementation == "flash_attention_2" and not torch.cuda.is_available():
        raise ConfigError("model.attn_implementation=flash_attention_2 needs a GPU: use sdpa")
    try:
        with torch.device("meta"):
            return HEADS[head_of(config)](config)
    except ImportError as error:
        raise MachineError(f"model.attn_implementation={config._attn_implementation}: {error}") from None


def initial_weights(config: MixtralConfig, seed: int, experts: range) -> Iterator[tuple[str, Tensor]]:
    """Draws a new model's values in fp32: matrices from a normal distribution, norms of one.

    Every parameter, and every expert of one, has a generator of its own: a process that draws some gets what one
    that draws all of them gets.

    Args:
        config: of the model; `initializer_range` is the standard deviation.
        seed: of the run.
        experts: those to draw.
    """
    for name, shape in shapes(config, head_of(config)).items():
        if len(shape) == 3:
            yield name, torch.stack([draw(config, seed, f"{name}/{expert}", shape[1:]) for expert in experts])
        elif len(shape) == 2:
            yield name, draw(config, seed, name, shape)
        else:
            yield name, torch.ones(shape)


def draw(config: MixtralConfig, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Draws the values of a new matrix; see `initial_weights`."""
    return torch.empty(shape).normal_(std=config.initializer_range, generator=generator_of(seed, name))


def generator_of(seed: int, name: str) -> torch.Generator:
    """Gives what is drawn by name in a run a generator of its own."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
