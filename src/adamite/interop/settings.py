"""With what torch steps a group of parameters: learning rate, betas, epsilon, weight decay, and which algorithm."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from adamite import checks
from adamite.checks import RefusedError

REQUIRED = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")


class Settings(NamedTuple):
    """What a group is stepped with, by the names of ours."""

    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    decoupled: bool | None  # None: torch < 2.6 does not say
    amsgrad: bool


def settings_of(group: Any, where: str) -> Settings:
    """Those of one of a state dict's ``param_groups``, checked; RefusedError if they are not Adam's or AdamW's."""
    if not isinstance(group, Mapping):
        raise RefusedError(f"{where} must be a dict, got {shown(group)}")
    for name in REQUIRED:
        if name not in group:
            raise RefusedError(f"{where} has no {name!r}: is it of torch.optim.Adam or AdamW?")
    if checked(checks.flag, group.get("maximize", False), f"{where}['maximize']"):
        raise RefusedError(f"{where}['maximize'] must be False, got True: negate the gradients instead")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise RefusedError(f"{where}['betas'] must be a pair of numbers, got {shown(betas)}")
    rate, eps, decay = (
        checked(checks.non_negative, group[name], f"{where}[{name!r}]") for name in ("lr", "eps", "weight_decay")
    )
    b1, b2 = (checked(checks.decay_rate, beta, f"{where}['betas'][{i}]") for i, beta in enumerate(betas))
    amsgrad = checked(checks.flag, group["amsgrad"], f"{where}['amsgrad']")
    decoupled = group.get("decoupled_weight_decay")
    if decoupled is not None:
        decoupled = checked(checks.flag, decoupled, f"{where}['decoupled_weight_decay']")
    return Settings(rate, b1, b2, eps, decay, decoupled, amsgrad)


def checked(check: Callable[[str, Any], Any], value: Any, where: str) -> Any:
    """A number or a flag, which may be a tensor of shape (). What `check` says against it is a refusal."""
    try:
        return check(where, value.item() if getattr(value, "shape", None) == () else value)
    except (TypeError, ValueError) as error:
        raise RefusedError(str(error)) from None
    except OverflowError:
        raise RefusedError(f"{where} must be a number that float64 holds, got one too large") from None


def shown(value: Any) -> str:
    """A value in an error."""
    return f"{value!r:.80} of type {type(value).__name__}"
