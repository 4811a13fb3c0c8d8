"""Draws what a detector finds in images, folders, videos and before a camera.

    dn-detr predict --config-file output/quickstart/config.yaml --input a.jpg folder/ "more/*.png" --output out/ \\
        --confidence-threshold 0.5 --json MODEL.WEIGHTS output/quickstart/model_final.pth
    dn-detr predict --config-file ... --input large.jpg --tile 640 --output drawn.jpg MODEL.WEIGHTS ...
    dn-detr predict --config-file ... --video-input a.mp4 --track --json --output out/ MODEL.WEIGHTS ...
    dn-detr predict --config-file ... --webcam MODEL.WEIGHTS ...

A folder means all images in it. In an output folder a picture has the name of its image, .jpg for JPEG files and .png for
the others, a video ends in .mp4; without --output they are shown in a window, which Esc closes. --json adds results.json
with every box above the threshold, in pixels of the image or frame. Of a model with masks the pictures show the panoptic
segments if it gives them (MODEL.DN_DETR.MASK.OUTPUTS), else the masks, else the class of each pixel.

--known boxes.json tells the model of objects, and it looks for the others: a list like results.json, of
{"file_name": "a.jpg", "class": 0, "box_xyxy": [x0, y0, x1, y1]}, the class by number or name. --labels circle,triangle looks
for these classes alone. The model must be trained for it (docs/prompting.md).

Exit code: 0 = done, 1 = done but for the images or frames that are named, 2 = bad input.
"""

from ..utils import needs_detectron2  # noqa: F401

# isort: split
import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from detectron2.structures import Boxes, Instances

from ..checkpoint.checkpointer import classes_of_weights
from ..command_line import FAILED, add_overrides, make_parser, parse, run_command
from ..data import class_number, read_image
from ..data.label_files import SUFFIXES
from ..engine.setup import setup_cfg
from ..errors import ConfigError, DatasetError
from ..sources import Video, find_images, require_opencv
from ..visualization.demo import UNCONFIRMED, VisualizationDemo, class_name

