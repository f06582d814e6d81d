"""AdamW of the report: FP32 master weights, FP32 gradients, BF16 moments (arXiv:2412.19437 §3.3.3, §4.2).

Each trained parameter gets four companions:

    main_grad    fp32, the sum of this step's gradients over all micro-batches; an attribute of the parameter
    master       fp32, the weight that AdamW moves; for an FP32 parameter it *is* the parameter
    exp_avg      bf16 (or fp32), first moment
    exp_avg_sq   bf16 (or fp32), second moment

Two roads lead into `main_grad`. Matrices (linears, router, embedding) are added by
`kernels.deferred.accumulate_grad`, in FP32, by the wgrad closures. Norm gains come out of autograd as `.grad`;
a hook installed here moves it over as soon as autograd has finished the tensor. So after any number of
micro-batches `main_grad` is the sum.

Weight decay spares the norm gains and every other parameter with fewer than two dims: a gain decays towards
0, which is not a simpler network but a dead one. All matrices decay, embedding and head included. The report
does not say which parameters it spares; this is our choice.

Shapes: all companions share the parameter's shape. Nothing is sharded here.

Not done here: the division by the number of targets and the clipping (`parallel.grads`), the learning rate
(`train.optim.schedules`), the update formula (`kernels.adamw`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.adamw import adamw_update

MOMENT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class OptimConfig:
    """Hyperparameters of AdamW and of the clipping.

    Args:
        betas: decay rates of the two moments.
        eps: added to the root of the second moment. The report does not give it.
        weight_decay: decoupled decay per step, times the learning rate.
        clip_norm: the global gradient norm is clipped to this.
        moments_dtype: storage of both moments, 'bf16' or 'fp32'.
    Raises:
        ValueError: a field is out of range.
    Source: arXiv:2412.19437 §4.2 (betas, weight decay, clip), §3.3.3 (BF16 moments).
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments_dtype: str = "bf16"

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"optim.betas = {self.betas} must be two numbers in [0, 1); the report uses (0.9, 0.95)")
        if not self.eps > 0.0:
            raise ValueError(f"optim.eps = {self.eps} must be above 0; use 1e-8")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"optim.weight_decay = {self.weight_decay} must not be negative; give 0 for none")
        if not self.clip_norm > 0.0:
            raise ValueError(f"optim.clip_norm = {self.clip_norm} must be above 0; the report uses 1.0")
        if self.moments_dtype not in MOMENT_DTYPES:
            raise ValueError(
                f"optim.moments_dtype = {self.moments_dtype!r} is unknown; use one of {sorted(MOMENT_DTYPES)}"
            )


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter.

    Args:
        name: Hugging Face name, such as 'layers.3.input_layernorm.weight'.
        parameter: the weight of that name.
    Returns:
        False for norm gains and for tensors with fewer than two dims.
    Source: ours; arXiv:2412.19437 does not state the set.
    """
    module = name.rpartition(".")[0]
    return parameter.ndim >= 2 and not module.endswith("norm")


class AdamW:
    """AdamW over named parameters; owns the masters, the moments and the parameters' `main_grad`.

    Args:
        named_params: (name, parameter) pairs; frozen parameters are passed over. Names must be unique.
        config: hyperparameters.
    Raises:
        ValueError: a name appears twice.
    Source: arXiv:2412.19437 §3.3.3, §4.2.
    """

    def __init__(self, named_params: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.config = config
        self._parameters: dict[str, nn.Parameter] = {}
        self._masters: dict[str, Tensor] = {}
        self._exp_avg: dict[str, Tensor] = {}
        self._exp_avg_sq: dict[str, Tensor] = {}
        self._main_grads: list[Tensor] = []
        owners: set[int] = set()
        for name, parameter in named_params:
            if not parameter.requires_grad or id(parameter) in owners:
                continue
            if name in self._parameters:
                raise ValueError(f"parameter name {name!r} appears twice; give each parameter its own name")
            owners.add(id(parameter))
            self._adopt(name, parameter)

    def _adopt(self, name: str, parameter: nn.Parameter) -> None:
        moments_dtype = MOMENT_DTYPES[self.config.moments_dtype]
        is_fp32 = parameter.dtype == torch.float32
        self._parameters[name] = parameter
        self._masters[name] = parameter if is_fp32 else parameter.detach().to(torch.float32)
        self._exp_avg[name] = torch.zeros_like(parameter, dtype=moments_dtype, requires_grad=False)
        self._exp_avg_sq[name] = torch.zeros_like(parameter, dtype=moments_dtype, requires_grad=False)
        main_grad = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        parameter.main_grad = main_grad  # type: ignore[attr-defined]
        self._main_grads.append(main_grad)
        parameter.register_post_accumulate_grad_hook(_move_into_main_grad)

    @torch.no_grad()
    def step(self, *, lr: float, step: int) -> None:
        """Update every master from its `main_grad`, then write the masters back into the parameters.

        Args:
            lr: learning rate of this step.
            step: number of this update, counted from 1; the bias correction divides by 1 - beta**step.
        """
        assert step >= 1, f"updates are counted from 1, got step {step}"
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            adamw_update(
                master,
                parameter.main_grad,  # type: ignore[attr-defined]
                self._exp_avg[name],
                self._exp_avg_sq[name],
                lr=lr,
                betas=self.config.betas,
                eps=self.config.eps,
                weight_decay=self.config.weight_decay if decays(name, parameter) else 0.0,
                step=step,
            )
            if master is not parameter:
                # copy_ raises the parameter's version, by which cached FP8 copies of weights know their age.
                parameter.copy_(master)

    def zero_grad(self) -> None:
        """Set every `main_grad` to zero in place and drop what autograd may have left in `.grad`."""
        if self._main_grads:
            torch._foreach_zero_(self._main_grads)
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state for a checkpoint, as the live tensors themselves.

        Returns:
            'exp_avg.<name>' and 'exp_avg_sq.<name>' for every parameter, 'master.<name>' where the master is
            a tensor of its own (an FP32 parameter is its own master and travels with the model).
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                tensors[f"master.{name}"] = self._masters[name]
            tensors[f"exp_avg.{name}"] = self._exp_avg[name]
            tensors[f"exp_avg_sq.{name}"] = self._exp_avg_sq[name]
        return tensors


@torch.no_grad()
def _move_into_main_grad(parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is None:
        return
    parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]
    parameter.grad = None
