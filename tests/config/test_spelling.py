"""Misspelt keys: each is refused, and what is suggested is as near as any key."""

import random
import string

import pytest
from detectron2.config import get_cfg

from dn_detr_d2 import ConfigError, add_dn_detr_config, setup_cfg
from dn_detr_d2.config.ranges import flatten
from dn_detr_d2.config.spelling import names, nearest_key

COMPLETE = get_cfg()
add_dn_detr_config(COMPLETE)
KEYS = [key for key, _ in flatten(COMPLETE)]
NODES = sorted({key.rsplit(".", n)[0] for key in KEYS for n in range(1, key.count(".") + 1)})
KNOWN = {*KEYS, *NODES}


def without_a_letter(key):
    return {key[:i] + key[i + 1 :] for i in range(len(key))}


def exchanged(key):
    return {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}


def some_of(edit):
    """A function that gives two edits of a key that are chosen by the key."""

    def chosen(key):
        found = sorted(edit(key) - KNOWN)
        return random.Random(key).sample(found, min(2, len(found)))

    chosen.__name__ = f"some_{edit.__name__}"
    return chosen


def other_letters(key):
    """Four random letters changed or added, the same in every run."""
    chance = random.Random(key)
    for i in chance.choices(range(len(key)), k=4):
        letter = chance.choice(string.ascii_uppercase + "_0")
        yield key[:i] + letter + key[i + chance.randrange(2) :]


def one_edit_apart(a, b):
    changed = len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1
    return changed or a in without_a_letter(b) or b in without_a_letter(a) or a in exchanged(b)


def distance(a, b):
    """Edits between two words by the table of all their beginnings (optimal string alignment)."""
    table = {(i, j): i + j for i in range(len(a) + 1) for j in range(len(b) + 1) if i * j == 0}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            steps = [table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1])]
            if i > 1 and j > 1 and a[i - 2 : i] == b[j - 1] + b[j - 2]:
                steps.append(table[i - 2, j - 2] + 1)
            table[i, j] = min(steps)
    return table[len(a), len(b)]


@pytest.fixture
def quick_start(monkeypatch):
    """One config for all attempts; a key that is refused leaves it as it was."""
    monkeypatch.setattr("dn_detr_d2.config.loading.get_cfg", lambda: COMPLETE)
    monkeypatch.setattr("dn_detr_d2.config.loading.add_dn_detr_config", lambda cfg: None)


def suggestion(*arguments):
    with pytest.raises(ConfigError) as caught:
        setup_cfg(*arguments)
    return str(caught.value).rpartition("; did you mean ")[2].removesuffix("?")


@pytest.mark.parametrize("edit", [
    some_of(without_a_letter), some_of(exchanged), other_letters,
    pytest.param(without_a_letter, marks=pytest.mark.long), pytest.param(exchanged, marks=pytest.mark.long),
])  # fmt: skip
def test_every_key_with_one_wrong_letter_is_refused_and_a_nearest_named(quick_start, edit):
    typos = {typo for key in KEYS for typo in edit(key)} - KNOWN
    assert len(typos) > len(KEYS)
    for typo in sorted(typos):
        near = suggestion("", [typo, "1"])
        assert near in KNOWN, typo
        assert one_edit_apart(typo, near), (typo, near)


def test_every_node_of_a_file_with_one_wrong_letter_is_refused_and_a_nearest_named(quick_start, monkeypatch):
    for node in NODES:
        above, dot, name = node.rpartition(".")
        for typo in sorted(without_a_letter(name) | exchanged(name)):
            if (wrong := above + dot + typo) in KNOWN or not typo:
                continue
            content = {"KEY": 1}
            for part in reversed(wrong.split(".")):
                content = {part: content}
            monkeypatch.setattr("dn_detr_d2.config.loading.read_config_file", lambda path, content=content: content)
            near = suggestion("x.yaml")
            assert near in KNOWN, wrong
            assert one_edit_apart(wrong, near), (wrong, near)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_suggested_for_several_wrong_letters_is_as_near_as_any_key(seed):
    chance = random.Random(seed)
    wrong = chance.choice([key for key in KEYS if key.count(".") > 1])
    for _ in range(1 + seed):
        wrong = chance.choice(sorted(other_letters(wrong)))
    fewest = min(distance(wrong, key) for key in KNOWN)
    near = nearest_key(wrong, list(names(COMPLETE)))
    assert near is None or distance(wrong, near) == fewest


def test_a_misspelt_node_of_a_file_on_disk(tmp_path):
    (tmp_path / "x.yaml").write_text("MODEL:\n  DN_DERT:\n    NECK:\n      NORM: GN\n")
    assert suggestion(str(tmp_path / "x.yaml")) == "MODEL.DN_DETR"
    (tmp_path / "x.yaml").write_text("SOLVR: {BASE_LR: 0.1}\n")
    assert suggestion(str(tmp_path / "x.yaml")) == "SOLVER"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("SOLVR", "SOLVER"),
        ("MODEL.DN_DERT", "MODEL.DN_DETR"),
        ("MODEL.DN_DERT.NECK.NORM", "MODEL.DN_DETR.NECK.NORM"),
        ("SOLVERBASE_LR", "SOLVER.BASE_LR"),
        ("SOLVER.MAXITERS", "SOLVER.MAX_ITER"),
        ("DN_DETR", "MODEL.DN_DETR"),
        ("MODEL.NUM_QUERIES", "MODEL.DN_DETR.NUM_QUERIES"),
        ("NORM", None),  # of several nodes
        ("SOLVER.LR", None),
        ("SOLVER.FOO", None),
        ("INPUT.MIN_SIZE", None),
        ("", None),
        ("NOTHING.LIKE.IT", None),
    ],
)
def test_suggestions(wrong, meant):
    assert nearest_key(wrong, list(names(COMPLETE))) == meant
