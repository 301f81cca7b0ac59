"""`cierzo export`: merges an adapter into the weights it adapts, as a folder in the hub's layout.

Nothing heavy is imported before the words are known to be right, so that `--help` answers at once.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.config import LoraConfig
from train.errors import CheckpointError, ConfigError, MachineError, NumericsError, UserError, report
from train.inherit import inherit_adapter, scale_of
from train.unread import quiet_once_unread

if TYPE_CHECKING:
    from torch import Tensor

    from mixtral import MixtralConfig
    from mixtral.weights.adapters import AdapterFolder
    from mixtral.weights.read import WeightFolder

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
BOUNDS = {"bf16": 2e-2, "fp32": 1e-5}  # on the relative difference of the logits of a token, the median of all
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of which makes a tokenizer
TOKENS = 64  # that merged and unmerged weights are compared on

CARD = """\
---
library_name: transformers
tags: [mixtral, moe, cierzo, lora]
---

# {name}

`{base}` with the adapter `{adapter}` (rank {rank}, scale {scale:g}) merged into it, in {dtype}.

Logits of {tokens} random tokens differ from those of the unmerged weights by {error:.1e} (the median of the tokens'
relative differences; the bound is {bound:.0e}); the adapter itself moves them by {effect:.1e}.
{trained}"""


def parser() -> argparse.ArgumentParser:
    """Builds the parser of the verb's words."""
    words = argparse.ArgumentParser(
        prog="cierzo export",
        description="Merges a LoRA adapter into the weights it adapts. Words are KEY=VALUE or --KEY VALUE.",
        allow_abbrev=False,
    )
    words.add_argument("--adapter", type=Path, required=True, help="folder with an adapter, of either of PEFT's forms")
    words.add_argument("--base", type=Path, help="the weights; by default the folder that adapter_config.json names")
    words.add_argument("--output_dir", type=Path, required=True, help="folder to make; it appears whole or not at all")
    words.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the merged weights; by default bf16")
    return words


