import csv
import io
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sfda_tune import Backbone, Features, MetricResult, Ranking, Score
from sfda_tune.selection.forecast import order_by_forecast
from sfda_tune.selection.odds import judge
from sfda_tune.selection.tables import read_scores
from sfda_tune.values.labels import encode_labels

KEYS = ("interval_low", "interval_high", "rank_low", "rank_high", "p_best", "group")


def ranking() -> Ranking:
    per_sample = np.array([0.1, 1 / 3, math.pi])
    return Ranking(
        (
            Score("low", 0.1, per_sample, 3, 64, {"lambda": 0.5, "n_params": 25_557_032}),
            Score("broken", error="OSError: <no> weights"),
            Score("tie b", 0.9, n_samples=3, n_dims=8, details={"images_per_second": 99.6}),
            Score("tie a", 0.9, n_samples=3, n_dims=8),
        ),
        "sfda (official)",
        np.array([0, 1, 0]),
        {"dataset": "toys", "odd": np.float32(0.5), "inf": math.inf, "path": Path("x")},
    )


def test_ranking_is_a_mapping_best_first_ties_by_name_failures_last():
    r = ranking()
    assert list(r) == ["tie a", "tie b", "low", "broken"]
    assert r["low"] == 0.1
    assert math.isnan(r["broken"])
    assert len(r) == 4
    assert "low" in r
    assert dict(r.items())["tie a"] == 0.9
    assert r.failed == {"broken": "OSError: <no> weights"}
    assert r.costs == {"tie b": 1 / 99.6}
    with pytest.raises(KeyError):
        r["unknown"]


def test_order_of_the_scores_does_not_matter():
    r = ranking()
    assert list(Ranking(r.scores[::-1])) == list(r)


def test_shortlist_leaves_out_failures():
    assert ranking().shortlist(2) == ["tie a", "tie b"]
    assert ranking().shortlist(99) == ["tie a", "tie b", "low"]


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2"])
def test_shortlist_refuses(k):
    with pytest.raises(ValueError, match="`k` must be an integer ≥ 1"):
        ranking().shortlist(k)


def test_json_round_trip_is_exact_and_strict(tmp_path):
    r = ranking()
    path = tmp_path / "r.json"
    text = r.to_json(path)
    assert path.read_text() == text + "\n"
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not strict JSON"))
    for source in (text, path, str(path)):
        again = Ranking.from_json(source)
        assert again.to_json() == text
        assert list(again) == list(r)
        per_sample = again.score("low").per_sample
        assert per_sample is not None
        np.testing.assert_array_equal(per_sample, r.score("low").per_sample)  # to the last bit
        assert again.labels is not None
        assert again.labels.tolist() == [0, 1, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]  # no temporary file is left


@pytest.mark.parametrize("text", ["{}", "{", '{"format": "other/1"}', '{"format": 1}'])
def test_foreign_json_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"written by Ranking\.to_json"):
        Ranking.from_json(text)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        Ranking.from_json(tmp_path / "x.json")


def test_csv_has_one_line_per_backbone(tmp_path):
    lines = ranking().to_csv(tmp_path / "r.csv").splitlines()
    assert lines[0] == (
        "rank,backbone,forecast,interval_low,interval_high,rank_low,rank_high,p_best,group,score,"
        "n_dims,n_params,images_per_second,why,note"
    )
    assert lines[1].startswith("1,tie a,,,,,,,,0.9,8,")
    assert lines[-1] == ",broken,,,,,,,,,,,,,OSError: <no> weights"
    assert (tmp_path / "r.csv").read_text().splitlines() == lines


