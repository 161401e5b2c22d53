"""Pages of the site that are kept beside what they describe, and links that work in both places."""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
# Place in the repository: page of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "benchmarks/README.md": "results/index.md",
    "tests/README.md": "tests.md",
    "v4jax/pretrained/nano/README.md": "nano.md",
} | {
    f"benchmarks/results/{path.name}": f"results/{path.name}"
    for path in ROOT.glob("benchmarks/results/*.md")
}
_SOURCES = {page: source for source, page in ELSEWHERE.items()}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+")


def on_files(files, config):
    """Adds the pages that are kept elsewhere."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links between files of the repository into links between pages."""
    here = page.file.src_uri
    folder = posixpath.dirname(_SOURCES.get(here, f"docs/{here}"))

    def turn(link):
        target = posixpath.normpath(posixpath.join(folder, link[0]))
        target = ELSEWHERE.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return _LINK.sub(turn, markdown)
