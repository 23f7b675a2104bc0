"""Helpers for tests of placement policies, schedules and device backends, ours and other people's."""

from __future__ import annotations

from lightning_hetero.testing.accelerator import DeviceStats, EmulatedAccelerator, install_accelerator

__all__ = ["DeviceStats", "EmulatedAccelerator", "install_accelerator"]
