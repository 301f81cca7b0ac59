"""The library of the device, and what `torch.cuda` says of it."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("cuda.cpp")
COMPILER = shutil.which("g++")
GPUS = 8
MEMORY = 80 * 2**30


def torch_folder() -> Path:
    """Where torch is, which must not be imported yet."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def build(folder: Path) -> Path:
    """Compiles the device into a library."""
    torch, library = torch_folder(), folder / "stand_in.so"
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    command = [str(COMPILER), "-O0", "-std=c++20", "-shared", "-fPIC", *include, str(SOURCE)]
    done = subprocess.run(
        [*command, f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return library


class Stream:
    """A stream, or an event, on which nothing is ever left to do."""

    cuda_stream = device_index = stream_id = 0
    device_type = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def install(library: str) -> None:
    """Imports torch with the device in place of CUDA; must come before any other import of torch."""
    folder = torch_folder() / "lib"
    for path in (folder / "libc10.so", folder / "libtorch_cpu.so", Path(library)):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    import torch

    current = 0

    def index(chosen: Any) -> int:
        device = torch.device("cuda", chosen) if isinstance(chosen, int) else torch.device(chosen)
        return current if device.index is None else device.index

    def choose(chosen: Any) -> None:
        nonlocal current
        current = index(chosen)
        torch._C._accelerator_setDeviceIndex(current)

    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132
    )
    host = torch.default_generator
    said: dict[str, Any] = {
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: GPUS,
        "current_device": lambda: current,
        "set_device": choose,
        "get_device_name": lambda _=None: properties.name,
        "get_device_capability": lambda _=None: (properties.major, properties.minor),
        "get_device_properties": lambda _=None: properties,
        "memory_stats": lambda _=None: {},
        "Stream": Stream,
        "Event": Stream,
        "current_stream": Stream,
        "default_stream": Stream,
        "stream": lambda stream: stream or Stream(),
        "nvtx": Stream(),
        "default_generators": [host] * GPUS,
        "manual_seed_all": host.manual_seed,
        "get_rng_state": lambda _=None: host.get_state(),
        "set_rng_state": lambda state, _=None: host.set_state(state),
    }
    said |= dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda _=None: None)
    amounts = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    said |= dict.fromkeys(amounts, lambda _=None: 2**20)
    for name, value in said.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda _: 0  # torch's compiler imports it
    torch.version.cuda = "12.8"
    torch.Stream = Stream
    torch.Tensor.record_stream = lambda *_: None
    torch.accelerator.current_stream = Stream

    from tests.stand_in.collectives import register

    register()
