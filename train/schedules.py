"""Every schedule of the report as a pure function of (step, tokens_seen).

arXiv:2412.19437 §4.2 fixes five quantities over the 14.8T tokens of the run:

    learning rate    0 -> 2.2e-4 over 2K steps, 2.2e-4 to 10T tokens, cosine to 2.2e-5 over 4.3T,
                     2.2e-5 for 333B, 7.3e-6 for the last 167B
    batch            3072 -> 15360 sequences over the first 469B tokens, then 15360
    gamma            speed of the router's bias update: 0.001 to 14.3T, then 0.0
    alpha            weight of the sequence-wise balance loss: 0.0001
    lambda           weight of the MTP loss: 0.3 to 10T, then 0.1

A break point belongs to the phase that it opens: at `tokens_seen == mtp_weight_until_tokens` lambda is already the late
one. `step` counts finished optimizer steps: the first step of a run has step 0 and, under a warm-up, rate 0. The report
says that the batch grows "gradually"; we grow it linearly in tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    """Every break point and level; `*_tokens` in tokens since the start of the run.

    Raises:
        ValueError: a field is out of range or two break points are out of order.
    """

    total_tokens: int  # the run ends here
    lr_peak: float
    warmup_steps: int  # from rate 0 to lr_peak; 0 for none
    constant_until_tokens: int  # the cosine starts here
    decay_until_tokens: int  # and ends here
    lr_after_decay: float  # from there until final_from_tokens
    final_from_tokens: int
    lr_final: float
    batch_start_sequences: int  # sequences per optimizer step at token 0
    batch_full_sequences: int  # and after the ramp
    batch_ramp_tokens: int  # length of the linear ramp; 0 for none
    bias_speed: float  # gamma; 0 from bias_speed_until_tokens on
    bias_speed_until_tokens: int
    balance_alpha: float
    mtp_weight: float  # lambda; mtp_weight_late from mtp_weight_until_tokens on
    mtp_weight_until_tokens: int
    mtp_weight_late: float
    batch_multiple_sequences: int = 1  # steps of the ramp: the batch is rounded down to a multiple of it

    def __post_init__(self) -> None:
        _check_signs(self)
        _check_order(self)
        _check_batch(self)


def _check_signs(config: ScheduleConfig) -> None:
    for field in (
        "total_tokens",
        "lr_peak",
        "batch_start_sequences",
        "batch_full_sequences",
        "batch_multiple_sequences",
    ):
        value = getattr(config, field)
        if not value > 0:
            raise ValueError(f"schedule.{field} = {value} must be above 0; give a positive value")
    for field in (
        "warmup_steps",
        "constant_until_tokens",
        "batch_ramp_tokens",
        "lr_final",
        "bias_speed",
        "bias_speed_until_tokens",
        "balance_alpha",
        "mtp_weight",
        "mtp_weight_until_tokens",
        "mtp_weight_late",
    ):
        value = getattr(config, field)
        if not value >= 0:
            raise ValueError(f"schedule.{field} = {value} must not be negative; give 0 to switch it off")


def _check_order(config: ScheduleConfig) -> None:
    ordered = (
        ("constant_until_tokens", "decay_until_tokens"),
        ("decay_until_tokens", "final_from_tokens"),
        ("final_from_tokens", "total_tokens"),
        ("batch_ramp_tokens", "total_tokens"),
        ("bias_speed_until_tokens", "total_tokens"),
        ("mtp_weight_until_tokens", "total_tokens"),
        ("lr_final", "lr_after_decay"),
        ("lr_after_decay", "lr_peak"),
    )
    for lower, upper in ordered:
        low, high = getattr(config, lower), getattr(config, upper)
        if not low <= high:
            raise ValueError(
                f"schedule.{lower} = {low} is above schedule.{upper} = {high}; lower the first or raise the second"
            )


def _check_batch(config: ScheduleConfig) -> None:
    multiple = config.batch_multiple_sequences
    for field in ("batch_start_sequences", "batch_full_sequences"):
        value = getattr(config, field)
        if value % multiple:
            raise ValueError(
                f"schedule.{field} = {value} is not a multiple of "
                f"schedule.batch_multiple_sequences = {multiple}; "
                f"use {max(value // multiple, 1) * multiple}"
            )
    if config.batch_start_sequences > config.batch_full_sequences:
        raise ValueError(
            f"schedule.batch_start_sequences = {config.batch_start_sequences} is above "
            f"schedule.batch_full_sequences = {config.batch_full_sequences}; the batch only grows: swap them"
        )


@dataclass(frozen=True)
class ScheduledValues:
    """The schedules' values for one optimizer step."""

    lr: float
    batch_sequences: int  # of the global batch
    bias_speed: float  # gamma
    mtp_weight: float  # lambda
    balance_alpha: float


