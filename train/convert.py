"""`cierzo convert`: weights from one format to another, and dense models to mixtures of experts.

Nothing heavy is imported before the words are known to be right, so that `--help` answers at once.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from train.errors import CheckpointError, ConfigError, MachineError, UserError, report
from train.unread import quiet_once_unread

if TYPE_CHECKING:
    import torch

    from mixtral import MixtralConfig
    from mixtral.weights.raw import RawWriter
    from mixtral.weights.write import HubWriter, Planned

DESCRIPTION = """\
Converts Mixtral weights, one tensor at a time. The input is recognised by its files:
  hub       config.json and model*.safetensors or pytorch_model*.bin
  mistral   params.json and consolidated*.safetensors, or consolidated.NN.pth, whose layout is recognised too
  dense     with --upcycle: a Mistral or Llama in the hub's layout
"""
FORMATS = ("hub", "mistral", "mistral-fused")
DTYPES = ("float32", "float16", "bfloat16")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
HUB_FILES = ("model*.safetensors*", "pytorch_model*.bin*")
LINES = 10  # of progress, where there is no terminal


class Source(Protocol):
    """Where hub tensors come from, one at a time."""

    config: "MixtralConfig"
    head: str | None

    def dtypes(self) -> "dict[str, torch.dtype]":
        """Returns the dtype of each hub tensor."""

    def piece(self, name: str) -> "torch.Tensor":
        """Makes one hub tensor."""


def parser() -> argparse.ArgumentParser:
    """Builds the parser of the verb's words."""
    words = argparse.ArgumentParser(
        prog="cierzo convert",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    words.add_argument("--input_dir", type=Path, required=True, help="folder of weights")
    words.add_argument("--output_dir", type=Path, required=True, help="folder to make; it appears whole or not at all")
    words.add_argument(
        "--to",
        choices=FORMATS,
        default="hub",
        help="hub (the default); mistral: consolidated.safetensors with a matrix per expert; mistral-fused: "
        "consolidated.NN.pth as in the first release, a matrix per layer",
    )
    words.add_argument("--dtype", choices=DTYPES, help="of the weights; by default as they are")
    words.add_argument(
        "--max_shard_size",
        type=shard_size,
        help="bound on a file, such as 500MB; by default 5GB for the hub's layout and one file for Mistral's",
    )
    words.add_argument("--instruct", action="store_true", help="give the tokenizer Mixtral-8x7B-Instruct's template")
    upcycling = words.add_argument_group("upcycling a dense model")
    upcycling.add_argument("--upcycle", type=int, metavar="EXPERTS", help="copy each feed-forward network so often")
    upcycling.add_argument("--top_k", type=int, help="experts per token; by default 2")
    upcycling.add_argument(
        "--noise", type=float, help="noise on each expert, in units of its matrices' standard deviation; by default 0"
    )
    upcycling.add_argument("--seed", type=int, help="of the routers and the noise; by default 0")
    return words


def shard_size(text: str) -> int:
    """Reads a size such as 5GB, in bytes."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return size


def main(argv: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        argv: its words.

    Returns:
        The exit code: 0 done, 2 words, 4 weights that cannot be used, 6 the disk.
    """
    words = parser().parse_args(argv)
    try:
        check(words)
        convert(words)
    except UserError as error:
        report(error, met=False)
        return error.code
    except KeyboardInterrupt:
        return 130
    return 0


def check(words: argparse.Namespace) -> None:
    """Refuses words that do not go together.

    Raises:
        ConfigError, CheckpointError: naming them.
    """
    given = [f"--{key}" for key in ("top_k", "noise", "seed") if getattr(words, key) is not None]
    if words.upcycle is None and given:
        raise ConfigError(f"{given[0]} belongs to --upcycle EXPERTS, which is not given")
    top_k = 2 if words.top_k is None else words.top_k
    if words.upcycle is not None and not 1 <= top_k <= words.upcycle:
        raise ConfigError(f"--top_k={top_k} must lie between 1 and --upcycle={words.upcycle}")
    if not 0 <= (words.noise or 0.0) < float("inf"):
        raise ConfigError(f"--noise={words.noise} must be 0 or more")
    if not 0 <= (words.seed or 0) < 2**31:
        raise ConfigError(f"--seed={words.seed} must lie between 0 and 2147483647")
    if words.instruct and words.to != "hub":
        raise ConfigError(f"--instruct needs --to=hub: the files of --to={words.to} hold no chat template")
    if not words.input_dir.is_dir():
        raise ConfigError(f"--input_dir={words.input_dir} is not a folder")
    if words.output_dir.exists() and not (words.output_dir.is_dir() and not any(words.output_dir.iterdir())):
        raise ConfigError(f"--output_dir: {words.output_dir} exists already: name another folder, or move it away")
    if words.upcycle is None and not holds_weights(words.input_dir):
        raise CheckpointError(
            f"{words.input_dir} holds neither model*.safetensors or pytorch_model*.bin with config.json, "
            "nor consolidated* with params.json"
        )


def holds_weights(folder: Path) -> bool:
    """Says whether a folder has files of any format that is read."""
    return (folder / "params.json").exists() or any(any(folder.glob(pattern)) for pattern in HUB_FILES)


def convert(words: argparse.Namespace) -> None:
    """Converts weights, configuration and tokenizer.

    Raises:
        ConfigError: when the output exists.
        CheckpointError: for weights that cannot be used.
        MachineError: when the output cannot be written.
    """
    from mixtral.weights.files import WeightsError
    from mixtral.weights.write import new_folder

    try:
        source = open_source(words)
        with new_folder(words.output_dir) as folder:
            carry_tokenizer(words.input_dir, folder, words, rows=source.config.vocab_size)
            size = write_weights(source, folder, words)
        if words.to != "hub":
            say_what_is_lost(source.config, words.input_dir)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
    except FileExistsError as error:
        raise ConfigError(f"--output_dir: {error}") from None
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise MachineError(f"--output_dir: {error}") from None
        raise MachineError(f"{error.filename or words.output_dir}: {error.strerror or error}") from None
    total, active = count_parameters(source)
    print(f"{words.output_dir}: {total:,} parameters, {active:,} active per token, {_gigabytes(size)}")


def count_parameters(source: Source) -> tuple[int, int]:
    """Counts all parameters and those that a token passes through, whichever head there is, or none."""
    from mixtral.weights import names

    total = sum(map(math.prod, names.hub_shapes(source.config, source.head).values()))
    count = source.config.count_parameters()
    return total, total - count.experts + count.experts_active


def say_what_is_lost(config: "MixtralConfig", folder: Path) -> None:
    """Prints the settings that Mistral's files have no place for, where they are not the published ones."""
    published = type(config)()
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "router_aux_loss_coef")
    lost = [f"{key}={getattr(config, key)}" for key in keys if getattr(config, key) != getattr(published, key)]
    lost += ["generation_config.json"] if (folder / "generation_config.json").exists() else []
    if lost:
        print(f"not kept, since Mistral's files have no place for it: {', '.join(lost)}")


