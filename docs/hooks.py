"""What mkdocs is told beside mkdocs.yml: which files outside docs/ belong to the site.

On GitHub, and so in the files, such a link reads ../NAME. On the site NAME lies beside the pages.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the notebooks that lie outside docs/."""
    for path in [*map(ROOT.joinpath, PAGES), *sorted(ROOT.glob("notebooks/*.ipynb"))]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links from page to page into those of the site."""
    prefix = "docs/" if page.file.src_uri in PAGES else "../"
    return re.sub(rf"\]\({re.escape(prefix)}", "](", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keep the two dashes of a flag in running text together with its name."""

    def kept(code: re.Match) -> str:
        return re.sub(r"--[\w-]+", r'<span class="flag">\g<0></span>', code[0])

    return re.sub(r"<code>[^<]*--[^<]*</code>", kept, html)
