"""Every configuration key that this project adds to Detectron2, and how a complete config is put together.

Each key says what it does, its unit, the paper's symbol where there is one, and where its default comes from. "DN" is
DN-DETR (CVPR 2022) and its released code, "DAB" is DAB-DETR, "DD" is Deformable DETR.
"""

import re
from itertools import accumulate

import torch
from detectron2.config import CfgNode, get_cfg

from .coco import NUM_RAW_CLASSES, coco_names, raw_names
from .config_file import read_config_file
from .config_keys import names, nearest_key
from .config_ranges import check_ranges
from .data.coco_custom import register_coco_json
from .data.registered import known_classes, used_classes
from .errors import ConfigError


def add_dn_detr_config(cfg: CfgNode) -> None:
    """Adds this project's keys to a Detectron2 config, in place (Detectron2's convention for projects)."""
    # The one meta-architecture of this project.
    cfg.MODEL.META_ARCHITECTURE = "DenoisingDETR"
    # Where the model runs. Detectron2's default is "cuda"; ours is what this machine has.
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    # Per-channel mean and standard deviation in 0..255, RGB: torchvision's statistics, which all DETRs use.
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    # Channel order of the model's input; fits the statistics above.
    cfg.INPUT.FORMAT = "RGB"

    cfg.MODEL.DN_DETR = CfgNode()
    node = cfg.MODEL.DN_DETR
    # Number of classes P. null (or "auto", which setup_cfg() takes for null) means the classes of DATASETS.TRAIN. With COCO
    # also 91: its raw ids, as the official models count.
    node.NUM_CLASSES = None
    # Names of the classes in order of their ids. Filled in by training and kept in config.yaml, so that pictures have
    # names where the data set is not at hand.
    node.CLASS_NAMES = []
    # Anchors per image; the number of queries is this times max(QUERY_SOURCE.NUM_PATTERNS, 1). 300 in DAB and DN.
    node.NUM_QUERIES = 300
    # Channels C of the transformer. 256 in all published models.
    node.HIDDEN_DIM = 256
    # Backbone maps that enter the neck, high resolution first. DN: ["res5"]; deformable: ["res3", "res4", "res5"].
    node.IN_FEATURES = ["res5"]
    # Levels L of the pyramid; levels beyond IN_FEATURES are made by stride-2 convolutions. DN: 1; DD: 4.
    node.NUM_FEATURE_LEVELS = 1

    # What computes deformable attention: "auto" = the compiled kernel of the device where there is one, else PyTorch's
    # operators, and says which; "cuda", "cpu" = that kernel or an error; "torch" = PyTorch's operators (the reference).
    node.OP_BACKEND = "auto"

    node.NECK = CfgNode()
    # Norm after each projection: "" (DETR, DAB, DN) or "GN" with 32 groups (DD).
    node.NECK.NORM = ""
    # Temperature T of the sine encoding of image cells. 20 in DAB and DN, 10000 in DD.
    node.NECK.POSITION_TEMPERATURE = 20.0
    # Added to the 1-based cell count before it is normalised. 0 in DAB and DN, -0.5 (cell centre) in DD.
    node.NECK.POSITION_OFFSET = 0.0

    node.QUERY_SOURCE = CfgNode()
    # Class that makes the queries: LearnedAnchors, TopKAnchors (DINO: the best cells of the encoder), ObjectnessAnchors (the
    # DINO-like model of DN's repository), LearnedQueries or TwoStageQueries (Deformable DETR without and with two stages),
    # LearnedPositions (DETR), LearnedPoints (Anchor DETR).
    node.QUERY_SOURCE.NAME = "LearnedAnchors"
    # Content of matching queries: "zero" (DAB), "unknown" = embedding of the unknown label (DN), "learned" (deformable;
    # with TopKAnchors DINO's mixed query selection), "memory" = the chosen cells (TopKAnchors only, pure selection).
    node.QUERY_SOURCE.CONTENT = "unknown"
    # Content patterns that share each anchor; 0 = none. 3 in the "3pat" models.
    node.QUERY_SOURCE.NUM_PATTERNS = 0

    node.ENCODER = CfgNode()
    # DenseEncoder (DAB, DN), DeformableEncoder (DD), PlainEncoder (DETR) or RowColumnEncoder (Anchor DETR).
    node.ENCODER.NAME = "DenseEncoder"
    # Layers, attention heads, width of the feed-forward blocks: 6, 8, 2048 in DAB and DN.
    node.ENCODER.NUM_LAYERS = 6
    node.ENCODER.NUM_HEADS = 8
    node.ENCODER.FFN_DIM = 2048
    # Dropout probability. 0 in DAB and DN, 0.1 in DETR and DD.
    node.ENCODER.DROPOUT = 0.0
    # Sampling points K per head and level of deformable attention. 4 in DD; dense attention ignores it.
    node.ENCODER.NUM_POINTS = 4
    # Keep only the inputs of each layer for the backward pass and compute the layer once more there: less memory, one more
    # forward pass of the layers, the same gradients (docs/performance.md).
    node.ENCODER.ACTIVATION_CHECKPOINTING = False

    node.DECODER = CfgNode()
    # LookForwardTwiceDecoder (DAB, DN, DINO: final norm, gradient also to the layer before), LookForwardOnceDecoder
    # (DINO's ablation: final norm, no such gradient), PlainLookForwardTwiceDecoder (no norm), RefiningDecoder (deformable),
    # StaticDecoder (plain DD, Anchor DETR) or NormalisedStaticDecoder (DETR).
    node.DECODER.NAME = "LookForwardTwiceDecoder"
    # ConditionalDecoderLayer (DAB, DN), MultiLevelConditionalDecoderLayer (DN-Deformable with a deformable encoder only),
    # DeformableDecoderLayer (DAB- and DN-Deformable), DinoDecoderLayer, or of DD PointDecoderLayer (plain),
    # FirstPointDecoderLayer (box refinement), QueryDecoderLayer (two stages); PlainDecoderLayer (DETR),
    # RowColumnDecoderLayer (Anchor DETR).
    node.DECODER.LAYER = "ConditionalDecoderLayer"
    # As for the encoder.
    node.DECODER.NUM_LAYERS = 6
    node.DECODER.NUM_HEADS = 8
    node.DECODER.FFN_DIM = 2048
    node.DECODER.DROPOUT = 0.0
    node.DECODER.NUM_POINTS = 4
    node.DECODER.ACTIVATION_CHECKPOINTING = False
    # One class and box head for all layers (DAB, DN) or one each (deformable).
    node.DECODER.SHARE_HEADS = True
    # Start of the width and height logits of the first box head. 0 in DAB and DN, -2 in DD: begin with small boxes.
    node.DECODER.FIRST_SIZE_BIAS = 0.0

    # Clamp of the logit of a reference box before it is corrected. 1e-3 in DAB, DN and DINO, 1e-5 in DD.
    node.DECODER.LOGIT_EPS = 1e-3

    node.DENOISING = CfgNode()
    # Class that makes the noised targets: DenoisingGenerator (DN), ContrastiveDenoisingGenerator (DINO), or "" to train by
    # matching alone (DAB).
    node.DENOISING.NAME = "DenoisingGenerator"
    # Groups of noised copies ("scalar" in the official code). 5 in DN.
    node.DENOISING.NUM_GROUPS = 5
    # Chance that a label is redrawn, gamma in DN Sec. 4.1; 0.2 in the official code, which does not halve it.
    node.DENOISING.LABEL_NOISE_PROB = 0.2
    # Largest centre shift in half widths and heights, lambda1 in DN Sec. 4.1; 0.4 in the official code.
    node.DENOISING.CENTER_NOISE_SCALE = 0.4
    # Largest change of width and height in widths and heights, lambda2 in DN Sec. 4.1; 0.4 in the official code.
    node.DENOISING.SIZE_NOISE_SCALE = 0.4
    # Contrastive only: NUM_QUERIES // objects of the fullest image is the number of groups; 0 = NUM_GROUPS. 100 in DINO.
    node.DENOISING.NUM_QUERIES = 100
    # Contrastive only: reach of the near copies' corners in half sizes, the far ones move one to two times as far. 1.0 in
    # all published DINO runs (their config files say 0.4, their scripts override it).
    node.DENOISING.CORNER_NOISE_SCALE = 1.0
    # Contrastive only: swap corners that have crossed. Off in the official code, where at scale 1 seven in sixteen far
    # copies have a width or height that is not positive.
    node.DENOISING.KEEP_CORNER_ORDER = False
    # Hard limit on denoising queries; 0 = none. Above it each group gets a fresh random subset of an image's objects.
    # The official code has none: its memory grows with the fullest image.
    node.DENOISING.MAX_QUERIES = 0
    # Hide padded slots from the real queries of their group. Off in the official code, which lets them be seen.
    node.DENOISING.MASK_PADDING = False
    # Hide noised ground truth from matching queries and from other groups. False is there for the paper's ablation (24.0 AP
    # instead of 43.4): the model learns to copy what it shall predict.
    node.DENOISING.ATTENTION_MASK = True
    # Factor of all denoising losses. 1 in DN.
    node.DENOISING.LOSS_WEIGHT = 1.0
    # What denoising losses are divided by: noised objects averaged over ranks ("global"), or of this rank ("local",
    # the official code). The same with one process.
    node.DENOISING.NORMALIZER = "global"

    node.MATCHER = CfgNode()
    # Weights of the matching costs: focal class cost, L1 of cxcywh in [0, 1], GIoU. 2, 5, 2 in DAB and DN.
    node.MATCHER.CLASS_COST = 2.0
    node.MATCHER.L1_COST = 5.0
    node.MATCHER.GIOU_COST = 2.0

    node.LOSS = CfgNode()
    # Weights of the losses, the same for every decoder layer: 1, 5, 2 in DAB and DN.
    node.LOSS.CLASS_WEIGHT = 1.0
    node.LOSS.L1_WEIGHT = 5.0
    node.LOSS.GIOU_WEIGHT = 2.0
    # "focal" = sigmoid focal loss, one probability a class (DAB, DN, DINO, DD); "softmax" = cross-entropy with one class
    # more for "no object" (DETR), which counts NO_OBJECT_WEIGHT. 0.1 in DETR.
    node.LOSS.CLASS_LOSS = "focal"
    node.LOSS.NO_OBJECT_WEIGHT = 0.1
    # Focal loss: weight alpha of positives and exponent gamma. 0.25 and 2 everywhere.
    node.LOSS.FOCAL_ALPHA = 0.25
    node.LOSS.FOCAL_GAMMA = 2.0
    # Added to union and enclosing area in the GIoU of losses and matching costs; the whole image has area 1. 1e-6 in DAB, DN
    # and DINO, where it halves the GIoU of a box of side 0.001 with itself; nothing in DETR and DD, where points give NaN.
    node.LOSS.GIOU_EPS = 1e-18

    # Share of the model's tensors that MODEL.WEIGHTS must hold for a training to start; below 1 the others start at random,
    # and the log names them. A backbone alone is compared with the backbone. Evaluation needs all.
    cfg.MODEL.WEIGHTS_MATCHED = 1.0
    # First 8 or more hexadecimal digits of the SHA-256 that a MODEL.WEIGHTS with "://" must have; "" = those in the file's
    # name, as PyTorch publishes it. Without either nothing is downloaded.
    cfg.MODEL.WEIGHTS_SHA256 = ""
    # Backbone "build_swin_backbone" (maps p0 to p3): "T", "S", "B" or "L", and the chance that a residual branch is
    # dropped in training, growing to this rate in the last block (needs the package timm). 0.2 in DINO.
    cfg.MODEL.SWIN = CfgNode({"SIZE": "T", "DROP_PATH_RATE": 0.2})
    # Backbone "build_vitdet_backbone" (maps p2 to p5; needs timm): "B" or "L", and the same chance. 0.1 in ViTDet-B.
    cfg.MODEL.VIT = CfgNode({"SIZE": "B", "DROP_PATH_RATE": 0.1})

    # Exponential moving average of the weights (EMA), with d2go's keys: after each step of the optimizer the average becomes
    # DECAY * average + (1 - DECAY) * weights; buffers are copied. It is kept in each checkpoint ("model_ema"), evaluated
    # beside the weights under "ema/", and has its own best checkpoint, model_best_ema.pth. Costs one more set of weights.
    cfg.MODEL_EMA = CfgNode()
    cfg.MODEL_EMA.ENABLED = False
    # In [0, 1). The average looks back about 1 / (1 - DECAY) steps. 0.9997 in DINO's code, where it is off by default.
    cfg.MODEL_EMA.DECAY = 0.9997
    # Evaluation, demo.py and the predictor read the average of MODEL.WEIGHTS, a checkpoint of a training with EMA.
    cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY = False

    # COCO-format data sets to register: [[name, annotation json, image folder], ...], paths relative to the environment
    # variable DETECTRON2_DATASETS (default ./datasets) unless absolute.
    cfg.DATASETS.COCO_JSON = []
    # Crop branch of the training augmentation (DETR): with probability 0.5 the image is resized so that its shorter side
    # is one of RESIZE, then cropped to a width and a height drawn from SIZE (pixels), before the usual resize.
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = [384, 600]
    cfg.INPUT.CROP.RESIZE = [400, 500, 600]
    # Images without boxes are trained on, as the official code does; Detectron2's default drops them.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    # Batches of like aspect ratio would change the order of the data; the official code has none.
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    # Only "ADAMW" is known.
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Learning rate of the transformer, per iteration of IMS_PER_BATCH images. 1e-4 in DN.
    cfg.SOLVER.BASE_LR = 1e-4
    # What the learning rates of the backbone, and of the sampling offsets of deformable attention together with the layer
    # that gives the reference points of Deformable DETR, are multiplied with.
    # DN: 0.1 and 1; DD: 0.1 for both.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.SAMPLING_MULTIPLIER = 1.0
    # Weight decay, also of norms and biases as in the official code. 1e-4 in DN.
    cfg.SOLVER.WEIGHT_DECAY = 1e-4
    cfg.SOLVER.WEIGHT_DECAY_NORM = 1e-4
    # Iterations of linear warm-up; the official recipes have none.
    cfg.SOLVER.WARMUP_ITERS = 0
    # "full_model" clips the norm of all gradients together at CLIP_VALUE; 0.1 in DN. Detectron2's "value" and "norm" work
    # on each parameter by itself.
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    # Precision under SOLVER.AMP.ENABLED: "fp16" (with loss scaling) or "bf16".
    cfg.SOLVER.AMP.DTYPE = "bf16"
    # What a loss or gradient that is not a finite number does: "raise" = the training stops on all ranks before a weight
    # changes, "skip" = the step is left out on all ranks. Both tell the tensor and write nan_report/ (docs/reliability.md).
    cfg.SOLVER.NONFINITE = "raise"
    # How many steps a whole training may skip, resumed parts included, before it stops nevertheless. Steps whose fp16
    # gradient is too large for the loss scale are counted apart; they are no fault.
    cfg.SOLVER.NONFINITE_LIMIT = 10
    # Parts that each process passes its images of a step in, one after the other, to need less memory; 1 = all at once.
    # IMS_PER_BATCH stays the images of a whole step: the gradient, the order of images and the schedule are the same.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # How many periodic checkpoints stay in OUTPUT_DIR, files of earlier runs included; 0 = all. model_best.pth,
    # model_final.pth and the one to resume from are never deleted.
    cfg.SOLVER.CHECKPOINTS_KEPT = 0
    # End the training after PATIENCE evaluations in a row whose AP (of the first test set; with EMA, the larger of both) is
    # not more than MIN_DELTA points above the best before, with model_final.pth and exit code 0. 0 = never.
    cfg.SOLVER.EARLY_STOPPING = CfgNode()
    cfg.SOLVER.EARLY_STOPPING.PATIENCE = 0
    cfg.SOLVER.EARLY_STOPPING.MIN_DELTA = 0.0
    # Seconds that a process waits for the others before it gives up. PyTorch's own default is 600 for NCCL, 1800 for gloo.
    cfg.DIST_TIMEOUT = 600

    # Detections per image; 300 in DAB and DN.
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    # Detections of an image and class that AP counts. 0 = COCO's 100; where an image has more than 100 objects of one class,
    # as many as it has, or DETECTIONS_PER_IMAGE if that is more, and a warning says so.
    cfg.TEST.MAX_DETECTIONS_EVALUATED = 0
    # Images that a process evaluates at a time; detections do not depend on it unless PAD_TO_LARGEST is True.
    cfg.TEST.IMS_PER_BATCH = 1
    # True = images of one batch are padded to the largest at inference, as in the authors' evaluation; convolutions and the
    # deformable family see the padding. False = only images of one size pass the model together.
    cfg.TEST.PAD_TO_LARGEST = False

    # At each evaluation and when the training is over, the losses on so many annotated images of each data set of
    # DATASETS.TEST, evenly spaced by image id; 0 = off, more than there are = all. Without dropout, with the same noise each
    # time; logged as validation/total_loss and validation/<term> (docs/instruments.md).
    cfg.TEST.VALIDATION_LOSS = 0

    # Instruments, see docs/instruments.md. They look at the first data set of DATASETS.TEST, at every evaluation and when
    # the training is over; the values go to TensorBoard and metrics.json. Weights and random streams stay as without them.
    cfg.TEST.INSTABILITY = CfgNode()
    # Images to look at, evenly spaced by image id; 0 = no instruments. DN Sec. 3.2 takes the 5000 of val2017.
    cfg.TEST.INSTABILITY.NUM_IMAGES = 0
    # Look also every so many iterations; 0 = at evaluations only. For equal steps take a divisor of TEST.EVAL_PERIOD.
    cfg.TEST.INSTABILITY.PERIOD = 0
    # k of ATD(k), the mean of the k largest distances between an anchor and its object (DINO Sec. 4). 100 in DINO.
    cfg.TEST.INSTABILITY.ATD_K = 100
    # Box noise (lambda1 = lambda2 of DN, the reach of near copies in DINO) at which the restoring of noised objects is
    # measured; [] = not at all. One pass over the images for each. [0.2, 0.4, 0.8] shows the training's 0.4 and both sides.
    cfg.TEST.INSTABILITY.HEALTH_SCALES = []

    cfg.DEBUG = CfgNode()
    # Before the first step perturb the denoising queries of two training images, and refuse to train if a matching query or
    # another group notices. Costs some decoder passes, about 6 log2(groups).
    cfg.DEBUG.CHECK_DENOISING = False


