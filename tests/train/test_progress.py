"""Which process hangs, by what each of them reports."""

import threading

import pytest

from train.parallel.progress import Report, Seen, Verdict, describe, judge, late_ones
from train.parallel.watchdog import Watchdog


def reports(*collectives, places=None):
    """Of processes that have begun so many collectives of each group."""
    places = places or [1] * len(collectives)
    return {
        rank: Report(collectives=counts, places=place, step=3, phase="a training step", owner=f"pid {rank} on h")
        for rank, (counts, place) in enumerate(zip(collectives, places, strict=True))
    }


@pytest.mark.parametrize(
    ("found", "late"),
    [
        (reports({"0": 8}, {"0": 7}), [1]),
        (reports({"0": 7}, {"0": 8}), [0]),
        (reports({"0": 8}, {"0": 7}, {"0": 8}, {"0": 7}), [1, 3]),
        # 2 waits for 3 in their own group, while 0 and 1 wait for both in that of all
        (reports({"0": 8, "1": 5}, {"0": 8, "1": 5}, {"0": 7, "2": 4}, {"0": 7, "2": 3}), [3]),
        # the fewest places decide where collectives do not, and where they contradict each other
        (reports({"0": 8}, {"0": 8}, {"0": 8}, places=[5, 4, 5]), [1]),
        (reports({"0": 8, "1": 2}, {"0": 7, "1": 3}, places=[4, 5]), [0]),
        (reports({"0": 8}, {"0": 8}), [0, 1]),
        (reports({"0": 8}), [0]),
    ],
)
def test_who_lacks_a_collective_that_others_wait_in_is_late(found, late):
    assert late_ones(found) == late


def test_the_first_process_that_lives_speaks():
    found = reports({"0": 7}, {"0": 8}, {"0": 8})
    late = describe(found, [], 30.0)
    assert late.speaker == 0
    assert "30 s (train.hang_seconds): process 0 (pid 0 on h) at step 3, a training step" in late.message
    assert "process 1, 2 waited, at step 3" in late.message
    silent = describe(found, [0], 30.0)
    assert (silent.speaker, silent.silent) == (1, [0])
    assert silent.message.startswith("no sign of life for 30 s (train.hang_seconds) of process 0 (pid 0 on h)")
    assert Verdict.from_json(silent.to_json()) == silent


def test_a_report_comes_back_as_it_was_written():
    (found,) = reports({"0": 8}).values()
    assert Report.from_json(found.to_json()) == found
    assert not Report.from_json(b"").limited


def seen(*times, limited=True, left=()):
    """Processes that lived and moved last at these times."""
    return {
        rank: Seen(Report(sign=1, limited=limited, left=rank in left, places=rank), lived, moved)
        for rank, (lived, moved) in enumerate(times)
    }


@pytest.mark.parametrize(
    ("found", "silent"),
    [
        (seen((99, 90), (99, 89)), []),
        (seen((99, 90), (99, 91)), None),  # one got on
        (seen((99, 90), (99, 90), limited=False), None),  # and may take its time
        (seen((99, 90), (90, 90), limited=False), [1]),  # but not be dead
        (seen((99, 90), (91, 91), limited=False), None),
        (seen((99, 90), (95, 95)), [1]),
        (seen((99, 90), (96, 95)), None),
        (seen((90, 90), (90, 90)), None),  # it is the one that listens which hears nothing
        (seen((99, 90), (80, 80), left=[1]), []),
        (seen((80, 80), (80, 80), left=[0, 1]), None),
        ({}, None),
    ],
)
def test_a_run_hangs_when_none_gets_on_that_must_or_one_is_dead(found, silent):
    verdict = judge(found, 100.0, 10.0)
    assert (verdict and verdict.silent) == silent


def test_a_report_is_a_sign_of_life_and_another_count_is_progress():
    one = Seen(Report(sign=1), 0.0, 0.0)
    one.take(Report(sign=2), 1.0)
    assert (one.lived, one.moved) == (1.0, 0.0)
    one.take(Report(sign=2, collectives={"0": 1}), 2.0)
    assert (one.lived, one.moved) == (1.0, 2.0)
    one.take(Report(sign=3, collectives={"0": 1}, beats=1), 3.0)
    assert (one.lived, one.moved) == (3.0, 3.0)


@pytest.mark.parametrize(("processes", "seconds"), [(1, 5.0), (2, None)])
def test_nobody_watches_a_lone_process_or_where_that_is_not_wanted(tmp_path, processes, seconds):
    with Watchdog(0, processes, seconds) as watchdog:
        watchdog.start(tmp_path)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]
