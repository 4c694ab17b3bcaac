"""What a run says: on the terminal beside the bars of the progress, and with the time in a file."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mimu.runs.files import naming


@dataclass(frozen=True)
class Log:
    """Says messages on the terminal and in a file. The prefix tells which process it is, where there are several."""

    path: Path
    prefix: str = ""

    def __call__(self, message: str) -> None:
        """Says it on both. Raises ArtifactError where the file cannot be written."""
        with suppress(OSError):  # nobody reads the terminal any more: `main.py | head`
            tqdm.write(f"{self.prefix}{message}")
            sys.stdout.flush()
        self.note(message)

    def note(self, message: str) -> None:
        """Says it in the file alone, with the time. Raises ArtifactError where that cannot be written."""
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.prefix}{message}\n")
