"""Scores know the names of their axes and the labels of their places."""

import pytest
import torch

from contrans_tl.diagnostics import Diagnosis, Scores
from contrans_tl.diagnostics.scores import heads, layers

GRID = Scores(torch.tensor([[0.1, -3.0, 0.2], [2.0, float("nan"), 0.0]]), {"layer": layers([3, 5]), "head": heads(3)}, "nats")


def test_the_top_places_are_labelled_by_layer_and_head_and_hold_no_nan():
    assert GRID.top(2) == [("L3H1", -3.0), ("L5H0", 2.0)]
    assert GRID.top(1, by="value") == [("L5H0", 2.0)]
    assert len(GRID.top(99)) == 5
    with_position = Scores(torch.arange(8.0).view(2, 2, 2), {"position": ("a", "b"), "layer": layers(2), "head": heads(2)})
    assert with_position.top(1) == [("L1H1 b", 7.0)]
    assert Scores(torch.ones(1, 1), {"layer": layers(1), "site": ("attn",)}).top(1) == [("L0 attn", 1.0)]


def test_places_are_found_by_label_or_number_and_what_is_not_there_is_named():
    assert GRID.at(layer="L3", head=1) == -3.0
    assert GRID.at(layer="L5").axes == {"head": ("H0", "H1", "H2")} and GRID.at(head="H0").values.tolist() == pytest.approx(
        [0.1, 2.0]
    )
    for wrong in ({"layer": "L4"}, {"head": 3}, {"neuron": 1}):
        with pytest.raises(ValueError, match="there is no|expected axes"):
            GRID.at(**wrong)


def test_sums_and_means_drop_the_axes_they_are_over():
    ones = Scores(torch.ones(2, 3), {"layer": layers(2), "head": heads(3)}, "nats")
    assert ones.sum("head").values.tolist() == [3.0, 3.0] and ones.sum("head").axes == {"layer": ("L0", "L1")}
    assert ones.mean("layer", "head").values.item() == 1 and ones.mean("layer").unit == "nats"
    with pytest.raises(ValueError, match="neuron"):
        ones.sum("neuron")


def test_a_table_has_a_row_for_each_place():
    table = GRID.to_dataframe()
    assert list(table.columns) == ["layer", "head", "value"] and len(table) == 6
    assert table[(table["layer"] == "L3") & (table["head"] == "H1")]["value"].item() == -3.0


def test_axes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected values of shape"):
        Scores(torch.ones(2, 2), {"layer": layers(2), "head": heads(3)})
    with pytest.raises(ValueError, match="twice"):
        Scores(torch.ones(2), {"token": ("a", "a")})


def test_a_diagnosis_prints_what_it_is_about_its_top_places_and_its_notes():
    text = str(Diagnosis(about="anger in the source", scores=GRID, notes=("rounding 1e-7",)))
    assert text.splitlines()[0] == "Diagnosis: anger in the source (nats)" and "L3H1" in text and text.endswith("rounding 1e-7")
