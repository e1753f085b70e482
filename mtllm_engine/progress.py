"""What is said while something runs: how far it is, and warnings that stand out."""

import sys
import time
from typing import Any

from tqdm import tqdm

LOG_S = 30.0
"""Between two lines of a bar where no terminal shows it."""
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Bar(tqdm):
    """tqdm's bar on a terminal. Elsewhere, as in a log file, whole lines: one every LOG_S seconds
    and, once there was one, one at the end.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.is_live = sys.stderr.isatty()
        self.began_s = self.said_s = time.monotonic()
        if not self.is_live:
            options |= {"bar_format": LINE, "mininterval": LOG_S, "maxinterval": LOG_S}
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.is_live:
            return super().display(msg, pos)
        if time.monotonic() - self.said_s >= LOG_S:
            self._say()
        return False

    def clear(self, nolock: bool = False) -> None:
        if self.is_live:
            super().clear(nolock)

    def close(self) -> None:
        if not self.is_live:
            if not self.disable and self.said_s > self.began_s:
                self._say()
            self.leave = False  # or an empty line would follow
        super().close()

    def _say(self) -> None:
        self.said_s = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()


def warn(message: str) -> None:
    """One line on stderr that no bar overwrites."""
    tqdm.write(f"mtllm: warning: {message}", file=sys.stderr)
