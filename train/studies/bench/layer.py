"""How fast one MoE block of DeepSeek-V3 runs forward and backward on one GPU, and its memory, in BF16 and in FP8.

    hidden 7168, 128 heads, latents 1536 and 512, experts 2048 wide   V3's own (arXiv:2412.19437 §4.2)
    8 experts, all 8 chosen by each token                             what one rank of 32 computes, in perfect balance
    1 sequence of 4096 tokens                                         V3's micro-batch
    bf16, fp8, and fp8_v3: with the least memory                      `configs/precision/`

A token of V3 goes to 8 of 256 experts, so under balanced routing a rank with 8 of them works on as many rows as it has
tokens times 8, over all its peers. With all 8 experts chosen by every token the same GEMMs run here without any peer,
and no choice can be unbalanced or flip between precisions.

Parity comes first: outputs, input gradients and weight gradients of FP8 against BF16, from equal weights; where it is
red no time is given. Its clock is its own, not `timing.py`'s: a step of milliseconds that begins on an idle GPU, for
the host time to enqueue it is a figure too. Weights have FP32 `main_grad`; their FP8 copies exist already, as in all
micro-batches of a step but the first; in `fp8_v3` they are all there is of the weights, as after an update. On a CPU
it runs with small sizes, for tests.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kernels.attention import backend_name
from parallel.fp8_weights import Fp8Buckets
from parallel.mesh import single
from parallel.zero import GradientBuckets
from train.model.attention import RopeTables
from train.model.block import MoEBlock
from train.model.config import ModelConfig
from train.model.moe import LocalDispatcher
from train.model.sizes import Held, flops_per_token, weights
from train.model.transformer import fp8_weights
from train.studies.bench.timing import elapsed_s
from train.studies.plan.stand_ins import fp8_copy, storage_bytes
from train.studies.smoke_runs import PrecisionName, model_config, precision_config
from train.studies.step_parity import relative_error, turn

# The first is what the others are compared with.
PRECISIONS: tuple[PrecisionName, ...] = ("bf16", "fp8", "fp8_v3")
# A product of two E4M3 operands is off by 3.7 % (tests/parity/test_one_step_gate.py). Measured through two layers on a
# CPU, at 256 and at 1024 wide: 0.060 to 0.097, the norms of the query latents worst. The limit leaves a third above.
ERROR_LIMIT = 0.13
# An error of that size turns a vector by half its square.
TURN_LIMIT = ERROR_LIMIT**2 / 2


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: ModelConfig  # all layers are MoE blocks; its vocabulary is not used
    tokens: int  # of the one sequence
    warm_ups: int = 3
    repeats: int = 10  # timed runs; medians count


def v3_sizes() -> Sizes:
    """Two layers at full width."""
    model = replace(
        model_config("v3_671b"), num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0,
        n_routed_experts=8, n_group=1, topk_group=1,
    )  # fmt: skip
    return Sizes(model, tokens=4096)


def tiny_sizes() -> Sizes:
    """The same two layers with every dimension small: seconds on a CPU."""
    model = replace(
        v3_sizes().model, hidden_size=256, moe_intermediate_size=128, initializer_range=0.03, num_attention_heads=2,
        q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    )  # fmt: skip
    return Sizes(model, tokens=96, warm_ups=1, repeats=2)


@dataclass(frozen=True)
class Parity:
    """A precision against BF16: relative Frobenius error and 1 - cosine of each tensor, by name."""

    precision: PrecisionName
    errors: Mapping[str, float]
    turns: Mapping[str, float]

    @property
    def green(self) -> bool:
        """Whether every tensor is within E4M3's roundings; NaN never is."""
        within = all(error <= ERROR_LIMIT for error in self.errors.values())
        return within and all(value <= TURN_LIMIT for value in self.turns.values())


@dataclass(frozen=True)
class LayerTime:
    """One precision, per layer unless it says otherwise; what a CPU cannot measure is None."""

    precision: PrecisionName
    deterministic: bool
    attention: str  # torch's kernel
    time_ms: float  # forward and backward, median
    host_ms: float  # until both are enqueued, from an idle device, median
    tokens_per_s: float
    tflop_per_s: float
    peak_bytes: int | None  # of all layers together, weights and gradients included
    state_bytes: int | None  # of that, what is there before a forward
    counted_bytes: int  # of that, weights, FP8 copies and gradients, from their storages
    kernels: float | None  # launches, copies and fills included
    # The kernels that take most time: name, launches, microseconds.
    slowest: tuple[tuple[str, float, float], ...] = ()


