"""When make installs: into a .venv of its own, never into one that is a link to another's."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
    *configs.reference*) echo "the page" ;;
    *) echo "$*" >> commands ;;
esac
"""
"""Says what it was asked for, but for the page."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile, and an environment beside it."""
    folder = tmp_path / "project"
    (folder / "docs").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for place in (tmp_path / "environment", tmp_path / "own"):
        (place / "bin").mkdir(parents=True)
        (place / "bin" / "python").write_text(PYTHON)
        (place / "bin" / "python").chmod(0o755)
    return folder


def make_docs(folder: Path) -> tuple[str, list[str]]:
    """The page, and what else Python was asked for."""
    command = ["make", "docs", f"PYTHON={folder.parent / 'own' / 'bin' / 'python'}"]
    subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    asked = folder / "commands"
    return (folder / "docs" / "configuration.md").read_text(), asked.read_text().splitlines() if asked.exists() else []


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_an_environment_that_is_a_link_is_used_as_it_is(project: Path) -> None:
    """It may be without the marker, or older than this folder's versions."""
    (project / ".venv").symlink_to(project.parent / "environment")
    assert make_docs(project) == ("the page\n", [])
    assert not (project / ".venv" / "installed").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_one_of_its_own_is_installed_once(project: Path) -> None:
    shutil.copytree(project.parent / "environment", project / ".venv")
    page, asked = make_docs(project)
    assert page == "the page\n"
    assert [line.split()[:2] for line in asked] == [["-c", "import"], ["-m", "venv"], ["-m", "pip"]]
    (project / "commands").unlink()
    assert make_docs(project) == ("the page\n", [])
