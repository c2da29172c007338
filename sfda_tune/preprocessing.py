"""From a decoded image to a backbone's input, in two halves.

*Geometry* (resize, crop; timm's own evaluation transform, 8-bit result) runs once per image and is
shared by every backbone with the same geometry. *Normalisation* (÷255, −mean, ÷std) is cheap and
differs between backbones, so it runs on the device, batch by batch. Both together give what timm's
``create_transform(**resolve_model_data_config(model))`` gives, to the last bit on a CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["Geometry", "Preprocessing"]


@dataclass(frozen=True)
class Geometry:
    """How an image is resized and cropped; equal geometries share their decoded images.

    Parameters
    ----------
    input_size : (channels, height, width)
    interpolation, crop_mode : str
        In timm's terms.
    crop_pct : float
        Side of the crop / side of the resized image.
    fill : tuple of float, default ()
        Mean colour that timm pads with; only for ``crop_mode="border"``.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    fill: tuple[float, ...] = ()

    def build(self) -> Callable[[Image.Image], torch.Tensor]:
        """Return the transform from an RGB image to a uint8 tensor (channels, height, width)."""
        from timm.data.transforms_factory import create_transform
        from torchvision.transforms import Compose, Grayscale

        transform: Any = create_transform(
            input_size=self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.fill or (0.0, 0.0, 0.0),
            normalize=False,
        )
        if self.input_size[0] == 1:
            transform = Compose([Grayscale(), transform])
        return transform


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """Everything between a decoded RGB image and a backbone's input batch.

    Parameters
    ----------
    geometry : Geometry or None
        None for a transform of the user's own.
    mean, std : tuple of float, one per channel
        In units of 0 … 1. Empty if `transform` does it.
    transform : callable or None
        RGB `PIL.Image` to a float tensor (channels, height, width); replaces all of the above.
    """

    geometry: Geometry | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    transform: Callable[[Any], torch.Tensor] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Split timm's data configuration (`timm.data.resolve_model_data_config`)."""
        c, h, w = config["input_size"]
        mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
        if len(mean) != c:  # timm's default (ImageNet, 3 values) for a backbone of other channels
            mean, std = (sum(mean) / len(mean),) * c, (sum(std) / len(std),) * c
        geometry = Geometry(
            (int(c), int(h), int(w)),
            str(config["interpolation"]),
            float(config["crop_pct"]),
            str(config["crop_mode"]),
            mean if config["crop_mode"] == "border" else (),
        )
        if c not in (1, 3):
            raise ValueError(
                f"the backbone takes {c} channels, images have 3; pass a Backbone with a "
                "transform of your own that makes them"
            )
        return cls(geometry, mean, std)

    @cached_property
    def key(self) -> Geometry | str:
        """Backbones with equal keys share the decoded images."""
        return self.geometry if self.geometry is not None else self._probe()

    @property
    def input_size(self) -> tuple[int, int, int] | None:
        """Channels, height, width, where known beforehand."""
        return self.geometry.input_size if self.geometry is not None else None

    def build(self) -> Callable[[Image.Image], torch.Tensor]:
        """Return the shared first half: RGB image to tensor."""
        if self.geometry is not None:
            return self.geometry.build()
        assert self.transform is not None
        return self.transform

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """Apply the second half to a batch (n, channels, height, width) on the device."""
        import torch

        if self.geometry is None:
            return batch.float()
        mean, std = (
            torch.tensor(v, device=batch.device).view(1, -1, 1, 1) for v in (self.mean, self.std)
        )
        return batch.float().div_(255).sub_(mean).div_(std)  # the operations of torchvision

    def fingerprint(self) -> str:
        """Return a text that differs for preprocessings which give different inputs."""
        return repr((self.geometry, self.mean, self.std)) if self.geometry else str(self.key)

    def _probe(self) -> str:
        """Know a transform of the user's own, which has no name, by what it does to two images."""
        from PIL import Image

        assert self.transform is not None
        digest = hashlib.blake2b(digest_size=16)
        for height, width in ((97, 131), (300, 200)):
            rows = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
            try:
                probe = self.transform(Image.fromarray(rows))
                digest.update(repr((tuple(probe.shape), str(probe.dtype))).encode())
                digest.update(probe.contiguous().numpy().tobytes())
            except Exception as error:
                raise ValueError(
                    f"its transform fails on an RGB image of {width}×{height} pixels "
                    f"({type(error).__name__}: {error}); it must return a tensor (c, h, w)"
                ) from error
        return f"transform {digest.hexdigest()}"
