"""The moving average against its closed form in FP64, and against the same updates without a thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel.shards import LocalShard
from train.optim.ema import Ema

DECAY = 0.9
SHAPES = {"norm.weight": (129,), "layers.0.mlp.experts.down_proj": (3, 5, 7), "lm_head.weight": (1, 63), "none": (0, 4)}


def make_masters(seed: int = 0) -> dict[str, LocalShard]:
    """Shards as a second rank holds them: the second half of each tensor along its first dim."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LocalShard.at(
            torch.randn(shape, generator=generator), (2 * shape[0], *shape[1:]), (shape[0], *(0 for _ in shape[1:]))
        )
        for name, shape in SHAPES.items()
    }


def move(masters: dict[str, LocalShard], ema: Ema | None, step: int) -> None:
    """What an optimizer does: changes the live tensors in place."""
    if ema is not None:
        ema.before_write()
    generator = torch.Generator().manual_seed(1000 + step)
    for master in masters.values():
        master.tensor.add_(torch.randn(master.tensor.shape, generator=generator), alpha=0.3)


def one_after_the_other(steps: int, *, decay: float = DECAY) -> dict[str, Tensor]:
    """The same updates without thread or staging."""
    masters = make_masters()
    average = {name: master.tensor.clone() for name, master in masters.items()}
    for step in range(steps):
        move(masters, None, step)
        for name, master in masters.items():
            average[name].lerp_(master.tensor, 1.0 - decay)
    return average


def average_of(ema: Ema) -> dict[str, Tensor]:
    return {name.removeprefix("ema."): master.tensor for name, master in ema.state_shards().items()}


def assert_average(ema: Ema, steps: int) -> None:
    """Bit for bit that of so many steps without a thread; closes it."""
    expected = one_after_the_other(steps)
    found = average_of(ema)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    ema.close()


@pytest.fixture
def masters() -> dict[str, LocalShard]:
    return make_masters()


@pytest.fixture
def ema(masters: dict[str, LocalShard]) -> Iterator[Ema]:
    """An average of `masters`; a worker that failed raises again on close."""
    ema = Ema(masters, DECAY)
    yield ema
    with contextlib.suppress(MemoryError):
        ema.close()


class Gate:
    """Holds the worker's thread, so that a test decides what happens while an update is under way."""

    def __init__(self, ema: Ema) -> None:
        self.opened, self.reached, fold = threading.Event(), threading.Event(), ema._fold

        def held(copied: torch.cuda.Event | None) -> None:
            self.reached.set()
            assert self.opened.wait(60)
            fold(copied)

        ema._fold = held  # type: ignore[method-assign]


@pytest.mark.parametrize("decay", [0.0, 0.3, DECAY, 0.999])
def test_the_average_is_the_closed_form_in_fp64(decay: float) -> None:
    """e_T = d^T w_0 + (1 - d) sum_t d^(T - t) w_t."""
    steps = 40
    masters = make_masters()
    exact = {name: decay**steps * master.tensor.double() for name, master in masters.items()}
    largest = max(master.tensor.abs().max() for master in masters.values() if master.tensor.numel())
    ema = Ema(masters, decay)
    for step in range(steps):
        move(masters, ema, step)
        ema.update()
        for name, master in masters.items():
            exact[name] += (1 - decay) * decay ** (steps - 1 - step) * master.tensor.double()
            if master.tensor.numel():
                largest = max(largest, master.tensor.abs().max())
    average = average_of(ema)
    ema.close()
    # One lerp rounds its sum once (2**-24 of at most M), and on the way the weight, the difference and the product
    # (three times 2**-24 of at most (1 - d) * 2 M); all errors shrink by d per later update, so they sum to a
    # geometric series. 1 % for the terms of second order.
    bound = 1.01 * (1 / (1 - decay) + 6) * 2**-24 * largest
    for name, master in masters.items():
        assert average[name].dtype == torch.float32
        torch.testing.assert_close(average[name].double(), exact[name], rtol=0, atol=float(bound))
        # The bound can tell: the weights themselves are far from their average, unless nothing is kept of it.
        if decay > 0 and master.tensor.numel():
            assert (master.tensor - exact[name]).abs().max() > 100 * bound


def test_the_thread_changes_no_bit(masters: dict[str, LocalShard], ema: Ema) -> None:
    for step in range(20):
        move(masters, ema, step)
        ema.update()
    assert_average(ema, 20)