def open_source(words: argparse.Namespace) -> Source:
    """Opens the input, whatever its format.

    Raises:
        WeightsError: when it cannot be used.
    """
    from mixtral.weights.raw import RawFolder
    from mixtral.weights.read import WeightFolder
    from mixtral.weights.upcycle import DenseFolder

    folder = words.input_dir
    if words.upcycle is not None:
        options = {key: getattr(words, key) for key in ("top_k", "noise", "seed") if getattr(words, key) is not None}
        return DenseFolder(folder, words.upcycle, **options)
    if any(any(folder.glob(pattern)) for pattern in HUB_FILES):
        return WeightFolder(folder)
    return RawFolder(folder)


def write_weights(source: Source, folder: Path, words: argparse.Namespace) -> int:
    """Writes weights and configuration; returns the bytes of the weights.

    Raises:
        WeightsError: for weights that cannot be used, or that the format cannot hold.
        MachineError: when the disk is too small.
    """
    import torch

    from mixtral.weights import names
    from mixtral.weights.write import plan

    dtype = getattr(torch, words.dtype) if words.dtype else None
    tensors = plan(names.hub_shapes(source.config, source.head), source.dtypes(), dtype)
    size, free = sum(planned.nbytes for planned in tensors.values()), shutil.disk_usage(folder).free
    if size > free:
        raise MachineError(f"--output_dir={words.output_dir} needs {_gigabytes(size)}, the disk has {_gigabytes(free)}")
    writer = open_writer(source, folder, tensors, words)
    progress = Progress(size)
    with writer:
        for name, planned in tensors.items():
            writer.add(name, source.piece(name))
            progress.advance(planned.nbytes)
    progress.close()
    return size


