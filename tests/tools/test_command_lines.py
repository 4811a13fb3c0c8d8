"""What all programs of tools/ and dev/ have in common: how they refuse bad input, and how they take overrides."""

from importlib import import_module

import pytest
from conftest import ROOT

from dn_detr_d2.command_line import BAD_INPUT

CONFIG = str(ROOT / "configs" / "quickstart.yaml")
OF_CONFIG = ["--config-file", CONFIG]
OF_IMAGE = [*OF_CONFIG, "--output", "/nowhere/out", "--input", "/nowhere.png", "--weights", "/nowhere.pth"]
OF_DATASET = [*OF_CONFIG, "--dataset", "shapes_val", "--weights", "/nowhere.pth"]
UNKNOWN_OPTION = ["--no-such-option"]
# program -> a command line with a mistake that is no mistake of argparse, where the program has one
BAD = {
    "tools.analyze_model": ["--config-file", "/nowhere.yaml"],
    "tools.check_dataset": ["/nowhere.json", "/"],
    "tools.convert_checkpoint": ["/nowhere.pth", "/nowhere/out.pth", *OF_CONFIG],
    "tools.convert_dataset": ["voc", "/nowhere", "/nowhere", "/nowhere/out.json"],
    "tools.export_model": [*OF_CONFIG, "--format", "onnx", "--output", "/nowhere/out"],
    "tools.find_label_errors": OF_DATASET,
    "tools.install_detectron2": UNKNOWN_OPTION,
    "tools.make_report": [*OF_CONFIG, "OUTPUT_DIR", "/nowhere"],
    "tools.measure_instability": [*OF_CONFIG, "--dataset", "shapes_val", "--checkpoints", "/nowhere.pth"],
    "tools.plot_runs": ["/nowhere"],
    "tools.propose_regions": ["/nowhere", "/nowhere/out.json"],
    "tools.push_to_hub": [*OF_CONFIG, "--repo", "user/name"],
    "tools.quickstart": UNKNOWN_OPTION,
    "tools.visualize_attention": OF_IMAGE,
    "tools.visualize_denoising": [*OF_CONFIG, "--output", "/nowhere/out", "--groups", "0"],
    "dev.ablate_bccd": ["--bccd", "/nowhere"],
    "dev.benchmark_criterion": ["--rounds", "0"],
    "dev.benchmark_detector": [*OF_CONFIG, "--rounds", "0"],
    "dev.benchmark_evaluation": ["--rounds", "0"],
    "dev.benchmark_export": ["dino_R50_4scale_12ep", "--rounds", "0"],
    "dev.benchmark_loader": ["--rounds", "0"],
    "dev.benchmark_masks": ["--rounds", "0"],
    "dev.benchmark_ms_deform_attn": ["--rounds", "1"],
    "dev.benchmark_self_attention": ["--rounds", "0"],
    "dev.compare_runs": ["--jobs", "0"],
    "dev.count_cuda_instructions": UNKNOWN_OPTION,
    "dev.count_l2_reads": ["--height", "0"],
    "dev.count_operators": ["--config-file", "/nowhere.yaml"],
    "dev.denoising_pictures": ["--output", "/proc/no/such"],
    "dev.fuzz_ms_deform_attn": ["--cases", "0"],
    "dev.measure_few_labels": ["--bccd", "/nowhere"],
    "dev.measure_prompting": ["--seeds", "1", "--runs", "/nowhere", "--report"],
    "dev.plant_errors": ["/nowhere.json", "--output", "/nowhere/out.json"],
    "dev.readme_picture": ["--output", "/proc/no/such.png"],
    "dev.stress_test": ["no-such-scenario"],
}
# program with overrides -> a command line that is right up to them
OVERRIDDEN = {
    "tools.analyze_model": OF_CONFIG,
    "tools.convert_checkpoint": BAD["tools.convert_checkpoint"],
    "tools.find_label_errors": [*OF_CONFIG, "--dataset", "shapes_val", "--weights", CONFIG],
    "tools.make_report": OF_CONFIG,
    "tools.measure_instability": [*OF_CONFIG, "--checkpoints", CONFIG, CONFIG, "--dataset", "shapes_val"],
    "tools.push_to_hub": [*OF_CONFIG, "--repo", "user/name", "--weights", "/nowhere.pth"],
    "tools.visualize_attention": OF_IMAGE,
    "tools.visualize_denoising": [*OF_CONFIG, "--output", "/nowhere/out"],
    "dev.ablate_bccd": ["--bccd", "/nowhere"],
    "dev.measure_few_labels": ["--bccd", "/nowhere"],
    "dev.benchmark_detector": [*OF_CONFIG, "--size", "32", "32", "--rounds", "1"],
    "dev.benchmark_loader": ["--dataset", "shapes_train"],
    "dev.count_operators": OF_CONFIG,
    "dev.compare_runs": ["--quick", "--jobs", "1", "--pairs", "dense", "--report"],
    "dev.measure_prompting": ["--seeds", "1", "--runs", "/nowhere", "--report"],
}


