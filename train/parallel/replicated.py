"""Every process holds the whole model: DistributedDataParallel averages gradients, or in bf16 `Collected` sums them."""

import contextlib
from collections.abc import Collection, Iterator

import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import Tensor

from mixtral.weights.names import trained_parameters, unwrapped
from train.config import MOMENTS, Config
from train.errors import ConfigError, NumericsError
from train.optim import MasterWeights, build_optimizer, global_norm
from train.parallel.collected import Collected
from train.parallel.engine import Engine, Kind, Model, Weights, fill
from train.parallel.state import ReplicatedState, whole_parameters

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class ReplicatedEngine(Engine):
    """Plain data parallelism; see `Engine`."""

    def __init__(self, config: Config) -> None:
        super().__init__(
            config,
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            # the loop's own accumulation; or an environment variable rescales
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        if self.accelerator.distributed_type not in SUPPORTED:
            raise ConfigError(
                f"accelerate was told to use {self.accelerator.distributed_type.value} (its configuration file, or an "
                "ACCELERATE_USE_ variable): unset it; parallel.zero and parallel.expert choose how processes share work"
            )
        self._config = config.optim

    def prepare(self, model: Model, weights: Weights) -> None:
        for _ in fill(model, weights(self.experts(model.config.num_local_experts)), self.dtype):
            pass
        model.to(self.device)
        self.look_at(model)
        self._norm: Tensor | None = None
        self._masters = MasterWeights(model) if self.dtype is torch.bfloat16 else None
        self._collected = Collected(self._masters, self.world_size) if self._masters else None
        parameters = trained_parameters(model) if self._masters is None else self._masters.by_name
        self._parameters = list(parameters.values())
        self.optimizer = build_optimizer(parameters, self._config)
        self.state = ReplicatedState(
            self.optimizer,
            whole_parameters(model, self.rank, self.expert_ranks),
            MOMENTS[self._config.name],
            masters=dict(parameters),
            publish=self._masters.publish if self._masters else None,
            rank=self.rank,
            world_size=self.world_size,
        )
        self.module = model
        self.model = self.accelerator.prepare_model(model) if self._masters is None else model

    def one_pass(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        # DistributedDataParallel decides before a pass forward whether its gradients are averaged
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self._collected is None:
            self.accelerator.backward(loss * self.world_size)  # gradients are averaged, and ours are parts of a sum
            return
        with self._collected.during(last=last):
            self.accelerator.backward(loss)

    def _gradients(self) -> list[Tensor]:
        if self._masters is not None:
            return self._masters.gradients()
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def faults(self) -> Tensor:
        self._norm = global_norm(self._gradients())  # of what should be the same everywhere
        return torch.stack([self._seen.isnan(), ~self._norm.isfinite()])

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.module.zero_grad(set_to_none=True)
        self._norm = None
        self._seen.zero_()

    def step(self, lr: float) -> float:
        norm = global_norm(self._gradients()) if self._norm is None else self._norm
        if not torch.isfinite(norm):
            self.discard()
            raise NumericsError.of_gradient(norm.item())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for part in [self._parameters] if self._masters is None else self._masters.parts():
            if self._config.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(part, self._config.max_grad_norm, norm)
            self.optimizer.step()
        self.discard()
        if self._masters is not None:
            self._masters.publish()
        return norm.item()

    def close(self, *, wait: bool) -> None:
        # DistributedDataParallel must not be the last to own the process group: it would hold the interpreter's lock
        # while it waits for gloo's thread, which needs that lock to let go of the last tensors
        self.drop()
        self.accelerator.free_memory()
        super().close(wait=wait)

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().replicas()
        for name, master in self._masters.by_name.items() if self._masters else ():
            yield f"the master of {name}", master

    def local(self, kind: Kind, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        if kind == "weights":
            parameters = {unwrapped(name): parameter for name, parameter in self.module.named_parameters()}
        elif kind == "trained" or self._masters is None:
            parameters = trained_parameters(self.module)
        else:
            parameters = self._masters.by_name
        models = trained_parameters(self.module)
        for name, parameter in parameters.items():
            if names is not None and name not in names:
                continue
            if kind != "gradients":
                yield name, parameter.detach()
                continue
            gradient = models[name].grad if parameter.grad is None else parameter.grad
            yield name, torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)
