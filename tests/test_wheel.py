"""What is installed: `v4jax` alone, which works beside any other project's `configs` package."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Returns the wheel that `pip install .` would install, built offline."""
    pytest.importorskip("setuptools", minversion="77", reason="needs the [test] extra")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # the build leaves files beside the sources
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "v4jax", "configs", "tests"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-c", BUILD, str(folder)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture
def project(tmp_path):
    """Returns an empty folder but for a `configs` package that nobody may import."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise SystemExit('the wrong configs')\n")
    return tmp_path


def test_only_v4jax_is_installed(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"v4jax"}
    weights = [path for path in (ROOT / "v4jax" / "pretrained").glob("*/*") if path.is_file()]
    for path in (ROOT / "v4jax/config/models/v4_flash.py", *weights):
        assert path.relative_to(ROOT).as_posix() in names


@pytest.mark.slow
def test_the_wheel_answers_beside_another_configs_package(wheel, project):
    zipfile.ZipFile(wheel).extractall(project / "installed")
    (project / "docs.jsonl").write_text('{"text": "A text.", "question": "Who?"}\n')
    command = [sys.executable, "-m", "v4jax.cli.main", "batch", "--model=nano"]
    command += ["--input=docs.jsonl", "--output=answers.jsonl", "--max_new_tokens=2"]
    command += ["--mesh=data=1", "--chunk_tokens=128"]
    environment = os.environ | {"PYTHONPATH": str(project / "installed")}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"answer"' in (project / "answers.jsonl").read_text()
