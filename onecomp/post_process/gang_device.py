"""Which device a worker of a gang computes on."""

import torch

from onecomp.models import ModelConfig


def device_of_rank(model_config: ModelConfig) -> torch.device:
    """This rank's own GPU, whichever the user named, or the CPU."""
    device = model_config.get_device()
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
