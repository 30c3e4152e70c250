"""What mkdocs does besides: pages made from the code, the repository's address, links to its files."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from reference import reference_pages
from repository import ROOT, address, address_of

LINK = re.compile(r"(\]\()([^)\s#]+)")
log = logging.getLogger("mkdocs.hooks.kuaifair")
made: dict[str, tuple[str, str]] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Names the repository, and adds the generated pages to the navigation."""
    config.repo_url = address()
    config.repo_name = "Repository"
    made.update(reference_pages())
    (reference,) = (section["Reference"] for section in config.nav or [] if "Reference" in section)
    reference += [{title: path} for path, (title, _) in made.items() if {title: path} not in reference]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    for path, (_, text) in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lets links to files of the repository outside the documentation point to its address."""
    folder = Path(config.docs_dir, page.file.src_uri).parent

    def outside(match: re.Match[str]) -> str:
        target = (folder / match.group(2)).resolve()
        if ":" in match.group(2) or not target.is_relative_to(ROOT):
            return match.group(0)
        if target.is_dir() or not target.is_relative_to(config.docs_dir):
            if not target.exists():
                log.warning("%s links to %s, which does not exist", page.file.src_uri, match.group(2))
            return match.group(1) + address_of(target)
        return match.group(0)

    return LINK.sub(outside, markdown)


def on_post_build(config: Any) -> None:
    """Forgets the pages, which `mkdocs serve` makes again."""
    made.clear()
