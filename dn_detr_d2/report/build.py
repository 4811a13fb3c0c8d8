"""Puts the report of a training together from what its OUTPUT_DIR holds."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .. import doctor
from ..errors import CheckpointError, ConfigError, DatasetError
from ..evaluation import inference_folder, main_metric
from ..evaluation.precision_recall import PrecisionRecall, read_precision_recall
from ..utils.files import atomic_write
from ..visualization.runs import Run, read_run
from . import figures, pictures
from .detections import Evaluated, read_evaluated
from .page import Section, drawing, left_out, page, paragraph, photograph, table, verbatim

TASKS = ("bbox", "segm", "panoptic_seg", "sem_seg")
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "PQ", "SQ", "RQ", "mIoU")  # in this order, others behind
EXAMPLES = 3  # best images, and worst ones
DEFAULT_SCORE = 0.5


@dataclass
class Training:
    """What a report is about; evaluations are read when a section asks for them.

    Attributes:
        cfg: of the training.
        folder: its OUTPUT_DIR.
        run: what it has logged.
    """

    cfg: object
    folder: Path
    run: Run

    @property
    def predictions(self) -> Path:
        """The folder of the evaluation on the first test set, by which the best checkpoint is chosen."""
        return Path(inference_folder(self.cfg, next(iter(self.cfg.DATASETS.TEST), "")))

    @cached_property
    def curves(self) -> dict[str, PrecisionRecall]:
        """{"bbox" or "segm": precision and recall of the last evaluation}."""
        found = {task: read_precision_recall(self.predictions, task) for task in ("bbox", "segm")}
        return {task: x for task, x in found.items() if x is not None}

    @cached_property
    def evaluated(self) -> Evaluated:
        """See :func:`.detections.read_evaluated`."""
        if not self.cfg.DATASETS.TEST:
            raise DatasetError("the training was not evaluated: DATASETS.TEST is empty")
        return read_evaluated(self.cfg, self.predictions)

    @property
    def score(self) -> float:
        """From which detections are shown and counted."""
        first = next(iter(self.curves.values()), None)
        return first.best_score() if first is not None and first.with_objects() else DEFAULT_SCORE


def write_report(cfg) -> Path:
    """Writes OUTPUT_DIR/report/index.html and returns its path.

    Args:
        cfg: of a training that has logged something.

    Raises:
        UserError: metrics.json is missing, empty or damaged, or the file of predictions is damaged. Sections that do not
            apply, or whose data are not at hand, say so in one line instead.
    """
    folder = Path(cfg.OUTPUT_DIR)
    training = Training(cfg, folder, read_run(folder))
    sections = [Section(title, _body(make, training)) for title, make in SECTIONS.items()]
    target = folder / "report" / "index.html"
    target.parent.mkdir(exist_ok=True)
    with atomic_write(target, "w") as file:
        file.write(page(f"Report of {training.run.name}", sections))
    return target


def _body(make: Callable[[Training], str], training: Training) -> str:
    """A section, or the sentence that says why it is left out."""
    try:
        return make(training)
    except (ConfigError, DatasetError, CheckpointError) as reason:
        return left_out(f"Left out: {reason}.")


def _results(training: Training) -> dict[tuple[str, str], dict[str, float]]:
    """{(data set and "ema" where there are several, task): {metric: last value}}."""
    found = {}
    for key, value in figures.last_values(training.run).items():
        parts = key.split("/")
        place = next((i for i, part in enumerate(parts) if part in TASKS), None)
        if place is not None:
            where = "/".join(parts[:place]), parts[place]
            found.setdefault(where, {})["/".join(parts[place + 1 :])] = value
    if not found:
        raise DatasetError("the training has no evaluations (DATASETS.TEST, TEST.EVAL_PERIOD)")
    return found


def _summary(training: Training) -> str:
    """How long it was and how it ended, then a table for each task."""
    run, cfg = training.run, training.cfg
    done = int(max(points[-1, 0] for points in run.curves.values()))
    words = f"{done} of {cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images"
    if len(run.clock) > 1:
        words += f", {run.clock[-1, 1] / 60:.1f} minutes of training without evaluations"
    taught = f" and, by pseudo labels, {', '.join(cfg.DATASETS.UNLABELED)}" if cfg.SEMI_SUPERVISED.ENABLED else ""
    body = paragraph(f"{words}; trained on {', '.join(cfg.DATASETS.TRAIN)}{taught}.")
    try:
        results = _results(training)
    except DatasetError as reason:
        return body + left_out(f"No results: {reason}.")
    body += paragraph(f"Last evaluation, 0 to 100. The main metric is {main_metric(cfg)}.")
    for task in TASKS:
        rows = {where: x for (where, kind), x in results.items() if kind == task}
        names = [name for name in next(iter(rows.values()), {}) if not re.match(r"(AP|IoU|ACC|BoundaryIoU)-", name)]
        names.sort(key=lambda name: COLUMNS.index(name) if name in COLUMNS else len(COLUMNS))
        if names:
            body += table(
                [
                    [where or ", ".join(cfg.DATASETS.TEST), *(x.get(name) for name in names)]
                    for where, x in rows.items()
                ],
                [task, *names],
            )
    figure = figures.curves(run, figures.METRICS)
    return body if figure is None else body + drawing(figure, "Results of all evaluations.")


def _classes(training: Training) -> str:
    """A chart for each task and data set whose classes have a value of their own."""
    body = ""
    for (where, task), values in _results(training).items():
        for metric in ("AP", "IoU"):
            found = {x.removeprefix(f"{metric}-"): value for x, value in values.items() if x.startswith(f"{metric}-")}
            if found:
                title = f"{metric} of {task} of each class{f', {where}' if where else ''} (0 to 100)"
                body += drawing(figures.class_bars(found, title), title)
    if not body:
        raise DatasetError("the evaluation gives no values of single classes")
    return body


def _curves(training: Training) -> str:
    if not training.curves:
        raise DatasetError("the last evaluation has written no precision and recall; only instances have them")
    return "".join(
        drawing(figures.precision_recall(x), f"Precision against recall of {task}, all sizes, as COCO counts.")
        for task, x in training.curves.items()
        if x.with_objects()
    )


def _confusion(training: Training) -> str:
    words = (
        f"Detections of {training.evaluated.name} with a score of {training.score:.2f} or more, IoU 0.5 or more. "
        "FN: objects that are not found; FP: detections without an object."
    )
    return drawing(pictures.confusion_figure(training.evaluated, training.score), words)


def _examples(training: Training) -> str:
    evaluated, score = training.evaluated, training.score
    qualities = pictures.qualities(evaluated, score)
    if not qualities:
        raise DatasetError(f"{evaluated.name} has no objects and no detections")
    body = paragraph(
        f"Left the objects, right the detections with a score of {score:.2f} or more (the median over the classes of where "
        f"F1 is highest). Images of {evaluated.name} are ranked by the panoptic quality of their boxes."
    )
    best = sorted(qualities, key=lambda x: (-x[0], -x[1]))[:EXAMPLES]
    worst = sorted((x for x in qualities if x not in best), key=lambda x: (x[0], -x[1]))[:EXAMPLES]
    for word, chosen in (("Best", best), ("Worst", worst)):
        for value, _, place in chosen:
            name = Path(evaluated.records[place]["file_name"]).name
            body += photograph(pictures.side_by_side(evaluated, place, score), f"{word}: {name}, quality {value:.2f}")
    return body


def _losses(training: Training) -> str:
    figure = figures.curves(training.run, figures.LOSSES)
    if figure is None:
        raise DatasetError("metrics.json has no losses")
    return drawing(figure, "Weighted losses, medians of 20 iterations.")


def _diagnostics(training: Training) -> str:
    figure = figures.curves(training.run, figures.DIAGNOSTICS)
    if figure is None:
        raise DatasetError("they were not recorded (TEST.INSTABILITY.NUM_IMAGES)")
    return drawing(figure, "See docs/diagnostics.md.")


def _restored(training: Training) -> str:
    figure = pictures.restored_boxes(training.cfg, training.folder / "model_final.pth")
    return drawing(figure, "Noised objects of one denoising group, and what each decoder layer makes of them.", 100)


def _command(training: Training) -> str:
    lines = list(figures.command_lines(training.folder / "log.txt"))
    again = shlex.join(["train_net.py", "--config-file", str(training.folder / "config.yaml")])
    started = verbatim("\n".join(lines)) if lines else left_out("log.txt does not say how the training was started.")
    return started + paragraph(f"With all keys as they were: {again}")


def _installation(training: Training) -> str:
    return verbatim(doctor.as_text(doctor.examine(training.cfg)))


SECTIONS: dict[str, Callable[[Training], str]] = {
    "Results": _summary,
    "Classes": _classes,
    "Precision and recall": _curves,
    "Confusion matrix": _confusion,
    "Best and worst images": _examples,
    "Losses": _losses,
    "Diagnostics": _diagnostics,
    "Noised boxes restored": _restored,
    "Command": _command,
    "Installation": _installation,
}
