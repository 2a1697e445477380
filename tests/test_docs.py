"""The pages say what is so: links lead somewhere, cited lines of code are those lines, cited tests exist."""

import pathlib
import re
import tomllib

import pytest

import adamite

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\[([^\]]*(?:\][^\](]+)*)\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for _, target in LINK.findall(page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_cited_lines_of_code_are_those_lines():
    cited = re.findall(r"\[`([^\n]+?)`\]\(\.\./([\w/.]+)#L(\d+)\)", (ROOT / "docs/adam.md").read_text())
    assert len(cited) >= 5
    for text, path, number in cited:
        line = (ROOT / path).read_text().splitlines()[int(number) - 1]
        assert line.strip() == text, f"{path}:{number} is now {line.strip()!r}"


def test_every_difference_names_its_test_and_every_test_its_difference():
    named = set(re.findall(r"`(test_\w+)` \|", (ROOT / "docs/differences.md").read_text()))
    defined = set(re.findall(r"^def (test_\w+)", (ROOT / "tests/test_differences.py").read_text(), re.M))
    assert named == defined


def test_commands_of_the_pages_are_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= targets, page.name


def test_version_is_in_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{adamite.__version__}]" in changelog


def test_runtime_dependencies_are_jax_and_optax():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(re.match(r"\w+", d)[0] for d in project["dependencies"]) == ["jax", "optax"]
