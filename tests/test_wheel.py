"""The wheel in a clean environment: its names, its configuration, and a user's own train.py in the way."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.train.helpers import SMALL, launch, read_json, torchrun, write_corpus

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """An environment with the wheel; of this one it sees the dependencies, and not the checkout."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    target = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True, timeout=120)
    (target / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_installs_two_names_and_carries_configuration_and_recipes(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mixtral", "train"}
    packed = {name for name in names if name.endswith(".yaml")}
    expected = {f"train/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected |= {f"train/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert packed == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.multiprocess
@pytest.mark.parametrize("several", [False, True], ids=["cierzo train", "torchrun --no-python cierzo train"])
def test_it_trains_beside_a_users_own_train_py(clean, several, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')\n")
    (tmp_path / "mixtral.py").write_text("raise SystemExit('the wrong mixtral')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    command = [str(clean / "cierzo"), "train"]
    if several:
        command = [*torchrun(2), "--no-python", *command]
    words = [*SMALL, "tracker=wandb", "evaluate.sample_tokens=0", f"data.path={corpus}", "run.dir=run"]
    done = launch(command, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_json(tmp_path / "run" / "environment.json")["processes"] == 1 + several
    assert "wandb sync" in done.stdout


def test_its_help_lists_the_packed_recipes(clean, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = launch([str(clean / "cierzo"), "--help"])
    assert done.returncode == 0
    assert "pretrain_tiny" in done.stdout
