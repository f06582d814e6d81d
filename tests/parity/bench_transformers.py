"""Training tokens/s of ours and of `transformers`' DeepseekV3ForCausalLM of the same size, in one run.

    python -m tests.parity.bench_transformers [rounds]

Same shape (`model=tiny` without MTP, which transformers does not train), same batch, same AdamW family (ours:
FP32 masters and BF16 moments; theirs: torch's fused AdamW on the BF16 weights), forward, backward, clip and update.
Parity first: both take one forward from the same FP32 weights and their losses must agree to 1e-5. The two are then
timed in turn, round by round (8; 0: parity only), and the ratio is that of the medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from parallel.mesh import single
from tests.hf_names import to_hf
from train.assemble import build_engine, set_determinism
from train.config import compose
from train.data.batch import Batch
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.optim.config import OptimConfig
from train.schedules import ScheduledValues
from train.step import apply_update, compute_gradients

SEQUENCES, TOKENS = 8, 256
NOW = ScheduledValues(lr=1e-4, batch_sequences=SEQUENCES, bias_speed=1e-3, mtp_weight=0.0, balance_alpha=1e-4)


def theirs(config: ModelConfig, ours: Transformer, dtype: torch.dtype) -> DeepseekV3ForCausalLM:
    """Their model with our weights; expert tensors are stacked in its memory as in ours."""
    names = DeepseekV3Config().to_dict().keys() & vars(config).keys() - {"rope_scaling"}
    hf = DeepseekV3Config(
        **{name: getattr(config, name) for name in names},
        num_key_value_heads=config.num_attention_heads,
        rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        tie_word_embeddings=False,
    )
    model = DeepseekV3ForCausalLM(hf)
    released = to_hf(dict(ours.state_dict()), config)
    for name, tensor in ours.state_dict().items():
        if ".mlp.experts." in name:
            released[f"model.{name}"] = tensor
    wanted = model.state_dict()
    model.load_state_dict({name: released[name].float() for name in wanted})
    return model.to(dtype)


def our_step(config: ModelConfig, name: str, batch: Batch) -> Callable[[], object]:
    engine = build_engine(config, Precision(name), OptimConfig(), single("cpu"), seed=0)  # type: ignore[arg-type]
    updates = iter(range(1, 10**9))

    def step() -> None:
        gradients = compute_gradients(engine, batch, num_micro_batches=1, now=NOW)
        apply_update(engine, gradients, now=NOW, update=next(updates))

    return step


def their_step(model: DeepseekV3ForCausalLM, batch: Batch) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(input_ids=batch.input_ids).logits, batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def main(rounds: int) -> int:
    """Check parity, measure, print; returns the exit code."""
    set_determinism(seed=0, deterministic=False, threads=None)
    config = replace(compose(["model=tiny"]).model, num_nextn_predict_layers=0)
    tokens = torch.randint(0, config.vocab_size, (SEQUENCES, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    reference = build_engine(config, Precision("fp32"), OptimConfig(), single("cpu"), seed=0).models[0]
    oracle = theirs(config, reference, torch.float32)
    with torch.no_grad():
        mine = cross_entropy(reference.logits(reference(batch.input_ids).hidden), batch.labels)
        other = cross_entropy(oracle(input_ids=batch.input_ids).logits, batch.labels)
    gap = abs(float(mine / other) - 1)
    print(f"parity: relative difference of the FP32 losses {gap:.1e}")
    if gap > 1e-5:
        print("parity is red: no speed is reported")
        return 1
    if not rounds:
        return 0
    steps = {
        "transformers fp32": their_step(oracle, batch),
        "ours fp32": our_step(config, "fp32", batch),
        "transformers bf16": their_step(theirs(config, reference, torch.bfloat16), batch),
        "ours bf16": our_step(config, "bf16", batch),
        "ours fp8 (reference path)": our_step(config, "fp8", batch),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_id in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if round_id:
                times[name].append(time.perf_counter() - began)
    speed = {name: SEQUENCES * TOKENS / statistics.median(seconds) for name, seconds in times.items()}
    for name, tokens_per_s in speed.items():
        peer = speed["transformers fp32" if "fp32" in name else "transformers bf16"]
        print(f"{name:28s} {tokens_per_s:8.0f} tokens/s  {tokens_per_s / peer:5.2f} x transformers")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {rounds} interleaved rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8))