class Layers(nn.Module):
    """A row of MoE blocks with what feeds them."""

    def __init__(self, sizes: Sizes, precision: PrecisionName, device: torch.device) -> None:
        super().__init__()
        config, recipe = sizes.model, precision_config(precision)
        dispatcher, rope = LocalDispatcher(config.n_routed_experts), RopeTables(config)
        with device:
            blocks = (MoEBlock(config, recipe, rope, dispatcher) for _ in range(config.num_hidden_layers))
            self.blocks = nn.ModuleList(blocks)
        axis, named = single(device).dp, dict(self.blocks.named_parameters())
        linears = {} if recipe.keep_bf16_weights else fp8_weights(self.blocks, recipe)
        others = {name: parameter for name, parameter in named.items() if name not in linears}
        power_of_two = recipe.power_of_two_scales
        self._buckets = (
            GradientBuckets(others.items(), axis=axis, sharded=False),
            Fp8Buckets(linears.items(), axis=axis, sharded=False, power_of_two=power_of_two),
        )
        shape, generator = (2, 1, sizes.tokens, config.hidden_size), torch.Generator(device).manual_seed(0)
        self.x, self.grad = torch.randn(shape, generator=generator, device=device).to(recipe.dtype)
        self.x.requires_grad_()

    @torch.no_grad()
    def fill(self, std: float) -> None:
        """Initial values drawn on the device: only the spread matters here."""
        generator = torch.Generator(self.x.device).manual_seed(1)
        for name, parameter in self.blocks.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)
        for buckets in self._buckets:
            buckets.release()

    def forget(self) -> None:
        """Begin a step: the first gradients replace those before."""
        for buckets in self._buckets:
            buckets.forget()

    def gradients(self) -> dict[str, Tensor]:
        """Live views of all weight gradients, fp32, by name."""
        return {shard.name: shard.grad for buckets in self._buckets for shard in buckets.parameter_shards()}

    def counted_bytes(self) -> int:
        """Bytes of weights, of their FP8 copies and of gradients, each storage once."""
        parameters = tuple(self.blocks.parameters())
        copies = (tensor for parameter in parameters for tensor in fp8_copy(parameter))
        return storage_bytes([*parameters, *self.blocks.buffers(), *copies, *self.gradients().values()])

    def step(self) -> Tensor:
        """Forward and backward; gradients are added to `main_grad` and `x.grad`. Returns the output."""
        self.x.grad = None
        residual, delta = self.x, None
        for block in self.blocks:
            residual, delta, _ = block(residual, delta, None)
        hidden = residual if delta is None else residual + delta
        hidden.backward(self.grad)
        output: Tensor = hidden.detach()
        return output


def flops_per_layer(config: ModelConfig, tokens: int) -> float:
    """Closed form: 6 for each weight that a token meets, and causal attention once; no recomputation."""
    held = Held((0,), embedding=False, head=False)
    per_token = flops_per_token(config, weights(config, held, ep=1), held, sequence_length=tokens)
    return float(tokens * sum(per_token.values()))


def make(sizes: Sizes, precision: PrecisionName, device: torch.device) -> Layers:
    """Layers with initial values; the same in every precision."""
    layers = Layers(sizes, precision, device)
    layers.fill(sizes.model.initializer_range)
    return layers


def results(layers: Layers) -> dict[str, Tensor]:
    """Of one step: what the layers added to their input, to its gradient, and all weight gradients, by name."""
    layers.forget()
    update = layers.step() - layers.x.detach()
    assert layers.x.grad is not None
    return {"output": update, "input gradient": layers.x.grad - layers.grad, **layers.gradients()}


