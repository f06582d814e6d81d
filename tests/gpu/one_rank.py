"""What a GPU test does on one rank, apart from the device: tests/test_gpu_cases.py runs the same lines on a CPU.

Among one rank every collective is a copy: the result is known, and the transport runs all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import zero
from parallel.shards import LocalShard
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
    weights = flat.bfloat16()
    into("all-gather", weights, lambda out: zero._all_gather(out, weights, group=group, async_op=True).wait())
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
