"""Repeat the experiment of the SFDA paper: its 33 models on its 11 data sets, with published τ_w.

    python examples/reproduce_paper.py --stand-in                     # what needs no network
    python examples/reproduce_paper.py --data DATA --download         # everything; hours

Shao et al., ECCV 2022, doi:10.1007/978-3-031-19830-4_17. Only ``--download`` fetches anything;
what is missing is named and skipped. Features are kept: the same command goes on where it stopped.
It scores the training images only; ``--all-splits`` adds the others, as the authors did.
"""

import argparse
import json
import os
import time
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from sfda_tune import Backbone, ImageDataset, open_dataset, rank
from sfda_tune.backbones import demo
from sfda_tune.backbones.fingerprints import fingerprint
from sfda_tune.metrics.nleep import nleep
from sfda_tune.metrics.sfda import sfda
from sfda_tune.selection.evaluation import static_order, weighted_tau
from sfda_tune.selection.tables import read_truth
from sfda_tune.values.features import MetricResult
from sfda_tune.values.text import one_line

ROOT, NAN = Path(__file__).resolve().parents[1], float("nan")
ZOO, ZOO_TRUTH = ROOT.parent / "shared/zoo", ROOT / "tests/benchmarks/real_zoo.json"
TRUTH = ROOT.parent / "shared/data/ground_truth"
METRICS = {f"sfda {v}": partial(sfda, variant=v) for v in ("official", "loo")} | {"nleep": nleep}
# τ_w as printed in the READMEs of TencentARC/SFDA (cnn) and lixiaotong97/PED (ssl, without
# sun397), in the order of `datasets`; for the ViTs no values by data set are known.
PUBLISHED = {
    "cnn SFDA": (0.615, 0.737, 0.487, 0.949, 0.866, 0.597, 0.542, 0.815, 0.734, 0.703, 0.763),
    "cnn NLEEP": (0.495, 0.661, 0.265, 0.806, 0.823, 0.777, 0.215, 0.624, 0.599, 0.807, 0.654),
    "cnn LogME": (0.506, 0.435, 0.576, 0.852, 0.692, 0.647, 0.111, 0.385, 0.411, 0.511, 0.478),
    "ssl SFDA": (0.254, 0.523, 0.515, 0.619, 0.548, 0.749, 0.773, 0.685, 0.586, NAN, 0.568),
    "ssl NLEEP": (-0.029, 0.525, 0.486, -0.044, 0.276, 0.641, 0.534, 0.574, 0.792, NAN, -0.101),
    "ssl LogME": (0.223, 0.051, 0.375, 0.295, -0.008, 0.627, 0.604, 0.57, 0.684, NAN, 0.158),
}
# `truth`: {data set: {model: fine-tuned accuracy}}, or the name of the file that holds it.
Group = namedtuple("Group", "name models truth plugins", defaults=("", ()))
# `source`: a class of torchvision.datasets (its argument `key` is one of `parts` for the training
# images, of `rest` for others; without splits `per_class` images are drawn), or a path.
Data = namedtuple("Data", "name source key parts rest per_class", defaults=("", (None,), (), 0))
Result = namedtuple("Result", "group dataset n_models taus seconds")  # seconds: of all its models


@dataclass(frozen=True)
class Model:
    """A model of the paper; `source` of its weights: torchvision, timm, url, local, none (why)."""

    name: str
    source: str
    weights: str


