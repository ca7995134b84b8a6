"""What a server counts, for Prometheus. Replicas of one machine share a folder of counters, so that any may be asked.

No label comes from a client: paths are the routes' own, models and classes those of the bundles.
"""

from __future__ import annotations

import os
from typing import Any

from medray.data.fingerprint import Fingerprint

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that prometheus_client takes the folder from, before it is imported."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)


class Meters:
    """The counters of one replica."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        here: dict[str, Any] = {"registry": self._registry, "namespace": "medray"}
        shared: dict[str, Any] = {**here, "multiprocess_mode": "livemostrecent"}
        of = ("model", "version")
        self.requests = Counter("requests", "Requests answered.", ("route", "status"), **here)
        self.request_seconds = Histogram(
            "request_seconds", "From a request to its answer.", ("route",), buckets=_SECONDS, **here
        )
        self.stage_seconds = Histogram(
            "stage_seconds",
            "Of a prediction: read (decode), prepare, network (with its queue), finish, write.",
            (*of, "stage"),
            buckets=_SECONDS,
            **here,
        )
        self.batch_requests = Histogram("batch_requests", "Requests in one run.", of, buckets=_COUNTS, **here)
        self.batch_samples = Histogram("batch_samples", "Images or windows in one run.", of, buckets=_COUNTS, **here)
        self.engine_seconds = Histogram("engine_seconds", "One run of the engine.", of, buckets=_SECONDS, **here)
        self.waiting = Gauge("waiting", "Predictions that wait or run.", multiprocess_mode="livesum", **here)
        self.answers = Counter("answers", "Predictions by class found.", (*of, "class"), **here)
        self.flags = Counter("flags", "Flags raised on inputs.", (*of, "flag"), **here)
        self.outside = Histogram(
            "intensity_outside_ratio",
            "Share of an input's intensities beyond the training data's central 99 %.",
            of,
            buckets=_SHARES,
            **here,
        )
        self.training = Gauge(
            "training_class_ratio", "Share of training cases that show the class.", (*of, "class"), **shared
        )
        self.info = Gauge(
            "model_info", "1 for each version that answers.", (*of, "bundle", "engine", "precision"), **shared
        )
        self.config_refused = Gauge(
            "config_refused",
            "1 while a changed configuration is refused and the former one stands.",
            multiprocess_mode="livemax",
            **here,
        )

    def baseline(self, model: str, version: str, fingerprint: Fingerprint | None) -> None:
        """What answers are to be held against."""
        for name, count in (fingerprint.class_cases if fingerprint else {}).items():
            assert fingerprint is not None
            self.training.labels(model, version, name).set(count / max(1, fingerprint.cases))

    def render(self) -> tuple[bytes, str]:
        """All of them, of all replicas of this machine; and the media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        if os.environ.get(FOLDER):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        else:
            registry = self._registry
        return generate_latest(registry), CONTENT_TYPE_LATEST
