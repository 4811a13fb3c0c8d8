"""Pages point at files, sections, commands and keys that exist, and their lines can be read."""

import re

import pytest
from conftest import ROOT
from detectron2.config import get_cfg

from dn_detr_d2 import add_dn_detr_config, setup_cfg

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")


def prose(path):
    """The page without its fenced code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """What GitHub calls the sections of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path):
    """Relative links of a page that lead to no file, or to no section of it."""
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, section = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (section and section not in anchors(file)):
            yield target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert list(broken_links(path)) == []


def test_a_broken_link_would_be_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One two\n\n[a](a.md) [b](b.md) [c](a.md#one-two) [d](#three) [e](https://x.y/z)\n"
    )
    assert list(broken_links(tmp_path / "a.md")) == ["b.md", "#three"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_and_tests_that_a_page_names_exist(path):
    if path.name == "CHANGELOG.md":
        pytest.skip("it also names what has another name now")
    named = re.findall(r"(?<![\w/.])((?:tools|dev|tests|configs|csrc|dn_detr_d2|docs)/[\w/.-]*\w)", path.read_text())
    made_by_user = {"configs/cells.yaml", "configs/NAME.yaml", "configs/CONFIG.yaml", "dn_detr_d2/_build.txt"}
    assert [x for x in named if x not in made_by_user and not (ROOT / x).exists()] == []


CONFIGS = [
    pytest.param(text, id=f"{path.relative_to(ROOT)}-{i}")
    for path in PAGES
    for i, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))
    if "/path/to/" not in text  # Detectron2's own configs lie where its repository was cloned
]


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_of_a_page_are_taken(text, tmp_path):
    (tmp_path / "page.yaml").write_text(text)
    setup_cfg(str(tmp_path / "page.yaml"), [], splits=())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_keys_that_a_page_names_exist(path):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    known = set()

    def walk(node, above):
        for name, value in node.items():
            known.update(".".join([*above, name][i:]) for i in range(len(above) + 1))
            if hasattr(value, "items"):
                walk(value, [*above, name])

    walk(cfg, [])
    named = set(re.findall(r"(?<![\w./])[A-Z][A-Z0-9_]+(?:\.[A-Z][A-Z0-9_]+)+\b(?!\.\w)", path.read_text()))
    examples = {"SOLVER.MAX_ITR", "MODEL.DN_DERT"}  # misspelt on purpose
    assert sorted(key for key in named - examples if key not in known and not key.endswith((".MD", ".PNG"))) == []


def test_the_readme_begins_with_a_picture_and_two_commands_and_is_short():
    first, commands, rest = (ROOT / "README.md").read_text().partition("make test ")
    assert "](docs/pictures/" in first
    assert "make quickstart" in first
    assert commands
    assert len(rest.splitlines()) <= 120


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_outside_tables_have_at_most_120_columns(path):
    if path.is_relative_to(ROOT / "docs" / "evidence") and path.parent.name != "evidence":
        pytest.skip("written by dev/compare_runs.py")
    assert [line for line in path.read_text().splitlines() if len(line) > 120 and not line.startswith("|")] == []
