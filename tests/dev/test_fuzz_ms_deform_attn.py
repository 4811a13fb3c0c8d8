"""Random calls against slow loops, the long ones under sanitizers, and the proof that the fuzzer finds what it looks for."""

import pytest

from dev.fuzz_ms_deform_attn import build, find_compiler, run

pytestmark = pytest.mark.skipif(not find_compiler(), reason="needs a C++ compiler")


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["plain", "sanitized"])
def program(request):
    return build(sanitize=request.param)


def test_kernels_agree_with_the_definition(program):
    code, output = run(program, seed=0, first=0, cases=400, cuda_every=20)
    assert code == 0, output[-4000:]
    assert output.count(" 0 mismatches") == 1
    assert output.count("20 on the CUDA emulator") == 1


@pytest.mark.long
def test_kernels_agree_with_the_definition_and_stay_in_their_memory():
    program = build()
    code, output = run(program, seed=0, first=0, cases=20_000, cuda_every=500, jobs=2)
    assert code == 0, output[-4000:]
    assert output.count(" 0 mismatches") == 2
    assert output.count("20 on the CUDA emulator") == 2


@pytest.mark.long
def test_a_read_past_the_end_is_found():
    code, output = run(build(), seed=0, first=0, cases=200, cuda_every=0, plant="shapes")
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output


def test_a_wrong_formula_is_found(program):
    code, output = run(program, seed=0, first=0, cases=30, cuda_every=2, plant="formula")
    assert code != 0
    assert ", default: N" in output
    assert ", cuda: N" in output


@pytest.mark.long
def test_points_that_are_loaded_in_pairs_from_an_odd_element_are_found():
    """A GPU ends the process' CUDA context there; the operators copy such tensors first, as the emulator does unplanted."""
    code, output = run(build(), seed=0, first=0, cases=200, cuda_every=1, plant="alignment")
    assert code != 0
    assert "misaligned address" in output
    assert "kernels.cuh" in output


def test_sums_whose_order_changes_are_found(program):
    """The emulator runs blocks and threads in another order each time; only sorted sums do not depend on it."""
    code, output = run(program, seed=0, first=0, cases=40, cuda_every=1, plant="order")
    assert code != 0
    assert ", cuda, sorted again: N" in output
    assert ", cuda, sorted: N" not in output


def test_a_case_can_be_repeated_by_its_number(program):
    once, again = (run(program, seed=3, first=17, cases=1, cuda_every=0, plant="formula") for _ in range(2))
    assert once == again
    assert run(program, seed=3, first=0, cases=40, cuda_every=0, plant="formula")[1].count("case 17,") == once[1].count(
        "case 17,"
    )
