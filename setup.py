"""Builds the operators of csrc/ where that is possible, and ships configs/; everything else stands in pyproject.toml.

    pip install --no-build-isolation -e .

No compiler, no CUDA and no GPU are needed: what cannot be built is left out, the package then uses PyTorch's own
operators, and one line says what was built and why (also kept in dn_detr_d2/_build.txt, because pip hides it).

DN_DETR_NO_EXT=1        build nothing
DN_DETR_FORCE_CUDA=1    build the CUDA kernels although no GPU is in sight; a failure is then an error
TORCH_CUDA_ARCH_LIST    GPU architectures, as for every PyTorch extension (default: the GPU in sight, else those
                        from 7.5 to 12.0 that nvcc knows, the newest as PTX too)
MAX_JOBS                compilers at a time, if ninja is installed
DEBUG=1                 no optimisation, debug symbols
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
REPORT = "_build.txt"
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")  # Python without the lock has no limited interface
REBUILD = "pip install --no-build-isolation -e . builds it"


def flag(name: str) -> bool:
    """Whether an environment variable is set to something that means yes."""
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")


def without_extension() -> str:
    """Why nothing can be built, or ""."""
    if flag("DN_DETR_NO_EXT"):
        return "DN_DETR_NO_EXT is set"
    if sys.platform == "win32":
        return "the kernels need GCC or Clang, not MSVC"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"PyTorch cannot be imported while building ({error}); {REBUILD}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
        return f"no C++ compiler was found (looked for {compiler}, g++, clang++); install one, then {REBUILD}"
    return ""


def find_cuda_home() -> str:
    """Folder of the CUDA toolkit, or "". Asks nvcc, which may be a script that lies elsewhere."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home
    if nvcc := shutil.which("nvcc"):
        answer = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", answer, re.MULTILINE):
            return str(Path(top.group(1)).resolve())
    return "/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else ""


def without_cuda() -> str:
    """Why the CUDA kernels are left out, or ""."""
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} has no CUDA"
    if not flag("DN_DETR_FORCE_CUDA") and not torch.cuda.is_available():
        return "PyTorch sees no GPU (DN_DETR_FORCE_CUDA=1 builds them all the same)"
    if not find_cuda_home():
        return "no CUDA toolkit was found (nvcc is not on PATH and CUDA_HOME is not set)"
    return ""


def make_extension(with_cuda: bool):
    """The one extension module, with or without the CUDA sources."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = ["csrc/registration.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))]
    optimize = ["-O0", "-g"] if flag("DEBUG") else ["-O3"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    limited = ["-DPy_LIMITED_API=0x030A0000"] if LIMITED else []
    flags = {"cxx": [*optimize, *openmp, *limited, "-Wall", "-fvisibility=hidden"]}
    more = {}
    if with_cuda:
        sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
        flags["cxx"].append("-DDN_DETR_WITH_CUDA")
        flags["nvcc"] = [*optimize, *limited, "-lineinfo"]
        more["include_dirs"] = headers_from_pip()
    kind = CUDAExtension if with_cuda else CppExtension
    return kind(
        "dn_detr_d2._C", sources, extra_compile_args=flags, extra_link_args=openmp, py_limited_api=LIMITED, **more
    )


def headers_from_pip() -> list[str]:
    """Folders of CUDA headers that PyTorch's pip packages bring, if the toolkit has no cusparse.h; else none.

    PyTorch's headers include those of the CUDA libraries, which a toolkit may lack. Where it has them, pip's, which may
    be of another version, must not come before them.
    """
    import torch

    if has_library_headers(Path(find_cuda_home())):
        return []
    packages = Path(torch.__file__).parent.parent / "nvidia"
    return [str(path) for path in sorted(packages.glob("*/include")) if (path / "cusparse.h").exists()]


def has_library_headers(toolkit: Path) -> bool:
    """Whether the headers of the CUDA libraries lie where nvcc looks for headers."""
    return any(found for folder in ("include", "targets/*/include") for found in toolkit.glob(f"{folder}/cusparse.h"))


def prepare_cuda() -> None:
    """Tells PyTorch's build tools where the toolkit is, and which GPUs to build for if none can be asked."""
    import torch
    from torch.utils import cpp_extension

    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = find_cuda_home()
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(known_architectures())


