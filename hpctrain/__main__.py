"""`python -m hpctrain`: the command `hpctrain` where its script is not in PATH."""

from __future__ import annotations

from hpctrain.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
