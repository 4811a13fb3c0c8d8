"""Every configuration key that this project adds to Detectron2.

Each key says what it does, its unit, the paper's symbol where there is one, and where its default comes from. "DN" is
DN-DETR (CVPR 2022) and its released code, "DAB" is DAB-DETR, "DD" is Deformable DETR.
"""

import torch
from detectron2.config import CfgNode


def add_dn_detr_config(cfg: CfgNode) -> None:
    """Adds this project's keys to a Detectron2 config, in place (Detectron2's convention for projects)."""
    # The meta-architecture of this project. Detectron2's GeneralizedRCNN gets denoising by MODEL.ROI_HEADS.NAME
    # DenoisingROIHeads or DenoisingCascadeROIHeads; of MODEL.DN_DETR it reads NUM_CLASSES, CLASS_NAMES and DENOISING.
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
    # also 91: its raw ids, as the official models count. setup_cfg() also sets MODEL.ROI_HEADS.NUM_CLASSES and
    # MODEL.RETINANET.NUM_CLASSES to it.
    node.NUM_CLASSES = None
    # Names of the classes in order of their ids. Filled in by training and kept in config.yaml, so that pictures have
    # names where the data set is not at hand.
    node.CLASS_NAMES = []
    # Anchors per image; the number of queries is this times max(QUERY_SOURCE.NUM_PATTERNS, 1). 300 in DAB and DN.
    node.NUM_QUERIES = 300
    # Channels C of the transformer. 256 in all published models.
    node.HIDDEN_DIM = 256
    # Weights that a training from scratch starts with, where published codes differ. "detr": every matrix of encoder and
    # decoder from Xavier, deformable attention on its rays, box heads from zero. "dn_encoder_only" (DN's code of the model
    # with a deformable encoder only): also the matrices of deformable attention and the patterns from Xavier; box heads and
    # the projections of the maps as PyTorch starts them. "anchor_detr": input projections of attention from Xavier, all else
    # of encoder and decoder as PyTorch starts it, and the layers as copies of the first.
    node.INITIALIZATION = "detr"
    # Backbone maps that enter the neck, high resolution first. DN: ["res5"]; deformable: ["res3", "res4", "res5"]. Low
    # resolution first in Mask2Former and some of the Mask DINO models, which changes the order of the levels.
    node.IN_FEATURES = ["res5"]
    # Levels L of the pyramid; levels beyond IN_FEATURES are made by stride-2 convolutions. DN: 1; DD: 4.
    node.NUM_FEATURE_LEVELS = 1

    # Images are padded to multiples of this many pixels; 0 = what the backbone asks for. 32 in Mask2Former and Mask DINO.
    node.SIZE_DIVISIBILITY = 0

    # What computes deformable attention: "auto" = the compiled kernel of the device where there is one, else PyTorch's
    # operators, and says which; "cuda", "cpu" = that kernel or an error; "torch" = PyTorch's operators (the reference).
    node.OP_BACKEND = "auto"
    # What torch.compile compiles for training, with sizes as symbols: "" nothing (default), "encoder" the layers of the
    # encoder, "all" these, those of the decoder, and the backbone. The first step takes minutes. Not with
    # ACTIVATION_CHECKPOINTING of the same layers; evaluation and exports are not compiled (docs/performance.md).
    node.COMPILE = ""

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
    # LearnedPositions (DETR), LearnedPoints (Anchor DETR), LearnedMaskQueries (Mask2Former), MaskDinoQueries (Mask DINO) or
    # LearnedMaskAnchors (Mask DINO without two stages).
    node.QUERY_SOURCE.NAME = "LearnedAnchors"
    # Content of matching queries: "zero" (DAB), "unknown" = embedding of the unknown label (DN), "learned" (deformable;
    # with TopKAnchors DINO's mixed query selection), "memory" = the chosen cells (TopKAnchors only, pure selection).
    node.QUERY_SOURCE.CONTENT = "unknown"
    # MaskDinoQueries: where the first boxes come from: "" = the box head, "mask2box" or "bitmask" = the masks of the
    # proposals; bitmask counts the last row and column in. mask2box in the 46.3 AP model, bitmask in the 46.1 AP model.
    node.QUERY_SOURCE.BOXES_FROM_MASKS = ""
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
    # StaticDecoder (plain DD, Anchor DETR), NormalisedStaticDecoder (DETR), MaskedDecoder (Mask2Former) or MaskDinoDecoder.
    node.DECODER.NAME = "LookForwardTwiceDecoder"
    # ConditionalDecoderLayer (DAB, DN), MultiLevelConditionalDecoderLayer (DN-Deformable with a deformable encoder only),
    # DeformableDecoderLayer (DAB- and DN-Deformable), DinoDecoderLayer, or of DD PointDecoderLayer (plain),
    # FirstPointDecoderLayer (box refinement), QueryDecoderLayer (two stages); PlainDecoderLayer (DETR),
    # RowColumnDecoderLayer (Anchor DETR), MaskedDecoderLayer (Mask2Former).
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

    # Whether focal class heads start at the probability 0.01. False in Mask DINO.
    node.DECODER.CLASS_PRIOR = True
    # Clamp of the logit of a reference box before it is corrected. 1e-3 in DAB, DN and DINO, 1e-5 in DD.
    node.DECODER.LOGIT_EPS = 1e-3

    # Masks (Mask2Former, Mask DINO; docs/masks.md).
    node.MASK = CfgNode()
    # A pixel decoder, and a mask head beside the class head. Training then needs a mask of every object. Padding is a part
    # of the image: nothing in the model is told of it.
    node.MASK.ENABLED = False
    # Backbone map of a quarter of the image's size that the pixel decoder adds to the finest level of the encoder.
    node.MASK.FEATURE = "res2"
    # Points at which masks are compared, n: all of them uniform in matching; in the loss IMPORTANCE_SAMPLE_RATIO * n are the
    # most uncertain ones of OVERSAMPLE_RATIO * n. 112^2, 0.75 and 3 in Mask2Former.
    node.MASK.NUM_POINTS = 12544
    node.MASK.IMPORTANCE_SAMPLE_RATIO = 0.75
    node.MASK.OVERSAMPLE_RATIO = 3.0
    # What inference returns, by Detectron2's names: any of "instances", "panoptic_seg", "sem_seg".
    node.MASK.OUTPUTS = ["instances"]
    # Classes that are things, by number; [] = those that the data set calls things, filled in by training, else all.
    node.MASK.THING_CLASSES = []
    # Panoptic: queries of less probability are dropped; so are regions of which less than OVERLAP_THRESHOLD is left beside
    # the others. 0.8 and 0.8 in Mask2Former, 0.25 and 0.8 in Mask DINO.
    node.MASK.OBJECT_THRESHOLD = 0.8
    node.MASK.OVERLAP_THRESHOLD = 0.8
    # Instances: multiply the class probability by the mean probability of the mask's pixels.
    node.MASK.SCORE_BY_MASK = True
    # Panoptic and semantic output of focal models: softmax(sigmoid / TEMPERATURE) stands for the probabilities. 0.06 in Mask
    # DINO.
    node.MASK.TEMPERATURE = 0.06

    node.DENOISING = CfgNode()
    # Class that makes the noised targets: DenoisingGenerator (DN), ContrastiveDenoisingGenerator (DINO),
    # BudgetDenoisingGenerator (Mask DINO), or "" to train by matching alone (DAB).
    node.DENOISING.NAME = "DenoisingGenerator"
    # Groups of noised copies ("scalar" in the official code). 5 in DN.
    node.DENOISING.NUM_GROUPS = 5
    # Chance that a label is redrawn, gamma in DN Sec. 4.1; 0.2 in the official code, which does not halve it.
    node.DENOISING.LABEL_NOISE_PROB = 0.2
    # Largest centre shift in half widths and heights, lambda1 in DN Sec. 4.1; 0.4 in the official code. Also the largest
    # shift of masks.
    node.DENOISING.CENTER_NOISE_SCALE = 0.4
    # Largest change of width and height in widths and heights, lambda2 in DN Sec. 4.1; 0.4 in the official code.
    node.DENOISING.SIZE_NOISE_SCALE = 0.4
    # Kind of box noise, of the two scales above (docs/noise.md): uniform (DN), gaussian, truncated_gaussian, iou_targeted,
    # scale_aware, or one of your own. Contrastive denoising has only its own.
    node.DENOISING.BOX_NOISE = CfgNode()
    node.DENOISING.BOX_NOISE.NAME = "uniform"
    # scale_aware only: a side below this, in sides of the image, is noised as if it had this length. COCO's limit of small
    # objects, 32 pixels, in an image of 640.
    node.DENOISING.BOX_NOISE.REFERENCE_SIZE = 0.05
    # Which label is drawn where one is redrawn: uniform (DN), class_frequency, confusion, or one of your own.
    node.DENOISING.LABEL_NOISE = CfgNode()
    node.DENOISING.LABEL_NOISE.NAME = "uniform"
    # class_frequency only: objects of each class, in the order of the model. [] = counted in DATASETS.TRAIN and filled in by
    # training.
    node.DENOISING.LABEL_NOISE.CLASS_COUNTS = []
    # confusion only: the confusion_matrix.json that an evaluation writes into OUTPUT_DIR/inference.
    node.DENOISING.LABEL_NOISE.CONFUSION_MATRIX = ""
    # What the scales of the box noise are multiplied with during training: constant (START all along), linear or cosine,
    # from START in the first iteration to END in the last of SOLVER.MAX_ITER. The papers have no schedule.
    node.DENOISING.NOISE_SCHEDULE = CfgNode()
    node.DENOISING.NOISE_SCHEDULE.NAME = "constant"
    node.DENOISING.NOISE_SCHEDULE.START = 1.0
    node.DENOISING.NOISE_SCHEDULE.END = 1.0
    # Contrastive and budget only: NUM_QUERIES // objects of the fullest image is the number of groups; 0 = NUM_GROUPS. 100
    # in DINO and Mask DINO.
    node.DENOISING.NUM_QUERIES = 100
    # Contrastive only: reach of the near copies' corners in half sizes, the far ones move one to two times as far. 1.0 in
    # all published DINO runs (their config files say 0.4, their scripts override it).
    node.DENOISING.CORNER_NOISE_SCALE = 1.0
    # Contrastive only: swap corners that have crossed. Off in the official code, where at scale 1 seven in sixteen far
    # copies have a width or height that is not positive.
    node.DENOISING.KEEP_CORNER_ORDER = False
    # Hard limit on denoising queries; 0 = none. Above it contrastive denoising has fewer groups, and one group, or each of a
    # fixed number of groups, gets a fresh random subset of an image's objects.
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
    # Known objects (DN-DETR, TPAMI 2024; docs/prompting.md): floor(KNOWN_FRACTION * P) classes, drawn once from KNOWN_SEED,
    # are known. Their objects are the denoising part, in training and in evaluation, and matching queries see them; the
    # objects of the other classes are to be found. 0 = off; 0.5 and 0.7 in the paper. Needs NUM_GROUPS 1.
    node.DENOISING.KNOWN_FRACTION = 0.0
    node.DENOISING.KNOWN_SEED = 0
    # Known labels (the same paper): a training step looks for one class of each image, whose label embedding is the content
    # of all matching queries; an evaluation asks for each class that is in the image. For fine-tuning with a small BASE_LR.
    node.DENOISING.LABEL_PROMPTS = False
    # R-CNN only: a class loss of the noised regions besides their box loss. Off, because nearly one in ten of them overlaps
    # its object by less than the 0.5 from which a proposal counts as foreground.
    node.DENOISING.REGION_CLASS_LOSS = False

    # Mask2Former: of how many decoder layers, from the first, the noised mask is the attention mask; after them it is the
    # query's own prediction, as for every other query. 1 = noised once, as an anchor is; 9 in MP-Former.
    node.DENOISING.MASK_LAYERS = 1
    # Restore masks too. False = the ablation of the DN-DETR TPAMI paper (Mask DINO's DN "standard").
    node.DENOISING.MASK_LOSS = True

    node.MATCHER = CfgNode()
    # Weights of the matching costs: focal class cost, L1 of cxcywh in [0, 1], GIoU. 2, 5, 2 in DAB and DN.
    node.MATCHER.CLASS_COST = 2.0
    # Which class cost: "focal", "softmax" (minus the probability, of LOSS.CLASS_LOSS softmax alone), or "" = as the loss.
    # The semantic Mask DINO has the focal cost beside the softmax loss.
    node.MATCHER.CLASS_COST_KIND = ""
    node.MATCHER.L1_COST = 5.0
    node.MATCHER.GIOU_COST = 2.0
    # Of models with masks: binary cross-entropy and dice at NUM_POINTS points. 5 and 5 in Mask2Former and Mask DINO.
    node.MATCHER.MASK_COST = 5.0
    node.MATCHER.DICE_COST = 5.0

    node.LOSS = CfgNode()
    # Weights of the losses, the same for every decoder layer: 1, 5, 2 in DAB and DN.
    node.LOSS.CLASS_WEIGHT = 1.0
    node.LOSS.L1_WEIGHT = 5.0
    node.LOSS.GIOU_WEIGHT = 2.0
    node.LOSS.MASK_WEIGHT = 5.0
    node.LOSS.DICE_WEIGHT = 5.0
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
    # Parts that a training leaves as they are, by name: "backbone", "neck", "encoder", "query_source", "decoder" and what
    # else the model has (of mask models "pixel_decoder"), or parts of these, such as "decoder.layers.0". The statistics
    # of their batch norms stay too. MODEL.BACKBONE.FREEZE_AT freezes the first stages of the backbone alone.
    cfg.MODEL.FREEZE = []
    # Backbone "build_swin_backbone" (maps p0 to p3): "T", "S", "B" or "L", and the chance that a residual branch is
    # dropped in training, growing to this rate in the last block (needs the package timm). 0.2 in DINO.
    cfg.MODEL.SWIN = CfgNode({"SIZE": "T", "DROP_PATH_RATE": 0.2})
    # Backbone "build_timm_backbone": NAME of a network of timm; its map of stride 2^i is res{i}, IN_FEATURES chooses some.
    # NORM "FrozenBN" (as loaded), "BN" (trained), "SyncBN" (statistics of all GPUs) or "" (what the network has).
    # MODEL.BACKBONE.FREEZE_AT counts as in Detectron2's ResNets: 1 = the stem, 2 = also what makes res2.
    cfg.MODEL.TIMM = CfgNode({"NAME": "tf_efficientnet_lite0", "NORM": "FrozenBN"})
    # Backbone "build_vitdet_backbone" (maps p2 to p5; needs timm): "B" or "L", and the same chance. 0.1 in ViTDet-B.
    cfg.MODEL.VIT = CfgNode({"SIZE": "B", "DROP_PATH_RATE": 0.1})

    # Exponential moving average of the weights (EMA), with d2go's keys: after each step of the optimizer the average becomes
    # DECAY * average + (1 - DECAY) * weights; buffers are copied. It is kept in each checkpoint ("model_ema"), evaluated
    # beside the weights under "ema/", and has its own best checkpoint, model_best_ema.pth. Costs one more set of weights.
    cfg.MODEL_EMA = CfgNode()
    cfg.MODEL_EMA.ENABLED = False
    # In [0, 1). The average looks back about 1 / (1 - DECAY) steps. 0.9997 in DINO's code, where it is off by default.
    cfg.MODEL_EMA.DECAY = 0.9997
    # After n steps the decay is at most (1 + n) / (10 + n), as in TensorFlow: the average looks back over about a ninth of
    # the training until DECAY is reached. False = DECAY from the first step on; the weights of the start then stay long.
    cfg.MODEL_EMA.WARMUP = True
    # Evaluation, demo.py and the predictor read the average of MODEL.WEIGHTS, a checkpoint of a training with EMA.
    cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY = False

    # Semi-supervised training (docs/few_labels.md): the moving average of the weights (MODEL_EMA) labels weakly augmented
    # images of DATASETS.UNLABELED; the model learns these pseudo labels from strongly augmented ones, beside its annotated
    # images. UT: Unbiased Teacher (Liu et al., ICLR 2021), SD: Semi-DETR (Zhang et al., CVPR 2023), both on COCO.
    cfg.SEMI_SUPERVISED = CfgNode()
    cfg.SEMI_SUPERVISED.ENABLED = False
    # Iterations with annotated images alone; then the average begins anew from the weights, and is asked. Below
    # SOLVER.MAX_ITER. 2000 in UT.
    cfg.SEMI_SUPERVISED.BURN_IN = 2000
    # Unlabelled images for each annotated one of IMS_PER_BATCH, a whole number. 1 in UT, 2 in SD.
    cfg.SEMI_SUPERVISED.UNLABELED_RATIO = 1
    # Detections below this score are no pseudo labels. 0.4 in SD, 0.7 in UT, of softmax.
    cfg.SEMI_SUPERVISED.THRESHOLD = 0.4
    # Thresholds of single classes that differ from it: [[class name, threshold], ...].
    cfg.SEMI_SUPERVISED.CLASS_THRESHOLDS = []
    # Of detections that overlap by more, of whatever class, the best one is a pseudo label; 1 = all.
    cfg.SEMI_SUPERVISED.NMS = 0.7
    # Factor of the matching losses of unlabelled images. Their sums are divided by the number of their own pseudo labels, or
    # of the annotated objects of the step if that is larger. 4 in SD, and for class losses alone in UT.
    cfg.SEMI_SUPERVISED.LOSS_WEIGHT = 4.0
    # Factor of their denoising losses, which are divided likewise. With 4, what many copies of a box say leaves too little
    # of a clipped step to matching (docs/evidence/README.md).
    cfg.SEMI_SUPERVISED.DENOISING_WEIGHT = 1.0
    # What learns from pseudo labels: any of "matching", "denoising". Denoising bypasses the matching, which wrong boxes
    # would upset.
    cfg.SEMI_SUPERVISED.LOSSES = ["matching", "denoising"]
    # Whether the losses of a pseudo label are weighted by its score.
    cfg.SEMI_SUPERVISED.WEIGHTED = True
    # Box noise of a pseudo label of score s is f = 1 + NOISE_GROWTH * (1 - s) times as large; 0 = as that of annotations.
    # Where f * SIZE_NOISE_SCALE exceeds 1, some sides become 0.
    # Of contrastive denoising, whose near copies have a limit, a corner moves by u^(1/f) of it instead of u in [0, 1).
    cfg.SEMI_SUPERVISED.NOISE_GROWTH = 1.0

    # What SEMI_SUPERVISED takes: names of data sets (of DATASETS.COCO_JSON or of Detectron2; whatever they annotate is left
    # out, and files without annotations are fine), or folders of images, relative as in COCO_JSON.
    cfg.DATASETS.UNLABELED = ()
    # COCO-format data sets to register: [[name, annotation json, image folder], ...], paths relative to the environment
    # variable DETECTRON2_DATASETS (default ./datasets) unless absolute.
    cfg.DATASETS.COCO_JSON = []
    # Panoptic data sets in COCO's format: [[name, panoptic json, folder of panoptic png, image folder], ...], and semantic
    # ones: [[name, image folder, folder of semantic maps (png), class names (one a line, or a data.yaml)], ...].
    cfg.DATASETS.COCO_PANOPTIC = []
    cfg.DATASETS.SEM_SEG = []
    # Crop branch of the training augmentation (DETR): with probability 0.5 the image is resized so that its shorter side
    # is one of RESIZE, then cropped to a width and a height drawn from SIZE (pixels), before the usual resize.
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = [384, 600]
    cfg.INPUT.CROP.RESIZE = [400, 500, 600]
    # Augmentation of the training: "detr" = flip, resize, and the crop branch; "lsj" = large-scale jittering (Mask2Former,
    # Mask DINO): flip, resize to a square of IMAGE_SIZE times a factor from MIN_SCALE to MAX_SCALE (aspect ratio kept), crop
    # to a square of IMAGE_SIZE or pad to it with grey 128; "semantic" = flip, resize by MIN_SIZE_TRAIN, crop and pad to
    # IMAGE_SIZE. Padding is a part of these images. 1024, 0.1 and 2.0 in Mask2Former; 512 for ADE20K.
    # INPUT.RANDOM_FLIP also takes "both": horizontal and vertical flips, independently of each other.
    cfg.INPUT.AUGMENTATION = "detr"
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0
    # "semantic" only: SSD's changes of colours (needs OpenCV; True for ADE20K in Mask2Former), and the share of a crop that
    # one class may have, of the best of ten crops; 1 = any (Mask2Former).
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Images without boxes are trained on, as the official code does; Detectron2's default drops them.
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    # Batches of like aspect ratio would change the order of the data; the official code has none.
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    # "ADAMW" (all DETRs) or "SGD" with Detectron2's SOLVER.MOMENTUM and NESTEROV (R-CNNs).
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
    # The same of embeddings (queries, labels, levels of the decoder; Swin's position biases); null = as of other weights. 0
    # in Mask2Former.
    cfg.SOLVER.WEIGHT_DECAY_EMBED = None
    # Iterations of linear warm-up; the official recipes have none.
    cfg.SOLVER.WARMUP_ITERS = 0
    # LR_SCHEDULER_NAME "WarmupPolyLR" (DeepLab's, beside Detectron2's): (1 - iteration / MAX_ITER) to this power. 0.9 in
    # Mask2Former.
    cfg.SOLVER.POLY_LR_POWER = 0.9
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
    # not more than MIN_DELTA points above the last that was, with model_final.pth and exit code 0. 0 = never. Patience does
    # not run out within SEMI_SUPERVISED.BURN_IN; later evaluations must be better than those within it.
    cfg.SOLVER.EARLY_STOPPING = CfgNode()
    cfg.SOLVER.EARLY_STOPPING.PATIENCE = 0
    cfg.SOLVER.EARLY_STOPPING.MIN_DELTA = 0.0
    # Seconds that a process waits for the others before it gives up. PyTorch's own default is 600 for NCCL, 1800 for gloo.
    cfg.DIST_TIMEOUT = 600

    # Detections per image; 300 in DAB and DN.
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    # Class-wise NMS of these: of two whose boxes have a larger IoU than this only the better one is kept. 1 = none, as in
    # the papers; less, such as 0.7, where a model finds objects more than once (docs/predictor.md).
    cfg.TEST.NMS = 1.0
    # Detections of an image and class that AP counts. 0 = COCO's 100; where an image has more than 100 objects of one class,
    # as many as it has, or DETECTIONS_PER_IMAGE if that is more, and a warning says so.
    cfg.TEST.MAX_DETECTIONS_EVALUATED = 0
    # Names of the classes that AP is averaged over (their numbers where the data set has no names); [] = all, with
    # DENOISING.KNOWN_FRACTION the unknown ones.
    cfg.TEST.AP_CLASSES = []
    # Images that a process evaluates at a time; detections do not depend on it unless PAD_TO_LARGEST is True.
    cfg.TEST.IMS_PER_BATCH = 1
    # True = images of one batch are padded to the largest at inference, as in the authors' evaluation; convolutions and the
    # deformable family see the padding. False = only images of one size pass the model together.
    cfg.TEST.PAD_TO_LARGEST = False
    # True = padding is kept out of convolutions, norms and positions at inference (docs/predictor.md), so that an image has
    # the detections that it has alone but for rounding, with PAD_TO_LARGEST and with any SIZE_DIVISIBILITY. For Detectron2's
    # ResNets; not for Anchor DETR and models with masks.
    cfg.TEST.HIDE_PADDING = False
    # True = predictor and --eval-only fold batch norms into the convolutions before them (Detectron2's ResNets) and store
    # convolutions channels last; detections are the same but for rounding. Detectron2's own detectors stay as they are.
    cfg.TEST.FOLD_NORMS = True
    # What autocast computes in wherever images are detected: evaluation, the periodic one too, the predictor, `dn-detr
    # predict`. "" = float32, "bf16" (on CPUs only with instructions for it), "fp16" (on GPUs only). Scores, boxes and masks
    # come out in float32 in any case; losses of validation, TEST.INSTABILITY and exports are not concerned. With
    # SEMI_SUPERVISED the teacher's detections are.
    cfg.TEST.AMP = ""
    # True = torch.compile compiles the model for evaluation and the predictor, once for all image sizes; it takes a minute
    # or more.
    cfg.TEST.COMPILE = False
    # So many CUDA graphs, one for each size of a batch with its padding, are recorded and replayed in evaluation and the
    # predictor; the least recently used one is discarded. 0 = none. GPUs only, for fewer gaps between kernels
    # (docs/predictor.md). Images with known objects or labels pass without.
    cfg.TEST.CUDA_GRAPHS = 0
    # Side in pixels of the square tiles in which evaluation, the predictor and `dn-detr predict` look at images; 0 = whole
    # images. Each tile is resized by INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST as if it were an image (docs/predictor.md).
    cfg.TEST.TILE = CfgNode()
    cfg.TEST.TILE.SIZE = 0
    # Part of a tile that it shares with the next, at least. An object that is smaller than it lies wholly in some tile.
    cfg.TEST.TILE.OVERLAP = 0.2

    # At each evaluation and when the training is over, the losses on so many annotated images of each data set of
    # DATASETS.TEST, evenly spaced by image id; 0 = off, more than there are = all. Without dropout, with the same noise each
    # time; logged as validation/total_loss and validation/<term> (docs/diagnostics.md).
    cfg.TEST.VALIDATION_LOSS = 0

    # Diagnostics, see docs/diagnostics.md. They look at the first data set of DATASETS.TEST, every PERIOD iterations and at
    # the end of the training; the values go to TensorBoard and metrics.json. Weights and random states stay the same.
    cfg.TEST.INSTABILITY = CfgNode()
    # Images to look at, evenly spaced by image id; 0 = no diagnostics. DN Sec. 3.2 takes the 5000 of val2017.
    cfg.TEST.INSTABILITY.NUM_IMAGES = 0
    # Iterations between two looks; 0 = TEST.EVAL_PERIOD. An epoch in the paper.
    cfg.TEST.INSTABILITY.PERIOD = 0
    # k of ATD(k), the mean of the k largest distances between an anchor and its object (DINO Sec. 4). 100 in DINO.
    cfg.TEST.INSTABILITY.ATD_K = 100
    # Box noise (lambda1 = lambda2 of DN, the reach of near copies in DINO) at which the restoring of noised objects is
    # measured; [] = not at all. One pass over the images for each. [0.2, 0.4, 0.8] shows the training's 0.4 and both sides.
    cfg.TEST.INSTABILITY.HEALTH_SCALES = []

    # OUTPUT_DIR/report/index.html at the end of a training (docs/report.md; the extra [report]): "auto" = where its packages
    # are installed, "always" = or the training is refused, "never".
    cfg.REPORT = "auto"
    # Where scalars go besides TensorBoard and metrics.json: any of "wandb", "mlflow", which are extras too (docs/report.md).
    cfg.LOGGERS = []
    # A live bar of iterations, loss and remaining time on stderr, where that is a terminal.
    cfg.PROGRESS_BAR = True
    # What computes COCO's AP: "pycocotools" = Detectron2's compiled form of it, or "faster_coco_eval" (the extra
    # [fast-eval]); the numbers are the same (docs/performance.md).
    cfg.TEST.COCO_EVAL = "pycocotools"

    cfg.DEBUG = CfgNode()
    # Before the first step perturb the denoising queries of two training images, and refuse to train if a matching query or
    # another group notices. Costs some decoder passes, about 6 log2(groups).
    cfg.DEBUG.CHECK_DENOISING = False
