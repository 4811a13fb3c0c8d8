"""Detections drawn on images and on the frames of videos, by the names of Detectron2's demo."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from matplotlib import rc_context

from ..checkpoint.checkpointer import classes_of_weights
from ..data.images import drawing_scale
from ..errors import ConfigError
from ..predictor import Predictor, to_supervision
from ..sources import FRAME_RATE, require_opencv
from .images import known_names

UNCONFIRMED = -1  # instead of a track's number
LOWEST_TRACKED = 0.1  # detections with less say nothing about a track, as in ByteTrack


class VisualizationDemo:
    """Predicts and draws: of models with masks panoptic segments if it gives them, else masks, else each pixel's class.

    In videos an object has the colour of its class, or with ``track`` of its track, in all frames.

    Args:
        cfg: a complete config, for the :class:`~dn_detr_d2.predictor.Predictor`.
        confidence_threshold: lowest score to show.
        track: follow objects from frame to frame; in videos instances have ``track_ids`` (n,) then, -1 until an object is
            met in a second frame.

    Raises:
        ConfigError: OpenCV, or for tracks the package trackers, is missing, or the model gives no boxes to track; or the
            threshold is not in [0, 1].
    """

    def __init__(self, cfg, confidence_threshold: float = 0.5, *, track: bool = False):
        require_opencv("drawing")
        if not 0 <= confidence_threshold <= 1:
            raise ConfigError(f"confidence_threshold must lie between 0 and 1, got {confidence_threshold}")
        self.threshold, self.track = confidence_threshold, track
        if track:
            new_tracker(FRAME_RATE, confidence_threshold)
            if cfg.MODEL.DN_DETR.MASK.ENABLED and "instances" not in cfg.MODEL.DN_DETR.MASK.OUTPUTS:
                raise ConfigError(
                    f"tracks need instances, but MODEL.DN_DETR.MASK.OUTPUTS is {list(cfg.MODEL.DN_DETR.MASK.OUTPUTS)}; add "
                    "'instances'"
                )
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(classes_of_weights(cfg))
        self.predictor, self.metadata = Predictor(cfg), class_metadata(cfg)

    def run_on_image(self, image: np.ndarray, **prompts):
        """Detections of one image and their picture.

        Args:
            image: (H, W, 3) uint8 in BGR.
            prompts: what the model is told, see :meth:`~dn_detr_d2.predictor.Predictor.__call__`.

        Returns:
            (dict, VisImage): what the predictor returns, its instances those of at least the threshold and on the CPU, and
            Detectron2's drawing, small images enlarged.
        """
        found = above(self.predictor(image, **prompts), self.threshold)
        return found, self._draw(image, found)

    def run_on_video(self, video) -> Iterator[np.ndarray]:
        """The frames of a video with what was found in them, (H, W, 3) uint8 in BGR.

        Args:
            video: cv2.VideoCapture, :class:`~dn_detr_d2.sources.Video`, or any iterable of frames in BGR.
        """
        for _, frame in self.follow(video):
            yield frame

    def follow(self, video, **prompts) -> Iterator[tuple[dict, np.ndarray]]:
        """As :meth:`run_on_video`, with the detections of each frame as :meth:`run_on_image` returns them."""
        tracker = new_tracker(getattr(video, "frame_rate", FRAME_RATE), self.threshold) if self.track else None
        segments = None
        for frame in _frames(video):
            found = self.predictor(frame, **prompts)
            if tracker is not None:
                add_tracks(found, tracker, self.threshold)
            found = above(found, self.threshold)
            if "panoptic_seg" in found:
                segments = segments or self._video_visualizer()
                drawn = segments.draw_panoptic_seg_predictions(frame[:, :, ::-1], *_on_cpu(found["panoptic_seg"]))
            else:
                drawn = self._draw(frame, found, in_video=True)
            yield found, drawn.get_image()[:, :, ::-1]

    def _video_visualizer(self):
        from detectron2.utils.video_visualizer import VideoVisualizer

        return VideoVisualizer(self.metadata)

    @rc_context({"text.parse_math": False})  # class names are no formulas
    def _draw(self, image: np.ndarray, found: dict, in_video: bool = False):
        """VisImage of ``image`` with segments, else boxes and masks, else the class of each pixel."""
        from detectron2.utils.visualizer import Visualizer

        visualizer = Visualizer(image[:, :, ::-1], self.metadata, drawing_scale(image.shape[:2]))
        if "panoptic_seg" in found:
            return visualizer.draw_panoptic_seg(*_on_cpu(found["panoptic_seg"]))
        if "instances" not in found:
            return visualizer.draw_sem_seg(found["sem_seg"].argmax(0).cpu())
        instances = found["instances"]
        if not in_video:
            return visualizer.draw_instance_predictions(instances)
        return visualizer.overlay_instances(
            boxes=instances.pred_boxes,
            masks=instances.pred_masks.numpy() if instances.has("pred_masks") else None,
            labels=_labels(instances, self.metadata.get("thing_classes", [])),
            assigned_colors=_colours(instances),
        )


def _frames(video) -> Iterable[np.ndarray]:
    """The frames of a cv2.VideoCapture, or those that are iterated over."""
    if not hasattr(video, "isOpened"):
        yield from video
        return
    while (read := video.read())[0]:
        yield read[1]


def _on_cpu(panoptic: tuple) -> tuple:
    return panoptic[0].cpu(), panoptic[1]


def _labels(instances: Instances, names: Sequence[str]) -> list[str]:
    """Track if there is one, class and score of each instance."""
    tracks = instances.track_ids.tolist() if instances.has("track_ids") else [UNCONFIRMED] * len(instances)
    return [
        f"{f'#{track} ' if track != UNCONFIRMED else ''}{class_name(names, index)} {score:.0%}"
        for track, index, score in zip(tracks, instances.pred_classes.tolist(), instances.scores.tolist(), strict=True)
    ]


def _colours(instances: Instances) -> list[np.ndarray]:
    """RGB in [0, 1] by track, else by class; grey before there is a track."""
    from detectron2.utils.colormap import colormap

    palette = colormap(rgb=True, maximum=1)
    if not instances.has("track_ids"):
        return [palette[i % len(palette)] for i in instances.pred_classes.tolist()]
    return [palette[i % len(palette)] if i != UNCONFIRMED else np.full(3, 0.6) for i in instances.track_ids.tolist()]


def above(found: dict, threshold: float) -> dict:
    """What was found, its instances on the CPU and those with a score of at least ``threshold`` alone."""
    if "instances" not in found:
        return found
    instances = found["instances"].to("cpu")
    return found | {"instances": instances[instances.scores >= threshold]}


def class_metadata(cfg):
    """Class names for Detectron2's drawing: of the config, or of a test set with as many; else numbers are shown."""
    from detectron2.data import Metadata
    from detectron2.utils.colormap import colormap

    tested = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata(name="demo")
    node, names = cfg.MODEL.DN_DETR, known_names(cfg, tested)
    if not node.CLASS_NAMES and (names == tested.get("thing_classes", []) or node.MASK.ENABLED):
        return tested  # with its colours and the classes of its segments
    palette = colormap(rgb=True)
    colours = [palette[i % len(palette)].tolist() for i in range(len(names))]
    return Metadata(name="demo", thing_classes=names, stuff_classes=names, stuff_colors=colours)