def test_names_survive_in_files_and_run_nowhere(tmp_path):
    names = ["=1+1", "-1", "+a", "@a", "'=x", "'tis", "a;=b", "a\nb", "caf\udce9", "\ud800", "\tx"]
    r = Ranking([Score(name, -k - 0.5) for k, name in enumerate(names)], "knn")
    r.to_json(tmp_path / "r.json")
    assert list(Ranking.from_json(tmp_path / "r.json")) == names
    r.to_csv(tmp_path / "r.csv")
    found = read_scores(tmp_path / "r.csv")
    known = [name.strip() for name in names]
    known[known.index("\ud800")] = r"\ud800"  # it stands for no byte, so that UTF-8 cannot hold it
    assert dict(found) == {name: -k - 0.5 for k, name in enumerate(known)}
    with (tmp_path / "r.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["backbone"] for row in rows][:6] == ["'=1+1", "-1", "'+a", "'@a", "''=x", "'tis"]
    assert [float(row["score"]) for row in rows] == [-k - 0.5 for k in range(len(names))]
    assert repr(r).replace("\n", "").isprintable()
    assert "\udce9" not in r._repr_html_()


def test_dataframe():
    frame = ranking().to_dataframe()
    assert frame["backbone"].tolist() == ["tie a", "tie b", "low", "broken"]
    assert frame["score"].isna().tolist() == [False, False, False, True]


def test_dataframe_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"sfda-tune\[data\]"):
        ranking().to_dataframe()


def test_repr_is_an_aligned_table():
    text = repr(ranking())
    assert "sfda (official)" in text
    assert "1 failed" in text
    assert "25.6M" in text
    lines = text.splitlines()[1:]
    assert len(lines) == 5


def test_html_escapes_and_holds_every_backbone():
    html = ranking()._repr_html_()
    assert "&lt;no&gt; weights" in html
    assert html.count("<tr>") == 5


def test_all_forms_of_a_ranking_hold_the_same_odds(tmp_path):
    """Interval, ranks, P(best) and group: on paper, in a notebook, as a table and in files."""
    rng = np.random.default_rng(0)
    terms = rng.uniform(size=(3, 60)) * 0.2 + [[0.1], [0.11], [0.7]]
    scores = [Score(name, row.mean(), row) for name, row in zip("abc", terms, strict=True)]
    by_score = Ranking(scores, "sfda (loo)", np.arange(60) % 3)
    by_forecast = order_by_forecast(by_score)
    for r in (by_score, by_forecast):
        c = judge(r)
        expected = pd.DataFrame(c.records()).set_index("backbone")
        for frame in (r.to_dataframe(), pd.read_csv(io.StringIO(r.to_csv()))):
            frame = frame.set_index("backbone").loc[expected.index, [*KEYS]]
            pd.testing.assert_frame_equal(frame, expected[[*KEYS]])
        for entry in json.loads(r.to_json())["scores"]:
            assert entry["odds"] == expected.loc[entry["backbone"], [*KEYS]].to_dict()
        first = r.records()[0]
        sign = "+.2f" if r is by_forecast else ".4f"
        shown = f"{first['interval_low']:{sign}} to {first['interval_high']:{sign}}"
        for text in (repr(r), r._repr_html_()):
            for word in (shown, f"{first['p_best']:.2f}", "90% interval", "P(best)", "group"):
                assert word in text
        assert Ranking.from_json(r.to_json()).records() == r.records()
    rows = [terms[2], terms[0], rng.permutation(terms[0])]  # the last two differ by luck alone
    scores = [Score(name, row.mean(), row) for name, row in zip("abc", rows, strict=True)]
    close = Ranking(scores, "sfda (loo)", np.arange(60) % 3)
    assert [r["group"] for r in close.records()] == ["a", "b", "b"]


def test_a_score_is_shown_in_a_line():
    s = Score("<b>\n", 0.91234, np.zeros(500), 500, 64, {"n_params": 25_557_032})
    assert repr(s) == r"Score('<b>\\n', 0.9123, 500 images, width 64, 25.6M parameters)"
    assert "&lt;b&gt;" in s._repr_html_()
    assert repr(Score("a", error="OSError: no\nweights")) == "Score('a', failed: OSError: no)"