def test_weights_that_change_while_an_update_is_under_way_do_not_leak_into_it(
    masters: dict[str, LocalShard], ema: Ema
) -> None:
    gate = Gate(ema)
    move(masters, ema, 0)
    ema.update()
    # `update` has returned although the fold has not begun, and the optimizer goes on.
    assert gate.reached.wait(60)
    move(masters, ema, 1)
    for master in masters.values():
        master.tensor.fill_(float("nan"))
    gate.opened.set()
    assert_average(ema, 1)


def test_an_update_waits_for_the_one_before(masters: dict[str, LocalShard], ema: Ema) -> None:
    """Else the second copy would overwrite the staging buffer of the first."""
    gate = Gate(ema)
    move(masters, ema, 0)
    ema.update()
    move(masters, ema, 1)
    second = threading.Thread(target=ema.update)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.opened.set()
    second.join(60)
    assert_average(ema, 2)


def test_a_resumed_average_goes_on_bit_by_bit() -> None:
    masters = make_masters()
    first = Ema(masters, DECAY)
    for step in range(7):
        move(masters, first, step)
        first.update()
    saved = {name: master.tensor.clone() for name, master in first.state_shards().items()}
    first.close()
    second = Ema(masters, DECAY)
    for name, master in second.state_shards().items():
        master.tensor.copy_(saved[name])
    for step in range(7, 12):
        move(masters, second, step)
        second.update()
    assert_average(second, 12)


def test_the_state_says_which_shard_each_average_is(masters: dict[str, LocalShard], ema: Ema) -> None:
    state = ema.state_shards()
    assert set(state) == {f"ema.{name}" for name in SHAPES}
    for name, master in masters.items():
        mine = state[f"ema.{name}"]
        assert (mine.shard.global_shape, mine.shard.offsets) == (master.shard.global_shape, master.shard.offsets)
        # It starts as the weights, in memory of its own.
        assert torch.equal(mine.tensor, master.tensor)
        assert master.tensor.numel() == 0 or mine.tensor.data_ptr() != master.tensor.data_ptr()


def test_an_error_of_the_worker_ends_the_next_call_and_every_later_one(ema: Ema) -> None:

    def fails(copied: torch.cuda.Event | None) -> None:
        raise MemoryError("no page left")

    ema._fold = fails  # type: ignore[method-assign]
    ema.update()
    for call in (ema.wait, ema.state_shards, ema.close):
        with pytest.raises(MemoryError, match="no page left"):
            call()
    ema.before_write()
    with pytest.raises(MemoryError, match="no page left"):
        ema.update()


def test_close_finishes_the_last_update_and_leaves_no_thread(masters: dict[str, LocalShard], ema: Ema) -> None:
    gate = Gate(ema)
    move(masters, ema, 0)
    ema.update()
    assert any(thread.name.startswith("ema") for thread in threading.enumerate())
    gate.opened.set()
    ema.close()
    ema.close()
    assert not any(thread.name.startswith("ema") for thread in threading.enumerate())
    assert_average(ema, 1)


def test_a_rank_that_owns_nothing_has_an_average_of_nothing() -> None:
    ema = Ema({}, DECAY)
    ema.update()
    ema.before_write()
    ema.update()
    assert ema.state_shards() == {}
    ema.close()


def test_a_write_without_waiting_for_the_copy_is_refused_on_a_cpu_too(ema: Ema) -> None:
    """On a GPU it would be a race; nothing would show it there."""
    ema.update()
    with pytest.raises(AssertionError, match=r"call before_write\(\) before the optimizer changes the weights"):
        ema.update()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay = {decay} must be in \[0, 1\); use a value such as 0\.999"):
        Ema(make_masters(), decay)


class Recorder:
    """Stands for a CUDA stream and its event, and notes what is asked of them and when."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, "cuda:0"

    def wait_stream(self, other: Recorder) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> Recorder:
        self.log.append(f"event on {self.name}")
        return Recorder("event", self.log)

    def wait_event(self, event: Recorder) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self.log.append(f"{threading.current_thread().name.partition('_')[0]} thread waits for {self.name}")


def test_the_order_of_streams_on_a_gpu(ema: Ema, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logic only, on recorded streams: side waits for the weights, worker and next writer wait for side."""
    log: list[str] = []
    main, side = Recorder("main", log), Recorder("side", log)
    copy = ema._copy
    monkeypatch.setattr(ema, "_stream", side)
    monkeypatch.setattr(ema, "_copy", lambda: (log.append("copy"), copy()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(log.append(f"on {stream.name}")))
    ema.before_write()
    ema.update()
    ema.wait()
    ema.before_write()
    assert log == [
        "side waits for main",
        "on side",
        "copy",
        "event on side",
        "ema thread waits for event",
        "main waits for event",
    ]
