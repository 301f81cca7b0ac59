"""Rows: every token once, documents apart, and the same rows however a step is split."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.loader import Data, _steps_of_stream
from train.data.packing import PackedRows, TokenTable, make_row, pack_stream, stack
from train.data.prefetch import Prefetch
from train.data.share import Share
from train.errors import DataError

lengths_and_row = st.tuples(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(2, 17))


def documents_of(lengths):
    """Documents of distinct ids, so that every token can be recognised."""
    ids = itertools.count()
    documents = [[next(ids) for _ in range(length)] for length in lengths]
    return documents, Dataset.from_dict({"input_ids": documents})


@settings(max_examples=60, deadline=None)
@given(lengths_and_row, st.booleans())
def test_an_epoch_holds_each_token_once_and_predicts_all_but_the_first_of_a_document(drawn, shuffle):
    lengths, sequence_length = drawn
    documents, dataset = documents_of(lengths)
    rows = PackedRows(dataset, sequence_length, seed=1, shuffle=shuffle)
    for epoch in range(2):
        batch = stack([rows[epoch * len(rows) + index] for index in range(len(rows))])
        assert sorted(batch.input_ids[batch.token_mask].tolist()) == list(range(sum(lengths)))
        pairs = {
            (given, wanted)
            for given, wanted in zip(
                batch.input_ids.flatten().tolist(), batch.shifted_labels.flatten().tolist(), strict=True
            )
            if wanted != -100
        }
        assert pairs == {pair for document in documents for pair in itertools.pairwise(document)}
        assert (~batch.token_mask).sum() < sequence_length  # padding: less than one row an epoch


@settings(max_examples=60, deadline=None)
@given(lengths_and_row)
def test_positions_restart_with_every_document_and_every_row(drawn):
    lengths, sequence_length = drawn
    documents, dataset = documents_of(lengths)
    first_tokens = {document[0] for document in documents}
    rows = PackedRows(dataset, sequence_length)
    for index in range(len(rows)):
        ids, positions, _, mask = rows[index]
        assert positions[0] == 0
        for place in range(1, sequence_length):
            begins = ids[place] in first_tokens if mask[place] else mask[place - 1]
            assert positions[place] == (0 if begins else positions[place - 1] + 1)


@settings(max_examples=40, deadline=None)
@given(lengths_and_row)
def test_a_stream_is_packed_into_the_same_rows(drawn):
    lengths, sequence_length = drawn
    documents, dataset = documents_of(lengths)
    at_hand = PackedRows(dataset, sequence_length)
    streamed = list(pack_stream(documents, sequence_length))
    assert len(streamed) == len(at_hand)
    for index, row in enumerate(streamed):
        assert all(np.array_equal(mine, other) for mine, other in zip(row, at_hand[index], strict=True))


def test_a_shuffled_stream_holds_the_same_rows_in_another_order():
    documents, _ = documents_of([40] * 5)
    plain = [row[0].tolist() for row in pack_stream(documents, 8)]
    mixed = [row[0].tolist() for row in pack_stream(documents, 8, seed=1, shuffle_buffer=6)]
    assert mixed != plain
    assert sorted(mixed) == sorted(plain)


def test_epochs_have_their_own_order_and_a_seed_repeats_it():
    _, dataset = documents_of([7] * 20)

    def ids(seed, epoch):
        rows = PackedRows(dataset, 10, seed=seed, shuffle=True)
        return [rows[epoch * len(rows) + index][0].tolist() for index in range(len(rows))]

    assert ids(0, 0) == ids(0, 0)
    assert ids(0, 0) != ids(0, 1)
    assert ids(0, 0) != ids(1, 0)


def test_after_the_last_epoch_rows_are_padding():
    _, dataset = documents_of([6, 6])
    rows = PackedRows(dataset, 4, epochs=2)
    assert len(rows) == 6
    assert rows[5][3].all()
    _, _, labels, mask = rows[6]
    assert not mask.any()
    assert (labels == -100).all()


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_step_takes_the_same_rows_however_it_is_split(world, micro, accumulation, streaming):
    documents, dataset = documents_of([5, 9, 14, 3] * 12)
    rows = PackedRows(dataset, 6, seed=3, shuffle=not streaming)
    for step in range(2):
        taken = []
        for rank in range(world):
            share = Share(rank, world, micro, accumulation)
            data = Data(rows, lambda: pack_stream(documents, 6), rows, dataset, 6)
            steps = _steps_of_stream(data.stream(), share) if streaming else data.steps(share)
            micro_batches = next(itertools.islice(steps, step, None))
            assert [batch.input_ids.shape for batch in micro_batches] == [(micro, 6)] * accumulation
            taken += [row for batch in micro_batches for row in batch.input_ids.tolist()]
        expected = [rows[step * 8 + index][0].tolist() for index in range(8)]
        assert sorted(taken) == sorted(expected)


def test_a_global_micro_batch_is_the_same_for_any_number_of_processes():
    of_one = Share(0, 1, 4, 2).rows(3)
    of_two = [Share(rank, 2, 2, 2).rows(3) for rank in range(2)]
    for micro_step in range(2):
        assert list(of_one[micro_step]) == [*of_two[0][micro_step], *of_two[1][micro_step]]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_each_row_once_in_equally_many_batches(world):
    _, dataset = documents_of([5, 9, 14, 3])
    held_out = PackedRows(dataset, 6, epochs=1)
    data = Data(None, None, held_out, dataset, 6)
    batches = [list(data.evaluation(Share(rank, world, 2))) for rank in range(world)]
    assert len({len(mine) for mine in batches}) == 1
    seen = [token for mine in batches for batch in mine for token in batch.input_ids[batch.token_mask].tolist()]
    assert sorted(seen) == list(range(31))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "windowed", "tiled"])
def test_a_packed_row_equals_its_documents_alone(make_model, implementation, window):
    """Logits and gradients, in fp64: nothing is seen or predicted across a border."""
    window = window or (99 if implementation == "windowed" else None)
    model = make_model(torch.float64, attn_implementation=implementation, sliding_window=window)
    parts = [torch.randint(0, 128, (length,)) for length in (5, 9, 2)]
    row = stack([make_row([(part.numpy(), part[1:].numpy()) for part in parts], 20)])
    packed = model(
        input_ids=row.input_ids, position_ids=row.position_ids, shifted_labels=row.shifted_labels, use_cache=False
    )
    packed.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = [model(input_ids=part[None], labels=part[None], num_items_in_batch=13, use_cache=False) for part in parts]
    sum(output.loss for output in alone).backward()
    assert torch.allclose(
        packed.logits[0, :16], torch.cat([output.logits[0] for output in alone]), rtol=1e-10, atol=1e-14
    )
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-9, atol=1e-14), name


@pytest.mark.parametrize("form", ["as it is", "selected", "in chunks"])
def test_a_token_table_reads_any_part_of_any_document(form):
    documents, dataset = documents_of([4, 7, 2, 9, 5])
    if form == "selected":
        dataset, documents = dataset.select([3, 0, 4]), [documents[index] for index in (3, 0, 4)]
    if form == "in chunks":
        dataset = concatenate_datasets([dataset.select([0, 1]), dataset.select([2, 3, 4])])
    table = TokenTable(dataset)
    assert table.lengths.tolist() == [len(document) for document in documents]
    for index, document in enumerate(documents):
        for start, stop in [(0, 99), (1, 3), (len(document) - 1, len(document) + 1)]:
            assert table.read(index, start, stop).tolist() == document[start:stop]


def test_flattened_rows_equal_the_rows(make_model):
    model = make_model(torch.float64)
    _, dataset = documents_of([5, 9, 14, 3])
    rows = PackedRows(dataset, 6, epochs=1)
    batch = stack([rows[index] for index in range(len(rows))])
    logits = [
        model(input_ids=form.input_ids, position_ids=form.position_ids, use_cache=False).logits.flatten(0, 1)
        for form in (batch, batch.flattened())
    ]
    assert torch.allclose(*logits, rtol=1e-10, atol=1e-14)


def test_prefetch_keeps_the_order_and_raises_in_its_place():
    def items():
        yield from range(5)
        raise DataError("bad row")

    ahead = Prefetch(items())
    assert [next(ahead) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="bad row"):
        next(ahead)


def test_closing_a_prefetch_ends_its_thread():
    ahead = Prefetch(itertools.count())
    assert next(ahead) == 0
    ahead.close()
    assert not ahead._thread.is_alive()