def open_writer(
    source: Source, folder: Path, tensors: "dict[str, Planned]", words: argparse.Namespace
) -> "HubWriter | RawWriter":
    """Writes the configuration and makes room for the weights."""
    from mixtral.weights.files import WeightsError
    from mixtral.weights.raw import RawWriter
    from mixtral.weights.write import HubWriter

    bound = {} if words.max_shard_size is None else {"max_shard_bytes": words.max_shard_size}
    config = source.config
    if words.to != "hub":
        if source.head != "lm_head":
            raise WeightsError(f"{words.input_dir} is no causal language model, and --to={words.to} holds nothing else")
        return RawWriter(folder, config, tensors, fused=words.to == "mistral-fused", **bound)
    architectures = {"lm_head": "MixtralForCausalLM", "score": "MixtralForSequenceClassification"}
    config.architectures = [architectures.get(source.head or "", "MixtralModel")]
    config.dtype = next(iter(tensors.values())).dtype
    config.save_pretrained(folder)
    return HubWriter(folder, tensors, **bound)


def carry_tokenizer(source: Path, target: Path, words: argparse.Namespace, rows: int) -> None:
    """Copies the tokenizer's files; for the hub, builds from a lone sentencepiece file what `AutoTokenizer` reads.

    Args:
        source: the folder of the input.
        target: the folder being made.
        words: of the command line.
        rows: of the embedding.

    Raises:
        CheckpointError: for files that are no tokenizer, or one of more tokens than `rows`.
        ConfigError: when there is none to give a template, or one that it does not fit.
        WeightsError: for a link out of the folder.
    """
    from mixtral.weights.files import inside

    is_hub = words.to == "hub"
    wanted = (*TOKENIZER_FILES, "generation_config.json") if is_hub else ("tokenizer.model", "tekken.json")
    copied = {name for name in wanted if (source / name).exists()}
    for name in copied:
        shutil.copyfile(inside(source, name), target / name)
    if not copied & {"tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json"}:
        if words.instruct:
            raise ConfigError(f"--instruct: {source} holds no tokenizer to give a template")
        print(f"{source} holds no tokenizer, so {words.output_dir} has none")
    elif is_hub and not copied & {"tokenizer.json", "vocab.json"}:
        _build_tokenizer(target, rows)
    if words.instruct:
        from transformers import AutoTokenizer

        from train.data.tokenizer import add_instruct_template

        try:
            tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--instruct: the tokenizer in {source} cannot be opened: {error}") from None
        add_instruct_template(tokenizer)
        tokenizer.save_pretrained(target)


def _build_tokenizer(folder: Path, rows: int) -> None:
    """Builds from `tokenizer.model`, keeping the chat template that older files beside it may hold."""
    from mixtral.weights.files import read_json
    from train.data.tokenizer import sentencepiece_tokenizer

    if (folder / "added_tokens.json").exists():
        raise CheckpointError("added_tokens.json without tokenizer.json: save the tokenizer with transformers first")
    try:
        tokenizer = sentencepiece_tokenizer((folder / "tokenizer.model").read_bytes())
    except ValueError as error:
        raise CheckpointError(f"tokenizer.model: {error}") from None
    if len(tokenizer) > rows:
        raise CheckpointError(f"tokenizer.model has {len(tokenizer)} tokens, but the embedding only {rows} rows")
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        tokenizer.chat_template = read_json(settings).get("chat_template")
    tokenizer.save_pretrained(folder)


class Progress:
    """Shows the bytes converted: a bar on a terminal, plain lines elsewhere.

    Args:
        total: bytes to convert.
    """

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._total, self._done, self._started = total, 0, time.monotonic()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True) if sys.stderr.isatty() else None

    def advance(self, size: int) -> None:
        """Counts bytes that were written."""
        if self._bar is not None:
            self._bar.update(size)
        before, self._done = self._done, self._done + size
        share = self._done * LINES // self._total
        if self._bar is None and share > before * LINES // self._total:
            left = (time.monotonic() - self._started) * (self._total / self._done - 1)
            print(f"{_gigabytes(self._done)} of {_gigabytes(self._total)}, {left:.0f} s left", flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _gigabytes(size: int) -> str:
    unit = next((unit for unit in ("GB", "MB") if size >= UNITS[unit]), "KB")
    return f"{size / UNITS[unit]:.1f} {unit}"


if __name__ == "__main__":
    with quiet_once_unread():
        sys.exit(main(sys.argv[1:]))