@pytest.fixture
def run(capsys, monkeypatch):
    """run(program, *arguments) -> (exit code, lines on stderr with "error:", all of stderr)."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the import of stress_test sets it

    def call(program, *arguments):
        try:
            code = import_module(program).main(list(arguments))
        except SystemExit as end:  # argparse's
            code = end.code
        text = capsys.readouterr().err
        return code, [line for line in text.splitlines() if "error:" in line], text

    return call


def test_every_program_is_in_the_table():
    found = {f"{folder}.{path.stem}" for folder in ("tools", "dev") for path in (ROOT / folder).glob("[!_]*.py")}
    assert found == BAD.keys()


@pytest.mark.parametrize("program", BAD)
def test_bad_input_is_one_line_and_one_exit_code(run, program):
    code, errors, text = run(program, *BAD[program])
    assert code == BAD_INPUT
    assert len(errors) == 1, text
    assert "Traceback" not in text


@pytest.mark.parametrize("spelling", [[], ["--opts"]], ids=["at the end", "--opts"])
@pytest.mark.parametrize("program", OVERRIDDEN)
def test_overrides_are_read_in_both_spellings(run, tmp_path, monkeypatch, program, spelling):
    monkeypatch.chdir(tmp_path)  # compare_runs makes a folder
    code, errors, text = run(program, *OVERRIDDEN[program], *spelling, "MODEL.DN_DETR.NUM_QUERRIES", "3")
    assert code == BAD_INPUT
    assert len(errors) == 1, text
    assert "MODEL.DN_DETR.NUM_QUERIES" in errors[0]


@pytest.mark.parametrize(
    "program", ["tools.find_label_errors", "tools.visualize_attention", "tools.visualize_denoising"]
)
@pytest.mark.parametrize("arguments", [["--weights", "/no/such.pth"], ["MODEL.WEIGHTS", "/no/such.pth"]])
def test_weights_are_read_in_both_spellings(run, tmp_path, monkeypatch, program, arguments):
    rest = {
        "tools.find_label_errors": ["--dataset", "shapes_val"],
        "tools.visualize_attention": ["--output", str(tmp_path), "--input", str(tmp_path / "a.png")],
        "tools.visualize_denoising": ["--output", str(tmp_path), "--dataset", "shapes_val"],
    }[program]
    monkeypatch.setattr("dn_detr_d2.visualization.models.DetrDatasetMapper", lambda *_: lambda record: record)
    code, errors, text = run(program, *OF_CONFIG, *rest, *arguments)
    assert code == BAD_INPUT
    assert len(errors) == 1, text
    assert "/no/such.pth" in errors[0]


@pytest.mark.parametrize("program", ["tools.find_label_errors", "tools.visualize_attention"])
def test_weights_that_are_needed_are_asked_for(run, tmp_path, program):
    rest = {
        "tools.find_label_errors": ["--dataset", "shapes_val"],
        "tools.visualize_attention": ["--output", str(tmp_path), "--input", str(tmp_path / "a.png")],
    }[program]
    code, errors, _ = run(program, *OF_CONFIG, *rest)
    assert code == BAD_INPUT
    assert "MODEL.WEIGHTS" in errors[0]
