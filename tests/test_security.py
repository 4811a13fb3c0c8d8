"""Hostile files of every kind: nothing is executed, nothing outside the folder is shown, each ends soon in one sentence."""

import codecs
import contextlib
import itertools
import json
import os
import pickle
import signal
import struct
import time
import zipfile
from contextlib import contextmanager

import pytest
import torch
from naming import naming
from PIL import Image

from dn_detr_d2 import CheckpointError, UserError, setup_cfg
from dn_detr_d2.checkpoint import pointed_checkpoint, read_checkpoint
from dn_detr_d2.checkpoint.resume import find_resumable
from dn_detr_d2.data import load_coco_json, read_image
from dn_detr_d2.data.images import image_size

SECRET = "canary-5e1f"
LONGEST = 5.0  # seconds of computing
PATIENCE = 60.0  # seconds on the clock: waiting for a pipe computes nothing, and other programs may be busy


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.made_of = function, arguments

    def __reduce__(self):
        return self.made_of


def pickled(make):
    def write(folder, canary):
        (folder / "x.pkl").write_bytes(pickle.dumps(make(canary), protocol=2))
        return lambda: read_checkpoint(folder / "x.pkl")

    return write


def saved(make):
    def write(folder, canary):
        torch.save(make(canary), folder / "x.pth")
        return lambda: read_checkpoint(folder / "x.pth")

    return write


def raw(name, content):
    def write(folder, canary):
        (folder / name).write_bytes(content)
        return lambda: read_checkpoint(folder / name)

    return write


def unzipped(make):
    """A pickle under the name of a ZIP archive, as PyTorch wrote it once."""

    def write(folder, canary):
        (folder / "x.pth").write_bytes(pickle.dumps(make(canary), protocol=2))
        return lambda: read_checkpoint(folder / "x.pth")

    return write


BAITS = itertools.count()  # a module that has been imported is not executed again


def module(folder, canary):
    """A pickle that imports a module, which lies ready."""
    name = f"bait_{os.getpid()}_{next(BAITS)}"
    (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\ndef fly(): pass\n")
    return raw("x.pkl", f"c{name}\nfly\n.".encode())(folder, canary)


def codec(folder, canary):
    """A pickle that encodes; whoever looks the codec up touches the canary, see ``_searching``."""
    return raw("x.pkl", b"c_codecs\nencode\n(V1\nVbait\ntR.")(folder, canary)


def archive(folder, canary):
    with zipfile.ZipFile(folder / "x.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(200_000_000))
    return lambda: read_checkpoint(folder / "x.pth")


def resumed(write):
    """The same file as the last checkpoint of a training."""

    def write_both(folder, canary):
        write(folder, canary)
        (folder / "x.pth").rename(folder / "model_0000009.pth")
        (folder / "last_checkpoint").write_text("model_0000009.pth")
        return lambda: find_resumable(folder)

    return write_both


def state_of_training(**changes):
    step = {"iteration": 9, "optimizer": {"state": {}, "param_groups": []}}
    return {"model": {"a": torch.ones(1)}, "trainer": {"iteration": 9, "_trainer": step}, **changes}


def holds_itself():
    state = state_of_training()
    state["model"]["a"] = [state]
    return state


REPEATED = torch.ones(1).expand(10**6, 10**6)
SPARSE = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**6))


def config(text):
    def write(folder, canary):
        (folder / "bad.yaml").write_text(text.replace("CANARY", str(canary)))
        (folder / "x.yaml").write_text("_BASE_: bad.yaml\n")
        return lambda: setup_cfg(str(folder / "x.yaml"), splits=())

    return write


def pointer(name):
    def write(folder, canary):
        (folder.parent / "secret.pth").write_text(SECRET)
        (folder / "link.pth").symlink_to(folder.parent / "secret.pth")
        if name is None:
            (folder / "last_checkpoint").symlink_to(folder.parent / "secret.pth")
        else:
            (folder / "last_checkpoint").write_bytes(name)
        return lambda: pointed_checkpoint(folder)

    return write


