"""What a GPU test does on one rank, apart from the device: tests/test_gpu_cases.py runs the same lines on a CPU.

Among one rank every collective is a copy: the result is known, and the transport runs all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import zero
from parallel.mesh import Axis
from parallel.shards import LocalShard
from train.optim import offload
from train.optim.adamw import AdamW
from train.optim.config import OptimConfig
from train.optim.ema import Ema


def collectives(device: torch.device) -> dict[str, bool]:
    """Collective of training -> whether it gave back what one rank sent; the default group has one rank."""
    group = dist.group.WORLD
    found: dict[str, bool] = {}

    def into(name: str, sent: Tensor, call: Callable[[Tensor], object]) -> None:
        received = torch.full_like(sent, 7)
        call(received)
        found[name] = torch.equal(received, sent)

    rows = torch.randn(5, 384, device=device)
    into("sum", rows, lambda out: dist.all_reduce(out.copy_(rows), group=group))
    into("max", rows, lambda out: dist.all_reduce(out.copy_(rows), op=dist.ReduceOp.MAX, group=group))
    # Tokens on their way to experts: uneven splits, BF16, and E4M3 as bytes.
    for name, sent in (("all to all, bf16", rows.bfloat16()), ("all to all, bytes", rows.to(torch.uint8))):
        into(name, sent, lambda out, sent=sent: dist.all_to_all_single(out, sent, [5], [5], group=group))  # type: ignore[misc]
    # ZeRO-1: gradients in FP32, weights in BF16, waited for later.
    flat = rows.flatten()
    into("reduce-scatter", flat, lambda out: zero._reduce_scatter(out, flat, group=group, async_op=True).wait())
    # Or in E4M3 as bytes, behind the block maxima as integers.
    for name, sent in (("all-gather, bf16", flat.bfloat16()), ("all-gather, bytes", flat.to(torch.uint8))):
        into(name, sent, lambda out, sent=sent: zero.all_gather(out, sent, group=group, async_op=True).wait())  # type: ignore[misc]
    bits = flat.view(torch.int32)
    into("max of bits", bits, lambda out: dist.all_reduce(out.copy_(bits), op=dist.ReduceOp.MAX, group=group))
    return found


@torch.no_grad()
def average_beside_the_step(device: torch.device) -> tuple[Tensor, Tensor]:
    """The moving average of two updates while the step goes on to write the weights, and what it should be, FP64."""
    weight = torch.full((1 << 22,), 1.0, device=device)
    ema = Ema({"w": LocalShard.at(weight, tuple(weight.shape), (0,))}, decay=0.5)
    expected = torch.full((), 1.0, dtype=torch.float64)
    for value in (3.0, 5.0):
        ema.before_write()
        weight.fill_(value)
        ema.update()
        expected = expected.lerp(torch.tensor(value, dtype=torch.float64), 0.5)
        # The next step writes as soon as it may: too early, and the average sees it.
        ema.before_write()
        weight.fill_(1e6)
    ema.close()
    return ema.state_shards()["ema.w"].tensor, expected


def state_right_after_a_step(device: torch.device, place: Literal["none", "cpu"]) -> dict[str, Tensor]:
    """Weights, masters and moments of two updates, read as soon as the last one returns; small segments."""
    torch.manual_seed(1)
    drawn = {"w": torch.randn(2049, 1024).bfloat16(), "router": torch.randn(257, 1024)}
    parameters = {name: nn.Parameter(each.to(device)) for name, each in drawn.items()}
    gradients = {name: torch.randn(each.shape).to(device) for name, each in drawn.items()}
    buckets = zero.GradientBuckets(parameters.items(), axis=Axis("dp", 1, 0, None), sharded=False)
    with pytest.MonkeyPatch.context() as patch:
        # Several for each parameter, the last one short.
        patch.setattr(offload, "SEGMENT_ELEMENTS", 2**17)
        optimizer = AdamW([buckets], OptimConfig(offload=place))
    for step in (1, 2):
        if device.type == "cuda":
            # About a tenth of a second: first the updates are late, then the copies.
            copies = optimizer.staging._stream if optimizer.staging else None
            with torch.cuda.stream(copies if step == 2 else None):
                torch.cuda._sleep(200_000_000)
        for name, parameter in parameters.items():
            parameter.main_grad.copy_(gradients[name] * step)  # type: ignore[attr-defined]
        optimizer.step(lr=0.02, step=step)
    # In the order of the current stream; then, of a tensor on the host, what it holds now.
    state = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    state |= {name: piece.tensor.clone() for name, piece in optimizer.state_shards().items()}
    return {name: tensor.cpu() for name, tensor in state.items()}
