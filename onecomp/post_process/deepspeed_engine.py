"""Training steps by DeepSpeed: ZeRO 1, 2 and 3 over the ranks of a gang."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from deepspeed.utils.tensor_fragment import safe_set_local_fp32_param
from torch import Tensor, distributed, nn

from onecomp.post_process.deepspeed_config import EngineConfig
from onecomp.post_process.engine import Engine, ParameterGroup
from onecomp.post_process.gang import totals

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of a parameter."""


def start_deepspeed(device: torch.device) -> None:
    """Have DeepSpeed use the process group that there is; on a CPU, with torch's own reductions.

    DeepSpeed's kernel for reductions on CPUs needs a compiler and a minute at first use, waits
    forever for ranks of other machines, and leaves 66 MiB a rank in /dev/shm. Without it, it takes
    torch's, as on systems that it has no kernel for.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.init_distributed(auto_mpi_discovery=False)


class DeepSpeedEngine(Engine):
    """AdamW on float32 parameters, sharded as the configuration's stage says.

    The loop says where a step ends (``managed_gradient_accumulation`` is off), so that
    micro-batches need not be counted here as well.

    Args:
        module: The student's modules; under stage 3 its parameters are partitioned already.
        groups: What is trained.
        names: Name of every trained parameter.
        config: Checked and completed.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        names: Mapping[str, nn.Parameter],
        config: EngineConfig,
    ):
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self._stage, self._names = config.stage, dict(names)
        self._rates = [group.lr for group in groups]
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": list(group.parameters),
                    "lr": group.lr,
                    "weight_decay": group.weight_decay or config.weight_decay,
                }
                for group in groups
            ],
            betas=config.betas,
            eps=config.eps,
        )
        self.model, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=dict(config.deepspeed)
        )
        self._zero: Any = self.model.optimizer

    def backward(self, loss: Tensor) -> None:
        """Add the gradient; it is averaged over the ranks."""
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> bool:
        """Clip and update; DeepSpeed leaves out steps whose gradient is not finite."""
        for group, rate in zip(self._zero.param_groups, self._rates, strict=True):
            group["lr"] = rate * lr_factor
        self.model.step()
        return bool(self.model.was_step_applied())

    def discard(self) -> None:
        """Forget the gradients, those that were averaged already as well.

        As DeepSpeed itself does it when it leaves out a step.
        """
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients.clear()
        if self._stage < 3:
            self._zero.all_grad_tensors.clear()

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums in the order of the ranks."""
        return totals(values, self.model.device)

    def state(self) -> dict[str, Tensor]:
        """Copies of the parameters, gathered one after the other."""
        return {
            name: safe_get_full_fp32_param(p).detach().to("cpu", torch.float32, copy=True)
            for name, p in self._names.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give model and optimizer the values, of which each rank keeps its part."""
        for name, parameter in self._names.items():
            values = state[name].to(self.model.device)
            if self._stage == 3:
                self._restore_partitioned(parameter, values)
            else:
                with torch.no_grad():
                    parameter.copy_(values)
                safe_set_full_fp32_param(parameter, values)

    def _restore_partitioned(self, parameter: nn.Parameter, values: Tensor) -> None:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(values)
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = torch.zeros(size * self.world_size, dtype=values.dtype, device=values.device)
        padded[: values.numel()] = values.flatten()
        safe_set_local_fp32_param(parameter, padded[size * self.rank :][:size])

    # What a resumed run needs beside the parameters

    def moments(self) -> dict[str, Tensor]:
        """This rank's part of the optimizer's state; empty before the first step."""
        state = self._zero.optimizer.state
        return {
            f"{number}.{key}": torch.as_tensor(state[flat][key]).detach().cpu().clone()
            for number, flat in enumerate(self._flat_parameters())
            if flat in state
            for key in MOMENTS
        }

    def restore_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Go on with the moments of the same rank of a gang of the same size."""
        for number, flat in enumerate(self._flat_parameters()):
            kept = {key: moments.get(f"{number}.{key}") for key in MOMENTS}
            if kept["step"] is not None:
                self._zero.optimizer.state[flat] = {
                    key: value.clone() if key == "step" else value.to(flat.device, copy=True)
                    for key, value in kept.items()
                    if value is not None
                }

    def _flat_parameters(self) -> list[Tensor]:
        """The float32 tensors that the optimizer steps: parts of many parameters each."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)


def partition(module: nn.Module, config: EngineConfig) -> None:
    """Leave each rank its part of a module's parameters, integer ones too, under stage 3.

    Args:
        module: Complete on every rank. Its modules fetch the other parts when they are called,
            once a :class:`DeepSpeedEngine` is made around them.
        config: Other stages leave the module as it is.
    """
    if config.stage == 3:
        deepspeed.zero.Init(
            module=module,
            config_dict_or_path=dict(config.deepspeed),
            mem_efficient_linear=False,
            dtype=torch.float32,
        )
