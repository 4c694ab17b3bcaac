"""MIMU: machine unlearning by masks. `from mimu import unlearn, Mask` is what a classifier of one's own needs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimu.auditing import audit as audit
    from mimu.masks import Mask as Mask
    from mimu.unlearning import RetainScoreError as RetainScoreError
    from mimu.unlearning import unlearn as unlearn

_PLACES = {
    "unlearn": "mimu.unlearning",
    "RetainScoreError": "mimu.unlearning",
    "Mask": "mimu.masks",
    "audit": "mimu.auditing",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    # Importing PyTorch takes seconds: `main.py --help`, for one, need not wait for it.
    if name not in _PLACES:
        raise AttributeError(f"module 'mimu' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
