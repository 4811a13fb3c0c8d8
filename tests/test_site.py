"""The site of docs/: its pages, links and keys; and the files that say what the software is."""

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from detectron2.config import get_cfg

import dn_detr_d2
from dev.site import hooks
from dev.site.keys import comment_above, keys_page, read_keys
from dn_detr_d2 import add_dn_detr_config

KEYS = ROOT / "dn_detr_d2" / "config" / "keys.py"
PAGES = [*ROOT.glob("docs/**/*.md"), *(ROOT / path for path in hooks.TOP)]


def leaves(node, above=""):
    """{full name: value} of a config."""
    found = {}
    for name, value in node.items():
        found |= leaves(value, f"{above}{name}.") if hasattr(value, "items") else {above + name: value}
    return found


def changed_keys():
    """{name: value} of what this project adds to Detectron2's config, or gives another default."""
    before, after = get_cfg(), get_cfg()
    add_dn_detr_config(after)
    old = leaves(before)
    return {name: value for name, value in leaves(after).items() if name not in old or old[name] != value}


def test_the_page_has_every_key_with_its_default():
    written = {key.name: key.default for key in read_keys(KEYS) if key.default}
    changed = changed_keys()
    assert changed.keys() <= written.keys()
    for name, value in changed.items():
        if name != "MODEL.DEVICE":  # that of this machine
            assert eval(written[name], {"__builtins__": {}}) == value, name
    page = keys_page(KEYS)
    assert all(f"**`{name}`** = `{default}`" in page for name, default in written.items())


def test_every_key_on_the_page_has_a_text(tmp_path):
    """Of its own, or of the node that it begins."""
    for section in keys_page(KEYS).split("\n## ")[1:]:
        title, first, *rest = section.strip().split("\n\n")
        blocks = [first, *rest] if first.startswith("**`") else rest
        texts = blocks[1::2] if len(blocks) % 2 == 0 else [first, *blocks[2::2]]
        assert all(len(text) > 10 and not text.startswith("**`") for text in texts), title


def test_keys_are_read_with_the_comment_that_they_share(tmp_path):
    source = tmp_path / "keys.py"
    source.write_text(
        "def add(cfg):\n    # Of a\n    # and b.\n    cfg.A = 1e-3\n    cfg.B = [1, 2]\n\n    cfg.N = CfgNode()\n"
        "    node = cfg.N\n    # Of c: *x*.\n    node.C = None\n    # Of m.\n    node.M = CfgNode({'X': 3})\n"
    )
    assert [(key.name, key.default, key.text) for key in read_keys(source)] == [
        ("A", "1e-3", "Of a and b."), ("B", "[1, 2]", ""), ("N", "", ""), ("N.C", "None", "Of c: *x*."),
        ("N.M", "", "Of m."), ("N.M.X", "3", ""),
    ]  # fmt: skip
    assert comment_above(["x = 1", "# a", "#  b", "y = 2"], 3) == "a b"
    assert "**`A`** = `1e-3`  \n**`B`** = `[1, 2]`\n\n: Of a and b." in keys_page(source)
    assert r": Of c: \*x\*." in keys_page(source)


@pytest.mark.parametrize(("page", "target", "linked"), [
    ("docs/training.md", "../MODEL_ZOO.md#a", "MODEL_ZOO.md#a"),
    ("docs/training.md", "../configs/bccd.yaml", "files/configs/bccd.yaml"),
    ("docs/evidence/README.md", "../../README.md", "../index.md"),
    ("README.md", "docs/training.md", "training.md"),
    ("README.md", "docs/evidence/README.md", "evidence/README.md"),
    ("examples/README.md", "../docs/plug_in.md", "plug_in.md"),
    ("examples/README.md", "torchvision_detr.py", "files/examples/torchvision_detr.py"),
    ("docs/a.md", "https://x.y/z", "https://x.y/z"),
    ("docs/a.md", "#section", "#section"),
])  # fmt: skip
def test_links_of_the_checkout_become_links_of_the_site(page, target, linked):
    assert hooks.relinked(f"see [it]({target}).", page)[0] == f"see [it]({linked})."


def test_code_is_no_link():
    text = "```python\nx[0](../y)\n```\n"
    assert hooks.relinked(text, "docs/a.md") == (text, set())


def navigation(node):
    """The pages of mkdocs.yml's nav."""
    if isinstance(node, str):
        return [node]
    return [page for part in (node.values() if isinstance(node, dict) else node) for page in navigation(part)]


def test_the_navigation_has_every_page_once():
    listed = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(listed) == len(set(listed))
    pages = {hooks.place(str(path.relative_to(ROOT))) for path in PAGES}
    generated = {"keys.md", "notebook.md", *(f"api/{name}.md" for name in hooks.API)}
    measured = {page for page in pages if page.startswith("evidence/") and page != "evidence/README.md"}
    assert set(listed) == (pages | generated) - measured


def test_the_api_has_every_public_part_of_the_package():
    """Besides what is the program's own, and modules that the package exports name by name."""
    parts = {path.stem for path in (ROOT / "dn_detr_d2").iterdir() if (path / "__init__.py").exists()}
    assert parts - set(hooks.API) <= {"commands", "utils"}
    assert set(hooks.API) <= {path.stem for path in (ROOT / "dn_detr_d2").iterdir()}


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    """Strict: a broken link, a missing section or a page outside the navigation is an error."""
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    api = (tmp_path / "site" / "api" / "denoising.html").read_text()
    assert 'id="dn_detr_d2.denoising.QueryDenoising"' in api
    assert "draws noised copies" in (tmp_path / "site" / "plug_in.html").read_text()
    assert ":class:`" not in api
    foreign = re.findall(r'(?:src|href)="(?:https?:)?//[^"]+\.(?:js|css|woff2?)"', api)
    assert foreign == []  # nothing is fetched from elsewhere
    # every relative link and picture of the built pages leads to a file
    for page in (tmp_path / "site").rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?:]+)(?:[#?][^"]*)?"', page.read_text()):
            assert (page.parent / target).exists() or page.name == "404.html", f"{page}: {target}"


def test_the_citation_is_complete():
    """What the format, version 1.2.0, requires of software and of its references."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["version"] == dn_detr_d2.__version__
    assert citation["license"] == "Apache-2.0"
    assert len(citation["references"]) == 2
    for entry in citation["references"]:
        assert {"type", "title", "authors"} <= entry.keys()
        assert all(author.keys() >= {"family-names", "given-names"} for author in entry["authors"])
        assert "DN-DETR" in entry["title"]
        assert 2022 <= entry["year"] <= date.today().year


def test_the_container_installs_what_is_there():
    """The Dockerfile is not built here; at least the files that it copies exist, and what it needs is not left out."""
    text = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY ([\w./]+) ", text, re.MULTILINE)
    assert copied
    assert all((ROOT / path).exists() for path in copied)
    ignored = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"}
    assert not ignored & {
        "dn_detr_d2",
        "configs",
        "csrc",
        "tools",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "dn_detr_d2_cli.py",
    }


def test_the_pins_have_a_line_for_each_python():
    """A package that is pinned for newer versions of Python only would be missing in an older one."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    marked = [line.partition("==")[::2] for line in lines if "python_version" in line]
    for name in {name for name, _ in marked} - {"transformers"}:  # whose tests are skipped
        assert sorted(rest.rpartition(";")[2].strip()[:17] for other, rest in marked if other == name) == [
            "python_version < ", "python_version >="
        ], name  # fmt: skip


def test_the_paths_of_this_test_exist():
    assert all(Path(path).exists() for path in PAGES)