def main(argv: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        argv: its words.

    Returns:
        The exit code: 0 done, 2 words, 4 weights that cannot be used, 5 merged weights that compute something else,
        6 the disk.
    """
    words = parser().parse_args(as_options(argv))
    try:
        lora = check(words)
        merge(words, lora)
    except UserError as error:
        report(error, met=False)
        return error.code
    except KeyboardInterrupt:
        return 130
    return 0


def as_options(words: Sequence[str]) -> list[str]:
    """Writes KEY=VALUE as --KEY=VALUE; what follows a lone --KEY is its value, be there an = in it."""
    named = (before.startswith("-") and "=" not in before for before in ["", *words])
    return [
        f"--{word}" if "=" in word and not (has_name or word.startswith("-")) else word
        for word, has_name in zip(words, named, strict=False)
    ]


def check(words: argparse.Namespace) -> LoraConfig:
    """Refuses folders that cannot be used, and finds the base; returns what the adapter says of itself.

    Raises:
        ConfigError, CheckpointError: naming them.
    """
    if not words.adapter.is_dir():
        raise ConfigError(f"adapter={words.adapter} is not a folder")
    lora = LoraConfig(init_from=str(words.adapter))
    inherit_adapter(lora, ())
    if words.base is None:
        described = json.loads((words.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        words.base = Path(described.get("base_model_name_or_path") or "")
    if words.base == Path() or not words.base.is_dir():
        raise ConfigError(f"base={words.base} is not a folder: name the one that holds the adapted weights")
    if words.output_dir.exists() and not (words.output_dir.is_dir() and not any(words.output_dir.iterdir())):
        raise ConfigError(f"output_dir={words.output_dir} exists already: name another folder, or move it away")
    return lora


def merge(words: argparse.Namespace, lora: LoraConfig) -> None:
    """Writes the merged weights, tokenizer and model card, once they compute what the unmerged ones do.

    Raises:
        CheckpointError: for weights or an adapter that cannot be used, or not together.
        NumericsError: when the merged weights compute something else.
        MachineError: when the output cannot be written.
    """
    from mixtral.weights.files import WeightsError
    from mixtral.weights.read import WeightFolder
    from mixtral.weights.write import new_folder
    from train.lora import open_adapter

    try:
        base = WeightFolder(words.base)
        base.config = merged_config(words, base)
        adapter = open_adapter(lora, base.config)
        with new_folder(words.output_dir) as folder:
            carry_files(words, folder)  # before what takes long, since it may be refused
            write_merged(folder, base, adapter, lora, words.dtype)
            figures = compare(folder, words, lora, adapter)
            (folder / "README.md").write_text(card(words, lora, *figures), encoding="utf-8")
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
    except FileExistsError as error:
        raise ConfigError(f"output_dir: {error}") from None
    except OSError as error:
        raise MachineError(f"{error.filename or words.output_dir}: {error.strerror or error}") from None
    print(
        f"{words.output_dir}: merged in {words.dtype}; logits differ by {figures[0]:.1e}, "
        f"the adapter's own part is {figures[1]:.1e}"
    )


def merged_config(words: argparse.Namespace, base: "WeightFolder") -> "MixtralConfig":
    """Gives the configuration of the merged model: the base's, or that of a classifier's adapter.

    Raises:
        WeightsError: for a base that is no language model, where it should be one.
    """
    from mixtral.weights.files import WeightsError
    from mixtral.weights.read import read_config

    described = json.loads((words.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    is_classifier = bool(described.get("modules_to_save"))
    if base.head != "lm_head" and not (is_classifier and base.head == "score"):
        raise WeightsError(f"{words.base} is no causal language model")
    return read_config(words.adapter) if is_classifier else base.config


def write_merged(folder: Path, base: "WeightFolder", adapter: "AdapterFolder", lora: LoraConfig, dtype: str) -> None:
    """Writes W + s BA, added up in fp32 and then rounded, a matrix at a time.

    Args:
        folder: an existing one.
        base: the adapted weights.
        adapter: what is added.
        lora: its scale.
        dtype: `bf16` or `fp32`.
    """
    import torch

    from mixtral.weights import names
    from mixtral.weights.adapters import SCORE
    from mixtral.weights.write import HubWriter, plan
    from train.model import head_of, write_config

    target = getattr(torch, DTYPES[dtype])
    write_config(folder, base.config, target)
    head = head_of(base.config)
    hub = names.hub_shapes(base.config, head)
    experts = range(base.config.num_local_experts)
    with HubWriter(folder, plan(hub, {}, target)) as writer:
        for name in names.shapes(base.config, head):
            pair = pair_of(name, adapter)
            if name == SCORE:
                writer.add_parameter(name, adapter.tensor(name, ()), [])
                continue
            if not names.is_stacked(name):
                weight = added(base.tensor(name, (), torch.float32), pair, scale_of(lora))
                writer.add_parameter(name, with_magnitude(weight, name, adapter), [])
                continue
            for expert in experts:
                weight = base.tensor(name, [expert], torch.float32)[0]
                of_expert = None if pair is None else (pair[0][expert], pair[1][expert])
                writer.add_parameter(name, added(weight, of_expert, scale_of(lora))[None], [expert])


def pair_of(name: str, adapter: "AdapterFolder") -> "tuple[Tensor, Tensor] | None":
    """Reads in fp32 the A and B that belong to a parameter, for all experts of a stacked one, if there are any."""
    stem = f"{name.removesuffix('_proj')}_lora_" if ".experts." in name else f"{name.removesuffix('.weight')}.lora_"
    a, b = (f"{stem}{side}{'' if '.experts.' in name else '.weight'}" for side in "AB")
    if a not in adapter.shapes:
        return None
    experts = range(adapter.shapes[a][0])
    return adapter.tensor(a, experts).float(), adapter.tensor(b, experts).float()


def added(weight: "Tensor", pair: "tuple[Tensor, Tensor] | None", scale: float) -> "Tensor":
    """Adds `scale * B @ A` to a matrix."""
    return weight if pair is None else weight + scale * pair[1] @ pair[0]


def with_magnitude(weight: "Tensor", name: str, adapter: "AdapterFolder") -> "Tensor":
    """Gives the rows of a matrix the norms that DoRA has for them, if it does."""
    magnitude = f"{name.removesuffix('.weight')}.lora_magnitude_vector.weight"
    if magnitude not in adapter.shapes:
        return weight
    norms = adapter.tensor(magnitude, ()).float()
    return (norms / weight.norm(dim=1)).unsqueeze(-1) * weight


def compare(folder: Path, words: argparse.Namespace, lora: LoraConfig, adapter: "AdapterFolder") -> tuple[float, float]:
    """Loads what was written and runs it beside the unmerged weights, in fp32, a layer at a time.

    Returns:
        The median over tokens of the relative difference of the logits: of merged and unmerged, and of unmerged and
        the base alone; of a classifier, over rows, the base with its head.

    Raises:
        NumericsError: when the first is out of its bound.
    """
    import torch

    from mixtral.weights.adapters import SCORE
    from train.lora import logits_by_layer

    score = adapter.tensor(SCORE, ()) if SCORE in adapter.shapes else None
    shape = (1, TOKENS) if score is None else (8, TOKENS // 8)
    ids = torch.randint(0, 2**31, shape, generator=torch.Generator().manual_seed(0))
    merged = logits_by_layer(folder, None, ids)
    unmerged = logits_by_layer(words.base, lora, ids, adapter.config, score)
    alone = logits_by_layer(words.base, None, ids, adapter.config, score)
    error, effect = (((one - unmerged).norm(dim=-1) / unmerged.norm(dim=-1)).median().item() for one in (merged, alone))
    if not error <= BOUNDS[words.dtype]:
        raise NumericsError(
            f"the merged weights' logits differ from the unmerged ones' by {error:.1e}, the bound is "
            f"{BOUNDS[words.dtype]:.0e}: nothing was written"
        )
    return error, effect


def carry_files(words: argparse.Namespace, folder: Path) -> None:
    """Copies the adapter's tokenizer, else the base's, likewise generation settings, and the adapter's held-out rows.

    All of a tokenizer comes from one folder: what older files say of special tokens, or a template, would change it.
    """
    from mixtral.weights.files import inside
    from train.convert import TOKENIZER_FILES

    both = (words.adapter, words.base)
    own = any((words.adapter / name).exists() for name in TOKENIZERS)
    wanted = [(name, (both[0 if own else 1],)) for name in TOKENIZER_FILES]
    for name, sources in [*wanted, ("generation_config.json", both), ("held_out.jsonl", both[:1])]:
        found = next((source for source in sources if (source / name).exists()), None)
        if found is not None:
            shutil.copyfile(inside(found, name), folder / name)


def card(words: argparse.Namespace, lora: LoraConfig, error: float, effect: float) -> str:
    """Writes the model card; the table of the adapter's own, with its data and figures, comes along."""
    return CARD.format(
        name=words.output_dir.name,
        base=words.base,
        adapter=words.adapter,
        rank=lora.rank,
        scale=scale_of(lora),
        dtype=words.dtype,
        tokens=TOKENS,
        error=error,
        bound=BOUNDS[words.dtype],
        effect=effect,
        trained="".join(f"\n{line}" for line in table_of(words.adapter / "README.md")),
    )


def table_of(path: Path) -> Iterator[str]:
    """Yields the lines of the table in an adapter's card, if it has one; what is not UTF-8 is replaced."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from (line for line in text.splitlines() if line.startswith("|"))


if __name__ == "__main__":
    with quiet_once_unread():
        sys.exit(main(sys.argv[1:]))
