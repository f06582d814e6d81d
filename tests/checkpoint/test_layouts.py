"""A checkpoint saved on any number of ranks, cut in any way, loads on any other bit for bit; errors reach all ranks."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from parallel.shards import LocalShard
from tests.checkpoint.test_dcp import bits, flip_byte, full_disk, hold_writes
from tests.ranks import run_ranks
from train.checkpoint import dcp, publish
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.dcp import Saver, latest, load, save

STATE = {"train_state": {"step": 3}}
WORLDS = (1, 2, 4)
CUTS = ("even", "uneven", "other")

Shards = dict[str, "Tensor | LocalShard"]


def truth(seed: int = 0) -> dict[str, Tensor]:
    """The global tensors, of which no rank of a large run holds all."""
    generator = torch.Generator().manual_seed(seed)
    fp32 = torch.randn(1003, generator=generator)
    fp32[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    return {
        "optim.master.flat": fp32,
        "optim.exp_avg.flat": torch.randn(129, generator=generator).bfloat16(),
        "optim.quantised.flat": torch.randn(63, generator=generator).to(torch.float8_e4m3fn),
        "model.experts.gate_up_proj": torch.randn(8, 5, 3, generator=generator).bfloat16(),
        "optim.experts.master": torch.randn(8, 5, 3, generator=generator),
        "counts": torch.randint(-(2**62), 2**62, (6, 7), generator=generator),
        "model.norm.weight": torch.randn(17, 9, generator=generator),
        "model.layers.0.weight": torch.randn(7, 3, generator=generator),
        "model.layers.1.weight": torch.randn(7, 3, generator=generator),
        "rng.cpu": torch.randint(0, 256, (501,), generator=generator, dtype=torch.uint8),
        "step": torch.tensor(2**40 + seed),
        "empty": torch.zeros(0, 4),
    }


def bounds(num_elements: int, chunks: int, cut: str) -> list[int]:
    """Ends of consecutive chunks; with cuts other than even some are tiny or empty."""
    if cut == "even":
        return [num_elements * index // chunks for index in range(chunks + 1)]
    # A string seed is the same in every process.
    inner = random.Random(f"{cut} {num_elements} {chunks}")
    return [0, *sorted(inner.randint(0, num_elements) for _ in range(chunks - 1)), num_elements]


def narrowed(tensor: Tensor, dim: int, ends: list[int], index: int) -> LocalShard:
    offset = [0] * tensor.dim()
    offset[dim] = ends[index]
    local = tensor.narrow(dim, ends[index], ends[index + 1] - ends[index])
    return LocalShard.at(local, tuple(tensor.shape), tuple(offset))


def held(tensors: dict[str, Tensor], rank: int, world: int, cut: str) -> Shards:
    """What one rank holds: flat slices, experts on neighbours with replicas, columns, names of its stage, copies."""
    shards: Shards = {name: tensors[name] for name in ("model.norm.weight", "rng.cpu", "step", "empty")}
    for name, tensor in tensors.items():
        if name.endswith(".flat"):
            shards[name] = narrowed(tensor, 0, bounds(len(tensor), world, cut), rank)
    # ep = 2 of 4 ranks: ranks 0 and 2, 1 and 3 hold the same experts; their masters are cut further.
    ep = min(2, world)
    experts = tensors["model.experts.gate_up_proj"]
    shards["model.experts.gate_up_proj"] = narrowed(experts, 0, bounds(8, ep, cut), rank % ep)
    shards["optim.experts.master"] = narrowed(tensors["optim.experts.master"], 0, bounds(8, world, cut), rank)
    shards["counts"] = narrowed(tensors["counts"], 1, bounds(7, world, cut), rank)
    if rank == 0:
        shards["model.layers.0.weight"] = tensors["model.layers.0.weight"]
    if rank == world - 1:
        shards["model.layers.1.weight"] = tensors["model.layers.1.weight"]
    return shards


def local(value: Tensor | LocalShard) -> Tensor:
    return value.tensor if isinstance(value, LocalShard) else value


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """0x55 in every byte: no value of `truth` by accident, and what is not filled stays visible."""
    return {name: torch.full_like(bits(t), 0x55).view(t.dtype).view(t.shape) for name, t in tensors.items()}


def group_of(world: int) -> dist.ProcessGroup | None:
    return None if world == 1 else dist.group.WORLD


def differing(rank: int, world: int, path: Path, cut: str, seed: int = 0) -> list[str]:
    """Load this rank's shards; names whose bits are wrong inside the shard, or were touched outside of it."""
    target, expected = blank(truth()), blank(truth())
    for name, value in held(truth(seed), rank, world, cut).items():
        local(held(expected, rank, world, cut)[name]).copy_(local(value))
    assert load(path, held(target, rank, world, cut), group_of(world)) == STATE
    return [name for name in target if not torch.equal(bits(target[name]), bits(expected[name]))]


