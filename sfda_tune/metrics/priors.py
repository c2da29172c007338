"""Priors: scores of a backbone that are known before it has seen a single target image.

They belong into every comparison: on the benchmarks in use, ImageNet accuracy ranks backbones as
well as most metrics that look at the target data.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from sfda_tune.values.files import read_rows, read_text
from sfda_tune.values.ranking import Ranking

__all__ = [
    "PRIORS", "Facts", "imagenet", "imagenet_prior", "look_up_facts", "params", "params_prior",
]  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What is known of a network before it has seen an image; NaN: unknown.

    Parameters
    ----------
    top1 : float
        ImageNet-1k accuracy in percent; of weights that have not seen its labels: once they have
        been fine-tuned to them.
    gmacs, macts : float
        10⁹ multiplications and 10⁶ activations of one image.
    params : float
        Millions of parameters.
    """

    top1: float = math.nan
    gmacs: float = math.nan
    macts: float = math.nan
    params: float = math.nan


def _named(name: str, call: str) -> Callable[[Any, Any], NoReturn]:
    """Return what stands for a prior among the metrics; it refuses to compute from features."""

    def refuse(features: Any, labels: Any) -> NoReturn:
        raise ValueError(
            f"{name!r} needs a prior: it is looked up by the name of the backbone, not computed "
            f"from features and labels; call `{call}` and put it beside other scores with "
            "`combine`."
        )

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = f"Refuse: see `{call}`."
    return refuse


imagenet = _named("imagenet", "imagenet_prior(names, path=...)")
params = _named("params", "params_prior(ranking)")


def imagenet_prior(
    names: Iterable[str], *, path: str | Path | None = None, img_size: int | None = None
) -> dict[str, float]:
    r"""Look up the published ImageNet-1k accuracy of timm's models.

    **When it is wrong.** It does not know the target data: the order is the same for all of them.
    On medical images it says little (mean τ_w .38 on three sets), on natural ones it is hard to
    beat (.74). Weights that have not seen its labels have that of those that timm made of them
    (``convnext_tiny.fb_in22k``: that of ``convnext_tiny.fb_in22k_ft_in1k``), or none.

    Parameters
    ----------
    names : iterable of str
        Names of backbones, such as ``"resnet50.a1_in1k"``, with or without ``"hf-hub:timm/"``; a
        `Ranking` is one. A name without tag stands for timm's default weights.
    path : str or Path, optional
        Any CSV file with columns ``model`` and ``top1``, for instance a newer
        ``results-imagenet.csv`` from timm's repository. Default: the one that ships with this
        package, of 1,556 models and sizes.
    img_size : int, optional
        Of several image sizes this one; the smallest by default.

    Returns
    -------
    dict of str to float
        Name to top-1 accuracy in percent; NaN for those that the file does not know.

    Raises
    ------
    ValueError
        If there is no such file, or it lacks a column.

    References
    ----------
    S. Kornblith, J. Shlens, Q. Le: Do Better ImageNet Models Transfer Better? CVPR 2019,
    https://arxiv.org/abs/1805.08974

    The file that ships, ``imagenet.csv``, holds four columns of ``results/results-imagenet.csv``
    and two of ``results/benchmark-infer-*.csv``,
    https://github.com/huggingface/pytorch-image-models at aa4b5850 (R. Wightman, Apache-2.0).

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from sfda_tune.metrics.priors import imagenet_prior
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "results.csv"
    >>> _ = path.write_text("model,img_size,top1\nresnet50.a1_in1k,288,81.2\n")
    >>> imagenet_prior(["resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k", "mine"], path=path)
    {'resnet50.a1_in1k': 81.2, 'hf-hub:timm/resnet50.a1_in1k': 81.2, 'mine': nan}
    """
    return _look_up(names, "top1", path, img_size)


