"""A network traced once (torch.fx) into named operations with their geometry.

Every analysis that has to know which pixels a cell comes from works on this graph: receptive fields
(`zfnet.receptive`), projections (`zfnet.deconv`) and occlusion (`zfnet.occlusion`). A functional form
(`F.relu(x)`, `x.relu_()`) is given the module that does the same, so that they meet one form only.

Evaluation semantics always: dropout is the identity and batch norm uses its running statistics, whatever the model's
flags say. Nothing is done in place, no hook is called, and the model is left as it was found. Parameters are read when
the graph is run: weights loaded after the trace count.
"""

import difflib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Window:
    """How an operation slides over its input; every pair is (rows, columns), in cells.

    Output cell i reads the input cells i * stride - pad_before + dilation * (0 .. kernel - 1).
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    pad_before: Pair = (0, 0)
    pad_after: Pair = (0, 0)
    ceil: bool = False
    """The last window may hang over the edge (pools only)."""

    @property
    def span(self) -> Pair:
        """Input cells from the first to the last that one output cell reads."""
        rows, cols = ((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        return rows, cols


@dataclass(frozen=True, eq=False)
class Operation:
    """One step of the network.

    `kind` is one of input, conv, linear, relu, maxpool, avgpool, normalisation, batchnorm, identity, pad, add, cat,
    flatten, softmax; "value" for what is not an activation (a size, a parameter); "unknown" for anything else.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    """Of one image's output, without the batch: (maps, rows, columns), or (units,). Empty for a value."""
    module: nn.Module | None
    """The module that does it, or does the same as the function that does it; None where there is no such module."""
    window: Window | None
    """Of conv, maxpool, avgpool and pad."""
    compute: Callable[..., Any]
    """Of the values of `inputs`, in their order; never in place."""
    pointwise: bool = False
    """Each output cell depends on the same cell of the inputs alone (in all maps): every kind of this sort, and
    activation functions of kind "unknown" such as ReLU6."""


class UnknownLayer(ValueError):
    """No operation has the name that was given."""


class Untraceable(ValueError):
    """torch.fx cannot follow the model."""


