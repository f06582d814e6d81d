"""How the ranks talk: transport, time limits and the settings of NCCL. Field `network` of the configuration.

Values only. The process groups are made in `parallel/mesh.py`; the entrypoint puts `environment` into the process's
environment before the first group exists, because NCCL reads its variables once, when it starts (NVIDIA's NCCL user
guide, "Environment Variables": what each means and which ones production code should leave alone).

    peer_timeout_s < timeout_s      a dead rank is named by its neighbour before an anonymous collective times out

It reads no environment, opens no connection and does not know which settings an NCCL version understands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from parallel.mesh import DEFAULT_TIMEOUT_S

# Variables of the transports, and of torch's layer above NCCL; anything else is not the network's.
_VARIABLE = re.compile(r"(NCCL|TORCH_NCCL|GLOO)_[A-Z0-9_]+")


@dataclass(frozen=True)
class NetworkConfig:
    """How the ranks of a run talk to each other.

    Args:
        backend: 'auto' takes nccl for a CUDA device and gloo for a CPU.
        timeout_s: a collective that takes longer is an error.
        peer_timeout_s: a rank that shows no sign of life for so long is dead.
        environment: variable -> value for the transports.
    Raises:
        ValueError: a field is out of range or contradicts another.
    """

    backend: Literal["auto", "gloo", "nccl"] = "auto"
    timeout_s: int = DEFAULT_TIMEOUT_S
    peer_timeout_s: int = 60
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
        """The transport for tensors of a device.

        Args:
            device_type: 'cpu' or 'cuda'.
        Raises:
            ValueError: nccl was asked for without a CUDA device.
        """
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
