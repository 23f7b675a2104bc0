"""The package works the same from a wheel, from an editable installation and from a bare checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from typing import Protocol

    class Installation(Protocol):
        way: str

        def run(self, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]: ...


def test_it_is_found_where_this_way_of_installing_puts_it(
    installation: Installation, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    run = installation.run("-c", "import lightning_hetero; print(lightning_hetero.__file__)", cwd=tmp_path)

    in_checkout = Path(run.stdout.strip()).is_relative_to(pytestconfig.rootpath)
    assert in_checkout == (installation.way != "wheel"), run.stderr


def test_conf_dir_is_inside_the_wheel_and_at_the_top_of_a_checkout(
    installation: Installation, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    program = "from lightning_hetero._conf import conf_dir; print(conf_dir())"
    folder = Path(installation.run("-c", program, cwd=tmp_path).stdout.strip())

    assert (folder / "placement" / "auto.yaml").is_file()
    if installation.way == "wheel":
        assert folder.parent.name == "lightning_hetero"
    else:
        assert folder == pytestconfig.rootpath / "conf"


def test_hydra_finds_the_configurations_in_an_application_that_never_heard_of_us(
    installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(
        "import hydra\n@hydra.main(version_base='1.3', config_path=None)\ndef main(cfg): pass\nmain()\n"
    )
    search_path = installation.run("app.py", "--info", "searchpath", cwd=tmp_path)
    config = installation.run("app.py", "+hetero=auto", "--cfg", "job", cwd=tmp_path)

    assert "| lightning-hetero |" in search_path.stdout, search_path.stderr
    assert "_target_: lightning_hetero.HeteroStrategy" in config.stdout, config.stderr


def test_lightning_resolves_the_name_without_any_import_of_ours(installation: Installation, tmp_path: Path) -> None:
    program = (
        # A checkout has no entry points: there, this import is needed.
        ("import lightning_hetero\n" if installation.way == "checkout" else "")
        + "from lightning.pytorch import Trainer\n"
        "print(type(Trainer(strategy='hetero', accelerator='cpu', logger=False).strategy).__name__)"
    )
    run = installation.run("-c", program, cwd=tmp_path)

    assert run.stdout == "HeteroStrategy\n", run.stderr


@pytest.mark.parametrize("installation", ["wheel"], indirect=True)
@pytest.mark.parametrize("switch", ["LIGHTNING_HETERO_AUTOREGISTER", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_two_switches_keep_torch_from_calling_us(installation: Installation, tmp_path: Path, switch: str) -> None:
    program = "import torch, sys; print([type(f).__name__ for f in sys.meta_path].count('ConnectorFinder'))"

    assert installation.run("-c", program, cwd=tmp_path, **{switch: "0"}).stdout == "0\n"
