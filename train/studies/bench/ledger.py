"""The ledger of one layer: every launch, forward and backward, with the bytes it moves and what is kept for backward.

    python -m launch.bench ledger [--precision fp8|bf16] [--layer moe|dense]
    python -m launch.bench ledger --cluster h800_2048       a MoE layer as rank 0 of that cluster runs it

The layer runs at DeepSeek-V3's width on fake tensors that say that they are on a Hopper GPU, so every operator takes
its GPU path, and each thing that would be launched is one entry:

- a Triton or Gluon kernel, as its launcher launches it, with the tensors that its source reads and writes
  (`launches.py`); an operator whose launcher launches three kernels has three entries;
- an operator of torch that makes or changes a tensor. A view is nothing, and neither is `empty`;
- in an operator of ours or of anybody else, what its GPU implementation calls: a chain of torch operators counts as
  that chain, whatever name it is registered under. One whose inside cannot be run here is an error;
- attention as one call of cuDNN forward and one backward.

Bytes are those of the tensors, each once for a launch: HBM traffic if no cache kept anything from one launch to the
next and everything within one. Weights have their FP8 copies and RoPE its tables, as in all micro-batches but the
first; wgrad adds to FP32 gradients; the gradient comes in through the output and the balance loss, as in training.

Kept for backward is every storage born in forward that the graph holds after it, and the layer's input if it does.
Weights are not, nor is an output that only the next layer needs. An entry belongs to the operation whose file launches
it (`OPERATIONS`), and to the line of the model that called it, in backward the one that made the graph's node.
"""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import deferred
from parallel.mesh import Mesh, single
from parallel.zero import GradientBuckets
from train.config import PretrainConfig, compose
from train.model.attention import RopeTables
from train.model.block import DenseBlock, MoEBlock
from train.model.config import ModelConfig
from train.model.moe import LocalDispatcher, TokenDispatcher
from train.model.precision import Precision
from train.studies.bench import layer as bench_layer
from train.studies.bench.launches import Launch, standing_in_for_a_gpu, touched_bytes
from train.studies.bench.minimum import minimum_bytes
from train.studies.plan.dry_run import as_rank
from train.studies.plan.memory import balanced_dispatcher
from train.studies.smoke_runs import PrecisionName, precision_config

LayerName = Literal["moe", "dense"]
LAYERS: tuple[LayerName, ...] = get_args(LayerName)
PRECISIONS: tuple[PrecisionName, ...] = ("fp8", "bf16")
Phase = Literal["forward", "backward"]
# As the blocks of the model are called: (what the layer before hands on, None) -> (what it hands on, routing or None).
Block = Callable[..., tuple[Any, ...]]

ROOT = Path(__file__).resolve().parents[3]
# Lines of ours, but for a mode that passes on what it is given.
OURS = re.compile(rf"{re.escape(str(ROOT))}/((?!train/model/kept_output)(?:kernels|parallel|train/model)/\S+?\.py)$")
ADDS = "residual and gradient adds"
# File -> operation, the first that fits; a file that is not listed is an operation of its own.
OPERATIONS = (
    (r"norm", "norm"),
    (r"train/model/block", ADDS),
    (r"train/model/attention|kernels/rope|heads", "RoPE and head layout"),
    (r"kernels/attention", "attention core"),
    (r"swiglu", "SwiGLU"),
    (r"permute|gather", "permute"),
    (r"parallel/(expert|hops|collectives)", "exchange of tokens"),
    (r"router|train/model/moe", "router"),
    (r"quantize|e5m6", "quantise"),
    (r"gemm|fp8_linear", "GEMM"),
    (r"deferred|parallel/zero", "adds of weight gradients"),
)
SHARED = re.compile(r"kernels/|parallel/collectives\.py|train/model/(layers|precision)\.py")
# Operators of torch that write what they are given without reading it.
WRITE_ONLY = re.compile(r"(copy|fill|zero|normal|uniform|alltoall_base)_$")
# Operators of torch that take only shape and type of what they are given.
FACTORY = re.compile(r"new_|.*_like$")
# Operators of torch that read some rows of their first tensor: at most as much as they return.
GATHERS = ("index_select", "gather", "embedding", "index")
# Operators of torch with more than one launch on a GPU: padding fills, then copies.
LAUNCHES = {"constant_pad_nd": 2}


