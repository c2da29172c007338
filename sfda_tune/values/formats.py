"""What the JSON files hold that are read again, as kinds for `files.read_json`.

Only what somebody works with is named; further fields may be anything.
"""

from __future__ import annotations

from typing import Any

from sfda_tune.values.files import AtLeast

__all__ = [
    "CLASSIFIER", "CONFIG", "ENVIRONMENT", "EXPERIMENTS", "FOUND", "HARD_IMAGE", "PROVENANCE",
    "RANKING", "RECORD", "REGRESSOR", "SEARCH", "STATE", "TRIAL",
]  # fmt: skip

COUNT = (AtLeast(0), None)
NUMBER = (float, None)
TEXT = (str, None)
NUMBERS = {str: NUMBER}
NOTED_EPOCH = {str: (float, None, [float])}
GROUPS: dict[Any, Any] = {
    "n": AtLeast(1, int),
    "largest": AtLeast(1, int),
    "several_classes": AtLeast(0, int),
    "options?": ({str: TEXT}, None),
}

RANKING: dict[Any, Any] = {
    "format": str,
    "metric": str,
    "labels": TEXT,
    "groups?": TEXT,
    "info": {
        "dataset?": object,
        "classes?": (list, None),
        "unreadable?": ({str: object}, None),
        "n_images?": AtLeast(0, int),
        "arguments?": {
            "dataset?": str,
            "backbones?": [str],
            "plugins?": [str],
            "only_python?": [str],
        },
        "hard_images?": [
            {"image": str, "row": AtLeast(0, int), "label": str, "p": AtLeast(0), "doubtful": bool}
        ],
        "copies?": ([{"image": str, "same_as": str}], None),
        "several_classes?": ([{"image": str, "classes": [str]}], None),
        "groups?": (GROUPS, None),
        "near_duplicates?": (
            {"n": int, "sets": int, "several_classes": int, "pairs": [[str]]},
            None,
        ),
        "task?": str,
        "channels?": AtLeast(1, int),
        "target?": NUMBERS,
        "level_counts?": [{"name": str, "images": AtLeast(0, int)}],
        "label_counts?": [{"name": str, "positives": AtLeast(0, int), "missing": AtLeast(0, int)}],
        "seconds?": (NUMBERS, None),
        "versions?": ({str: object}, None),
        "evidence?": str,
        "not_looked_at?": [str],
        "train?": str,
    },
    "scores": [
        {
            "backbone": str,
            "value": NUMBER,
            "per_sample": TEXT,
            "n_samples": AtLeast(0, int),
            "n_dims": AtLeast(0, int),
            "seconds": float,
            "error": TEXT,
            "details": {
                "n_params?": COUNT,
                "images_per_second?": COUNT,
                "batch?": COUNT,
                "peak_memory?": COUNT,
                "peak_batch?": COUNT,
                "input_size?": ([AtLeast(1, int)], None),
                "standard_error?": COUNT,
                "license?": TEXT,
                "evidence?": float,
                "average_precisions?": [NUMBER],
                "left_out?": [AtLeast(0, int)],
                "confusions?": [[AtLeast(0, int)]],
                "forecast?": {
                    "rank_low": AtLeast(1, int),
                    "rank_high": AtLeast(1, int),
                    "p_best": AtLeast(0),
                    "interval_low?": float,
                    "interval_high?": float,
                    "group?": str,
                    "error": AtLeast(0),
                    "why": str,
                },
                "lambda?": (float, None, str, [object], {str: object}),
            },
        }
    ],
}

EPOCH = {
    "number": AtLeast(0, int),
    "value": float,
    "log_loss?": float,
    "rmse?": AtLeast(0),
    "error?": AtLeast(0),
    "train_loss?": NUMBER,
    "seconds": AtLeast(0),
    "temperature?": AtLeast(0),
    "interpolation?": AtLeast(0),
    "thresholds?": [AtLeast(0)],
}
CALIBRATION: dict[Any, Any] = {
    **dict.fromkeys(("temperature", "ece_before", "ece_after"), AtLeast(0)),
    **dict.fromkeys(("log_loss_before", "log_loss_after"), float),
    "bins_before": [[AtLeast(0)]],
    "bins_after": [[AtLeast(0)]],
    "n_val": AtLeast(0, int),
}
OUTLINE: dict[Any, Any] = {  # of a trial, as a report needs it
    "number": int,
    "backbone": str,
    "params": {str: object},
    "folder?": str,
    "state": str,
    "value?": NUMBER,
    "values?": ([NUMBER], None),
    "started?": COUNT,
    "seconds?": COUNT,
    "worker?": str,
    "error?": TEXT,
    "epochs?": [EPOCH],
}
TRIAL: dict[Any, Any] = OUTLINE | {"epochs": [EPOCH], "started": AtLeast(0)}

