"""A trained model as a folder for the Hugging Face Hub: weights as safetensors, config.yaml and a model card."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from . import __version__
from .checkpoint import CheckpointFile, read_checkpoint, write_checkpoint
from .checkpoint.checkpointer import classes_of_weights
from .checkpoint.checksums import sum_file
from .checkpoint.hub import SCHEME, WEIGHTS_NAME
from .checkpoint.resume import iterations_of
from .errors import UserError
from .utils.files import atomic_write, sha256_of
from .visualization.runs import Run, read_run

# Keys with paths of the machine that trained.
LOCAL_KEYS = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "MODEL.WEIGHTS_SHA256",
    "MODEL.DN_DETR.DENOISING.LABEL_NOISE.CONFUSION_MATRIX",
)
LOCAL_LISTS = ("DATASETS.COCO_JSON", "DATASETS.COCO_PANOPTIC", "DATASETS.SEM_SEG", "DATASETS.UNLABELED")
CARD_NAME = "README.md"
CARD = """# {name}

{architecture} trained with dn_detr_d2 {version}, an implementation of DN-DETR for Detectron2: {classes}.

## Results

{results}

## Use

In an environment with dn_detr_d2, installed as its `docs/install.md` says, and `pip install huggingface_hub`:

```python
from huggingface_hub import hf_hub_download
from dn_detr_d2 import setup_cfg
from dn_detr_d2.predictor import Predictor

cfg = setup_cfg(
    hf_hub_download("{repo}", "config.yaml"),
    ["MODEL.WEIGHTS", "{scheme}{repo}", "MODEL.WEIGHTS_SHA256", "{sha256}"],
    splits=(),
)
instances = Predictor(cfg)(image)["instances"]  # image: (H, W, 3) uint8 in BGR, as OpenCV reads it
```

`{weights}` has the SHA-256 `{sha256}`; the program reads no other file.

## Training

Data: {data}. {iterations} iterations of {batch} images, {optimizer} with a learning rate of {rate}; every key is in
`config.yaml`. Where the images come from, and what they do not show: *to be filled in*.

## Licence

*To be filled in*, here and as `license` at the top of this file: of the weights, and of the data they were trained on.
"""


def prepare_folder(cfg, folder: Path, repo: str) -> str:
    """Writes what a repository is to hold, and returns the SHA-256 of the weights.

    A model card in the folder that names the repository and these weights is kept: somebody may have completed it.

    Args:
        cfg: of the training, with MODEL.WEIGHTS; its moving average with MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY.
        folder: made if need be; files of other names stay in it.
        repo: "user/name", for the card.

    Raises:
        UserError: MODEL.WEIGHTS cannot be read, see :func:`~.checkpoint.read_checkpoint`, or metrics.json is damaged; the
            folder holds a config.yaml without pushed weights, such as a training's, or the card of another model.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--repo must be user/name, got {repo!r}")
    if (folder / "config.yaml").exists() and not (folder / WEIGHTS_NAME).exists():
        raise UserError(f"{folder} holds a config.yaml that would be overwritten; name another folder with --output")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(classes_of_weights(cfg))
    averaged = cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY
    checkpoint = read_checkpoint(cfg.MODEL.WEIGHTS, averaged=averaged)
    config = portable(cfg)
    names = checkpoint.class_names or list(cfg.MODEL.DN_DETR.CLASS_NAMES)
    folder.mkdir(parents=True, exist_ok=True)
    card = folder / CARD_NAME
    results = results_of(cfg)
    with TemporaryDirectory(dir=folder, prefix=".part-") as draft:
        written = Path(draft) / WEIGHTS_NAME
        write_checkpoint(written, CheckpointFile(checkpoint.state, names, config))
        sha256 = sha256_of(written)
        if card.exists() and not {f"{SCHEME}{repo}", sha256} <= set(re.findall(r'[^\s"`,]+', card.read_text("utf-8"))):
            raise UserError(
                f"{card} does not name {SCHEME}{repo} and the SHA-256 of these weights, {sha256}: it is of another model; "
                "move it away, and take over what you have written into the new one, or name another folder with --output"
            )
        for path in (written, sum_file(written)):
            path.replace(folder / path.name)
    texts = {"config.yaml": config}
    if not card.exists():
        texts[CARD_NAME] = model_card(cfg, repo, sha256, results)
    for name, text in texts.items():
        with atomic_write(folder / name, "w") as file:
            file.write(text)
    return sha256


