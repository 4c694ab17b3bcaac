"""The registry of methods of unlearning: what each one is, and its hyperparameters."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from torch import Tensor

# From a request, and hyperparameters as keywords, to an unlearned classifier, a mask or a PruningResult.
Unlearning = Callable[..., Any]


@dataclass(frozen=True)
class Method:
    """A method of unlearning, and what tables say about it.

    unlearn: the function that unlearns; the first paragraph of its docstring describes it in tables. Its keyword-only
        parameters, or the fields of one that is a dataclass, are hyperparameters (`eval.hyperparameters.<name>`)
    uses_kappa: whether the unlearned classifier depends on `request.kappa`; if not, it is made once for all kappas
    most_needed: a function from a request to the vertices that the class needs most, (K), or to several choices of
        them, (choices, K), whose metrics are averaged; None: the method has no mask efficacy
    paper, needs: the source, and the training samples that the method reads
    touches: nothing, a mask, the output, the representation, one layer, the last layers, or all weights
    runs_with: the default run, whose config names no methods; `all`; or only configs that name it
    """

    unlearn: Unlearning
    uses_kappa: bool = False
    most_needed: Callable[[Any], Tensor] | None = None
    paper: str = ""
    touches: str = "all weights"
    needs: Literal["nothing", "forget set", "retain set", "both sets"] = "both sets"
    runs_with: Literal["default", "all", "name"] = "default"

    @property
    def keywords(self) -> dict[str, Any]:
        """The types of the keyword-only parameters, by name."""
        parameters = inspect.signature(self.unlearn, eval_str=True).parameters
        return {name: each.annotation for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The types of the hyperparameters, by name: the keyword-only parameters, dataclasses as their fields."""
        types: dict[str, Any] = {}
        for name, kind in self.keywords.items():
            types |= get_type_hints(kind, include_extras=True) if is_dataclass(kind) else {name: kind}
        return types

    def arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the keyword arguments of `unlearn` for values of hyperparameters by name."""
        arguments = {name: values[name] for name, kind in self.keywords.items() if not is_dataclass(kind)}
        for name, kind in self.keywords.items():
            if is_dataclass(kind):
                arguments[name] = kind(**{each.name: values[each.name] for each in fields(kind)})
        return arguments

    def about(self) -> dict[str, Any]:
        """Returns what tables say about the method, as JSON holds it."""
        description = (inspect.getdoc(self.unlearn) or "").partition("\n\n")[0].replace("\n", " ")
        return {"does": description, "paper": self.paper, "touches": self.touches, "needs": self.needs}


METHODS: dict[str, Method] = {}


def unlearning_method(name: str, **about: Any) -> Callable[[Unlearning], Unlearning]:
    """Registers a function as a `Method`, with the other fields of that in `about`, for every plot and table."""
    # "gcn" and "experiment" stand beside the methods in the seconds of the JSON.
    if name in (*METHODS, "gcn", "experiment") or not name.isprintable() or not name or "$" in name:
        raise ValueError(f"method {name!a} must have a name of its own, of printable characters without $")

    def register(unlearn: Unlearning) -> Unlearning:
        METHODS[name] = Method(unlearn, **about)
        return unlearn

    return register