def class_name(names: Sequence[str], index: int) -> str:
    """The name of a class, or its number where there is none."""
    return names[index] if index < len(names) else str(index)


def new_tracker(frame_rate: float, threshold: float):
    """ByteTrack for detections that are shown from a score of ``threshold`` on; raises ConfigError without trackers."""
    try:
        from trackers import ByteTrackTracker
    except ModuleNotFoundError:
        raise ConfigError("--track needs the package trackers; pip install 'dn_detr_d2[track]'") from None
    return ByteTrackTracker(
        frame_rate=frame_rate, track_activation_threshold=threshold, high_conf_det_threshold=threshold
    )


def add_tracks(found: dict, tracker, threshold: float) -> None:
    """Gives the instances of the next frame ``track_ids`` (n,), -1 where there is no track yet.

    Args:
        found: what the predictor returned.
        tracker: of the video, see :func:`new_tracker`; detections below the threshold may continue a track.
        threshold: lowest score that is shown.
    """
    instances = found["instances"]
    detections = to_supervision({"instances": instances})
    detections.mask = None  # boxes are followed
    detections.data["place"] = np.arange(len(detections))
    tracked = tracker.update(detections[detections.confidence >= min(LOWEST_TRACKED, threshold)])
    numbers = torch.full((len(instances),), UNCONFIRMED, device=instances.scores.device)
    if len(tracked):
        numbers[torch.from_numpy(tracked.data["place"])] = torch.from_numpy(np.asarray(tracked.tracker_id)).to(numbers)
    instances.track_ids = numbers