def known_architectures() -> list[tuple[int, int]]:
    """(major, minor) of what nvcc compiles for, oldest first; empty if it does not say."""
    nvcc = Path(find_cuda_home(), "bin", "nvcc")
    command = [str(nvcc) if nvcc.exists() else "nvcc", "--list-gpu-code"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return []
    return sorted({(int(major), int(minor)) for major, minor in re.findall(r"\bsm_(\d+)(\d)\b", answer)})


def default_architectures(known: list[tuple[int, int]]) -> str:
    """One of each kind from Turing (7.5) to Blackwell (12.0) that nvcc knows; the newest as PTX too, for what comes later.

    Left out are those of embedded boards, and 10.3 and 12.1, which run the code of 10.0 and 12.0.
    """
    wanted = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    chosen = [x for x in wanted if x in known] or [(8, 0), (8, 6), (8, 9), (9, 0)]  # an nvcc that does not answer
    return ";".join(f"{major}.{minor}" for major, minor in chosen) + "+PTX"


def architectures() -> str:
    """What PyTorch's build tools pass to nvcc, in one word for the library to remember: "sm_80,sm_90,compute_90"."""
    from torch.utils import cpp_extension

    flags = cpp_extension._get_cuda_arch_flags()
    return ",".join(name for flag in flags for name in re.findall(r",code=\[?([\w,]+)", flag))


def sentence_of(error: Exception) -> str:
    """What an error says, in one line; PyTorch gives some of its texts apart from what belongs into them."""
    text, *values = error.args or ("",)
    try:
        text = text % tuple(values) if values else str(error)
    except TypeError:
        text = str(error)
    return " ".join(str(text).split())[:300]


def report(sentence: str, *folders: Path) -> None:
    """Says what was built, and writes it where the package finds it."""
    print(f"dn_detr_d2: {sentence}", flush=True)
    for folder in folders:
        if folder.is_dir():
            (folder / REPORT).write_text(sentence + "\n")


def plan() -> dict:
    """The arguments of setup(): the commands, and the extension if it can be built."""
    if int(setuptools.__version__.split(".")[0]) < 77:  # it would not read pyproject.toml, and say something else
        raise SystemExit(
            f"error: setuptools >= 77 is needed, this is {setuptools.__version__}: pip install -U setuptools"
        )
    forced = flag("DN_DETR_FORCE_CUDA") and not flag("DN_DETR_NO_EXT")
    reason = without_extension()
    no_cuda = reason or without_cuda()
    if forced and no_cuda:
        raise SystemExit(f"error: DN_DETR_FORCE_CUDA is set, but {no_cuda}")
    if reason:
        report(f"no kernels were built: {reason}", ROOT / "dn_detr_d2")
        return {"cmdclass": {"build_py": BuildWithConfigs}}
    if not no_cuda:
        prepare_cuda()
    commands = {"build_py": BuildWithConfigs, "build_ext": build_command(no_cuda)}
    return {"ext_modules": [make_extension(with_cuda=not no_cuda)], "cmdclass": commands}


def build_command(no_cuda: str):
    """The build_ext command. ``no_cuda``: why CUDA is left out, "" if it is not."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Falls back from CUDA to CPU kernels, and from those to none, unless CUDA was asked for."""

        def finalize_options(self) -> None:
            """As BuildExtension's; an older library is never taken for up to date, for headers and PyTorch change too."""
            super().finalize_options()
            self.force = True

        def build_extensions(self) -> None:
            reason = no_cuda
            try:
                if not no_cuda:
                    self.extensions[0].extra_compile_args["cxx"].append(
                        f"-DDN_DETR_CUDA_ARCHITECTURES={architectures()}"
                    )
                super().build_extensions()
                built = "the CPU kernels were built" if no_cuda else "the CPU and CUDA kernels were built"
            except Exception as error:
                if flag("DN_DETR_FORCE_CUDA"):
                    raise
                reason = f"the compiler failed ({sentence_of(error)}); pip install -v shows its output"
                print(f"dn_detr_d2: building failed: {error}", file=sys.stderr)
                built = "no kernels were built" if no_cuda else self.build_without_cuda()
            if built == "no kernels were built":
                self.extensions = []  # or setuptools would look for what is not there
                sentence = f"{built}: {reason}"
            else:
                sentence = f"{built}; no CUDA kernels: {reason}" if reason else built
            report(sentence, ROOT / "dn_detr_d2", Path(self.build_lib) / "dn_detr_d2")

        def build_without_cuda(self) -> str:
            """The second try, with the same extension, of which setuptools has noted where it goes."""
            vars(self.extensions[0]).update(vars(make_extension(with_cuda=False)))
            try:
                super().build_extensions()
            except Exception as error:
                print(f"dn_detr_d2: building without CUDA failed too: {error}", file=sys.stderr)
                return "no kernels were built"
            return "the CPU kernels were built"

    return Build


class BuildWithConfigs(build_py):
    """Copies the top-level folder configs/ into the package, where dn_detr_d2.model_zoo finds it after installation.

    An editable installation has it beside the package.
    """

    def run(self) -> None:
        """As build_py's."""
        super().run()
        for source, target in self.configs().items():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def configs(self) -> dict[Path, Path]:
        """{source: where it goes}; empty for an editable installation."""
        if self.editable_mode:
            return {}
        folder = Path(self.build_lib) / "dn_detr_d2" / "configs"
        return {path: folder / path.name for path in sorted(ROOT.glob("configs/*.yaml"))}

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """As build_py's."""
        return [*super().get_outputs(include_bytecode), *map(str, self.configs().values())]


setup(
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
    **plan(),
)
