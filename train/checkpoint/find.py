"""Which checkpoint a run goes on from: the newest whole one, found by all processes together."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.manifest import check_folder, folder_name, read_manifest, read_state, step_of
from train.errors import CheckpointError
from train.parallel.engine import Engine

ASIDE = ".set-aside"


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte was checked.

    Attributes:
        folder: of it.
        files: their names.
        state: what is not in tensors.
    """

    folder: Path
    files: list[str]
    state: dict[str, Any]


def listed(root: Path) -> list[tuple[int, Path]]:
    """Lists a run's checkpoints and their steps, the newest first; nothing is said of their content."""
    found = [(step, path) for path in root.glob("step-*") if (step := step_of(path.name)) is not None]
    return sorted(found, reverse=True)


def read_name(path: Path) -> str | None:
    """Reads which checkpoint `latest` or `best` names; None where it names none."""
    try:
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if step_of(name) is not None else None


def find(engine: Engine, root: Path, resume: str) -> Found | None:
    """Finds the checkpoint to go on from; every process must call it.

    Each process checks a part of the files. A damaged checkpoint is passed over, and said.

    Args:
        engine: whose processes look.
        root: the folder of the run's checkpoints.
        resume: auto, or the folder of one to begin with where the run has none of its own.

    Returns:
        None where nothing was ever saved.

    Raises:
        CheckpointError: when all are damaged, or the one that was named is.
    """
    names = engine.on_main(lambda: _candidates(root, resume))
    for index, name in enumerate(names):
        folder = Path(name)
        problem = _damage(engine, folder)
        if problem is None:
            return Found(folder, sorted(read_manifest(folder)), read_state(folder))
        following = names[index + 1] if index + 1 < len(names) else None
        if following is None:
            count = f"all {len(names)} checkpoints in {root} are" if len(names) > 1 else "the only checkpoint is"
            raise CheckpointError(f"{problem}; {count} damaged, and no step was taken: the run does not start over")
        if engine.is_main:
            print(f"WARNING: {problem}; looking at the one before, {following}", flush=True)
    return None


def _candidates(root: Path, resume: str) -> list[str]:
    """Lists the folders to look at, in order."""
    _remove_leftovers(root)
    own = [str(path) for _, path in listed(root)]
    chosen = None if resume == "auto" else Path(resume).expanduser().resolve()
    if chosen is not None and (not own or chosen.parent == root.resolve()):
        if step_of(chosen.name) is None:
            raise CheckpointError(f"checkpoint.resume={resume} is no checkpoint's folder, such as {folder_name(100)}")
        if not chosen.is_dir():
            there = f": there are {', '.join(Path(name).name for name in own)}" if own else ""
            raise CheckpointError(f"checkpoint.resume={resume}: no such folder{there}")
        return [str(chosen)]
    named = read_name(root / "latest")
    if not own and ((root / "latest").exists() or any(root.glob("step-*"))):
        raise CheckpointError(f"{root} holds no checkpoint any more, but did: bring one back, or name another run.dir")
    if own and named != Path(own[0]).name:
        print(f"WARNING: {root / 'latest'} names {named or 'no checkpoint'}, the newest is {own[0]}", flush=True)
    return own


def _remove_leftovers(root: Path) -> None:
    """Removes what a death in the middle of writing or deleting left behind."""
    for path in root.glob(".*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _damage(engine: Engine, folder: Path) -> str | None:
    """Says what is wrong with a checkpoint, the same on every process."""
    problem = None
    try:
        check_folder(folder, engine.rank, engine.world_size)
    except CheckpointError as error:
        problem = str(error)
    return next(filter(None, engine.gather(problem)), None)


def set_aside(root: Path, *, newer_than: int) -> None:
    """Renames the checkpoints of steps that the run has not reached any more, so that none of them is gone on from."""
    for step, path in listed(root):
        if step > newer_than:
            aside = path.with_name(path.name + ASIDE)
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)


def delete(root: Path, names: list[str]) -> None:
    """Deletes checkpoints; each is hidden first, so that none is ever seen in part."""
    for name in names:
        hidden = root / f".{name}.deleted"
        (root / name).rename(hidden)
        shutil.rmtree(hidden)
