"""What a run tells of its pace."""

from __future__ import annotations

import time

import pytest
import torch

from medray.train.meter import Meter


def test_rates_are_of_the_time_since_the_last_reading() -> None:
    meter = Meter(torch.device("cpu"))
    assert meter.rates() == (0.0, 0.0)
    meter.stepped(8, 0.5)
    meter.stepped(4, 0.5)
    assert meter.rates() == (12.0, 0.0)
    with meter.waiting():
        time.sleep(0.02)
    meter.stepped(1, 0.04)
    rate, wait = meter.rates()
    assert rate == pytest.approx(25.0) and 0.5 <= wait <= 1.0
    meter.stepped(1, 1.0)
    assert meter.rates() == (1.0, 0.0)


def test_epochs_and_the_run_are_counted_apart_from_readings() -> None:
    meter = Meter(torch.device("cpu"))
    meter.stepped(8, 0.5)
    meter.rates()
    meter.stepped(8, 0.5)
    assert meter.epoch() == (16, 1.0, 0.0) and meter.epoch() == (0, 0.0, 0.0)
    with meter.waiting():
        time.sleep(0.02)
    meter.stepped(4, 0.04)
    spent = meter.epoch()
    assert spent.samples == 4 and 0.5 <= spent.share <= 1.0
    assert meter.wait() == pytest.approx(spent.waited / 1.04)


def test_a_processor_tells_memory_alone() -> None:
    meter = Meter(torch.device("cpu"))
    meter.ask_device()
    figures = meter.device()
    assert set(figures) == {"system/peak_memory_mb"} and figures["system/peak_memory_mb"] > 1


def test_a_device_is_asked_until_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [40, 60]

    def utilization(device: torch.device) -> int:
        if not answers:
            raise ModuleNotFoundError("pynvml")
        return answers.pop()

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr("medray.train.memory.peak_mb", lambda device: 3.0)
    meter = Meter(torch.device("cuda"))
    for _ in range(4):
        meter.ask_device()
    assert meter.device() == {"system/peak_memory_mb": 3.0, "system/device_use": 0.5}
    assert meter.device() == {"system/peak_memory_mb": 3.0}
