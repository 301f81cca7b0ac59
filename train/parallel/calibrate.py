"""What this host's processors reach, for the planner: `torchrun --nproc_per_node N -m train.parallel.calibrate FILE`.

All processes work at once, as in a run, and talk over gloo. Time is the processor's, so that whatever else the machine
does is not counted: the median over repetitions, the mean over processes.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from train.parallel.host_memory import host_bytes
from train.plan.hardware import Device, Efficiency
from train.plan.seconds import ADAM_BYTES, ATTENTION_BACKWARD

REPEATS = 5
ROWS, WIDTH, FEW, WEIGHTS = 512, 1024, 128, 12


def seconds_of(work: Callable[[], object]) -> float:
    """Times some work, done by all processes at once."""
    work()
    found = []
    for _ in range(REPEATS):
        dist.barrier()
        started = time.process_time()
        work()
        found.append((time.process_time() - started) / torch.get_num_threads())
    total = torch.tensor(statistics.median(found), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def product(rows: int, dtype: torch.dtype) -> float:
    """FLOP/s of products and their two gradients, as backward forms them, each with a weight that no cache holds."""
    x, out = torch.randn(rows, WIDTH).to(dtype), torch.randn(rows, WIDTH).to(dtype)
    weights, gradients = torch.randn(WEIGHTS, WIDTH, WIDTH).to(dtype), torch.empty(WEIGHTS, WIDTH, WIDTH, dtype=dtype)

    def work() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            x @ weight.t()
            out @ weight
            torch.mm(out.t(), x, out=gradient)

    return 6 * WEIGHTS * rows * WIDTH * WIDTH / seconds_of(work)


def attention() -> float:
    """FLOP/s of masked attention, forward and backward."""
    batch, heads, length, width = 2, 8, 256, 64
    query, key, value = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    seconds = seconds_of(lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward())
    return 4 * batch * heads * length * length * width * (1 + ATTENTION_BACKWARD) / seconds


def elementwise() -> float:
    """Bytes/s of an operation that reads two tensors and writes a third one, in memory that is new to it."""
    left, right = torch.randn(2**24), torch.randn(2**24)  # so large that each result gets new pages
    return 3 * left.nbytes / seconds_of(lambda: left * right)


def update() -> float:
    """Bytes/s of AdamW."""
    weight = torch.randn(2**23, requires_grad=True)
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return ADAM_BYTES * weight.numel() / seconds_of(optimizer.step)


def sent() -> float:
    """Bytes/s that a process sends in a sum over all."""
    tensor, processes = torch.zeros(2**23), dist.get_world_size()
    return 2 * (processes - 1) / processes * tensor.nbytes / seconds_of(lambda: dist.all_reduce(tensor))


def started() -> float:
    """Seconds of an operation on next to nothing, and its share of a backward pass."""
    one, times = torch.ones(1, requires_grad=True), 200

    def chain() -> None:
        value = one
        for _ in range(times):
            value = value * 1.5
        value.backward()

    return seconds_of(chain) / times / 3  # as many again are counted for each of two passes backward


def measure() -> Device:
    """Measures all that a plan needs to know."""
    processes, memory = dist.get_world_size(), host_bytes()
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    fp32, bf16, bandwidth = product(ROWS, torch.float32), product(FEW, torch.bfloat16), update()
    efficiency = Efficiency(
        matrices=1.0,
        experts=product(FEW, torch.float32) / fp32,
        attention=attention() / fp32,
        memory=elementwise() / bandwidth,
        update=1.0,
        network=1.0,
        launch=started(),
    )
    speed = sent()
    return Device(
        name="cpu",
        memory=memory,
        bf16=bf16,
        fp32=fp32,
        fp8=None,
        bandwidth=bandwidth,
        inside=speed,
        between=speed,
        host=bandwidth,
        per_host=max(1, cores // threads),
        host_memory=memory,
        source=f"measured in processor time by {processes} processes of {threads} threads on {cores} cores",
        efficiency=efficiency,
    )


def main() -> None:
    """Measures, and writes it down on the first process."""
    dist.init_process_group("gloo")
    device = measure()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(dataclasses.asdict(device), indent=2) + "\n", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
