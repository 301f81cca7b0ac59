"""Overlapped exchange: a layer of experts over two processes, whole and in parts, over links of given speeds.

A pass forward and backward, in turns within the same two processes of one thread, over the free loopback device and
over each link. A link is the loopback device of a network namespace of its own, whose speed the kernel's token bucket
limits, both ways together; so what travels takes time that no core spends, as between hosts. That needs root,
`unshare` and `tc`. What a link adds to the pass in one part on the free device is what there is to hide.

usage: python -m bench.overlap [--links 2gbit,1gbit,500mbit] [--parts 1,2,4] [--rounds N] [--json FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HIDDEN, INNER, EXPERTS, TOKENS, PROCESSES = 512, 1792, 8, 2048, 2
FREE = "free"


def measure(parts: list[int], rounds: int) -> dict[int, list[float]]:
    """Measures passes of this rank's tokens, as many of each number of parts; returns their seconds."""
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
    seconds: dict[int, list[float]] = {number: [] for number in parts}
    for turn in range(1 + rounds):
        for number in parts:
            block.parts = number
            dist.barrier()
            started = time.perf_counter()
            block(hidden)[0].square().sum().backward()
            dist.barrier()
            if turn:
                seconds[number].append(time.perf_counter() - started)
    dist.destroy_process_group()
    return seconds


def launch(link: str, options: argparse.Namespace) -> dict[int, list[float]]:
    """Runs the two processes over a link; returns what the first one measured."""
    limit = "" if link == FREE else f"tc qdisc add dev lo root tbf rate {link} burst 256kb latency 200ms &&"
    ranks = f"{sys.executable} -m torch.distributed.run --nproc_per_node {PROCESSES} --rdzv-backend c10d"
    ranks += " --rdzv-endpoint localhost:0 -m bench.overlap --measure"
    ranks += f" --parts {options.parts} --rounds {options.rounds}"
    command = ["unshare", "--net", "sh", "-c", f"ip link set lo up && {limit} exec {ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [json.JSONDecoder().raw_decode(said)[0] for said in done.stdout.split("measured ")[1:]]
    if done.returncode != 0 or not found:
        raise SystemExit(f"{link} failed:\n{done.stderr[-3000:]}")
    return {int(number): seconds for number, seconds in found[0].items()}


def main() -> None:
    """Measures the links and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.overlap")
    parser.add_argument("--links", default="2gbit,1gbit,500mbit", help="speeds, as tc writes them; with commas between")
    parser.add_argument("--parts", default="1,2,4", help="parts of a layer's tokens; the first is compared with")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each number of parts")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = [int(number) for number in options.parts.split(",")]
    if options.measure:
        found = measure(parts, options.rounds)
        if os.environ["RANK"] == "0":
            print("measured " + json.dumps(found), flush=True)
        return
    print(f"{PROCESSES} processes of one thread, {TOKENS} tokens each, H {HIDDEN}, I {INNER}, {EXPERTS} experts, fp32")
    print(f"{'link':>10}{'parts':>8}{'seconds':>10}{'spread':>9}{'to hide':>10}{'hidden':>9}{'speed':>9}")
    rows, alone = [], 0.0
    for link in [FREE, *options.links.split(",")]:
        found = launch(link, options)
        seconds = {number: statistics.median(values) for number, values in found.items()}
        whole = seconds[parts[0]]
        alone = alone or whole
        for number in parts:
            spread = (max(found[number]) - min(found[number])) / seconds[number]
            row = {"link": link, "parts": number, "seconds": seconds[number], "spread": spread}
            row |= {"to_hide": whole - alone, "hidden": whole - seconds[number], "speed": whole / seconds[number]}
            rows.append(row)
            cells = f"{link:>10}{number:8}{seconds[number]:10.3f}{spread:9.0%}"
            print(
                cells + f"{whole - alone:10.3f}{whole - seconds[number]:9.3f}{whole / seconds[number]:7.2f} x",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
