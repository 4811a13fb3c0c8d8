"""Curves and tables of runs, from metrics files that are written by hand."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from naming import naming
from PIL import Image

from dn_detr_d2 import UserError
from dn_detr_d2.visualization import group_runs, read_run
from dn_detr_d2.visualization.curves import AP, AVERAGED_AP
from tools import plot_runs


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, lines, **config) -> folder with metrics.json and, with a config, config.yaml."""

    def make(name, lines, **config):
        folder = tmp_path / name
        folder.mkdir()
        text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.json").write_text(text)
        if config:
            (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        return folder

    return make


def lines_of(aps, time=0.5, **more):
    """Lines of a run that evaluates every 20 iterations; the last evaluation has a line of its own, as Detectron2 writes."""
    lines = [
        {"iteration": 20 * i + 19, "time": time, "total_loss": 9.0 - i, "loss_main": 3.0 - i} for i in range(len(aps))
    ]
    for line, ap in zip(lines[:-1], aps, strict=False):
        line |= {"bbox/AP": ap, "bbox/AP50": 2 * ap}
    return [*lines, {"iteration": 20 * len(aps), "bbox/AP": aps[-1], "bbox/AP50": 2 * aps[-1], **more}]


def seeds_of(make_run, name, *curves, **config):
    config = {"MODEL": {"X": name}, **config}
    return [
        make_run(f"{name}{i}", lines_of(aps), SEED=i, OUTPUT_DIR=f"{name}{i}", **config) for i, aps in enumerate(curves)
    ]


def test_iterations_are_counted_when_done_and_the_last_evaluation_stands_at_the_last_step(make_run):
    run = read_run(make_run("a", lines_of([1.0, 2.0, 5.0])))
    assert run.curve("bbox/AP").tolist() == [[20, 1.0], [40, 2.0], [60, 5.0]]
    assert run.curve("loss_main").tolist() == [[20, 3.0], [40, 2.0], [60, 1.0]]


def test_seconds_are_the_medians_times_the_iterations_they_stand_for(make_run):
    lines = [
        {"iteration": 19, "time": 0.5},
        {"iteration": 29, "bbox/AP": 7.0},
        {"iteration": 39, "time": 2.0},
        {"iteration": 49, "time": 1.0},
    ]
    run = read_run(make_run("a", lines))
    assert run.clock.tolist() == [[0, 0], [20, 10], [40, 50], [50, 60]]
    assert run.curve("bbox/AP", "seconds").tolist() == [[30.0, 7.0]]  # half of the way from 10 to 50
    assert run.seconds_an_iteration == 1.0


def test_of_a_resumed_run_the_last_line_for_an_iteration_wins(make_run):
    lines = [
        {"iteration": 19, "time": 1, "loss_main": 5},
        {"iteration": 39, "time": 1, "loss_main": 4},
        {"iteration": 39, "time": 3, "loss_main": 2},
        {"iteration": 59, "time": 1, "loss_main": 1},
    ]
    run = read_run(make_run("a", lines))
    assert run.curve("loss_main").tolist() == [[20, 5], [40, 2], [60, 1]]
    assert run.clock[:, 1].tolist() == [0, 20, 80, 100]


def test_the_last_layer_and_the_first_test_set_are_shown(make_run):
    more = {"instability/layer_9": 3.0, "instability/layer_10": 2.0, "z/bbox/AP": 11.0, "a/bbox/AP": 12.0}
    lines = [{"iteration": 19, "time": 1.0, **more}]
    run = read_run(make_run("a", lines, DATASETS={"TEST": ["a", "z"]}))
    assert run.curve(r"instability/layer_\d+").tolist() == [[20, 2.0]]
    assert run.curve(AP).tolist() == [[20, 12.0]]


@pytest.mark.parametrize(("named", "expected", "averaged"), [
    ({"bbox/AP": 5.0, "ema/bbox/AP": 20.0}, 5.0, 20.0),
    ({"bbox/AP": 5.0, "segm/AP": 4.0, "ema/bbox/AP": 20.0, "ema/segm/AP": 19.0}, 4.0, 19.0),
    ({"a/bbox/AP": 5.0, "z/bbox/AP": 6.0, "ema/a/bbox/AP": 20.0, "ema/z/bbox/AP": 21.0}, 5.0, 20.0),
])  # fmt: skip
def test_ap_is_of_the_weights_and_that_of_their_average_apart(make_run, named, expected, averaged):
    run = read_run(make_run("a", [{"iteration": 19, "time": 1.0, **named}], DATASETS={"TEST": ["a", "z"]}))
    assert run.curve(AP).tolist() == [[20, expected]]
    assert run.curve(AVERAGED_AP[0]).tolist() == [[20, averaged]]


def test_a_picture_without_a_suffix_is_a_png_and_a_folder_is_refused(make_run, tmp_path, capsys):
    folder = str(make_run("a", lines_of([1.0, 2.0])))
    assert plot_runs.main([folder, "--output", str(tmp_path / "cmp")]) == 0
    assert Path(capsys.readouterr().out.split("picture: ")[1].split()[0]) == tmp_path / "cmp.png"
    assert Image.open(tmp_path / "cmp.png").format == "PNG"
    assert plot_runs.main([folder, "--output", folder]) == 2
    assert naming(folder, "folder").search(capsys.readouterr().err)


def test_values_that_are_not_numbers_are_no_points(make_run):
    run = read_run(
        make_run("a", '{"iteration": 19, "bbox/AP": NaN, "time": 1}\n{"iteration": 39, "bbox/AP": 4, "time": 1}\n')
    )
    assert run.curve("bbox/AP").tolist() == [[40, 4]]


def test_runs_that_differ_by_seed_and_folder_are_one_group(make_run):
    folders = [
        *seeds_of(make_run, "a", [1, 2], [3, 4]),
        *seeds_of(make_run, "b", [5, 6]),
        make_run("bare", lines_of([1])),
    ]
    folders.append(make_run("bare_too", lines_of([1])))
    groups = group_runs([read_run(folder) for folder in folders])
    assert [[run.name for run in group.runs] for group in groups] == [["a0", "a1"], ["b0"], ["bare"], ["bare_too"]]
    assert groups[0].name == "a0 and 1 more"


def test_the_band_is_the_mean_and_the_lowest_and_highest_run(make_run):
    folders = seeds_of(make_run, "a", [1.0, 4.0, 6.0], [3.0, 2.0, 9.0], [2.0, 3.0, 9.0])
    (group,) = group_runs([read_run(folder) for folder in folders])
    assert group.band("bbox/AP").tolist() == [[20, 2, 1, 3], [40, 3, 2, 4], [60, 8, 6, 9]]
    assert group.band("bbox/AP", "seconds")[:, 0].tolist() == [10, 20, 30]
    assert group.band("bbox/AR") is None


def test_runs_of_different_pace_are_compared_at_equal_iterations(make_run):
    config = {"MODEL": 1}
    fast, slow = make_run("f", lines_of([0.0, 4.0], 0.5), **config), make_run("s", lines_of([2.0, 6.0], 1.0), **config)
    (group,) = group_runs([read_run(fast), read_run(slow)])
    # 20 iterations take 10 and 20 seconds, 40 take 20 and 40.
    assert group.band("bbox/AP", "seconds").tolist() == [[15, 1, 0, 2], [30, 5, 4, 6]]


def test_the_band_ends_where_the_first_run_ends(make_run):
    folders = seeds_of(make_run, "a", [1.0, 2.0, 3.0], [3.0, 4.0])
    (group,) = group_runs([read_run(folder) for folder in folders])
    assert group.band("bbox/AP")[:, :2].tolist() == [[20, 2], [40, 3]]


def test_the_table_has_the_numbers_of_the_files(make_run, tmp_path, capsys):
    base, better = seeds_of(make_run, "base", [1, 3, 2], [2, 2, 4]), seeds_of(make_run, "better", [2, 9, 8], [1, 2, 1])
    assert (
        plot_runs.main([*map(str, base + better), "--labels", "old", "new", "--output", str(tmp_path / "p.png")]) == 0
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert rows[0] == ["old", "2", "3.00 (2.00 to 4.00)", "3.50 (3.00 to 4.00)", "50 (40 to 60)", "0.5"]
    assert rows[1] == ["new", "2", "4.50 (1.00 to 8.00)", "5.50 (2.00 to 9.00)", "40, 1 of 2 runs", "0.5"]


def test_without_ap_the_table_says_so_and_the_losses_are_drawn(make_run, tmp_path, capsys):
    run = make_run("a", [{"iteration": 19, "loss_main": 2.0}])
    assert plot_runs.main([str(run), "--output", str(tmp_path / "p.png")]) == 0
    assert "| a       | 1      | -          | -         | -" in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "p.png").shape[0] < 300  # one row of panels, and without times one column


def test_the_picture_has_a_row_for_each_quantity_and_both_colours(make_run, tmp_path):
    more = {"instability/layer_5": 4.0, "anchors/distance": 0.3}
    folders = [make_run("a", lines_of([1, 2], **more), M=1), *seeds_of(make_run, "b", [1, 3], [2, 5])]
    plot_runs.draw(group_runs([read_run(folder) for folder in folders]), tmp_path / "new" / "p.png")
    picture = matplotlib.image.imread(tmp_path / "new" / "p.png")
    assert picture.shape[:2] == (1250, 1040)  # 5 rows of 2.5 inches, 2 columns of 5.2, at 100 dots an inch
    for wanted in ("#0072B2", "#D55E00"):
        rgb = np.array([int(wanted[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(picture[:, :, :3] - rgb).max(-1) < 0.01).sum() > 100


def test_a_half_written_last_line_is_left_out_with_a_warning(make_run, capsys):
    run = read_run(make_run("a", '{"iteration": 19, "loss_main": 2.0}\n{"iteration": 39, "loss_m'))
    assert run.curve("loss_main").tolist() == [[20, 2.0]]
    assert naming("line 2").search(capsys.readouterr().err)


GOOD = '{"iteration": 19, "time": 1}\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", ["empty"]),
        (GOOD + '{"iteration": 3\n' + GOOD, ["line 2"]),
        (GOOD + GOOD + '{"iteration": 3\n', ["line 3"]),  # its end is there: nobody was killed
        (GOOD + "[1]\n", ["line 2"]),
        ('{"time": 1}\n', ["line 1"]),
        ('{"iteration": 1, "time": "long"}\n', ["line 1", "time", "'long'"]),
        ('{"iteration": 1', ["empty"]),  # killed while it wrote the first line
        (GOOD + "\0\0\0\n", ["line 2"]),
    ],
)
def test_a_damaged_file_is_one_sentence_that_names_the_line(make_run, capsys, text, named):
    folder = make_run("a", text)
    with pytest.raises(UserError):
        read_run(folder)
    assert plot_runs.main([str(folder)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {folder / 'metrics.json'}")
    assert naming(*named).search(last)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["run"]),
        (["nowhere"], ["nowhere", "metrics.json"]),
        (["{run}", "--labels", "a", "b"], ["--labels", 2, 1]),
        (["--group", "name"], ["--group", "'name'", "NAME=RUN,RUN"]),
        (["--group", "name=a,,b"], ["--group", "'name=a,,b'", "NAME=RUN,RUN"]),
        (["--group", "x={run}", "--group", "x={run}"], ["'x'"]),
        (["{run}", "--output", "p.xyz"], ["p.xyz"]),
        (["{run}", "--output", "{run}/metrics.json/p.png"], ["p.png"]),
        (["{other}"], ["runs"]),
    ],
)
def test_bad_commands_are_one_sentence(make_run, capsys, arguments, named):
    names = {"run": make_run("run", lines_of([1])), "other": make_run("other", [{"iteration": 1, "lr": 1.0}])}
    assert plot_runs.main([a.format(**names) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert naming(*named).search(error)
    assert error.count("\n") == 1


def test_a_config_that_cannot_be_read_is_refused(make_run, capsys):
    folder = make_run("a", GOOD)
    (folder / "config.yaml").write_text("a: [1\n")
    assert plot_runs.main([str(folder)]) == 2
    assert "config.yaml" in capsys.readouterr().err
