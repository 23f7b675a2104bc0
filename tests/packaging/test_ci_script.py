"""`.ci/run` runs the test command of the README, and there is no second copy of it that could differ."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason=".ci/run needs bash, which is not here")

MARKED = "<!-- test command -->\n```bash\n{}\n```\n<!-- end of test command -->\n"


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(root / ".ci" / "run"), *arguments],
        env={**os.environ, "PYTHON": sys.executable},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path, pytestconfig: pytest.Config) -> Path:
    """A tiny project with our script and a README that is still to be written."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(pytestconfig.rootpath / ".ci" / "run", tmp_path / ".ci")
    return tmp_path


def test_the_command_is_the_one_in_the_readme(pytestconfig: pytest.Config) -> None:
    shown = run(pytestconfig.rootpath, "--show")

    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[-1].startswith("pytest")
    assert "-c constraints.txt" in shown.stdout
    readme = (pytestconfig.rootpath / "README.md").read_text()
    assert all(line in readme for line in lines)
    assert "pip install" not in (pytestconfig.rootpath / ".ci" / "run").read_text()


def test_a_readme_without_the_marks_is_an_error(project: Path) -> None:
    (project / "README.md").write_text("# A project\n\n    pytest\n")
    result = run(project)

    assert result.returncode == 2
    assert "README.md has no lines between '<!-- test command -->'" in result.stderr


def test_the_command_runs_in_a_copy_with_the_chosen_python_and_few_threads(project: Path) -> None:
    code = "import os, pathlib; print(os.environ['OMP_NUM_THREADS']); pathlib.Path('made').touch()"
    (project / "README.md").write_text(MARKED.format(f'python3 -c "{code}" && ls\nfalse && true'))
    result = run(project)

    assert "\n1\nREADME.md\nmade\n" in result.stdout, result.stderr
    assert not (project / "made").exists()


def test_it_stops_at_the_first_line_that_fails(project: Path) -> None:
    (project / "README.md").write_text(MARKED.format("false && true\necho not reached"))
    result = run(project)

    assert result.returncode == 1
    assert result.stdout == "+ false && true\n"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git, which is not here")
def test_files_that_git_ignores_stay_behind(project: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    (project / ".gitignore").write_text("ignored\n")
    (project / "ignored").touch()
    (project / "new file").touch()
    (project / "README.md").write_text(MARKED.format("ls && false"))

    assert run(project).stdout == "+ ls && false\nREADME.md\nnew file\n"
