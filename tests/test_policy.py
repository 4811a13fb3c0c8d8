"""Rules that a machine can check: imports, code that runs what a file says, devices, config keys, and the tree on paper."""

import ast
import json
import re
import shutil
import subprocess
import sys

import grimp
import pytest
from conftest import ROOT
from detectron2.config import get_cfg
from importlinter.api import read_configuration
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.layers import LayersContract

from dn_detr_d2 import add_dn_detr_config
from dn_detr_d2.config.ranges import flatten

PACKAGE = ROOT / "dn_detr_d2"
FILES = sorted(PACKAGE.rglob("*.py"))
CONTRACTS = read_configuration(str(ROOT / "pyproject.toml"))
KINDS = {"layers": LayersContract, "forbidden": ForbiddenContract}


@pytest.fixture(scope="module")
def import_graph():
    return grimp.build_graph("dn_detr_d2", include_external_packages=True, cache_dir=None)


def is_kept(options, graph):
    """Whether a contract of pyproject.toml holds in an import graph."""
    contract = KINDS[options["type"]](options["name"], CONTRACTS["session_options"], options)
    return contract.check(graph, verbose=False).kept


def named(options):
    return options["name"]


@pytest.mark.parametrize("options", CONTRACTS["contracts_options"], ids=named)
def test_import_contracts(options, import_graph):
    assert is_kept(options, import_graph), (
        "python -m importlinter.cli says which import breaks it, also as lint-imports"
    )


def planted(options):
    """An import that a contract must forbid: (importer, imported)."""
    if options["type"] == "forbidden":
        return sorted(options["source_modules"])[0], sorted(options["forbidden_modules"])[0]
    lowest, highest = options["layers"][-1].split(" | "), options["layers"][0].split(" | ")
    return f"dn_detr_d2.{lowest[0]}", f"dn_detr_d2.{highest[0]}"


@pytest.mark.parametrize("options", CONTRACTS["contracts_options"], ids=named)
def test_a_planted_import_breaks_its_contract(options, import_graph):
    graph = grimp.build_graph("dn_detr_d2", include_external_packages=True, cache_dir=None)
    importer, imported = planted(options)
    graph.add_import(importer=importer, imported=imported)
    assert not is_kept(options, graph)


@pytest.mark.parametrize(("importer", "imported"), [("layers", "denoising"), ("errors", "boxes"), ("data", "modeling")])
def test_neighbours_of_one_layer_do_not_import_each_other(importer, imported):
    graph = grimp.build_graph("dn_detr_d2", include_external_packages=True, cache_dir=None)
    graph.add_import(importer=f"dn_detr_d2.{importer}", imported=f"dn_detr_d2.{imported}")
    assert not is_kept(CONTRACTS["contracts_options"][0], graph)


def test_a_new_part_of_the_package_must_get_a_layer():
    graph = grimp.build_graph("dn_detr_d2", include_external_packages=True, cache_dir=None)
    graph.add_module("dn_detr_d2.imaginary")
    assert not is_kept(CONTRACTS["contracts_options"][0], graph)


