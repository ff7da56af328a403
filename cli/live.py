"""What a long run says on stderr: sentences, and one line on how far it is, which the next takes the place of."""

from __future__ import annotations

import shutil
import sys
import time

from htsr_cli.output import Words

from htsr.ranks import is_first
from htsr.reporting.text import visible

_REDRAW, _REPEAT = 0.1, 30.0  # seconds between two words on a terminal, and in a log


class Live:
    """Sentences, and a passing line: drawn over and over on a terminal, in a log a line each half minute.

    Args:
        words: how much is said.
    """

    def __init__(self, words: Words) -> None:
        self.words = words
        self._drawn = False
        self._spoke = time.monotonic()

    def say(self, text: str) -> None:
        """A sentence; the passing line before it goes."""
        self.clear()
        self.words.say(text)
        self._spoke = time.monotonic()

    def show(self, text: str) -> None:
        """How far something is."""
        now, drawn = time.monotonic(), sys.stderr.isatty()
        if self.words.quiet or not is_first() or now - self._spoke < (_REDRAW if drawn else _REPEAT):
            return
        if drawn:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{visible(text)[:width]}")
            sys.stderr.flush()
            self._drawn = True
        else:
            self.words.say(text)
        self._spoke = now

    def clear(self) -> None:
        """Take the passing line away."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False
