"""How a run's ranks reach each other: transport, time limits and NCCL's settings, with their checks.

A file of its own: the configuration of a run is read without torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

# The default; as torch's own for NCCL, while gloo's would be half an hour.
TIMEOUT_S = 600
# Variables of the transports, and of torch's layer above NCCL; anything else is not the network's.
_VARIABLE = re.compile(r"(NCCL|TORCH_NCCL|GLOO)_[A-Z0-9_]+")


@dataclass(frozen=True)
class NetworkConfig:
    """Transport, time limits and settings of NCCL; field `network` of the configuration."""

    backend: Literal["auto", "gloo", "nccl"] = "auto"  # 'auto' takes nccl for a CUDA device and gloo for a CPU
    timeout_s: int = TIMEOUT_S  # a collective that takes longer is an error
    # A rank that shows no sign of life for so long is dead, and named before an anonymous collective times out.
    peer_timeout_s: int = 60
    # Variable -> value, set before the first group exists: NCCL reads its variables when it starts.
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low in (("peer_timeout_s", 1), ("timeout_s", 2)):
            if getattr(self, name) < low:
                raise ValueError(f"network.{name}={getattr(self, name)} is too small: use {low} or more")
        if self.peer_timeout_s >= self.timeout_s:
            raise ValueError(
                f"network.peer_timeout_s={self.peer_timeout_s} is not below network.timeout_s={self.timeout_s}, so "
                f"that a dead rank would not be named in time: use network.peer_timeout_s={self.timeout_s // 2}"
            )
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(
                    f"network.environment.{name} is no variable of the network: "
                    "use names such as NCCL_IB_TIMEOUT, TORCH_NCCL_DUMP_ON_TIMEOUT or GLOO_SOCKET_IFNAME"
                )

    def backend_for(self, device_type: str) -> Literal["gloo", "nccl"]:
        """The transport for tensors of 'cpu' or 'cuda'; a ValueError where the configured one cannot carry them."""
        if self.backend == "auto":
            return "nccl" if device_type == "cuda" else "gloo"
        if self.backend == "nccl" and device_type != "cuda":
            raise ValueError(
                f"network.backend=nccl moves tensors between CUDA GPUs, but the device is {device_type}: "
                "use network.backend=gloo or auto"
            )
        if self.backend == "gloo" and device_type == "cuda":
            raise ValueError(
                "network.backend=gloo cannot exchange tensors of CUDA GPUs: use network.backend=nccl or auto"
            )
        return self.backend