def scheduled_values(config: ScheduleConfig, *, step: int, tokens_seen: int) -> ScheduledValues:
    """The values that hold during the next step, after `step` optimizer steps over `tokens_seen` tokens."""
    return ScheduledValues(
        lr=_learning_rate(config, step=step, tokens_seen=tokens_seen),
        batch_sequences=_batch_sequences(config, tokens_seen),
        bias_speed=config.bias_speed if tokens_seen < config.bias_speed_until_tokens else 0.0,
        mtp_weight=config.mtp_weight if tokens_seen < config.mtp_weight_until_tokens else config.mtp_weight_late,
        balance_alpha=config.balance_alpha,
    )


def first_step_of(config: ScheduleConfig, *, sequence_length: int, batch_sequences: int) -> int:
    """The first step of a run whose batch has at least so many sequences, at most those of the full one."""
    step = tokens_seen = 0
    while (batch := _batch_sequences(config, tokens_seen)) < batch_sequences:
        tokens_seen += batch * sequence_length
        step += 1
    return step


def steps_to_go(config: ScheduleConfig, *, sequence_length: int, tokens_seen: int) -> int:
    """Steps that the rest of the budget takes, after `tokens_seen` tokens."""
    steps = 0
    while tokens_seen < min(config.batch_ramp_tokens, config.total_tokens):
        tokens_seen += _batch_sequences(config, tokens_seen) * sequence_length
        steps += 1
    rest = max(config.total_tokens - tokens_seen, 0)
    return steps + -(-rest // (config.batch_full_sequences * sequence_length))


def _learning_rate(config: ScheduleConfig, *, step: int, tokens_seen: int) -> float:
    """The warm-up counts steps, all later phases count tokens; their product is both at once."""
    rate = _learning_rate_after_warmup(config, tokens_seen)
    return rate * step / config.warmup_steps if step < config.warmup_steps else rate


def _learning_rate_after_warmup(config: ScheduleConfig, tokens_seen: int) -> float:
    if tokens_seen < config.constant_until_tokens:
        return config.lr_peak
    if tokens_seen < config.decay_until_tokens:
        decayed_tokens = tokens_seen - config.constant_until_tokens
        progress = decayed_tokens / (config.decay_until_tokens - config.constant_until_tokens)
        fall = config.lr_peak - config.lr_after_decay
        return config.lr_after_decay + 0.5 * fall * (1.0 + math.cos(math.pi * progress))
    return config.lr_after_decay if tokens_seen < config.final_from_tokens else config.lr_final


def _batch_sequences(config: ScheduleConfig, tokens_seen: int) -> int:
    """Integers all the way: at 1e13 tokens a float would decide the rounding."""
    if tokens_seen >= config.batch_ramp_tokens:
        return config.batch_full_sequences
    growth = config.batch_full_sequences - config.batch_start_sequences
    sequences = config.batch_start_sequences + growth * tokens_seen // config.batch_ramp_tokens
    return sequences - sequences % config.batch_multiple_sequences