# Which parts of detectron2 each part of the package may import; import-linter sees other packages as a whole only.
DETECTRON2 = {
    "modeling": {"config", "layers", "modeling", "structures", "utils"},
    "coco": {"data"},  # names of the classes
    "data": {"config", "data", "projects", "structures", "utils"},  # of the projects PointRend's changes of colours
    "evaluation": {"data", "evaluation", "structures", "utils"},
    "diagnostics": {"engine", "modeling", "structures", "utils"},
    "visualization": {"data", "structures", "utils"},
    "config": {"config"},
    "checkpoint": {"checkpoint", "utils"},
    "engine": {"config", "engine", "evaluation", "modeling", "solver", "structures", "utils"},
    "model_zoo": {"config"},
    "predictor": {"engine", "structures"},
    "sources": {"data"},
    "inference": {"structures"},
    "tiling": {"layers", "structures"},
    "doctor": {"config", "data", "modeling", "structures"},
    "export": {"config", "structures"},
    "commands": {"engine", "evaluation", "modeling", "structures", "utils"},
    "report": {"utils"},
}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(package, first part below it) of every absolute import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((*name.name.split("."), "")[:2] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            package, _, below = node.module.partition(".")
            yield from ((package, below.split(".")[0] or name.name) for name in node.names)


def test_imports_are_found_in_every_form(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import a.b.c\nfrom a import d\nfrom a.e.f import g\nfrom . import h\ndef f():\n    import i\n")
    assert list(imports(file)) == [("a", "b"), ("a", "d"), ("a", "e"), ("i", "")]


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py" or f.parent != PACKAGE], ids=str)
def test_imports_of_detectron2(path):
    for package, part in imports(path):
        if package == "detectron2":
            assert part in DETECTRON2.get(part_of(path), set()), f"{path} imports detectron2.{part}"


# Code that could run what a file says, or name a device. Ruff's rules find the imports and calls that pyproject.toml
# lists; what depends on arguments, and builtins that are passed on, is found here.
PROGRAMS = [path for folder in ("tools", "dev") for path in (ROOT / folder).rglob("*.py")]
CODE = sorted([*FILES, *PROGRAMS, *ROOT.glob("*.py")])
AUDITED = {ROOT / "dev" / "benchmark" / "on_cuda.py": {"a device by name"}}  # times CUDA kernels
BUILTINS = {"eval", "exec", "__import__"}
RUNS_CONTENT = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code"}
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
        if isinstance(node, ast.Attribute | ast.Name):
            name = full_name(node)
            if name in BUILTINS:
                yield name
            if name in TORCH_LOAD and node not in safe_loads:
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


def ruff(*paths):
    """{file: codes of ruff's rules against running content that it breaks}, as pyproject.toml selects them."""
    config = ["--config", str(ROOT / "pyproject.toml"), "--output-format", "json", "--no-cache"]
    command = [sys.executable, "-m", "ruff", "check", *config, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    broken = {}
    for entry in json.loads(done.stdout):
        if re.match(r"S\d|TID", entry["code"]):
            broken.setdefault(entry["filename"], set()).add(entry["code"])
    return broken


def test_ruff_finds_nothing_that_runs_content():
    assert ruff(*CODE) == {}


def test_only_the_reader_of_checkpoints_imports_pickle(tmp_path):
    shutil.copy(PACKAGE / "checkpoint" / "reader.py", tmp_path / "elsewhere.py")  # where its exception does not hold
    assert ruff(tmp_path / "elsewhere.py") == {str(tmp_path / "elsewhere.py"): {"TID251"}}


PLANTED = [
    ("import pickle\npickle.load(f)", "S301"),
    ("from pickle import loads as read\nread(f)", "S301"),
    ("def f():\n    import dill", "TID251"),
    ("eval('1')", "S307"),
    ("list(map(exec, lines))", "exec"),
    ("import os\nos.system('ls')", "S605"),
    ("from os import system as go\ngo('ls')", "S605"),
    ("import os as o\no.popen('ls')", "S605"),
    ("import yaml\nyaml.load(f, yaml.SafeLoader)", "TID251"),
    ("from yaml import unsafe_load", "TID251"),
    ("from yaml import unsafe_load\nunsafe_load(f)", "TID251"),
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
    ("import torch\ntorch.hub.load(x, y)", "TID251"),
    ("from .files import load\nload(f)", None),
    ("from .code import a", None),
    ("import builtins\nbuiltins.eval(x)", "eval"),
    ("import builtins as b\nb.exec(x)", "exec"),
    ("from builtins import eval as e\ne(x)", "eval"),
    ("import subprocess\nsubprocess.getoutput(x)", "S605"),
    ("from subprocess import getstatusoutput as g\ng(x)", "S605"),
    ("import os.path\nos.system(x)", "S605"),
    ("__import__('pickle').loads(x)", "__import__"),
    ("import importlib\nimportlib.import_module('pickle')", "import pickle"),
    ("from importlib import import_module as i\ni('detectron2.config')", None),
    ("np.load(f, allow_pickle=flag)", "allow_pickle=flag"),
    ("np.load(f, allow_pickle=1)", "allow_pickle=1"),
    ("import numpy\nnumpy.load(f, None, True)", "allow_pickle by its place"),
    ("np.load(f, allow_pickle=False)", None),
    ("subprocess.run(x, shell=flag)", "shell=flag"),
    ("import pandas as pd\npd.read_pickle(f)", "S301"),
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
    # passed on instead of called
    ("import os\nlist(map(os.system, lines))", "TID251"),
    ("import torch\nread = torch.hub.load", "TID251"),
    ("import marshal", "TID251"),
]


@pytest.fixture(scope="module")
def ruff_on_planted(tmp_path_factory):
    """What ruff finds in each of PLANTED, in one run."""
    folder = tmp_path_factory.mktemp("planted")
    files = [folder / f"case_{i}.py" for i in range(len(PLANTED))]
    for file, (text, _) in zip(files, PLANTED, strict=True):
        file.write_text(f"{text}\n")
    broken = ruff(folder)
    return [broken.get(str(file), set()) for file in files]


@pytest.mark.parametrize("number", range(len(PLANTED)))
def test_a_planted_offender_is_found_and_a_comment_is_none(ruff_on_planted, number):
    text, expected = PLANTED[number]
    found = {*offences(text), *ruff_on_planted[number]}
    assert found == set() if expected is None else expected in found, text


def own_keys():
    """Every key that this project adds to Detectron2's."""
    with_ours = get_cfg()
    add_dn_detr_config(with_ours)
    return {key for key, _ in flatten(with_ours)} - {key for key, _ in flatten(get_cfg())}


def config_keys():
    """(line, key, lines before it) of every assignment to cfg.* or node.* in add_dn_detr_config."""
    lines = (PACKAGE / "config" / "keys.py").read_text(encoding="utf-8").splitlines()
    for i in range(len(lines)):
        if match := re.match(r"    (?:cfg|node)\.([A-Z0-9_.]+) = (?!CfgNode)", lines[i]):
            yield match[1], lines, i


def test_the_assignments_are_the_keys():
    """But for those of nodes that are made in one line; or the test below would look at none."""
    found = {key for key, *_ in config_keys()}
    in_one_line = ("MODEL.SWIN.", "MODEL.TIMM.", "MODEL.VIT.")
    single = {key for key in own_keys() if not key.startswith(in_one_line)}
    assert len(single) > 100
    assert {key for key in single if not any(f".{key}".endswith(f".{end}") for end in found)} == set()


def test_every_config_key_has_a_comment():
    for key, lines, i in config_keys():
        while not lines[i].strip().startswith("#"):
            assert lines[i].strip(), f"{key} stands without a comment"
            i -= 1  # keys that follow one another may share a comment


# Keys that are not read as attributes: their names are put together, or tables name them.
READ_BY_NAME = {"COCO_JSON", "COCO_PANOPTIC", "SEM_SEG", "BACKBONE_MULTIPLIER", "SAMPLING_MULTIPLIER"}


def test_every_config_key_is_read_somewhere():
    """As an attribute, not in a text; a name that several nodes have, below the right node where that can be seen."""
    declared = PACKAGE / "config" / "keys.py"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES if path != declared]
    attributes = {x.attr for tree in trees for x in ast.walk(tree) if isinstance(x, ast.Attribute)}
    strings = {
        x.value
        for tree in trees
        for x in ast.walk(tree)
        if isinstance(x, ast.Constant) and isinstance(x.value, str) and x.value in READ_BY_NAME
    }
    names = {key.rsplit(".", 1)[-1] for key in own_keys()}
    assert names - attributes - READ_BY_NAME == set()
    assert attributes | strings >= READ_BY_NAME


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
