"""Figures show the numbers they are given."""

from pathlib import Path

import numpy as np

from klas_hf import plotting


def test_probe_accuracies_are_drawn_from_block_1_with_whole_ticks(tmp_path: Path) -> None:
    figure = plotting.probe_accuracy({"small": [0.2, 0.5, 0.9], "large": [0.1, 0.4]}, tmp_path / "probes.png")
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("block", "probe accuracy")
    assert axes.get_title() == "what each block already knows of the class"
    drawn = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert drawn == [[[1, 0.2], [2, 0.5], [3, 0.9]], [[1, 0.1], [2, 0.4]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["small", "large"]
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert (tmp_path / "probes.png").exists() and (tmp_path / "probes.svg").exists()


def test_ticks_may_fall_between_whole_numbers_unless_told_otherwise() -> None:
    series = [plotting.Series("one", [1, 2], [0.0, 1.0])]
    free = plotting.lines(series, "x", "y", "title").axes[0].get_xticks()
    whole = plotting.lines(series, "x", "y", "title", integer_x=True).axes[0].get_xticks()
    assert any(not float(tick).is_integer() for tick in free)
    assert all(float(tick).is_integer() for tick in whole)


def test_an_axis_may_be_logarithmic() -> None:
    series = [plotting.Series("one", [10, 1000], [0.0, 1.0])]
    scales = [plotting.lines(series, "x", "y", "t", log_x=log).axes[0].get_xscale() for log in (False, True)]
    assert scales == ["linear", "log"]


def test_names_may_stand_in_place_of_numbers() -> None:
    axes = plotting.lines(
        [plotting.Series("one", [0, 1], [3.0, 4.0])], "x", "y", "title", x_names=["few", "many"]
    ).axes[0]
    assert axes.get_xticks().tolist() == [0, 1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["few", "many"]


def test_points_without_a_line_and_error_bars() -> None:
    series = [plotting.Series("one", [1, 2], [0.5, 1.0], error=[0.1, 0.2], line=False), plotting.Series("b", [1], [2])]
    one, other = plotting.lines(series, "x", "y", "title").axes[0].containers
    assert (one.lines[0].get_linestyle(), other.lines[0].get_linestyle()) == ("None", "-")
    bars = one.lines[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.4, 0.6], [0.8, 1.2]])


def test_marks_and_names_of_heatmaps_are_optional() -> None:
    values = np.array([[3.0, 1.0], [2.0, 4.0]])
    plain = plotting.heatmaps({"a": values}, "x", "y").axes[0]
    assert [line.get_xydata().tolist() for line in plain.lines] == [[[2, 1]]]
    marked = plotting.heatmaps({"a": values}, "x", "y", names=(["p", "q"], ["r", "s"]), marks=[(0, 0), (1, 1)]).axes[0]
    assert [line.get_xydata().tolist() for line in marked.lines] == [[[1, 1]], [[2, 2]]]
    assert [label.get_text() for label in marked.get_yticklabels()] == ["p", "q"]
    assert [label.get_text() for label in marked.get_xticklabels()] == ["r", "s"]
    assert not plotting.heatmaps({"a": values}, "x", "y", marks=[]).axes[0].lines


def test_pictures_stand_in_rows_with_white_where_there_is_no_class(tmp_path: Path) -> None:
    image, mask = np.full((4, 6, 3), 128, dtype=np.uint8), np.array([[0, 1, 255, 1, 0, 0]] * 4)
    figure = plotting.pictures({"image": [image] * 2, "label": [mask] * 2}, ["road", "sky"], tmp_path / "shown")
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["image", "", "label", ""]
    assert (shown[0] == 128).all()
    assert shown[2][0, 2].tolist() == [1.0, 1.0, 1.0]
    colours = [tuple(patch.get_facecolor())[:3] for patch in figure.legends[0].get_patches()]
    assert [tuple(shown[2][0, column]) for column in (0, 1)] == colours
    assert (tmp_path / "shown.png").exists()


def test_pictures_of_many_classes_have_a_colour_for_each_that_is_in_them() -> None:
    mask = np.arange(0, 150, 5).reshape(5, 6)
    figure = plotting.pictures({"label": [mask]}, [f"class {number}" for number in range(150)])
    shown = figure.axes[0].images[0].get_array()
    assert len(np.unique(np.asarray(shown).reshape(-1, 3), axis=0)) == 30
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"class {number}" for number in mask.flat]


def test_a_long_legend_lies_beside_the_points() -> None:
    corners = [plotting.Series(str(n), [0, 1, 0, 1], [0, 0, 1, 1]) for n in range(7)]
    figure = plotting.lines(corners, "x", "y", "title")
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert len(legend.get_texts()) == 7
    assert not axes.get_window_extent().overlaps(legend.get_window_extent())
