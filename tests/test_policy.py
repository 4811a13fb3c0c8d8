"""Laws of the house that a machine can read: doors, config keys, devices, and the tree on paper."""

import ast
import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / "dn_detr_d2"
FILES = sorted(PACKAGE.rglob("*.py"))
# What each room may import from this package, besides itself (docs/architecture.md).
GROUND = {"structures", "boxes", "errors", "coco", "randomness"}
DOORS = {
    "structures": {"boxes", "errors"},
    "boxes": set(),
    "errors": set(),
    "coco": set(),
    "randomness": set(),
    "layers": GROUND | {"_C"},  # the compiled operators
    "denoising": GROUND,
    "checkpoint": GROUND,
    "modeling": GROUND | {"layers", "denoising", "checkpoint"},
    "data": GROUND,
    "solver": GROUND,
    "config_file": GROUND,
    "config_keys": set(),
    "config_ranges": GROUND,
    "config": GROUND | {"data", "config_file", "config_keys", "config_ranges"},
    "evaluation": GROUND | {"data", "denoising", "modeling"},
    "training": GROUND | {"data", "checkpoint"},
    "engine": GROUND | {"data", "solver", "checkpoint", "evaluation", "training"},
    "predictor": GROUND | {"training"},
    "doctor": GROUND | {"layers", "checkpoint", "data", "config", "__version__"},
}
# Which parts of detectron2 each room may know.
DETECTRON2 = {
    "modeling": {"config", "layers", "modeling", "structures", "utils"},
    "coco": {"data"},  # names of the classes
    "data": {"config", "data", "structures", "utils"},
    "solver": {"solver"},
    "evaluation": {"engine", "structures", "utils"},
    "config": {"config"},
    "training": {"checkpoint", "engine", "utils"},
    "engine": {"engine", "evaluation", "modeling", "utils"},
    "predictor": {"engine"},
    "doctor": {"config", "data", "modeling", "structures"},
}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(package, first part below it) of every import, relative ones resolved."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((*name.name.split("."), "")[:2] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            parts = node.module.split(".")
            yield from ((parts[0], parts[1]) for _ in [0] if len(parts) > 1)
            if len(parts) == 1:
                yield from ((parts[0], name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1]
            names = [node.module.split(".")[0]] if node.module else [name.name for name in node.names]
            yield from (("dn_detr_d2", (*above, name)[0]) for name in names)


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py" or f.parent != PACKAGE], ids=str)
def test_doors(path):
    room = room_of(path)
    for package, part in imports(path):
        if package == "dn_detr_d2":
            assert part == room or part in DOORS[room], f"{path} imports {part}"
        if package == "detectron2":
            assert part in DETECTRON2.get(room, set()), f"{path} imports detectron2.{part}"


def test_a_wrong_door_would_be_found(tmp_path):
    file = PACKAGE / "layers" / "imaginary.py"
    node = "from ..modeling import matcher\nfrom detectron2.structures import Boxes\n"
    parsed = list(imports_of_text(node, file))
    assert ("dn_detr_d2", "modeling") in parsed
    assert ("detectron2", "structures") in parsed


def imports_of_text(text, path):
    class Imaginary(type(path)):
        def read_text(self, *args):
            return text

    return imports(Imaginary(path))


# Code that could run what a file says, or name a device; the one file that may import pickle refuses what a pickle names.
CODE = sorted([*FILES, *(ROOT / "tools").rglob("*.py"), *ROOT.glob("*.py")])
AUDITED = {PACKAGE / "checkpoint" / "files.py": {"import pickle"}}
RUNS_CONTENT = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code"}
CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.load_all", "runpy.run_path"}
KEYWORDS = {("weights_only", False), ("shell", True), ("allow_pickle", True), ("allow_unsafe", True)}


def offences(text):
    """What the code says that a file may make it run, or that pins a device; comments and strings do not count."""
    tree, origin = ast.parse(text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for name in node.names:
                full = f"{module}.{name.name}" if module else name.name
                origin[name.asname or name.name] = full
                if full.split(".")[0] in RUNS_CONTENT:
                    yield f"import {full.split('.')[0]}"
        if isinstance(node, ast.Attribute | ast.Name):
            called = ast.unparse(node)
            first, dot, rest = called.partition(".")
            called = origin.get(first, first) + dot + rest
            if called in CALLS or called.split(".")[-1] in ("unsafe_load", "unsafe_load_all"):
                yield called
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                yield ".cuda()"
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            yield from (f"{key}={value}" for key, value in KEYWORDS if given.get(key) is value)
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True:
                yield "torch.load without weights_only=True"


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_a_file_says_is_executed(path):
    assert set(offences(path.read_text())) <= AUDITED.get(path, set())


def test_the_audited_files_still_need_their_exception():
    for path, allowed in AUDITED.items():
        assert set(offences(path.read_text())) == allowed


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import pickle\npickle.load(f)", "import pickle"),
        ("from pickle import loads as read\nread(f)", "import pickle"),
        ("def f():\n    import dill", "import dill"),
        ("eval('1')", "eval"),
        ("list(map(exec, lines))", "exec"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import system as go\ngo('ls')", "os.system"),
        ("import os as o\no.popen('ls')", "os.popen"),
        ("import yaml\nyaml.load(f, yaml.SafeLoader)", "yaml.load"),
        ("from yaml import unsafe_load", None),  # an import alone runs nothing; its use does
        ("from yaml import unsafe_load\nunsafe_load(f)", "yaml.unsafe_load"),
        ("torch.load(f, weights_only=False)", "weights_only=False"),
        ("torch.load(f)", "torch.load without weights_only=True"),
        ("subprocess.run('ls', shell=True)", "shell=True"),
        ("np.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("cfg.merge_from_file(f, allow_unsafe=True)", "allow_unsafe=True"),
        ("model.cuda()", ".cuda()"),
        ("model.eval()  # eval(x), pickle.load(f)", None),
        ('"""os.system(x)"""\ntorch.load(f, weights_only=True)', None),
    ],
)
def test_a_planted_offender_is_found_and_a_comment_is_none(text, found):
    assert (set(offences(text)) == set()) if found is None else (found in set(offences(text)))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_hard_coded_devices(path):
    assert not re.search(r"to\(.cuda", path.read_text()), f"{path} moves something to a device by name"


def config_keys():
    """(line, key, lines before it) of every assignment to cfg.* or node.* in add_dn_detr_config."""
    lines = (PACKAGE / "config.py").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def add_dn_detr_config"))
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith("def "))
    for i in range(start, end):
        if match := re.match(r"    (?:cfg|node)\.([A-Z0-9_.]+) = (?!CfgNode)", lines[i]):
            yield match[1], lines, i


def test_every_config_key_has_a_comment():
    for key, lines, i in config_keys():
        while not lines[i].strip().startswith("#"):
            assert lines[i].strip(), f"{key} stands without a comment"
            i -= 1  # keys that follow one another may share a comment


def test_every_config_key_is_read_somewhere():
    sources = "\n".join(f.read_text() for f in FILES if f.name != "config.py") + (ROOT / "demo.py").read_text()
    known_to_detectron2 = {"META_ARCHITECTURE", "ASPECT_RATIO_GROUPING", "WARMUP_ITERS", "ENABLED"}
    own = (PACKAGE / "config.py").read_text().split("def setup_cfg")[1]
    for key, *_ in config_keys():
        last = key.split(".")[-1]
        assert last in known_to_detectron2 or re.search(rf"\b{last}\b", sources + own), f"{key} is read nowhere"


def test_the_tree_on_paper_is_the_tree():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in FILES:
        if path.name != "__init__.py":
            assert re.search(rf"[├└]── {path.name} ", page), f"{path.name} is missing in docs/architecture.md"
    for name in re.findall(r"── (\w+\.py) ", page):
        assert any(path.name == name for path in FILES), f"docs/architecture.md lists {name}, which does not exist"


def test_every_public_thing_has_a_docstring():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_no_block_of_lines_is_written_twice():
    """Eight or more equal lines in two places are one function that is missing."""
    window, seen = 8, {}
    for path in FILES:
        lines = [(i, " ".join(line.split())) for i, line in enumerate(path.read_text().splitlines(), 1)]
        # Signatures are not logic: a list of arguments may be the same in two classes of one role.
        argument = re.compile(r"self,|\*,|\w+: [\w\[\], |.]+( = [^(]*)?,|@\w+|(def __init__\()")
        lines = [(i, line) for i, line in lines if len(line) > 2 and line[0] != "#" and not argument.fullmatch(line)]
        for k in range(len(lines) - window + 1):
            block = tuple(line for _, line in lines[k : k + window])
            where = f"{path.name}:{lines[k][0]}"
            assert block not in seen, f"{where} repeats {seen[block]}"
            seen[block] = where
