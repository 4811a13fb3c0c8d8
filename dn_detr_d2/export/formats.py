"""The formats of exported files: writing one, and loading it again as a function of tensors."""

import copy
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import MultiScaleDeformableAttention
from ..modeling.tensor_model import TensorModel
from ..utils.requirements import is_installed
from .metadata import INPUTS, output_names

OPSETS = (18, 19, 20)
LEAST_SIZE = 65  # pixels; below, a level of one cell would be taken for a constant
Run = Callable[[Tensor, Tensor], list[Tensor]]


def trace(model: nn.Module, *, keep_operator: bool) -> torch.export.ExportedProgram:
    """The graph of a detector with batch, height and width left open.

    Args:
        model: a :class:`~dn_detr_d2.modeling.DenoisingDETR` on the CPU; it is not changed.
        keep_operator: keep deformable attention as the package's own operator, where it is compiled. False = PyTorch's
            operators, which other runtimes know.
    """
    tensors = TensorModel(copy.deepcopy(model).eval())
    if not keep_operator:
        for module in tensors.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.backend = "torch"
    step = max(model.size_divisibility, 1)
    height, width = (-(-size // step) * step for size in (256, 320))
    images = torch.zeros(2, 3, height, width)
    sizes = torch.tensor([(height, width), (height - 20, width - 30)])
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad(), _quiet():
        return torch.export.export(
            tensors, (images, sizes), dynamic_shapes=({0: free, 2: free, 3: free}, {0: free}), strict=False
        )


def write_onnx(
    model: nn.Module, path: Path, metadata: dict[str, str], *, opset: int = 20, fp16: bool = False, int8: bool = False
) -> None:
    """Writes an ONNX file with inputs ``images`` (N, 3, H, W) float32 and ``sizes`` (N, 2) int64.

    Args:
        model: see :func:`trace`.
        path: of the file; an existing one is overwritten.
        metadata: of :func:`~.metadata.describe`.
        opset: one of :data:`OPSETS`.
        fp16: compute in float16; inputs and outputs stay float32.
        int8: weights of matrix products and convolutions as 8-bit integers, activations quantised as they come.

    Raises:
        ConfigError: onnx, onnxscript or onnxruntime is missing.
    """
    require_onnx()
    import onnx

    with _quiet():
        # optimize=True loses constants of equal names and says that all is well
        program = torch.onnx.export(
            trace(model, keep_operator=False),
            opset_version=opset,
            input_names=list(INPUTS),
            output_names=output_names(model),
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        program.save(path, external_data=False)
        if int8:
            _quantize(path)
        content = onnx.load(path)
        if fp16:
            from onnxruntime.transformers.float16 import convert_float_to_float16

            content = convert_float_to_float16(content, keep_io_types=True)
    for node in content.graph.node:
        node.ClearField("metadata_props")  # lines of source code and their paths, a fifth of a small file
    onnx.helper.set_model_props(content, metadata)
    onnx.save(content, path)


def _quantize(path: Path) -> None:
    """Rewrites an ONNX file with 8-bit weights."""
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".int8-") as folder:
        folded, small = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        options = SessionOptions()
        options.log_severity_level = 3  # errors
        # Weights that are transposed in the graph, or asked for their shape, would stay as they are.
        options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        InferenceSession(path, options, providers=["CPUExecutionProvider"])
        kinds = ["MatMul", "Gemm", "Conv"]
        quantize_dynamic(folded, small, op_types_to_quantize=kinds, weight_type=QuantType.QUInt8)
        shutil.move(small, path)


def write_torch_export(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Writes a file for ``torch.export.load`` after ``import dn_detr_d2``, whose operator it keeps."""
    with _quiet():
        torch.export.save(trace(model, keep_operator=True), path, extra_files=metadata)


def write_aoti(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Writes a package of compiled code for this kind of processor; it needs the package's compiled operator.

    Raises:
        ConfigError: there is no C++ compiler.
    """
    if not shutil.which("g++") and not shutil.which("clang++"):
        raise ConfigError("--format aoti compiles C++ code, but there is no g++ or clang++; install one")
    from torch._inductor import aoti_compile_and_package

    with _quiet():
        aoti_compile_and_package(
            trace(model, keep_operator=True),
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": metadata},
        )


def load_onnx(path: Path) -> Run:
    """An ONNX file as a function of images and sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; what it could not fold is no news
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        values = (images.float().numpy(), sizes.long().numpy())
        return [torch.from_numpy(x) for x in session.run(None, dict(zip(INPUTS, values, strict=True)))]

    return _run


def load_torch_export(path: Path) -> Run:
    """A file of ``torch.export`` as a function of images and sizes."""
    module = torch.export.load(path).module()
    return lambda images, sizes: list(module(images.float(), sizes.long()))


def load_aoti(path: Path) -> Run:
    """A package of AOTInductor as a function of images and sizes."""
    from torch._inductor import aoti_load_package

    package = aoti_load_package(str(path))
    return lambda images, sizes: list(package(images.float(), sizes.long()))


# Name -> (ending of the file, writer, reader).
FORMATS: dict[str, tuple[str, Callable[..., None], Callable[[Path], Run]]] = {
    "onnx": (".onnx", write_onnx, load_onnx),
    "torch_export": (".pt2", write_torch_export, load_torch_export),
    "aoti": ("_aoti.pt2", write_aoti, load_aoti),
}


def require_onnx() -> None:
    """Raises ConfigError unless the packages that write and run ONNX files are installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if not is_installed(name):
            raise ConfigError(f"--format onnx needs the package {name}; pip install 'dn_detr_d2[export]' brings it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own code; their errors remain."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
