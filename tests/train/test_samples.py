"""Packed samples: whole, apart, full rows, and the loss of padded ones."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.loader import Data
from train.data.packing import stack
from train.data.samples import SampleRows, first_fit_decreasing, pack_sample_stream
from train.data.share import Share
from train.data.tokenized import ENCODED

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=40)


def naive(lengths, capacity):
    """First fit decreasing as it is told."""
    rooms, bins = [], {}
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((place for place, room in enumerate(rooms) if room >= lengths[index]), len(rooms))
        if place == len(rooms):
            rooms.append(capacity)
        rooms[place] -= lengths[index]
        bins[index] = place
    return [bins[index] for index in range(len(lengths))]


def samples_of(lengths, parts=None):
    """Samples of distinct ids, of which every third is not trained."""
    ids = itertools.count()
    rows = []
    for index, length in enumerate(lengths):
        tokens = [next(ids) for _ in range(length)]
        trained = [int(token % 3 > 0) for token in tokens]
        row = {"input_ids": tokens, "trained": trained, "trained_tokens": sum(trained[1:]), "is_cut": False}
        row |= {"target": []}
        rows.append(row | {"problem": None, "source": "", "part": parts[index] if parts else 0})
    return rows, Dataset.from_list(rows, features=ENCODED)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(20, 50))
def test_lengths_are_laid_where_first_fit_decreasing_lays_them(lengths, capacity):
    assert first_fit_decreasing(np.asarray(lengths), capacity).tolist() == naive(lengths, capacity)


@pytest.mark.parametrize(("median", "spread", "capacity"), [(150, 0.8, 2048), (300, 1.0, 4096), (60, 0.6, 1024)])
def test_rows_of_realistic_lengths_are_99_percent_full(median, spread, capacity):
    lengths = np.random.default_rng(0).lognormal(np.log(median), spread, 20_000).astype(int).clip(4, capacity)
    rows = first_fit_decreasing(lengths, capacity).max() + 1
    assert lengths.sum() / (rows * capacity) > 0.99


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.booleans(), st.integers(1, 50))
def test_an_epoch_holds_each_sample_once_whole_and_apart(lengths, shuffle, window):
    given, dataset = samples_of(lengths)
    rows = SampleRows(dataset, 20, window=window, seed=1, shuffle=shuffle)
    for epoch in range(2):
        start = rows._end_of(epoch - 1) if epoch else 0
        found = []
        for index in range(start, rows._end_of(epoch)):
            ids, positions, labels, mask = rows[index]
            edges = [*np.flatnonzero((positions == 0) & mask), mask.sum()]
            for first, last in itertools.pairwise(edges):
                found.append(ids[first:last].tolist())
                assert positions[first:last].tolist() == list(range(last - first))
                expected = [token if token % 3 else -100 for token in found[-1][1:]]
                assert labels[first:last].tolist() == [*expected, -100]
            assert (labels[~mask] == -100).all()
        assert sorted(found) == [row["input_ids"] for row in given]
    assert rows.tokens_per_epoch == sum(lengths)
    assert rows.trained_tokens_per_epoch == sum(row["trained_tokens"] for row in given)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_a_longer_text_is_divided_and_predicts_all_but_its_first_token(lengths):
    given, dataset = samples_of(lengths)
    rows = SampleRows(dataset, 7, window=5)
    batch = stack([rows[index] for index in range(len(rows))])
    assert sorted(batch.input_ids[batch.token_mask].tolist()) == list(range(sum(lengths)))
    predicted = sorted(batch.shifted_labels[batch.shifted_labels >= 0].tolist())
    assert predicted == sorted(token for row in given for token in row["input_ids"][1:] if token % 3)
    pairs = zip(batch.input_ids.flatten().tolist(), batch.shifted_labels.flatten().tolist(), strict=True)
    assert all(label == token + 1 for token, label in pairs if label >= 0)


def test_empty_samples_are_left_out():
    _, dataset = samples_of([3, 0, 4])
    rows = SampleRows(dataset, 10, window=10)
    assert len(rows) == 1
    assert rows[0][3].sum() == 7


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "windowed", "tiled"])
def test_packed_samples_have_the_loss_and_gradients_of_padded_ones(make_model, implementation):
    """In fp64, to 1e-10: nothing is seen across samples, and the sum over trained tokens is the same."""
    window = 99 if implementation == "windowed" else None
    model = make_model(torch.float64, attn_implementation=implementation, sliding_window=window)
    _, dataset = samples_of([5, 9, 2, 14, 7, 3, 11, 8])
    losses, gradients = [], []
    for size in (8, 1):
        rows = SampleRows(dataset, 16, window=size, seed=2, shuffle=True)
        assert len(rows) == (4 if size == 8 else 8)
        batch = stack([rows[index] for index in range(len(rows))])
        trained = int((batch.shifted_labels >= 0).sum())
        model.zero_grad()
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            shifted_labels=batch.shifted_labels,
            num_items_in_batch=trained,
            use_cache=False,
        )
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-10, atol=1e-10 * gradient.abs().max()), name


def test_epochs_have_their_own_rows_and_a_seed_repeats_them():
    _, dataset = samples_of([7, 3, 5] * 20)

    def ids(seed, epoch):
        rows = SampleRows(dataset, 16, window=20, seed=seed, shuffle=True)
        start = rows._end_of(epoch - 1) if epoch else 0
        return [rows[index][0].tolist() for index in range(start, rows._end_of(epoch))]

    assert ids(0, 1) == ids(0, 1)
    assert ids(0, 0) != ids(0, 1)
    assert ids(0, 0) != ids(1, 0)


def test_after_the_last_epoch_rows_are_padding():
    _, dataset = samples_of([6] * 6)
    for epochs, expected in [(2, 12), (1.5, 9), (0.5, 3)]:
        rows = SampleRows(dataset, 8, window=1, epochs=epochs)
        assert len(rows) == expected
        assert rows[expected - 1][3].any()
        assert not rows[expected][3].any()


@pytest.mark.parametrize("shuffle", [False, True])
def test_weights_are_the_parts_shares_and_every_sample_has_its_turn(shuffle):
    _, dataset = samples_of([4] * 30, parts=[0] * 24 + [1] * 6)
    rows = SampleRows(dataset, 8, window=10, shuffle=shuffle, weights=[1.0, 2.0])
    assert rows.passes() == [10 / 24, 20 / 6]
    seen = []
    for epoch in range(12):
        units = rows._plan(epoch).units.tolist()
        assert sum(unit >= 24 for unit in units) == 20
        assert len(units) == 30
        seen += units
    assert {seen.count(sample) for sample in range(24)} == {5}
    assert {seen.count(sample) for sample in range(24, 30)} == {40}


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_a_step_takes_the_same_rows_however_it_is_split(world, micro, accumulation):
    _, dataset = samples_of([5, 9, 14, 3] * 12)
    rows = SampleRows(dataset, 16, window=16, seed=3, shuffle=True)
    for step in range(3):
        taken = []
        for rank in range(world):
            data = Data(rows, None, rows, dataset, 16)
            batches = next(itertools.islice(data.steps(Share(rank, world, micro, accumulation)), step, None))
            taken += [row for batch in batches for row in batch.input_ids.tolist()]
        assert sorted(taken) == sorted(rows[step * 8 + index][0].tolist() for index in range(8))


def test_a_stream_holds_the_same_rows():
    given, dataset = samples_of([5, 9, 14, 3, 20] * 6)
    rows = SampleRows(dataset, 16, window=9)
    pairs = [(np.asarray(row["input_ids"]), np.asarray(row["trained"], bool)) for row in given]
    streamed = list(pack_sample_stream(pairs, 16, window=9))
    assert len(streamed) == len(rows)
    for index, row in enumerate(streamed):
        assert all(np.array_equal(mine, other) for mine, other in zip(row, rows[index], strict=True))
    mixed = list(pack_sample_stream(pairs, 16, window=9, shuffle=True))
    assert sorted(row[0].tolist() for row in mixed) == sorted(row[0].tolist() for row in streamed)
