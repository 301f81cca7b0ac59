"""Documents as datasets of token ids, which a second process finds in the cache."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from train.data.labelled import LabelledEncoder
from train.data.templates import Encoder, Sample
from train.data.tokenizer import document_ids

ENCODED = Features(
    {
        "input_ids": List(Value("int32")),
        "trained": List(Value("uint8")),
        "trained_tokens": Value("int32"),
        "target": List(Value("float32")),
        "is_cut": Value("bool"),
        "problem": Value("string"),
        "source": Value("string"),
        "part": Value("int32"),
    }
)
EMPTY = Sample(np.zeros(0, np.int32), np.zeros(0, bool))


def tokenize(documents: Dataset, tokenizer: PreTrainedTokenizerBase, workers: int = 1) -> Dataset:
    """Maps `text` to `input_ids`, cached by the content of the documents, the tokenizer and the code."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": document_ids(tokenizer, batch["text"])}

    features = Features({"input_ids": List(Value("int32"))})
    return _mapped(documents, encode, features, workers, _fingerprint(documents, tokenizer))


def encode(documents: Dataset, encoder: Encoder | LabelledEncoder) -> Dataset:
    """Maps documents to `ENCODED`, cached likewise; those with a problem are empty."""

    def work(batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        samples = iter(encoder.encode([row for row in rows if row["problem"] is None]))
        problems: list[str | None] = []
        kept: list[Sample] = []
        for row in rows:
            sample = next(samples) if row["problem"] is None else row["problem"]
            problems.append(None if isinstance(sample, Sample) else str(sample))
            kept.append(sample if isinstance(sample, Sample) else EMPTY)
        bounds = pa.array(np.cumsum([0, *(len(sample.ids) for sample in kept)]), pa.int32())
        ids, trained = (np.concatenate(values) for values in ([s.ids for s in kept], [s.trained for s in kept]))
        columns = {
            "input_ids": pa.ListArray.from_arrays(bounds, pa.array(ids, pa.int32())),
            "trained": pa.ListArray.from_arrays(bounds, pa.array(trained.view(np.uint8))),
            "trained_tokens": pa.array([int(sample.trained[1:].sum()) for sample in kept], pa.int32()),
            "target": pa.array([list(sample.target) for sample in kept], pa.list_(pa.float32())),
            "is_cut": pa.array([sample.is_cut for sample in kept]),
            "problem": pa.array(problems, pa.string()),
        }
        return pa.table(columns | {name: batch.column(name) for name in ("source", "part")}).cast(ENCODED.arrow_schema)

    fingerprint = _fingerprint(documents, encoder.tokenizer, *encoder.described())
    return _mapped(documents.with_format("arrow"), work, ENCODED, encoder.data.workers, fingerprint).with_format(None)


def _mapped(
    documents: Dataset, work: Callable[[Any], Any], features: Features, workers: int, fingerprint: str
) -> Dataset:
    """Makes a row of each document, or finds them in the cache; what a death cut off there is made anew."""

    def mapped(*, anew: bool) -> Dataset:
        return documents.map(
            work,
            batched=True,
            batch_size=256,
            remove_columns=documents.column_names,
            features=features,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=fingerprint,
            load_from_cache_file=False if anew else None,
            desc="tokenizing",
        )

    try:
        if len(rows := mapped(anew=False)) == len(documents):
            return rows
    except pa.ArrowException:
        pass
    except OSError as error:
        if error.errno is not None:  # of the disk, not of what is in the cache
            raise
    return mapped(anew=True)


def _fingerprint(documents: Dataset, tokenizer: PreTrainedTokenizerBase, *more: str) -> str:
    files = (__file__, *(inspect.getfile(part) for part in (document_ids, Encoder, LabelledEncoder)))
    code = [Path(file).read_text(encoding="utf-8") for file in files]
    described = [*code, documents._fingerprint, str(tokenizer.bos_token_id), str(tokenizer.eos_token_id), *more]
    described.append(tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer))
    return hashlib.blake2b("\0".join(described).encode(), digest_size=8).hexdigest()
