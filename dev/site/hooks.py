"""Hooks of MkDocs: pages that are not in docs/, and links that lead out of it.

The pages of docs/ and at the top level are read on GitHub too, so their links are those of the checkout. In the site the
top-level pages lie beside those of docs/, and any other file that a page links to is copied to files/.
"""

import json
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

sys.path.append(str(Path(__file__).resolve().parents[2]))

from dev.site.keys import keys_page

ROOT = Path(__file__).resolve().parents[2]

TOP = {"README.md": "index.md"} | {
    name: name for name in ("MODEL_ZOO.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
}
TOP["examples/README.md"] = "examples.md"
# packages and modules with a page of their own, in the order of the navigation
API = (
    "denoising", "losses", "layers", "structures", "boxes", "predictor", "sources", "tiling", "model_zoo", "engine",
    "modeling", "data", "evaluation", "diagnostics", "visualization", "checkpoint", "config", "export", "report",
    "hub", "errors",
)  # fmt: skip
LINK = re.compile(r"(\]\()([^()\s]+)(\))")


def github_anchor(title: str, separator: str = "-") -> str:
    """What GitHub calls a section."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", separator)


def place(path: str) -> str:
    """Where a file of the checkout lies in the site."""
    return TOP.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")


def relinked(text: str, page: str) -> tuple[str, set[str]]:
    """A page with the links of the site, and the files of the checkout that it links to; fenced code stays as it is.

    Args:
        text: Markdown.
        page: its path in the checkout.
    """
    linked = set()

    def _link(match: re.Match) -> str:
        target, mark, section = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        linked.add(path)
        return (
            match[1] + posixpath.relpath(place(path), posixpath.dirname(place(page)) or ".") + mark + section + match[3]
        )

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(_link, part) for part in parts), linked


def notebook_page(path: Path) -> str:
    """The cells of a notebook, code fenced; outputs are not shown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts]
    return "\n\n".join(parts) + f"\n\nAs a notebook: [{path.name}](../{path.relative_to(ROOT)}).\n"


def on_config(config):
    """Sections have the names that GitHub gives them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_anchor
    return config


def on_files(files, config):
    """Adds the pages from outside docs/, the generated ones, and the files that pages link to."""
    for path, name in TOP.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    files.append(File.generated(config, "keys.md", content=keys_page(ROOT / "dn_detr_d2/config/keys.py")))
    files.append(File.generated(config, "notebook.md", content=notebook_page(ROOT / "examples/first_steps.ipynb")))
    for name in API:
        files.append(
            File.generated(config, f"api/{name}.md", content=f"# dn_detr_d2.{name}\n\n::: dn_detr_d2.{name}\n")
        )
    for page in list(files.documentation_pages()):
        for path in sorted(relinked(page.content_string, source_of(page))[1]):
            if place(path).startswith("files/") and (ROOT / path).is_file() and place(path) not in files.src_uris:
                files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def source_of(file: File) -> str:
    """The path in the checkout of a page of the site."""
    return next((path for path, name in TOP.items() if name == file.src_uri), f"docs/{file.src_uri}")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links of the checkout become links of the site."""
    return relinked(markdown, source_of(page.file))[0]
