"""What overlaps with communication: a layer of experts in parts, or with --gradients the sums of replicated ones.

Experts over two processes, whole and in parts; or a bf16 model that both replicate, whose gradients are summed behind
backward or during it. A pass forward and backward, in turns within the same two processes of one thread, over the free
loopback device and over each link. A link is the loopback device of a network namespace of its own, whose speed the
kernel's token bucket limits, both ways together; so what travels takes time that no core spends, as between hosts. That
needs root, `unshare` and `tc`. What a link adds to the first way on the free device is what there is to hide.

usage: python -m bench.overlap [--links 2gbit,1gbit,500mbit] [--parts 1,2,4 | --gradients] [--rounds N] [--json FILE]
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HIDDEN, INNER, EXPERTS, TOKENS, PROCESSES = 512, 1792, 8, 2048, 2
FREE = "free"
Pass = Callable[[], None]


def experts(parts: Sequence[int]) -> dict[str, Pass]:
    """A pass of this rank's tokens through a layer, forward and backward, in each number of parts."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import torch
    import torch.distributed as dist

    from mixtral import MixtralConfig
    from train.config import ParallelConfig
    from train.parallel.expert import ExpertParallelBlock

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for minutes, of use to inference
    deepspeed.init_distributed("gloo")
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    block = ExpertParallelBlock(config, ParallelConfig(expert=PROCESSES, zero=1), dist.get_rank())
    block.ep_group = dist.group.WORLD
    generator = torch.Generator().manual_seed(dist.get_rank())
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    hidden = torch.randn(1, TOKENS, HIDDEN, generator=generator).requires_grad_()

    def run(number: int) -> None:
        block.parts = number
        block(hidden)[0].square().sum().backward()

    return {str(number): functools.partial(run, number) for number in parts}


def gradients() -> dict[str, Pass]:
    """A pass of this rank's tokens through a model, whose gradients are summed behind backward, and during it."""
    import torch
    import torch.distributed as dist

    from mixtral import MixtralConfig, MixtralForCausalLM
    from train.optim import MasterWeights
    from train.parallel.collected import Collected

    dist.init_process_group("gloo")
    sizes = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    )
    model = model.bfloat16().train()
    masters = MasterWeights(model)
    collected = Collected(masters, PROCESSES)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, sizes["vocab_size"], (TOKENS // 512, 256), generator=generator)

    def run(during: bool) -> None:
        loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
        with collected.during(last=during):
            loss.backward()
        for pending in [] if during else [dist.all_reduce(one, async_op=True) for one in masters.gradients()]:
            pending.wait()
        for master in masters.by_name.values():
            master.grad = None

    return {"behind": functools.partial(run, False), "during": functools.partial(run, True)}


def measure(ways: dict[str, Pass], rounds: int) -> dict[str, list[float]]:
    """Measures this rank's passes, as many of each way; returns their seconds."""
    import torch.distributed as dist

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(1 + rounds):
        for way, run in ways.items():
            dist.barrier()
            started = time.perf_counter()
            run()
            dist.barrier()
            if turn:
                seconds[way].append(time.perf_counter() - started)
    dist.destroy_process_group()
    return seconds


def launch(link: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Runs the two processes over a link; returns what the first one measured."""
    limit = "" if link == FREE else f"tc qdisc add dev lo root tbf rate {link} burst 256kb latency 200ms &&"
    ranks = f"{sys.executable} -m torch.distributed.run --nproc_per_node {PROCESSES} --rdzv-backend c10d"
    ranks += " --rdzv-endpoint localhost:0 -m bench.overlap --measure"
    ranks += f" --rounds {options.rounds} " + ("--gradients" if options.gradients else f"--parts {options.parts}")
    command = ["unshare", "--net", "sh", "-c", f"ip link set lo up && {limit} exec {ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [json.JSONDecoder().raw_decode(said)[0] for said in done.stdout.split("measured ")[1:]]
    if done.returncode != 0 or not found:
        raise SystemExit(f"{link} failed:\n{done.stderr[-3000:]}")
    seconds: dict[str, list[float]] = found[0]
    return seconds


def main() -> None:
    """Measures the links and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.overlap")
    parser.add_argument("--links", default="2gbit,1gbit,500mbit", help="speeds, as tc writes them; with commas between")
    parser.add_argument("--parts", default="1,2,4", help="parts of a layer's tokens; the first is compared with")
    parser.add_argument("--gradients", action="store_true", help="the sums of replicated gradients instead")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each way")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        ways = gradients() if options.gradients else experts([int(number) for number in options.parts.split(",")])
        found = measure(ways, options.rounds)
        if os.environ["RANK"] == "0":
            print("measured " + json.dumps(found), flush=True)
        return
    shape = "a bf16 model of 13.6 M parameters, 1024 tokens each"
    if not options.gradients:
        shape = f"{TOKENS} tokens each, H {HIDDEN}, I {INNER}, {EXPERTS} experts, fp32"
    print(f"{PROCESSES} processes of one thread, {shape}")
    print(f"{'link':>10}{'way':>8}{'seconds':>10}{'spread':>9}{'to hide':>10}{'hidden':>9}{'speed':>9}")
    rows, alone = [], 0.0
    for link in [FREE, *options.links.split(",")]:
        found = launch(link, options)
        seconds = {way: statistics.median(values) for way, values in found.items()}
        whole = next(iter(seconds.values()))
        alone = alone or whole
        for way in found:
            spread = (max(found[way]) - min(found[way])) / seconds[way]
            row = {"link": link, "way": way, "seconds": seconds[way], "spread": spread}
            row |= {"to_hide": whole - alone, "hidden": whole - seconds[way], "speed": whole / seconds[way]}
            rows.append(row)
            cells = f"{link:>10}{way:>8}{seconds[way]:10.3f}{spread:9.0%}"
            print(f"{cells}{whole - alone:10.3f}{whole - seconds[way]:9.3f}{whole / seconds[way]:7.2f} x", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
