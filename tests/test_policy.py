"""Laws of the house that a machine can read: doors, config keys, devices, and the tree on paper."""

import ast
import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / "dn_detr_d2"
FILES = sorted(PACKAGE.rglob("*.py"))
# What each room may import from this package, besides itself (docs/architecture.md).
GROUND = {"structures", "boxes", "errors", "coco", "utils", "command_line"}
DOORS = {
    "structures": {"boxes", "errors"},
    "boxes": set(),
    "errors": set(),
    "coco": set(),
    "utils": set(),
    "command_line": {"errors", "utils"},
    "layers": GROUND | {"_C"},  # the compiled operators
    "denoising": GROUND | {"losses"},
    "config": GROUND,
    "checkpoint": GROUND,
    "modeling": GROUND | {"layers", "losses", "denoising", "checkpoint"},
    "data": GROUND,
    "losses": GROUND,
    "evaluation": GROUND | {"data"},
    "export": GROUND,
    "diagnostics": GROUND | {"data", "denoising", "losses", "modeling", "export"},
    "engine": GROUND | {"config", "data", "checkpoint", "diagnostics", "evaluation"},
    "visualization": GROUND | {"data", "layers", "modeling", "engine"},
    "predictor": GROUND | {"data", "checkpoint"},
    "model_zoo": GROUND | {"config", "engine"},
    "doctor": GROUND | {"layers", "checkpoint", "data", "engine", "__version__"},
}
# Which parts of detectron2 each room may know.
DETECTRON2 = {
    "modeling": {"config", "layers", "modeling", "structures", "utils"},
    "coco": {"data"},  # names of the classes
    "data": {"config", "data", "structures", "utils"},
    "evaluation": {"data", "evaluation", "structures", "utils"},
    "diagnostics": {"engine", "modeling", "structures", "utils"},
    "visualization": {"data", "structures"},
    "config": {"config"},
    "checkpoint": {"checkpoint", "utils"},
    "engine": {"config", "engine", "evaluation", "modeling", "solver", "utils"},
    "predictor": {"engine"},
    "model_zoo": {"config"},
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
PROGRAMS = [path for folder in ("tools", "dev") for path in (ROOT / folder).rglob("*.py")]
CODE = sorted([*FILES, *PROGRAMS, *ROOT.glob("*.py")])
AUDITED = {
    PACKAGE / "checkpoint" / "reader.py": {"import pickle"},
    ROOT / "dev" / "benchmark" / "on_cuda.py": {"a device by name"},  # times CUDA kernels
}
RUNS_CONTENT = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
CALLS |= {"yaml.load", "yaml.full_load", "yaml.load_all", "yaml.full_load_all", "runpy.run_path", "torch.hub.load"}
LAST_NAMES = {"unsafe_load", "unsafe_load_all", "read_pickle"}
# The only value that each of these may have, written out: what a variable holds cannot be read here.
KEYWORDS = {"weights_only": True, "shell": False, "allow_pickle": False, "allow_unsafe": False}
TORCH_LOAD = {"torch.load", "torch.serialization.load"}


def origins(tree):
    """{name in the file: what it was imported as}; a relative import begins with a dot."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.asname: name.name for name in node.names if name.asname}
            found |= {name.name.split(".")[0]: name.name.split(".")[0] for name in node.names if not name.asname}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {name.asname or name.name: f"{module}.{name.name}" for name in node.names}
    return found


def offences(text):
    """What the code says that a file may make it run, or that pins a device; comments and strings do not count."""
    tree = ast.parse(text)
    known = origins(tree)

    def full_name(node):
        first, dot, rest = ast.unparse(node).partition(".")
        return (known.get(first, first) + dot + rest).removeprefix("builtins.").removeprefix("__builtins__.")

    safe_loads = set()
    for node in ast.walk(tree):  # a call comes before its parts
        if isinstance(node, ast.Import | ast.ImportFrom):
            above = f"{node.module}." if isinstance(node, ast.ImportFrom) and not node.level else ""
            names = [] if getattr(node, "level", 0) else [(above + name.name).split(".")[0] for name in node.names]
            yield from (f"import {name}" for name in names if name in RUNS_CONTENT)
        elif isinstance(node, ast.Attribute | ast.Name):
            called = full_name(node)
            if called in CALLS or called.split(".")[-1] in LAST_NAMES:
                yield called
            if called in TORCH_LOAD and node not in safe_loads:
                yield "torch.load without weights_only=True"
        elif isinstance(node, ast.Call):
            given = {word.arg: word.value for word in node.keywords}
            if getattr(given.get("weights_only"), "value", None) is True:
                safe_loads.add(node.func)
            yield from offences_of_call(full_name(node.func), node, given)


def offences_of_call(called, node, given):
    """What is wrong with the arguments of one call, ``given`` those with a name."""
    for key, value in given.items():
        if key in KEYWORDS and getattr(value, "value", None) is not KEYWORDS[key]:
            yield f"{key}={ast.unparse(value)}"
    if called in ("numpy.load", "np.load") and len(node.args) > 2:
        yield "allow_pickle by its place"
    first = getattr(node.args[0], "value", None) if node.args else None
    if called == "importlib.import_module" and str(first).split(".")[0] in RUNS_CONTENT:
        yield f"import {first}"
    last = called.split(".")[-1]
    if last == "cuda" and isinstance(node.func, ast.Attribute):
        yield ".cuda()"
    places = [*node.args, given.get("device")] if last == "to" else [given.get("device")]
    if any(pinned(place) for place in [*places, node if called == "torch.device" else None]):
        yield "a device by name"


def pinned(node):
    """Whether an argument begins with the name of a GPU, also as ``torch.device("cuda")`` or an f-string."""
    if isinstance(node, ast.Call) and node.args:
        node = node.args[0]
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return isinstance(node, ast.Constant) and str(node.value).startswith("cuda")


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
        ("from torch import load\nload(f)", "torch.load without weights_only=True"),
        ("from torch import load as read\nread(f, weights_only=True)", None),
        ("import torch as t\nt.load(x)", "torch.load without weights_only=True"),
        ("import torch as t\nlist(map(t.load, files))", "torch.load without weights_only=True"),
        ("def f():\n    load(x)\nfrom torch import load", "torch.load without weights_only=True"),
        ("import torch.serialization as s\ns.load(x)", "torch.load without weights_only=True"),
        ("torch.load(f, weights_only=safe)", "weights_only=safe"),
        ("torch.load(f, **options)", "torch.load without weights_only=True"),
        ("import torch\ntorch.hub.load(x, y)", "torch.hub.load"),
        ("from .files import load\nload(f)", None),
        ("from .code import a", None),
        ("import builtins\nbuiltins.eval(x)", "eval"),
        ("import builtins as b\nb.exec(x)", "exec"),
        ("from builtins import eval as e\ne(x)", "eval"),
        ("import subprocess\nsubprocess.getoutput(x)", "subprocess.getoutput"),
        ("from subprocess import getstatusoutput as g\ng(x)", "subprocess.getstatusoutput"),
        ("import os.path\nos.system(x)", "os.system"),
        ("__import__('pickle').loads(x)", "__import__"),
        ("import importlib\nimportlib.import_module('pickle')", "import pickle"),
        ("from importlib import import_module as i\ni('detectron2.config')", None),
        ("np.load(f, allow_pickle=flag)", "allow_pickle=flag"),
        ("np.load(f, allow_pickle=1)", "allow_pickle=1"),
        ("import numpy\nnumpy.load(f, None, True)", "allow_pickle by its place"),
        ("np.load(f, allow_pickle=False)", None),
        ("subprocess.run(x, shell=flag)", "shell=flag"),
        ("import pandas as pd\npd.read_pickle(f)", "pandas.read_pickle"),
        ("x.to('cuda')", "a device by name"),
        ("x.to(device='cuda:0')", "a device by name"),
        ("x.to(f'cuda:{i}')", "a device by name"),
        ("x.to(torch.device('cuda', 0))", "a device by name"),
        ("torch.zeros(3, device='cuda')", "a device by name"),
        ("from torch import device as d\nhere = d('cuda')", "a device by name"),
        ("torch.device(cfg.MODEL.DEVICE)", None),
        ("x.to(y.device).to(cfg.MODEL.DEVICE)", None),
        ("torch.device(x).type == 'cuda'", None),
        ("model.cuda()", ".cuda()"),
        ("model.eval()  # eval(x), pickle.load(f)", None),
        ('"""os.system(x)"""\ntorch.load(f, weights_only=True)', None),
    ],
)
def test_a_planted_offender_is_found_and_a_comment_is_none(text, found):
    assert (set(offences(text)) == set()) if found is None else (found in set(offences(text)))


def config_keys():
    """(line, key, lines before it) of every assignment to cfg.* or node.* in add_dn_detr_config."""
    lines = (PACKAGE / "config" / "keys.py").read_text().splitlines()
    for i in range(len(lines)):
        if match := re.match(r"    (?:cfg|node)\.([A-Z0-9_.]+) = (?!CfgNode)", lines[i]):
            yield match[1], lines, i


def test_every_config_key_has_a_comment():
    for key, lines, i in config_keys():
        while not lines[i].strip().startswith("#"):
            assert lines[i].strip(), f"{key} stands without a comment"
            i -= 1  # keys that follow one another may share a comment


def test_every_config_key_is_read_somewhere():
    declared = PACKAGE / "config" / "keys.py"
    sources = "\n".join(f.read_text() for f in FILES if f != declared) + (ROOT / "demo.py").read_text()
    known_to_detectron2 = {"META_ARCHITECTURE", "ASPECT_RATIO_GROUPING", "WARMUP_ITERS", "ENABLED"}
    for key, *_ in config_keys():
        last = key.split(".")[-1]
        assert last in known_to_detectron2 or re.search(rf"\b{last}\b", sources), f"{key} is read nowhere"


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
