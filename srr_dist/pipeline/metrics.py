"""What a run tells Ray's metrics, and so Prometheus: counters, gauges and one histogram, all named ``srr_dist_*``."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

_UNIT_SECONDS = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0]


class Metrics:
    """The metrics of one run, told apart by its output; made after Ray is there."""

    def __init__(self, output: str) -> None:
        tags = {"output": output}
        self.units = Counter("srr_dist_units_committed", "Units of work committed.", ("output",))
        self.unit_seconds = Histogram(
            "srr_dist_unit_seconds", "Worker seconds of a unit.", boundaries=_UNIT_SECONDS, tag_keys=("output",)
        )
        self.bytes = Counter("srr_dist_bytes_committed", "Bytes of the committed units' files.", ("output",))
        self.failures = Counter("srr_dist_failures", "Failures, by kind.", ("output", "kind"))
        self.replaced = Counter("srr_dist_workers_replaced", "Workers started in place of others.", ("output",))
        self.workers = Gauge("srr_dist_workers", "Workers that take part.", ("output",))
        self.share = Gauge("srr_dist_share_done", "Share of the work that is done, 0 to 1.", ("output",))
        for metric in vars(self).values():
            metric.set_default_tags(tags)
