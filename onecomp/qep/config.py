"""Options of error propagation."""

from dataclasses import dataclass, field

from onecomp.errors import ConfigError


@dataclass
class QEPConfig:
    """How errors of earlier layers are propagated to later ones.

    Args:
        general: Accepted for compatibility. Both values run block by block: every target layer
            of a decoder block sees the inputs that the quantized layers before it produce.
        percdamp: Damping of the correction, a fraction of the Hessian's mean diagonal.
        perccorr: How much of the correction is applied: 1 is the least-squares optimum for the
            calibration data, 0 is sequential quantization without correction.
        device: Accepted for compatibility; workers choose their device.
        exclude_layer_keywords: Layers whose name contains one of these are quantized on the
            inputs of the quantized model, but not corrected.

    Raises:
        ConfigError: A value out of range.
    """

    general: bool = False
    percdamp: float = 0.01
    perccorr: float = 0.5
    device: str | None = None
    exclude_layer_keywords: list[str] = field(default_factory=lambda: ["mlp.down_proj"])

    def __post_init__(self) -> None:
        problems = []
        if not self.percdamp > 0:
            problems.append(f"percdamp={self.percdamp}: must be above 0.")
        if not 0 <= self.perccorr <= 1:
            problems.append(f"perccorr={self.perccorr}: must be from 0 to 1.")
        if problems:
            raise ConfigError("QEPConfig", problems)

    def corrects(self, layer_name: str) -> bool:
        """Whether the layer's weight is corrected."""
        return self.perccorr > 0 and not any(
            k in layer_name for k in self.exclude_layer_keywords or ()
        )
