"""The loss on the stages that a recipe names: one of the package, or a class of one's own, checked where it is used."""

import sys
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mocolayers.method.losses import STAGE_LOSSES
from mocolayers.recipe import ARMS, Recipe, loss_name
from mocolayers.runtime import RunError


def stage_loss_of(recipe: Recipe) -> Callable[[Sequence[int]], nn.Module] | None:
    """What makes the loss of a recipe from the channels of the stages; None is plain MoCo.

    Raises:
        RunError: no entry of `ARMS` holds the class, or it was edited since.
        ValueError: when it is called, a class that is not what CONTRIBUTING.md asks for, or options it does not take.
    """
    if recipe.stage_loss == "none":
        return None
    own = (arm["stage_loss"] for arm in ARMS.values() if isinstance(arm.get("stage_loss"), type))
    kind = STAGE_LOSSES.get(recipe.stage_loss) or next((k for k in own if loss_name(k) == recipe.stage_loss), None)
    if kind is None:
        raise RunError(f"no arm has the loss {recipe.stage_loss}; run the cell or file that adds it to ARMS")

    def make(channels: Sequence[int]) -> nn.Module:
        try:
            loss = kind(channels, **recipe.stage_options)
        except Exception as error:  # whatever a class of one's own raises
            said = f"{type(error).__name__}: {error}"
            raise _wrong(kind, f"cannot be made with stage_options={recipe.stage_options} ({said})") from error
        pool = getattr(loss, "pool", None)
        if not isinstance(loss, nn.Module) or not isinstance(pool, (tuple, list)) or len(pool) != 4:
            raise _wrong(kind, f"is no torch.nn.Module with four sides such as pool = (1, 1, 1, 1); its pool is {pool}")
        loss.register_forward_hook(_check)
        return loss

    return make


def _check(loss: nn.Module, _, terms: object) -> None:
    """A hook after each forward pass: four losses, each a single number."""
    several = terms if isinstance(terms, (tuple, list)) else ()
    found = [tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__ for term in several]
    if found != [()] * 4:
        said = found or type(terms).__name__
        raise _wrong(type(loss), f"returns {said}, not four tensors of shape (), the loss of each stage")


def _wrong(kind: type, what: str) -> ValueError:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or "a cell of this notebook"
    return ValueError(f"the stage loss {kind.__name__} in {file} {what}; CONTRIBUTING.md shows one that works")
