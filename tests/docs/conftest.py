"""What the pages import."""

from __future__ import annotations

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CI", "true")  # OpenVINO reports its import to its makers, with a thread that stays, but not in a CI
    import openvino  # noqa: F401
