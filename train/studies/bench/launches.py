"""What the launchers of `kernels/gpu` launch, and which of its tensors each kernel reads and writes, without a GPU.

Inside `standing_in_for_a_gpu` every tensor says that it is on a GPU of compute capability 9.0 with 132 multiprocessors,
so that operators take the path that they take there, and a launch of a Triton or Gluon kernel is recorded, not
compiled. Meant for fake tensors: shapes are all that there is.

What a kernel reads and writes follows from its source. Pointers and descriptors are followed from its parameters
through arithmetic, assignments, calls of other device functions and `warp_specialize` to loads, stores, atomics and
bulk copies; branches that the arguments of this launch rule out (`if ACCUMULATE`, `if gates_ptr is None`) are not
looked at. So an argument that is passed and never touched costs nothing. A tensor that is touched counts with all
elements of the view that the launcher passes, once: caches are assumed to serve every further access. A launcher whose
kernel touches a part of a tensor passes a view of that part.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernels import backend

HOPPER_PROPERTIES = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
# Which parameters of a kernel a pointer, a descriptor or a number made from one comes from.
Roots = frozenset[str]
NOWHERE: Roots = frozenset()
# What an expression is worth when the launch does not say; and a tensor, of which only "not None" is known.
UNKNOWN, TENSOR = object(), object()
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.Not: operator.not_,
    ast.USub: operator.neg,
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the tensors that the kernel touches; views of one part of a storage may occur twice."""

    kernel: str
    read: tuple[Tensor, ...]
    written: tuple[Tensor, ...]


def touched_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of views, equal ones once; a dim that is expanded from one element counts once."""
    found = set()
    for t in tensors:
        sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride or not size]
        # As a line, as a matrix or turned: the same elements.
        found.add((t.untyped_storage()._cdata, t.storage_offset(), math.prod(sizes) * t.element_size()))
    return sum(num_bytes for *_, num_bytes in found)


@contextmanager
def standing_in_for_a_gpu(record: Callable[[Launch], None]) -> Iterator[None]:
    """Within this context tensors are on a Hopper GPU as far as they say, and kernel launches go to `record`."""
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, **options: Any) -> None:
        record(launch_of(kernel, args, {name: options[name] for name in kernel.arg_names if name in options}))

    replaced: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "is_cuda", property(lambda _: True)),
        # Of a fake tensor it would be 0 with a warning; descriptors ask whether it is aligned.
        (torch.Tensor, "data_ptr", lambda _: 0),
        (backend, "_capability", lambda _: backend.HOPPER),
        (backend, "_properties", lambda _: HOPPER_PROPERTIES),
        (JITFunction, "run", run),
        # Whatever else has given it a `run` of its own.
        (GluonJITFunction, "run", run),
        (InterpretedFunction, "run", run),
    ]
    with ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value))
        yield


def launch_of(kernel: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Launch:
    """What one launch touches, from the kernel's source and the values of its parameters."""
    bound = inspect.signature(kernel.fn).bind(*args, **named)
    bound.apply_defaults()
    tensors = {name: found for name, value in bound.arguments.items() if (found := _tensors(value))}
    known = {name: TENSOR if name in tensors else _plain(value) for name, value in bound.arguments.items()}
    names = _accesses(kernel.fn, tuple(known.items()))
    read, written = (tuple(tensor for name in each for tensor in tensors[name]) for each in names)
    return Launch(kernel.fn.__name__, read, written)


@cache
def _accesses(function: Any, known: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parameters of a kernel that it reads, and those that it writes, in their order."""
    accesses, tensors = _Accesses(), [name for name, value in known if value is TENSOR]
    accesses.call(function, {name: frozenset([name]) for name in tensors}, dict(known))
    read, written = (tuple(name for name in tensors if name in found) for found in (accesses.read, accesses.written))
    return read, written


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a kernel's argument: itself, what a descriptor describes, all of a tuple."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(getattr(value, "base", None), Tensor):
        return [value.base]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, tuple | list) else []


def _plain(value: Any) -> Any:
    """The value of a `constexpr`, or the value itself."""
    return value.value if type(value).__name__ == "constexpr" else value


@cache
def _parsed(function: Any) -> tuple[list[ast.stmt], tuple[str, ...], frozenset[str]]:
    """Body and parameters of a device function, and the names that it assigns more than once or in a loop's head."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef), tree
    parameters = tuple(argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs))
    stored = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    changed = frozenset(name for name in stored if stored.count(name) > 1 or name in parameters)
    return tree.body, parameters, changed


