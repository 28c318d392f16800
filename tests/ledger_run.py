"""`hpctrain` with a ledger: each rank writes which samples it took in which step, and slowly.

    python tests/ledger_run.py FOLDER SECONDS -m hpctrain train ...

Every process has a file of its own in FOLDER, a line of JSON [step, [samples]] for every step that
it has taken; a step takes at least SECONDS. For job scripts, which start `$python -m hpctrain`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    from hpctrain.train.stop import listen

    listen()  # as `hpctrain train` does, before the imports that take time
    from hpctrain.cli.main import main as hpctrain
    from hpctrain.train import loop

    folder, pause = Path(sys.argv[1]), float(sys.argv[2])
    file = folder / f"{platform.node()}-{os.getpid()}-{time.time_ns()}.jsonl"
    advance = loop.advance

    def noted(position: Any, batch: Any, loader: Any) -> None:
        line = json.dumps([position.step, batch.samples.tolist()])
        with file.open("a", encoding="utf-8") as ledger:
            ledger.write(line + "\n")
        time.sleep(pause)
        advance(position, batch, loader)

    loop.advance = noted
    return hpctrain(sys.argv[5:])  # after -m hpctrain


if __name__ == "__main__":
    sys.exit(main())