def save_all(rank: int, world: int, root: Path) -> None:
    for cut in CUTS:
        save(root / f"{world}_{cut}", tensors=held(truth(), rank, world, cut), state=STATE, group=group_of(world))


def load_all(rank: int, world: int, root: Path) -> dict[str, list[str]]:
    return {path.name: differing(rank, world, path, cut) for path in sorted(root.iterdir()) for cut in CUTS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one truth by 1, 2 and 4 ranks, each cut in three ways."""
    root = tmp_path_factory.mktemp("saved")
    for world in WORLDS:
        run_ranks(world, save_all, root) if world > 1 else save_all(0, 1, root)
    return root


@pytest.mark.parametrize("world", WORLDS)
def test_every_layout_loads_every_other_bit_for_bit(saved: Path, world: int) -> None:
    """From 1, 2 and 4 ranks and three cuts each, to `world` ranks and three cuts each: 27 ways."""
    results = run_ranks(world, load_all, saved) if world > 1 else [load_all(0, 1, saved)]
    assert len(results[0]) == len(WORLDS) * len(CUTS)
    for rank, result in enumerate(results):
        assert not any(result.values()), (rank, result)


@pytest.mark.parametrize("cut", CUTS)
def test_every_element_is_written_once_and_the_ranks_share_the_work(saved: Path, cut: str) -> None:
    elements: Counter[str] = Counter()
    bytes_of_rank: Counter[str] = Counter()
    for file in (saved / f"4_{cut}").glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (no mapping)
                tensor = shard.get_tensor(name)
                elements[name] += tensor.numel()
                bytes_of_rank[file.name[:11]] += tensor.nbytes
    assert elements == {name: tensor.numel() for name, tensor in truth().items() if tensor.numel()}
    if cut == "even":
        # The replicated norm (612 bytes) and generator (501) even out what the cuts leave.
        assert max(bytes_of_rank.values()) - min(bytes_of_rank.values()) <= 612
    manifest = json.loads((saved / f"4_{cut}" / "manifest.json").read_text())
    assert manifest["tensors"] == {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in sorted(truth().items())
    }


def sentence(act: Callable[[], Any]) -> str:
    """What a call raises, with its type."""
    try:
        act()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refused_loads(rank: int, world: int, saved: Path, root: Path) -> dict[str, str]:
    group = dist.group.WORLD
    path, damaged = saved / "2_even", root / "damaged"
    if rank == 0:
        shutil.copytree(path, damaged)
        flip_byte(max(damaged.glob("shard-00002-*")))
    dist.barrier()
    changes: dict[str, tuple[Path, int, Callable[[Shards], object]]] = {
        "extra": (path, 1, lambda shards: shards.update(surplus=torch.zeros(1))),
        "missing": (path, 1, lambda shards: shards.pop("model.layers.1.weight")),
        "shape": (path, 0, lambda shards: shards.update(step=torch.zeros(1, dtype=torch.int64))),
        "dtype": (path, 1, lambda shards: shards.update({"model.layers.1.weight": torch.zeros(7, 3).bfloat16()})),
        "no tensor": (path, 1, lambda shards: shards.update(step=3)),  # type: ignore[call-overload]
        "damaged": (damaged, 0, lambda shards: None),
        "no checkpoint": (root / "step_00000009", 0, lambda shards: None),
    }
    raised = {}
    for name, (where, who, change) in changes.items():
        target = blank(truth())
        shards = held(target, rank, world, "even")
        if rank == who:
            change(shards)
        raised[name] = sentence(lambda where=where, shards=shards: load(where, shards, group))
        assert all((bits(tensor) == 0x55).all() for tensor in target.values()), "a refused load changes nothing"
    return raised


def refused_saves(rank: int, world: int, root: Path) -> dict[str, str]:
    saver = Saver(root, CheckpointConfig(every_steps=1), dist.group.WORLD)
    flat = torch.arange(10.0)
    cases: dict[str, tuple[tuple[Any, Any], Any]] = {
        "overlap": ((LocalShard.at(flat[:6], (10,), (0,)), LocalShard.at(flat[5:], (10,), (5,))), {}),
        "hole": ((LocalShard.at(flat[:4], (10,), (0,)), LocalShard.at(flat[5:], (10,), (5,))), {}),
        "same start": ((LocalShard.at(flat[:4], (10,), (0,)), LocalShard.at(flat, (10,), (0,))), {}),
        "shape": ((flat, flat[:9]), {}),
        "no tensor": ((flat, 3), {}),
        "state": ((flat, flat), {"path": root} if rank == 1 else {}),
    }
    raised = {name: sentence(lambda v=v, s=s: saver.save_async(1, {"w": v[rank]}, s)) for name, (v, s) in cases.items()}
    raised["nothing"] = sentence(lambda: saver.save_async(1, {}, {}))
    saver.close()
    return raised


# What two ranks do -> case -> words of the refusal.
REFUSALS = {
    "refused_loads": {
        "extra": "does not fit: it lacks surplus.",
        "missing": "holds model.layers.1.weight, which no rank asked for",
        "shape": "tensor step is torch.int64 [1] on rank 0, but torch.int64 [] on rank 1",
        "dtype": "model.layers.1.weight (saved torch.float32 [7, 3], wanted torch.bfloat16 [7, 3])",
        "no tensor": "tensors['step'] is a int, not a tensor",
        "damaged": "is damaged: shard-00002-model-00001-of-00001.safetensors does not have the sha256",
        "no checkpoint": "there is no checkpoint",
    },
    "refused_saves": {
        "overlap": "shards of tensor w [10] overlap: [6] at [0] of rank 0, [5] at [5] of rank 1",
        "hole": "shards of tensor w [10] hold 9 of its 10 elements",
        "same start": "shards of tensor w [10] overlap",
        "shape": "tensor w is torch.float32 [10] on rank 0, but torch.float32 [9] on rank 1",
        "no tensor": "tensors['w'] is a int, not a tensor",
        "state": "state is not JSON",
        "nothing": "nothing to save",
    },
}


@pytest.mark.parametrize("act", REFUSALS)
def test_what_is_refused_on_one_rank_is_refused_on_all_with_one_sentence(two: Two, act: str) -> None:
    first, second = two.results[act]
    assert first == second
    for name, words in REFUSALS[act].items():
        assert first[name].startswith("ValueError: "), first[name]
        assert words in first[name], first[name]
    assert list((two.root / "refused_saves").iterdir()) == []


def save_while_training(rank: int, world: int, root: Path) -> tuple[list[str], list[float]]:
    """Writing is held back until the tensors have changed and a few collectives of training have run."""
    saver = Saver(root, CheckpointConfig(every_steps=1), dist.new_group(backend="gloo"))
    tensors, state, sums = truth(), dict(STATE), []
    with pytest.MonkeyPatch.context() as patch:
        released = hold_writes(patch)
        saver.save_async(1, held(tensors, rank, world, "uneven"), state)
        for tensor in tensors.values():
            tensor.view(torch.uint8).zero_() if tensor.dim() else tensor.zero_()
        state["train_state"] = {"step": 4}
        for step in range(20):
            if step == 10 + rank:
                released.set()
            value = torch.tensor([float(rank + step)])
            dist.all_reduce(value)
            sums.append(float(value))
        saver.close()
    return differing(rank, world, root / "step_00000001", "even"), sums


def test_async_saves_hold_the_old_values_and_keep_out_of_the_way_of_training(two: Two) -> None:
    for wrong, sums in two.results["save_while_training"]:
        assert wrong == []
        assert sums == [2.0 * step + 1 for step in range(20)]


# Where a save fails, on which of three ranks.
FAULTS: dict[str, tuple[Any, str, int]] = {
    "staging": (dcp._ShardWriter, "stage", 2),
    "making the directory": (dcp._ShardWriter, "prepare_local_plan", 1),
    "writing a shard": (os, "fsync", 1),
    "hashing a shard": (publish, "entry_of", 2),
    "the manifest": (publish, "write_manifest", 0),
}


def failing_saves(rank: int, world: int, root: Path) -> dict[str, tuple[str, str | None, list[str]]]:
    saver = Saver(root, CheckpointConfig(every_steps=1, keep=1), dist.group.WORLD)
    saver.save_async(1, held(truth(), rank, world, "even"), STATE)
    saver.wait()
    outcomes = {}
    for fault, (owner, name, who) in FAULTS.items():
        original = getattr(owner, name)
        if rank == who:
            setattr(owner, name, full_disk)
        raised = sentence(lambda: (saver.save_async(2, held(truth(2), rank, world, "even"), STATE), saver.wait()))
        setattr(owner, name, original)
        found = latest(root, dist.group.WORLD)
        wrong = ["no checkpoint"] if found is None else differing(rank, world, found, "other")
        outcomes[fault] = (raised, found.name if found else None, wrong)
    # The saver works on, and clears up.
    saver.save_async(5, held(truth(5), rank, world, "uneven"), STATE)
    saver.close()
    outcomes["next"] = ("", "", differing(rank, world, root / "step_00000005", "other", seed=5))
    return outcomes


def test_a_rank_that_fails_to_write_fails_the_save_on_all_and_the_older_one_stays(tmp_path: Path) -> None:
    results = run_ranks(3, failing_saves, tmp_path)
    assert results[0] == results[1] == results[2]
    for fault, (_, _, who) in FAULTS.items():
        raised, found, wrong = results[0][fault]
        assert raised == (
            f"SaveFailed: saving checkpoint {tmp_path / 'step_00000002'} failed: rank {who}: "
            "[Errno 28] No space left on device; those published before it are untouched"
        )
        assert (found, wrong) == ("step_00000001", [])
    assert results[0]["next"] == ("", "", [])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


# Where a rank is killed, and which one.
DEATHS: dict[str, tuple[Any, str, int]] = {
    "a rank that wrote half": (os, "fsync", 1),
    "the coordinator before the rename": (os, "rename", 0),
}


def killed_save(rank: int, world: int, root: Path, death: str) -> None:
    saver = Saver(root, CheckpointConfig(every_steps=1), dist.group.WORLD)
    saver.save_async(1, held(truth(), rank, world, "even"), STATE)
    saver.wait()
    owner, name, who = DEATHS[death]
    if rank == who:
        setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    raised = sentence(lambda: (saver.save_async(2, held(truth(2), rank, world, "even"), STATE), saver.wait()))
    (root / f"raised_{rank}").write_text(raised)


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_rank_fails_the_save_elsewhere_and_the_older_one_stays(tmp_path: Path, death: str) -> None:
    victim = DEATHS[death][2]
    with pytest.raises(pytest.fail.Exception, match=f"rank {victim}: died without a word"):
        run_ranks(2, killed_save, tmp_path, death, timeout_s=60)
    raised = (tmp_path / f"raised_{1 - victim}").read_text()
    assert raised.startswith(f"RuntimeError: saving checkpoint {tmp_path / 'step_00000002'} failed: "), raised
    assert latest(tmp_path) == tmp_path / "step_00000001"
    assert differing(0, 1, tmp_path / "step_00000001", "even") == []


def save_and_load_without_pickle(rank: int, world: int, root: Path) -> list[str]:
    """Every pickler and unpickler, and torch's collectives of objects, are switched off."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickler was called")

    patched: list[tuple[Any, str]] = [
        (pickle, name) for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler", "_Unpickler")
    ]
    patched += [(torch, "load"), (torch, "save")]
    patched += [(dist.distributed_c10d, name) for name in ("_object_to_tensor", "_tensor_to_object")]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in patched:
            patch.setattr(owner, name, refuse)
        saver = Saver(root, CheckpointConfig(every_steps=1), dist.group.WORLD)
        saver.save_async(1, held(truth(), rank, world, "even"), STATE)
        saver.close()
        if rank == 0:
            for name in (".metadata", "__0.metadata", "__0_0.distcp"):
                (root / "step_00000001" / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        dist.barrier()
        found = latest(root, dist.group.WORLD)
        assert found is not None
        return differing(rank, world, found, "other")


def test_ranks_exchange_and_read_no_pickle(two: Two) -> None:
    assert two.results["save_and_load_without_pickle"] == [[], []]


def changing_layouts(rank: int, world: int, root: Path) -> tuple[list[list[str]], str]:
    """One saver, other cuts from save to save, and a refused save between."""
    saver = Saver(root, CheckpointConfig(every_steps=1, keep=9), dist.group.WORLD)
    wrong = []
    for step, cut in enumerate(("even", "even", "other", "even")):
        if step == 3:
            shards = held(truth(), rank, world, "even") | ({"step": torch.zeros(2)} if rank == 1 else {})
            refused = sentence(lambda shards=shards: saver.save_async(3, shards, STATE))
        saver.save_async(step, held(truth(step), rank, world, cut), STATE)
        saver.wait()
        wrong.append(differing(rank, world, root / publish.step_name(step), "uneven", seed=step))
    saver.close()
    return wrong, refused


def test_a_plan_is_worked_out_again_when_any_rank_holds_other_shards(two: Two) -> None:
    for wrong, refused in two.results["changing_layouts"]:
        assert wrong == [[], [], [], []]
        assert refused.startswith("ValueError: tensor step is"), refused


def newest_of_damaged(rank: int, world: int, root: Path) -> str:
    saver = Saver(root, CheckpointConfig(every_steps=1, keep=9), dist.group.WORLD)
    for step in (1, 2, 3):
        saver.save_async(step, held(truth(), rank, world, "even"), STATE)
    saver.close()
    if rank == 1:
        (root / "step_00000003" / "manifest.json").unlink()
        next((root / "step_00000002").glob("shard-00001-*")).unlink()
    dist.barrier()
    return str(latest(root, dist.group.WORLD))


def test_all_ranks_agree_on_the_newest_whole_checkpoint(two: Two, tmp_path: Path) -> None:
    assert set(two.results["newest_of_damaged"]) == {str(two.root / "newest_of_damaged" / "step_00000001")}
    assert latest(tmp_path / "missing") is None


def on_two_ranks(rank: int, world: int, saved: Path, root: Path) -> dict[str, Any]:
    """What two ranks did and found, each in a folder of its own; one spawn serves six tests."""
    found: dict[str, Any] = {}
    for act in (refused_saves, save_while_training, save_and_load_without_pickle, changing_layouts, newest_of_damaged):
        found[act.__name__] = act(rank, world, root / act.__name__)
    return found | {"refused_loads": refused_loads(rank, world, saved, root / "refused_loads")}


class Two(NamedTuple):
    """The root of their folders, and act -> what each of the two ranks found."""

    root: Path
    results: dict[str, list[Any]]


@pytest.fixture(scope="module")
def two(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Two:
    root = tmp_path_factory.mktemp("two")
    for act in REFUSALS:
        (root / act).mkdir()
    ranks = run_ranks(2, on_two_ranks, saved, root)
    return Two(root, {name: [rank[name] for rank in ranks] for name in ranks[0]})


def test_a_shard_that_the_files_do_not_hold_whole_is_refused(saved: Path, tmp_path: Path) -> None:
    """Under forged hashes a lost shard must not leave old values behind."""
    path = tmp_path / "step_00000001"
    shutil.copytree(saved / "4_even", path)
    tensors = json.loads((path / "manifest.json").read_text())["tensors"]
    next(path.glob("shard-00003-*")).unlink()
    publish.write_manifest(path, tensors)
    with pytest.raises(ValueError, match=r"step_00000001 is damaged: .*the files hold \d+ of \d+ elements"):
        load(path, blank(truth()))


def test_shards_that_the_coordinator_does_not_see_fail_the_save(tmp_path: Path) -> None:
    """Each node wrote to a disk of its own."""
    entries = {"shard-00002-model-00001-of-00001.safetensors": {"bytes": 8, "sha256": ""}}
    with pytest.raises(FileNotFoundError, match=r"put run.directory on a file system that all nodes share"):
        publish.write_manifest(tmp_path, {}, entries)