def parity(precision: PrecisionName, found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Parity:
    """A precision's `results` against those of BF16, from equal weights, input and gradient."""
    pairs = {name: (found[name], expected) for name, expected in reference.items()}
    return Parity(
        precision,
        errors={name: relative_error(*pair) for name, pair in pairs.items()},
        turns={name: turn(*pair) for name, pair in pairs.items()},
    )


def measure(layers: Layers, sizes: Sizes, precision: PrecisionName) -> LayerTime:
    """Times, kernels and memory of one precision, in the mode of determinism that is set."""
    model = sizes.model
    device, count = layers.x.device, sizes.model.num_hidden_layers
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    for _ in range(sizes.warm_ups):
        layers.step()
    state = torch.cuda.memory_allocated(device) if on_gpu else None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    runs = [_time(layers, on_gpu=on_gpu) for _ in range(sizes.repeats)]
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    time_ms, host_ms = (statistics.median(values) / count for values in zip(*runs, strict=True))
    kernels, slowest = _kernels(layers) if on_gpu else (None, ())
    return LayerTime(
        precision=precision,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        attention=backend_name(
            heads=model.num_attention_heads,
            qk_dim=model.qk_head_dim,
            v_dim=model.v_head_dim,
            dtype=layers.x.dtype,
            device=device,
        ),
        time_ms=time_ms,
        host_ms=host_ms,
        tokens_per_s=sizes.tokens / time_ms * 1e3,
        tflop_per_s=flops_per_layer(sizes.model, sizes.tokens) / time_ms / 1e9,
        peak_bytes=peak,
        state_bytes=state,
        counted_bytes=layers.counted_bytes(),
        kernels=None if kernels is None else kernels / count,
        slowest=slowest,
    )


def _time(layers: Layers, *, on_gpu: bool) -> tuple[float, float]:
    """(device, host) milliseconds of one run that begins on an idle device; on a CPU both are the host's."""
    if not on_gpu:
        return (elapsed_s(layers.step, layers.x.device) * 1e3,) * 2
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    begin.synchronize()
    started = time.perf_counter()
    begin.record()
    layers.step()
    end.record()
    host_s = time.perf_counter() - started
    end.synchronize()
    return begin.elapsed_time(end), host_s * 1e3


def _kernels(layers: Layers) -> tuple[int, tuple[tuple[str, float, float], ...]]:
    """Launches of one run, and the ten kernels that take most time."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        layers.step()
        end = torch.cuda.Event()
        end.record()
        end.synchronize()
    on_device = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    total: dict[str, tuple[int, float]] = {}
    for event in on_device:
        launches, micros = total.get(event.name, (0, 0.0))
        total[event.name] = (launches + 1, micros + event.time_range.elapsed_us())
    by_time = sorted(total.items(), key=lambda item: -item[1][1])[:10]
    return len(on_device), tuple((name[:60], float(n), micros) for name, (n, micros) in by_time)


@dataclass(frozen=True)
class LayerBench:
    """The whole bench; times are empty where a parity is red."""

    parities: tuple[Parity, ...]
    times: tuple[LayerTime, ...]

    @property
    def green(self) -> bool:
        """Whether every precision is close enough to BF16."""
        return all(each.green for each in self.parities)


def check(sizes: Sizes, device: torch.device) -> tuple[Parity, ...]:
    """Parity of every precision with BF16."""
    first, *others = PRECISIONS
    reference = results(make(sizes, first, device))
    return tuple(parity(each, results(make(sizes, each, device)), reference) for each in others)


def run(sizes: Sizes, device: torch.device, *, budget_s: float = math.inf) -> LayerBench:
    """Parity of all precisions, then each alone, so that its memory is its own, with and without determinism.

    What would begin after so many seconds is not measured.
    """
    deadline_s = time.monotonic() + budget_s
    before = torch.are_deterministic_algorithms_enabled()
    found, times = LayerBench(check(sizes, device), ()), []
    try:
        for precision in PRECISIONS if found.green else ():
            layers = make(sizes, precision, device)
            for deterministic in (False, True):
                if time.monotonic() > deadline_s:
                    break
                torch.use_deterministic_algorithms(deterministic)
                times.append(measure(layers, sizes, precision))
            del layers
    finally:
        torch.use_deterministic_algorithms(before)
    return replace(found, times=tuple(times))


def markdown(bench: LayerBench) -> str:
    """Parity, then the table; all figures are per layer but the memory."""
    lines = [*map(_parity_line, bench.parities)]
    if not bench.times:
        why = "not measured, the budget was spent" if bench.green else "parity is red: no time is given"
        return "\n".join([*lines, f"{why.capitalize()}."])
    head = (
        "| per layer | attention | ms | tokens/s | TFLOP/s | kernels | host ms | peak GB, all layers | of it state "
        "| weights, copies, gradients |"
    )
    lines += [head, "|" + 10 * "---|"]
    lines += [
        f"| {_mode(t)} | {t.attention} | {t.time_ms:.2f} | {t.tokens_per_s:,.0f} | {t.tflop_per_s:.1f} "
        f"| {_shown(t.kernels, 1)} | {t.host_ms:.2f} | {_shown(t.peak_bytes, 1e9)} | {_shown(t.state_bytes, 1e9)} "
        f"| {t.counted_bytes / 1e9:.3f} |"
        for t in bench.times
    ]
    for t in bench.times:
        lines += ["", f"Kernels of {_mode(t)} that take most time, all layers:", ""] if t.slowest else []
        lines += [f"- {micros:,.0f} us in {launches:.0f}: `{name}`" for name, launches, micros in t.slowest]
    return "\n".join(lines)


def _parity_line(parity: Parity) -> str:
    (error, where), (angle, whose) = (
        max((value, name) for name, value in values.items()) for values in (parity.errors, parity.turns)
    )
    return (
        f"{parity.precision} against bf16, worst of outputs and gradients: relative error {error:.3f} ({where}, limit "
        f"{ERROR_LIMIT}), turned by {angle:.4f} ({whose}, limit {TURN_LIMIT:.4f}): "
        f"{'green' if parity.green else 'RED'}.\n"
    )


def _mode(time: LayerTime) -> str:
    return f"{time.precision}, deterministic" if time.deterministic else str(time.precision)


def _shown(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}"
