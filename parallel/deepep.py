"""DeepEP behind `layout.dispatch=deepep`: its kernels bring tokens to experts and back (arXiv:2412.19437 §3.2.2).

    dispatch               buffer.dispatch(x, ids, gates)                  tokens and routing in one call
    combine                buffer.combine(sums, handle)
    backward of combine    buffer.dispatch(gradient, handle)               no host wait
    backward of dispatch   buffer.combine(sums, handle, gates' gradients)  both in one call

x is BF16, or E4M3 with one FP32 scale per 1x128. Combine is BF16 only, in FP32 inside. With `deterministic` DeepEP
sorts what arrives by (source rank, token), which is the order of `parallel/hops.py`; of what it sums and rounds across
nodes, `layout.dispatch=node` is the reference. It reads on the host itself how many rows the experts have, once a
dispatch.

In a pair of micro-batches each call is made where its exchange is put together, and blocks the stream that it is on:
the pair hides none of them, for who may free DeepEP's own buffers meanwhile is not published.

The only file that imports DeepEP. It follows `ElasticBuffer` of version 2.1.0 (commit dd758ca, 2026-07-14), is tested
against that interface, and has not run on a GPU.

Shapes: tokens [tokens, hidden], received [received, hidden], as in `parallel/expert.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div
from kernels.permute import Grouping, partial_grouping
from parallel.expert import Delivery, ExpertParallelDispatcher, Wire
from parallel.flight import Journey, Lane, here
from parallel.hops import Arrivals, ExpertChoice
from parallel.mesh import Axis

INSTALL = (
    'pip install --no-deps "nvidia-nccl-cu13>=2.30.4" && git clone https://github.com/deepseek-ai/DeepEP && '
    "cd DeepEP && python setup.py install"
)
OURS = "use layout.dispatch=node, which needs nothing else"


def library() -> Any:
    """DeepEP itself; an ImportError, or whatever it raises, where it cannot be loaded."""
    return importlib.import_module("deep_ep")


def require(device: torch.device) -> None:
    """Refuse, before anything is built, a machine on which DeepEP cannot run.

    Raises:
        ValueError: no GPU of compute capability 9.0 or later, no DeepEP, or one without `ElasticBuffer`.
    """
    asked = "layout.dispatch=deepep"
    if device.type != "cuda":
        raise ValueError(f"{asked} runs on CUDA GPUs, and the device is {device}: {OURS}")
    if (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        found = ".".join(map(str, capability))
        raise ValueError(f"{asked} needs compute capability 9.0 or later, this GPU has {found}: {OURS}")
    if importlib.util.find_spec("deep_ep") is None:
        raise ValueError(f"{asked} needs DeepEP, which is not installed here: run `{INSTALL}`; {OURS}")
    try:
        found_library = library()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{asked}: DeepEP is installed but cannot be imported ({reason}); {OURS}") from error
    if not hasattr(found_library, "ElasticBuffer"):
        version = getattr(found_library, "__version__", "of unknown version")
        raise ValueError(f"{asked}: the installed DeepEP {version} lacks ElasticBuffer, 2.1.0 has it: run `{INSTALL}`")


@dataclass(frozen=True)
class DeepEPRoute:
    """`parallel.expert.TokenRoute` of one `ElasticBuffer.dispatch`."""

    buffer: Any
    handle: Any  # an EPHandle
    num_experts: int
    power_of_two: bool

    def to_experts(self, x: Tensor) -> Journey[Tensor]:
        """As in `TokenRoute`, BF16."""
        received: Tensor = self._again(x.bfloat16().contiguous())
        return here(received.to(x.dtype))

    def tiles_to_experts(self, tokens: Quantized) -> Journey[Quantized]:
        """As in `TokenRoute`."""
        return here(_tiles(self._again(_operand(tokens))))

    def to_tokens(self, sums: Tensor) -> Journey[Tensor]:
        """As in `TokenRoute`. Outside a pair called when the journey begins: where a layer runs again it never does."""
        return self._when_begun(sums) if Lane.current is None else here(self._combined(sums))

    def gradients_to_tokens(self, sums: Tensor, gates: Tensor) -> Journey[tuple[Tensor, Tensor]]:
        """As in `TokenRoute`."""
        tokens, home, _ = self.buffer.combine(
            sums.bfloat16().contiguous(), self.handle, topk_weights=gates.contiguous()
        )
        return here((tokens.to(sums.dtype), home))

    def _when_begun(self, sums: Tensor) -> Journey[Tensor]:
        yield from ()
        return self._combined(sums)

    def _combined(self, sums: Tensor) -> Tensor:
        tokens, _, _ = self.buffer.combine(sums.bfloat16().contiguous(), self.handle)
        home: Tensor = tokens.to(sums.dtype)
        return home

    def _again(self, x: Any) -> Any:
        # Both numbers are in the handle, but 2.1.0 looks at its arguments first.
        sms, experts = self.handle.num_sms, self.num_experts
        received, *_ = self.buffer.dispatch(x, handle=self.handle, num_experts=experts, num_sms=sms)
        return received


def _operand(tokens: Quantized) -> tuple[Tensor, Tensor]:
    """E4M3 [tokens, hidden] and FP32 scales [tokens, tiles], of any strides."""
    return tokens.payload.contiguous(), tokens.scale.t()


def _tiles(received: tuple[Tensor, Tensor]) -> Quantized:
    payload, scale = received
    return Quantized(payload, scale.t())


class DeepEPDispatcher(ExpertParallelDispatcher):
    """As its base, over DeepEP. The group's ranks must hold the same number of tokens, as micro-batches do."""

    def __init__(self, n_routed_experts: int, axis: Axis, *, wire: Wire, power_of_two: bool) -> None:
        assert wire != "fp32", "the configuration refuses it"
        super().__init__(n_routed_experts, axis, wire=wire, power_of_two=power_of_two)
        self._buffer: Any = None

    def begin(self, routing: ExpertChoice) -> object:
        """Nothing: DeepEP exchanges counts with the tokens."""
        return None

    @torch.no_grad()
    def _deliver(self, tokens: Tensor | Quantized, routing: ExpertChoice, begun: object) -> Journey[Delivery]:
        x = _operand(tokens) if isinstance(tokens, Quantized) else tokens.contiguous()
        width = (tokens.payload if isinstance(tokens, Quantized) else tokens).shape[1]
        ids, num_experts = routing.topk_ids, len(routing.counts)
        buffer = self._buffer_for(len(ids), hidden=width, topk=ids.shape[1])
        received, local_ids, gates, handle, _ = buffer.dispatch(
            x,
            ids.to(library().topk_idx_t).contiguous(),
            routing.gates.detach().contiguous(),
            num_experts=num_experts,
            expert_alignment=TILE,
        )
        # Aligned already, as published; what is aligned stays as it is.
        num_rows = sum(ceil_div(count, TILE) * TILE for count in handle.num_recv_tokens_per_expert_list)
        route = DeepEPRoute(buffer, handle, num_experts, self.power_of_two)
        arrived = _tiles(received) if isinstance(tokens, Quantized) else received
        return here(Delivery(arrived, Arrivals(local_ids.int(), gates, None, num_rows), route))

    @torch.no_grad()
    def _grouping(self, arrivals: Arrivals) -> Grouping:
        """DeepEP's ids are local, -1 elsewhere, and its order is that of (source rank, token)."""
        return partial_grouping(arrivals.ids, len(self.experts), num_rows=arrivals.num_rows)

    def _buffer_for(self, tokens: int, *, hidden: int, topk: int) -> Any:
        """One for all layers; its communicator forms here, on every rank of the axis alike."""
        if self._buffer is None or tokens > self._buffer.num_max_tokens_per_rank:
            assert isinstance(self.axis.group, dist.ProcessGroup), self.axis
            self._buffer = library().ElasticBuffer(
                self.axis.group,
                num_max_tokens_per_rank=tokens,
                hidden=hidden,
                num_topk=topk,
                use_fp8_dispatch=self.wire == "fp8",
                deterministic=True,
            )
        return self._buffer
