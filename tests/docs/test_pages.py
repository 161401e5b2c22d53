"""What pages refer to exists: files of the repository, pictures, other pages; the site builds."""

import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from tests.docs.blocks import PAGES, ROOT

# Paths in backticks that begin with a top-level folder.
_TOP = "v4jax|tests|docs|configs|launch|notebooks|benchmarks|examples"
_PATH = re.compile(rf"`((?:{_TOP})/[\w./-]*)`")
_REFERENCE = re.compile(r"^::: (\S+)$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in _PATH.findall(text):
        if not re.search("NAME|VERB", path):
            assert (ROOT / path).exists(), f"{page} names {path}"
    for link in _LINK.findall(text):
        assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/api/")])
def test_referenced_names_exist(page: str):
    for name in _REFERENCE.findall((ROOT / page).read_text(encoding="utf-8")):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/**/*.svg")), ids=lambda path: path.stem)
def test_pictures_are_readable_in_the_dark(path: pathlib.Path):
    picture = xml.etree.ElementTree.parse(path).getroot()
    assert picture[0].tag.endswith("title") and picture[1].tag.endswith("desc")
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path: pathlib.Path):
    pytest.importorskip("mkdocs", reason="the site needs the [docs] extra")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    assert (tmp_path / "index.html").is_file()