TESTED_LABEL: dict[Any, Any] = {
    "label": str,
    "images": AtLeast(0, int),
    "known": AtLeast(0, int),
    "average_precision": COUNT,
    "f1": COUNT,
    "threshold": AtLeast(0),
}

SEARCH: dict[Any, Any] = {
    "format?": int,
    "status?": str,
    "dataset?": str,
    "classes?": [str],
    "task?": str,
    "n_images?": {str: AtLeast(0, int)},
    "sources?": {str: str},
    "unreadable?": {str: object},
    "notes?": [str],
    "stages?": [{"name": str, "seconds": COUNT, "note?": str}],
    "candidates?": [str],
    "excluded?": ({str: str}, None),
    "survivors?": [str],
    "separable?": (bool, None),
    "decision?": TEXT,
    "objectives?": [str],
    "metric?": str,
    "engine?": str,
    "storage?": TEXT,
    "scores?": {str: float},
    "trials?": [OUTLINE],
    "front?": [int],
    "costs?": (
        {str: {"latency_ms?": COUNT, "n_params?": COUNT, "seconds_per_epoch?": COUNT}},
        None,
    ),
    "seconds?": {"total?": COUNT, "train_everything_estimate?": COUNT},
    "best?": (
        {
            "trial": int,
            "backbone": str,
            "params?": {str: object},
            "epochs?": (int, None),
            "val?": (NUMBERS, None),
            "test?": (NUMBERS, None),
            "calibration?": (CALIBRATION, None),
            "test_interval?": ([float], None),
            "test_intervals?": ({str: [float]}, None),
            "labels?": [TESTED_LABEL],
            "latency_ms?": COUNT,
            "n_params?": COUNT,
        },
        None,
    ),
}
# What a search needs of its own folder, and what one that is done tells
_NEEDED = ("status", "classes", "n_images", "stages", "excluded", "survivors", "separable")
_NEEDED += ("decision", "costs")
STATE: dict[Any, Any] = {
    key.removesuffix("?") if key[:-1] in _NEEDED else key: kind
    for key, kind in SEARCH.items()
    if "trials" not in key and key != "seconds?"
} | {
    "trials": [TRIAL],
    "seconds": {"total": AtLeast(0), "train_everything_estimate": COUNT},
}
FOUND: dict[Any, Any] = STATE | {
    "best": {
        "trial": int,
        "backbone": str,
        "params": {str: object},
        "test": {str: float},
        "latency_ms": COUNT,
        "n_params": COUNT,
    }
}
CONFIG: dict[Any, Any] = {"format?": int, "plugins?": ([str], None)}
ENVIRONMENT: dict[Any, Any] = {"format?": int, "versions?": {str: str}}
HARD_IMAGE: dict[Any, Any] = {
    "file": str,
    "item": str,
    "label": str,
    "predicted": str,
    "p_label": NUMBER,
    "error?": float,
}
SPLITS: dict[Any, Any] = {"left_out?": {str: [AtLeast(0, int)]}, "copies?": [[AtLeast(0, int)]]}
EXPERIMENTS = [{"trials": [str], "end": TEXT, "n_trials": (int, None)}]
PROVENANCE: dict[Any, Any] = {
    "classes": [str],
    "backbone": object,
    "digests?": {str: str},
    "task?": {"name": str, "mean?": float, "scale?": float, "thresholds?": [float]},
    "reading?": ({"bit_depth?": (int, None), "bands?": ([int], None), "of?": (int, None)}, None),
}
REGRESSOR: dict[Any, Any] = {
    "params": {str: object},
    "backbone": str,
    "fitted": {
        "image_shape_?": ([int], None),
        "value_range_?": object,
        "n_features_in_?": (int, None),
    },
}
CLASSIFIER: dict[Any, Any] = REGRESSOR | {"classes": [(str, int, float, bool)], "dtype": str}
RECORD: dict[Any, Any] = {
    "version": int,
    "digest": str,
    "metric": str,
    "info": {str: object},
    "scores": {str: NUMBER},
    "errors": {str: float},
    "failed": {str: str},
    "settings": {str: object},
}