@dataclass(frozen=True)
class Entry:
    """One operator of torch or one kernel."""

    phase: Phase
    operation: str
    line: str  # of the model, file:line
    launched_at: str  # the innermost line of ours
    name: str
    launches: int
    read_bytes: int
    written_bytes: int
    deferred: bool = False  # of a weight gradient that a schedule may run later


@dataclass(frozen=True)
class Kept:
    """One storage that backward needs."""

    operation: str
    line: str
    name: str  # of what made it
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class Ledger:
    """What one layer launches and keeps."""

    layer: LayerName
    precision: str
    tokens: int
    entries: tuple[Entry, ...]
    kept: tuple[Kept, ...]
    cluster: str = ""
    first_bytes: int | None = None  # of a step's first micro-batch, whose weight gradients replace; None: not counted

    @property
    def launches(self) -> int:
        """Of forward and backward."""
        return sum(entry.launches for entry in self.entries)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return _bytes(self.entries)

    @property
    def kept_bytes_per_token(self) -> float:
        """Of backward's tensors."""
        return sum(each.num_bytes for each in self.kept) / self.tokens


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.read_bytes + entry.written_bytes for entry in entries)


def sizes() -> tuple[ModelConfig, int]:
    """The layer bench's model, one rank of 32 in perfect balance, and its tokens."""
    v3 = bench_layer.v3_sizes()
    return v3.model, v3.tokens


