"""Preparing chats: tokenized with a mask of the answers and packed, against `datasets` and TRL's packing.

usage: python -m bench.data [--megabytes 20] [--length 4096] [--rounds 3] [--json FILE]

The chats ask for functions of the installed Python packages, and their source is the answer: real lengths. Both sides
read the same file with the same tokenizer and template, cut what is longer than a row, and find no cache. The peer does
what TRL's SFTTrainer does with `packing=True`. Needs the peer: pip install --no-deps trl==1.16.0.
"""

import argparse
import ast
import importlib.util
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.instruments import in_turns, median, spread

SIDES = ("ours", "trl")


def functions(limit: int) -> Iterator[dict[str, Any]]:
    """Yields chats about functions, in a fixed order, until so many bytes."""
    taken = 0
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
                tree = ast.parse(text)
            except (SyntaxError, ValueError):  # tests of the interpreter are bad on purpose
                continue
            lines = text.splitlines(keepends=True)
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (asked := ast.get_docstring(node)):
                    source = "".join(lines[node.lineno - 1 : node.end_lineno])
                    said = [
                        ("user", f"Write {node.name} of {path.stem}: {asked.splitlines()[0]}"),
                        ("assistant", source),
                    ]
                    row = {"messages": [{"role": role, "content": content} for role, content in said]}
                    taken += len(json.dumps(row))
                    yield row
                    if taken >= limit:
                        return


def ours(path: Path, length: int) -> tuple[int, int]:
    """Prepares the rows; returns the tokens in them and how many there are."""
    from train.compose import compose
    from train.data.build import open_documents, pack
    from train.data.tokenizer import open_tokenizer

    words = [
        "model=mixtral_8x7b",
        "data=files",
        f"data.path={path}",
        f"data.held_out_path={path.with_name('few.jsonl')}",
    ]
    words += ["data.tokenizer=mixtral", "data.chat_template=mixtral", "data.too_long=cut", "train.max_steps=1"]
    config = compose([*words, f"data.sequence_length={length}"]).config
    training, held_out = open_documents(config.data)
    tokenizer = open_tokenizer("mixtral", config.model.vocab_size, training, "mixtral")
    rows = pack(training, held_out, tokenizer, config).rows
    assert rows is not None
    return rows.tokens_per_epoch, rows.rows_per_epoch


def trl(path: Path, length: int) -> tuple[int, int]:
    """The same as TRL does it."""
    from datasets import load_dataset
    from trl.data_utils import pack_dataset

    from train.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer("mixtral", 32_000, None, "mixtral")
    chats = load_dataset("json", data_files=str(path), split="train")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    encoded = chats.map(encode, remove_columns=chats.column_names)
    packed = pack_dataset(encoded, length, "bfd")
    return sum(map(len, packed["input_ids"])), len(packed)


def measure(side: str, path: Path, length: int) -> dict[str, Any]:
    """Prepares in this fresh process; returns its seconds, and how full the rows are."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_HOME"] = cache
        importlib.import_module("datasets")
        importlib.import_module("transformers")
        importlib.import_module("trl.data_utils")
        started = time.perf_counter()
        tokens, rows = {"ours": ours, "trl": trl}[side](path, length)
        seconds = time.perf_counter() - started
    return {"seconds": [seconds], "tokens": tokens, "rows": rows, "full": tokens / (rows * length)}


def main() -> None:
    """Prints a table, and writes what is in it as JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.data")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.path, options.length)))
        return
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("bench.data compares with trl: pip install --no-deps trl==1.16.0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chats.jsonl")
        rows = [json.dumps(row) + "\n" for row in functions(round(options.megabytes * 1e6))]
        path.write_text("".join(rows), encoding="utf-8")
        path.with_name("few.jsonl").write_text("".join(rows[:8]), encoding="utf-8")
        print(f"{len(rows):,} chats, {path.stat().st_size / 1e6:.1f} MB, rows of {options.length} tokens")
        words = ["--path", str(path), "--length", str(options.length)]
        found = in_turns("bench.data", SIDES, options.rounds, words)
    figures = []
    for side, runs in found.items():
        seconds = median(runs, "seconds")
        row = runs[0] | {"side": side, "seconds": seconds}
        figures.append(row)
        print(
            f"{side:>6}{seconds:>8.1f} s{median(found['trl'], 'seconds') / seconds:>7.2f} x trl's speed"
            f"{row['tokens']:>12,} tokens in{row['rows']:>7,} rows,{row['full']:>7.2%} full"
            f"   spread {spread(runs, 'seconds'):.0%}"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
