"""Says who it is, then exits or sleeps: `python -m tests.multiprocess.sleeper FOLDER FATE...`, one fate per rank."""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    part = folder / f"{rank}.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / str(rank))
    fate = sys.argv[2 + rank]
    if fate == "sleep":
        time.sleep(1000)
    print(f"{rank} of {os.environ.get('WORLD_SIZE')}", os.environ.get("MINE"), os.getcwd(), sys.argv[0])
    sys.exit(int(fate))
