"""Low-rank adapters on disk, in PEFT's two forms, and the names they have in memory.

In memory:  `...self_attn.q_proj.lora_A.weight`, `...mlp.gate.lora_A.weight`, `lm_head.lora_A.weight` and, stacked over
            the experts, `...mlp.experts.{gate_up,down}_lora_{A,B}`; A of (r, inputs), B of (outputs, r).
Portable:   one pair per matrix, as the hub names them: `...block_sparse_moe.experts.E.{w1,w3,w2}.lora_{A,B}.weight`,
            w1 and w3 (gate and up) with the same A.
Fused:      one pair for all experts, as PEFT 0.21 adapts stacked parameters: `...mlp.experts.base_layer.lora_{A,B}
            .weight` for gate and up, `...mlp.experts.lora_{A,B}.weight` for down; A of (E * r, inputs), expert by
            expert, B of (outputs, r * E), the expert counting fastest.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixtral.configuration import MixtralConfig
from mixtral.weights import names
from mixtral.weights.files import WeightsError, scan
from mixtral.weights.read import check_tensors, whole
from mixtral.weights.write import Planned, TensorWriter, lay_out_safetensors

PREFIX = "base_model.model."
STEM = "adapter_model"
EXPERT_WORDS = ("w1", "w2", "w3")  # PEFT's targets, with which the portable form adapts every expert
EXPERT_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")  # and with these the fused one
SCORE = "score.weight"  # a classifier's head, which goes with its adapter as it is
_MATRICES = {"gate_up": ("w1", "w3"), "down": ("w2",)}
_WRAPPED = {"gate_up": "mlp.experts.base_layer", "down": "mlp.experts"}


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds to a model.

    Attributes:
        rank: r.
        scale: of B @ A.
        targets: the linear layers it adapts, by the last part of their names; `gate` is the router.
        experts: whether it adapts the experts.
        dora: whether the linear layers have magnitudes of their own (arXiv 2402.09353).
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    experts: bool
    dora: bool = False


def shapes(config: MixtralConfig, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape in memory of every tensor of an adapter, all experts stacked."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in names.shapes(config).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in adapter.targets:
            found[f"{module}.lora_A.weight"] = (adapter.rank, shape[1])
            found[f"{module}.lora_B.weight"] = (shape[0], adapter.rank)
            if adapter.dora:
                found[f"{module}.lora_magnitude_vector.weight"] = (shape[0],)
        elif names.is_stacked(name) and adapter.experts:
            stem = module.removesuffix("_proj")
            found[f"{stem}_lora_A"] = (shape[0], adapter.rank, shape[2])
            found[f"{stem}_lora_B"] = (*shape[:2], adapter.rank)
    return found


def on_disk(name: str, expert: int) -> list[str]:
    """Names the tensors of the portable form that hold a parameter, or an expert's part of a stacked one.

    Two of an A are equal; two of a B lie one above the other.
    """
    if not names.is_stacked(name):
        name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        return [PREFIX + name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")]
    layer, projection, side = _parts(name)
    experts = f"{PREFIX}{layer}block_sparse_moe.experts.{expert}."
    return [f"{experts}{matrix}.lora_{side}.weight" for matrix in _MATRICES[projection]]


def on_disk_fused(name: str) -> str:
    """Names the tensor of the fused form that holds a parameter."""
    if not names.is_stacked(name):
        return on_disk(name, 0)[0].replace(".block_sparse_moe.gate.", ".mlp.gate.")
    layer, projection, side = _parts(name)
    return f"{PREFIX}{layer}{_WRAPPED[projection]}.lora_{side}.weight"


def _parts(name: str) -> tuple[str, str, str]:
    """Takes `model.layers.3.mlp.experts.gate_up_lora_A` apart: `model.layers.3.`, `gate_up`, `A`."""
    layer, _, leaf = name.partition("mlp.experts.")
    projection, _, side = leaf.partition("_lora_")
    return layer, projection, side


def shapes_on_disk(config: MixtralConfig, adapter: Adapter, *, fused: bool) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor of an adapter's file."""
    found: dict[str, tuple[int, ...]] = {}
    if config.problem_type is not None:
        found[PREFIX + SCORE] = (config.num_labels, config.hidden_size)
    for name, shape in shapes(config, adapter).items():
        if not names.is_stacked(name):
            found[on_disk_fused(name) if fused else on_disk(name, 0)[0]] = shape
        elif fused:
            experts, rows, columns = shape
            is_a = name.endswith("A")
            found[on_disk_fused(name)] = (experts * rows, columns) if is_a else (rows, columns * experts)
        else:
            for expert in range(shape[0]):
                parts = on_disk(name, expert)
                rows = shape[1] if name.endswith("A") else shape[1] // len(parts)
                found |= dict.fromkeys(parts, (rows, shape[2]))
    return found


