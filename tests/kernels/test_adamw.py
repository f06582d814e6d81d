"""AdamW equals torch.optim.AdamW with FP32 moments; BF16 moments err by one rounding when they are stored."""

from __future__ import annotations

import pytest
import torch

from kernels import adamw
from kernels.adamw import AdamWHyper, adamw_update, adamw_update_reference
from tests.kernels.gemm_inputs import relative_error


def hyper(step: int, weight_decay: float = 0.1) -> AdamWHyper:
    return {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay, "step": step}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_equal_torch_adamw(weight_decay: float) -> None:
    start = torch.randn(63, 129)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    master, exp_avg, exp_avg_sq = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 21):
        theirs.grad = torch.randn_like(start)
        adamw_update(master, theirs.grad, exp_avg, exp_avg_sq, **hyper(step, weight_decay))
        optimizer.step()
    # Twenty steps of about eight fp32 roundings (2^-24) of values up to about 4: 160 * 4 * 6e-8 = 4e-5 at
    # worst, of random sign, so a tenth of that.
    torch.testing.assert_close(master, theirs.detach(), rtol=0, atol=4e-6)
    # The moments see three roundings a step, which decay with the moment.
    torch.testing.assert_close(exp_avg, optimizer.state[theirs]["exp_avg"], rtol=0, atol=1e-6)
    torch.testing.assert_close(exp_avg_sq, optimizer.state[theirs]["exp_avg_sq"], rtol=1e-5, atol=1e-7)


def test_the_first_step_is_lr_times_the_sign_whatever_the_size_of_the_gradient() -> None:
    master = torch.zeros(3)
    grad = torch.tensor([1e-3, -5.0, 0.0])
    adamw_update(master, grad, torch.zeros(3), torch.zeros(3), **hyper(1))
    # Bias correction makes m_hat = g, v_hat = g^2; eps = 1e-8 against 1e-3 moves the step by 1e-5 relative.
    torch.testing.assert_close(master, torch.tensor([-1e-2, 1e-2, 0.0]), rtol=2e-5, atol=0)


def test_decay_is_decoupled_from_the_gradient() -> None:
    master = torch.tensor([2.0])
    adamw_update(master, torch.zeros(1), torch.zeros(1), torch.zeros(1), **hyper(1))
    # 2 * (1 - 1e-2 * 0.1), one fp32 rounding.
    assert float(master) == pytest.approx(2 * 0.999, rel=2**-23)


@pytest.mark.parametrize("size", [1, 63, 129])
def test_one_step_with_bf16_moments_is_the_exact_step_with_moments_rounded_once(size: int) -> None:
    master, grad = torch.randn(size), torch.randn(size)
    exp_avg, exp_avg_sq = torch.randn(size).bfloat16(), torch.rand(size).bfloat16()
    want_master, want_m, want_v = adamw_update_reference(master, grad, exp_avg, exp_avg_sq, **hyper(7))
    adamw_update(master, grad, exp_avg, exp_avg_sq, **hyper(7))
    assert exp_avg.dtype == exp_avg_sq.dtype == torch.bfloat16
    # The master sees the fp32 moments: about eight fp32 roundings.
    torch.testing.assert_close(master.double(), want_master, rtol=1e-6, atol=1e-7)
    # Stored moments: one rounding to bf16, 2^-8 relative at most; 1e-7 where m nearly cancels in fp32.
    torch.testing.assert_close(exp_avg.double(), want_m, rtol=2**-8 + 1e-6, atol=1e-7)
    torch.testing.assert_close(exp_avg_sq.double(), want_v, rtol=2**-8 + 1e-6, atol=0)


def test_error_of_bf16_moments_stays_bounded_over_many_steps() -> None:
    size, steps = 4096, 200
    start = torch.randn(size)
    ours, exact = start.clone(), start.clone()
    low = [torch.zeros(size, dtype=torch.bfloat16) for _ in range(2)]
    high = [torch.zeros(size) for _ in range(2)]
    for step in range(1, steps + 1):
        grad = torch.randn(size)
        adamw_update(ours, grad, *low, **hyper(step, 0.0))
        adamw_update(exact, grad, *high, **hyper(step, 0.0))
    # Each store errs by at most 2^-8 and the errors of older stores decay with 0.95: geometric sum 20 * 2^-8,
    # in the mean square 2^-8 / sqrt(3) * sqrt(1 / (1 - 0.95^2)) = 0.7 %.
    assert relative_error(low[1], high[1]) < 0.01
    travelled = (exact - start).norm()
    # A step errs by the first moment's error, 2^-8 / sqrt(3) / sqrt(1 - 0.9^2) = 0.5 %, and half the other's.
    assert float((ours - exact).norm() / travelled) < 0.01
    assert float((ours - exact).norm()) > 0


def test_step_zero_is_refused() -> None:
    with pytest.raises(AssertionError, match="0"):
        adamw_update(*torch.zeros(4, 1), **hyper(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 63, 128, 129, 4097])
def test_the_kernel_takes_the_exact_step_and_writes_the_weight(size: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="Triton exists on Linux only; CI runs this test")
    from kernels.gpu import adamw as gpu

    master, grad = torch.randn(size), torch.randn(size)
    exp_avg, exp_avg_sq = torch.randn(size).to(dtype), torch.rand(size).to(dtype)
    want_master, want_m, want_v = adamw_update_reference(master, grad, exp_avg, exp_avg_sq, **hyper(7))
    weight = torch.full((size,), float("nan"), dtype=torch.bfloat16)
    gpu.adamw(master, grad, exp_avg, exp_avg_sq, weight, (1e-2, 0.9, 0.95, 1e-8, 0.1), 7)
    # As above: about eight fp32 roundings, and one of what is stored in fewer bits.
    torch.testing.assert_close(master.double(), want_master, rtol=1e-6, atol=1e-7)
    stored = 2**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(exp_avg.double(), want_m, rtol=stored + 1e-6, atol=1e-7)
    torch.testing.assert_close(exp_avg_sq.double(), want_v, rtol=stored + 1e-6, atol=0)
    assert torch.equal(weight, master.bfloat16())


def test_the_weights_version_is_raised_whoever_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel raises none by itself, and cached FP8 copies of the weight would stay."""
    monkeypatch.setattr(adamw, "_adamw", lambda *_: None)
    weight = torch.zeros(4, dtype=torch.bfloat16)
    before = weight._version
    adamw_update(*torch.zeros(4, 4), weight[1:3].view(-1), **hyper(1))
    assert weight._version > before
