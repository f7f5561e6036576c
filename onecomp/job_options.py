"""The options that say what is made, as one job."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from onecomp.calibration import CalibrationConfig
from onecomp.errors import ConfigError
from onecomp.job import QuantizationJob, default_groupsize
from onecomp.models import ModelConfig, Skeleton
from onecomp.qep import QEPConfig
from onecomp.quantizer import (
    ARB,
    CQ,
    DBF,
    GPTQ,
    QBB,
    QUIP,
    RTN,
    AutoBitQuantizer,
    JointQ,
    Onebit,
    Quantizer,
)

logger = logging.getLogger(__name__)

USUAL_WBITS = 4
SWITCHES = {
    "sym": "--sym/--asym",
    "mse": "--mse",
    "actorder": "--actorder",
    "static_groups": "--static-groups",
}
"""Options that are on or off, by field."""
AUTOBIT_WBITS = (2, 3, 4, 8)
"""Bits that AutoBit chooses from."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The options of ``onecomp quantize`` that say what is made."""

    model: str
    dtype: str
    trust_remote_code: bool
    quantizer: str
    wbits: int | None
    target_bits: float | None
    groupsize: int | None
    sym: bool | None
    mse: bool | None
    actorder: bool | None
    static_groups: bool | None
    qep: bool
    calibration_dataset: str
    text_key: str
    max_length: int
    num_calibration_samples: int
    seed: int

    def job(self) -> QuantizationJob:
        """The job that they describe."""
        model_config = ModelConfig(
            self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        method = self.method(lambda: Skeleton.build(model_config.source, model_config.torch_dtype))
        return QuantizationJob(model_config, method, self.calibration(), self.propagation(method))

    def method(self, build: Callable[[], Skeleton]) -> Quantizer:
        """The method; ``build`` gives the model that its group size has to fit, where it must.

        Raises:
            ConfigError: An option that this method does not have, or a value out of range.
        """
        chosen = METHODS[self.quantizer]
        self._require_known(chosen)
        if not chosen.has_groups:
            return chosen.make(self, -1)
        if self.groupsize is not None or not chosen.fits_groups:
            return chosen.make(self, -1 if self.groupsize is None else self.groupsize)
        groupsize = default_groupsize(chosen.make(self, -1), build())
        logger.info("groupsize %d: the largest of 128, 64, 32 that divides every layer", groupsize)
        return chosen.make(self, groupsize)

    def _require_known(self, chosen: "Method") -> None:
        given = {
            "--wbits": self.wbits is not None and chosen.bits != "wbits",
            "--target-bits": self.target_bits is not None and chosen.bits != "target_bits",
            "--groupsize": self.groupsize is not None and not chosen.has_groups,
            **{
                option: getattr(self, name) is not None and name not in chosen.switches
                for name, option in SWITCHES.items()
            },
        }
        problems = [
            f"{option} is no option of {self.quantizer}. {_remedy(option, chosen)}"
            for option, is_strange in given.items()
            if is_strange
        ]
        if problems:
            raise ConfigError(f"--quantizer {self.quantizer}", problems)

    def propagation(self, method: Quantizer) -> QEPConfig | None:
        """Error propagation, where it is wanted and the method knows Hessians."""
        return QEPConfig() if self.qep and method.flag_hessian else None

    def calibration(self) -> CalibrationConfig:
        """The calibration text."""
        return CalibrationConfig(
            self.calibration_dataset,
            self.max_length,
            self.num_calibration_samples,
            strategy="drop_rand" if self.calibration_dataset == "c4" else "concat_chunk",
            seed=self.seed,
            text_key=self.text_key,
        )

    def is_on(self, switch: str) -> bool:
        """A switch that was given; the others are on."""
        return getattr(self, switch) is not False

    @property
    def whole_bits(self) -> int:
        """Bits per weight of methods with integer codes."""
        return USUAL_WBITS if self.wbits is None else self.wbits


@dataclass(frozen=True)
class Method:
    """A method on the command line: how it is made, and which options it has."""

    make: Callable[[JobOptions, int], Quantizer]
    """From the options and the group size."""
    bits: str | None = "wbits"
    """The option that chooses its bits, if any."""
    has_groups: bool = True
    """Whether it has groups of columns that share a scale."""
    switches: frozenset[str] = frozenset()
    """Which of ``SWITCHES`` it has."""
    fits_groups: bool = True
    """Whether a group size is chosen that fits the model; else a row is one group by default."""

    @property
    def remark(self) -> str:
        """What chooses its size instead."""
        if self.bits is None:
            return "it stores one bit a weight."
        return f"its bits are chosen with --{self.bits.replace('_', '-')}."


def _remedy(option: str, chosen: Method) -> str:
    is_switch = option in SWITCHES.values()
    return "Leave it out." if is_switch else f"Leave it out; {chosen.remark}"


def _gptq(options: JobOptions, groupsize: int) -> Quantizer:
    return GPTQ(
        wbits=options.whole_bits,
        groupsize=groupsize,
        sym=options.is_on("sym"),
        mse=options.is_on("mse"),
        actorder=options.is_on("actorder"),
        static_groups=options.is_on("static_groups"),
        weighted_mse=options.is_on("mse"),
    )


def _rtn(options: JobOptions, groupsize: int) -> Quantizer:
    return RTN(
        wbits=options.whole_bits,
        groupsize=groupsize,
        sym=options.is_on("sym"),
        mse=options.is_on("mse"),
    )


def _jointq(options: JobOptions, groupsize: int) -> Quantizer:
    return JointQ(
        bits=options.whole_bits,
        symmetric=options.is_on("sym"),
        actorder=bool(options.actorder),
        group_size=None if groupsize == -1 else groupsize,
    )


def _qbb(options: JobOptions, groupsize: int) -> Quantizer:
    return QBB(wbits=options.whole_bits, groupsize=groupsize)


def _dbf(options: JobOptions, groupsize: int) -> Quantizer:
    del groupsize
    return DBF() if options.target_bits is None else DBF(target_bits=options.target_bits)


def _autobit(options: JobOptions, groupsize: int) -> Quantizer:
    target = USUAL_WBITS if options.target_bits is None else options.target_bits
    candidates = [_gptq(replace(options, wbits=wbits), groupsize) for wbits in AUTOBIT_WBITS]
    return AutoBitQuantizer(quantizers=candidates, target_bit=float(target))


METHODS: Mapping[str, Method] = {
    "gptq": Method(_gptq, switches=frozenset(SWITCHES)),
    "rtn": Method(_rtn, switches=frozenset({"sym", "mse"})),
    "jointq": Method(_jointq, switches=frozenset({"sym", "actorder"})),
    "autobit": Method(_autobit, bits="target_bits", switches=frozenset(SWITCHES)),
    "dbf": Method(_dbf, bits="target_bits", has_groups=False),
    "quip": Method(lambda options, _: QUIP(wbits=options.whole_bits), has_groups=False),
    "qbb": Method(_qbb, fits_groups=False),
    "onebit": Method(lambda *_: Onebit(), bits=None, has_groups=False),
    "arb": Method(lambda _, groupsize: ARB(groupsize=groupsize), bits=None, fits_groups=False),
    "cq": Method(lambda _, groupsize: CQ(groupsize=groupsize), bits=None, fits_groups=False),
}
"""By the name that ``--quantizer`` takes."""
