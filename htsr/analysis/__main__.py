"""`accelerate launch -m htsr.analysis MODEL …`: `htsr analyze` as a module, for launchers that start one."""

from __future__ import annotations

import sys

from htsr_cli.main import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
