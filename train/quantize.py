"""Frozen weights in four bits: those of the attention's projections and of the experts, by bitsandbytes.

A matrix becomes a row of bytes, and the rows of a layer's experts are stacked, in a parameter of the same name: devices
and processes hold it, and checkpoints tell it apart, as any other. It is made again wherever it multiplies, one matrix
at a time, and not kept.

Source: arXiv 2305.14314, section 3: NormalFloat in blocks of 64, whose scales are in eight bits in turn.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mixtral import MixtralConfig
from mixtral.moe import Experts
from mixtral.weights import names
from train.config import QUANTIZED
from train.errors import MachineError
from train.parallel.engine import Weights

BLOCK, OUTER = 64, 256  # weights of one scale, and scales of one scale of theirs
CHUNK = 2**20  # weights quantized at once, which takes some 20 bytes for each


@functools.cache
def library() -> Any:
    """Imports bitsandbytes, and has it quantize and restore a matrix on this machine's device.

    Raises:
        MachineError: when it is not there, or cannot.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(
            torch.eye(BLOCK, device=device), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
        functional.dequantize_4bit(packed, state)
    except Exception as error:  # of the loader, of a missing kernel or of the driver: its kind tells nothing
        raise MachineError(
            f"lora.quantize=nf4 needs bitsandbytes, which cannot be used on this {device}: "
            f"{str(error).strip().splitlines()[0]}; pip install 'cierzo[quantize]', or set lora.quantize=none"
        ) from None
    return functional


@functools.cache
def _codes(device: torch.device) -> Tensor:
    """The 256 values of a scale in eight bits."""
    codes: Tensor = library().create_dynamic_map().to(device)
    return codes


def _parts(shape: Sequence[int]) -> tuple[int, ...]:
    """Gives the bytes of each part of a packed matrix: mean scale, scales of the scales, scales, weights, filling."""
    count = math.prod(shape)
    blocks = -(-count // BLOCK)
    sizes = (4, 4 * -(-blocks // OUTER), blocks, -(-count // 2))
    return *sizes, -sum(sizes) % 4  # so that the next row's fp32 numbers lie where they can be read


def packed_size(shape: Sequence[int]) -> int:
    """Gives the bytes of a packed matrix: about 0.516 a weight."""
    return sum(_parts(shape))


def pack(matrix: Tensor) -> Tensor:
    """Quantizes a matrix; see `unpack`. Returns its bytes, the same wherever a run goes on.

    The mean of the scales is therefore taken in fp64: bitsandbytes' own hangs on the number of threads.
    """
    functional = library()
    pieces = matrix.detach().cpu().reshape(-1).split(CHUNK)
    done = [functional.quantize_4bit(piece.float(), blocksize=BLOCK, quant_type="nf4") for piece in pieces]
    weights, scales = (torch.cat(part) for part in zip(*((w.view(-1), state.absmax) for w, state in done), strict=True))
    mean = torch.tensor([scales.numpy().mean(dtype=np.float64)], dtype=torch.float32)
    scales, outer = functional.quantize_blockwise(scales - mean, blocksize=OUTER)
    filling = scales.new_zeros(_parts(matrix.shape)[-1])
    return torch.cat([mean.view(torch.uint8), outer.absmax.view(torch.uint8), scales, weights, filling])


def unpack(packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Makes a matrix of its bytes.

    Args:
        packed: of `pack`.
        shape: of the matrix.
        dtype: of what is returned.
    """
    functional = library()
    mean, outer, scales, weights, _ = packed.split(_parts(shape))
    state = functional.QuantState(
        absmax=scales,
        shape=torch.Size((math.prod(shape),)),  # or it has a compiler at work where the last of several is odd
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=mean.view(torch.float32)[0],
        state2=functional.QuantState(
            absmax=outer.view(torch.float32), code=_codes(packed.device), blocksize=OUTER, dtype=torch.float32
        ),
    )
    matrix: Tensor = functional.dequantize_4bit(weights.view(-1, 1), state)
    return matrix.view(shape)


class QuantizedMatrices:
    """The matrices of a layer's experts, each made when it is asked for.

    Args:
        packed_EB: their bytes.
        shape: of each.
        dtype: of each.
    """

    def __init__(self, packed_EB: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._packed_EB, self._dtype = packed_EB, dtype
        self.shape = torch.Size((len(packed_EB), *shape))

    def __getitem__(self, expert: int, /) -> Tensor:
        return unpack(self._packed_EB[expert], self.shape[1:], self._dtype)


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is bytes.

    Args:
        linear: the layer, on the meta device.
        dtype: that the weight is made in.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        assert linear.bias is None
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = _bytes_of(linear.weight.shape)
        self.dtype: torch.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        product: Tensor = _Product.apply(x, self.weight, shape, self.dtype)
        return product


class _Product(torch.autograd.Function):
    """`x @ weight.T`, for which the weight is made, and made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.made = shape, dtype
        return F.linear(x, unpack(packed, shape, dtype).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        return gradient @ unpack(packed, *ctx.made).to(gradient.dtype), None, None, None


def _bytes_of(shape: torch.Size) -> nn.Parameter:
    """A parameter without values that holds matrices of a shape, stacked or one alone."""
    size = (*shape[:-2], packed_size(shape[-2:]))
    return nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)


def quantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Has a model on the meta device, adapters included, hold the frozen matrices of attention and experts in bytes.

    Args:
        model: to be changed in place.
        dtype: that it computes in.

    Raises:
        MachineError: see `library`.
    """
    library()
    for module in list(model.modules()):
        if isinstance(module, Experts):
            for name in ("gate_up_proj", "down_proj"):
                setattr(module, name, _bytes_of(getattr(module, name).shape))
            module.opener = partial(QuantizedMatrices, dtype=dtype)
    for name, _ in list(model.named_parameters()):
        if QUANTIZED.fullmatch(names.unwrapped(name)) and not names.is_stacked(name):
            layer, _, attribute = name.removesuffix(".weight").rpartition(".")
            parent = model.get_submodule(layer)
            setattr(parent, attribute, QuantizedLinear(getattr(parent, attribute), dtype))


def quantized(weights: Weights) -> Weights:
    """Gives what fills a model that `quantize` changed, of what would have filled it before."""

    def packed(experts: range) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights(experts):
            if QUANTIZED.fullmatch(name):
                tensor = torch.stack([pack(part) for part in tensor]) if names.is_stacked(name) else pack(tensor)
            yield name, tensor

    return packed


def restored(name: str, tensor: Tensor, model: MixtralConfig, dtype: torch.dtype) -> Tensor:
    """Makes of a parameter's bytes, an expert's or all that there are, what it computes with; others stay.

    Args:
        name: of the parameter.
        tensor: its values.
        model: whose it is.
        dtype: that it computes in.
    """
    if tensor.dtype is not torch.uint8:
        return tensor
    shape = names.shapes(model)[name][-2:]
    if tensor.dim() == 1:
        return unpack(tensor, shape, dtype)
    return torch.stack([unpack(part, shape, dtype) for part in tensor])
