"""`htsr finetune` for launchers that start a module: `accelerate launch -m htsr.finetune --config recipe.yaml`."""

from __future__ import annotations

import sys

from htsr_cli.main import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
