"""The command line: `cierzo VERB ...`, `python -m train ...`. Words in, exit code out."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import ConfigError, UserError, report
from train.imports import uncollected
from train.unread import quiet_once_unread

if TYPE_CHECKING:
    from train.compose import Composed

USAGE = """\
Cierzo trains Mixtral-style sparse mixtures of experts.

usage: cierzo train [recipe=NAME_OR_PATH] [GROUP=CHOICE ...] [KEY=VALUE ...]
       python -m train ...
       torchrun --nproc_per_node N -m train ...
       torchrun --nproc_per_node N -m train.verify ...    (compares the layout with one process)
       cierzo evaluate ...    (held-out figures of model.init_from, or of several models: evaluate.compare=[A,B])
       cierzo plan ... [plan.gpu=h100-80g plan.gpus=16 plan.search=true]    (memory and time, before there is a machine)
       cierzo generate ...    (text from model.init_from: generate.prompt=TEXT, generate.prompts=FILE, or a chat)
       cierzo inspect_data ...    (checks and describes the data of a recipe; trains nothing)
       cierzo convert --input_dir FOLDER --output_dir FOLDER    (weights; see cierzo convert --help)
       cierzo export adapter=FOLDER output_dir=FOLDER    (merges an adapter into its base; see cierzo export --help)
       cierzo keys    (lists every key, its default and what it may be)

The recipe is applied after the defaults, the command line last.
"""
VERBS = ("train", "verify", "evaluate", "generate", "inspect_data", "plan", "convert", "export", "keys")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: the verb and its words; by default the process's.

    Returns:
        The exit code: 0 done, 2 config, 3 data, 4 checkpoint, 5 numerics, 6 environment, 75 stopped and saved or
        sent back, 128 + n for signal n.

    Raises:
        SystemExit: with the code of SIGPIPE, when nobody reads what is printed any more.
    """
    with quiet_once_unread():
        return _do(argv)


def _do(argv: Sequence[str] | None) -> int:
    """Runs a verb; see `main`."""
    words = list(sys.argv[1:] if argv is None else argv)
    words = [
        word for word in words if not word.startswith(("--local_rank=", "--local-rank="))
    ]  # the deepspeed launcher's
    try:
        if not words or words[0] in ("-h", "--help"):
            print(_help())
            return 0
        verb, *rest = words
        if verb not in VERBS:
            raise ConfigError(f"unknown verb {verb!r}: expected {' | '.join(VERBS)}")
        if verb in ("convert", "export"):
            return _main_of(verb)(rest)
        if "-h" in rest or "--help" in rest:
            print(_help())
            return 0
        if verb == "keys":
            from train.keys import table

            print(table())
            return 0
        if verb in ("plan", "inspect_data"):
            return _main_of(verb)(rest)
        models = _models(rest) if verb == "evaluate" else {}
        composed = next(iter(models.values())) if models else _compose(verb, rest)
    except UserError as error:
        report(error, met=False)
        return error.code
    return _run(verb, composed, models)


def _run(verb: str, composed: "Composed", models: "dict[str, Composed]") -> int:
    """Does what a verb does with processes; returns the exit code."""
    with uncollected():
        from train.run import run

    if verb == "verify":
        from train.verify.verb import shrink, verify

        shrink(composed.config)
        return run(composed, verify)
    if verb == "evaluate":
        from train.evaluate.verb import evaluation

        configs = {name: model.config for name, model in models.items()}
        return run(composed, lambda engine, folder, _: evaluation(engine, folder, configs))
    if verb == "generate":
        from train.generate.verb import generation

        return run(composed, generation, in_folder=False)
    return run(composed)


@uncollected()
def _main_of(verb: str) -> Callable[[Sequence[str]], int]:
    """Gives what runs a verb that takes its words as they are."""
    if verb == "convert":
        from train.convert import main as convert

        return convert
    if verb == "export":
        from train.merge import main as export

        return export
    if verb == "plan":
        from train.plan.verb import main as plan

        return plan
    from train.inspect_data.verb import inspect_data

    return inspect_data


def _compose(verb: str, words: Sequence[str]) -> "Composed":
    """Composes a run's configuration, and refuses what can be seen to fail before torch is imported."""
    from train.compose import compose
    from train.config import check_training

    if verb == "generate":
        return _writing(words)
    composed = compose(words)
    if verb == "train":
        check_training(composed.config)
    else:
        composed.config.checkpoint.resume = "never"  # a proof begins anew
    _check_place(composed)
    return composed


def _writing(words: Sequence[str]) -> "Composed":
    """Composes the configuration of a model that writes, likewise."""
    from train.config import check_generation
    from train.evaluate.models import find_model
    from train.parallel.launcher import check_launch, number_of_processes

    composed = find_model(words, "generate")
    check_generation(composed.config, can_chat=sys.stdin.isatty() and number_of_processes() == 1)
    check_launch(composed.config)
    return composed


def _models(words: Sequence[str]) -> "dict[str, Composed]":
    """Composes the configurations of the models to evaluate, likewise."""
    from train.evaluate.models import find_models

    models = find_models(words)
    for composed in models.values():
        composed.config.checkpoint.resume = "never"
    _check_place(next(iter(models.values())))
    return models


def _check_place(composed: "Composed") -> None:
    """Refuses processes and folders that do not fit."""
    from train.folder import refuse_early
    from train.parallel.launcher import check_launch, is_first

    check_launch(composed.config)
    if composed.config.run.dir and is_first():
        refuse_early(Path(composed.config.run.dir).expanduser(), composed.config)


def _help() -> str:
    from train.compose import groups, recipes

    lines = [USAGE, "recipes:"]
    for name, path in recipes().items():
        lines.append(f"  {name:<27}{path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
    lines.append("\ngroups:")
    lines += [f"  {name:<16}{' | '.join(choices)}" for name, choices in groups().items()]
    return "\n".join(lines)
