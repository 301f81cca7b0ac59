"""Runs a run, lets it die and go on, and says which classes any unpickling looked up: `... FOLDER WORDS...`."""

import json
import os
import sys
from pathlib import Path

SEEN: set[str] = set()


def hear(event: str, inputs: tuple) -> None:
    """Notes a class that a pickle names."""
    if event == "pickle.find_class":
        SEEN.add(".".join(map(str, inputs[-2:])))


if __name__ == "__main__":
    sys.addaudithook(hear)
    from tests.multiprocess.many_runs import run, stay_together

    stay_together()
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    codes = [run([*words, f"run.dir={folder / 'run'}"], dies_at=5), run([*words, f"run.dir={folder / 'run'}"])]
    rank = os.environ.get("RANK", "0")
    (folder / f"seen-{rank}.json").write_text(json.dumps({"codes": codes, "seen": sorted(SEEN)}))