CNN = ("resnet34", "resnet50", "resnet101", "resnet152", "densenet121", "densenet169")
CNN += ("densenet201", "mnasnet1_0", "mobilenet_v2", "googlenet", "inception_v3")
META = "https://dl.fbaipublicfiles.com"
MOCO = f"{META}/moco/moco_checkpoints"
PCL = "https://storage.googleapis.com/sfr-pcl-data-research/PCL_checkpoint"
SSL = (
    *(Model(m, "none", "TensorFlow or JAX only") for m in ("byol", "simclr-v1", "simclr-v2")),
    *(Model(name, "none", "in a Dropbox folder only") for name in ("infomin", "insdis")),
    Model("deepcluster-v2", "url", f"{META}/deepcluster/deepclusterv2_800ep_pretrain.pth.tar"),
    Model("moco-v1", "url", f"{MOCO}/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar"),
    Model("moco-v2", "url", f"{MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar"),
    *(Model(f"pcl-v{v}", "url", f"{PCL}/PCL_v{v}_epoch200.pth.tar") for v in (1, 2)),
    Model("sela-v2", "url", f"{META}/deepcluster/selav2_400ep_pretrain.pth.tar"),
    Model("swav", "url", f"{META}/deepcluster/swav_800ep_pretrain.pth.tar"),
)
VIT = (  # of vit_*: assumed, what is known of the paper does not say which weights
    Model("vit_t_16", "timm", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    Model("vit_s_16", "timm", "vit_small_patch16_224.augreg_in21k_ft_in1k"),
    Model("vit_b_16", "timm", "vit_base_patch16_224.augreg_in21k_ft_in1k"),
    Model("pvtv2_b2", "timm", "pvt_v2_b2.in1k"),
    *(Model(name, "none", "only version 2 is in timm") for name in ("pvt_t", "pvt_s", "pvt_m")),
    Model("swin_t", "timm", "swin_tiny_patch4_window7_224.ms_in1k"),
    Model("mocov3_vits16", "url", f"{META}/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar"),
    Model("dino_vits16", "timm", "vit_small_patch16_224.dino"),
)


def groups(stand_in: bool = False) -> list[Group]:
    """Return the paper's groups of models, or what stands in for them without a network."""
    if not stand_in:
        cnn = tuple(Model(name, "torchvision", name) for name in CNN)
        truth = ("sfda_group1_cnn", "sfda_group2_ssl", "sfda_group3_vit")
        return list(map(Group, ("cnn", "ssl", "vit"), (cnn, SSL, VIT), truth))
    models = tuple(Model(name, "local", f"demo:{name}") for name in demo.names())
    found = [Group("demo", models, {"digits": demo.accuracies()})]
    if ZOO.is_dir() and ZOO_TRUTH.is_file():
        folders = sorted(file.parent for file in ZOO.glob("models/*/config.json"))
        models = tuple(Model(f.name, "local", f"local-dir:{f}") for f in folders)
        pairs = json.loads(ZOO_TRUTH.read_text())["accuracies"].items()
        truth = {d: {m: x["accuracy"] for m, x in t.items()} for d, t in pairs if t}
        found.append(Group("zoo", models, truth, (str(ZOO / "zoo_models.py"),)))
    return found


def datasets(stand_in: bool = False) -> list[Data]:
    """Return the paper's data sets, or the stand-ins."""
    if stand_in:
        folders = sorted(path for path in ZOO.glob("datasets/*") if path.is_dir())
        return [Data("digits", "digits"), *(Data(p.name, str(p)) for p in folders)]
    train, both, test = ("train",), ("trainval",), ("test",)
    return [
        Data("aircraft", "FGVCAircraft", "split", both, test),
        Data("caltech101", "Caltech101", per_class=30),
        Data("cars", "StanfordCars", "split", train, test),
        Data("cifar10", "CIFAR10", "train", (True,), (False,)),
        Data("cifar100", "CIFAR100", "train", (True,), (False,)),
        Data("dtd", "DTD", "split", ("train", "val"), test),
        Data("flowers", "Flowers102", "split", ("train", "val"), test),
        Data("food", "Food101", "split", train, test),
        Data("pets", "OxfordIIITPet", "split", both, test),
        Data("sun397", "SUN397", per_class=50),
        Data("voc2007", "VOCDetection", "image_set", both, test),
    ]


def accuracies(group: Group, path: Path) -> Mapping[str, Any]:
    """Return the fine-tuned accuracies of a group, {data set: {model: accuracy}}."""
    if not isinstance(group.truth, str):
        return group.truth
    file = next(path.glob(f"{group.truth}.*"), path / group.truth) if path.is_dir() else path
    table = read_truth(file)
    if not all(hasattr(one, "items") for one in table.values()):
        raise ValueError(f"{file} must say of which data set each accuracy is.")
    return table


def backbone(model: Model, plugins: tuple[str, ...], options: argparse.Namespace) -> Backbone:
    """Return what `rank` takes; FileNotFoundError, with the reason, if it cannot be had."""
    if options.checkpoints and (folder := options.checkpoints / model.name).is_dir():
        return Backbone(model.name, f"local-dir:{folder.resolve()}")
    if model.source == "none":
        raise FileNotFoundError(f"no weights for timm or torchvision ({model.weights})")
    given, url = Backbone(model.name, model.weights, plugins=plugins), model.weights
    if model.source in ("torchvision", "url"):
        import torch
        from torchvision.models import get_model_weights

        given = Backbone(model.name, load=partial(load, model.source, model.weights))
        if model.source == "torchvision":
            url = get_model_weights(url).__members__["IMAGENET1K_V1"].url
        here = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).is_file()
    else:
        here = model.source == "local" or fingerprint(given) is not None
    if not here and not options.download:
        raise FileNotFoundError(f"{url} is not here; --download fetches it")
    return given


