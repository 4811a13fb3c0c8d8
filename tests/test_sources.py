import cv2
import numpy as np
import pytest
import torch
from naming import naming
from PIL import ExifTags, Image

from dn_detr_d2 import DatasetError, UserError
from dn_detr_d2.sources import Video, as_bgr, expand, find_images

RGB = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
BGR = np.ascontiguousarray(RGB[:, :, ::-1])


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.bmp", "sub/c.png", "sub/D.PNG", "d[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(RGB).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def names(found):
    return [path.name for path in found]


def test_files_folders_and_patterns(folder):
    assert names(find_images(folder)) == ["a.bmp", "b.png", "d[1].png"]
    assert names(find_images(str(folder / "b.png"))) == ["b.png"]
    assert names(find_images(folder / "*.p?g")) == ["b.png", "d[1].png"]
    assert names(find_images(folder / "**" / "*")) == ["a.bmp", "b.png", "d[1].png", "D.PNG", "c.png"]
    assert names(find_images(folder / "d[1].png")) == ["d[1].png"]  # a file of that name comes first
    assert names(find_images(folder / "notes.txt")) == ["notes.txt"]  # what is named is read, or fails by name


@pytest.mark.parametrize("url", ["https://a.org/b.jpg", "s3://bucket/b.jpg", "file:///b.jpg"])
def test_a_url_is_refused(url):
    with pytest.raises(UserError, match=naming(url, "URL")):
        find_images(url)
    with pytest.raises(UserError, match=naming(url, "URL")):
        Video(url)


@pytest.mark.parametrize("name", ["gone.png", "*.xyz", "empty", "empty/**"])
def test_what_names_nothing_is_named(folder, name):
    (folder / "empty").mkdir()
    with pytest.raises(DatasetError, match=naming(str(folder / name))):
        find_images(folder / name)


def test_every_kind_of_image_has_the_same_pixels(folder):
    tensor = torch.from_numpy(BGR).permute(2, 0, 1)
    for image in (BGR, tensor, Image.fromarray(RGB), folder / "b.png", str(folder / "a.bmp")):
        assert np.array_equal(as_bgr(image), BGR)
    assert np.array_equal(as_bgr(RGB, rgb=True), BGR)
    assert np.array_equal(as_bgr(tensor.flip(0), rgb=True), BGR)
    assert np.array_equal(as_bgr(Image.fromarray(RGB), rgb=True), BGR)  # it knows its order


def test_pil_images_are_turned_and_coloured(tmp_path):
    grey = Image.fromarray(RGB[:, :, 0])
    assert np.array_equal(as_bgr(grey), np.repeat(RGB[:, :, :1], 3, 2))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # shown a quarter turn clockwise
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert np.array_equal(as_bgr(image), np.rot90(BGR, -1))
    assert np.array_equal(as_bgr(tmp_path / "turned.png"), np.rot90(BGR, -1))


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (None, ["NoneType", "cv2.imread"]),
        (3, ["int"]),
        (RGB / 255, ["float64", "(20, 30, 3)"]),
        (RGB[:, :, 0], ["(20, 30)"]),
        (torch.zeros(20, 30, 3, dtype=torch.uint8), ["(20, 30, 3)"]),
        (torch.zeros(3, 20, 30), ["torch.float32"]),
        (torch.zeros(3, 20, 0, dtype=torch.uint8), ["(3, 20, 0)"]),
    ],
)
def test_what_is_no_image_is_refused_with_its_form(image, named):
    with pytest.raises(UserError, match=naming("BGR", *named)):
        as_bgr(image)


def test_a_folder_is_not_one_image(folder):
    with pytest.raises(UserError, match=naming("predict()")):
        as_bgr(folder)


def test_sources_are_flat_and_iterators_lazy(folder):
    assert names(expand([folder, folder / "sub" / "*.png"])) == ["a.bmp", "b.png", "d[1].png", "c.png"]
    assert len(list(expand(BGR))) == 1
    assert len(list(expand(torch.from_numpy(BGR)))) == 1
    assert len(list(expand([BGR, [Image.fromarray(RGB), BGR]]))) == 3
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield BGR

    stream = iter(expand(endless()))
    next(stream)
    next(stream)
    assert taken == [0, 1]


def test_a_video_is_read_frame_by_frame(tmp_path):
    path = str(tmp_path / "a.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 12.5, (32, 24))
    for level in (10, 120, 230):
        writer.write(np.full((24, 32, 3), level, np.uint8))
    writer.release()
    with Video(path) as video:
        assert (video.frame_rate, video.expected) == (12.5, 3)
        assert [round(frame.mean()) for frame in video] == pytest.approx([10, 120, 230], abs=3)
        assert video.read == 3


def test_what_is_no_video_is_named(folder, capfd):
    for name in ("notes.txt", "gone.mp4", "sub"):
        with pytest.raises(DatasetError, match=naming(name)):
            Video(folder / name)
    with pytest.raises(DatasetError, match=naming(97)):
        Video(97)  # the number of a camera


def test_hidden_files_are_no_images_of_a_folder(folder):
    """macOS writes ._b.png beside b.png on foreign disks."""
    (folder / "._b.png").write_bytes(b"resource fork")
    assert names(find_images(folder)) == ["a.bmp", "b.png", "d[1].png"]
    assert names(find_images(folder / "._b.png")) == ["._b.png"]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pil_images_are_refused_where_files_are(mode, tmp_path):
    """Conversion to colours would make nearly all of them white."""
    ramp = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    image = Image.fromarray(ramp if mode == "I;16" else ramp.astype(np.int32 if mode == "I" else np.float32))
    assert image.mode == mode
    with pytest.raises(DatasetError, match=naming("8 bits", mode)):
        as_bgr(image)


def test_pil_images_that_cannot_be_decoded_or_are_empty_are_named(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "half.png") as image, pytest.raises(DatasetError, match=naming("half.png")):
        as_bgr(image)
    with pytest.raises(UserError, match=naming("H, W > 0", "(0, 5)")):
        as_bgr(Image.new("RGB", (0, 5)))


def test_a_pil_image_may_be_larger_than_a_file(monkeypatch):
    """Its pixels are in memory already, or the caller has opened it knowing what it is."""
    monkeypatch.setattr("dn_detr_d2.data.images.MAX_PIXELS", 100)
    assert as_bgr(Image.fromarray(RGB)).shape == (20, 30, 3)