def ledger(layer: LayerName, precision: PrecisionName) -> Ledger:
    """Trace one layer at DeepSeek-V3's width."""
    config, tokens = sizes()
    recipe, rope = precision_config(precision), RopeTables(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        block: nn.Module
        if layer == "moe":
            block = MoEBlock(config, recipe, rope, LocalDispatcher(config.n_routed_experts))
        else:
            block = DenseBlock(config, recipe, rope)
        buckets = GradientBuckets(block.named_parameters(), axis=single(torch.device("cpu")).dp, sharded=False)
        shape = 1, tokens, config.hidden_size
        entries, kept = trace(block, shape, recipe.dtype)
        first, _ = trace(block, shape, recipe.dtype, before=buckets.forget)
    return Ledger(layer, precision, tokens, entries, kept, first_bytes=_bytes(first))


def cluster_ledger(cluster: str) -> Ledger:
    """Trace a MoE layer and one micro-batch as rank 0 of a configuration in `configs/cluster/` runs them.

    Routing is balanced, and a collective counts with what it reads and writes on this rank.

    Raises:
        ValueError: no such cluster.
    """
    config = compose([f"+cluster={cluster}"])
    shape = config.run.micro_batch_sequences, config.data.sequence_length, config.model.hidden_size
    with as_rank(config, 0) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        block = block_of_rank(config, mesh)
        GradientBuckets(block.named_parameters(), axis=single(mesh.device).dp, sharded=False)
        entries, kept = trace(block, shape, Precision.of(config.precision).dtype)
    return Ledger("moe", config.precision.name, shape[0] * shape[1], entries, kept, cluster)


def block_of_rank(config: PretrainConfig, mesh: Mesh) -> MoEBlock:
    """A MoE layer of a rank, with its exchange of tokens under balanced routing and its recomputation."""
    model, recipe = config.model, Precision.of(config.precision)
    dispatcher: TokenDispatcher | None = balanced_dispatcher(model, config.precision, mesh)
    dispatcher = dispatcher or LocalDispatcher(model.n_routed_experts)
    block = MoEBlock(model, recipe, RopeTables(model), dispatcher)
    block.self_attn.recompute = bool(config.run.recompute)
    return block


def trace(
    block: Block, shape: Sequence[int], dtype: torch.dtype, *, before: Callable[[], None] = lambda: None
) -> tuple[tuple[Entry, ...], tuple[Kept, ...]]:
    """Run a block twice, `before` in between, in a FakeTensorMode; list what the second run launches and keeps."""
    with _as_on_a_gpu() as mode:
        mode.run(block, shape, dtype)
        before()
        mode.reset()
        mode.run(block, shape, dtype)
    return tuple(mode.entries), tuple(mode.kept)


class _Entrance(torch.autograd.Function):
    """Makes an input of the layer, which then lives as long as the layer keeps it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        return None, None, None


def forward(
    block: Block, shape: Sequence[int], dtype: torch.dtype
) -> dict[GradientEdge, tuple[torch.Size, torch.dtype]]:
    """Run a block and let go of its inputs and outputs; returns where each output's gradient enters, and its shape.

    As many tensors of `shape` go in as its forward takes before `documents`: what layers hand to each other.
    """
    count = len(inspect.signature(getattr(block, "forward", block)).parameters) - 1
    anchor = torch.empty(0, requires_grad=True)
    *stream, routing = block(*(_Entrance.apply(anchor, shape, dtype) for _ in range(count)), None)  # type: ignore[no-untyped-call]
    outputs = stream if routing is None else [*stream, routing.balance]
    return {get_gradient_edge(output): (output.shape, output.dtype) for output in outputs}


class _Trace(TorchDispatchMode):
    """Writes down what is launched while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self.phase: Phase = "forward"
        self.entries: list[Entry] = []
        self.kept: list[Kept] = []
        self._alive: dict[int, Kept] = {}

    def run(self, block: Block, shape: Sequence[int], dtype: torch.dtype) -> None:
        """One forward and one backward."""
        self.phase = "forward"
        # Nodes made now remember their lines, for launches of autograd itself.
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            ends = forward(block, shape, dtype)
        self.kept = [
            each if each.operation else replace(each, operation="the layer's input", name="")
            for each in self._alive.values()
            if each.num_bytes
        ]
        self.phase = "backward"
        torch.autograd.backward(list(ends), [torch.empty(shape, dtype=dtype) for shape, dtype in ends.values()])

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Go inside an operator that is made of others, else write it down."""
        kwargs = kwargs or {}
        key = _inside(func)
        if key is not None:
            with self:
                return func._op_dk(key, *args, **kwargs)
        result = func(*args, **kwargs)
        self._write_down(func, args, kwargs, result)
        return result

    def launch(self, launch: Launch) -> None:
        """Write down a kernel."""
        self._enter(launch.kernel, 1, launch.read, launch.written, launch.written)

    def _write_down(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        given, changed = _tensors((args, kwargs)), list(_changed(func, args, kwargs))
        if func.namespace == "c10d":
            # Its schemas do not say that the first tensor receives.
            changed = given[:1]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        made = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in known]
        base, name = func.overloadpacket.__name__, func.name().removeprefix("aten::")
        if "empty" in base:
            self._remember(made, "", "", name)
        elif made or changed:
            unread = changed if WRITE_ONLY.search(base) else []
            unread = given if FACTORY.match(base) else unread
            # `out` may be an operand too.
            given = _tensors(args) if "out" in func._overloadname else given
            read = [tensor for tensor in given if not any(tensor is each for each in unread)]
            limit = made if base in GATHERS else None
            self._enter(name, LAUNCHES.get(base, 1), read, [*made, *changed], made, limit=limit)

    def _enter(
        self,
        name: str,
        launches: int,
        read: Sequence[Tensor],
        written: Sequence[Tensor],
        filled: Sequence[Tensor],
        *,
        limit: Sequence[Tensor] | None = None,
    ) -> None:
        """One entry; of the first tensor that it reads no more than `limit` has, if that is given."""
        operation, line, launched_at = _place(name)
        read_bytes = touched_bytes(read)
        if limit is not None:
            read_bytes -= max(0, touched_bytes(read[:1]) - touched_bytes(limit))
        place = operation, line, launched_at
        written_bytes = touched_bytes(written)
        entry = Entry(self.phase, *place, name, launches, read_bytes, written_bytes, deferred=_is_deferred())
        self.entries.append(entry)
        self._remember(filled, operation, line, name)

    def _remember(self, tensors: Iterable[Tensor], operation: str, line: str, name: str) -> None:
        """Know a storage of forward until nobody holds it, by what filled it first."""
        if self.phase == "backward":
            return
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # An address is free for reuse only after the finalizer of its last owner has run.
            key = storage._cdata
            if key in self._alive and self._alive[key].operation:
                continue
            if key not in self._alive:
                weakref.finalize(storage, self._alive.pop, key, None)
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._alive[key] = Kept(operation, line, name, tuple(tensor.shape), dtype, storage.nbytes())


def _inside(func: Any) -> torch._C.DispatchKey | None:
    """The implementation to follow into, for an operator that is made of others on a GPU; None: it is one launch."""
    keys = torch._C.DispatchKey

    def has(key: torch._C.DispatchKey) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) or key in func.py_kernels

    if func.namespace in ("prim", "c10d") or (func.namespace == "aten" and not has(keys.CompositeImplicitAutograd)):
        return None
    for key in (keys.CUDA, keys.CompositeExplicitAutograd, keys.CompositeImplicitAutograd):
        if has(key) and (func.namespace != "aten" or key is keys.CompositeImplicitAutograd):
            return key
    raise ValueError(
        f"the ledger cannot see inside the operator {func.name()}: it has no implementation for a GPU in Python; "
        "register one for CUDA or for every device"
    )


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operator writes, by its schema."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[index] if index < len(args) else kwargs.get(argument.name))


def _place(name: str) -> tuple[str, str, str]:
    """Operation, line of the model and innermost line of ours, of what is launched now."""
    stack, node = list(_lines_of_the_stack()), list(_lines_of_the_node())
    if not stack and name.startswith("add"):
        # Autograd adds up the gradients of a tensor with several readers, while the node of one of them runs.
        return ADDS, _line_of_the_model(node), "autograd"
    lines = stack or node
    innermost = lines[0] if lines else "?"
    path = innermost.partition(":")[0]
    operation = next((known for pattern, known in OPERATIONS if re.search(pattern, path)), path)
    return operation, _line_of_the_model([*stack, *node]), innermost


def _is_deferred() -> bool:
    """Whether a closure runs that was pushed to `kernels.deferred`."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not deferred.push.__code__:
        frame = frame.f_back
    return frame is not None


def _line_of_the_model(lines: Iterable[str]) -> str:
    """The innermost line that is not one of a kernel or of a module that every room shares."""
    return next((line for line in lines if not SHARED.match(line)), "?")


def _lines_of_the_stack() -> Iterator[str]:
    """Lines of ours that run now, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if found := OURS.match(frame.f_code.co_filename):
            yield f"{found[1]}:{frame.f_lineno}"
        frame = frame.f_back


def _lines_of_the_node() -> Iterator[str]:
    """Lines of ours that made the node which autograd runs now, the innermost first."""
    node: Any = torch._C._current_autograd_node()
    for text in reversed(node.metadata.get("traceback_", []) if node is not None else []):
        place = re.match(r'\s*File "(.+?)", line (\d+)', text)
        if place and (found := OURS.match(place[1])):
            yield f"{found[1]}:{place[2]}"


@contextmanager
def _as_on_a_gpu() -> Iterator[_Trace]:
    """A trace of what runs within; torch's own settings are put back."""
    mode = _Trace()
    deterministic = torch.are_deterministic_algorithms_enabled()
    # Else `empty` fills. And torch refuses cuDNN.
    torch.use_deterministic_algorithms(False)
    try:
        with (
            standing_in_for_a_gpu(mode.launch),
            mock.patch.object(torch.backends.cuda, "can_use_cudnn_attention", _accept),
            mock.patch.object(F, "scaled_dot_product_attention", _cudnn_attention),
            torch.autograd.set_multithreading_enabled(False),
            mode,
        ):
            yield mode
    finally:
        torch.use_deterministic_algorithms(deterministic)


# A Mock would keep what it is asked about.
def _accept(params: object) -> bool:
    return True


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> Tensor:
    """What torch calls on a Hopper GPU; on a CPU it would choose another backend."""
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    o: Tensor = cudnn(q, k, v, None, True, 0.0, is_causal, False, scale=scale)[0]
    return o


def by_operation(found: Ledger) -> str:
    """One table: launches, bytes, what is kept, and the minimum, of each operation."""
    config, tokens = sizes()
    minimum = minimum_bytes(config, tokens, moe=found.layer == "moe", fp8=found.precision == "fp8")
    minimum = {} if found.cluster else minimum
    kept: dict[str, int] = defaultdict(int)
    for each in found.kept:
        kept[each.operation] += each.num_bytes
    rows = []
    for operation in dict.fromkeys([*(name for _, name in OPERATIONS), *(e.operation for e in found.entries), *kept]):
        entries = [entry for entry in found.entries if entry.operation == operation]
        if entries or operation in kept:
            rows.append((operation, *_sums(entries), kept[operation], minimum.get(operation, 0.0)))
    totals = [sum(column) for column in list(zip(*rows, strict=True))[1:]]
    of_cluster = f" of a rank of {found.cluster}" if found.cluster else ""
    lines = [
        f"{found.layer} layer{of_cluster}, {found.precision}, {found.tokens:,} tokens:",
        "",
        "| operation | launches forward | backward | GB read | GB written | kB kept a token | GB at least |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, forward, backward, read, written, num_kept, least in [*rows, ("**all**", *totals)]:
        lines.append(
            f"| {name} | {forward} | {backward} | {read / 1e9:.2f} | {written / 1e9:.2f} "
            f"| {num_kept / found.tokens / 1e3:.1f} | {f'{least / 1e9:.2f}' if minimum else '-'} |"
        )
    summary = f"{found.launches} launches, {found.bytes / 1e9:.2f} GB"
    if found.first_bytes is not None:
        summary += f" ({found.first_bytes / 1e9:.2f} where weight gradients are written, not added to)"
    summary += f", {found.kept_bytes_per_token / 1e3:.1f} kB kept a token"
    at_least = f"; at least {totals[-1] / 1e9:.2f} GB" if minimum else ""
    return "\n".join([*lines, "", f"{summary}{at_least}."])


def by_line(found: Ledger) -> str:
    """Every launch, those of one line and name together, in the order of the first; then every tensor that is kept."""
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in found.entries:
        groups[entry.phase, entry.line, entry.launched_at, entry.name, entry.operation].append(entry)
    lines = ["| | line | launched at | what | operation | launches | MB read | MB written |", "|" + "---|" * 8]
    for key, entries in groups.items():
        forward, backward, read, written = _sums(entries)
        lines.append(f"| {' | '.join(key)} | {forward + backward} | {read / 1e6:.1f} | {written / 1e6:.1f} |")
    lines += ["", "| kept for backward | dtype | made at | by | MB |", "|---|---|---|---|---|"]
    for kept in found.kept:
        by = f"{kept.name}, {kept.operation}" if kept.name else kept.operation
        lines.append(f"| {list(kept.shape)} | {kept.dtype} | {kept.line} | {by} | {kept.num_bytes / 1e6:.1f} |")
    return "\n".join(lines)


def _sums(entries: Iterable[Entry]) -> tuple[int, int, int, int]:
    """Launches forward and backward, bytes read and written."""
    entries = list(entries)
    forward, backward = (sum(e.launches for e in entries if e.phase == phase) for phase in get_args(Phase))
    return forward, backward, sum(e.read_bytes for e in entries), sum(e.written_bytes for e in entries)
