"""Columns and chosen rows of datasets: what `datasets` itself gives, without a Python object a document."""

import tracemalloc

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from train.data.columns import column, select


def numbered(count, first=0):
    rows = range(first, first + count)
    return Dataset.from_dict({"text": [f"text {n}" if n % 3 else None for n in rows], "number": list(rows)})


LAID = {
    "as it is": lambda: numbered(50),
    "of several files": lambda: concatenate_datasets([numbered(7), numbered(30, 7), numbered(1, 37)]),
    "chosen": lambda: concatenate_datasets([numbered(7), numbered(30, 7)]).select([1, 3, 9, 10, 11, 36]),
    "shuffled": lambda: concatenate_datasets([numbered(7), numbered(30, 7)]).shuffle(seed=3),
    "of chosen ones": lambda: concatenate_datasets([numbered(9).select([8, 2, 4]), numbered(5)]),
    "a part": lambda: numbered(50).select(range(20, 40)),
    "empty": lambda: numbered(5).select([]),
}


@pytest.mark.parametrize("name", LAID)
def test_columns_and_chosen_rows_are_those_of_the_dataset(name):
    documents = LAID[name]()
    for key in ("text", "number"):
        assert column(documents, key).to_pylist() == documents[key][:]
    for rows in (np.arange(0, len(documents), 2), np.arange(len(documents))[::-1], np.zeros(0, np.int64)):
        mine, theirs = select(documents, rows), documents.select(rows)
        assert mine[:] == theirs[:]
        assert list(mine) == list(theirs)
        assert column(mine, "text").to_pylist() == theirs["text"][:]
        assert mine.map(lambda row: row)["number"][:] == theirs["number"][:]


def test_what_is_chosen_is_told_apart_in_the_cache_and_the_same_again():
    documents, rows = numbered(50), np.arange(0, 50, 2)
    assert select(documents, rows)._fingerprint == select(documents, rows.astype(np.int32))._fingerprint
    others = (select(documents, rows[1:]), select(numbered(51), rows), select(documents, rows[::-1]))
    assert len({chosen._fingerprint for chosen in (*others, select(documents, rows))}) == 4


def test_no_python_object_is_made_of_each_document():
    documents = Dataset.from_dict({"number": np.arange(200_000)})
    tracemalloc.start()
    try:
        chosen = select(documents, np.arange(0, 200_000, 2))
        assert column(chosen, "number").to_numpy().sum() == sum(range(0, 200_000, 2))
        assert tracemalloc.get_traced_memory()[1] < 100_000 * 50
    finally:
        tracemalloc.stop()