def annotations(file_name):
    def write(folder, canary):
        Image.new("RGB", (4, 4)).save(folder.parent / "outside.png")
        (folder / "link.png").symlink_to(folder.parent / "outside.png")
        named = file_name.replace("ROOT", str(folder.parent))
        content = {"images": [{"id": 1, "file_name": named}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
        (folder / "x.json").write_text(json.dumps(content))
        return lambda: load_coco_json(folder / "x.json", folder)

    return write


def json_text(text):
    def write(folder, canary):
        (folder / "x.json").write_text(text)
        return lambda: load_coco_json(folder / "x.json", folder)

    return write


def image(content):
    def write(folder, canary):
        (folder / "x.jpg").write_bytes(content)
        return lambda: read_image(str(folder / "x.jpg"), "RGB")

    return write


def pipe(name, read):
    """A named pipe that nobody writes into; who opens it as a file waits for ever."""

    def write(folder, canary):
        os.mkfifo(folder / name)
        return lambda: read(folder)

    return write


def annotated_pipe(folder):
    content = {"images": [{"id": 1, "file_name": "x.png"}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (folder / "x.json").write_text(json.dumps(content))
    return load_coco_json(folder / "x.json", folder)


def based_on_a_pipe(folder):
    (folder / "x.yaml").write_text("_BASE_: pipe.yaml\n")
    return setup_cfg(str(folder / "x.yaml"), splits=())


def pointed_at_a_pipe(folder):
    (folder / "last_checkpoint").write_text("x.pth")
    return read_checkpoint(pointed_checkpoint(folder))


def device(folder, canary):
    (folder / "x.png").symlink_to("/dev/zero")
    return lambda: read_image(str(folder / "x.png"), "RGB")


def header(text, length=None):
    return struct.pack("<Q", len(text) if length is None else length) + text


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
LYING = b'{"a": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4]}}'
HUGE_PNG = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0) + b"\x00" * 99
)
ARTEFACTS = {
    "pickle calls os.system": pickled(lambda c: {"model": Call(os.system, f"touch {c}")}),
    "pickle calls mkdir": pickled(lambda c: Call(os.mkdir, str(c))),
    "pickle calls eval": pickled(lambda c: Call(eval, f"open({str(c)!r}, 'w')")),
    "pickle calls open": pickled(lambda c: Call(open, str(c), "w")),
    "pickle inside a list": pickled(lambda c: {"model": [Call(os.mkdir, str(c))]}),
    "pickle names a codec": codec,
    "pickle imports a module": module,
    "pickle that is cut": raw("x.pkl", b"\x80\x02}q\x00X\x05\x00\x00\x00mo"),
    "pickle of a long string that is not there": raw("x.pkl", b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f"),
    "pickle without tensors": pickled(lambda c: {"model": {"a": 1}}),
    "pth calls os.system": saved(lambda c: {"model": {"a": torch.ones(1)}, "x": Call(os.system, f"touch {c}")}),
    "pth calls mkdir": saved(lambda c: Call(os.mkdir, str(c))),
    "pth calls eval": saved(lambda c: {"a": Call(eval, f"open({str(c)!r}, 'w')")}),
    "pth that is a plain pickle": unzipped(lambda c: Call(os.system, f"touch {c}")),
    "pth repeats one number": saved(lambda c: {"model": {"a": REPEATED}}),
    "pth is sparse": saved(lambda c: {"model": {"a": SPARSE}}),
    "pth that unpacks to much": archive,
    "pth that is cut": raw("x.pth", b"PK\x03\x04" + b"\x00" * 40),
    "resumed pth calls os.system": resumed(saved(lambda c: state_of_training(x=Call(os.system, f"touch {c}")))),
    "resumed pth that is a plain pickle": resumed(unzipped(lambda c: Call(os.system, f"touch {c}"))),
    "resumed pth repeats one number": resumed(saved(lambda c: state_of_training(model={"a": REPEATED}))),
    "resumed pth repeats one number elsewhere": resumed(saved(lambda c: state_of_training(other=[{"a": (REPEATED,)}]))),
    "resumed pth is sparse": resumed(saved(lambda c: state_of_training(model={"a": SPARSE}))),
    "resumed pth holds itself": resumed(saved(lambda c: holds_itself())),
    "resumed pth that unpacks to much": resumed(archive),
    "resumed pth without an iteration": resumed(saved(lambda c: state_of_training(trainer={"_trainer": {}}))),
    "safetensors with a header beyond its end": raw("x.safetensors", header(b"{}", 2**62)),
    "safetensors with a lying shape": raw("x.safetensors", header(LYING) + b"\x00" * 4),
    "safetensors with a deep header": raw("x.safetensors", header(b"[" * 100_000)),
    "safetensors without a header": raw("x.safetensors", b"\x00" * 4),
    "yaml calls mkdir": config("A: !!python/object/apply:os.mkdir ['CANARY']\n"),
    "yaml names a function": config("A: !!python/name:os.system\n"),
    "yaml makes an object": config("A: !!python/object/new:os.mkdir ['CANARY']\n"),
    "yaml with a base on the web": config("_BASE_: https://example.org/x.yaml\n"),
    "yaml with a Python base": config("_BASE_: x.py\n"),
    "yaml that is its own base": config("_BASE_: x.yaml\n"),
    "yaml that laughs": config(LAUGHS),
    "yaml that holds itself": config("A: &a [*a]\n"),
    "yaml nested deeply": config("A: " + "[" * 3000 + "]" * 3000),
    "yaml with a huge integer": config("SEED: 0x" + "f" * 5000),
    "yaml with a long integer": config("SEED: " + "9" * 5000),
    "yaml that is long": config("A: '" + "x" * 300_000 + "'"),
    "pointer above its folder": pointer(b"../secret.pth"),
    "pointer to an absolute path": pointer(b"/etc/passwd"),
    "pointer to a link": pointer(b"link.pth"),
    "pointer that is a link": pointer(None),
    "pointer that is long": pointer(b"x" * 10_000),
    "pointer that is not text": pointer(b"\xff\xfe\x00"),
    "pointer to its folder": pointer(b".."),
    "json nested deeply": json_text("[" * 200_000),
    "json with a long integer": json_text('{"images": ' + "9" * 5000 + "}"),
    "json path above the folder": annotations("../outside.png"),
    "json absolute path": annotations("ROOT/outside.png"),
    "json path through a link": annotations("link.png"),
    "EPS named jpg": image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
    "png of 3.6 gigapixels": image(HUGE_PNG),
    "image that is a pipe": pipe("x.png", lambda folder: read_image(str(folder / "x.png"), "RGB")),
    "image that is a pipe, measured": pipe("x.png", lambda folder: image_size(str(folder / "x.png"))),
    "image that is a device": device,
    "json with an image that is a pipe": pipe("x.png", annotated_pipe),
    "yaml with a base that is a pipe": pipe("pipe.yaml", based_on_a_pipe),
    "checkpoint that is a pipe": pipe("x.pth", lambda folder: read_checkpoint(folder / "x.pth")),
    "pointer that is a pipe": pipe("last_checkpoint", pointed_checkpoint),
    "pointer to a pipe": pipe("x.pth", pointed_at_a_pipe),
}


def test_the_corpus_has_forty_artefacts():
    assert len(ARTEFACTS) >= 40


@contextmanager
def patience(seconds):
    """Fails what has not ended in time on the clock, also where it waits for a file and computes nothing."""

    def ring(number, frame):
        pytest.fail(f"still not done after {seconds} s")  # no Exception: nobody takes it for a damaged file

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_waiting_for_a_pipe_is_noticed(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(pytest.fail.Exception, match="not done after"), patience(0.1):
        (tmp_path / "x").read_bytes()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder from which modules are imported, and the canary, which the codec "bait" touches."""
    folder, canary = tmp_path / "folder", tmp_path / "canary"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def search(name):
        if name == "bait":
            canary.touch()

    codecs.register(search)
    yield folder, canary
    codecs.unregister(search)


@pytest.mark.parametrize("write", ARTEFACTS.values(), ids=ARTEFACTS)
def test_a_hostile_file_ends_soon_in_one_sentence_and_runs_nothing(write, places, capfd):
    folder, canary = places
    opens = write(folder, canary)
    start = time.process_time()
    with pytest.raises(UserError) as caught, patience(PATIENCE):
        opens()
    assert time.process_time() - start < LONGEST
    assert not canary.exists()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert SECRET not in str(caught.value) + "".join(capfd.readouterr())


EXECUTABLE = [
    name
    for name in ARTEFACTS
    if any(word in name for word in (" calls ", "inside a list", "names a codec", "imports a", "plain pickle"))
    and not name.startswith("yaml")
]


@pytest.mark.parametrize("name", EXECUTABLE)
def test_the_corpus_is_armed(name, places):
    """A reader without care touches the canary."""
    folder, canary = places
    ARTEFACTS[name](folder, canary)
    path = next(path for path in folder.iterdir() if path.suffix in (".pkl", ".pth"))
    with contextlib.suppress(Exception):
        if zipfile.is_zipfile(path):
            torch.load(path, weights_only=False)
        else:
            pickle.loads(path.read_bytes())
    assert canary.exists()


def test_a_refusal_does_not_advise_to_read_the_file_unsafely(tmp_path):
    """PyTorch's own text recommends weights_only=False; what counts is the name that the file asks for."""

    class Call:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"model": Call()}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=naming("model.pth", "posix.system")) as caught:
        read_checkpoint(tmp_path / "model.pth")
    assert "weights_only" not in str(caught.value)
