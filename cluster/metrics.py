"""The metrics that a run shows on a Ray cluster's Prometheus endpoint, each declared once."""

from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge

TAG_KEYS = ("run", "worker", "method")
"""Tags of every metric; one that does not apply is empty, which to Prometheus means absent."""


@dataclass(frozen=True)
class MetricKind:
    """What a metric says.

    Args:
        description: What is counted or measured, with its unit.
        is_level: Whether it rises and falls, so that its last value counts; else it adds up.
    """

    description: str
    is_level: bool = False


KINDS = {
    "onecomp_units_done": MetricKind("Units of work that workers finished, by method."),
    "onecomp_bytes_moved": MetricKind("Bytes that workers received from other workers."),
    "onecomp_seconds_waiting": MetricKind("Seconds in which workers had no unit in work."),
    "onecomp_seconds_busy": MetricKind("Seconds in which workers did units, by method."),
    "onecomp_fallbacks": MetricKind("Layers and rows that were not quantized as asked."),
    "onecomp_blocks_done": MetricKind("Blocks quantized, reused ones left out."),
    "onecomp_workers": MetricKind("Workers in use.", is_level=True),
    "onecomp_workers_lost": MetricKind("Workers whose processes were lost."),
}


class Meters:
    """Metrics by name, made when first used, in a process that is connected to Ray.

    Ray's agents show them on every node's metrics port as ``ray_<name>``, counters as
    ``ray_<name>_total``, one export period (10 s by default) after they changed at the latest.

    Args:
        run: Tag of everything recorded here, unless a call gives another.
    """

    def __init__(self, run: str = ""):
        self._defaults = {**dict.fromkeys(TAG_KEYS, ""), "run": run}
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}

    def record(self, name: str, value: int | float, **tags: object) -> None:
        """Count or set, as the metric's kind asks.

        Raises:
            ValueError: A name or tag that is not declared, or a count below zero.
        """
        (self.gauge if _kind(name).is_level else self.count)(name, value, **tags)

    def count(self, name: str, value: int | float = 1, **tags: object) -> None:
        """Add ``value``, at least 0, to a counter.

        Raises:
            ValueError: A name or tag that is not declared, a gauge, or a value below zero.
        """
        kind, all_tags = _kind(name), self._tags(name, tags)
        if kind.is_level or value < 0:
            raise ValueError(f"{name} cannot count {value}: a counter adds values of at least 0.")
        if value == 0:
            return  # which Ray refuses
        if name not in self._counters:
            self._counters[name] = Counter(name, kind.description, TAG_KEYS)
        self._counters[name].inc(value, all_tags)

    def gauge(self, name: str, value: int | float, **tags: object) -> None:
        """Set a gauge.

        Raises:
            ValueError: A name or tag that is not declared, or a counter.
        """
        kind, all_tags = _kind(name), self._tags(name, tags)
        if not kind.is_level:
            raise ValueError(f"{name} cannot be set to {value}: it is a counter. Use count.")
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, kind.description, TAG_KEYS)
        self._gauges[name].set(value, all_tags)

    def _tags(self, name: str, tags: dict[str, object]) -> dict[str, str]:
        if unknown := sorted(tags.keys() - set(TAG_KEYS)):
            raise ValueError(f"{name} has no tag {', '.join(unknown)}; known: {TAG_KEYS}.")
        return {**self._defaults, **{key: str(value) for key, value in tags.items()}}


def _kind(name: str) -> MetricKind:
    if name not in KINDS:
        raise ValueError(f"there is no metric {name!r}. Known: {', '.join(KINDS)}.")
    return KINDS[name]
