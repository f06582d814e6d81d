"""The moving average against its closed form in FP64, and against the same updates without a thread."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch import Tensor

from parallel.shards import LocalShard
from train.optim.ema import Ema

DECAY = 0.9
SHAPES = {"norm.weight": (129,), "layers.0.mlp.experts.down_proj": (3, 5, 7), "lm_head.weight": (1, 63), "none": (0, 4)}


def make_pieces(seed: int = 0) -> dict[str, LocalShard]:
    """Pieces as a second rank holds them: the second half of each tensor along its first dim."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LocalShard.at(
            torch.randn(shape, generator=generator), (2 * shape[0], *shape[1:]), (shape[0], *(0 for _ in shape[1:]))
        )
        for name, shape in SHAPES.items()
    }


def move(pieces: dict[str, LocalShard], ema: Ema | None, step: int) -> None:
    """What an optimizer does: changes the live tensors in place."""
    if ema is not None:
        ema.before_write()
    generator = torch.Generator().manual_seed(1000 + step)
    for piece in pieces.values():
        piece.tensor.add_(torch.randn(piece.tensor.shape, generator=generator), alpha=0.3)


def one_after_the_other(steps: int, *, decay: float = DECAY) -> dict[str, Tensor]:
    """The same updates without thread or staging."""
    pieces = make_pieces()
    average = {name: piece.tensor.clone() for name, piece in pieces.items()}
    for step in range(steps):
        move(pieces, None, step)
        for name, piece in pieces.items():
            average[name].lerp_(piece.tensor, 1.0 - decay)
    return average


def average_of(ema: Ema) -> dict[str, Tensor]:
    return {name.removeprefix("ema."): piece.tensor for name, piece in ema.state_shards().items()}


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
    pieces = make_pieces()
    exact = {name: decay**steps * piece.tensor.double() for name, piece in pieces.items()}
    largest = max(piece.tensor.abs().max() for piece in pieces.values() if piece.tensor.numel())
    ema = Ema(pieces, decay)
    for step in range(steps):
        move(pieces, ema, step)
        ema.update()
        for name, piece in pieces.items():
            exact[name] += (1 - decay) * decay ** (steps - 1 - step) * piece.tensor.double()
            if piece.tensor.numel():
                largest = max(largest, piece.tensor.abs().max())
    average = average_of(ema)
    ema.close()
    # One lerp rounds its sum once (2**-24 of at most M), and on the way the weight, the difference and the product
    # (three times 2**-24 of at most (1 - d) * 2 M); all errors shrink by d per later update, so they sum to a
    # geometric series. 1 % for the terms of second order.
    bound = 1.01 * (1 / (1 - decay) + 6) * 2**-24 * largest
    for name, piece in pieces.items():
        assert average[name].dtype == torch.float32
        torch.testing.assert_close(average[name].double(), exact[name], rtol=0, atol=float(bound))
        # The bound can tell: the weights themselves are far from their average, unless nothing is kept of it.
        if decay > 0 and piece.tensor.numel():
            assert (piece.tensor - exact[name]).abs().max() > 100 * bound


def test_the_thread_changes_no_bit() -> None:
    pieces = make_pieces()
    ema = Ema(pieces, DECAY)
    for step in range(20):
        move(pieces, ema, step)
        ema.update()
    expected = one_after_the_other(20)
    for name, average in average_of(ema).items():
        assert torch.equal(average, expected[name])
    ema.close()


def test_weights_that_change_while_an_update_is_under_way_do_not_leak_into_it() -> None:
    pieces = make_pieces()
    ema = Ema(pieces, DECAY)
    gate = Gate(ema)
    move(pieces, ema, 0)
    ema.update()
    # `update` has returned although the fold has not begun, and the optimizer goes on.
    assert gate.reached.wait(60)
    move(pieces, ema, 1)
    for piece in pieces.values():
        piece.tensor.fill_(float("nan"))
    gate.opened.set()
    expected = one_after_the_other(1)
    for name, average in average_of(ema).items():
        assert torch.equal(average, expected[name])
    ema.close()


def test_an_update_waits_for_the_one_before() -> None:
    """Else the second copy would overwrite the staging buffer of the first."""
    pieces = make_pieces()
    ema = Ema(pieces, DECAY)
    gate = Gate(ema)
    move(pieces, ema, 0)
    ema.update()
    move(pieces, ema, 1)
    second = threading.Thread(target=ema.update)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.opened.set()
    second.join(60)
    expected = one_after_the_other(2)
    for name, average in average_of(ema).items():
        assert torch.equal(average, expected[name])
    ema.close()


def test_a_resumed_average_goes_on_bit_by_bit() -> None:
    pieces = make_pieces()
    first = Ema(pieces, DECAY)
    for step in range(7):
        move(pieces, first, step)
        first.update()
    saved = {name: piece.tensor.clone() for name, piece in first.state_shards().items()}
    first.close()
    second = Ema(pieces, DECAY)
    for name, piece in second.state_shards().items():
        piece.tensor.copy_(saved[name])
    for step in range(7, 12):
        move(pieces, second, step)
        second.update()
    expected = one_after_the_other(12)
    for name, average in average_of(second).items():
        assert torch.equal(average, expected[name])
    second.close()


def test_the_state_says_where_each_piece_lies() -> None:
    pieces = make_pieces()
    ema = Ema(pieces, DECAY)
    state = ema.state_shards()
    assert set(state) == {f"ema.{name}" for name in SHAPES}
    for name, piece in pieces.items():
        mine = state[f"ema.{name}"]
        assert (mine.shard.global_shape, mine.shard.offsets) == (piece.shard.global_shape, piece.shard.offsets)
        # It starts as the weights, in memory of its own.
        assert torch.equal(mine.tensor, piece.tensor)
        assert piece.tensor.numel() == 0 or mine.tensor.data_ptr() != piece.tensor.data_ptr()
    ema.close()


def test_an_error_of_the_worker_ends_the_next_call_and_every_later_one() -> None:
    pieces = make_pieces()
    ema = Ema(pieces, DECAY)

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


def test_close_finishes_the_last_update_and_leaves_no_thread() -> None:
    pieces = make_pieces()
    ema = Ema(pieces, DECAY)
    gate = Gate(ema)
    move(pieces, ema, 0)
    ema.update()
    assert any(thread.name.startswith("ema") for thread in threading.enumerate())
    gate.opened.set()
    ema.close()
    ema.close()
    assert not any(thread.name.startswith("ema") for thread in threading.enumerate())
    expected = one_after_the_other(1)
    for name, average in average_of(ema).items():
        assert torch.equal(average, expected[name])


def test_a_rank_that_owns_nothing_has_an_average_of_nothing() -> None:
    ema = Ema({}, DECAY)
    ema.update()
    ema.before_write()
    ema.update()
    assert ema.state_shards() == {}
    ema.close()


def test_a_write_without_waiting_for_the_copy_is_refused_on_a_cpu_too() -> None:
    """On a GPU it would be a race; nothing would show it there."""
    ema = Ema(make_pieces(), DECAY)
    ema.update()
    with pytest.raises(AssertionError, match=r"call before_write\(\) before the optimizer changes the weights"):
        ema.update()
    ema.close()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay = {decay} must be in \[0, 1\); use a value such as 0\.999"):
        Ema(make_pieces(), decay)


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


def test_the_order_of_streams_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logic only, on recorded streams: side waits for the weights, worker and next writer wait for side."""
    log: list[str] = []
    main, side = Recorder("main", log), Recorder("side", log)
    ema = Ema(make_pieces(), DECAY)
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
    ema.close()