def portable(cfg) -> str:
    """The config as YAML without paths and device of this machine; data sets keep their names.

    Without its unlabelled images a semi-supervised training is one of annotated images. The weights that are pushed are the
    model's, also where they were an average of others.
    """
    cfg = cfg.clone()
    cfg.defrost()
    changes = [x for key in LOCAL_KEYS for x in (key, "")] + [x for key in LOCAL_LISTS for x in (key, [])]
    cfg.merge_from_list(changes)
    cfg.OUTPUT_DIR, cfg.SEMI_SUPERVISED.ENABLED = "output", False
    cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY = False
    del cfg.MODEL["DEVICE"]  # where the key is not set, it is what the machine has
    return cfg.dump()


def results_of(cfg) -> dict[str, float]:
    """{metric: value} of the evaluation of MODEL.WEIGHTS in the metrics.json beside it; {} if it was not evaluated."""
    path = Path(cfg.MODEL.WEIGHTS)
    if not (path.parent / "metrics.json").is_file():
        return {}
    run = read_run(path.parent)
    done = _iterations_of(path, run)
    prefix = "ema/" if cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY else ""
    found = {}
    for key, points in run.curves.items():
        wanted = re.fullmatch(prefix + r"((?!ema/).*/)?(bbox|segm|panoptic_seg|sem_seg)/[A-Za-z0-9_]+", key)
        if wanted and (value := dict(points.tolist()).get(done)) is not None:
            found[key.removeprefix(prefix)] = value
    return found


def _iterations_of(path: Path, run: Run) -> int:
    """How many iterations a checkpoint has been trained for, by its name; -1 if it does not say."""
    if path.stem == "model_final":
        return int(max(points[-1, 0] for points in run.curves.values()))
    if done := iterations_of(path):
        return done
    record = path.with_name(f"best_metric{path.stem.removeprefix('model_best')}.json")
    if path.stem.startswith("model_best") and record.is_file():
        return int(json.loads(record.read_text())["iteration"]) + 1
    return -1


def model_card(cfg, repo: str, sha256: str, results: dict[str, float]) -> str:
    """The README.md of a repository; its head is what the hub reads.

    Args:
        cfg: of the training.
        repo: "user/name".
        sha256: of the weights.
        results: see :func:`results_of`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    tested = ", ".join(cfg.DATASETS.TEST)
    task = "image-segmentation" if cfg.MODEL.DN_DETR.MASK.ENABLED else "object-detection"
    data = ModelCardData(
        license="unknown",
        library_name="dn_detr_d2",
        pipeline_tag=task,
        tags=["detectron2", cfg.MODEL.META_ARCHITECTURE],
        model_name=repo.split("/")[1],
        eval_results=[
            EvalResult(task, tested, tested, metric, round(value, 2), metric_name=metric)
            for metric, value in results.items()
        ]
        or None,
    )
    node, solver = cfg.MODEL.DN_DETR, cfg.SOLVER
    rows = "\n".join(f"| {metric} | {value:.1f} |" for metric, value in results.items())
    table = f"On {tested}, 0 to 100:\n\n| metric | value |\n|---|---|\n{rows}"
    names = ", ".join(map(_escaped, node.CLASS_NAMES))
    body = CARD.format(
        name=repo.split("/")[1],
        repo=repo,
        scheme=SCHEME,
        weights=WEIGHTS_NAME,
        sha256=sha256,
        architecture=f"{cfg.MODEL.META_ARCHITECTURE} ({node.QUERY_SOURCE.NAME}, {node.DECODER.NAME})",
        version=__version__,
        classes=f"{node.NUM_CLASSES} classes" + (f" ({names})" if names else ""),
        results=table if results else "These weights were not evaluated; *to be filled in*.",
        data=(", ".join(cfg.DATASETS.TRAIN) or "not named")
        + (", and images without annotations by pseudo labels" if cfg.SEMI_SUPERVISED.ENABLED else ""),
        iterations=solver.MAX_ITER,
        batch=solver.IMS_PER_BATCH,
        optimizer=solver.OPTIMIZER,
        rate=solver.BASE_LR,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _escaped(name: str) -> str:
    """A class name as text of Markdown, where it could be a link or HTML."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(name.split()))


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads what :func:`prepare_folder` wrote as one commit and returns its hash; the repository is made if need be.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        files = [WEIGHTS_NAME, f"{WEIGHTS_NAME}.sha256", "config.yaml", CARD_NAME]
        return api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=files, commit_message=f"dn_detr_d2 {__version__}"
        ).oid
    except Exception as error:  # of the network, or of the hub
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{repo} cannot be pushed: {reason}; log in with `hf auth login`; what was to be pushed lies in {folder}"
        ) from None
