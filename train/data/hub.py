"""The hub: whether it can be reached, asked once and answered in seconds, and which revision of it is meant."""

from pathlib import Path

import httpx
from huggingface_hub import constants, snapshot_download

from train.errors import ConfigError, MachineError

TIMEOUT_SECONDS = 5.0


def require_hub(wanted: str) -> None:
    """Returns when the hub answers, or when the user works from its cache with HF_HUB_OFFLINE=1.

    The hub's own client tries for most of a minute before it gives up.

    Args:
        wanted: the key and value that need it, for the message.

    Raises:
        MachineError: when it does not answer.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        httpx.head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        raise MachineError(
            f"{wanted}: no such file or folder, and the hub at {constants.ENDPOINT} cannot be reached ({error}); "
            "HF_HUB_OFFLINE=1 uses what is in its cache"
        ) from None


def split_revision(name: str) -> tuple[str, str | None]:
    """Divides ID@REVISION into a hub id and a commit, tag or branch; None where none is named.

    Raises:
        ConfigError: for an empty revision.
    """
    repository, mark, revision = name.partition("@")
    if mark and not revision:
        raise ConfigError(f"{name} names no revision: {repository}@ is to be followed by a commit, tag or branch")
    return repository, revision or None


def download(name: str, patterns: list[str], wanted_by: str) -> Path:
    """Fetches files of a model from the hub, or finds them in its cache.

    Args:
        name: hub id, or ID@REVISION.
        patterns: of the files.
        wanted_by: the key, for the message.

    Raises:
        MachineError: when they are not to be had.
    """
    repository, revision = split_revision(name)
    require_hub(f"{wanted_by}={name}")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MachineError(f"{wanted_by}={name}: no such folder, and not to be had from the hub ({reason})") from None