@dataclass
class _Scope:
    """Names of one call of a device function."""

    globals: Mapping[str, Any]
    changed: frozenset[str]
    roots: dict[str, Roots]
    known: dict[str, Any]


@dataclass
class _Accesses:
    """Walks through device functions and collects which parameters of the kernel they read and write."""

    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)

    def call(self, function: Any, roots: Mapping[str, Roots], known: Mapping[str, Any]) -> Roots:
        """Follow one call; returns where its result comes from."""
        body, _, changed = _parsed(function)
        certain = {name: value for name, value in known.items() if name not in changed}
        scope = _Scope(function.__globals__, changed, dict(roots), certain)
        # A pointer that is made late in a loop's body is used early in its next pass.
        self._block(body, scope)
        return self._block(body, scope)

    def _block(self, statements: Iterable[ast.stmt], scope: _Scope) -> Roots:
        """Follow statements; returns where the results of their `return`s come from."""
        returned = NOWHERE
        for statement in statements:
            match statement:
                case ast.If(test=test, body=body, orelse=orelse):
                    self._expression(test, scope)
                    value = _value(test, scope)
                    branches = [body, orelse] if value is UNKNOWN else [body if value else orelse]
                    returned |= NOWHERE.union(*(self._block(branch, scope) for branch in branches))
                case ast.For(target=target, iter=iterated, body=body):
                    self._assign(target, self._expression(iterated, scope), scope)
                    returned |= self._block(body, scope)
                case ast.While(test=test, body=body):
                    self._expression(test, scope)
                    returned |= self._block(body, scope)
                case ast.Return(value=ast.expr() as value):
                    returned |= self._expression(value, scope)
                case _:
                    self._statement(statement, scope)
        return returned

    def _statement(self, statement: ast.stmt, scope: _Scope) -> None:
        match statement:
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self._expression(value, scope), scope)
                if isinstance(target, ast.Name) and target.id not in scope.changed:
                    scope.known[target.id] = _value(value, scope)
            case ast.AugAssign(target=target, value=value):
                self._assign(target, self._expression(value, scope), scope)
            case ast.Expr(value=value):
                self._expression(value, scope)
            case ast.Return() | ast.Pass() | ast.Assert():
                pass
            case _:
                raise AssertionError(f"line {statement.lineno} of a kernel: what does {type(statement)} touch?")

    def _assign(self, target: ast.expr, roots: Roots, scope: _Scope) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                scope.roots[node.id] = scope.roots.get(node.id, NOWHERE) | roots

    def _expression(self, node: ast.AST, scope: _Scope) -> Roots:
        """Where a value comes from; what it loads, stores and calls on the way is noted."""
        match node:
            case ast.Name(id=name):
                return scope.roots.get(name, NOWHERE)
            case ast.Attribute(value=value):
                self._expression(value, scope)
                # A descriptor's layout, a pointer's type.
                return NOWHERE
            case ast.IfExp(test=test, body=body, orelse=orelse):
                value = _value(test, scope)
                branches = [body, orelse] if value is UNKNOWN else [body if value else orelse]
                return NOWHERE.union(*(self._expression(branch, scope) for branch in branches))
            case ast.Tuple(elts=[function, ast.Tuple(elts=arguments)]) if _device_function(function, scope):
                # A partition of `warp_specialize`.
                return self._device_call(_device_function(function, scope), arguments, [], scope)
            case ast.Call():
                return self._call(node, scope)
        return NOWHERE.union(*(self._expression(child, scope) for child in ast.iter_child_nodes(node)))

    def _call(self, node: ast.Call, scope: _Scope) -> Roots:
        if function := _device_function(node.func, scope):
            return self._device_call(function, node.args, node.keywords, scope)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        arguments = [self._expression(each, scope) for each in (*node.args, *(k.value for k in node.keywords))]
        of_object = NOWHERE
        if isinstance(node.func, ast.Attribute):
            of_object = self._expression(node.func.value, scope)
        everywhere = of_object.union(*arguments)
        # `tl.load(pointer)`, or `descriptor.load(place)`; a bulk copy names descriptor and shared memory in any order.
        place = of_object or (arguments[0] if arguments else NOWHERE)
        if name.startswith(("async_copy_global", "async_tma_gather")):
            self.read |= everywhere
        elif name.startswith(("async_copy_shared", "async_tma_scatter")):
            self.written |= everywhere
        elif name.startswith(("load", "gather")) and place:
            self.read |= place
        elif name.startswith(("store", "scatter")) and name != "store_wait" and place:
            self.written |= place
        elif name.startswith(("atomic", "async_reduce", "async_atomic")):
            self.read |= place
            self.written |= place
        else:
            return everywhere
        return NOWHERE

    def _device_call(
        self, function: Any, arguments: Iterable[ast.expr], keywords: Iterable[ast.keyword], scope: _Scope
    ) -> Roots:
        _, parameters, _ = _parsed(function)
        given = dict(zip(parameters, arguments, strict=False)) | {k.arg: k.value for k in keywords if k.arg}
        roots = {name: self._expression(each, scope) for name, each in given.items()}
        known = {
            name: _plain(parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is not parameter.empty
        }
        return self.call(function, roots, known | {name: _value(each, scope) for name, each in given.items()})


def _resolved(node: ast.expr, scope: _Scope) -> Any:
    """The global object that a name or a dotted name stands for, else UNKNOWN."""
    if isinstance(node, ast.Name):
        return UNKNOWN if node.id in scope.roots else scope.globals.get(node.id, UNKNOWN)
    if isinstance(node, ast.Attribute):
        owner = _resolved(node.value, scope)
        return UNKNOWN if owner is UNKNOWN else getattr(owner, node.attr, UNKNOWN)
    return UNKNOWN


def _device_function(node: ast.expr, scope: _Scope) -> Any:
    """The Python function of a kernel or device function of a repository, else None; the language's own are not."""
    from triton.runtime.jit import KernelInterface

    found = _resolved(node, scope)
    function = found.fn if isinstance(found, KernelInterface) else None
    ours = function is not None and not function.__module__.startswith("triton.")
    return function if ours else None


def _value(node: ast.expr, scope: _Scope) -> Any:
    """What an expression is worth in this launch, else UNKNOWN."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            if name in scope.known:
                return scope.known[name]
            return UNKNOWN if name in scope.roots else _plain(scope.globals.get(name, UNKNOWN))
        case ast.BoolOp(op=op, values=values):
            # `and` ends at the first false one, `or` at the first true one, whatever is unknown before it.
            ends = isinstance(op, ast.Or)
            found = [_value(each, scope) for each in values]
            if any(each is not UNKNOWN and bool(each) is ends for each in found):
                return ends
            return UNKNOWN if UNKNOWN in found else not ends
        case ast.UnaryOp(op=op, operand=operand):
            return _applied(op, _value(operand, scope))
        case ast.BinOp(left=left, op=op, right=right):
            return _applied(op, _value(left, scope), _value(right, scope))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _applied(op, _value(left, scope), _value(right, scope))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            value = _value(test, scope)
            return UNKNOWN if value is UNKNOWN else _value(body if value else orelse, scope)
    return UNKNOWN


def _applied(op: ast.AST, *values: Any) -> Any:
    if UNKNOWN in values or type(op) not in OPERATORS:
        return UNKNOWN
    if isinstance(op, ast.Is | ast.IsNot):
        return OPERATORS[type(op)](*values)
    plain = all(isinstance(value, int | float | str) for value in values)
    return OPERATORS[type(op)](*values) if plain else UNKNOWN
