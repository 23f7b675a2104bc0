"""Where the configurations of our command line lie: inside an installation, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

from lightning_hetero.errors import UsageError

_LANDMARK = Path("placement") / "auto.yaml"  # tells our conf/ from anyone else's of the same name


def conf_dir() -> Path:
    """Directory of the configuration groups, for `@hydra.main(config_path=...)`.

    Returns:
        The absolute path of `lightning_hetero/conf` (installed from a wheel), else of `conf` at the top of
        the repository (editable installation, or a checkout on `PYTHONPATH`).

    Raises:
        UsageError: Neither is there.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "conf", package.parent / "conf")
    for candidate in candidates:
        if (candidate / _LANDMARK).is_file():
            return candidate
    raise UsageError(
        f"the configurations of lightning_hetero are missing: there is no {_LANDMARK.as_posix()} under "
        f"{candidates[0]} or {candidates[1]}. The installation is incomplete; run "
        "`pip install --force-reinstall --no-deps lightning-hetero`, or check out the whole repository."
    )
