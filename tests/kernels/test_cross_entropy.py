"""Head and cross entropy in chunks: the sum and both gradients are FP64's, and no more logits exist than a chunk's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import cross_entropy
from kernels.cross_entropy import IGNORE, chunk_rows, cross_entropy_reference, linear_cross_entropy_sum
from kernels.fp8_linear import linear
from tests.kernels.gemm_inputs import assert_same_bits, relative_error
from train.studies.plan.live_bytes import LiveBytes

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def chunks_of_50(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 50)


def head(vocab: int, dtype: torch.dtype = FP32, width: int = 32) -> nn.Parameter:
    """A weight with FP32 sums of an earlier micro-batch."""
    weight = nn.Parameter((0.3 * torch.randn(vocab, width)).to(dtype))
    weight.main_grad = torch.ones(vocab, width)  # type: ignore[attr-defined]
    return weight


def labels_for(rows: int, vocab: int) -> Tensor:
    """Random targets; every third row has none."""
    labels = torch.randint(vocab, (rows,))
    labels[::3] = IGNORE
    return labels


@pytest.mark.usefixtures("chunks_of_50")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (2, 5), (63, 700), (129, 3000)])
def test_sum_and_gradients_of_main_and_mtp_are_those_of_fp64(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """Two losses, one of them weighted, share a head to whose sums they add; chunks of 1, 2, 32, 31 and 43 rows."""
    x, weight, labels = torch.randn(2, rows, 32).to(dtype).requires_grad_(), head(vocab, dtype), labels_for(rows, vocab)
    total = linear_cross_entropy_sum(x[0], weight, labels) + 0.3 * linear_cross_entropy_sum(
        x[1], weight, labels, scale=0.3
    )
    total.backward()
    exact_x, exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    sums = [F.cross_entropy(each @ exact.t(), labels, ignore_index=IGNORE, reduction="sum") for each in exact_x]
    expected = sums[0] + 0.3 * sums[1]
    expected.backward()
    # FP32: sums of 32 products and of at most 86 losses of one sign, and exp of differences up to 30: each 2^-24.
    # BF16: a logit of spread s = 0.3 sqrt(32) is rounded, d_logits, and dx: 2^-8 / sqrt(3) of each in the mean square,
    # and so sqrt(s^2 + 2) 2^-8 / sqrt(3) = 5e-3 of a gradient, twice that is allowed; a loss is s 2^-8 = 7e-3 off, of
    # random sign, in 5.
    bound, of_the_sum, of_one = (1e-5, 1e-5, 1e-6) if dtype == FP32 else (1e-2, 1e-3, 2e-2)
    assert total.dtype == FP32
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=of_the_sum, abs=of_one)
    main_grad: Tensor = weight.main_grad  # type: ignore[attr-defined]
    if rows > 1:
        assert relative_error(x.grad, exact_x.grad) < bound
        assert relative_error(main_grad - 1, exact.grad) < bound
    assert not x.grad[:, ::3].any()
    assert weight.grad is None


def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(linear(x, weight).float(), labels, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize(
    ("rows", "loss"), [(64, linear_cross_entropy_sum), (129, linear_cross_entropy_sum), (300, linear_cross_entropy_sum),
                       (300, plain)],
)  # fmt: skip
def test_no_more_logits_exist_than_those_of_a_chunk(
    rows: int, loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes alive at the peak of forward and backward, those inside operators apart: the buffer, dx, 40 bytes a row."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 64)
    vocab, width = 4096, 32
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(rows, width, dtype=BF16, requires_grad=True)
        weight, labels = head(vocab, BF16, width), torch.zeros(rows, dtype=torch.int64)
        live.peak = before = live.now
        loss(x, weight, labels).backward()
        most = live.peak - before
    assert chunk_rows(rows) == {64: 64, 129: 43, 300: 60}[rows]
    bound = 2 * vocab * chunk_rows(rows) + 2 * width * rows + 40 * rows
    assert (bound - 40 * rows < most < bound) is (loss is not plain)
    assert most > 2 * vocab * rows or loss is not plain


@pytest.mark.usefixtures("chunks_of_50")
def test_a_second_run_repeats_to_the_bit_and_evaluation_leaves_no_gradient() -> None:
    x, labels, start = torch.randn(129, 32).to(BF16), labels_for(129, 700), head(700, BF16)
    found = []
    for _ in range(2):
        again, weight = x.clone().requires_grad_(), nn.Parameter(start.detach().clone())
        weight.main_grad = torch.zeros(700, 32)  # type: ignore[attr-defined]
        with torch.no_grad():
            scored = linear_cross_entropy_sum(again, weight, labels)
        assert not weight.main_grad.any()  # type: ignore[attr-defined]
        loss = linear_cross_entropy_sum(again, weight, labels)
        loss.backward()
        assert torch.equal(scored, loss.detach())
        found.append((loss.detach()[None], again.grad, weight.main_grad))  # type: ignore[attr-defined]
    assert_same_bits(*found)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    x, weight, labels = torch.randn(9, 32), head(7), labels_for(9, 7)
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    linear_cross_entropy_sum(x, weight, labels).backward()
    assert (x.grad is None) == (frozen == "x")
    assert bool((weight.main_grad != 1).any()) == (frozen == "x")  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows", [0, 3])
def test_no_target_gives_zero_loss_and_zero_gradient(rows: int) -> None:
    x, weight = torch.randn(rows, 32, requires_grad=True), head(7)
    loss = linear_cross_entropy_sum(x, weight, torch.full((rows,), IGNORE))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(x.grad, torch.zeros(rows, 32))
    assert torch.equal(weight.main_grad, torch.ones(7, 32))  # type: ignore[attr-defined]


def test_another_weight_of_the_loss_than_was_said_is_refused() -> None:
    loss = linear_cross_entropy_sum(torch.zeros(2, 32), head(7), torch.tensor([0, 3]), scale=0.3)
    with pytest.raises(RuntimeError, match="weighted otherwise than `scale` said"):
        (0.29 * loss).backward()


@pytest.mark.parametrize("bad", [-1, 7, -101])
def test_a_label_outside_the_vocabulary_is_refused(bad: int) -> None:
    with pytest.raises(RuntimeError, match="a label lies outside the vocabulary"):
        linear_cross_entropy_sum(torch.zeros(2, 32), head(7), torch.tensor([0, bad]))


def on_device_code(logits: Tensor, labels: Tensor, gradient: float | None) -> Tensor:
    pytest.importorskip("triton", reason="Triton exists on Linux only; CI runs this test")
    from kernels.gpu import cross_entropy as gpu

    return gpu.cross_entropy(logits, labels, gradient)


rows_of = pytest.mark.parametrize("losses_of", [cross_entropy_reference, on_device_code])


@rows_of
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 9000), (63, 700), (128, 129), (129, 1), (4097, 16)])
def test_rows_are_those_of_fp64(
    rows: int, vocab: int, dtype: torch.dtype, losses_of: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps over a row, a step that is not full, and many rows a program."""
    if losses_of is on_device_code:
        # The interpreter takes a millisecond an operation and program, however large the program is.
        monkeypatch.setattr("kernels.gpu.cross_entropy.ELEMENTS", 4096 if rows == 1 else 1 << 15)
    logits, labels = (3 * torch.randn(rows, vocab)).to(dtype), labels_for(rows, vocab)
    labels[0] = vocab - 1
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, ignore_index=IGNORE, reduction="none")
    (0.3 * expected.sum()).backward()
    kept = logits.clone()
    losses = losses_of(kept, labels, None)
    assert torch.equal(kept, logits)
    assert torch.equal(losses_of(logits, labels, 0.3), losses)
    # A log of a sum of exponentials, each of a difference up to 30: 30 x 2^-24. A gradient in BF16 is rounded once.
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=2e-6)
    rounding = 1e-5 if dtype == FP32 else 2**-8 + 1e-5
    torch.testing.assert_close(logits.double(), exact.grad, rtol=rounding, atol=1e-7)
    assert not logits[labels == IGNORE].any()


@rows_of
def test_extremes_stay_in_their_rows(losses_of: Callable[..., Tensor]) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, math.nan, 0.0], [0.0, 0.0, 0.0], [-math.inf, 0.0, -math.inf]])
    losses = losses_of(logits, torch.tensor([1, 0, 2, 1]), 1.0)
    # One FP32 logarithm: 2^-23 relative.
    assert losses.tolist() == [2e4, pytest.approx(math.nan, nan_ok=True), pytest.approx(math.log(3), rel=1e-6), 0.0]
    assert torch.equal(logits[0], torch.tensor([1.0, -1.0, 0.0]))
    assert bool(logits[1].isnan().all())
    assert torch.equal(logits[3], torch.zeros(3))
