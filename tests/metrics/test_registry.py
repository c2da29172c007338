"""The names of metrics, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sfda_tune.metrics import METRICS, MetricInfo, describe_metrics, get_metric, register_metric
from sfda_tune.metrics.sfda import sfda

HEAVY = {"torch", "timm", "optuna", "ray", "sklearn"}


@pytest.fixture(autouse=True)
def _restore():
    before = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(before)


def test_sfda_is_registered_and_is_the_function():
    assert METRICS["sfda"] is get_metric("sfda") is sfda
    assert callable(sfda)


def test_register_bare_and_with_a_name():
    @register_metric
    def width(features, labels):
        return float(features.shape[1])

    @register_metric(name="n-samples")
    def height(features, labels):
        return float(features.shape[0])

    register_metric(height, name="rows")
    assert get_metric("width") is width
    assert get_metric("n-samples") is get_metric("rows") is height


def test_a_callable_is_its_own_metric():
    def own(features, labels):
        return 0.0

    assert get_metric(own) is own
    assert own not in METRICS.values()


@pytest.mark.parametrize("metric", ["sdfa", "", None, 3, ["sfda"]])
def test_an_unknown_metric_lists_the_names(metric):
    register_metric(lambda features, labels: 0.0, name="zero")
    with pytest.raises(ValueError, match=r"`metric` must be one of .*'sfda', .*'zero' or .* but"):
        get_metric(metric)


def test_a_name_belongs_to_one_function_which_may_be_defined_again():
    def define(value):
        @register_metric
        def constant(features, labels):
            return value

        return constant

    define(1.0)
    again = define(2.0)
    assert METRICS["constant"] is again
    with pytest.raises(ValueError, match=r"`name` must be free but 'sfda' belongs to sfda_tune\."):
        register_metric(again, name="sfda")
    assert METRICS["sfda"] is sfda


def test_only_named_functions_are_registered():
    with pytest.raises(ValueError, match="`function` must be callable"):
        register_metric("sfda")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="`name` must be a non-empty str but is ''"):
        register_metric(sfda, name="")


def test_every_metric_says_where_it_comes_from_and_when_it_misleads():
    rows = describe_metrics()
    assert [row.name for row in rows] == sorted(METRICS)
    assert MetricInfo._fields == ("name", "needs", "cost", "source", "misleads")
    for row in rows:
        assert row.cost
        assert row.source
        assert row.misleads
        assert set(row.needs) <= {"features", "logits", "hub", "prior"}
        documentation = METRICS[row.name].__doc__ or ""
        if row.needs == ("prior",):
            with pytest.raises(
                ValueError, match=f"'{row.name}' needs a prior: .*{row.name}_prior"
            ):
                get_metric(row.name)([[0.0], [1.0]], [0, 1])
        else:
            assert "Examples" in documentation
            assert "**When it is wrong.**" in documentation
            assert METRICS[row.name].__module__ == f"sfda_tune.metrics.{row.name}"


def test_metadata_of_an_own_metric():
    @register_metric(needs=("features", "hub"), cost="ND", source="here", misleads="always")
    def own(features, labels):
        return 0.0

    register_metric(own, name="bare")
    rows = {row.name: row for row in describe_metrics()}
    assert rows["own"] == ("own", ("features", "hub"), "ND", "here", "always")
    assert rows["bare"] == ("bare", ("features",), "", "", "")
    METRICS["smuggled"] = own
    assert MetricInfo("smuggled") in describe_metrics()
    for needs in ("weights", (), ("features", "time")):
        with pytest.raises(ValueError, match="`needs` must be one or more of 'features', "):
            register_metric(own, name="third", needs=needs)


def test_importing_the_metrics_stays_light():
    script = (
        "import sys\n"
        "from sfda_tune.metrics.sfda import sfda\n"
        "print(sfda([[0.0], [1.0], [2.0], [3.5]], [0, 0, 1, 1], variant='paper').value)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(run.stdout.splitlines()[1].split())
    assert "scipy" in loaded  # the list is that of the modules
    assert not loaded & HEAVY
