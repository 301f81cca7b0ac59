"""The processes of a run: one device each, the model replicated, gradients averaged, through accelerate."""

import contextlib
import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn

from mixtral import MixtralForCausalLM
from train.config import OptimConfig, TrainConfig
from train.data.packing import Batch
from train.errors import ConfigError, MachineError, NumericsError, UserError
from train.optim import MasterWeights, build_optimizer

T = TypeVar("T")

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)  # one process may tokenize a corpus while the others wait
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Engine:
    """Owns the process group, the device, the wrapped model and the optimizer.

    Attributes:
        rank, world_size: this process's number and how many there are.
        device: where the model and the batches live.
        module: the model itself; `model` is the same, wrapped for gradient averaging.
    """

    def __init__(self, config: TrainConfig) -> None:
        cpu = not torch.cuda.is_available()
        handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # on a CPU accelerate needs to be told of gloo
            handlers.append(InitProcessGroupKwargs(backend="gloo" if cpu else None, timeout=COLLECTIVE_TIMEOUT))
        accumulation = GradientAccumulationPlugin(num_steps=1)  # the loop's own; or an environment variable rescales
        try:
            self.accelerator = Accelerator(
                cpu=cpu, mixed_precision="no", kwargs_handlers=handlers, gradient_accumulation_plugin=accumulation
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise MachineError(f"the processes cannot meet at {address}: {str(error).splitlines()[0]}") from None
        if self.accelerator.distributed_type not in SUPPORTED:
            raise ConfigError(
                f"accelerate was told to use {self.accelerator.distributed_type.value} (its configuration file, or an "
                "ACCELERATE_USE_ variable); processes here are plainly data-parallel: unset it"
            )
        self.precision = config.precision
        self.model: nn.Module
        self.module: MixtralForCausalLM

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.accelerator.is_main_process

    def prepare(self, model: MixtralForCausalLM, config: OptimConfig) -> None:
        """Places a model that is built alike on every process, and builds its optimizer.

        Args:
            model: in fp32; with bf16, that becomes the master copy and the model its bf16 image.
            config: of the optimizer.
        """
        model.to(self.device)
        self._masters = MasterWeights(model) if self.precision == "bf16" else None
        parameters = dict(model.named_parameters()) if self._masters is None else self._masters.by_name
        self._parameters = list(parameters.values())
        self.optimizer = build_optimizer(parameters, config)
        self.max_grad_norm = config.max_grad_norm
        self.module = model
        self.model = self.accelerator.prepare_model(model)

    def place(self, batch: Batch) -> Batch:
        """Moves a batch to the device, in the form that the attention backend keeps documents apart in."""
        if self.module.config._attn_implementation.startswith("flash"):  # varlen kernels take one long row
            batch = batch.flattened()
        return batch.to(self.device)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds this process's share of the gradient.

        Args:
            loss: this process's part of a loss that is the sum of all processes' parts.
            last: whether the optimizer step follows; until then gradients stay local.
        """
        local = not last or self._masters is not None  # the masters' gradients are averaged in fp32, by `step`
        with self.accelerator.no_sync(self.model) if local else contextlib.nullcontext():
            self.accelerator.backward(loss * self.world_size)  # gradients are averaged, and ours are parts of a sum
        if self._masters is not None:
            self._masters.collect_gradients()

    def step(self, lr: float) -> float:
        """Clips the gradient and takes the optimizer step.

        Args:
            lr: learning rate of this step.

        Returns:
            The global gradient norm before clipping.

        Raises:
            NumericsError: when the norm is not finite, on every process; nothing is updated then.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if self._masters is not None and self.world_size > 1:
            for pending in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                pending.wait()
            torch._foreach_div_(gradients, self.world_size)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise NumericsError(
                f"the gradient norm is {norm.item()}: no update was made; lower optim.lr or look at the data"
            )
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._masters is not None:
            self._masters.publish()
        return norm.item()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the processes."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Takes the largest over the processes, element by element."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, op=operation)
        return tensor

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs a function on the main process; every process gets its result, or raises its error."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def first_on_each_host(self, function: Callable[[], T]) -> T:
        """Runs a function on every process, on one of each host before its others: they find its files.

        Every process raises the first error of any.
        """
        result: list[T] = []

        def attempt(now: bool) -> None:
            error = None
            if now:
                try:
                    result.append(function())
                except UserError as caught:
                    error = caught
            errors: list[Any] = [error]
            if self.world_size > 1:
                errors = [None] * self.world_size
                dist.all_gather_object(errors, error)
            for found in errors:
                if found is not None:
                    raise found

        attempt(self.accelerator.is_local_main_process)
        if self.world_size > 1:
            attempt(not self.accelerator.is_local_main_process)
        return result[0]

    def close(self, *, wait: bool) -> None:
        """Leaves the process group; with `wait`, once all others do, since the main one may still be writing."""
        if wait:
            self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
