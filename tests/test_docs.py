"""Documentation: commands, options, trainers, planners, variables, paths and links that exist."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import shlex
from pathlib import Path

import pytest

from stunet_plugin import plans, trainers
from stunet_plugin.commands import COMMANDS
from stunet_plugin.commands.list import List, size_table
from stunet_plugin.options import OPTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SCRIPT_FOLDERS = ("benchmarks", "experiments", "tests/tools")
STOCK_TRAINERS = {"nnUNetTrainer", "nnUNetTrainerBudget", "NAME", "PlainSTUNetTrainer_small_ep5"}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@functools.cache
def command_lines(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks and inline code, split into words."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for line in [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *inline]:
        with contextlib.suppress(ValueError):  # half a command in prose
            words = shlex.split(line, comments=True)
            parts = itertools.groupby(words, lambda word: word == "&&")
            found += [list(part) for between, part in parts if not between]
    return found


@pages
def test_commands_options_trainers_and_planners_exist(page: Path) -> None:
    parsers = {command.command: command.parser() for command in COMMANDS}
    for words in command_lines(page):
        for flag, name in itertools.pairwise(words):
            if flag == "-tr" and "..." not in name and name not in STOCK_TRAINERS:
                assert hasattr(trainers, name), words
            if flag == "-pl" and name not in ("PLANNER", "NAME"):
                assert hasattr(plans, name), words
                # It would empty preprocessed data that a training may be reading.
                assert words[0] != "nnUNetv2_plan_and_preprocess"
        if words[:1] == ["stunet"] and re.match("[a-z]", " ".join(words[1:])):
            actions = parsers[words[1]]._actions
            known = {text for action in actions for text in action.option_strings}
            given = {word.partition("=")[0] for word in words[2:] if re.match("--?[a-zA-Z]", word)}
            assert given <= known, words


@pages
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in slugs, link
    if page.name != "CHANGELOG.md":
        folders = "benchmarks|docs|experiments|plans|stunet_plugin|tests|trainers"
        names = rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w\.(?:py|md|json|png))"
        for path in re.findall(names, text):
            assert (ROOT / path).exists() or (page.parent / path).exists(), path


@pages
def test_scripts_know_their_options(page: Path) -> None:
    """Every --option after a script's name is in its source."""
    for words in command_lines(page):
        scripts = [x for x in words if x.startswith(SCRIPT_FOLDERS) and x.endswith(".py")]
        if scripts:
            files = (ROOT / scripts[0], (ROOT / scripts[0]).with_name("common.py"))
            source = "".join(file.read_text() for file in files if file.exists())
            given = words[words.index(scripts[0]) :]
            assert all(f'"{x}"' in source for x in given if x.startswith("--")), words


def test_options_are_those_of_the_table() -> None:
    rows = [f"| `{one.variable}` | {one.allowed} | {one.meaning} |" for one in OPTIONS]
    table = (ROOT / "docs/options.md").read_text().splitlines()
    assert [line for line in table if line.startswith("| `STUNET_")] == rows
    named = "".join(page.read_text() for page in PAGES)
    variables = set(re.findall(r"\bSTUNET_[A-Z_]*[A-Z]\b(?!_)", named))
    assert variables <= {option.variable for option in OPTIONS}


def test_sizes_in_the_readme_are_those_of_stunet_list() -> None:
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(readme) <= 150
    for line in size_table(List()).splitlines():
        if re.match(r"(small|base|large|huge) +\d", line):
            values = re.split(r"\s{2,}", line.strip())
            row = next(row for row in readme if row.startswith(f"| `{values[0]}`"))
            cells = [cell.strip(" `") for cell in row.strip("|").split("|")]
            assert cells == [*values[:6], values[7]]
