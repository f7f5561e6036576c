"""Journals as drivers write them, without a run: a small simulation with a clock of its own."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

START = 1_700_000_000.0
RUN = {
    "model": {"id": "some-org/some-model", "hash": "0123abcd", "dtype": "bfloat16"},
    "quantizer": {"method": "GPTQ", "wbits": 4, "groupsize": 128},
    "qep": {"percdamp": 0.01},
    "calibration": {"dataset_name": "c4", "hash": "fedc9876"},
    "created": "2025-01-02T03:04:05+00:00",
    "output": "/models/out",
}
UNITS = [
    ("begin_block", 0.2), ("observe", 1.6), ("merge", 0.5), ("quantize", 2.6), ("apply", 0.3),
    ("finish_block", 1.0),
]  # fmt: skip


@dataclass
class Driver:
    """A driver of an attempt: call its methods in order, then look at ``events``."""

    blocks: int
    workers: list[int]
    skew: Mapping[int, float] = field(default_factory=dict)
    """By how much each worker's clock is ahead of the driver's."""
    now: float = START
    events: list[dict] = field(default_factory=list)

    def write(self, event: str, **fields: object) -> None:
        self.events.append({"event": event, "time": round(self.now, 3), **fields})

    def start(self, finished: int = 0) -> "Driver":
        self.write(
            "started", blocks=self.blocks, finished=finished, workers=len(self.workers),
            executor=f"{len(self.workers)} Ray workers",
        )  # fmt: skip
        self.now += 2.0
        for worker in self.workers:
            self.change(worker, "joined")
        return self

    def change(self, worker: int, change: str, **fields: object) -> None:
        """A worker of ours that joined is counted by the caller."""
        place = {"node": f"node{worker % 3}", "host": f"host{worker % 3}", "pid": 100 + worker}
        self.write("worker", worker=worker, change=change, **place, **fields)

    def quantize(self, block: int, *, dies: Collection[int] = (), fallbacks: int = 0) -> "Driver":
        """Make a block; workers in ``dies`` are lost in the middle of it, and it is begun again."""
        self._work(block, parts=2 if dies else len(UNITS))
        if dies:
            self._lose(block, dies)
            self._work(block)
        layers = {
            f"model.layers.{block}.mlp.{name}": {
                "relative_output_squared_error": 1e-4 * (block + 1), "bits": 4.25,
            }
            for name in ("up_proj", "down_proj")
        }  # fmt: skip
        self.write(
            "group", block=block, group=0, layers=layers, fallbacks=["damping"] * fallbacks,
            num_tokens=4096, seconds=2.6, worker=self.workers[0], received_bytes=2**20,
        )  # fmt: skip
        self.write(
            "block", block=block, seconds=6.5, output_error=1e-4 * (block + 1),
            bytes_moved=3 * 2**20, driver_seconds=0.01,
        )  # fmt: skip
        return self

    def _work(self, block: int, parts: int = len(UNITS)) -> None:
        """Every worker does its units; the last of them takes longest."""
        longest = 0.0
        reports = []
        for place, worker in enumerate(self.workers):
            slow, time, units = 0.6 + 0.4 * (place + 1) / len(self.workers), self.now, []
            for method, seconds in UNITS[:parts]:
                units.append({
                    "method": method, "block": block, "seconds": seconds * slow, "bytes": 2**18,
                    "group": 0 if method in ("observe", "quantize", "apply") else None,
                    "start": time + self.skew.get(worker, 0.0),
                })  # fmt: skip
                time += seconds * slow
            longest = max(longest, time - self.now)
            reports.append((worker, units))
        self.now += longest + 0.05
        for worker, units in reports:
            self.write("units", worker=worker, units=units)

    def _lose(self, block: int, workers: Collection[int]) -> None:
        for worker in workers:
            self.change(worker, "lost", doing=f"quantize of block {block}", reason="it was killed")
            self.workers.remove(worker)
        self.now += 3.0
        self.write(
            "recovery", block=block, lost=list(workers), replayed_shards=4 * len(workers),
            seconds=3.0,
        )  # fmt: skip

    def finish(self) -> "Driver":
        self.now += 1.0
        seconds, workers = self.now - self.events[0]["time"], len(self.workers)
        self.write("finished", seconds=seconds, driver_bytes=1000, workers=workers)
        return self


def write_run(
    run_dir: Path, events: list[dict], blocks: Collection[int] = (), run: object = RUN
) -> Path:
    """A run directory with a record, a journal, and empty files for finished blocks."""
    (run_dir / "blocks").mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps(run))
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for block in blocks:
        (run_dir / "blocks" / f"{block:05d}.safetensors").touch()
    return run_dir
