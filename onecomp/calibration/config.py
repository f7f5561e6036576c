"""What text calibrates the model, and how it is cut into samples."""

from dataclasses import KW_ONLY, dataclass

from onecomp.errors import ConfigError

C4 = "c4"
WIKITEXT2 = "wikitext2"
SELF = "self"
STRATEGIES = ("drop_head", "drop_rand", "concat_chunk", "concat_chunk_align", "concat_rand")


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text calibrates the model, and how much of it.

    Valid as soon as it exists; use ``dataclasses.replace`` for a changed copy.

    Raises:
        ConfigError: Settings out of range; all of them are listed.

    Example:
        >>> CalibrationConfig("wikitext2", num_calibration_samples=128).dataset_name
        'wikitext2'
    """

    calibration_dataset: str | None = C4
    """``"c4"``, ``"wikitext2"``, ``"self"`` (text sampled from the model), a local file or
    directory, otherwise the id of a dataset on the Hub. ``None`` means ``"c4"``."""
    max_length: int = 2048
    """Tokens per sample."""
    num_calibration_samples: int = 512
    """Samples; every strategy keeps to it, those that join text may find fewer and say so."""
    strategy: str = "drop_rand"
    """``drop_head`` and ``drop_rand`` take one window from each document that is long enough;
    ``concat_chunk``, ``concat_chunk_align`` and ``concat_rand`` cut the joined text."""
    seed: int = 0
    """Seed of every random choice: documents, offsets, sampled text."""
    batch_size: int | None = None
    """Accepted for compatibility and without effect: calibration always streams in batches."""
    num_layers_per_group: int = 7
    """Accepted for compatibility and without effect: calibration goes block by block."""
    text_key: str = "text"
    """Column that holds the text; where it is missing, one of ``TEXT_COLUMNS`` is used."""
    use_quality_filter: bool = False
    """Keep only clean prose of C4 (see ``is_clean_prose``); other datasets are not filtered."""
    max_documents: int = 10000
    """Documents read at most from a file, a directory or a dataset of the Hub."""
    _: KW_ONLY
    dataset_subset: str | None = None
    """Configuration of a Hub dataset that has several, e.g. ``"20231101.en"``."""
    dataset_split: str = "train"
    """Split of a Hub dataset, or of a directory written by ``save_to_disk``."""

    def __post_init__(self) -> None:
        problems = [*_count_problems(self), *_name_problems(self)]
        if problems:
            raise ConfigError("CalibrationConfig", problems)

    @property
    def dataset_name(self) -> str:
        """``calibration_dataset`` with ``None`` resolved to ``"c4"``."""
        return C4 if self.calibration_dataset is None else self.calibration_dataset


def _is_count(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _count_problems(config: CalibrationConfig) -> list[str]:
    counts = ("max_length", "num_calibration_samples", "num_layers_per_group", "max_documents")
    problems = [
        f"{name}={getattr(config, name)!r}: must be a whole number of at least 1."
        for name in counts
        if not _is_count(getattr(config, name), 1)
    ]
    if config.batch_size is not None and not _is_count(config.batch_size, 1):
        problems.append(f"batch_size={config.batch_size!r}: must be None or at least 1.")
    if not _is_count(config.seed, 0) or config.seed >= 2**63:
        problems.append(f"seed={config.seed!r}: must be a whole number from 0 to 2**63 - 1.")
    return problems


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _name_problems(config: CalibrationConfig) -> list[str]:
    problems = []
    if config.strategy not in STRATEGIES:
        problems.append(f"strategy={config.strategy!r}: must be one of {', '.join(STRATEGIES)}.")
    for name in ("text_key", "dataset_split"):
        if not _is_name(getattr(config, name)):
            problems.append(f"{name}={getattr(config, name)!r}: must be a non-empty string.")
    for name in ("calibration_dataset", "dataset_subset"):
        value = getattr(config, name)
        if value is not None and not _is_name(value):
            problems.append(f"{name}={value!r}: must be None or a non-empty string.")
    return problems
