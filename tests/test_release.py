"""Release: one version everywhere, and a source distribution with all that the tests need."""

from __future__ import annotations

import re
from pathlib import Path

from stunet_plugin import __version__

ROOT = Path(__file__).resolve().parents[1]


def test_version_is_the_newest_of_the_changelog_and_that_of_the_citation() -> None:
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == ("Unreleased", "")
    citation = (ROOT / "CITATION.cff").read_text()
    version, date = headings[1]
    assert version == __version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation


def test_source_distribution_holds_every_folder_but_those_of_the_host() -> None:
    packed = set(re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(), re.M))
    sources = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")}
    sources = {name for name in sources if not name.startswith((".", "build"))}
    assert sources - {"stunet_plugin"} <= packed
