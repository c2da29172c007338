"""Prove and measure all that runs on a GPU, with one command; `gpu.md` says how, step by step.

    python tests/benchmarks/gpu.py [--minutes 8] [--out DIR] [--parts tests scores …]
    python tests/benchmarks/gpu.py --device cpu --tiny     # all of it where there is no GPU
    python tests/benchmarks/gpu.py --pack DIR              # what a bare machine needs, in pieces

Each part runs in a process of its own within its share of the time (what one leaves is for the
others) and writes ``DIR/<part>.json`` after every figure; ``DIR/gpu.json`` takes in the parts that
are done. So an end at any moment costs only the part at hand. What the machine lacks is skipped,
with the reason. Without ``../shared/zoo`` the images are drawn and all networks have random
weights.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from extraction_speed import plain_loop, synthetic
from PIL import Image
from timm.models import save_for_hf

from sfda_tune import open_dataset, resolve_backbones
from sfda_tune.backbones import devices, loading
from sfda_tune.extraction import run, worker
from sfda_tune.extraction.run import extract
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import FeatureStore
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.run import finetune
from sfda_tune.metrics import scoring
from sfda_tune.metrics.sfda import sfda
from sfda_tune.values.files import write_text

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT.parent / "shared" / "zoo"
# What each part may take of the time that is left, relative to those after it.
PARTS = {
    "tests": 1.0, "scores": 0.5, "extraction": 2.0, "overlap": 1.5, "ray": 2.5, "finetuning": 2.5,
    "truth": 1.0,
}  # fmt: skip
ARCHITECTURES = ("resnet50", "convnext_tiny", "vit_base_patch16_224", "efficientnet_b0")
SMALL = (
    "mobilenetv1_100.coral_in1k_224", "mobilenetv2_100.coral_slim_in1k_224",
    "regnetx_002.atu_pycls_in1k_224", "tf_mobilenetv3_small_100.atu_tfhub_in1k_224",
    "mobilenet_edgetpu_075.coral_in1k_224",
)  # fmt: skip
# What a bare machine with PyTorch, timm and scikit-learn lacks; Ray's wheel is large.
WHEELS = (
    "platformdirs", "timm", "optuna", "alembic", "colorlog", "mako", "sqlalchemy", "cloudpickle",
    "jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "annotated-types",
    "pydantic", "pydantic-core", "tensorboardX", "typing-inspection", "ray",
)  # fmt: skip
PIECE = 55 << 20  # bytes that travel at a time, beside the repository
TINY = ("test_resnet", "test_convnext", "test_vit", "test_efficientnet")
HALF = ("bfloat16", "float16")


class Skip(Exception):  # noqa: N818 - no error
    """What this machine lacks."""


@dataclass
class Part:
    """What a part has to work with, and what it found."""

    name: str
    options: argparse.Namespace
    rows: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> str:
        """Return the device."""
        return self.options.device

    @property
    def tiny(self) -> bool:
        """Whether all is to be small."""
        return self.options.tiny

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.options.seconds - (time.perf_counter() - self.started)

    def add(self, what: str, value: Any, unit: str = "", goal: str = "") -> None:
        """Take down a figure, in the file at once."""
        self.rows.append({"what": what, "value": value, "unit": unit, "goal": goal})
        self.write()
        print_row(self.name, self.rows[-1])

    def write(self, skipped: str | None = None, error: str | None = None) -> None:
        """Write what there is."""
        content = {
            "part": self.name,
            "device": describe(self.device),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "seconds": time.perf_counter() - self.started,
            "skipped": skipped,
            "error": error,
            "rows": self.rows,
        }
        write_text(self.options.out / f"{self.name}.json", json.dumps(content, indent=1) + "\n")


def print_row(part: str, row: dict) -> None:
    value = row["value"]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    goal = f"   (goal {row['goal']})" if row["goal"] else ""
    print(f"{part:<11} {row['what']:<72} {shown:>10} {row['unit']}{goal}", flush=True)


def describe(device: str) -> str:
    """Return a device in words."""
    if device.startswith("cuda"):
        about = torch.cuda.get_device_properties(device)
        return f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {os.cpu_count()} cores"
    return f"{device}, {os.cpu_count()} cores"


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(function, device: str, repeats: int = 3) -> tuple[float, Any]:
    """Return the median seconds of a function after one call to warm up, and its result."""
    result, spent = function(), []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        result = function()
        synchronize(device)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent), result


# Inputs -----------------------------------------------------------------------------------------
def make_inputs(part: Part) -> tuple[Any, list]:
    """Return photos and backbones that coexist; made once for all parts."""
    root = part.options.inputs
    n, size = (48, (80, 60)) if part.tiny else (1500, (500, 375))
    if not (root / "whole").is_file():
        save_photos(root / "photos", n, size)
        for name in TINY if part.tiny else ARCHITECTURES:
            torch.manual_seed(0)
            save_for_hf(timm.create_model(name), root / "models" / name, safe_serialization=True)
        (root / "whole").touch()
    found = resolve_backbones(str(root / "models"))
    if not part.tiny and ZOO.is_dir():
        plugins = [str(ZOO / "zoo_models.py")]
        there = [ZOO / "models" / name for name in SMALL if (ZOO / "models" / name).is_dir()]
        found += resolve_backbones([str(folder) for folder in there], plugins=plugins)
    return open_dataset(root / "photos"), found


def save_photos(folder: Path, n: int, size: tuple[int, int]) -> None:
    """Write photos of the zoo in a usual size, or drawn ones."""
    files = sorted(ZOO.glob("datasets/*/train/*/*.jpg"))
    if not files:
        synthetic(folder, n)
        return
    files = [files[k] for k in np.random.default_rng(0).permutation(len(files))[:n]]

    def save(k: int) -> None:
        photo = Image.open(files[k]).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        (folder / str(k % 4)).mkdir(parents=True, exist_ok=True)
        photo.save(folder / str(k % 4) / f"{k}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(save, range(len(files))))


class Utilisation(threading.Thread):
    """Samples how busy the GPU is, through NVML; `between` returns the mean share of a time."""

    def __init__(self, device: str) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []
        self.over = threading.Event()
        self.handle = None
        if device.startswith("cuda"):
            try:
                import pynvml

                pynvml.nvmlInit()
                self.nvml = pynvml
                self.handle = pynvml.nvmlDeviceGetHandleByIndex(torch.device(device).index or 0)
            except Exception as error:  # no package, or no right to ask
                logging.getLogger("gpu").warning("without NVML: %s", error)

    def run(self) -> None:
        while self.handle is not None and not self.over.wait(0.05):
            busy = self.nvml.nvmlDeviceGetUtilizationRates(self.handle).gpu / 100
            self.samples.append((time.perf_counter(), busy))

    def between(self, start: float, end: float) -> float | None:
        """Return the mean over a time, or None if nothing was sampled."""
        found = [busy for t, busy in self.samples if start <= t <= end]
        return statistics.mean(found) if found else None

    def __enter__(self) -> "Utilisation":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()


# The parts --------------------------------------------------------------------------------------
def tests(part: Part) -> None:
    """Run the tests that need a GPU."""
    files = ["tests/gpu"]
    if not part.tiny:
        files += [
            f"tests/{f}.py"
            for f in ("core/test_extraction", "metrics/test_sfda", "metrics/test_loo")
        ]
    log = part.options.out / "tests.log"
    options = ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    options += ["-o", "filterwarnings=default"]
    if find_spec("xdist") and not part.tiny:
        options += ["-n", "6"]
    with log.open("w") as out:
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    lines = log.read_text().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            part.add(line[:72], 1, "failed")
    last = lines[-1].strip("= ") if lines else ""
    part.add(f"pytest -m gpu: {last}"[:72], int(" failed" in last or " error" in last), "", "0")


def scores(part: Part) -> None:
    """Compare SFDA on the device with the CPU, and with the matrix products it consists of."""
    size = 128 if part.tiny else 4096
    A = torch.rand(size, size, dtype=torch.float64, device=part.device)
    seconds, _ = measure(lambda: A @ A, part.device)
    rate = 2 * size**3 / seconds
    part.add(f"float64 matrix product, {size}³", rate / 1e12, "TFLOP/s")
    shapes = (
        ((300, 64, 5), (200, 300, 4)) if part.tiny else ((5000, 2048, 100), (50000, 1024, 1000))
    )
    for n, d, c in shapes:
        rng = np.random.default_rng(0)
        y = np.arange(n) % c
        X = rng.normal(size=(n, d)).astype(np.float32)
        X += 0.3 * rng.normal(size=(c, d)).astype(np.float32)[y]
        repeats = 1 if n > 10000 else 3
        for variant, passes in (("loo", 1), ("official", 2)):
            name = f"{variant}, N={n} D={d} C={c}"
            for dtype, goal in ((np.float32, "≤ 1e-4"), (np.float64, "≤ 1e-6")):
                x = X.astype(dtype)
                on_cpu, expected = measure(lambda: sfda(x, y, variant=variant), "cpu", repeats)  # noqa: B023
                there = torch.as_tensor(x, device=part.device)
                spent, found = measure(lambda: sfda(there, y, variant=variant), part.device)  # noqa: B023
                worst = np.abs(found.per_sample - expected.per_sample).max()
                kind = np.dtype(dtype).name
                part.add(f"{name}, {kind}: largest difference", float(worst), "", goal)
                if dtype == np.float32:
                    m = min(n, d)
                    flops = passes * (2 * n * d * m + m**3 / 3)
                    part.add(f"{name}: seconds", spent, "s")
                    part.add(f"{name}: ÷ its matrix products", spent * rate / flops, "×")
                    part.add(f"{name}: CPU ÷ device", on_cpu / spent, "×")
                    moved, _ = measure(
                        lambda: sfda(torch.as_tensor(x, device=part.device), y, variant=variant),  # noqa: B023
                        part.device,
                    )
                    chosen = scoring.scores_faster((n, d), part.device)
                    part.add(f"{name}: CPU ÷ device with transfer", on_cpu / moved, "×")
                    part.add(
                        f"{name}: `rank` takes the device", str(chosen), "", str(moved < on_cpu)
                    )
                if part.left < 5:
                    return


def extract_all(dataset, backbones, settings, **kwargs) -> dict:
    """Extract; return seconds, the moment when the first was whole, and the features."""
    marks, found = [], []
    started = time.perf_counter()
    for e in extract(dataset, backbones, settings, **kwargs):
        if e.error:
            raise RuntimeError(f"{e.backbone.name}: {e.error}")
        marks.append(time.perf_counter())
        found.append(e)
    parts = ("load", "decode", "decode_work", "forward", "copy")
    return {
        "wall": marks[-1] - started,
        "first": marks[0],
        "last": marks[-1],
        # once all images are decoded, which the first backbone waits for
        "rate": len(dataset) * (len(found) - 1) / (marks[-1] - marks[0]),
        "computing": sum(e.seconds["forward"] for e in found[1:]) / (marks[-1] - marks[0]),
        "seconds": {p: sum(e.seconds.get(p, 0.0) for e in found) for p in parts},
        "features": {e.backbone.name: e.features.x for e in found},
    }


def differ(found: dict, expected: dict) -> float:
    """Return the largest difference relative to the largest feature, of the worst backbone."""
    return max(
        float(np.abs(found[name][: len(x)] - x).max() / np.abs(x).max())
        for name, x in expected.items()
    )


def extraction_(part: Part) -> None:
    """Measure the extraction against a plain loop of timm, in every precision."""
    dataset, backbones = make_inputs(part)
    few = dataset.subset(np.arange(min(len(dataset), 16 if part.tiny else 128)))
    expected = extract_all(few, backbones, Settings("cpu"))["features"]
    workers = min(os.cpu_count() or 1, 2 if part.tiny else 8)
    n = len(dataset) * len(backbones)
    part.add("backbones × images", n)
    on_gpu = part.device.startswith("cuda")
    more = ("tf32", "float16") if on_gpu else ()
    for precision in ("float32", "bfloat16", *more):
        settings = Settings(part.device, precision, workers=workers)
        with Utilisation(part.device) as busy:
            r = extract_all(dataset, backbones, settings)
        part.add(f"{precision}: images × backbones per second, in all", n / r["wall"], "/s")
        part.add(f"{precision}: the same, images decoded", r["rate"], "/s")
        part.add(f"{precision}: device computing, images decoded", r["computing"], "", "≥ .90")
        if (share := busy.between(r["first"], r["last"])) is not None:
            part.add(f"{precision}: GPU busy by NVML, images decoded", share, "", "≥ .90")
        for what, label in (
            ("decode", "waiting for pixels"),
            ("load", "opening networks"),
            ("copy", "features to the host, with the wait for the device"),
        ):
            part.add(f"{precision}: {label}", r["seconds"][what], "s")
        part.add(f"{precision}: difference to float32 on the CPU", differ(r["features"], expected))
        if precision not in more:
            started = time.perf_counter()
            batch = 8 if part.tiny else 256
            plain_loop(dataset, backbones, part.device, batch, workers, precision)
            rate = n / (time.perf_counter() - started)
            part.add(f"plain timm loop, {precision} (torch's own): images × backbones", rate, "/s")
            part.add(f"{precision}: ours ÷ plain loop", n / r["wall"] / rate, "×", "≥ 3")
        if part.left < 15:
            return


def overlap(part: Part) -> None:
    """Measure alone each thing that lets the GPU compute all the time."""
    dataset, backbones = make_inputs(part)
    dataset = dataset.subset(np.arange(min(len(dataset), 24 if part.tiny else 1000)))
    precision = "bfloat16" if part.device != "cpu" else "float32"
    settings = Settings(part.device, precision)
    for backbone in backbones[:4]:  # kernels are chosen and loaded with the first
        model, preprocessing = loading.load(backbone)
        layout = devices.lay_out(model.to(part.device))
        size = preprocessing.geometry.input_size
        x = torch.rand(8 if part.tiny else 256, *size, device=part.device)
        x = x.contiguous(memory_format=layout)
        for what in ("first", "second", "third"):
            started = time.perf_counter()
            with torch.inference_mode(), devices.compute(part.device, precision):
                model(x)
            synchronize(part.device)
            spent = time.perf_counter() - started
            part.add(f"{backbone.name}: {what} batch of {len(x)}", 1000 * spent, "ms")
    extract_all(dataset, backbones, settings)  # to warm up
    lanes, build = run.LANES, loading._build
    switches: dict[str, dict] = {
        "all": {},
        "kernels not loaded meanwhile": {"WARM_UP": False},
        "no network opened meanwhile": {"LANES": 1},
        "pixels not pinned": {"PIN": False},
        "pixels copied in between": {"SIDE_STREAM": False},
        "networks with random weights first": {"build": True},
        "nothing of it": {"LANES": 1, "PIN": False, "SIDE_STREAM": False, "build": True},
        "all, again": {},
        "four lanes": {"LANES": 4},
    }
    for name, switch in switches.items():
        run.LANES = switch.get("LANES", lanes)  # in the modules that read them
        for of in ("PIN", "SIDE_STREAM", "WARM_UP"):
            setattr(worker, of, of not in switch)
        if "build" in switch:
            loading._build = lambda name, **of: timm.create_model(name, pretrained=True, **of)
        try:
            r = extract_all(dataset, backbones, settings)
        finally:
            loading._build = build
        part.add(f"{name}: images × backbones per second, images decoded", r["rate"], "/s")
        part.add(f"{name}: device computing", r["computing"])
        if part.left < 5:
            return


def ray_(part: Part) -> None:
    """Share one GPU between actors, and between the trials of a search."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise Skip(f"Ray cannot be imported ({error})") from error
    import psutil
    from sfda_tune_ray import RayExecutor

    from sfda_tune import search

    dataset, backbones = make_inputs(part)
    n = len(dataset) * len(backbones)
    on_gpu = part.device.startswith("cuda")
    settings = Settings(part.device, "bfloat16" if on_gpu else "float32")
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        local = extract_all(dataset, backbones, settings)
        part.add("local: images × backbones per second", n / local["wall"], "/s")
        for actors in (2,) if part.tiny else (1, 2, 4):
            executor = RayExecutor(
                "local", actors=actors, num_gpus=1 / actors if on_gpu else 0,
                cpus_per_actor=max(1, cores // actors), unit_seconds=2,
            )  # fmt: skip
            store = FeatureStore(Path(folder) / f"{actors} actors")
            with executor:
                r = extract_all(dataset, backbones, settings, store=store, executor=executor)
                part.add(f"{actors} actors: images × backbones per second", n / r["wall"], "/s")
                part.add(f"{actors} actors: waiting until they had started", executor.waited, "s")
                report = executor.report()
            part.add(f"{actors} actors: utilisation", report["utilisation"])
            goal = "≤ .05" if on_gpu else "0"
            worst = differ(r["features"], local["features"])
            part.add(f"{actors} actors: difference to the local run", worst, "", goal)
            peaks = [e.get("peak_memory", 0) for e in _infos(store)]
            part.add(f"{actors} actors: largest peak of a batch", max(peaks) / 2**20, "MiB")
            if part.left < 20:
                return
        executor = RayExecutor(
            "local", actors=2, num_gpus=0.5 if on_gpu else 0, cpus_per_actor=1, unit_seconds=0.5
        )
        store, found = FeatureStore(Path(folder) / "killed"), {}
        with executor:
            for e in extract(dataset, backbones, settings, store=store, executor=executor):
                found[e.backbone.name] = e
                if len(found) == 1:
                    for process in psutil.Process().children(recursive=True):
                        if "_Extractor" in " ".join(process.cmdline()):
                            process.kill()
                            break
            report = executor.report()
        errors = [e.error for e in found.values() if e.error]
        part.add("one actor killed: backbones that failed", len(errors), "", "0")
        part.add("one actor killed: restarts seen", report["restarts"], "", "≥ 1")
        x = {name: e.features.x for name, e in found.items() if e.features is not None}
        part.add("one actor killed: difference", differ(x, local["features"]), "", goal)
        if part.left < 20:
            return
        started = time.perf_counter()
        trials = 2 if part.tiny else 8
        result = search(
            dataset, [b.spec for b in backbones if not b.plugins][:2], engine="ray",
            trials=trials, out=Path(folder) / "run", device=part.device,
            epochs=1 if part.tiny else 2,
        )  # fmt: skip
        part.add(f"search --engine ray, {trials} trials", time.perf_counter() - started, "s")
        part.add("search: accuracy on its test images", result.test["accuracy"])


def _infos(store: FeatureStore) -> list[dict]:
    from safetensors import safe_open

    found = []
    for file, _ in store.entries():
        with safe_open(file, "numpy") as segment:
            found += json.loads(segment.metadata()["parts"])
    return found or [{}]


def finetuning(part: Part) -> None:
    """Measure fine-tuning: precisions, memory format, memory that does not suffice, resumption."""
    dataset, backbones = make_inputs(part)
    dataset = dataset.subset(np.arange(min(len(dataset), 48 if part.tiny else 512)))
    on_gpu = part.device.startswith("cuda")
    batch = 8 if part.tiny else 64
    precisions = ("float32", "tf32", *HALF) if on_gpu else ("float32", "bfloat16")
    for backbone in backbones[: 1 if part.tiny else 2]:
        for precision in precisions:
            config = FinetuneConfig(epochs=2, batch_size=batch, precision=precision)
            *_, last = finetune(backbone, dataset, config, device=part.device)
            part.add(
                f"{backbone.name}, {precision}: epoch of {len(dataset)} images", last.seconds, "s"
            )
            if part.left < 20:
                return
    name = TINY[0] if part.tiny else ARCHITECTURES[0]
    for layout in (torch.contiguous_format, torch.channels_last):
        rate = train_rate(name, batch, part, layout)
        part.add(f"{name}, bfloat16, {str(layout)[6:]}: images per second", rate, "/s")
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(epochs=3, batch_size=batch)
        whole = finetune(backbones[0], dataset, config, device=part.device)
        expected = list(whole)
        begun = finetune(backbones[0], dataset, config, device=part.device, checkpoint_dir=folder)
        next(begun), next(begun)
        begun.close()
        again = finetune(backbones[0], dataset, config, device=part.device, checkpoint_dir=folder)
        last = list(again)[-1]
        part.add("resumed: difference of the loss", abs(last.train_loss - expected[-1].train_loss))
        same = all(torch.equal(v, again._weights[k]) for k, v in whole._weights.items())
        part.add("resumed: best weights bit for bit", str(same), "", "True")
    if not on_gpu:
        part.add("memory that does not suffice", "skipped", "(only a GPU's can be limited)")
        return
    total = torch.cuda.get_device_properties(part.device).total_memory
    torch.cuda.empty_cache()
    limit = (torch.cuda.memory_reserved() + 3 * 2**30) / total
    torch.cuda.set_per_process_memory_fraction(min(limit, 1.0))
    config = FinetuneConfig(epochs=1, batch_size=256)
    tuning = finetune(backbones[0], dataset, config, device=part.device)
    list(tuning)
    part.add("batch of 256 in 3 GiB: images at a time", tuning._micro, "", "< 256")


def train_rate(name: str, batch: int, part: Part, layout: torch.memory_format) -> float:
    """Return the images per second of plain training steps."""
    model: Any = timm.create_model(name, num_classes=10).to(part.device, memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters())
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.rand(batch, 3, size, size, device=part.device).contiguous(memory_format=layout)
    y = torch.arange(batch, device=part.device) % 10

    def step() -> None:
        with devices.compute(part.device, "bfloat16"):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    steps = 2 if part.tiny else 20
    seconds, _ = measure(lambda: [step() for _ in range(steps)], part.device, 1)
    return steps * batch / seconds


def truth(part: Part) -> None:
    """Fine-tune what `real_zoo.json` lacks, for as long as there is time."""
    if not ZOO.is_dir():
        raise Skip(f"there are no real weights and images at {ZOO}")
    minutes = 0 if part.tiny else max(0, part.left - 30) / 60
    out = part.options.out / "real_zoo.json"
    command = [
        sys.executable, str(Path(__file__).with_name("real_zoo.py")), "--device", part.device,
        "--jobs", str(1 if part.tiny else 6), "--minutes", f"{minutes:.2f}", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    (part.options.out / "truth.log").write_text(done.stderr)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found = json.loads(out.read_text())["accuracies"] if out.is_file() else {}
    for name, pairs in found.items():
        part.add(f"{name}: pairs measured", len(pairs))
    part.add("pairs measured in all", sum(map(len, found.values())))


FUNCTIONS = {
    "tests": tests, "scores": scores, "extraction": extraction_, "overlap": overlap, "ray": ray_,
    "finetuning": finetuning, "truth": truth,
}  # fmt: skip


# What travels ------------------------------------------------------------------------------------
class Pieces(io.RawIOBase):
    """A file in pieces: part.00, part.01, …"""

    def __init__(self, folder: Path) -> None:
        self.folder, self.size, self.files = folder, 0, []

    def write(self, data: Any) -> int:
        data = memoryview(data)
        while len(data):
            if self.size % PIECE == 0:
                self.files.append((self.folder / f"part.{len(self.files):02d}").open("wb"))
            n = min(len(data), PIECE - self.size % PIECE)
            self.files[-1].write(data[:n])
            self.size, data = self.size + n, data[n:]
        return 0

    def close(self) -> None:
        for file in self.files:
            file.close()


def pack(folder: Path, python: str) -> None:
    """Write wheels and zoo into pieces, by what they are worth: a tail may stay behind."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for file in (*folder.glob("part.*"), *wheels.glob("*.whl")):
        file.unlink()
    tags = [f"manylinux_2_{n}_x86_64" for n in (34, 28, 27, 24, 17, 12)]
    platforms = [f"--platform={tag}" for tag in (*tags, "manylinux2014_x86_64")]
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            f"--python-version={python}", "--implementation=cp", *platforms, "-d", str(wheels),
            *(f"{name}=={version(name)}" for name in WHEELS),
        ],
        check=True,
    )  # fmt: skip
    subprocess.run(  # for its entry points; the checkout comes before it
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(ROOT)],
        check=True,
    )
    large = list(wheels.glob("ray-*.whl"))
    files = [f for f in sorted(wheels.iterdir()) if f not in large]
    first = [ZOO / f for f in ("zoo_models.py", "models.csv", "datasets.csv")]
    first += [ZOO / "models" / name for name in SMALL]
    first += [ZOO / "datasets" / name for name in ("clothing", "trashnet")]
    rest = [f for f in (*ZOO.glob("models/*"), *ZOO.glob("datasets/*")) if f not in first]
    pieces = Pieces(folder)
    with contextlib.closing(pieces), tarfile.open(fileobj=pieces, mode="w|") as tar:
        for file in (*files, *first, *large, *sorted(rest)):
            if file.exists():
                inside = file.suffix == ".whl"
                name = (
                    f"gpu_wheels/{file.name}" if inside else f"shared/zoo/{file.relative_to(ZOO)}"
                )
                tar.add(file, name)
    print(f"{len(pieces.files)} pieces, {pieces.size / 2**20:.0f} MiB in all, in {folder}")


# One process for each ---------------------------------------------------------------------------
def run_part(options: argparse.Namespace) -> None:
    """Run one part in this process."""
    part = Part(options.part, options)
    torch.backends.cudnn.benchmark = False
    try:
        FUNCTIONS[options.part](part)
    except Skip as reason:
        part.write(skipped=str(reason))
    except Exception as error:
        part.write(error=f"{type(error).__name__}: {error}")
        raise
    else:
        part.write()


def run_all(options: argparse.Namespace) -> int:
    """Run the parts one after the other; return how many did not come to their end."""
    options.out.mkdir(parents=True, exist_ok=True)
    whole = options.out / "gpu.json"  # in one file: some machines give back only a few
    parts = json.loads(whole.read_text()) if whole.is_file() else {}
    end = time.monotonic() + 60 * options.minutes
    print(f"{describe(options.device)}, torch {torch.__version__}, timm {timm.__version__}")
    failed = 0
    for k, name in enumerate(options.parts):
        left = end - time.monotonic()
        seconds = left * PARTS[name] / sum(PARTS[other] for other in options.parts[k:])
        if seconds < 5:
            print(f"{name:<11} no time left")
            failed += 1
            continue
        file = options.out / f"{name}.json"
        file.unlink(missing_ok=True)
        command = [
            sys.executable, __file__, "--part", name, "--seconds", f"{seconds - 3:.0f}",
            "--device", options.device, "--out", str(options.out),
            "--inputs", str(options.inputs),
            *(["--tiny"] if options.tiny else []),
        ]  # fmt: skip
        child = subprocess.Popen(command, start_new_session=True)
        try:
            code: Any = child.wait(seconds + 15)
        except subprocess.TimeoutExpired:
            code = "out of time"
        finally:  # with its own children; also if this process is to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        found = json.loads(file.read_text()) if file.is_file() else {}
        parts[name] = found
        write_text(whole, json.dumps(parts, indent=1) + "\n")
        file.unlink(missing_ok=True)
        if reason := found.get("skipped"):
            print(f"{name:<11} skipped: {reason}")
        elif code:
            failed += 1
            print(f"{name:<11} did not come to its end ({found.get('error') or code})")
        else:
            print(f"{name:<11} took {found['seconds']:.0f} s of {seconds:.0f}")
    return failed


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small input, to try the script")
    parser.add_argument("--pack", type=Path, metavar="DIR")
    parser.add_argument("--python", default="3.12", help="the version there, for --pack")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.pack:
        pack(options.pack, options.python)
        return
    try:
        options.device = devices.resolve_device(options.device)
    except ValueError as error:
        sys.exit(f"{error} To try the script without a GPU: --device cpu --tiny")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.part:
        run_part(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.inputs = Path(folder)
        failed = run_all(options)
    if failed:
        sys.exit(f"{failed} parts did not come to their end")


if __name__ == "__main__":
    main()
