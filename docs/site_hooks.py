"""Pages of the site that lie outside of docs/, where readers of the repository look for them.

In Markdown files links name the real file, so that they work on GitHub as well. Here the links between these files and the
pages in docs/ are changed to the pages of the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "config/README.md": "reference.md",
    "results/README.md": "results.md",
    "benchmarks/RESULTS.md": "measurements.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Page of the site by the file that it shows."""
FILES = {page: file for file, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+\.md)(?=[)#])")


def on_files(files, config):
    """Add the pages to the site."""
    for file, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Change links to files of the repository into links to pages of the site."""
    source = FILES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def page_of(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        return PAGES.get(target, target.removeprefix("docs/"))

    return LINK.sub(page_of, markdown)
