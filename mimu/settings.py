"""The settings that the library needs, and the ranges that settings may have."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml

# What settings may be; a config is checked against these words.
Count = Annotated[int, "at least 1"]
Positive = Annotated[float, "above 0"]
NonNegative = Annotated[float, "at least 0"]
Share = Annotated[float, "above 0, at most 1"]
# A number of the masked weights, or a share of them.
Amount = Count | Annotated[float, "above 0, below 1"]


def number_of_weights(amount: Amount, num_vertices: int) -> int:
    """The amount as a number of the masked weights, one at least."""
    return amount if isinstance(amount, int) else max(1, round(amount * num_vertices))


@cache
def library_settings() -> dict[str, Any]:
    """The sections of `settings.yaml`: `erase` and `kernels`."""
    return yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text())