def setup_cfg(
    config_file: str = "", opts: list | None = None, *, splits: tuple[str, ...] = ("TRAIN", "TEST")
) -> CfgNode:
    """A complete config from a YAML file and overrides, checked; data sets of ``DATASETS.COCO_JSON`` registered.

    Args:
        config_file: path of a YAML file, or "" for the defaults.
        opts: [key, value, key, value, ...] that override the file.
        splits: which of ``DATASETS`` must be at hand: those are read, give ``NUM_CLASSES: auto`` its number, and are
            compared with it. ("TEST",) for evaluation; () for inference with the config.yaml of a finished training.

    Raises:
        ConfigError: an unknown key (with the nearest one), a value that cannot work, or class counts that contradict.
        DatasetError: an annotation file that cannot be used.
    """
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    content = read_config_file(config_file) if config_file else {}
    try:
        cfg.merge_from_other_cfg(CfgNode(_null_for_auto(content)))
        _refuse_keys_below_values(cfg, opts or [])
        cfg.merge_from_list(_without_auto(opts or []))
    except (KeyError, AssertionError, ValueError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise ConfigError(_explain_merge(error, cfg, config_file)) from None
    check_config(cfg)
    used = [name for split in splits for name in cfg.DATASETS[split]]
    for entry in cfg.DATASETS.COCO_JSON:
        if not isinstance(entry, list | tuple) or len(entry) != 3 or not entry[0]:
            raise ConfigError(f"DATASETS.COCO_JSON takes [name, json, image folder] entries, got {entry!r}")
        register_coco_json(*entry, must_exist=entry[0] in used)
    if "TRAIN" in splits and not used and cfg.MODEL.DN_DETR.NUM_CLASSES is None:
        raise ConfigError("MODEL.DN_DETR.NUM_CLASSES is 'auto', but DATASETS names no data set; set the number")
    if used:
        resolve_classes(cfg, used)
    return cfg


def check_config(cfg: CfgNode) -> None:
    """Refuses values that would fail later with a less telling message; the parts of the model check their own keys."""
    check_ranges(cfg)
    _check_instruments(cfg.TEST.INSTABILITY)
    num_classes = cfg.MODEL.DN_DETR.NUM_CLASSES
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise ConfigError(f"MODEL.DN_DETR.NUM_CLASSES must be a positive number or auto, got {num_classes!r}")
    choices = {
        "SOLVER.OPTIMIZER": ("ADAMW",),
        "SOLVER.AMP.DTYPE": ("fp16", "bf16"),
        "SOLVER.NONFINITE": ("raise", "skip"),
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", "value", "norm"),
        "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
        "SOLVER.WARMUP_METHOD": ("linear", "constant"),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
        "INPUT.FORMAT": ("RGB", "BGR"),
        "MODEL.DN_DETR.OP_BACKEND": ("auto", "cuda", "cpu", "torch"),
        "MODEL.DN_DETR.LOSS.CLASS_LOSS": ("focal", "softmax"),
    }
    for key, known in choices.items():
        if _get(cfg, key) not in known:
            raise ConfigError(f"{key} must be one of {known}, got {_get(cfg, key)!r}")
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE != "absolute_range":
        raise ConfigError(f"INPUT.CROP.TYPE must be 'absolute_range' for DETR's crop, got {cfg.INPUT.CROP.TYPE!r}")
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        raise ConfigError(f"MODEL.DEVICE must be cpu, cuda or cuda:N, got {cfg.MODEL.DEVICE!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"MODEL.DEVICE = {cfg.MODEL.DEVICE!r}, but PyTorch sees no GPU; add MODEL.DEVICE cpu")


def _check_instruments(node: CfgNode) -> None:
    scales = node.HEALTH_SCALES
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < float("inf") for x in scales):
        raise ConfigError(f"TEST.INSTABILITY.HEALTH_SCALES takes numbers that are not negative, got {list(scales)}")


def resolve_classes(cfg: CfgNode, datasets: list[str]) -> None:
    """Fills in NUM_CLASSES and CLASS_NAMES from ``datasets`` and compares them with what the config says.

    Classes are the same if their names are: data sets may list them in any order, and may lack some of them. The order of
    the model is that of CLASS_NAMES if the config of a training gives it, else that of the first data set with all names.

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
    classes = _order_of_classes(cfg, known) if known else None
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


def _order_of_classes(cfg: CfgNode, known: dict[str, list[str]]) -> list[str]:
    """The classes of the model in their order.

    Args:
        cfg: the config.
        known: data set -> its classes in its order; those of DATASETS.TRAIN come first.
    """
    node = cfg.MODEL.DN_DETR
    found = list(dict.fromkeys(name for classes in known.values() for name in classes))
    given = list(node.CLASS_NAMES)
    as_many = len(given) == node.NUM_CLASSES and given != list(raw_names())
    if set(given) == set(found) or (as_many and set(given) >= set(found)):
        return given
    trained = [known[name] for name in cfg.DATASETS.TRAIN if name in known]
    if not trained:  # an evaluation: the names decide which rows of a checkpoint are meant
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


def device_is_named(config_file: str, opts: list) -> bool:
    """Whether the user has chosen MODEL.DEVICE, on the command line or in the file, rather than left it to the machine."""
    content = read_config_file(config_file) if config_file else {}
    return "MODEL.DEVICE" in opts or "DEVICE" in (content.get("MODEL") or {})


def _inherited(cfg: CfgNode) -> str:
    """A way out for own data in DATASETS.TRAIN with the test set of the base config."""
    own = {entry[0] for entry in cfg.DATASETS.COCO_JSON}
    theirs = [name for name in cfg.DATASETS.TEST if name not in own]
    if not own & {*cfg.DATASETS.TRAIN} or not theirs:
        return ""
    return (
        f'; DATASETS.TEST {theirs} is the base config\'s: set it to a data set of yours, or to "()" to train without '
        "evaluation"
    )


def _null_for_auto(content: dict) -> dict:
    """A file's content with ``NUM_CLASSES: auto`` as null, in place: yacs would let no number replace a string."""
    node = (content.get("MODEL") or {}).get("DN_DETR") or {}
    if str(node.get("NUM_CLASSES")).lower() == "auto":
        node["NUM_CLASSES"] = None
    return content


def _without_auto(opts: list) -> list:
    """The same for [key, value, ...] overrides."""
    after = zip([None, *opts], opts, strict=False)
    return [None if before == "MODEL.DN_DETR.NUM_CLASSES" and str(x).lower() == "auto" else x for before, x in after]


def _get(cfg: CfgNode, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _refuse_keys_below_values(cfg: CfgNode, opts: list) -> None:
    """yacs does not name the key of SOLVER.BASE_LR.X."""
    values = {name for name in names(cfg) if not isinstance(_get(cfg, name), CfgNode)}
    for key in map(str, opts[::2]):
        for above in accumulate(key.split(".")[:-1], "{}.{}".format):
            if above in values:
                raise KeyError(f"{key} is no key, because {above} is a value and has none below it")


def _explain_merge(error: Exception, cfg: CfgNode, config_file: str) -> str:
    """yacs' complaint as one sentence, with the nearest key for a misspelt one."""
    text = str(error.args[0]) if error.args else repr(error)
    if mismatch := re.search(r"(Type mismatch \(.*?\)).*(for config key: \S+)", text, re.DOTALL):
        text = " ".join(mismatch.groups())  # without the values, which may be whole nodes
    key = text.rsplit(" ", 1)[-1]
    near = nearest_key(key, list(names(cfg))) if text.startswith("Non-existent") else None
    where = f" in {config_file} or on the command line" if config_file else " on the command line"
    hint = f"; did you mean {near}?" if near else ""
    return f"{text}{where}{hint}"
