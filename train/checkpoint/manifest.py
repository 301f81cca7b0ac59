"""The manifest of a checkpoint: which files it consists of, their sizes and SHA-256, and its own."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from train.checkpoint.durable import Written, check_file
from train.errors import CheckpointError

FORMAT = 1
NAME, STATE = "manifest.json", "state.json"
LARGEST_BYTES = 100_000_000  # of a JSON file
_FOLDER = re.compile(r"step-(\d{8,})")
_KINDS: dict[str, Any] = {  # of what is in `state.json`
    **dict.fromkeys(("step", "rows_per_step", "processes", "updates"), int),
    "parameters": dict[str, list[int]],
    "frozen": dict[str, str],
    "data": dict[str, int | str] | None,
    "random": list[dict[str, str]],
    "parts": dict[str, dict[str, object]],
    "tracker_id": str,
    "config": dict[str, dict[str, object]],
    "versions": dict[str, str],
}
_FILE = re.compile(r"state\.json|rank-\d{5,}\.safetensors")


def folder_name(step: int) -> str:
    """Names the folder of a step."""
    return f"step-{step:08d}"


def file_name(rank: int) -> str:
    """Names the file of a process."""
    return f"rank-{rank:05d}.safetensors"


def step_of(name: str) -> int | None:
    """Reads the step of a folder's name; None for any other name."""
    found = _FOLDER.fullmatch(name)
    return int(found[1]) if found and folder_name(int(found[1])) == name else None


def render(step: int, files: Mapping[str, Written]) -> str:
    """Writes a manifest.

    Args:
        step: of the checkpoint.
        files: by name.
    """
    listed = {name: {"bytes": file.size, "sha256": file.sha256} for name, file in sorted(files.items())}
    body = {"format": FORMAT, "step": step, "files": listed}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Written]:
    """Reads a checkpoint's manifest and checks it against its own hash.

    Returns:
        The files of the checkpoint, all of them inside of its folder.

    Raises:
        CheckpointError: when it is missing, damaged, of another checkpoint, or names what no checkpoint holds.
    """
    path, step = folder / NAME, step_of(folder.name)
    text = read_text(path)
    try:
        content = json.loads(text)
        files = {str(name): Written(file["bytes"], file["sha256"]) for name, file in content["files"].items()}
        rendered, version = render(content["step"], files), content["format"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})") from None
    for name in files:
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{path} names the file {name!r}, which is none of a checkpoint's: it is not opened")
    if version != FORMAT:
        raise CheckpointError(f"{path} is of format {version}, and this version reads {FORMAT}")
    if rendered != text:
        raise CheckpointError(f"{path} is damaged: it does not have its own SHA-256")
    if content["step"] != step or STATE not in files:
        raise CheckpointError(f"{path} is of step {content['step']}: it belongs to another folder")
    return files


def check_folder(folder: Path, index: int = 0, count: int = 1) -> None:
    """Checks a checkpoint, or the files that are one of several processes' to check.

    Raises:
        CheckpointError: naming the first that is wrong.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link: it is not followed")
    for number, (name, expected) in enumerate(read_manifest(folder).items()):
        if number % count == index:
            check_file(folder, name, expected)
            if name == STATE:
                read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Reads `state.json` of a checkpoint.

    Raises:
        CheckpointError: when it does not hold what a checkpoint of that step does, though its hash be right.
    """
    path = folder / STATE
    try:
        state = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r})") from None
    for name, kind in _KINDS.items():
        if not isinstance(state, dict) or name not in state or not _is_of(state[name], kind):
            raise CheckpointError(f"{path} is damaged: {name} is missing, or not of its kind")
    if state["step"] != step_of(folder.name) or len(state["random"]) != state["processes"]:
        raise CheckpointError(f"{path} is damaged: it is of another step or number of processes than it says")
    return state


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is of a kind, and what is in it too."""
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    outer = get_origin(kind) or kind
    if not isinstance(value, outer) or (outer is int and isinstance(value, bool)):
        return False
    items = value.values() if outer is dict else value if outer is list else ()
    return all(_is_of(item, get_args(kind)[-1]) for item in items)


def read_text(path: Path) -> str:
    """Reads a small file of text.

    Raises:
        CheckpointError: when that cannot be.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link: it is not followed")
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, at most {LARGEST_BYTES} are read")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged: it is not UTF-8") from None
