"""What comes from elsewhere runs no code, is of the revision that was asked for, and hears no secret."""

import json
import re
import shutil
import socket
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mixtral.weights import WeightsError
from mixtral.weights.read import read_config
from tests.train.helpers import PYTHON, SMALL, launch, read_json, run_small, write_corpus
from train.cli import main
from train.config import DataConfig
from train.data.hub import download, split_revision
from train.data.sources import load_documents
from train.data.tokenizer import open_tokenizer
from train.errors import ConfigError, MachineError

ROOT = Path(__file__).parents[2]
FIXED = [  # the first version without a known fault; each was looked up in its CVE record or advisory
    ("torch", "2.6", "CVE-2025-32434"),  # weights_only=True runs code
    ("torch", "2.10", "CVE-2026-24747"),  # weights_only=True corrupts memory
    ("transformers", "5", "CVE-2026-1839"),  # a pickle in its trainer's checkpoints
    ("transformers", "5.3", "CVE-2026-4372"),  # config.json names code that is run
    ("transformers", "5.5", "CVE-2026-5241"),  # config.json overrides trust_remote_code=False
    ("deepspeed", "0.15.1", "CVE-2024-43497"),
    ("hydra-core", "1.3.4", "CVE-2026-68508"),  # instantiate calls what a configuration names
    ("hydra-core", "1.3.6", "CVE-2026-106441"),  # so does its logging
    ("hydra-core", "1.3.7", "CVE-2026-106439"),
    ("sentencepiece", "0.2.1", "CVE-2026-1260"),  # a tokenizer.model corrupts memory
    ("jinja2", "3.1.6", "CVE-2025-27516"),  # a chat template leaves the sandbox
    ("pyarrow", "14.0.1", "CVE-2023-47248"),  # a Parquet file runs code
    ("pyyaml", "5.4", "CVE-2020-14343"),
    ("tqdm", "4.66.3", "CVE-2024-34062"),
    ("pillow", "12.1.1", "CVE-2026-25990"),
    ("fonttools", "4.60.2", "CVE-2025-66034"),
    ("filelock", "3.20.1", "CVE-2025-68146"),
    ("requests", "2.32.4", "CVE-2024-47081"),
    ("urllib3", "2.6", "CVE-2025-66418"),
    ("h11", "0.16", "CVE-2025-43859"),
    ("idna", "3.7", "CVE-2024-3651"),
    ("certifi", "2023.7.22", "CVE-2023-37920"),
    ("joblib", "1.2", "CVE-2022-21797"),
    ("werkzeug", "3.0.1", "CVE-2023-46136"),
]


