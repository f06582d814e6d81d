"""The assembly room: from a validated configuration to the parts of a run, all on one device.

This is the only place where model, optimizer, data and (later) parallel wrappers meet. Everything a user can get wrong
about stores, vocabulary or device is refused here, before the model is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from train.config import PretrainConfig
from train.data.store import TokenStore, check_same_tokenizer
from train.data.stream import TokenStream
from train.model.config import ModelConfig
from train.model.init import initialize
from train.model.moe import Experts
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.optim.adamw import AdamW


@dataclass(frozen=True)
class Parts:
    """What a trainer works with; `heldout` is None when the configuration names none."""

    device: torch.device
    model: Transformer
    optimizer: AdamW
    stream: TokenStream
    heldout: TokenStore | None


def choose_device(name: str) -> torch.device:
    """'auto' takes a CUDA GPU when there is one.

    Raises:
        ValueError: 'cuda' on a machine without one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but this machine shows no CUDA GPU; use run.device=cpu or run.device=auto")
    return torch.device(name)


def set_determinism(*, seed: int, deterministic: bool, threads: int | None) -> None:
    """Bit-equal repeats need one seed, deterministic algorithms and a fixed thread count; all are on the run card."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    # Filling every torch.empty with NaN is for tests; here it would cost a pass over each activation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads is not None:
        torch.set_num_threads(threads)


def open_stores(config: PretrainConfig) -> tuple[TokenStream, TokenStore | None]:
    """The training stream and the held-out store, checked against the model and each other.

    Raises:
        ValueError: missing, damaged, too short, or made with another tokeniser or too large a vocabulary.
    """
    store = TokenStore.open(Path(config.data.store))
    store.check(vocab_size=config.model.vocab_size)
    stream = TokenStream(store, config.data, config.run.seed)
    if config.data.heldout is None:
        return stream, None
    heldout = TokenStore.open(Path(config.data.heldout))
    heldout.check(vocab_size=config.model.vocab_size)
    check_same_tokenizer(store, heldout)
    return stream, heldout


def build_model(config: ModelConfig, precision: Precision, *, seed: int, device: torch.device) -> Transformer:
    """An initialised model on `device`; the same values on every device and layout."""
    with device:
        model = Transformer(config, precision)
    initialize(model, seed=seed, std=config.initializer_range, embedding_std=config.embedding_initializer_range)
    return model


def build(config: PretrainConfig) -> Parts:
    """Everything a run needs.

    Raises:
        ValueError: a store or the device does not fit the configuration; says what to do.
    """
    device = choose_device(config.run.device)
    stream, heldout = open_stores(config)
    run = config.run
    set_determinism(seed=run.seed, deterministic=run.deterministic, threads=run.threads)
    model = build_model(config.model, config.precision, seed=run.seed, device=device)
    optimizer = AdamW(model.named_parameters(), config.optim)
    return Parts(device=device, model=model, optimizer=optimizer, stream=stream, heldout=heldout)


def parameter_counts(model: Transformer) -> dict[str, int]:
    """Parameters in total and active per token (topk of the routed experts), MTP layers apart.

    Returns:
        {"total", "active", "mtp"}: `total` and `active` leave the MTP layers out.
    """
    mtp = sum(p.numel() for p in model.mtp.parameters())
    total = sum(p.numel() for p in model.parameters()) - mtp
    config = model.config
    idle_share = 1 - config.num_experts_per_tok / config.n_routed_experts
    routed = sum(p.numel() for m in model.layers.modules() if isinstance(m, Experts) for p in m.parameters())
    return {"total": total, "active": round(total - idle_share * routed), "mtp": mtp}


def store_hashes(store: TokenStore) -> dict[str, str]:
    """SHA-256 of the tokeniser and of each file of the store: what a run has read."""
    manifest = store.manifest
    files = {name: record.sha256 for name, record in sorted(manifest.files.items())}
    return {"tokenizer": manifest.tokenizer_sha256, **files}


def run_card(config: PretrainConfig, parts: Parts) -> dict[str, object]:
    """What this run is, for its directory and its dashboard: sizes, precision, device, versions, seed."""
    device = torch.cuda.get_device_name(parts.device) if parts.device.type == "cuda" else "cpu"
    return {
        "name": config.run.name,
        "precision": config.precision.name,
        "power_of_two_scales": config.precision.power_of_two_scales,
        "parameters": parameter_counts(parts.model),
        "tokens_total": config.schedule.total_tokens,
        "sequence_length": config.data.sequence_length,
        "seed": config.run.seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "deterministic": config.run.deterministic,
        "torch": torch.__version__,
        "store": store_hashes(parts.stream.store),
    }