def load(source: str, weights: str) -> tuple[Any, Any]:
    """Return a network without its head, and the transform that its weights were made for."""
    import timm
    import torch
    from torchvision.models import get_model, get_model_weights

    name, tag = ("resnet50", None) if source == "url" else (weights, "IMAGENET1K_V1")
    if "vit-s" in weights:  # MoCo v3 has 12 heads where timm has 6
        module: Any = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=12)
    else:
        module = get_model(name, weights=tag)
        setattr(module, "fc" if hasattr(module, "fc") else "classifier", torch.nn.Identity())
    if source == "url":
        file = torch.hub.load_state_dict_from_url(weights, map_location="cpu", weights_only=True)
        state, keys = file.get("state_dict", file), list(module.state_dict())
        # Each wraps the encoder differently; the momentum encoder and the heads stay behind.
        prefixes = ("module.encoder_q.", "module.base_encoder.", "module.")
        prefix = next((p for p in prefixes if p + keys[0] in state), "")
        module.load_state_dict({k: state[prefix + k] for k in keys if prefix + k in state})
    return module, get_model_weights(name).__members__["IMAGENET1K_V1"].transforms()


def images(data: Data, options: argparse.Namespace) -> ImageDataset:
    """Open a data set; of torchvision's, fetch what is missing with ``--download`` only."""
    import torchvision.datasets

    if not hasattr(torchvision.datasets, data.source):
        return open_dataset(data.source)
    more = {"year": "2007"} if data.name == "voc2007" else {}
    make = partial(getattr(torchvision.datasets, data.source), str(options.data), **more)
    found: list[ImageDataset] = []
    for part in data.parts + (data.rest if options.all_splits else ()):
        chosen = {data.key: part} if data.key else {}
        try:
            opened = make(**chosen)  # with download=True some classes unpack all of it again
        except Exception as error:
            if not options.download:
                hint = f"in {options.data}; --download fetches it"
                raise FileNotFoundError(f"no {data.source} {hint} ({one_line(error)})") from error
            opened = make(**chosen, download=True)
        if data.name == "voc2007":
            opened = (opened.images, list(map(voc_label, opened.annotations)))
        found.append(open_dataset(opened))
    classes = tuple(dict.fromkeys(name for part in found for name in part.classes))
    labels = np.array([classes.index(part.classes[k]) for part in found for k in part.labels])
    whole = ImageDataset(data.name, [x for part in found for x in part.items], labels, classes)
    n = len(whole) if options.all_splits else data.per_class or len(whole)
    order = np.random.default_rng(0).permutation(len(whole))
    rows = [order[labels[order] == k][:n] for k in range(len(classes))]
    return whole.subset(np.sort(np.concatenate(rows)))


def voc_label(file: str) -> str:
    """Return the alphabetically first class in an image, as the authors' argmax of 0/1 does."""
    objects = ElementTree.parse(file).iter("object")  # difficult ones last: if there is no other
    return min((x.findtext("difficult", "0"), x.findtext("name", "").strip()) for x in objects)[1]


def measure(x: Any, y: Any) -> MetricResult:
    """Apply every metric to the same features; if one fails, `rank` records it."""
    values, seconds = {}, {}
    for name, metric in METRICS.items():
        started = time.perf_counter()
        values[name] = float(metric(x, y))
        seconds[name] = time.perf_counter() - started
    return MetricResult(0.0, details={"values": values, "seconds": seconds})


def run(chosen: Sequence, sets: Sequence, tables: Mapping, options: Any) -> Iterator[Result]:
    """Yield the result of each pair of group and data set; print what is skipped or fails."""
    hubs: dict[str, list[Backbone]] = {group.name: [] for group in chosen}
    for group in chosen:
        for model in group.models:
            try:
                hubs[group.name].append(backbone(model, group.plugins, options))
            except Exception as error:
                print(f"skipped {group.name}/{model.name}: {one_line(error)}")
    for data in sets:
        pairs = {g: [b for b in hubs[g] if b.name in tables[g].get(data.name, ())] for g in hubs}
        try:  # nothing is fetched that no model could be run on
            opened = images(data, options) if any(pairs.values()) or not options.download else None
            for group in filter(pairs.get, pairs):
                yield _pair(group, data.name, opened, pairs[group], tables[group], options.samples)
        except Exception as error:
            print(f"skipped {data.name}: {type(error).__name__}: {one_line(error)}")


