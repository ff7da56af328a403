"""The tutorial's pictures, drawn by the code of its own page.

python -m reports.pictures.tutorial
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "documentation" / "pages" / "tutorial.md"


def main() -> None:
    """Run the blocks of the page one after the other, and keep what they draw."""
    import matplotlib as mpl
    from htsr_cli.main import main as htsr

    mpl.use("agg")
    namespace: dict[str, object] = {}
    started = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        for language, code in re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
            if language == "python":
                exec(compile(code, PAGE.name, "exec"), namespace)
                continue
            for line in code.splitlines():
                if htsr(shlex.split(line, comments=True)[1:]):
                    raise RuntimeError(f"{line} failed")
        for picture in Path().glob("*.png"):
            shutil.copy(picture, HERE / f"tutorial_{picture.name}")
        os.chdir(HERE)
    names = ("loss", "before", "after", "path")
    print({name: namespace[name] for name in names[1:]}, f"{time.process_time() - started:.0f} s of the processor")


if __name__ == "__main__":
    main()
