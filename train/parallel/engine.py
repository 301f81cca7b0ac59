"""The processes of a run: how they meet, add up figures, and share one model through accelerate."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from mixtral import MixtralConfig
from mixtral.modeling import MixtralPreTrainedModel as Model
from mixtral.weights.names import is_stacked, trained_parameters, unwrapped
from train.config import Config
from train.data.labelled import AnyBatch
from train.errors import MachineError, UserError
from train.parallel.exchange import Traffic
from train.parallel.launcher import number_of_processes
from train.parallel.meeting import meet
from train.parallel.state import EngineState
from train.parallel.watchdog import Watchdog

T = TypeVar("T")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Kind = Literal["weights", "trained", "masters", "gradients"]
Weights = Callable[[range], Iterator[tuple[str, Tensor]]]


class Piece(NamedTuple):
    """A parameter of the whole model, or one expert's part of it.

    Attributes:
        name: the parameter's name.
        expert: which expert's, for the experts' stacked parameters.
        tensor: its values; on the main process, None on the others.
    """

    name: str
    expert: int | None
    tensor: Tensor | None


class Engine(ABC):
    """Owns the process group, the device, the model and the optimizer.

    Attributes:
        rank, world_size: this process's number and how many there are.
        device: where the model and the batches live.
        parallel: how the processes share the work.
        expert_ranks: over how many consecutive processes each layer's experts are split.
        module: the model itself, with this rank's experts; `model` is the same, wrapped for training.
        state: what training changes, by logical name.
        watchdog: is told how the work gets on.
    """

    module: Model
    model: Any
    state: EngineState

    def __init__(self, config: Config, **options: Any) -> None:
        cpu = not torch.cuda.is_available()
        handlers: list[Any] = options.pop("kwargs_handlers", [])
        if number_of_processes() > 1 or config.parallel.zero > 0:
            meet("gloo" if cpu else "nccl", config.parallel.meeting_seconds)
            handlers.append(InitProcessGroupKwargs(backend="gloo" if cpu else None))  # accelerate would guess wrong
        self.accelerator = Accelerator(kwargs_handlers=handlers, **options)
        self.parallel = config.parallel
        self.expert_ranks = config.parallel.expert
        self.dtype = DTYPES[config.train.precision]
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.watchdog = Watchdog(self.rank, self.world_size, config.train.hang_seconds)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def experts(self, count: int) -> range:
        """Gives those of `count` experts per layer that this process holds."""
        each = count // self.expert_ranks
        first = self.rank % self.expert_ranks * each
        return range(first, first + each)

    @abstractmethod
    def prepare(self, model: Model, weights: Weights) -> None:
        """Fills a model and builds its optimizer.

        Args:
            model: on the meta device.
            weights: yields the values of every parameter, of the experts in a range alone.
        """

    def hold(self, model: Model, weights: Weights) -> None:
        """Fills a model that is not trained, without an optimizer; arguments as of `prepare`."""
        for _ in fill(model, weights(self.experts(model.config.num_local_experts)), self.dtype):
            pass
        self.module = self.model = model.to(self.device)

    def drop(self) -> None:
        """Lets go of the model, so that another one has its memory."""
        for name in ("module", "model"):
            self.__dict__.pop(name, None)

    def one_pass(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Must be around a pass forward and its `backward`; `last` as there."""
        return contextlib.nullcontext()

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds this process's share of the gradient.

        Args:
            loss: this process's part of a loss that is the sum of all processes' parts.
            last: whether the optimizer step follows; the gradient is then that of all processes.
        """

    def look_at(self, model: nn.Module) -> None:
        """Has what this process computes of the gradient looked at before that of others is added to it.

        The watchdog hears of each pass.

        Must be called before an engine wraps the model, or its own hooks come first.
        """
        self.watchdog.attend(model)
        self._seen = torch.zeros((), device=self.device)
        for parameter in trained_parameters(model).values():
            parameter.register_post_accumulate_grad_hook(self._look)

    def _look(self, parameter: Tensor) -> None:
        """Turns `_seen` into NaN where a gradient holds what is not finite: its sum does not either then."""
        assert parameter.grad is not None
        self._seen += parameter.grad.sum().float() * 0

    def faults(self) -> Tensor:
        """Says whether there is anything not finite in the gradient, between the last `backward` and `step`: (2,).

        Of what this process computed, and of what it would step with, as far as it knows before it does.
        """
        return torch.stack([self._seen.isnan(), torch.zeros_like(self._seen, dtype=torch.bool)])

    @abstractmethod
    def discard(self) -> None:
        """Drops the gradient of a step that no process takes; nothing is updated."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clips the gradient and takes the optimizer step.

        Args:
            lr: learning rate of this step.

        Returns:
            The global gradient norm before clipping.

        Raises:
            NumericsError: when the norm is not finite, on every process; nothing is updated then, and the gradient is
                dropped.
        """

    def traffic(self) -> Traffic:
        """Gives the rows that this process's tokens were routed in since it was last asked, where experts are split."""
        return Traffic()

    @abstractmethod
    def local(self, kind: Kind, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yields this process's weights with its experts, each whole while it is looked at.

        Or those alone that are trained, or the masters of these, which the optimizer updates, or their gradients.

        Every process must go through it; gradients are there between the last `backward` and `step`.

        Args:
            kind: which of these.
            names: of those wanted; by default all.
        """

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """Yields what processes hold alike between two updates, in the same order on all: weights, frozen ones too.

        Of what is split, such as experts, only those processes do that hold the same part.
        """
        for name, parameter in self.module.named_parameters():
            yield unwrapped(name), parameter

    def pieces(self, kind: Kind = "weights") -> Iterator[Piece]:
        """Yields the whole model, or what `local` says, to the main process; every process must go through it."""
        return self.whole(self.local(kind))

    def whole(self, local: Iterable[tuple[str, Tensor]]) -> Iterator[Piece]:
        """Yields whole what each process holds with its own experts alone; every process must go through it."""
        for name, values in local:
            self.watchdog.beat()
            if not is_stacked(name):
                yield Piece(name, None, values if self.is_main else None)
                continue
            for owner in range(self.expert_ranks):
                for index in range(len(values)):
                    expert = self._expert_of(owner, values[index])
                    yield Piece(name, owner * len(values) + index, expert if self.is_main else None)

    def _expert_of(self, owner: int, mine: Tensor) -> Tensor:
        """Moves an expert's values to the main process from that of the first group that holds them."""
        if owner > 0 and self.is_main:
            mine = torch.empty_like(mine)
            dist.recv(mine, src=owner)
            self.watchdog.transferred()
        elif owner > 0 and self.rank == owner:
            dist.send(mine.contiguous(), dst=0)
            self.watchdog.transferred()
        return mine

    def place(self, batch: AnyBatch) -> AnyBatch:
        """Moves a batch to the device, in the form that the model takes."""
        return place(batch, self.module.config, self.device)

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

    def gather(self, item: T) -> list[T]:
        """Gives every process what each of them has, by rank."""
        items: list[Any] = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items

    def everywhere(self, function: Callable[[], T]) -> T:
        """Runs a function on every process; all of them raise the first error of any."""
        result, error = attempt(function)
        for found in self.gather(error):
            if found is not None:
                raise found
        return cast(T, result)

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs a function on the main process; every process gets its result, or raises its error."""
        outcome: list[Any] = [*attempt(function)] if self.is_main else [None, None]
        if self.world_size > 1:
            dist.broadcast_object_list(outcome)
        result, error = outcome
        if error is not None:
            raise error
        return cast(T, result)

    def first_on_each_host(self, function: Callable[[], T]) -> T:
        """Runs a function on every process, on one of each host before its others: they find its files.

        Every process raises the first error of any.
        """
        is_first = self.accelerator.is_local_main_process
        early = self.everywhere(lambda: function() if is_first else None)
        late = self.everywhere(lambda: None if is_first else function())
        return cast(T, early if is_first else late)

    def close(self, *, wait: bool) -> None:
        """Leaves the process group; with `wait`, once all others do, since the main one may still be writing."""
        if wait:
            self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()


def attempt(function: Callable[[], T]) -> tuple[T | None, UserError | None]:
    """Runs a function; returns its result, or its error where that is the user's to mend."""
    try:
        return function(), None
    except UserError as error:
        return None, error
    except OSError as error:
        return None, MachineError(f"{error.filename or 'a file'}: {error.strerror or error}")


def place(batch: AnyBatch, model: MixtralConfig, device: torch.device) -> AnyBatch:
    """Moves a batch to a device, in the form that a model's attention backend keeps documents apart in."""
    if str(model._attn_implementation).startswith("flash"):  # varlen kernels take one long row
        batch = batch.flattened()
    return batch.to(device)


def fill(
    model: nn.Module, values: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, nn.Parameter]]:
    """Materialises the parameters of a model that is on the meta device, yielding each as it comes.

    Args:
        model: to be filled in place; tied parameters stay tied.
        values: name, as of a model that nothing wraps, and value of every parameter, in any order.
        dtype: of the parameters; bytes stay bytes.

    Raises:
        RuntimeError: for a value without a parameter, of another shape, or a parameter without a value.
    """
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    missing = {unwrapped(name): parameter for name, parameter in model.named_parameters()}
    for name, value in values:
        if name not in missing or missing[name].shape != value.shape:
            raise RuntimeError(f"{name} {tuple(value.shape)} is no parameter of the model")
        empty = missing.pop(name)
        value = value.to(dtype) if value.is_floating_point() else value
        filled = nn.Parameter(value, requires_grad=empty.requires_grad)
        for module, attribute in places[empty]:
            setattr(module, attribute, filled)
        yield name, filled
    if missing:
        raise RuntimeError(f"no values for {', '.join(missing)}")
