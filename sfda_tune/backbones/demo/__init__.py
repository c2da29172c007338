"""The ``demo:*`` backbones: tiny timm networks that ship with the package.

The project pretrained them itself (:mod:`sfda_tune.backbones.demo.pretrain`) on procedurally drawn
source tasks (:mod:`sfda_tune.backbones.demo.sources`) that are more or less relevant to
handwritten digits, and measured how well each fine-tunes on scikit-learn's `digits`
(:mod:`sfda_tune.backbones.demo.measure`).

======================  =====  ======  ========================================  ========
name                    width  pixels  pretrained on                             accuracy
======================  =====  ======  ========================================  ========
resnet_glyphs              96      32  letters and symbols, no digits                .968
densenet_digits            46      48  printed digits                                .965
convnext_glyphs           256      32  letters and symbols, no digits                .955
efficientnet_textures     256      32  gratings, checkers, dots, rings, blobs        .932
vit_glyphs                 64      32  letters and symbols, no digits                .904
resnet_noise              384      32  colour noise with random labels               .892
regnet_shapes              64      40  geometric shapes                              .871
vit_untrained             160      32  nothing: random initialisation                .269
======================  =====  ======  ========================================  ========

Width is that of the pooled features; accuracy that after fine-tuning all weights on 200 images,
mean of three seeds. Width and accuracy are unrelated on purpose, so that a score that rewards
width shows it. Neighbours in the table can be closer than their seeds (`accuracies.json` has the
single values).

>>> from sfda_tune.backbones import demo
>>> len(demo.names()), demo.folder("vit_glyphs").name
(8, 'vit_glyphs')
>>> max(demo.accuracies(), key=demo.accuracies().get)
'resnet_glyphs'
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["accuracies", "folder", "names", "truth"]

WEIGHTS = Path(__file__).parent / "weights"
ACCURACIES = Path(__file__).parent / "accuracies.json"


def names() -> list[str]:
    """Return the names of the embedded backbones, sorted."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def folder(name: str) -> Path:
    """Return the timm checkpoint folder of one of the `names`, or raise a ValueError.

    ``timm.create_model(f"local-dir:{folder}", pretrained=True)`` opens it.
    """
    if name not in names():
        raise ValueError(f"no demo backbone {name!r}; there are: {', '.join(names())}")
    return WEIGHTS / name


def truth() -> dict[str, Any]:
    """Return `accuracies.json`: the recipe, the versions and one entry per backbone."""
    return json.loads(ACCURACIES.read_text(encoding="utf-8"))


def accuracies() -> dict[str, float]:
    """Return the measured accuracy of each backbone, fine-tuned on `digits`, mean of 3 seeds."""
    return {name: entry["mean"] for name, entry in truth()["backbones"].items()}
