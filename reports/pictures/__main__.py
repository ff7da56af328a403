"""The README's pictures: the terminal table of a real model, and its HTML report in a headless browser.

python -m reports.pictures
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import htsr
from htsr.analysis.tables import metrics_table
from htsr.reporting.terminal import terminal_table
from reports import common

HERE = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HEADLESS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-device-scale-factor=1",
)  # fmt: skip


def main() -> None:
    """Make both."""
    common.arguments(str(__doc__))
    encoder = htsr.analyze(common.minilm(), device="cpu")
    terminal(encoder)
    with tempfile.TemporaryDirectory() as work:
        causal = htsr.analyze(common.smollm2(Path(work)), device="cpu", bulk=True, permuted=True)
        report(replace(causal, label="SmolLM2-135M-Instruct"), Path(work))


def terminal(analysis: htsr.Analysis) -> None:
    """terminal.svg: what `htsr analyze` prints, from the third block on."""
    console = Console(record=True, width=158, file=io.StringIO(), highlight=False)
    rows = [row for row in analysis if row.block is None or row.block >= 4]
    console.print("$ htsr analyze all-MiniLM-L6-v2", style="bold")
    console.print(terminal_table(metrics_table(rows), console.width))
    for table in analysis.tables()[1:]:
        console.print(terminal_table(table, 1000))
    console.save_svg(str(HERE / "terminal.svg"), title="htsr")


def report(analysis: htsr.Analysis, work: Path) -> None:
    """report.png: the top of the HTML report of a 30-block model."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("the picture of the report needs chromium")
    page = work / "report.html"
    analysis.to_html(page)
    command = [browser, *HEADLESS, f"--user-data-dir={work / 'profile'}", "--window-size=1400,1870"]
    command += ["--virtual-time-budget=8000", f"--screenshot={HERE / 'report.png'}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
