"""The settings that the library needs, and the ranges that settings may have."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml

LIMIT = 1_000_000_000  # the upper bound of numbers that have no other one, so that absurd sizes fail at once


@dataclass(frozen=True)
class Bounds:
    """The range of a number, as the metadata of its annotation: `Annotated[float, Bounds(ge=0, lt=1)]`.

    Args:
        ge, gt, le, lt: at least, above, at most and below this number; without `le` and `lt` at most `LIMIT`
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict]) -> dict[str, Any]:
        # Pydantic calls this method, so that it can check the library's dataclasses and the library need not import it.
        bounds = {name: bound for name, bound in asdict(self).items() if bound is not None}
        return handler(source) | ({} if self.lt else {"le": LIMIT}) | bounds


Count = Annotated[int, Bounds(ge=1)]
Positive = Annotated[float, Bounds(gt=0)]
NonNegative = Annotated[float, Bounds(ge=0)]
Share = Annotated[float, Bounds(gt=0, le=1)]
Amount = Count | Annotated[float, Bounds(gt=0, lt=1)]  # a number of the masked weights, or a share of them


def number_of_weights(amount: Amount, num_vertices: int) -> int:
    """Converts an amount to a number of the masked weights, at least one."""
    return amount if isinstance(amount, int) else max(1, round(amount * num_vertices))


@cache
def library_settings() -> dict[str, Any]:
    """Reads `settings.yaml`: the sections `erase` and `kernels`."""
    return yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text())
