"""The pictures of docs/pictures.md can be made anew, and are the ones that the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow  # devices that the CPU plays sleep most of the time
def test_the_pictures_of_the_documentation_can_be_made_anew(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (DOCS / "images").glob("*.png")}
    made = subprocess.run(
        [sys.executable, str(DOCS / "images" / "make.py"), str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert made.returncode == 0, made.stderr
    assert {path: path.read_bytes() for path in (DOCS / "images").glob("*.png")} == before
    shown = set(re.findall(r"\]\(images/(\S+\.png)\)", (DOCS / "pictures.md").read_text(encoding="utf-8")))
    assert shown == {path.name for path in before}
    assert shown - {"perfetto.png"} == {path.name for path in tmp_path.iterdir()}  # that one is of a browser
    for path in tmp_path.iterdir():
        drawn = imread(path)[..., :3]
        assert drawn.std() > 0.01, f"nothing is drawn on {path.name}"
