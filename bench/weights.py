"""Peak memory and bytes read of loading a Mixtral of 1.2 GB: whole and half of its experts, against transformers.

usage: python -m bench.weights [--dir FOLDER] [--json FILE]

Every figure comes from a process of its own. Memory is the peak resident set above that of a process that imports
the same and builds the model without its data. Bytes are what the disk delivered, the files being evicted from the
page cache before; they include what the kernel reads ahead. FOLDER must lie on a disk: a tmpfs delivers none.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.instruments import resident

EXPERTS = 8
SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": EXPERTS,
}
LOADS = {  # what is measured: the process that it is compared with
    "cierzo, whole": "cierzo, nothing",
    "cierzo, half of the experts": "cierzo, nothing",
    "transformers, whole": "transformers, nothing",
}


def make(folder: Path, sizes: dict[str, int]) -> None:
    """Writes random weights of a model of these sizes, bf16, in shards."""
    from mixtral import MixtralConfig
    from mixtral.weights import names
    from mixtral.weights.write import HubWriter, Planned

    config = MixtralConfig(**sizes, dtype="bfloat16")
    config.save_pretrained(folder)
    tensors = {name: Planned(torch.bfloat16, shape) for name, shape in names.hub_shapes(config).items()}
    with HubWriter(folder, tensors, max_shard_bytes=400_000_000) as writer:
        for name, planned in tensors.items():
            writer.add(name, torch.randn(planned.shape) * 0.02)


def evict(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read() -> int:
    """Bytes that the disk has delivered to this process."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def measure(load: str, folder: Path) -> dict[str, float]:
    """Loads in this fresh process; returns bytes kept, peak resident bytes, bytes read and seconds."""
    if load.startswith("cierzo"):
        from mixtral import weights
    else:
        from transformers.utils import logging

        logging.disable_progress_bar()
    library = importlib.import_module("mixtral" if load.startswith("cierzo") else "transformers")
    config = library.MixtralConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = library.MixtralForCausalLM(config).to(torch.bfloat16)
    tensors = []
    before, started = bytes_read(), time.perf_counter()
    if load == "cierzo, whole":
        weights.load(model, folder)
        tensors = list(model.parameters())
    elif load == "cierzo, half of the experts":
        tensors = [tensor for _, tensor in weights.read(folder, experts=range(EXPERTS // 2))]
    elif load == "transformers, whole":
        tensors = list(library.MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).parameters())
    return {
        "kept": sum(tensor.nbytes for tensor in tensors),
        "peak": resident("VmHWM"),
        "read": bytes_read() - before,
        "seconds": time.perf_counter() - started,
    }


def run(*words: str) -> str:
    """Runs this module in a process of its own and returns what it prints."""
    return subprocess.run(
        [sys.executable, "-m", "bench.weights", *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main() -> None:
    """Makes the files, measures each load, prints a table and removes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to write the weights for a while; by default the temporary one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.dir) as name:
        folder = Path(name)
        run("make", name)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB of bf16 weights, {torch.get_num_threads()} threads, cold page cache")
        titles = ("kept", "peak above start", "peak / kept", "read", "seconds")
        print(f"{'':28}" + "".join(f"{title:>18}" for title in titles))
        found = {}
        for load in (*dict.fromkeys(LOADS.values()), *LOADS):
            evict(folder)
            found[load] = json.loads(run(load, name).splitlines()[-1])
    for load, baseline in LOADS.items():
        row = found[load]
        row["above"] = row["peak"] - found[baseline]["peak"]
        cells = [f"{row[key] / 1e9:.2f} GB" for key in ("kept", "above")]
        cells += [f"{row['above'] / row['kept']:.2f} x", f"{row['read'] / 1e9:.2f} GB", f"{row['seconds']:.1f} s"]
        print(f"{load:28}" + "".join(f"{cell:>18}" for cell in cells))
    if words.json:
        words.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "make":
        make(Path(sys.argv[2]), SIZES)
    elif len(sys.argv) == 3 and sys.argv[1] in {*LOADS, *LOADS.values()}:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
    else:
        main()
