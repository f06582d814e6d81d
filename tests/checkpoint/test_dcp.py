"""Round trip, snapshot isolation, refusals, replacement and pruning of checkpoints."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.checkpoint import dcp, publish
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.dcp import Saver, latest, load, save

STATE = {"train_state": {"step": 10, "tokens_seen": 14_800_000_000_000}, "store": "sha", "rate": 0.1, "none": None}


def make_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fp32 = torch.randn(5, 129, generator=generator)
    fp32[0, 0], fp32[0, 1], fp32[0, 2] = float("nan"), float("inf"), -0.0
    return {
        "model.layers.0.mlp.experts.gate_up_proj": fp32.to(torch.bfloat16).view(1, 5, 129),
        "model.norm.weight": torch.nn.Parameter(torch.randn(63, generator=generator)),
        "optim.master.layers.0": fp32,
        "optim.exp_avg.transposed": torch.randn(7, 3, generator=generator).t(),
        "model.bias": torch.randn((), generator=generator),
        "counts": torch.randint(-(2**62), 2**62, (17,), generator=generator),
        "step": torch.tensor(2**40 + seed),
        "rng.cpu": torch.randint(0, 256, (5056,), generator=generator, dtype=torch.uint8),
        "fp8": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(bits(tensor), bits(theirs[name])), name


def save_steps(directory: Path, *steps: int, keep: int = 9) -> None:
    saver = Saver(directory, CheckpointConfig(every_steps=1, keep=keep))
    for step in steps:
        saver.save_async(step, make_tensors(step), {"step": step})
    saver.close()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = make_tensors()
    save(tmp_path / "step_00000010", tensors=tensors, state=STATE)
    loaded = blank(tensors)
    addresses = {name: tensor.data_ptr() for name, tensor in loaded.items()}
    assert load(tmp_path / "step_00000010", loaded) == STATE
    assert_same_bits(loaded, tensors)
    assert addresses == {name: tensor.data_ptr() for name, tensor in loaded.items()}, "not filled in place"


def test_tensors_are_split_over_shards_and_joined_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "SHARD_BYTES", 2000)
    tensors = make_tensors()
    save(tmp_path / "step_00000010", tensors=tensors, state=STATE)
    assert len(list((tmp_path / "step_00000010").glob("shard-*.safetensors"))) == 4
    loaded = blank(tensors)
    load(tmp_path / "step_00000010", loaded)
    assert_same_bits(loaded, tensors)


def test_two_names_of_one_tensor_are_both_saved(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    save(tmp_path / "step_00000001", tensors={"embed": weight, "tied": weight, "row": weight[1]}, state={})
    loaded = {"embed": torch.zeros(2, 3), "tied": torch.zeros(2, 3), "row": torch.zeros(3)}
    load(tmp_path / "step_00000001", loaded)
    assert_same_bits(loaded, {"embed": weight, "tied": weight, "row": weight[1]})


def test_loading_raises_the_version_of_a_parameter(tmp_path: Path) -> None:
    """The version of a weight invalidates its cached FP8 copies."""
    parameter = torch.nn.Parameter(torch.ones(4))
    save(tmp_path / "step_00000001", tensors={"w": torch.zeros(4)}, state={})
    version = parameter._version
    load(tmp_path / "step_00000001", {"w": parameter})
    assert parameter._version > version
    assert parameter.requires_grad
    assert torch.equal(parameter.detach(), torch.zeros(4))


def test_manifest_lists_every_file_and_tensor(tmp_path: Path) -> None:
    path = tmp_path / "step_00000010"
    save(path, tensors=make_tensors(), state=STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    assert names(path) == sorted([*manifest["files"], "manifest.json"])
    assert manifest["files"]["state.json"]["bytes"] == (path / "state.json").stat().st_size
    assert manifest["tensors"]["model.layers.0.mlp.experts.gate_up_proj"] == {
        "shape": [1, 5, 129],
        "dtype": "torch.bfloat16",
    }
    assert manifest["tensors"]["step"] == {"shape": [], "dtype": "torch.int64"}


def hold_writes(patch: pytest.MonkeyPatch) -> threading.Event:
    """Writing begins only when the event is set, so that a test knows what happens first."""
    released = threading.Event()
    write_data = dcp._ShardWriter.write_data

    def held(self: Any, *args: Any) -> Any:
        assert released.wait(timeout=30)
        return write_data(self, *args)

    patch.setattr(dcp._ShardWriter, "write_data", held)
    return released


def test_changes_after_save_async_do_not_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = hold_writes(monkeypatch)
    tensors, state = make_tensors(), {"list": [1, 2]}
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    saver = Saver(tmp_path, CheckpointConfig(every_steps=1))
    saver.save_async(10, tensors, state)
    for tensor in tensors.values():
        tensor.detach().view(torch.uint8).zero_() if tensor.dtype == torch.float8_e4m3fn else tensor.detach().zero_()
    state["list"].append(3)
    released.set()
    saver.close()
    loaded = blank(tensors)
    assert load(tmp_path / "step_00000010", loaded) == {"list": [1, 2]}
    assert_same_bits(loaded, expected)


def test_save_async_returns_before_the_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = hold_writes(monkeypatch)
    saver = Saver(tmp_path, CheckpointConfig(every_steps=1))
    saver.save_async(1, make_tensors(), {})
    assert latest(tmp_path) is None
    released.set()
    saver.wait()
    assert latest(tmp_path) == tmp_path / "step_00000001"


def test_a_new_save_waits_for_the_one_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = hold_writes(monkeypatch)
    saver = Saver(tmp_path, CheckpointConfig(every_steps=1))
    saver.save_async(1, make_tensors(), {})
    threading.Timer(0.2, released.set).start()
    saver.save_async(2, make_tensors(), {})
    assert (tmp_path / "step_00000001").is_dir()
    saver.close()


def test_synchronous_config_publishes_before_it_returns(tmp_path: Path) -> None:
    saver = Saver(tmp_path, CheckpointConfig(every_steps=1, asynchronous=False))
    saver.save_async(1, make_tensors(), {})
    assert latest(tmp_path) == tmp_path / "step_00000001"
    saver.close()


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["wait", "close", "save_async"])
@pytest.mark.parametrize(("owner", "fails"), [(os, "fsync"), (publish, "write_manifest")], ids=["shard", "manifest"])
def test_error_of_a_background_save_surfaces_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, fails: str, call: str
) -> None:
    save_steps(tmp_path, 1)
    saver = Saver(tmp_path, CheckpointConfig(every_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr(owner, fails, full_disk)
        saver.save_async(2, make_tensors(), {})
        arguments = (3, make_tensors(), {}) if call == "save_async" else ()
        with pytest.raises(RuntimeError, match=r"step_00000002 failed.*No space left on device"):
            getattr(saver, call)(*arguments)
    assert latest(tmp_path) == tmp_path / "step_00000001"
    # The error is raised once; the saver works on.
    saver.save_async(4, make_tensors(4), {})
    saver.close()
    assert names(tmp_path) == ["step_00000001", "step_00000004"]


def test_no_thread_stays_after_close(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    save_steps(tmp_path, 1, 2)
    # DCP's worker ends by itself once its future is done.
    deadline = time.monotonic() + 30
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 30, 200, keep=2)
    assert names(tmp_path) == ["step_00000030", "step_00000200"]


def test_the_checkpoint_just_saved_survives_pruning_beside_higher_steps(tmp_path: Path) -> None:
    save_steps(tmp_path, 30, 40)
    save_steps(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step_00000005"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_steps(tmp_path, 7)
    saver = Saver(tmp_path, CheckpointConfig(every_steps=1))
    saver.save_async(7, make_tensors(99), {"second": True})
    saver.close()
    loaded = blank(make_tensors())
    assert load(tmp_path / "step_00000007", loaded) == {"second": True}
    assert_same_bits(loaded, make_tensors(99))
    assert names(tmp_path) == ["step_00000007"]


def test_latest_orders_by_number_and_knows_its_own_names_only(tmp_path: Path) -> None:
    assert latest(tmp_path / "missing") is None
    assert latest(tmp_path) is None
    save_steps(tmp_path, 9, 10, 123_456_789)
    for stray in ("step_99", "step_99999999x", "step_99999998.bak", ".writing-step_99999997", "notes"):
        (tmp_path / stray).mkdir()
    (tmp_path / "step_99999996").write_text("a file, not a directory")
    assert latest(tmp_path) == tmp_path / "step_123456789"


def shard(path: Path) -> Path:
    return next(path.glob("shard-*.safetensors"))


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte in a shard": (lambda path: flip_byte(shard(path)), "shard-.*sha256"),
    "truncated shard": (lambda path: truncate(shard(path)), "shard-.*bytes where the manifest says"),
    "missing shard": (lambda path: shard(path).unlink(), "shard-.*is missing"),
    "stray shard": (lambda path: (path / "shard-9.safetensors").write_bytes(b""), "shard-9.safetensors is not in"),
    "flipped byte in the state": (lambda path: flip_byte(path / "state.json"), "state.json"),
    "missing state": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "flipped byte in the manifest": (lambda path: flip_byte(path / "manifest.json"), "manifest.json"),
    "truncated manifest": (lambda path: truncate(path / "manifest.json"), "manifest.json is not JSON"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json is not a manifest"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name_and_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 1, 2)
    inflict, named = DAMAGES[damage]
    inflict(tmp_path / "step_00000002")
    tensors = blank(make_tensors())
    with pytest.raises(ValueError, match=f"step_00000002 is damaged: {named}"):
        load(tmp_path / "step_00000002", tensors)
    assert_same_bits(tensors, blank(make_tensors()))
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "step_00000001"
    assert "step_00000002 is damaged" in caplog.text
    assert load(tmp_path / "step_00000001", tensors) == {"step": 1}
    assert_same_bits(tensors, make_tensors(1))


def test_every_flipped_byte_of_the_small_files_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001"
    save(path, tensors={"w": torch.ones(2)}, state={"step": 1})
    for file in (path / "manifest.json", path / "state.json"):
        whole = file.read_bytes()
        for position in range(len(whole)):
            content = bytearray(whole)
            content[position] ^= 1
            file.write_bytes(content)
            with suppress(ValueError):
                assert load(path, {"w": torch.zeros(2)}) == {"step": 1}
                # White space between JSON tokens is the one thing that may change.
                assert whole[position : position + 1].isspace(), (file.name, position)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update(new=torch.zeros(1)), "lacks new"),
        (lambda t: t.pop("counts"), "holds counts"),
        (lambda t: t.update(counts=torch.zeros(18, dtype=torch.int64)), r"counts \(saved torch.int64 \[17\], wanted"),
        (lambda t: t.update(counts=torch.zeros(17)), r"counts \(saved torch.int64 \[17\], wanted torch.float32"),
        (lambda t: t.update(step=torch.zeros(1, dtype=torch.int64)), r"step \(saved torch.int64 \[\], wanted"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "0-d against 1-d"],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], named: str
) -> None:
    save_steps(tmp_path, 1)
    tensors = blank(make_tensors())
    change(tensors)
    with pytest.raises(ValueError, match=named):
        load(tmp_path / "step_00000001", tensors)
    assert all(not bits(tensor).any() for tensor in tensors.values()), "a refused load must change nothing"


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no checkpoint .*step_00000001"):
        load(tmp_path / "step_00000001", blank(make_tensors()))


@pytest.mark.parametrize(
    ("tensors", "state", "named"),
    [
        ({"w": 3}, {}, r"tensors\['w'\] is a int, not a tensor"),
        ({}, {}, "at least one tensor"),
        ({"w": torch.ones(1)}, {"path": Path("x")}, "state is not JSON"),
        ({"w": torch.ones(1)}, {"loss": float("nan")}, "state is not JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(
    tmp_path: Path, tensors: dict[str, Any], state: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Saver(tmp_path, CheckpointConfig(every_steps=1)).save_async(1, tensors, state)
    assert names(tmp_path) == []


@pytest.mark.parametrize("field", ["every_steps", "keep"])
def test_config_refuses_zero(field: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.{field} = 0"):
        CheckpointConfig(**({"every_steps": 1} | {field: 0}))  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [-10, 15])
def test_checkpoints_that_stay_are_ones_that_are_made(steps: int) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.keep_every_steps = {steps} must be a multiple"):
        CheckpointConfig(every_steps=10, keep_every_steps=steps)
