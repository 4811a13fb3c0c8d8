"""What setup.py builds where, and that it says so: each case in a copy of the sources."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT

CSRC = sorted(ROOT.glob("csrc/**/*.*"))


@pytest.fixture
def build(tmp_path):
    """build(**environment) -> (exit code, output, what _build.txt says); PATH="" hides all compilers."""
    for name in ("setup.py", "pyproject.toml", "README.md", "dn_detr_d2/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")

    def run(**environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith("DN_DETR_")}
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", "setup.py", "build_ext", "--inplace"],
            cwd=tmp_path, env={**env, **environment}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        report = tmp_path / "dn_detr_d2" / "_build.txt"
        return ran.returncode, ran.stdout + ran.stderr, report.read_text() if report.exists() else ""

    return run


def test_nothing_is_built_when_that_is_wished(build):
    code, output, report = build(DN_DETR_NO_EXT="1")
    assert code == 0, output
    assert "DN_DETR_NO_EXT" in report
    assert report.count("\n") == 1
    assert "dn_detr_d2: " + report in output


def test_without_a_compiler_the_installation_goes_on(build):
    code, output, report = build(PATH="/nowhere", CXX="g++-of-nobody")
    assert code == 0, output
    assert "g++-of-nobody" in report
    assert "pip install --no-build-isolation -e ." in report


@pytest.mark.long
def test_a_failing_compiler_does_not_fail_the_installation(build, tmp_path):
    (tmp_path / "csrc" / "registration.cpp").write_text("#error this does not compile\n")
    code, output, report = build(MAX_JOBS="2", DEBUG="1")
    assert code == 0, output[-3000:]
    assert "compiler failed" in report
    assert not list((tmp_path / "dn_detr_d2").glob("*.so"))


def test_cuda_by_force_without_a_toolkit_is_an_error(build):
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("this machine has a toolkit where one is looked for by default")
    code, output, _ = build(DN_DETR_FORCE_CUDA="1", PATH="/usr/bin:/bin", CUDA_HOME="", CUDA_PATH="")
    assert code != 0
    assert re.search("error: .*DN_DETR_FORCE_CUDA.*(CUDA toolkit|PyTorch)", output)


@pytest.fixture
def setup_functions(monkeypatch):
    """The functions of setup.py, without an installation."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("DN_DETR_NO_EXT", "1")
    monkeypatch.delenv("DN_DETR_FORCE_CUDA", raising=False)
    source = (ROOT / "setup.py").read_text().replace("\nsetup(", "\ndict(").replace("    **plan(),\n", "")
    names = {"__file__": str(ROOT / "setup.py"), "__name__": "setup_of_dn_detr_d2"}
    exec(compile(source, "setup.py", "exec"), names)
    return names


ALL = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]


