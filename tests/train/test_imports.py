"""Libraries are imported without looking for garbage, and then left alone."""

import gc
import importlib

from train.imports import uncollected


def test_what_is_imported_is_in_no_later_collection_and_collecting_goes_on(tmp_path, monkeypatch):
    (tmp_path / "imported_once.py").write_text("made = [[] for _ in range(10_000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        made = importlib.import_module("imported_once").made
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    assert not any(found is made for found in gc.get_objects())


def test_nothing_is_kept_where_all_was_imported_before():
    before = gc.get_freeze_count()
    with uncollected():
        mine = [[]]
    assert gc.get_freeze_count() <= before, "what was kept before may be let go of meanwhile, nothing may be added"
    assert any(found is mine for found in gc.get_objects())


def test_a_program_that_collects_nothing_itself_is_left_so():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