class Graph:
    """The operations of one network for one size of input, in the order in which they run; made by `trace`."""

    def __init__(self, model: nn.Module, operations: Mapping[str, Operation], output: str):
        self._model = model
        self.operations: Mapping[str, Operation] = MappingProxyType(dict(operations))
        self.output = output
        self.input = next(op.name for op in operations.values() if op.kind == "input")
        users: dict[str, list[str]] = {name: [] for name in operations}
        for op in operations.values():
            for name in dict.fromkeys(op.inputs):
                users[name].append(op.name)
        self.users: Mapping[str, tuple[str, ...]] = MappingProxyType({k: tuple(v) for k, v in users.items()})

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, rows, columns) of an input image."""
        return self.operations[self.input].shape

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the convolution and linear modules that give feature maps or units, in order."""
        return tuple(
            op.name
            for op in self.operations.values()
            if isinstance(op.module, nn.Conv2d | nn.Linear) and len(op.shape) in (1, 3)
        )

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the operations that are run but not understood."""
        return tuple(op.name for op in self.operations.values() if op.kind == "unknown")

    @property
    def last_convolution(self) -> str:
        """Name of the last convolution that the output depends on; ValueError where there is none."""
        needed = set(self.ancestors([self.output]))
        convolutions = [n for n in self.layers if n in needed and isinstance(self[n].module, nn.Conv2d)]
        if not convolutions:
            raise ValueError("this network has no convolution; the analysis expects a convolutional network")
        return convolutions[-1]

    def __getitem__(self, name: str) -> Operation:
        """The operation of that name; UnknownLayer with the nearest name where there is none."""
        if name in self.operations:
            return self.operations[name]
        near = difflib.get_close_matches(name, self.operations, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownLayer(
            f"the network has no layer {name!r}.{hint} Its layers are {', '.join(self.layers) or 'none'}; "
            "any other traced operation may be named too"
        )

    def activation_of(self, layer: str) -> str:
        """Name of the operation whose output is the layer's activation.

        For a convolution or linear module: the ReLU, else the batch norm, that directly and solely follows it, else
        itself. Any other operation: itself. UnknownLayer where there is no such operation.
        """
        if not isinstance(self[layer].module, nn.Conv2d | nn.Linear):
            return layer
        found = name = layer
        wanted = ["batchnorm", "relu"]
        while wanted and name != self.output and len(self.users[name]) == 1:
            (name,) = self.users[name]
            kind = self.operations[name].kind
            if kind in wanted:
                wanted = wanted[wanted.index(kind) + 1 :]
                found = name
            elif kind != "identity":
                break
        return found

    def ancestors(self, names: Collection[str], given: Collection[str] = ()) -> tuple[str, ...]:
        """The operations that `names` need, themselves included, in order; what is beneath `given` is left out."""
        needed: set[str] = set()
        waiting = [self[name].name for name in names]
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += [] if name in given else self.operations[name].inputs
        return tuple(name for name in self.operations if name in needed)

    def run(
        self, x: Tensor, names: Collection[str], instead: Mapping[str, Callable[..., Any]] | None = None
    ) -> dict[str, Tensor]:
        """Outputs of the operations `names` for the images x [N, channels, rows, columns].

        Only what the names need is run, and each value is let go after its last use. `instead` replaces how the named
        operations compute (to record something on the way). A result may share memory with x: do not write into it.
        Raises ValueError for images of another shape than was traced, UnknownLayer for an unknown name.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"images of shape {tuple(x.shape)} were given; the network was traced for "
                f"[N, {', '.join(map(str, self.input_shape))}]: resize the images or trace with input_shape"
            )
        return self.run_from({self.input: x}, names, instead)

    def run_from(
        self,
        given: Mapping[str, Tensor],
        names: Collection[str],
        instead: Mapping[str, Callable[..., Any]] | None = None,
    ) -> dict[str, Tensor]:
        """As `run`, from the outputs of any operations that together cut the names off from the input."""
        needed = self.ancestors(names, given)
        if self.input in needed and self.input not in given:
            raise ValueError(f"the outputs of {list(given)} were given; {list(names)} need the input image as well")
        uses = {name: int(name in names) for name in needed}
        for name in needed:
            for source in () if name in given else self.operations[name].inputs:
                uses[source] += 1
        values: dict[str, Any] = {}
        with torch.no_grad(), _evaluating(self._model):
            for name in needed:
                if name in given:
                    values[name] = given[name]
                    continue
                op = self.operations[name]
                compute = (instead or {}).get(name, op.compute)
                values[name] = compute(*(values[source] for source in op.inputs))
                for source in op.inputs:
                    uses[source] -= 1
                    if not uses[source]:
                        del values[source]
        return {name: values[name] for name in names}


def trace(model: nn.Module, input_shape: Sequence[int] = (3, 224, 224)) -> Graph:
    """Trace a model for images of `input_shape` (channels, rows, columns) into a `Graph`.

    The model is run once on two blank images to learn every shape. A name is the module's qualified name where the
    module is used once, else torch.fx's name. Raises Untraceable for what torch.fx cannot follow (control flow that
    depends on the image, several inputs or outputs, memory written through overlapping views).
    """
    with torch.no_grad(), _evaluating(model):
        nodes, constants = _symbolic_trace(model)
        return _Reader(model, nodes, constants, tuple(input_shape)).read()


