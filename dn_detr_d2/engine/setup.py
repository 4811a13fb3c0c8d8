"""A complete config: read, checked, its data sets registered, its classes those of the data sets."""

from pathlib import Path

from detectron2.config import CfgNode

from ..checkpoint.checkpointer import classes_of_weights
from ..coco import NUM_RAW_CLASSES, coco_names, raw_names
from ..config import load_config
from ..data import count_classes, evaluated_classes
from ..data.registered import known_classes, known_things, listed_sets, register_data_sets, used_classes
from ..errors import ConfigError
from .foreign_detectors import check_detector
from .pseudo_labels import check_semi_supervised


def setup_cfg(
    config_file: str = "", opts: list | None = None, *, splits: tuple[str, ...] = ("TRAIN", "TEST")
) -> CfgNode:
    """A complete config from a YAML file and overrides, checked; data sets that it lists registered.

    For a training also what its label noise is drawn by, see :func:`resolve_label_noise`.

    Args:
        config_file: path of a YAML file, a name of the model zoo, or "" for the defaults.
        opts: [key, value, key, value, ...] that override the file.
        splits: which of ``DATASETS`` must be at hand: those are read, give ``NUM_CLASSES: auto`` its number, and are
            compared with it. ("TEST",) for evaluation; () for inference with the config.yaml of a finished training.

    Raises:
        ConfigError: an unknown key (with the nearest one), a value that cannot work, or class counts that contradict.
        DatasetError: an annotation file that cannot be used.
    """
    cfg = load_config(config_file, opts)
    used = [name for split in splits for name in cfg.DATASETS[split]]
    unlabeled = cfg.DATASETS.UNLABELED if "TRAIN" in splits and cfg.SEMI_SUPERVISED.ENABLED else ()
    register_data_sets(cfg, used, unlabeled)
    if "TRAIN" in splits and not used and cfg.MODEL.DN_DETR.NUM_CLASSES is None:
        raise ConfigError("MODEL.DN_DETR.NUM_CLASSES is 'auto', but DATASETS names no data set; set the number")
    if used:
        resolve_classes(cfg, used, evaluated="TRAIN" not in splits)
    share_num_classes(cfg)
    check_detector(cfg, training="TRAIN" in splits)
    evaluated_classes(cfg)  # or a wrong name would end the training at its first evaluation
    if "TRAIN" in splits and cfg.MODEL.DN_DETR.DENOISING.NAME:
        resolve_label_noise(cfg)
    if "TRAIN" in splits and cfg.SEMI_SUPERVISED.ENABLED:
        check_semi_supervised(cfg)
    return cfg


def setup_for_evaluation(config_file: str = "", opts: list | None = None) -> CfgNode:
    """As :func:`setup_cfg` for ``DATASETS.TEST`` alone; the classes are those that MODEL.WEIGHTS was trained on.

    A test set may list them in another order, or lack some: the model must not change with it. Where the config names the
    classes, as the config.yaml of a training does, these hold; where the weights say nothing, those of the test set.

    Raises:
        CheckpointError: MODEL.WEIGHTS does not exist, or cannot be read.
        ConfigError, DatasetError: see :func:`setup_cfg`.
    """
    opts = list(opts or [])
    plain = load_config(config_file, opts)
    trained = classes_of_weights(plain, required=False) if plain.MODEL.WEIGHTS else []
    named = "MODEL.DN_DETR.CLASS_NAMES" in trained  # of a number alone nobody knows what the classes are
    return setup_cfg(config_file, [*opts, *(trained if named else [])], splits=("TEST",))


def share_num_classes(cfg: CfgNode) -> None:
    """Sets the number of classes of Detectron2's own heads to NUM_CLASSES, where that is known."""
    number = cfg.MODEL.DN_DETR.NUM_CLASSES
    if number is not None:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = number


def resolve_label_noise(cfg: CfgNode) -> None:
    """Fills in LABEL_NOISE.CLASS_COUNTS for noise by class frequency; raises ConfigError for a file that is not there."""
    node = cfg.MODEL.DN_DETR.DENOISING.LABEL_NOISE
    if node.NAME == "class_frequency" and not node.CLASS_COUNTS:
        root = cfg.MODEL.DN_DETR
        node.CLASS_COUNTS = count_classes(cfg.DATASETS.TRAIN, root.CLASS_NAMES, root.NUM_CLASSES)
        if not any(node.CLASS_COUNTS):
            raise ConfigError(
                f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no objects to count for LABEL_NOISE.NAME = "
                "'class_frequency'; set MODEL.DN_DETR.DENOISING.LABEL_NOISE.CLASS_COUNTS"
            )
    if node.NAME == "confusion" and not Path(node.CONFUSION_MATRIX).is_file():
        raise ConfigError(
            f"MODEL.DN_DETR.DENOISING.LABEL_NOISE.CONFUSION_MATRIX = {node.CONFUSION_MATRIX!r} is no file; name the "
            "confusion_matrix.json that an evaluation has written"
        )