def _pair(group: str, name: str, data: Any, hub: list, truth: Any, samples: int) -> Result:
    ranking = rank(data, hub, metric=measure, samples=samples)
    scores = [score for score in ranking.scores if score.error is None]
    speed = np.median([s.details["images_per_second"] or NAN for s in scores] or [NAN])
    n, old = ranking.info["n_samples"], sum(s.details["cached"] for s in scores)
    print(f"{group}, {name}: {len(scores)} models, {n} images, {speed:.0f} images/s, {old} cached")
    for model, error in ranking.failed.items():
        print(f"failed {group}/{model} on {name}: {error}")
    values = {m: {s.backbone: s.details["values"][m] for s in scores} for m in METRICS}
    static = static_order(truth)[name] if len(truth) > 1 else {}
    values["static"] = {s.backbone: static.get(s.backbone, NAN) for s in scores}
    taus = {  # of fewer than two models undefined
        m: weighted_tau(column, truth[name]) if np.isfinite([*column.values()]).sum() > 1 else NAN
        for m, column in values.items()
    }
    seconds = {m: sum(s.details["seconds"][m] for s in scores) for m in METRICS}
    return Result(group, name, len(scores), taus, seconds)


def report(group: str, results: Sequence[Result]) -> str:
    """Return the table of one group, and the paper's two claims as measured."""
    names = [data.name for data in datasets()]
    published = {key[4:]: x for key, x in PUBLISHED.items() if key.startswith(group)}
    heads = [*METRICS, "static", *(f"[{m}]" for m in published), *(f"{m} s" for m in METRICS)]
    table = {}
    for r in results:
        printed = [column[names.index(r.dataset)] for column in published.values()]
        table[f"{r.dataset} ({r.n_models})"] = [*r.taus.values(), *printed, *r.seconds.values()]
    T = np.array(list(table.values()))
    k, n = len(METRICS) - 1, len(heads) - len(METRICS)
    table["mean; sum of s"] = [t[t == t].mean() if (t == t).any() else NAN for t in T.T[:n]]
    table["mean; sum of s"] += list(S := T[:, n:].sum(0))
    text = [f"\n{group}: weighted τ, [published], seconds of scoring; data set (models)"]
    text.append(" " * 18 + "".join(f"  {head}" for head in heads))
    for name, row in table.items():
        cells = (f"{x:{len(h) + 2}.3f}" for h, x in zip(heads, row, strict=True))
        text.append(f"{name:<18}" + "".join(cells).replace("nan", "  –"))
    for i, variant in enumerate([*METRICS][:k]):
        ours, theirs = T[np.isfinite(T[:, i] + T[:, k])].sum(0)[[i, k]]
        gain, speed = (ours / theirs - 1 if theirs > 0 else NAN), S[k] / (S[i] or NAN)
        text.append(f"{variant} over nleep: mean τ_w {gain:+.1%} (paper: +59.1%), time ÷ ")
        text[-1] += f"{speed:.1f} (paper: ÷ 22.5)"
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="where torchvision's data sets are kept")
    add("--download", action="store_true", help="fetch data sets and weights that are missing")
    add("--checkpoints", type=Path, help="timm checkpoint folders, called as the paper's models")
    add("--truth", type=Path, default=TRUTH, help="fine-tuned accuracies, CSV, JSON, or a folder")
    for flag, known in (("--groups", groups), ("--datasets", datasets)):
        names = [x.name for x in (*known(), *known(True))]
        add(flag, nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--samples", type=int, help="at most so many images of a data set")
    add("--all-splits", action="store_true", help="score the test images too, as the authors did")
    add("--stand-in", action="store_true", help="local backbones and data sets, no network")
    add("--smoke", action="store_true", help="demo backbones on 100 images")
    options = parser.parse_args(argv)
    if options.smoke:
        options.stand_in, options.groups, options.samples = True, ["demo"], 100
    chosen = [group for group in groups(options.stand_in) if group.name in options.groups]
    sets = [data for data in datasets(options.stand_in) if data.name in options.datasets]
    try:
        tables = {group.name: accuracies(group, options.truth) for group in chosen}
    except (OSError, ValueError) as error:
        parser.error(f"{error}; --truth: a CSV with columns dataset, model, accuracy, or JSON")
    if not options.download:  # not even a sign of life is asked of the hub
        os.environ["HF_HUB_OFFLINE"] = "1"
    results: list[Result] = []
    with suppress(KeyboardInterrupt):  # shows what is finished; the same command goes on
        results.extend(run(chosen, sets, tables, options))
    for group in chosen:
        if found := [r for r in results if r.group == group.name]:
            print(report(group.name, found))
    return 0 if results else 1


if __name__ == "__main__":
    raise SystemExit(main())
