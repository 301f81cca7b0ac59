"""ZeRO and expert parallelism: DeepSpeed's engine, prepared by accelerate, its configuration generated from ours."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import deepspeed
import torch
from accelerate import DeepSpeedPlugin
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from mixtral.weights.names import is_stacked, trained_parameters, unwrapped
from train.config import MOMENTS, Config
from train.errors import NumericsError
from train.optim import build_optimizer
from train.parallel.engine import Engine, Kind, Model, Weights, fill
from train.parallel.exchange import Traffic
from train.parallel.expert import ExpertParallelBlock, mark_as_split, split_experts
from train.parallel.host_memory import freed_at_once
from train.parallel.reduction import reduce_in_place
from train.parallel.state import whole_parameters
from train.parallel.zero_state import zero_state


def deepspeed_config(config: Config) -> dict[str, Any]:
    """Generates DeepSpeed's configuration: gradients are accumulated and reduced in fp32, overflow skips the step."""
    train, parallel = config.train, config.parallel
    zero: dict[str, Any] = {"stage": parallel.zero}
    if parallel.zero == 3:
        zero["stage3_param_persistence_threshold"] = parallel.persistent_elements
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if parallel.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": config.optim.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
    }


class ZeroEngine(Engine):
    """ZeRO 1, 2 or 3 over all processes, the experts of each layer split over groups of them; see `Engine`."""

    def __init__(self, config: Config) -> None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # compiled for minutes, and used by inference only
        )
        self._config = config
        self._deepspeed_config = deepspeed_config(config)
        super().__init__(
            config,
            mixed_precision="bf16" if config.train.precision == "bf16" else "no",
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._deepspeed_config),
        )
        if self.expert_ranks > 1:
            groups._create_expert_and_data_parallel(self.expert_ranks)

    def prepare(self, model: Model, weights: Weights) -> None:
        self.load(model, weights)
        optimizer = build_optimizer(trained_parameters(model), self._config.optim)
        if self.expert_ranks > 1:
            named = [{"name": f"group-{index}"} | group for index, group in enumerate(optimizer.param_groups)]
            split = split_params_into_different_moe_groups_for_optimizer(named)
            optimizer.param_groups = [group for group in split if group["params"]]
        self.look_at(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        reduce_in_place(self.model)
        self.module = self.model.module
        wholes = whole_parameters(self.module, self.rank, self.expert_ranks)
        self.state = zero_state(self.model.optimizer, wholes, MOMENTS[self._config.optim.name])

    def hold(self, model: Model, weights: Weights) -> None:
        if self._config.parallel.zero == 3:  # the engine brings the weights together
            self.prepare(model, weights)
            return
        self.load(model, weights)
        self.module = self.model = model.to(self.device)

    def load(self, model: Model, weights: Weights) -> None:
        """Splits a model's experts and materialises its parameters one by one.

        At stage 3 each is partitioned before the next one comes.
        """
        if self.expert_ranks > 1:
            split_experts(model, model.config, self.parallel, self.rank)
        with freed_at_once():
            self._fill(model, weights)

    def _fill(self, model: Model, weights: Weights) -> None:
        convert = None
        parameter: Any  # which DeepSpeed gives methods of its own
        for name, parameter in fill(model, weights(self.experts(model.config.num_local_experts)), self.dtype):
            if self.expert_ranks > 1 and is_stacked(name):
                mark_as_split(parameter, self.expert_ranks)
            if self._config.parallel.zero < 3:
                continue
            if convert is None:
                deepspeed.zero.Init(
                    nn.ParameterList([parameter]), config_dict_or_path=self._deepspeed_config, dtype=self.dtype
                )
                convert = parameter.convert_to_zero_parameters
            else:
                convert(param_list=[parameter])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        # gradients are averaged over the processes, and ours are parts of a sum
        self.model.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.step()
        self._seen.zero_()
        if self.model.optimizer.overflow:
            raise NumericsError.of_gradient(float("nan"))
        return float(self.model.get_global_grad_norm())

    def discard(self) -> None:
        updates: Any = self.model.optimizer.optimizer
        updates.step = lambda *_, **__: None  # DeepSpeed ends its step, in which nothing is updated
        try:
            self.model.step()
        finally:
            del updates.step  # which hid the class's own
        self._seen.zero_()

    def traffic(self) -> Traffic:
        blocks = [block for block in self.module.modules() if isinstance(block, ExpertParallelBlock)]
        total = Traffic.total(traffic for block in blocks for traffic in block.traffic)
        for block in blocks:
            block.traffic.clear()
        return total

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        parameter: Any
        for name, parameter in super().replicas():
            whole = not hasattr(parameter, "ds_id") or parameter.ds_persist  # the small ones of ZeRO-3
            if whole and getattr(parameter, "ds_status", None) in (None, ZeroParamStatus.AVAILABLE):
                yield name, parameter

    def local(self, kind: Kind, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        door = {"gradients": safe_get_full_grad, "masters": safe_get_full_fp32_param}.get(kind)
        for wrapped, parameter in self.module.named_parameters():
            name = unwrapped(wrapped)
            if (kind != "weights" and not parameter.requires_grad) or (names is not None and name not in names):
                continue
            if door is not None:
                values = door(parameter)
                assert values is not None, f"{name} has no {kind}"
                yield name, values
                continue
            partitioned = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter]) if partitioned else contextlib.nullcontext():
                yield name, parameter.detach()