def pinned() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = [re.fullmatch(r"([\w.-]+)==(\S+)", line).groups() for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def required() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def faulty(versions: dict[str, Version]) -> set[str]:
    """Names the faults that versions have, of the packages that they are of."""
    return {cve for name, fixed, cve in FIXED if name in versions and versions[name] < Version(fixed)}


def floors() -> dict[str, Version]:
    bounds = {
        canonicalize_name(one.name): [s.version for s in one.specifier if s.operator == ">="] for one in required()
    }
    return {name: Version(versions[0]) for name, versions in bounds.items() if versions}


def test_no_pinned_version_has_a_known_fault_and_each_is_one_that_we_allow():
    versions = pinned()
    assert {name for name, _, _ in FIXED} <= versions.keys()
    assert faulty(versions) == set()
    for one in required():
        if one.name not in ("cierzo", "flash-attn", "types-PyYAML"):
            assert one.specifier.contains(versions[canonicalize_name(one.name)]), one
    assert faulty(versions | {"torch": Version("2.9.1"), "jinja2": Version("3.1.5")}) == {
        *("CVE-2026-24747", "CVE-2025-27516")
    }


def test_no_version_that_we_allow_has_a_known_fault():
    assert {"torch", "transformers", "deepspeed", "hydra-core", "sentencepiece", "pyarrow"} <= floors().keys()
    assert faulty(floors()) == set()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The export of a tiny run."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder / "corpus.jsonl")
    assert run_small(folder / "run", f"data.path={corpus}", "train.max_steps=1", "evaluate.sample_tokens=0") == 0
    return folder / "run" / "export"


def change(path, **entries):
    path.write_text(json.dumps(read_json(path) | entries))


def plant(folder, marker):
    """Puts code into a folder that leaves a file when it is run, whatever is asked of it."""
    (folder / "planted.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from transformers import MixtralConfig as Config\nfrom transformers import PreTrainedTokenizerFast as Words\n"
    )


def test_a_model_that_wants_code_of_its_own_is_refused_and_none_is_run(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = shutil.copytree(given, tmp_path / "given")
    plant(folder, tmp_path / "ran")
    change(folder / "config.json", auto_map={"AutoConfig": "planted.Config"})
    assert run_small(tmp_path / "run", f"model.init_from={folder}", f"data.path={ROOT / 'README.md'}") == 4
    assert "config.json wants code of its own to be run (auto_map), which never is" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="wants code of its own"):
        read_config(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_wants_code_of_its_own_is_refused_and_none_is_run(given, tmp_path, monkeypatch):
    """Though the answer to every question is yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = shutil.copytree(given, tmp_path / "given")
    plant(folder, tmp_path / "ran")
    settings = {"auto_map": {"AutoTokenizer": [None, "planted.Words"]}, "tokenizer_class": "Words"}
    change(folder / "tokenizer_config.json", **settings)
    for name in ("with a model", "alone"):
        if name == "alone":
            (folder / "config.json").unlink()
        with pytest.raises(ConfigError, match="data.tokenizer=.* wants code of its own to be run .auto_map., which"):
            open_tokenizer(str(folder), 320)
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copy(given / name, folder)
    change(folder / "config.json", model_type="planted", auto_map={"AutoConfig": "planted.Config"})
    assert open_tokenizer(str(folder), 320).unk_token == "<unk>"
    assert not (tmp_path / "ran").exists()


def publish(repository, commits, names):
    """Lays a model's revisions out as the hub's client keeps them, of `commits` the files, of `names` the commits."""
    root = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    for commit, source in commits.items():
        shutil.copytree(source, root / "snapshots" / commit)
    (root / "refs").mkdir()
    for name, commit in names.items():
        (root / "refs" / name).write_text(commit)
    return root / "snapshots"


def test_a_revision_of_the_hub_is_taken_for_model_tokenizer_and_evaluation(given, tmp_path, capsys):
    """Of two commits the main branch has the other one, whose vocabulary and weights cannot be used at all."""
    other = shutil.copytree(given, tmp_path / "other")
    change(other / "config.json", vocab_size=8, hidden_size=64)
    change(other / "tokenizer_config.json", unk_token="<other>")
    pinned, newer = "1" * 40, "2" * 40
    snapshots = publish("someone/model", {pinned: given, newer: other}, {"main": newer, "v1.0": pinned})
    words = [f"data.path={given.parents[1] / 'corpus.jsonl'}", "train.max_steps=1", "evaluate.sample_tokens=0"]
    own = [word for word in SMALL if not word.startswith("model.")]
    for number, revision in enumerate((pinned, "v1.0")):
        folder = tmp_path / f"run-{number}"
        inits = [f"model.init_from=someone/model@{revision}", f"run.dir={folder}"]
        assert main(["train", *own, *inits, *words]) == 0, capsys.readouterr().err
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["hidden_size"] == 32
    assert main(["train", *own, "model.init_from=someone/model", f"run.dir={tmp_path / 'newer'}", *words]) != 0
    assert open_tokenizer("someone/model@v1.0", 320).unk_token == "<unk>"
    assert open_tokenizer("someone/model", 320).unk_token == "<other>"
    assert download("someone/model@v1.0", ["*.json"], "model.init_from") == snapshots / pinned
    compared = [f"evaluate.compare=[someone/model@{pinned},{given}]", f"run.dir={tmp_path / 'compared'}"]
    assert main(["evaluate", *own, *words, *compared]) == 0, capsys.readouterr().err
    with pytest.raises(MachineError, match=r"model.init_from=someone/model@v2: .*not to be had from the hub"):
        download("someone/model@v2", ["*.json"], "model.init_from")
    with pytest.raises(ConfigError, match="someone/model@ names no revision"):
        split_revision("someone/model@")


def test_a_dataset_of_the_hub_is_asked_for_by_its_revision(monkeypatch):
    asked = {}

    def load_dataset(*words, **options):
        asked.update(options, words=words)
        return Dataset.from_list([{"text": "the wind"}])

    monkeypatch.setattr("train.data.sources.load_dataset", load_dataset)
    for revision in ("0123abc", "refs/convert/parquet"):
        load_documents(DataConfig(path=f"someone/rows@{revision}"))
        assert asked["words"][0] == "someone/rows"
        assert asked["revision"] == revision


def test_a_hub_that_cannot_be_reached_ends_with_six_in_time_and_what_was_wanted(tmp_path):
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    started = time.monotonic()
    words = [*SMALL, f"run.dir={tmp_path / 'run'}", f"data.path={ROOT / 'README.md'}"]
    done = launch(PYTHON, *words, "model.init_from=someone/nowhere@v1", **unreachable)
    assert done.returncode == 6, done.stderr
    assert (
        "model.init_from=someone/nowhere@v1: no such file or folder, and the hub at http://127.0.0.1:9" in done.stderr
    )
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_run_of_local_files_asks_nothing_of_the_hub(given, tmp_path):
    """Not offline, with a hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        online = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        words = [f"run.dir={tmp_path / 'run'}", f"data.path={given.parents[1] / 'corpus.jsonl'}", "train.max_steps=1"]
        done = launch(PYTHON, *SMALL, *words, f"model.init_from={given}", timeout=200, **online)
        assert done.returncode == 0, done.stderr
        hub.setblocking(False)
        with pytest.raises(BlockingIOError):
            hub.accept()


def test_a_secret_in_the_environment_or_in_a_mistaken_word_is_found_nowhere(tmp_path, capfd, monkeypatch):
    """W&B, whose files hold the environment and the words of a run in their own way, writes too."""
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    secrets = {
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "HF_TOKEN": "hf_SecretSecretSecretSecretSecretSe",
        "AWS_SECRET_ACCESS_KEY": "secret/of+another+service",
        "MY_PROGRAM_ARGS": "--api-key=sk-another-secret --password hunter-2-hunter",
    }
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    words = [f"data.path={corpus}", "tracker=wandb", "train.max_steps=2"]
    assert run_small(tmp_path / "run", *words) == 0
    said = list(capfd.readouterr())
    for word in ("tracker.api_key=", "WANDB_API_KEY=", "--api-key="):
        assert run_small(tmp_path / "run", *words, f"{word}{secrets['WANDB_API_KEY']}") == 2
        said += capfd.readouterr()
        assert word.partition("=")[0] in said[-1]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for content in [path.read_bytes() for path in files] + [text.encode() for text in said]:
        for secret in (*secrets.values(), "sk-another-secret", "hunter-2"):
            assert secret.encode() not in content