def resolve_classes(cfg: CfgNode, datasets: list[str], *, evaluated: bool = False) -> None:
    """Fills in NUM_CLASSES and CLASS_NAMES from ``datasets``, and compares them with the config.

    Classes are the same if their names are: data sets may list them in any order, and may lack some of them. The order of
    the model is that of CLASS_NAMES if the config of a training gives it, else that of the first data set with all names.

    Args:
        cfg: is changed.
        datasets: names of registered data sets, those of DATASETS.TRAIN first.
        evaluated: whether a trained model is evaluated on them, so that CLASS_NAMES are its classes.

    Raises:
        ConfigError: no order of the model holds the classes of all data sets, or NUM_CLASSES is not their number, or nothing
            says it.
    """
    node = cfg.MODEL.DN_DETR
    known = {name: classes for name in datasets if (classes := known_classes(name))}
    if node.NUM_CLASSES is None and not known:
        raise ConfigError(
            f"MODEL.DN_DETR.NUM_CLASSES is 'auto', but no data set of {datasets} names its classes; set the number"
        )
    classes = _order_of_classes(cfg, known, evaluated) if known else None
    if node.NUM_CLASSES is None:
        node.NUM_CLASSES = len(classes)
    elif node.NUM_CLASSES == NUM_RAW_CLASSES and classes == list(coco_names()):
        classes = list(raw_names())  # as the official models count
    elif classes is not None and len(classes) != node.NUM_CLASSES:
        raise ConfigError(
            f"MODEL.DN_DETR.NUM_CLASSES = {node.NUM_CLASSES}, but {next(iter(known))} has {len(classes)} classes "
            f"{classes[:8]}; set it to {len(classes)} or to auto"
        )
    if classes is not None:
        node.CLASS_NAMES = list(classes)
    resolve_things(cfg, known)


def resolve_things(cfg: CfgNode, known: dict[str, list[str]]) -> None:
    """Fills in MASK.THING_CLASSES from the first data set that tells things from stuff.

    Args:
        cfg: with NUM_CLASSES and CLASS_NAMES.
        known: data set -> its classes in its order.

    Raises:
        ConfigError: the config names things that are no classes.
    """
    node = cfg.MODEL.DN_DETR
    given = list(node.MASK.THING_CLASSES)
    if not all(type(x) is int and 0 <= x < node.NUM_CLASSES for x in given):
        raise ConfigError(
            f"MODEL.DN_DETR.MASK.THING_CLASSES must be numbers of classes, 0 to {node.NUM_CLASSES - 1}, got {given}"
        )
    if given or not node.MASK.ENABLED:
        return
    for name, classes in known.items():
        things = known_things(name)
        if things is not None:
            names = {classes[i] for i in things}
            node.MASK.THING_CLASSES = [i for i, one in enumerate(node.CLASS_NAMES) if one in names]
            return


def _order_of_classes(cfg: CfgNode, known: dict[str, list[str]], evaluated: bool) -> list[str]:
    """The classes of the model in their order.

    Args:
        cfg: the config.
        known: data set -> its classes in its order; those of DATASETS.TRAIN come first.
        evaluated: whether names decide which of the trained classes are meant.
    """
    node = cfg.MODEL.DN_DETR
    found = list(dict.fromkeys(name for classes in known.values() for name in classes))
    given = list(node.CLASS_NAMES)
    as_many = len(given) == node.NUM_CLASSES and given != list(raw_names())
    if set(given) == set(found) or (as_many and set(given) >= set(found)):
        return given
    if evaluated and len(given) == node.NUM_CLASSES:
        _refuse_unknown_objects(given, known)
        return given
    trained = [known[name] for name in cfg.DATASETS.TRAIN if name in known and not evaluated]
    if not trained:
        return found
    most = max(trained, key=len)
    lacking = {name: [x for x in classes if x not in set(most)] for name, classes in known.items()}
    for name, missing in lacking.items():
        if missing and name not in cfg.DATASETS.TRAIN:  # what only a test set lists, and has no objects of, is no class
            used = used_classes(name)  # reads the set
            lacking[name] = [x for x in missing if x in used]
    if lacking := {name: missing for name, missing in lacking.items() if missing}:
        largest = next(name for name in cfg.DATASETS.TRAIN if known.get(name) == most)
        others = "; ".join(f"{name} has {missing[:8]} besides" for name, missing in lacking.items())
        raise ConfigError(
            "DATASETS.TRAIN and DATASETS.TEST must have the same classes, or one of DATASETS.TRAIN those of all others: "
            f"{largest} has {len(most)} {most[:8]}, {others}; write these names into the categories of {largest} too (a "
            f"category may be without objects), or take them out of the other file{_inherited(cfg)}"
        )
    return list(most)


def _refuse_unknown_objects(classes: list[str], known: dict[str, list[str]]) -> None:
    """A test set may list more classes than a trained model has, but raises ConfigError if it has objects of them, or if it
    lists none of its classes."""
    for name, listed in known.items():
        unknown = [x for x in listed if x not in set(classes)]
        if len(unknown) == len(listed):
            raise ConfigError(
                f"data set {name} has the classes {listed[:8]}, and the model other ones, {classes[:8]}: write the names "
                "that it was trained with into the categories of the file"
            )
        if unknown and (objects := used_classes(name) & set(unknown)):
            raise ConfigError(
                f"data set {name} has objects of {sorted(objects)[:8]}, which the model does not know; it has the "
                f"{len(classes)} classes {classes[:8]}: take these objects out of the file, or train a model on them"
            )


def _inherited(cfg: CfgNode) -> str:
    """A way out for own data in DATASETS.TRAIN with the test set of the base config."""
    own = listed_sets(cfg)
    theirs = [name for name in cfg.DATASETS.TEST if name not in own]
    if not own & {*cfg.DATASETS.TRAIN} or not theirs:
        return ""
    return (
        f'; DATASETS.TEST {theirs} is the base config\'s: set it to a data set of yours, or to "()" to train without '
        "evaluation"
    )