PICTURES = {".jpg", ".jpeg", ".png"}
RESULTS = "results.json"
THRESHOLD = 0.5  # lowest score that is shown where none is given
ESCAPE = 27


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; detectron2's demo flags."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="YAML config, e.g. config.yaml of a training"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="images, folders of images, patterns such as 'a/*.png'"
    )
    source.add_argument("--video-input", metavar="FILE", help="a video that OpenCV reads")
    source.add_argument("--webcam", action="store_true", help="the first camera, until Esc or Ctrl-C")
    parser.add_argument(
        "--output", metavar="PATH", help="folder, made if need be, or the one picture or video; default: a window"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        help="lowest score to show, from 0 to 1 (default 0.5, of panoptic segments MASK.OBJECT_THRESHOLD of the config; the "
        "pixels of semantic maps have none)",
    )
    parser.add_argument("--json", action="store_true", help="also write results.json")
    parser.add_argument(
        "--tile", type=int, metavar="N", help="look at tiles of N x N pixels; the same as TEST.TILE.SIZE N at the end"
    )
    parser.add_argument("--track", action="store_true", help="number the objects of a video (package trackers)")
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--known", metavar="FILE", help="objects that need not be found, in the form of results.json")
    told.add_argument(
        "--labels", metavar="A,B", help="names or numbers of the classes to look for, with commas between"
    )
    add_overrides(parser)
    return parse(parser, argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ConfigError for values and combinations that cannot work."""
    if args.confidence_threshold is not None and not 0 <= args.confidence_threshold <= 1:  # also not a number
        raise ConfigError(f"--confidence-threshold must lie between 0 and 1, got {args.confidence_threshold:g}")
    if args.input and args.track:
        raise ConfigError("--track follows objects from frame to frame; give it --video-input or --webcam")
    if args.known and not args.input:
        raise ConfigError("--known names image files; give it --input, or leave it out")
    if args.json and args.output is None:
        raise ConfigError("--json writes results.json beside the pictures; name a folder with --output")
    cv2 = require_opencv("drawing")
    if args.output is None and (reason := no_window(cv2.getBuildInformation())):
        raise ConfigError(f"without --output pictures are shown in a window, but {reason}; name a folder with --output")


def no_window(build: str) -> str:
    """Why OpenCV, which describes itself as ``build``, cannot show a window here; "" where it can."""
    lines = [line.split(":")[1].split() for line in build.splitlines() if line.strip().startswith("GUI:")]
    if not lines or lines[0][:1] == ["NONE"]:
        return "this OpenCV is built without one (opencv-python-headless)"
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "there is no screen (DISPLAY is not set)"
    return ""


def is_file(output: Path, suffixes: set[str]) -> bool:
    """Whether ``--output`` names one picture or video rather than a folder."""
    return output.suffix.lower() in suffixes and not output.is_dir()


def plan_targets(images: list[Path], output: Path | None) -> dict[Path, Path | None]:
    """{image: picture}, None = a window; an image that is named twice is drawn once.

    Raises:
        ConfigError: a picture would overwrite an image or another picture.
    """
    images = list({os.path.abspath(image): image for image in images}.values())
    if output is None:
        return dict.fromkeys(images)
    single = is_file(output, PICTURES)
    if not single and is_file(output, set(SUFFIXES)):
        raise ConfigError(
            f"--output {output} must be a folder, or a picture that ends in {', '.join(sorted(PICTURES))}"
        )
    if single and len(images) > 1:
        raise ConfigError(f"--output {output} is one picture, but there are {len(images)} images; name a folder")
    if output.exists() and not output.is_dir() and not single:
        raise ConfigError(f"--output {output} is a file; name a folder")
    targets, inputs, taken = {}, {image.resolve() for image in images}, {}
    for image in images:
        name = f"{image.stem}{'.jpg' if image.suffix.lower() in ('.jpg', '.jpeg') else '.png'}"
        target = output if single else output / name
        if target.resolve() in inputs:
            raise ConfigError(f"--output {output} would overwrite the image {target}; choose another folder")
        if (other := taken.setdefault(target, image)) != image:
            raise ConfigError(f"the pictures of {other} and {image} would both be {target}; draw them into two folders")
        targets[image] = target
    return targets


def plan_video(source: str | None, output: Path | None) -> Path | None:
    """The file that a video is written to; raises ConfigError where it cannot be."""
    if output is None or is_file(output, {".mp4"}):
        target = output
    elif output.suffix and not output.is_dir():
        raise ConfigError(f"--output {output} must be a folder, or a file that ends in .mp4")
    else:
        target = output / f"{Path(source).stem if source else 'webcam'}.mp4"
    if target is not None and source and target.resolve() == Path(source).resolve():
        raise ConfigError(f"--output {output} would overwrite the video {source}; choose another folder")
    return target


def read_known(path: str, images: list[Path], cfg) -> dict[Path, list[tuple[list[float], int]]]:
    """{image: its known boxes and classes} from a file like results.json.

    Raises:
        ConfigError: the file cannot be read, or has another form.
        UserError: an object of another image, or of a class that the model has not.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--known {path} cannot be read as JSON: {error}") from None
    given, found = {image.resolve(): image for image in images}, {}
    for i, record in enumerate(records if isinstance(records, list) else [records]):
        box = record.get("box_xyxy") if isinstance(record, dict) else None
        numbers = isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)
        if not numbers or not isinstance(record.get("file_name"), str) or "class" not in record:
            raise ConfigError(
                f"--known {path}, entry {i} must be an object with file_name, class and box_xyxy of four numbers, got "
                f"{json.dumps(record):.300}"
            )
        image = given.get(Path(record["file_name"]).resolve())
        if image is None:
            raise ConfigError(
                f"--known {path}, entry {i} is of {record['file_name']}, which is not in --input; take it out"
            )
        found.setdefault(image, []).append((box, class_number(record["class"], cfg)))
    return found


def require_prompts(args: argparse.Namespace, demo: VisualizationDemo) -> None:
    """Raises ConfigError where the model cannot take ``--known`` or ``--labels``, which no image changes."""
    for kind in ("known", "labels"):
        if getattr(args, kind) is not None:
            demo.predictor.require_prompts(kind)


def read_labels(text: str, cfg) -> list[int]:
    """Numbers of the classes of ``--labels``; raises UserError for unknown classes, or those that are named twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known_names = cfg.MODEL.DN_DETR.CLASS_NAMES
    labels = [class_number(int(x) if x.isdecimal() and x not in known_names else x, cfg) for x in names]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--labels {text} stands for the classes {labels}; name each once")
    return labels


def read_prompts(args: argparse.Namespace, images: list[Path], cfg) -> Callable[[Path, tuple[int, int]], dict]:
    """From an image and its (height, width) to what the predictor is told of it."""
    if args.labels is not None:
        labels = read_labels(args.labels, cfg)
        return lambda path, size: {"labels": labels}
    if args.known is None:
        return lambda path, size: {}
    known = read_known(args.known, images, cfg)

    def _told(path: Path, size: tuple[int, int]) -> dict:
        boxes, classes = zip(*known[path], strict=True) if path in known else ((), ())
        boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        return {"known": Instances(size, gt_boxes=boxes, gt_classes=torch.tensor(classes, dtype=torch.int64))}

    return _told


def count_parts(found: dict) -> str:
    """How many things a picture shows, in words."""
    if "panoptic_seg" in found:
        return f"{len(found['panoptic_seg'][1])} segments"
    if "instances" in found:
        return f"{len(found['instances'])} objects"
    return f"{len(found['sem_seg'].argmax(0).unique())} classes"


def as_records(path: str | Path, instances: Instances, metadata, **more) -> list[dict]:
    """One JSON record a box: file, class index and name, score, [x0, y0, x1, y1] in pixels, and ``more``.

    With tracks also ``track_id``, None before there is one.
    """
    names = metadata.get("thing_classes", None) or []
    boxes, scores = instances.pred_boxes.tensor.tolist(), instances.scores.tolist()
    records = [
        {
            "file_name": str(path),
            **more,
            "class": index,
            "class_name": class_name(names, index),
            "score": round(score, 4),
            "box_xyxy": [round(x, 2) for x in box],
        }
        for index, score, box in zip(instances.pred_classes.tolist(), scores, boxes, strict=True)
    ]
    if instances.has("track_ids"):
        for record, track in zip(records, instances.track_ids.tolist(), strict=True):
            record["track_id"] = track if track != UNCONFIRMED else None
    return records


def check_model(cfg, boxes: bool) -> None:
    """Raises ConfigError where the weights are not there, or ``boxes`` are wanted of a model that gives no instances."""
    weights, node = cfg.MODEL.WEIGHTS, cfg.MODEL.DN_DETR.MASK
    if not weights or ("://" not in weights and not Path(weights).is_file()):
        raise ConfigError(f"MODEL.WEIGHTS = {weights!r} does not exist; add --opts MODEL.WEIGHTS model_final.pth")
    if boxes and node.ENABLED and "instances" not in node.OUTPUTS:
        raise ConfigError(
            f"--json writes boxes of instances, but MODEL.DN_DETR.MASK.OUTPUTS is {list(node.OUTPUTS)}; leave --json out, "
            "or add 'instances'"
        )


def read_config(args: argparse.Namespace):
    """The complete config of a command line."""
    tiles = [] if args.tile is None else ["TEST.TILE.SIZE", args.tile]
    cfg = setup_cfg(args.config_file, [*args.opts, *tiles], splits=())
    check_model(cfg, args.json)
    cfg.merge_from_list(classes_of_weights(cfg))
    if args.confidence_threshold is not None:  # decides on panoptic segments too, as in Detectron2's demo
        cfg.MODEL.DN_DETR.MASK.OBJECT_THRESHOLD = args.confidence_threshold
    return cfg


def require_other_file(args: argparse.Namespace, folder: Path | None) -> None:
    """Raises ConfigError if the file that ``--json`` writes into ``folder`` is that of ``--known``."""
    if args.json and args.known and Path(args.known).resolve() == (folder / RESULTS).resolve():
        raise ConfigError(f"--json would overwrite --known {args.known}; choose another --output, or rename the file")


def make_folder(folder: Path) -> None:
    """Makes the folder of the output before anything is computed; raises ConfigError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be made: {error}; name another folder") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output {folder} cannot be written; name another folder")


def progress_bar(items: Iterable, total: int | None, unit: str):
    """tqdm over ``items`` on stderr, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, total=total, unit=unit, disable=None, dynamic_ncols=True)


def say(text: str, file=None) -> None:
    """Prints a line above the progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=file or sys.stdout)


def show(picture, wait: int) -> bool:
    """Shows (H, W, 3) BGR in a window for ``wait`` ms, 0 = until a key is pressed; True if that was Esc."""
    import cv2

    cv2.imshow("dn-detr predict", picture)
    return cv2.waitKey(wait) & 0xFF == ESCAPE


def predict_images(args: argparse.Namespace) -> int:
    """Runs over all images; 1 if some have no picture because of an error."""
    output = Path(args.output) if args.output is not None else None
    targets = plan_targets([path for given in args.input for path in find_images(given, "--input")], output)
    folder = output.parent if output is not None and is_file(output, PICTURES) else output
    require_other_file(args, folder)
    cfg = read_config(args)
    told = read_prompts(args, list(targets), cfg)
    if folder is not None:
        make_folder(folder)
    demo = VisualizationDemo(cfg, threshold_of(args))
    require_prompts(args, demo)
    records, failed = [], 0
    for path, target in progress_bar(targets.items(), len(targets), "image"):
        try:
            image = read_image(str(path), "BGR")
            found, drawn = demo.run_on_image(image, **told(path, image.shape[:2]))
            if target is not None:
                drawn.save(str(target))
            elif show(drawn.get_image()[:, :, ::-1], 0):
                break
        except DatasetError as error:
            say(f"skipped: {error}", sys.stderr)
            failed += 1
        except Exception as error:  # whatever is wrong with one image, the others are drawn
            say(f"failed: {path}: {type(error).__name__}: {' '.join(str(error).split())}", sys.stderr)
            failed += 1
        else:
            say(f"{path}: {count_parts(found)}{f' -> {target}' if target is not None else ''}")
            records += as_records(path, found["instances"], demo.metadata) if args.json else []
    if args.json:
        write_records(records, folder)
    if failed:
        print(f"{failed} of {len(targets)} images have no picture, see above", file=sys.stderr)
    return FAILED if failed else 0


def write_records(records: list[dict], folder: Path) -> None:
    """Writes results.json."""
    (folder / RESULTS).write_text(json.dumps(records, indent=1))
    print(f"{len(records)} boxes -> {folder / RESULTS}")


def threshold_of(args: argparse.Namespace) -> float:
    """The lowest score of instances that are shown."""
    return THRESHOLD if args.confidence_threshold is None else args.confidence_threshold


@contextmanager
def writing(target: Path, frame_rate: float):
    """A function that writes a frame (H, W, 3) BGR to a file by OpenCV's mp4v; raises ConfigError where that cannot be.

    A file has frames of one size, that of the first. OpenCV drops others without an error, so they are resized. Sides are
    made even, as the format wants them, by another row or column of the same pixels.
    """
    import cv2

    make_folder(target.parent)
    writers, size = [], None

    def _write(frame) -> None:
        nonlocal size
        height, width = frame.shape[:2]
        frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if not writers:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            size = frame.shape[1::-1]
            writers.append(cv2.VideoWriter(str(target), code, frame_rate, size))
            if not writers[0].isOpened():
                raise ConfigError(f"--output {target} cannot be written by OpenCV; choose another folder")
        writers[0].write(frame if frame.shape[1::-1] == size else cv2.resize(frame, size))

    try:
        yield _write
    finally:
        for writer in writers:
            writer.release()


def quiet_opencv() -> None:
    """Of a video that cannot be read there is one sentence, not the lines of OpenCV and FFmpeg besides."""
    import cv2

    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def predict_video(args: argparse.Namespace) -> int:
    """Runs over the frames of a video or a camera; 1 if a file ends before the frames that it announces."""
    target = plan_video(args.video_input, Path(args.output) if args.output is not None else None)
    name = args.video_input or "webcam"
    quiet_opencv()
    with ExitStack() as stack:
        video = stack.enter_context(Video(0 if args.webcam else args.video_input))
        cfg = read_config(args)
        prompts = {} if args.labels is None else {"labels": read_labels(args.labels, cfg)}
        write = stack.enter_context(writing(target, video.frame_rate)) if target is not None else None
        demo = VisualizationDemo(cfg, threshold_of(args), track=args.track)
        records, stopped = [], False
        try:
            for number, (found, frame) in enumerate(
                progress_bar(demo.follow(video, **prompts), video.expected or None, "frame")
            ):
                records += as_records(name, found["instances"], demo.metadata, frame=number) if args.json else []
                if write is not None:
                    write(frame)
                elif stopped := show(frame, 1):
                    break
        except KeyboardInterrupt:
            if not args.webcam:  # a camera has no other end
                raise
    print(f"{name}: {video.read} frames{f' -> {target}' if target is not None else ''}")
    if args.json:
        write_records(records, target.parent)
    missing = 0 if stopped else video.expected - video.read
    if missing > 1 + video.expected // 100:  # containers may be wrong by a few
        print(f"{name} announces {video.expected} frames, but only {video.read} could be read", file=sys.stderr)
        return FAILED
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parse_arguments(argv)

    def _work() -> int:
        check_arguments(args)
        return predict_images(args) if args.input else predict_video(args)

    return run_command(_work)
