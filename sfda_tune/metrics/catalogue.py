"""The metrics that come with the package, under their names."""

from __future__ import annotations

from sfda_tune.metrics.etran import etran
from sfda_tune.metrics.gbc import gbc
from sfda_tune.metrics.hscore import hscore
from sfda_tune.metrics.knn import knn
from sfda_tune.metrics.leep import leep
from sfda_tune.metrics.linear_probe import linear_probe
from sfda_tune.metrics.logme import logme
from sfda_tune.metrics.nce import nce
from sfda_tune.metrics.ncti import ncti
from sfda_tune.metrics.nleep import nleep
from sfda_tune.metrics.pactran import pactran
from sfda_tune.metrics.parc import parc
from sfda_tune.metrics.ped import ped
from sfda_tune.metrics.priors import imagenet, params
from sfda_tune.metrics.registry import register_metric
from sfda_tune.metrics.sfda import sfda
from sfda_tune.metrics.tmi import tmi
from sfda_tune.metrics.transrate import transrate

register_metric(
    sfda,
    cost="2ND² + ⅔D³; 2N²D + ⅔N³ if N < D",
    source="Shao et al., ECCV 2022, doi:10.1007/978-3-031-19830-4_17",
    misleads="N ≲ D: near 1 for any labels, wide backbones win; depends on the feature scale",
)
register_metric(
    logme,
    cost="ND·min(N, D) + 9 min(N, D)³",
    source="You et al., ICML 2021, arXiv:2102.11005",
    misleads="values of different data sets; backbones that move far in fine-tuning",
)
register_metric(
    hscore,
    cost="ND·min(N, D) + ⅓ min(N, D)³",
    source="Bao et al., ICIP 2019; Ibrahim et al., arXiv:2110.06893",
    misleads="backbones of different widths; N ≲ D",
)
register_metric(
    transrate,
    cost="ND·min(N, D) + Σ_c n_c D·min(n_c, D)",
    source="Huang et al., ICML 2022, arXiv:2106.09627",
    misleads="fewer samples per class than dimensions: rank, not separation",
)
register_metric(
    gbc,
    cost="ND·min(N, D) + C²·64",
    source="Pándy et al., CVPR 2022, arXiv:2111.12780",
    misleads="correlated features; many far-apart classes, where all terms vanish",
)
register_metric(
    parc,
    cost="n²D + n² log n, n = min(N, 2000)",
    source="Bolya et al., NeurIPS 2021, arXiv:2111.06977",
    misleads="values of different data sets; many classes",
)
register_metric(
    ncti,
    needs=("features", "hub"),
    cost="ND·min(N, D) + N(64² + C²)",
    source="Wang et al., ICCV 2023",
    misleads="alone, without combine_hub; medical images; depends on the feature scale",
)
register_metric(
    nleep,
    cost="ND·min(N, D) + EM of 5C Gaussians",
    source="Li et al., CVPR 2021, arXiv:2011.11200",
    misleads="few samples per class: one cluster per handful of samples",
)
register_metric(
    tmi,
    cost="2ND",
    source="Xu & Kang, ICCV 2023, arXiv:2308.05986",
    misleads="backbones of different scale or width; ignores separation altogether",
)
register_metric(
    ped,
    cost="6C²D + ND + the base metric",
    source="Li et al., ICCV 2023, arXiv:2308.15074",
    misleads="uses the labels to part the classes: the more overlap, the more it gains",
)
register_metric(
    pactran,
    cost="4NDC a step, up to hundreds of steps",
    source="Ding et al., ECCV 2022, arXiv:2203.05126",
    misleads="features of different scale; N < D",
)
register_metric(
    etran,
    needs=("features", "hub"),
    cost="ND·min(N, D) + min(N, D)³",
    source="Gholami et al., ICCV 2023, arXiv:2308.02027",
    misleads="N ≲ D; energy between heads that were trained differently",
)
register_metric(
    knn,
    cost="2N²D",
    source="baseline; Puigcerver et al., ICLR 2021, arXiv:2009.13239",
    misleads="near-duplicates; features with a few dominating dimensions",
)
register_metric(
    linear_probe,
    cost="5 folds × 5 strengths × tens of steps of 4NDC",
    source="baseline; Kornblith et al., CVPR 2019, arXiv:1805.08974",
    misleads="predicts a linear head, not fine-tuning",
)
register_metric(
    leep,
    needs="logits",
    cost="N·C_s for C_s source classes",
    source="Nguyen et al., ICML 2020, arXiv:2002.12462",
    misleads="few or unrelated source classes; self-supervised backbones have none",
)
register_metric(
    nce,
    needs="logits",
    cost="N·C_s for C_s source classes",
    source="Tran et al., ICCV 2019, arXiv:1908.08142",
    misleads="more source classes than samples",
)
register_metric(
    imagenet,
    needs="prior",
    cost="0",
    source="Kornblith et al., CVPR 2019; timm's published results",
    misleads="target images unlike ImageNet; the same order for every data set",
)
register_metric(
    params,
    needs="prior",
    cost="0",
    source="baseline",
    misleads="backbones of different families; the same order for every data set",
)