def params_prior(names: Iterable[str], *, path: str | Path | None = None) -> dict[str, float]:
    """Look up the number of parameters: more is better, says this prior.

    **When it is wrong.** Across families of networks, which differ in what they make of their
    parameters (mean τ_w .578 on the supervised benchmark, whose models are of one age).

    Parameters
    ----------
    names : Ranking or iterable of str
        A `Ranking` knows the sizes of its backbones, as counted when they were loaded.
    path : str or Path, optional
        For names that are no `Ranking`: a CSV file with columns ``model`` and ``param_count`` (in
        millions); default: as for `imagenet_prior`.

    Returns
    -------
    dict of str to float
        Name to number of parameters in millions; NaN where unknown.

    Raises
    ------
    ValueError
        If there is no such file, or it lacks a column.

    Examples
    --------
    >>> from sfda_tune.metrics.priors import params_prior
    >>> from sfda_tune.values.ranking import Ranking
    >>> from sfda_tune.values.features import Score
    >>> params_prior(Ranking([Score("a", 0.2, details={"n_params": 25_000_000})]))
    {'a': 25.0}
    """
    if isinstance(names, Ranking) and path is None:
        counts = {score.backbone: score.details.get("n_params") for score in names.scores}
        return {name: n / 1e6 if n else math.nan for name, n in counts.items()}
    return _look_up(names, "param_count", path, None)


def look_up_facts(names: Iterable[str]) -> dict[str, Facts]:
    """Return what the table that ships knows of networks, by their names.

    >>> look_up_facts(["resnet50.a1_in1k", "mine"])
    {'resnet50.a1_in1k': Facts(top1=80.382, gmacs=4.11, macts=11.11, params=25.56), \
'mine': Facts(top1=nan, gmacs=nan, macts=nan, params=nan)}
    """
    table = _shipped()
    return {name: table.get(_known(name, table), Facts()) for name in names}


@cache
def _shipped() -> dict[str, Facts]:
    file = _file(None)
    columns = [_read(file, c, None) for c in ("top1", "gmacs", "macts", "param_count")]
    return {name: Facts(*(column[name] for column in columns)) for name in columns[0]}


def _look_up(
    names: Iterable[str], column: str, path: str | Path | None, img_size: int | None
) -> dict[str, float]:
    if isinstance(names, str):
        raise ValueError(f"`names` must be several names but is {names!r}; pass [{names!r}].")
    table = _read(_file(path), column, img_size)
    return {name: table.get(_known(name, table), math.nan) for name in names}


def _file(path: str | Path | None) -> Path:
    file = Path(__file__).with_name("imagenet.csv") if path is None else Path(path)
    if not file.is_file():
        raise ValueError(
            f"`path` must be a CSV file with published results but is {str(path)!r}; leave it out "
            "for the table that ships with sfda_tune."
        )
    return file


def _read(file: Path, column: str, img_size: int | None) -> dict[str, float]:
    """Model to value; of several image sizes the one asked for, else the smallest."""
    table: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for row in read_rows(file, ("model", column)):
        try:
            value, size = float(row[column].replace(",", "")), float(row.get("img_size") or 0)
        except ValueError:
            raise ValueError(
                f"`path` must have numbers in {column!r} and img_size, but {file} has "
                f"{row[column]!r} and {row.get('img_size')!r} for {row['model']!r}."
            ) from None
        name = row["model"]
        if img_size is not None and size != img_size:
            continue
        if name not in table or size < sizes[name]:
            table[name], sizes[name] = value, size
    return table


MADE_OF = re.compile(r"(_in1k)?(_ft_in\d+k)?_(ft_)?in1k")  # what timm appends to such a tag


def _known(name: str, table: Mapping[str, Any]) -> str:
    """Return the name under which the table may know a backbone, or what was made of its weights.

    >>> _known("convnext_tiny_in22k", _shipped())
    'convnext_tiny.fb_in22k_ft_in1k'
    """
    bare = name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    bare = bare if bare in table else _renamed().get(bare, bare)
    if bare not in table and "." not in bare and any(n.startswith(f"{bare}.") for n in table):
        import timm

        config = timm.get_pretrained_cfg(bare, allow_unregistered=True)
        bare = f"{bare}.{config.tag}" if config is not None and config.tag else bare
    if bare in table or "." not in bare:
        return bare
    made = (n for n in table if n.startswith(bare) and MADE_OF.fullmatch(n, len(bare)))
    return min(made, key=lambda n: (len(n), n), default=bare)


@cache
def _renamed() -> dict[str, str]:
    """Return timm's present names by its former ones."""
    return json.loads(read_text(Path(__file__).with_name("renamed.json")))


PRIORS: dict[str, Callable[[Ranking], dict[str, float]]] = {
    "imagenet": imagenet_prior,
    "params": params_prior,
}
