"""Pages of the site that are made when it is built: those at the top of the repository, and the
options of all commands from their parsers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TOP_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}


def on_files(files: Files, config: Any) -> Files:
    """mkdocs calls this once it has found the pages in docs/."""
    for source, page in TOP_PAGES.items():
        text = site_links((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def site_links(text: str) -> str:
    """Return a page of the repository's top with the links that it has on the site: pages in
    docs/ are beside it, files that are no pages are named only."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^\]]+)\]\((?:LICENSE|NOTICE|CITATION\.cff)\)", r"\1", text)


def commands_page() -> str:
    """Return the help of all commands as a page."""
    sys.path.insert(0, str(ROOT))
    from stunet_plugin.commands import GROUPS

    lines = ["# All commands and options", "", "As `stunet COMMAND --help` prints them.", ""]
    for group, commands in GROUPS.items():
        lines += [f"## {group.capitalize()}", ""]
        for command in commands:
            lines += [f"### stunet {command.command}", "", "```text"]
            lines += [command.parser().format_help().rstrip(), "```", ""]
    return "\n".join(lines)
