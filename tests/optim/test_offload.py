"""`optim.offload=cpu` is the same optimizer: every bit, in segments or whole, and checkpoints cross.

On a CPU the two buffers and the order of the copies are those of a GPU; the stream beside the current one is not run.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.golden.runs import COMMON, SMALL, standing_in, write_golden_store
from tests.ranks import run_ranks
from tests.system.lives import copied_state, losses, trainer_on
from train.config import compose
from train.observe.sinks import read_run
from train.optim import offload
from train.optim.config import OptimConfig
from train.trainer import Trainer

SHORT = ["schedule.total_tokens=512", "checkpoint.every_steps=2", "schedule.lr_peak=0.02", "schedule.warmup_steps=0"]
STEP_2 = "checkpoints/step_00000002"


def trained(name: str, place: str, moments: str, *overrides: str) -> tuple[Trainer, dict[str, Tensor]]:
    """Four clipped FP8 steps, or what is left of them; and the final state."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    changes = [*SMALL, *SHORT, "precision=fp8", f"run.name={name}", f"optim.offload={place}", "optim.ema_decay=null"]
    # QK-clip scales rows of the segments, too.
    changes += [f"optim.moments_dtype={moments}", "optim.clip_norm=0.5", "optim.qk_clip=0.01", *overrides]
    trainer = trainer_on(compose(list({text.split("=")[0]: text for text in [*COMMON, *changes]}.values())), world)
    trainer.resume()
    trainer.fit()
    return trainer, copied_state(trainer)


@pytest.mark.parametrize("moments", ["bf16", "fp8"])
def test_every_bit_is_that_of_a_state_on_the_device_and_checkpoints_cross(
    moments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_golden_store(tmp_path / "store")
    # Matrices are then several segments, the last one short.
    monkeypatch.setattr(offload, "SEGMENT_ELEMENTS", 384)
    runs = tmp_path / "runs"
    with standing_in(tmp_path):
        _, expected = trained("none", "none", moments)
        trainer, found = trained("cpu", "cpu", moments)
        states = {"cpu": found}
        for saved_by, place in (("none", "cpu"), ("cpu", "none")) if moments == "bf16" else ():
            shutil.copytree(runs / saved_by / STEP_2, runs / f"{saved_by}-{place}" / STEP_2)
            _, states[f"{saved_by}-{place}"] = trained(f"{saved_by}-{place}", place, moments)
    assert losses(runs / "cpu") == losses(runs / "none")
    assert min(record["grad/norm"] for record in read_run(runs / "none")) > 0.5
    for name, state in states.items():
        assert state.keys() == expected.keys()
        assert not [each for each in expected if not torch.equal(state[each], expected[each])], name
        assert [r["loss/total"] for r in read_run(runs / name)][-2:] == [s[0] for s in losses(runs / "none")[-2:]]
    staging = trainer.engine.optimizer.staging
    assert staging is not None
    # Two buffers of a master and two moments.
    assert staging.num_bytes == 2 * 384 * (4 + 2 * (2 if moments == "bf16" else 4))


def offloaded(rank: int, world: int, folder: Path) -> tuple[set[str], dict[str, tuple[int, int]], int]:
    """Tensors of this rank that depend on where the state is; name -> elements, of how many; bytes of the buffers."""
    with standing_in(folder):
        (_, expected), (trainer, found) = (
            trained(each, each, "bf16", "layout.dp=2", "layout.ep=2") for each in ("none", "cpu")
        )
    assert found.keys() == expected.keys()
    optimizer = trainer.engine.optimizer
    assert optimizer.staging is not None
    held = {
        name: (piece.tensor.numel(), math.prod(piece.shard.global_shape))
        for name, piece in optimizer.state_shards().items()
    }
    differing = {name for name in expected if not torch.equal(found[name], expected[name])}
    return differing, held, optimizer.staging.num_bytes


@pytest.mark.long
def test_every_rank_keeps_its_share_in_its_host_memory(tmp_path: Path) -> None:
    write_golden_store(tmp_path / "store")
    ranks = run_ranks(2, offloaded, tmp_path)
    for differing, held, staged in ranks:
        assert differing == set()
        assert staged == 2 * max(elements for elements, _ in held.values()) * (4 + 2 + 2)
    # Each element of the state is on one rank.
    whole = {name: of for _, held, _ in ranks for name, (_, of) in held.items()}
    assert whole == {name: sum(held.get(name, (0, 0))[0] for _, held, _ in ranks) for name in whole}
    assert losses(tmp_path / "runs/cpu") == losses(tmp_path / "runs/none")


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [("backend", "deepspeed", "optim.backend=native"), ("ema_decay", 0.9, "optim.ema_decay=null")],
)
def test_what_needs_masters_on_the_device_is_refused(name: str, value: object, cure: str) -> None:
    with pytest.raises(
        ValueError, match=rf"takes masters off the device, but optim.{name} = {value} .* optim.offload=none, or {cure}$"
    ):
        OptimConfig(offload="cpu", **{name: value})  # type: ignore[arg-type]
