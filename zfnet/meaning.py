"""What modules and functions mean to an analysis: their kind, their geometry, and the module that does the same."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.graph import Pair, Window


@dataclass(frozen=True)
class Meaning:
    """What a node does, once understood."""

    kind: str
    module: nn.Module | None = None
    window: Window | None = None
    compute: Callable[..., Any] | None = None
    pointwise: bool = False


_MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.MaxPool2d: "maxpool",
    nn.AvgPool2d: "avgpool",
    nn.AdaptiveMaxPool2d: "maxpool",
    nn.AdaptiveAvgPool2d: "avgpool",
    nn.LocalResponseNorm: "normalisation",
    nn.BatchNorm1d: "batchnorm",
    nn.BatchNorm2d: "batchnorm",
    nn.Identity: "identity",
    nn.Dropout: "identity",
    nn.Dropout1d: "identity",
    nn.Dropout2d: "identity",
    nn.AlphaDropout: "identity",
    nn.FeatureAlphaDropout: "identity",
    nn.ZeroPad2d: "pad",
    nn.ConstantPad2d: "pad",
    nn.Flatten: "flatten",
    nn.Softmax: "softmax",
}

_POINTWISE = (
    nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.SiLU, nn.GELU, nn.ELU, nn.CELU, nn.SELU, nn.Mish,
    nn.LeakyReLU, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Threshold,
)  # fmt: skip


def kind_of_module(module: nn.Module) -> str | None:
    """By class; a subclass counts while it keeps the class's own forward(). LocalResponseNorm counts by its name."""
    if type(module).__name__ == "LocalResponseNorm" and all(
        hasattr(module, name) for name in ("size", "alpha", "beta", "k")
    ):
        return "normalisation"
    for known, kind in _MODULE_KINDS.items():
        if isinstance(module, known) and type(module).forward is known.forward:
            return kind
    return None


def read_module(module: nn.Module, before: tuple[int, ...], after: tuple[int, ...]) -> Meaning:
    """What a module does to one tensor whose shapes, without the batch, are `before` and `after`."""
    kind = kind_of_module(module)
    run = module.forward
    if isinstance(module, MeanOfMap):
        return Meaning("binpool", module, compute=run)
    if kind in ("conv", "maxpool", "avgpool", "pad") and len(before) == 3:
        return _read_window(module, kind, before, after)
    if kind == "linear" and len(before) == 1:
        return Meaning(kind, module, compute=run)
    if kind == "relu":
        return Meaning(kind, module, compute=torch.relu, pointwise=True)
    if kind == "normalisation" and len(before) == 3:
        return Meaning(kind, module, compute=run, pointwise=True)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
        return Meaning("batchnorm", module, compute=_batch_norm(module), pointwise=len(before) in (1, 3))
    if kind == "identity":
        return IDENTITY
    if kind == "flatten" and is_flattening(before, after):
        return FLATTEN
    if isinstance(module, nn.Softmax) and module.dim in (1, -len(before)):
        return Meaning("softmax", module, compute=run)
    return Meaning("unknown", module, pointwise=isinstance(module, _POINTWISE))


class MeanOfMap(nn.Module):
    """`x.mean([2, 3])`: maps to units."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, maps, rows, columns] -> [N, maps]."""
        return x.mean((2, 3))


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """With the running statistics, whatever the module's flag says."""
    return lambda x: F.batch_norm(
        x, module.running_mean, module.running_var, module.weight, module.bias, training=False, eps=module.eps
    )


