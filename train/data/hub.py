"""Whether the hub can be reached, asked once and answered in seconds."""

import httpx
from huggingface_hub import constants

from train.errors import MachineError

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
