"""`unlearn`: classifiers and samples of the user's own, taken as they come, or refused in one line."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader, Dataset

from mimu.data import Split
from mimu.masking.rankings import TrainedGCN
from mimu.model import MaskingGCN
from mimu.networks.masks import Mask
from mimu.runs.files import InputError
from mimu.unlearning.custom_model import CustomModel, plain_torch
from mimu.unlearning.forgetting import Forgetting, classes_of
from mimu.unlearning.forgetting import RetainScoreError as RetainScoreError
from mimu.unlearning.samples import samples_of


def unlearn(
    model: nn.Module,
    inputs: Any,
    labels: Any = None,
    forget_class: int | Sequence[int] | None = None,
    gcn: MaskingGCN | TrainedGCN | None = None,
    mask_layer: int | str | Sequence[int | str] | None = "auto",
    seed: int = 0,
    *,
    scorer: Literal["gcn", "saliency"] = "gcn",
    erase: bool = False,
    max_fall: float | None = 1.0,
    max_class_fall: float | None = 5.0,
    progress: bool = True,
) -> Mask:
    """The mask that makes a classifier of the user's own forget classes; the model is left as it is, to the bit.

    A copy runs, in evaluation mode and float32, operation by operation (torch.export). What can be masked are weights
    that one linear operation or convolution reads; where the model cannot be exported, the linear layers at its end.
    Other threads may predict meanwhile, but not export or compile (torch.export then switches off oneDNN for a moment).

    model: returns logits; inputs, labels: training samples as it takes them, (samples, ...), and their classes, from 0
        on; or, as inputs alone, a DataLoader or data set of pairs. Some of every class, but for those that a mask on
        the model forgets
    forget_class: one class or several; those of a mask that the model carries stay forgotten: the answer includes it
    gcn: what ranks the weights; None: the pretrained one, whose settings a bare MaskingGCN takes too, and the formula
        (`saliency`) in convolutions and linear layers on tokens, of which it has not seen any
    mask_layer: names, as named_parameters has them, of modules or with * and ?, or indices among what can be masked;
        one or several; None: all; auto: of linear layers at the end the last but one if they are three, else the last
    seed: of the samples that are drawn; scorer: the GCN, or the saliency that it adapts
    erase: takes the classes from what the last layer is given, too (`methods.erasing`), by one direction less in as few
        layers before it as do it: without a GCN, and with mask_layer auto or None
    max_fall, max_class_fall: points that the other classes may lose on the samples, together and each; None: any
    progress: shows bars, on a terminal, and how long a class takes at most

    Warns where a class is left at the largest kappa, or samples are too few to show that it is not, where an attacker
    still finds one that was to be erased, where the model does not know the samples, and where less is masked than was
    asked for.
    Raises RetainScoreError, which has the last mask within the bounds, where the others lose more; InputError, another
    ValueError, where the model is something else, or samples do not fit it or are not finite.
    """
    if isinstance(inputs, DataLoader | Dataset) and forget_class is None:
        labels, forget_class = None, labels
    with plain_torch():
        inputs, labels = samples_of(inputs, labels, progress)
        if erase and mask_layer not in ("auto", None):
            raise InputError(f"mask_layer must be auto or None where classes are erased, not {mask_layer!r}")
        custom = CustomModel.of(model, inputs, mask_layer, progress, erase)
        carried = Mask.on(model)
        train = Split(custom.inputs, labels.to(custom.inputs.device))
        asked = classes_of(forget_class, train.labels, custom.num_classes, carried.forgets if carried else ())
        trained = TrainedGCN.of(gcn, custom.inputs.device)
        if gcn is None and not custom.is_of_features and not erase:
            scorer, trained = "saliency", trained.for_kernels(custom.classifier.shapes[each] for each in custom.masked)
        trained = replace(trained, graphs=replace(trained.graphs, mask_layer=custom.masked, scope="measured"))
        bounds = (max_fall, max_class_fall)
        about = {"scorer": scorer, "erase": erase, "seed": seed, "bounds": bounds, "progress": progress}
        request = Forgetting(model, carried, custom, train, asked, trained, **about)
        request.of_model(request.start, {})  # raises before any work
        return request.answer()