def _read_window(module: nn.Module, kind: str, before: tuple[int, ...], after: tuple[int, ...]) -> Meaning:
    """The window of a convolution, pool or padding; "unknown" where it is not one window the same for all cells."""
    unknown = Meaning("unknown", module)
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
        kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
        pad_before, pad_after = _conv_padding(module.padding, kernel, dilation)
        window = Window(kernel, _pair(module.stride), dilation, pad_before, pad_after)
    elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        pad, dilation = _pair(module.padding), _pair(getattr(module, "dilation", 1))
        stride = _pair(module.stride or module.kernel_size)
        window = Window(_pair(module.kernel_size), stride, dilation, pad, pad, module.ceil_mode)
    elif isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        if getattr(module, "return_indices", False):
            return unknown
        if before[1] % after[1] or before[2] % after[2]:  # windows of several sizes
            average = isinstance(module, nn.AdaptiveAvgPool2d)
            return Meaning("binpool", module, compute=module.forward) if average else unknown
        kernel = (before[1] // after[1], before[2] // after[2])
        same = nn.AvgPool2d(kernel) if isinstance(module, nn.AdaptiveAvgPool2d) else nn.MaxPool2d(kernel)
        return Meaning(kind, same, Window(kernel, kernel), module.forward)
    elif isinstance(module, nn.ConstantPad2d) and module.value == 0:
        left, right, top, bottom = (int(p) for p in module.padding)
        window = Window(pad_before=(top, left), pad_after=(bottom, right))
    else:
        return unknown
    return Meaning(kind, module, window, module.forward)


def _conv_padding(padding: Any, kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Zeros before and after; "same" puts the odd one after, as torch does."""
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        rows, cols = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return (rows // 2, cols // 2), (rows - rows // 2, cols - cols // 2)
    return _pair(padding), _pair(padding)


def _pair(value: Any) -> Pair:
    if isinstance(value, int):
        return value, value
    rows, cols = value if len(value) == 2 else (value[0], value[0])
    return int(rows), int(cols)


IDENTITY = Meaning("identity", nn.Identity(), compute=lambda x: x, pointwise=True)
FLATTEN = Meaning("flatten", nn.Flatten(), compute=lambda x: x.flatten(1))
FLATTENERS = {torch.flatten, torch.reshape, torch.squeeze, "flatten", "view", "reshape", "squeeze"}
JOINS: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"), "add"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "cat"),
}


def is_flattening(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a change of shape makes one row of units of each image."""
    units = 1
    for size in before:
        units *= size
    return after == (units,)


def read_join(kind: str, args: Any, kwargs: Any, shapes: list[tuple[int, ...]], after: tuple[int, ...]) -> Meaning:
    """A sum of two activations of one shape, or a concatenation along the feature maps."""
    if kind == "add":
        plain = kwargs.get("alpha", 1) == 1 and len(args) + ("other" in kwargs) == 2
        if plain and len(shapes) == 2 and shapes[0] == shapes[1] == after:
            return Meaning("add", compute=torch.add, pointwise=True)
        return Meaning("unknown")
    parts = args[0] if args else kwargs["tensors"]
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    if dim in (1, -len(after)) and len(parts) == len(shapes):
        return Meaning("cat", compute=lambda *tensors: torch.cat(tensors, 1), pointwise=True)
    return Meaning("unknown")


def module_of_function(function: Any, args: Any, kwargs: Any) -> nn.Module | None:
    """The module that does what the call does; None where there is none, or the arguments are not foreseen here."""
    make = _FUNCTIONS.get(function)
    try:
        return None if make is None else make(*args, **kwargs)
    except TypeError:
        return None


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None,  # noqa: A002 - torch's name of the argument
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> nn.Module | None:  # fmt: skip
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
        return None
    kernel: Any = tuple(weight.shape[2:])
    module = nn.Conv2d(
        input.shape[1], len(weight), kernel, stride, padding, dilation, groups, bias is not None, device="meta"
    )
    module.weight, module.bias = weight, bias
    return module


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> nn.Module | None:  # noqa: A002
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
        return None
    module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    module.weight = weight
    module.bias = bias  # type: ignore[assignment]
    return module


def _max_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,  # noqa: A002
    ceil_mode: bool = False, return_indices: bool = False,
) -> nn.Module | None:  # fmt: skip
    return None if return_indices else nn.MaxPool2d(kernel_size, stride or None, padding, dilation, ceil_mode=ceil_mode)


def _avg_pool2d(input: Tensor, *args: Any, **kwargs: Any) -> nn.Module:  # noqa: A002
    return nn.AvgPool2d(*args, **kwargs)


def _adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> nn.Module:  # noqa: A002
    return nn.AdaptiveMaxPool2d(output_size, return_indices)


def _pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> nn.Module | None:  # noqa: A002
    return nn.ConstantPad2d(tuple(pad), value or 0.0) if mode == "constant" and len(pad) == 4 else None


def _mean(input: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> nn.Module | None:  # noqa: A002
    spatial = isinstance(dim, tuple | list) and sorted(d % input.ndim for d in dim) == [2, 3]
    if not spatial or input.ndim != 4:
        return None
    return nn.AvgPool2d(_pair(input.shape[2:])) if keepdim else MeanOfMap()


def _softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> nn.Module:  # noqa: A002
    return nn.Softmax(dim)


_FUNCTIONS: dict[Any, Callable[..., nn.Module | None]] = {
    **dict.fromkeys((torch.conv2d, F.conv2d), _conv2d),
    **dict.fromkeys((F.linear,), _linear),
    **dict.fromkeys((torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"), lambda *_, **__: nn.ReLU()),
    **dict.fromkeys((torch.max_pool2d, F.max_pool2d), _max_pool2d),
    **dict.fromkeys((F.avg_pool2d,), _avg_pool2d),
    **dict.fromkeys((F.adaptive_avg_pool2d,), lambda _, output_size: nn.AdaptiveAvgPool2d(output_size)),
    **dict.fromkeys((F.adaptive_max_pool2d,), _adaptive_max_pool2d),
    **dict.fromkeys((F.local_response_norm,), lambda _, *args, **kwargs: nn.LocalResponseNorm(*args, **kwargs)),
    **dict.fromkeys((F.pad,), _pad),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), _softmax),
    **dict.fromkeys((F.relu6,), lambda *_, **__: nn.ReLU6()),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), lambda *_: nn.Sigmoid()),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), lambda *_: nn.Tanh()),
    **dict.fromkeys((F.hardswish,), lambda *_, **__: nn.Hardswish()),
    **dict.fromkeys((F.silu,), lambda *_, **__: nn.SiLU()),
    **dict.fromkeys((F.gelu,), lambda _, **kwargs: nn.GELU(**kwargs)),
    **dict.fromkeys((F.leaky_relu,), lambda _, slope=0.01, *__, **___: nn.LeakyReLU(slope)),
}
