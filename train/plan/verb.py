"""`cierzo plan`: what a recipe needs, whether it fits, how fast it will be. Needs no GPU, no weights and no data."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from train.compose import UNNAMED, Composed, compose_without_data, recipes
from train.config import Config
from train.ending import Ending
from train.errors import ConfigError, MachineError
from train.folder import RunFolder, folder_name
from train.parallel.launcher import run_processes
from train.plan.figures import Figures, figures_of
from train.plan.hardware import device_of
from train.plan.layout import Layout

ORGANISATION = "mistralai/"
PUBLISHED = {"Mixtral-8x7B": "mixtral_8x7b", "Mixtral-8x22B": "mixtral_8x22b"}
"""Weights whose sizes conf/model has, so that no file of the hub is needed."""


def main(words: Sequence[str]) -> int:
    """Runs the verb.

    Args:
        words: `recipe=...` and `KEY=VALUE`, as for training, and `plan.*`.

    Returns:
        The exit code: 0 planned, be it that it fits or not; 2 config, 6 environment.
    """
    with Ending() as ending:
        composed = compose_plan(words)
        ending.folder = folder = RunFolder(Path(folder_name(composed)).expanduser().resolve())
        composed.config.run.dir = str(folder.path)
        folder.describe(composed, processes=composed.config.plan.gpus, device=composed.config.plan.gpu)
        ending.message = plan(composed.config, folder, words)
    return ending.code


def compose_plan(words: Sequence[str]) -> Composed:
    """Composes a run as training would, but that no data need be named, and published weights need not be there.

    Raises:
        ConfigError: for what cannot be planned.
    """
    words, published = list(words), None
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    source = given.get("model.init_from") or _recipe(given.get("recipe", "")).get("model", {}).get("init_from")
    organisation, _, name = str(source or "").rpartition("/")
    if f"{organisation}/" == ORGANISATION:
        for stem, group in PUBLISHED.items():
            if name.startswith(stem):
                words = [word for word in words if not word.startswith("model.init_from=")]
                words += [f"model={group}", "model.init_from=null"]
                published = source
    composed = compose_without_data(words)
    composed.config.model.init_from = published or composed.config.model.init_from
    _check(composed.config)
    return composed


def _recipe(choice: str) -> dict:
    """Reads a recipe, or nothing where `compose` will say what is wrong with it."""
    path = recipes().get(choice, Path(choice).expanduser())
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) and isinstance(tree.get("model", {}), dict) else {}


def _check(config: Config) -> None:
    plan, parallel = config.plan, config.parallel
    if plan.gpus % parallel.expert:
        fits = [n for n in range(1, plan.gpus + 1) if plan.gpus % n == config.model.num_local_experts % n == 0]
        raise ConfigError(
            f"parallel.expert={parallel.expert} does not divide plan.gpus={plan.gpus}: use one of "
            f"{', '.join(map(str, fits))}, or plan for a multiple of {parallel.expert} devices"
        )
    if parallel.dispatch != "dropless":
        raise ConfigError(
            f"parallel.dispatch={parallel.dispatch} cannot be planned, only dropless: its buffers are DeepSpeed's"
        )


def plan(config: Config, folder: RunFolder, words: Sequence[str]) -> str:
    """Computes, prints and writes a plan; returns its last word."""
    from train.plan.picture import draw_plan
    from train.plan.report import found, report
    from train.plan.search import best, changes, smallest

    if config.plan.calibrate:
        config.plan.calibration = str(calibrated(folder))
    device = device_of(config.plan)
    figures = figures_of(Layout(config, config.plan.gpus, device.is_gpu), device)
    ways = [] if figures.fits else changes(figures)
    print(report(figures, ways, command(figures, words)))
    described = figures.described() | {"hardware": dataclasses.asdict(device)}
    described |= {"changes": {name: way.described() for name, way in ways}}
    if config.plan.search:
        several, least = best(config, config.plan.gpus, device), smallest(config, device)
        print("\n" + found(several, figures, least, command(least, _with_layout(least, words)) if least else ""))
        described["best"] = [one.described() for one in several]
        described["smallest"] = least and least.described()
    folder.write_json("plan.json", described)
    target = folder.path / "plots" / "plan.png"
    target.parent.mkdir(exist_ok=True)
    draw_plan(figures, target)
    print(f"\nwritten: {folder.path / 'plan.json'}, {target}")
    return "it fits" if figures.fits else "it does not fit"


def _with_layout(figures: Figures, words: Sequence[str]) -> list[str]:
    """Gives the words of a run with those of a layout in place of its own."""
    from train.plan.report import keys_of

    keys = keys_of(figures)
    others = [word for word in words if word.partition("=")[0] not in keys]
    return [*others, *(f"{key}={value}" for key, value in keys.items())]


def command(figures: Figures, words: Sequence[str]) -> str:
    """Gives what starts the run on every host, and, where the last one has fewer devices, on that."""
    layout, device = figures.layout, figures.device
    kept = shlex.join(word for word in words if not word.startswith(("plan.", "run.dir=")))
    if layout.config.data.path == UNNAMED and not layout.config.data.sources:
        kept += f" data.path={UNNAMED}"  # which a plan does without, and the run does not
    hosts = device.hosts(layout.processes)
    each = min(layout.processes, device.per_host) if device.is_gpu else layout.processes
    if layout.processes == 1:
        return f"python -m train {kept}"
    meet = f"--nnodes {hosts} --node_rank R --master_addr FIRST_HOST --master_port 29500 " if hosts > 1 else ""
    rest = layout.processes - (hosts - 1) * each
    last = f"\non the last host: --nproc_per_node {rest}" if rest != each else ""
    return f"torchrun {meet}--nproc_per_node {each} -m train {kept}{last}"


def calibrated(folder: RunFolder) -> Path:
    """Measures this machine; returns the file that says of it."""
    target = folder.path / "calibration.json"
    done = run_processes(2, "train.parallel.calibrate", str(target))
    if done.returncode != 0 or not target.is_file():
        raise MachineError(f"plan.calibrate=true: this machine cannot be measured: {done.stderr.strip()[-500:]}")
    return target
