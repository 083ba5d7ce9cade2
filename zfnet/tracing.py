"""From a model to its `Graph`, by torch.fx: which operation reads what, and what each of them is.

A functional form (`F.relu(x)`, `x.relu_()`) is given the module that does the same (`zfnet.meaning`), so that analyses
meet one form only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from zfnet.graph import Graph, Operation, Untraceable, evaluating
from zfnet.meaning import (
    FLATTEN,
    FLATTENERS,
    IDENTITY,
    JOINS,
    Meaning,
    is_flattening,
    kind_of_module,
    module_of_function,
    read_join,
    read_module,
)


def trace(model: nn.Module, input_shape: Sequence[int] = (3, 224, 224)) -> Graph:
    """Trace a model for images of `input_shape` (channels, rows, columns) into a `Graph`.

    The model is run once on two blank images to learn every shape. A name is the module's qualified name where the
    module is used once, else torch.fx's name. Raises Untraceable for what torch.fx cannot follow (control flow that
    depends on the image, several inputs or outputs, memory written through overlapping views), and for images of a size
    that the model cannot run.
    """
    with torch.no_grad(), evaluating(model):
        nodes, constants = _symbolic_trace(model)
        return _Reader(model, nodes, constants, tuple(input_shape)).read()


class _Tracer(fx.Tracer):
    """Stops at the modules that are understood, and calls no hook on the way."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of_module(m) is not None or super().is_leaf_module(m, module_qualified_name)

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
        result = self._first_run(node, args, kwargs)
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

    def _first_run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            return self._execute(node, args, kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            size = " x ".join(map(str, self.input_shape))
            raise Untraceable(
                f"{type(self.model).__name__} cannot run images of {size}: {self.names[node]!r} fails with "
                f"{str(error).strip()!r}. Give the size that the network is made for"
            ) from error

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

    def _understand(self, node: fx.Node, args: Any, kwargs: Any, tensors: list[fx.Node], in_place: bool) -> Meaning:
        """The meaning of a node, from its module or function, the shapes around it and what it did to its input."""
        result = self.values[node]
        if node.op == "placeholder" and not self.operations:
            return Meaning("input", compute=lambda: None)
        if node.op == "get_attr":
            return Meaning("value", compute=lambda: self._attribute(str(node.target)))
        if node not in self.images:
            return Meaning("value")
        if not isinstance(result, Tensor) or not all(isinstance(self.values[n], Tensor) for n in tensors):
            return Meaning("unknown")
        shapes = [self.operations[self.names[n]].shape for n in tensors]
        shape = tuple(result.shape[1:])
        if node.op != "call_module" and node.target in JOINS:
            return read_join(JOINS[node.target], args, kwargs, shapes, shape)
        if len(tensors) != 1:
            return Meaning("unknown")
        if not in_place and _same_memory(self.values[tensors[0]], result):
            return IDENTITY
        if node.op != "call_module" and node.target in FLATTENERS and is_flattening(shapes[0], shape):
            return FLATTEN
        if node.op == "call_module":
            module: nn.Module | None = self.model.get_submodule(str(node.target))
        else:
            module = module_of_function(node.target, args, kwargs)
        return Meaning("unknown") if module is None else read_module(module, shapes[0], shape)

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