def test_two_scores_of_one_backbone_are_refused():
    with pytest.raises(ValueError, match=r"repeats \['a'\]"):
        Ranking((Score("a", 1), Score("a", 2)))


def test_a_value_that_is_not_finite_is_a_failure_not_a_rank():
    s = Score("a", math.inf)
    assert s.error == "the metric's value is inf"
    assert math.isnan(s.value)


def test_everything_can_be_pickled():
    f = Features(np.eye(2), ["a", "b"], backbone="toy")
    again = pickle.loads(pickle.dumps((ranking(), f, MetricResult(1.0, np.ones(2), {"k": 1}))))
    assert again[0].to_json() == ranking().to_json()
    assert again[1].classes == ("a", "b")
    assert not again[1].x.flags.writeable
    assert again[2].details == {"k": 1}


def test_values_are_read_only_and_inputs_stay_writable():
    x, y = np.zeros((3, 2), np.float32), np.array([0, 1, 1])
    f = Features(x, y)
    with pytest.raises(ValueError, match="read-only"):
        f.x[0] = 1
    x[0] = 1
    y[0] = 1
    with pytest.raises(AttributeError):
        f.x = x  # type: ignore[misc]
    with pytest.raises(TypeError):
        ranking().info["dataset"] = "other"  # type: ignore[index]
    with pytest.raises(TypeError):
        ranking().scores[0].details["a"] = 1  # type: ignore[index]


def test_float32_is_not_copied():
    x = np.zeros((3, 2), np.float32)
    assert np.shares_memory(Features(x, [0, 1, 1]).x, x)


@pytest.mark.parametrize(
    ("x", "y", "classes", "message"),
    [
        (np.zeros(3), [0, 1, 1], (), r"`x` of 'net' must have shape \(n_samples, n_dims\)"),
        (np.zeros((0, 2)), [], (), "both > 0"),
        (np.zeros((3, 2)), [0, 1], (), "same number of rows but have 3 and 2"),
        (np.array([[0, np.nan]] * 2), [0, 1], (), "2 of 2 rows hold NaN or infinity, first row 0"),
        (np.array([["a"]] * 2), [0, 1], (), "real numbers"),
        (np.zeros((2, 2)), [0, 5], ("a", "b"), r"must lie in 0 … 1 but spans 0 … 5"),
        (np.zeros((2, 2)), ["a", "b"], ("a", "b"), "integer codes"),
    ],
)
def test_features_refuse(x, y, classes, message):
    with pytest.raises(ValueError, match=message):
        Features(x, y, classes, "net")


def test_labels_of_any_kind_are_encoded_independently_of_order():
    labels = ["b", ("t", 1), 3, "b"]
    codes, classes = encode_labels(labels)
    assert [classes[c] for c in codes] == labels
    assert encode_labels(labels[::-1])[1] == classes
    assert encode_labels(np.array([7, 2, 7]))[1] == (2, 7)
    assert encode_labels(list(torch.tensor([7, 2, 7])))[0].tolist() == [1, 0, 1]
    assert encode_labels(torch.tensor([7, 2, 7]))[1] == (2, 7)


@pytest.mark.parametrize(
    "labels", [[None, "a"], [0.0, math.nan], [pd.NA, "a"], np.zeros((2, 2)), [[1], [2]], 5]
)
def test_labels_refused(labels):
    with pytest.raises(ValueError, match="`labels`"):
        encode_labels(labels)


def test_backbone_refuses():
    with pytest.raises(ValueError, match="non-empty str"):
        Backbone("")
    with pytest.raises(ValueError, match="callable"):
        Backbone("a", load=3)  # type: ignore[arg-type]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    """`to_json` replaces the file as a whole: a reader never sees half of one."""
    path = tmp_path / "r.json"
    path.write_text("old")
    script = (
        "import os, sfda_tune.values.ranking as v\n"
        "os.replace = lambda *a: os._exit(9)\n"
        f"v.write_text({str(path)!r}, 'new' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert path.read_text() == "old"
