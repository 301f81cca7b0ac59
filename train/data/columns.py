"""Columns and rows of a dataset that is too long for a Python object of each, which `datasets` makes of rows chosen."""

import hashlib
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from datasets import Dataset


def parts_of(documents: Dataset, *names: str) -> Iterator[pa.RecordBatch]:
    """Yields columns part by part, in the dataset's order, from where they lie."""
    batches = documents.data.table.select(list(names)).to_batches()
    if documents._indices is None:
        yield from batches
        return
    ends = np.cumsum([len(batch) for batch in batches])
    for chosen in documents._indices.column(0).chunks:
        rows = chosen.to_numpy().astype(np.int64)
        places = np.searchsorted(ends, rows, side="right")
        borders = np.flatnonzero(np.diff(places)) + 1
        for start, stop in pairwise([0, *borders.tolist(), len(rows)] if len(rows) else []):
            batch, end = batches[places[start]], int(ends[places[start]])
            yield batch.take(pa.array(rows[start:stop] - end + len(batch)))


def column(documents: Dataset, name: str) -> pa.ChunkedArray:
    """Returns one column of a dataset, in the dataset's order."""
    kind = documents.data.schema.field(name).type
    return pa.chunked_array((part.column(0) for part in parts_of(documents, name)), kind)


def select(documents: Dataset, rows: np.ndarray) -> Dataset:
    """Selects rows, as the dataset's own `select` does.

    Args:
        documents: to select from.
        rows: their indices.
    """
    if not len(rows):
        return documents.select([])
    digest = hashlib.blake2b(documents._fingerprint.encode(), digest_size=8)
    digest.update(np.ascontiguousarray(rows, "<i8").data)
    if documents._indices is not None:
        rows = documents._indices.column(0).to_numpy()[rows]
    indices = pa.table({"indices": pa.array(rows, pa.uint64())})
    return Dataset(
        documents.data,
        info=documents.info,
        split=documents.split,
        indices_table=indices,
        fingerprint=digest.hexdigest(),
    )
