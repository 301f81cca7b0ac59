"""Sends a run's figures to W&B: a process of its own that follows metrics.jsonl until its standard input ends.

usage: wandb_follower.py RUN_FOLDER PROJECT offline|online RUN_ID BYTES

A run that goes on keeps its id, and the first so many bytes of metrics.jsonl were sent before.
"""

import json
import select
import sys
from pathlib import Path
from typing import Any

import yaml


def main() -> None:
    """Follows the run; prints one line that says where its figures went."""
    import wandb

    folder, project = Path(sys.argv[1]), sys.argv[2]
    mode: Any = sys.argv[3]
    name, seen = sys.argv[4], int(sys.argv[5])
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, disable_code=True)
    run = wandb.init(
        project=project,
        name=folder.name,
        id=name,
        resume="allow",
        dir=str(folder),
        config=config,
        mode=mode,
        settings=settings,
    )
    if mode == "online":
        (folder / "wandb" / ".reached").touch()
    ended = False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], 0.5)[0])  # standard input is readable once, at its end
        seen = forward(run, folder / "metrics.jsonl", seen)
    pictures = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in sorted((folder / "plots").glob("*.png"))}
    if pictures:
        run.log(pictures)
    where = run.url if mode == "online" else f"written offline; send them with: wandb sync {Path(run.dir).parent}"
    run.finish()
    print(f"W&B: {where}", flush=True)


def forward(run: Any, metrics: Path, seen: int) -> int:
    """Logs the whole lines after byte `seen`; returns the byte after them."""
    if not metrics.exists():
        return seen
    with metrics.open("rb") as file:
        file.seek(seen)
        lines = file.read()
    lines = lines[: lines.rfind(b"\n") + 1]
    for line in lines.splitlines():
        row = json.loads(line)
        for layer, shares in enumerate(row.pop("expert_load", [])):
            row |= {f"expert_load/layer_{layer}/expert_{expert}": share for expert, share in enumerate(shares)}
        for name in ("router_entropy", "router_agreement", "router_kl"):
            row |= {f"{name}/layer_{layer}": value for layer, value in enumerate(row.pop(name, []))}
        run.log(row, step=row["step"])
    return seen + len(lines)


if __name__ == "__main__":
    main()
