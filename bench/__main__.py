"""Runs every bench that needs nothing to be given, one after the other; each says what it proves.

usage: python -m bench [NAME ...]
"""

import subprocess
import sys

BENCHES = {
    "experts": "the expert block alone: beside transformers', and the share of the machine's own matrix products",
    "step": "a whole training step is faster than transformers', in less memory, with the same losses",
    "step --masters": "the same with fp32 master weights on both sides",
    "step --rows 4 --length 2048 --steps 6": "the same at four times the tokens",
    "expert_parallel": "a step with split experts, its memory and its bytes, beside AutoEP, ZeRO-3 and one process",
    "overlap": "rows that travel in parts, while others are computed, hide what a slow link costs",
    "lora": "a LoRA step on attention and experts is faster than PEFT's on transformers' Mixtral, in less memory",
    "generation": "text is written faster than transformers writes it, the same tokens",
    "generation --dtype bfloat16": "the same in bf16",
    "windowed_attention": "a window's time per token does not grow with the length",
    "tiled_attention": "on a CPU, attention in tiles is faster than SDPA",
    "weights": "a load holds what it keeps and no more",
    "sharded_start": "a rank of two that share the experts out holds, while it loads, what it keeps",
    "start": "how long it takes until a run trains",
    "plan": "the planner's memory and time beside runs on this machine",
    "published": "the planner's parts beside published runs",
    "checkpoints": "what a checkpoint costs a run, and its bandwidth beside a plain copy",
    "router_load": "which scope of the router loss balances the experts",
    "faults --quick": "real faults lose nothing",
}


def main() -> None:
    """Runs the benches whose names begin with a word that is given, or all; ends with 1 if one failed."""
    chosen = [one for one in BENCHES if len(sys.argv) == 1 or one.startswith(tuple(sys.argv[1:]))]
    if not chosen:
        sys.exit(f"no bench begins with {' or '.join(sys.argv[1:])}: {', '.join(BENCHES)}")
    failed = []
    for one in chosen:
        name, *words = one.split()
        print(f"\n== python -m bench.{one}: {BENCHES[one]}", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}", *words]).returncode:
            failed.append(one)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
