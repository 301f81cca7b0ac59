"""Writing: what others read, whole or not at all."""

import io
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mixtral.weights import WeightsError, names, read
from mixtral.weights.write import HubWriter, Planned, new_folder, write_whole


def planned(model):
    return {name: Planned(torch.float32, shape) for name, shape in names.hub_shapes(model.config).items()}


@pytest.mark.parametrize("bound", [10**9, 50_000])
def test_what_is_written_expert_by_expert_loads_in_transformers_with_identical_logits(tmp_path, make_model, bound):
    model = make_model().eval()
    with new_folder(tmp_path / "hub") as folder:
        model.config.save_pretrained(folder)
        with HubWriter(folder, planned(model), bound) as writer:
            state = model.state_dict()
            for owned in ([6, 1, 4], [0, 2, 3, 5, 7]):  # as from processes that own them, in any order
                for name, tensor in reversed(state.items()):
                    if names.is_stacked(name):
                        writer.add_parameter(name, tensor[owned], owned)
                    elif 0 in owned:
                        writer.add_parameter(name, tensor, owned)
    files = sorted(path.name for path in (tmp_path / "hub").iterdir())
    if bound == 10**9:
        assert files == ["config.json", "model.safetensors"]
    else:
        sizes = [path.stat().st_size for path in (tmp_path / "hub").glob("*.safetensors")]
        assert len(sizes) > 8
        assert max(sizes) < bound + 5000
        index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(info.values())
    input_ids = torch.randint(0, 128, (2, 20))
    ours = type(model).from_pretrained(tmp_path / "hub").eval()
    assert torch.equal(ours(input_ids).logits, model(input_ids).logits)
    again = dict(theirs.state_dict())
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=bound)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read(tmp_path / "theirs"))


def test_the_writer_refuses_what_was_not_planned_comes_twice_or_is_missing(tmp_path):
    def write_all_but_b():
        with HubWriter(tmp_path, {"a": Planned(torch.float32, (4, 2)), "b": Planned(torch.bfloat16, (2,))}) as writer:
            with pytest.raises(ValueError, match="tensor c was not planned"):
                writer.add("c", torch.zeros(2))
            with pytest.raises(ValueError, match=r"tensor a was planned of shape \[4, 2\], not \[4, 3\]"):
                writer.add("a", torch.zeros(4, 3))
            writer.add("a", torch.ones(2, 2), part=1)
            with pytest.raises(ValueError, match="tensor a, part 1, was written before"):
                writer.add("a", torch.ones(2, 2), part=1)
            writer.add("a", torch.full((2, 2), 2.0))

    with pytest.raises(ValueError, match="tensor b was planned, but not written"):
        write_all_but_b()
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [[2, 2], [2, 2], [1, 1], [1, 1]]


def test_a_number_too_large_for_the_planned_dtype_is_refused_and_an_infinity_is_kept(tmp_path):
    with HubWriter(tmp_path, {"a": Planned(torch.float16, (2,)), "b": Planned(torch.float16, (2,))}) as writer:
        writer.add("a", torch.tensor([1.0, float("inf")]))
        with pytest.raises(WeightsError, match=r"tensor b holds 1e\+05, which torch.float16 cannot hold"):
            writer.add("b", torch.tensor([1e5, 0.0]))
        writer.add("b", torch.tensor([6e4, 0.0]))
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1.0, float("inf")]


def test_a_failed_folder_leaves_nothing_and_an_existing_one_is_kept(tmp_path):
    def fail_half_way():
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:  # an empty one is as good as none
        (folder / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="out exists already"):
        new_folder(tmp_path / "out").__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "kept"


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "nothing yet"])
def test_a_folder_that_a_link_leads_to_is_made_where_it_lies(tmp_path, there):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with new_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "file").write_text("x")
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk" / "real").iterdir()] == ["file"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "file", "out", "real"]


def test_two_writers_of_one_folder_do_not_meet(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(BlockingIOError, match="out is being written by another process"):
            new_folder(tmp_path / "out").__enter__()
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_all_is_written_where_the_disk_takes_half_of_what_it_is_given(tmp_path):
    class Slow(io.FileIO):
        def write(self, data):
            return super().write(data[: -(-len(data) // 2)])

    content = bytes(range(256)) * 5000
    with Slow(tmp_path / "file", "w") as file:
        write_whole(file, memoryview(content))
    assert (tmp_path / "file").read_bytes() == content
