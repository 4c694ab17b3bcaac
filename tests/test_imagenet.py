"""A network of a thousand classes with one image of each; skipped unless IMAGENET_SAMPLES names a folder of these.

docs/scale.py says how to fill the folder.
"""

import os
from pathlib import Path

import pytest
import torch
from running import PROJECT

FOLDER = os.environ.get("IMAGENET_SAMPLES")
pytestmark = pytest.mark.skipif(not FOLDER, reason="IMAGENET_SAMPLES names no folder")
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(PROJECT / "docs"))
    import scale


@pytest.fixture(scope="module")
def network() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    model, images = scale.efficientnet(Path(FOLDER))
    return model, images, scale.logits_of(model, images)


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("method", ["hide", "mask", "erase"])
def test_of_a_thousand_classes_one_and_ten_are_forgotten_at_no_cost(network, method, count):
    outcome = scale.measure_on_images(*network, method, count)
    print(outcome)
    assert outcome["left of the classes"] == 0 and not outcome["message"].startswith("error")
    assert outcome["of these lost, %"] <= (0 if method == "hide" else 0.3)