@pytest.mark.parametrize(("known", "chosen"), [
    (ALL, "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
    ([(5, 0), (6, 1), (7, 0), *ALL[:6]], "7.5;8.0;8.6;8.9;9.0+PTX"),  # CUDA 12.6
    ([(9, 0), (10, 0), (12, 0), (14, 0)], "9.0;10.0;12.0+PTX"),  # one that has left the older ones behind
    ([], "8.0;8.6;8.9;9.0+PTX"),
])  # fmt: skip
def test_without_a_gpu_all_kinds_that_nvcc_knows_are_built(setup_functions, known, chosen):
    assert setup_functions["default_architectures"](known) == chosen


def test_nvcc_is_asked_what_it_knows(setup_functions, tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-code ] && printf 'sm_75\\nsm_120\\nsm_90\\ncompute_120\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_functions["known_architectures"]() == [(7, 5), (9, 0), (12, 0)]
    nvcc.unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    assert setup_functions["known_architectures"]() == []


@pytest.mark.parametrize("folder", ["include", "targets/x86_64-linux/include"])
def test_headers_of_pip_are_for_toolkits_without_their_own(setup_functions, tmp_path, monkeypatch, folder):
    import torch

    brought = tmp_path / "site" / "nvidia" / "cu13" / "include"
    brought.mkdir(parents=True)
    (brought / "cusparse.h").touch()
    toolkit = tmp_path / "toolkit"
    (toolkit / folder).mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site" / "torch" / "__init__.py"))
    assert setup_functions["headers_from_pip"]() == [str(brought)]
    (toolkit / folder / "cusparse.h").touch()
    assert setup_functions["headers_from_pip"]() == []


def test_the_library_is_told_its_architectures(setup_functions, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert set(setup_functions["architectures"]().split(",")) == {"sm_80", "sm_90", "compute_90"}


@pytest.mark.parametrize("path", CSRC, ids=lambda p: p.name)
def test_sources_use_current_interfaces_only(path):
    """What made the field's operators fail to build, or fail in silence."""
    text = path.read_text()
    for outdated in (
        r"THC/", r"\bTHCudaCheck", r"\.type\(\)", r"\.data<", r"AT_ERROR", r"AT_ASSERT", r"AT_CHECK", r"AT_CUDA_CHECK",
        r"torch/extension\.h", r"PYBIND11_MODULE", r"\bprintf\(", r"march=native", r"DeprecatedTypeProperties",
    ):  # fmt: skip
        assert not re.search(outdated, text), f"{path.name} contains {outdated}"
    if launches := len(re.findall(r"<<<", text)):
        assert len(re.findall("C10_CUDA_KERNEL_LAUNCH_CHECK\\(\\)", text)) == launches
        assert "CUDAGuard" in text
        assert "getCurrentCUDAStream" in text


def test_no_instruction_set_is_raised_for_the_whole_library():
    assert "march" not in (ROOT / "setup.py").read_text()
    for path in ROOT.glob("csrc/cpu/kernels_avx*.cpp"):
        includes = re.findall(r"#include [<\"](.+)[>\"]", path.read_text())
        assert not any(name.startswith(("ATen", "torch", "c10")) for name in includes)


@pytest.mark.long
def test_objects_of_raised_instruction_sets_share_no_code_with_the_process(tmp_path):
    """A function that the linker may take for another file's would bring AVX to processors without it."""
    if not (shutil.which("g++") and shutil.which("nm")):
        pytest.skip("needs g++ and nm")
    for path in ROOT.glob("csrc/cpu/kernels_avx*.cpp"):
        target = tmp_path / f"{path.stem}.o"
        subprocess.run(["g++", "-std=c++17", "-O3", "-fPIC", "-c", str(path), "-o", str(target)], check=True)
        symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"^\S* [WVu] (?!DW\.ref).*$", symbols, re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_cuda_kernels_compile(tmp_path, architecture):
    """The kernels alone, for each architecture; shows that vector reductions are used where the GPU has them."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("needs nvcc")
    source = tmp_path / "kernels.cu"
    source.write_text(
        "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"
        f'#include "{ROOT}/csrc/cuda/kernels.cuh"\n'
        "using namespace dn_detr_d2;\n"
        "template <bool F, int G, int V, class T, class P, bool U = false> void both(Arguments<T, P> a) {\n"
        "  forward_kernel<F, U, G, V, T, P><<<1, kThreads>>>(a);\n"
        "  backward_kernel<F, U, false, G, V, T, P><<<1, kThreads>>>(a);\n"
        "  backward_kernel<F, U, true, G, V, T, P><<<1, kThreads>>>(a);\n}\n"
        "void all(Arguments<float, float> f, Arguments<__nv_bfloat16, float> b, Arguments<double, double> d) {\n"
        "  both<false, 8, 4>(f); both<true, 8, 4>(f); both<false, 4, 8>(b); both<true, 4, 8>(b); both<true, 32, 1>(d);\n"
        "  both<true, 8, 4, float, float, true>(f);\n}\n"
    )
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        f"-arch=sm_{architecture}",
        "-ptx",
        "-o",
        str(tmp_path / "k.ptx"),
        str(source),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "warning" not in ran.stderr
    ptx = (tmp_path / "k.ptx").read_text()
    assert ("v4.f32" in "".join(line for line in ptx.splitlines() if "atom" in line or "red." in line)) == (
        architecture == "90"
    )


@pytest.mark.long
def test_cpu_kernels_are_built_where_nvcc_fails(build, tmp_path, monkeypatch):
    """An nvcc of another major version than PyTorch's, where a GPU is in sight."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.1, V9.1.85'\n")
    nvcc.chmod(0o755)
    source = (tmp_path / "setup.py").read_text()
    (tmp_path / "setup.py").write_text(
        source.replace("    no_cuda = reason or without_cuda()\n", "    no_cuda = reason\n")
    )
    code, output, report = build(CUDA_HOME=str(nvcc.parent.parent), MAX_JOBS="2", DEBUG="1")
    assert code == 0, output[-3000:]
    assert report.startswith("the CPU kernels were built; no CUDA kernels: "), report
    assert "9.1" in report
    assert "%" not in report
    assert [path.name for path in (tmp_path / "dn_detr_d2").glob("*.so")] == ["_C.abi3.so"]


def test_an_sdist_holds_what_a_wheel_is_built_from(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "dn_detr_d2", "csrc", "configs", "tools"):
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.txt")
        shutil.copytree(source, tmp_path / name, ignore=ignored) if source.is_dir() else shutil.copy(
            source, tmp_path / name
        )
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "sdist", "--formats=tar", "--dist-dir", "made"]
    ran = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"DN_DETR_NO_EXT": "1"}, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    (archive,) = (tmp_path / "made").glob("*.tar")
    with tarfile.open(archive) as content:
        held = {name.split("/", 1)[1] for name in content.getnames() if "/" in name}
    needed = [*CSRC, *ROOT.glob("configs/*.yaml"), ROOT / "tools" / "install_detectron2.py"]
    assert {str(path.relative_to(ROOT)) for path in needed} <= held


def test_an_old_setuptools_is_named(setup_functions, monkeypatch):
    monkeypatch.setattr("setuptools.__version__", "75.2.0")
    with pytest.raises(SystemExit, match=r"setuptools.*77.*75\.2\.0"):
        setup_functions["plan"]()


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("a  b\nc"), "a b c"), (RuntimeError("%s is not %s", "12.4", "13.0"), "12.4 is not 13.0"),
    (OSError(2, "No such file"), "[Errno 2] No such file"), (RuntimeError(), ""),
])  # fmt: skip
def test_errors_are_sentences(setup_functions, error, said):
    assert setup_functions["sentence_of"](error) == said