def average_counts(op: Operation, map_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What an average pool divides by, as two factors: one per output row and one per output column.

    `map_shape` is the (..., rows, columns) of its input. Their outer product is the number of cells that torch's
    AvgPool2d counts: padding counts if the module says so, the overhang of ceil mode never does.
    """
    module, window = op.module, op.window
    assert isinstance(module, nn.AvgPool2d)
    assert window is not None
    factors = []
    for axis in (0, 1):
        size, pad = map_shape[axis - 2], window.pad_before[axis]
        start = torch.arange(op.shape[axis - 2]) * window.stride[axis] - pad
        end = (start + window.kernel[axis]).clamp(max=size + pad)
        if not module.count_include_pad:
            start, end = start.clamp(min=0), end.clamp(max=size)
        factors.append((end - start).double())
    if module.divisor_override is not None:
        factors = [torch.full_like(factors[0], module.divisor_override), torch.ones_like(factors[1])]
    return factors[0], factors[1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, and their flags put back whatever happens."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- tracing ---------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Stops at the modules that are understood, and calls no hook on the way."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _kind_of_module(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call_module(m, m.forward, args, kwargs)


def _symbolic_trace(model: nn.Module) -> tuple[list[fx.Node], dict[str, Any]]:
    """fx's nodes, and the tensors made inside forward(), which fx hangs on the model and which are taken off again."""
    before = set(vars(model))
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception as error:
        raise Untraceable(
            f"torch.fx cannot follow {type(model).__name__}: {error}. A network is expected whose forward() takes one "
            "batch of images and does not branch on their content; rewrite that part, or wrap what it needs"
        ) from error
    finally:
        constants = {name: vars(model).pop(name) for name in set(vars(model)) - before}
    return nodes, constants


@dataclass(frozen=True)
class _Meaning:
    """What a node does, once understood."""

    kind: str
    module: nn.Module | None = None
    window: Window | None = None
    compute: Callable[..., Any] | None = None
    pointwise: bool = False


class _Reader:
    """Runs the nodes once as the model would, in place where it is in place, and writes down what each of them does."""

    def __init__(
        self, model: nn.Module, nodes: list[fx.Node], constants: Mapping[str, Any], input_shape: tuple[int, ...]
    ):
        self.model, self.nodes, self.constants, self.input_shape = model, nodes, constants, input_shape
        self.names = _names(nodes)
        self.operations: dict[str, Operation] = {}
        self.values: dict[fx.Node, Any] = {}  # until their last use
        self.images: set[fx.Node] = set()  # nodes whose values are made from the images
        self.now: dict[fx.Node, fx.Node] = {}  # a node that was written over -> the node that holds its value now
        self.broken: dict[fx.Node, fx.Node] = {}  # a node that was written over in part -> the node that did it
        order = {node: i for i, node in enumerate(nodes)}
        self.order = order
        self.last_use = {node: max([order[u] for u in node.users], default=order[node]) for node in nodes}

    def read(self) -> Graph:
        """All nodes in order, up to the one that returns."""
        for node in self.nodes:
            if node.op == "output":
                return Graph(self.model, self.operations, self._output(node))
            self._read_node(node)
            for old in [n for n in self.values if self.last_use[n] <= self.order[node]]:
                del self.values[old]
        raise Untraceable(f"{type(self.model).__name__} returns nothing; one tensor is expected")

    def _output(self, node: fx.Node) -> str:
        result = node.args[0]
        if not isinstance(result, fx.Node) or self._current(result) not in self.images:
            raise Untraceable(
                f"{type(self.model).__name__} returns {result!r}; one tensor is expected: wrap the model so that "
                "forward() returns the class scores alone"
            )
        return self.names[self._current(result)]

    def _current(self, node: fx.Node) -> fx.Node:
        if node in self.broken:
            raise Untraceable(
                f"the memory of {node.name!r} is written in part by {self.broken[node].name!r} and read afterwards; "
                "use the form that is not in place"
            )
        return self.now.get(node, node)

    def _read_node(self, node: fx.Node) -> None:
        call: _Call = fx.node.map_arg((node.args, node.kwargs), self._current)
        sources = list(dict.fromkeys(_nodes_in(call)))
        args, kwargs = fx.node.map_arg(call, lambda n: self.values[n])
        versions = {n: v._version for n, v in self.values.items() if isinstance(v, Tensor)}
        result = self._execute(node, args, kwargs)
        self.values[node] = result
        written = [n for n, version in versions.items() if self.values[n]._version != version]
        if not self.operations or (self.images.intersection(sources) and _holds_tensor(result)):
            self.images.add(node)
        tensors = [n for n in _nodes_in(call) if n in self.images]
        meaning = self._understand(node, args, kwargs, tensors, bool(written))
        if meaning.compute is None:
            compute = self._replay(node, call, sources)
            inputs = sources
        else:
            compute, inputs = meaning.compute, tensors
        self._note_writes(node, written)
        name = self.names[node]
        self.operations[name] = Operation(
            name=name,
            kind=meaning.kind,
            inputs=tuple(self.names[n] for n in inputs),
            shape=tuple(result.shape[1:]) if node in self.images and isinstance(result, Tensor) else (),
            module=meaning.module,
            window=meaning.window,
            compute=compute,
            pointwise=meaning.pointwise,
        )

    def _note_writes(self, node: fx.Node, written: list[fx.Node]) -> None:
        """After a node that works in place, whoever reads the old name reads what the node made of it."""
        for old in written:
            if _same_memory(self.values[old], self.values[node]):
                self.now[old] = node
                self.last_use[node] = max(self.last_use[node], self.last_use[old])
            else:
                self.broken[old] = node

    def _execute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What the model itself would compute; leaf modules by their forward(), so that no hook is called."""
        target: Any = node.target
        if node.op == "placeholder":
            return self._example(node, args)
        if node.op == "get_attr":
            return self._attribute(target)
        if node.op == "call_module":
            return self.model.get_submodule(target).forward(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _example(self, node: fx.Node, default: tuple[Any, ...]) -> Any:
        """Two blank images for the first argument of forward(); the default for any further one."""
        if any(op.kind == "input" for op in self.operations.values()):
            if default:
                return default[0]
            raise Untraceable(
                f"forward() of {type(self.model).__name__} needs {node.name!r} besides the images; one is expected"
            )
        like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        return torch.zeros(2, *self.input_shape, dtype=like.dtype, device=like.device)

    def _attribute(self, path: str) -> Any:
        if path in self.constants:
            return self.constants[path]
        value: Any = self.model
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def _understand(self, node: fx.Node, args: Any, kwargs: Any, tensors: list[fx.Node], in_place: bool) -> _Meaning:
        """The meaning of a node, from its module or function, the shapes around it and what it did to its input."""
        result = self.values[node]
        if node.op == "placeholder" and not self.operations:
            return _Meaning("input", compute=lambda: None)
        if node.op == "get_attr":
            return _Meaning("value", compute=lambda: self._attribute(str(node.target)))
        if node not in self.images:
            return _Meaning("value")
        if not isinstance(result, Tensor) or not all(isinstance(self.values[n], Tensor) for n in tensors):
            return _Meaning("unknown")
        shapes = [self.operations[self.names[n]].shape for n in tensors]
        shape = tuple(result.shape[1:])
        if node.op != "call_module" and node.target in _JOINS:
            return _read_join(_JOINS[node.target], args, kwargs, shapes, shape)
        if len(tensors) != 1:
            return _Meaning("unknown")
        if not in_place and _same_memory(self.values[tensors[0]], result):
            return _IDENTITY
        if node.op != "call_module" and node.target in _FLATTENERS and _is_flattening(shapes[0], shape):
            return _FLATTEN
        if node.op == "call_module":
            module: nn.Module | None = self.model.get_submodule(str(node.target))
        else:
            module = _module_of_function(node.target, args, kwargs)
        return _Meaning("unknown") if module is None else _read_module(module, shapes[0], shape)

    def _replay(self, node: fx.Node, call: "_Call", sources: list[fx.Node]) -> Callable[..., Any]:
        """The node as it stands, on copies of its tensors, since it may write into them."""

        def compute(*values: Any) -> Any:
            by_node = dict(zip(sources, values, strict=True))
            args, kwargs = fx.node.map_arg(call, lambda n: _copied(by_node[n]))
            return self._execute(node, args, kwargs)

        return compute


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _names(nodes: list[fx.Node]) -> dict[fx.Node, str]:
    """A module's qualified name where it is called once, else fx's name, set apart from the modules' by "_"."""
    calls = [str(node.target) for node in nodes if node.op == "call_module"]
    names = {n: str(n.target) for n in nodes if n.op == "call_module" and calls.count(str(n.target)) == 1}
    taken = set(names.values())
    for node in nodes:
        if node not in names:
            name = node.name
            while name in taken:
                name += "_"
            names[node] = name
            taken.add(name)
    return names


def _nodes_in(call: _Call) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(call, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.clone()
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return type(value)(_copied(item) for item in value) if type(value) in (tuple, list) else value
    return value


def _same_memory(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
    )


# --- what modules and functions mean ---------------------------------------------------------------------------------

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


def _kind_of_module(module: nn.Module) -> str | None:
    """By class; a subclass counts while it keeps the class's own forward(). LocalResponseNorm counts by its name."""
    if type(module).__name__ == "LocalResponseNorm" and all(
        hasattr(module, name) for name in ("size", "alpha", "beta", "k")
    ):
        return "normalisation"
    for known, kind in _MODULE_KINDS.items():
        if isinstance(module, known) and type(module).forward is known.forward:
            return kind
    return None


def _read_module(module: nn.Module, before: tuple[int, ...], after: tuple[int, ...]) -> _Meaning:
    """What a module does to one tensor whose shapes, without the batch, are `before` and `after`."""
    kind = _kind_of_module(module)
    run = module.forward
    if kind in ("conv", "maxpool", "avgpool", "pad") and len(before) == 3:
        return _read_window(module, kind, before, after)
    if kind == "linear" and len(before) == 1:
        return _Meaning(kind, module, compute=run)
    if kind == "relu":
        return _Meaning(kind, module, compute=torch.relu, pointwise=True)
    if kind == "normalisation" and len(before) == 3:
        return _Meaning(kind, module, compute=run, pointwise=True)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
        return _Meaning("batchnorm", module, compute=_batch_norm(module), pointwise=len(before) in (1, 3))
    if kind == "identity":
        return _IDENTITY
    if kind == "flatten" and _is_flattening(before, after):
        return _FLATTEN
    if isinstance(module, nn.Softmax) and module.dim in (1, -len(before)):
        return _Meaning("softmax", module, compute=run)
    return _Meaning("unknown", module, pointwise=isinstance(module, _POINTWISE))


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """With the running statistics, whatever the module's flag says."""
    return lambda x: F.batch_norm(
        x, module.running_mean, module.running_var, module.weight, module.bias, training=False, eps=module.eps
    )


def _read_window(module: nn.Module, kind: str, before: tuple[int, ...], after: tuple[int, ...]) -> _Meaning:
    """The window of a convolution, pool or padding; "unknown" where it is not one window the same for all cells."""
    unknown = _Meaning("unknown", module)
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
        kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
        pad_before, pad_after = _conv_padding(module.padding, kernel, dilation)
        window = Window(kernel, _pair(module.stride), dilation, pad_before, pad_after)
    elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        pad, dilation = _pair(module.padding), _pair(getattr(module, "dilation", 1))
        stride = _pair(module.stride or module.kernel_size)
        window = Window(_pair(module.kernel_size), stride, dilation, pad, pad, module.ceil_mode)
    elif isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        if before[1] % after[1] or before[2] % after[2] or getattr(module, "return_indices", False):
            return unknown  # windows of several sizes
        kernel = (before[1] // after[1], before[2] // after[2])
        same = nn.AvgPool2d(kernel) if isinstance(module, nn.AdaptiveAvgPool2d) else nn.MaxPool2d(kernel)
        return _Meaning(kind, same, Window(kernel, kernel), module.forward)
    elif isinstance(module, nn.ConstantPad2d) and module.value == 0:
        left, right, top, bottom = (int(p) for p in module.padding)
        window = Window(pad_before=(top, left), pad_after=(bottom, right))
    else:
        return unknown
    return _Meaning(kind, module, window, module.forward)


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


_IDENTITY = _Meaning("identity", nn.Identity(), compute=lambda x: x, pointwise=True)
_FLATTEN = _Meaning("flatten", nn.Flatten(), compute=lambda x: x.flatten(1))
_FLATTENERS = {torch.flatten, torch.reshape, torch.squeeze, "flatten", "view", "reshape", "squeeze"}
_JOINS: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"), "add"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "cat"),
}


def _is_flattening(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    units = 1
    for size in before:
        units *= size
    return after == (units,)


def _read_join(kind: str, args: Any, kwargs: Any, shapes: list[tuple[int, ...]], after: tuple[int, ...]) -> _Meaning:
    """A sum of two activations of one shape, or a concatenation along the feature maps."""
    if kind == "add":
        plain = kwargs.get("alpha", 1) == 1 and len(args) + ("other" in kwargs) == 2
        if plain and len(shapes) == 2 and shapes[0] == shapes[1] == after:
            return _Meaning("add", compute=torch.add, pointwise=True)
        return _Meaning("unknown")
    parts = args[0] if args else kwargs["tensors"]
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    if dim in (1, -len(after)) and len(parts) == len(shapes):
        return _Meaning("cat", compute=lambda *tensors: torch.cat(tensors, 1), pointwise=True)
    return _Meaning("unknown")


def _module_of_function(function: Any, args: Any, kwargs: Any) -> nn.Module | None:
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
    return nn.AvgPool2d(_pair(input.shape[2:])) if spatial and keepdim and input.ndim == 4 else None


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