def peft_config(adapter: Adapter, base: str | None, *, fused: bool, classifier: bool = False) -> dict[str, object]:
    """Describes an adapter as PEFT does in `adapter_config.json`.

    `lora_alpha / r` is the scale even where it came from rsLoRA: PEFT doubles r and `lora_alpha` where it joins w1 and
    w3, which keeps their ratio, but not the one with a root.

    Args:
        adapter: what is described.
        base: the weights it belongs to.
        fused: whether the form is the fused one.
        classifier: whether it holds a classifier's head too.
    """
    modules, parameters = [target for target in adapter.targets if target != "gate" or not fused], []
    if adapter.experts and not fused:
        modules += EXPERT_WORDS
    if fused:
        parameters = [*(["gate.weight"] if "gate" in adapter.targets else []), *(EXPERT_PARAMETERS * adapter.experts)]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM",
        "modules_to_save": ["score"] if classifier else None,
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": adapter.dora,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters or None,
        "inference_mode": True,
    }


class AdapterFolder:
    """An adapter in either form, opened and checked against a model; nothing is loaded yet.

    Args:
        folder: holds `adapter_model.safetensors` or `adapter_model.bin`.
        config: of the model that it adapts.
        adapter: what it should be.

    Raises:
        WeightsError: for a missing, unknown or misshapen tensor.
    """

    def __init__(self, folder: str | Path, config: MixtralConfig, adapter: Adapter) -> None:
        self.folder, self.config = Path(folder), config
        head: dict[str, tuple[int, ...]] = {SCORE: (config.num_labels, config.hidden_size)}
        self.shapes = shapes(config, adapter) | (head if config.problem_type is not None else {})
        self._tensors = scan(self.folder, STEM, f"{STEM}.bin")
        if not self._tensors:
            raise WeightsError(f"{folder} holds no adapter: expected {STEM}.safetensors or {STEM}.bin")
        self._fused = not any(".block_sparse_moe." in name for name in self._tensors)
        expected = shapes_on_disk(config, adapter, fused=self._fused)
        check_tensors(expected, self._tensors, (), self.folder, "adapter_config.json")

    def tensor(self, name: str, experts: Sequence[int]) -> Tensor:
        """Reads a parameter, or the given experts of a stacked one.

        Raises:
            WeightsError: where w1 and w3 of an expert, which are one matrix in memory, have A's of their own.
        """
        if not names.is_stacked(name):
            return self._read(on_disk_fused(name) if self._fused else on_disk(name, 0)[0])
        if self._fused:
            tensor, (count, *_, rank) = self._read(on_disk_fused(name)), self.shapes[name]
            if name.endswith("A"):
                return tensor.unflatten(0, (count, -1))[list(experts)].contiguous()
            return tensor.unflatten(1, (rank, count)).permute(2, 0, 1)[list(experts)].contiguous()
        return torch.stack([self._portable(name, expert) for expert in experts])

    def _portable(self, name: str, expert: int) -> Tensor:
        stored = on_disk(name, expert)
        parts = [self._read(part) for part in stored]
        if name.endswith("B"):
            return torch.cat(parts)
        if not torch.equal(parts[0], parts[-1]):
            raise WeightsError(
                f"tensors {' and '.join(stored)} in {self.folder} differ, expected equal ones: gate and up are one "
                "matrix here, with one A"
            )
        return parts[0]

    def _read(self, name: str) -> Tensor:
        return whole(self._tensors[name])


class AdapterWriter(TensorWriter):
    """Writes an adapter into a folder, a parameter or an expert's part of it at a time.

    Args:
        folder: an existing one.
        config: of the model that is adapted.
        adapter: what is written.
        dtype: of the file.
        base: the weights that are adapted, for `adapter_config.json`.
        fused: whether to write the fused form.
    """

    def __init__(
        self,
        folder: Path,
        config: MixtralConfig,
        adapter: Adapter,
        dtype: torch.dtype,
        base: str | None,
        *,
        fused: bool,
    ) -> None:
        classifier = config.problem_type is not None
        described = json.dumps(peft_config(adapter, base, fused=fused, classifier=classifier), indent=2)
        (folder / "adapter_config.json").write_text(described + "\n", encoding="utf-8")
        expected = shapes_on_disk(config, adapter, fused=fused)
        planned: Mapping[str, Planned] = {name: Planned(dtype, shape) for name, shape in expected.items()}
        super().__init__(lay_out_safetensors(folder, planned, STEM, math.inf))
        self._fused, self._experts = fused, config.num_local_experts
        self._waiting: list[Tensor] = []

    def add_piece(self, name: str, expert: int | None, tensor: Tensor) -> None:
        """Writes a parameter, or an expert's part of a stacked one; the experts of one come in their order.

        Args:
            name: in memory.
            expert: which expert's; None for what is not stacked.
            tensor: its values.
        """
        if expert is None:
            self.add(on_disk_fused(name) if self._fused else on_disk(name, 0)[0], tensor)
        elif not self._fused:
            stored = on_disk(name, expert)
            parts = [tensor] * len(stored) if name.endswith("A") else tensor.chunk(len(stored))
            for part, values in zip(stored, parts, strict=True):
                self.add(part, values)
        elif name.endswith("A"):
            self.add(on_disk_fused(name), tensor, part=expert)
        else:
            self._waiting.append(tensor)
            if len(self._waiting) == self._experts:
                self.add(on_disk_fused(name), torch.stack(self._waiting, dim=-1).flatten(1))
                self._waiting = []
