"""Every config key as a page: what stands about it in config/keys.py, and its default."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEAD = """# Config keys

What this project adds to Detectron2's keys, and Detectron2's keys whose default is another here. A default is written as
in `dn_detr_d2/config/keys.py`, which this page is made from. "DN" is DN-DETR (CVPR 2022) and its released code, "DAB" is
DAB-DETR, "DD" is Deformable DETR. Keys are set in a YAML file or at the end of a command line:
`dn-detr train --config-file FILE KEY VALUE ...`; a misspelt key is refused with the one that it was meant to be.
"""


@dataclass(frozen=True)
class Key:
    """A key of the config.

    Attributes:
        name: with all nodes above, "MODEL.DN_DETR.NUM_QUERIES".
        default: as source code; "" for a node.
        text: the comment above it; "" where it shares that of the key before.
    """

    name: str
    default: str
    text: str


def read_keys(source: Path) -> Iterator[Key]:
    """The keys and nodes that a file like config/keys.py adds, in its order."""
    code = source.read_text(encoding="utf-8")
    lines, short = code.splitlines(), {"cfg": ""}
    for statement in ast.walk(ast.parse(code)):
        if not isinstance(statement, ast.Assign):
            continue
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Name):  # node = cfg.MODEL.DN_DETR
            short[target.id] = ast.unparse(value).removeprefix("cfg.") + "."
            continue
        start, _, rest = ast.unparse(target).partition(".")
        name, text = short[start] + rest, comment_above(lines, statement.lineno - 1)
        is_node = isinstance(value, ast.Call) and ast.unparse(value.func) == "CfgNode"
        yield Key(name, "" if is_node else ast.get_source_segment(code, value), text)
        for entry in value.args if is_node else ():  # CfgNode({"SIZE": "T", ...})
            for key, given in zip(entry.keys, entry.values, strict=True):
                yield Key(f"{name}.{key.value}", ast.get_source_segment(code, given), "")


def comment_above(lines: list[str], row: int) -> str:
    """The comment that ends just above a line, as one paragraph."""
    found = []
    while row and lines[row - 1].strip().startswith("#"):
        row -= 1
        found.insert(0, lines[row].strip().lstrip("# "))
    return " ".join(found)


def keys_page(source: Path) -> str:
    """The page in Markdown: a section for each node, and in it the keys, those of one comment together."""
    sections, nodes = {}, {}
    for key in read_keys(source):
        if not key.default:
            nodes[key.name] = key.text
            continue
        section = sections.setdefault(key.name.rpartition(".")[0] or "Top level", [])
        if key.text or not section:
            section.append(([], key.text))
        section[-1][0].append(key)
    page = [HEAD]
    for name, groups in sections.items():
        page += [f"## {name}", plain(nodes.get(name, ""))]
        for keys, text in groups:
            page += [
                "  \n".join(f"**`{key.name}`** = `{key.default}`" for key in keys),
                f": {plain(text)}" if text else "",
            ]
    return "\n\n".join(part for part in page if part) + "\n"


def plain(text: str) -> str:
    """A text whose characters mean nothing in Markdown."""
    return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", text)
