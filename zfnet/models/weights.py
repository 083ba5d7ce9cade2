"""Loading tensors into a network: which of them do not fit is said by name, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

SHOWN = 6
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict, converted to the network's own types.

    Auxiliary classifiers (GoogLeNet, Inception), which take part in training alone, are left out where the network has
    none.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; the message names them.
    """
    own = network.state_dict()
    given = {n: t for n, t in tensors.items() if n in own or not n.startswith(_AUXILIARY)}
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    shapes = [
        f"{name} is {_shape(given[name])} and should be {_shape(tensor)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if missing or unexpected or shapes:
        problems = [
            f"{len(names)} tensors {what}: {_some(names)}"
            for what, names in (("are missing", missing), ("are unexpected", unexpected), ("do not fit", shapes))
            if names
        ]
        raise ValueError(f"the weights are not this network's. {'; '.join(problems)}{_hint(own, given, missing)}")
    network.load_state_dict(given)


def classes_of(network: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """Outputs of a network's last layer by a state dict: the rows of its last weight; None where it is not there."""
    layers = [name for name, tensor in network.state_dict().items() if name.endswith("weight") and tensor.ndim >= 2]
    return len(tensors[layers[-1]]) if layers and layers[-1] in tensors and tensors[layers[-1]].ndim >= 2 else None


def _hint(own: Mapping[str, Tensor], given: Mapping[str, Tensor], missing: list[str]) -> str:
    """Where whole parts of the network are missing and the others fit, that the others can be had alone."""
    there = {name.split(".")[0] for name in own if name in given}
    fits = all(name in own for name in given) and not there & {name.split(".")[0] for name in missing}
    if not fits or len(there) != 1:
        return ""
    return f". They are those of its part {there.pop()!r} alone: add that to the network's name, after a dot"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
