"""The README says what the code does."""

import re
from pathlib import Path

from train.compose import recipes
from train.keys import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_key_table_is_fresh():
    written = re.search(r"<!-- keys -->\n(.*)\n<!-- /keys -->", README, re.DOTALL)
    assert written is not None
    assert written.group(1) == table(), "paste the output of `cierzo keys` between the marks in README.md"


def test_every_recipe_is_in_the_table():
    rows = README.split("| recipe |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == set(recipes())


def test_every_picture_and_script_is_there():
    named = re.findall(r"\]\((launch/[^)]+)\)", README) + re.findall(r"bash (launch/\S+)", README)
    assert len(named) == 7
    assert all((ROOT / name).is_file() for name in named)


def test_the_example_recipe_composes(tmp_path):
    from train.compose import compose

    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    assert compose([f"recipe={tmp_path / 'mine.yaml'}"]).config.train.max_steps == 2000
