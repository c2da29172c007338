"""From a decoded image to a backbone's input, in two halves.

*Geometry* (resize, crop; timm's own evaluation transform, 8-bit result) runs once per image and is
shared by every backbone with the same geometry. *Normalisation* (÷255, −mean, ÷std) is cheap and
differs between backbones, so it runs on the device, batch by batch. Both together give what timm's
``create_transform(**resolve_model_data_config(model))`` gives, to the last bit on a CPU.
"""

from __future__ import annotations

import hashlib
import math
import random
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.backbones.identity import identify
from sfda_tune.values.text import one_line

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["Geometry", "Preprocessing", "check_input_size"]

LARGEST_SIDE = 4096  # pixels of a backbone's input; the largest of timm is 1,024


@dataclass(frozen=True)
class Geometry:
    """How an image is resized and cropped, in timm's terms; equal ones share decoded images."""

    input_size: tuple[int, int, int]  # channels, height, width
    interpolation: str
    crop_pct: float  # side of the crop / side of the resized image
    crop_mode: str
    fill: tuple[
        float, ...
    ] = ()  # mean colour that timm pads with, for ``crop_mode="border"`` only

    def build(self) -> Callable[[Any], torch.Tensor]:
        """Return the transform from an image to a uint8 tensor (channels, height, width).

        The image is RGB, or for other than one or three channels an array (h, w, channels).
        """
        from timm.data.transforms_factory import create_transform
        from torchvision.transforms import Compose, Grayscale

        transform: Any = create_transform(
            input_size=self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=(self.fill if self.input_size[0] in (1, 3) else self.fill[:1]) or (0.0, 0.0, 0.0),
            normalize=False,
        )
        if self.input_size[0] == 1:
            transform = Compose([Grayscale(), transform])
        return transform if self.input_size[0] in (1, 3) else Bandwise(transform)


@dataclass(frozen=True)
class Bandwise:
    """Does to each band of an array (h, w, bands) what `transform` does to a grey image.

    Pillow, too, resizes each channel of an RGB image by itself. A transform that draws random
    numbers (`random`) draws the same for each band: it cuts out, turns, and brightens all alike.

    >>> from torchvision.transforms import PILToTensor
    >>> Bandwise(PILToTensor())(np.zeros((5, 7, 4), np.uint8)).shape
    torch.Size([4, 5, 7])
    """

    transform: Callable[[Image.Image], torch.Tensor]
    random: bool = False

    def __call__(self, array: np.ndarray) -> torch.Tensor:
        import torch
        from PIL import Image

        made = []
        state = _random_state() if self.random else None
        for k in range(array.shape[2]):
            if state is not None:
                _set_random_state(state)
            made.append(self.transform(Image.fromarray(np.ascontiguousarray(array[..., k]))))
        return torch.cat(made)


def _random_state() -> tuple[Any, Any, Any]:
    import torch

    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _set_random_state(state: tuple[Any, Any, Any]) -> None:
    import torch

    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002 - timm's AugMix draws from it
    torch.set_rng_state(state[2])


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """Everything between a decoded image and a backbone's input batch."""

    geometry: Geometry | None  # None for a transform of the user's own
    mean: tuple[
        float, ...
    ] = ()  # one per channel, in units of 0 … 1; empty if `transform` does it
    std: tuple[float, ...] = ()
    # RGB `PIL.Image` to a float tensor (channels, height, width); replaces all of the above
    transform: Callable[[Any], torch.Tensor] | None = None
    channels: int = 3  # of the images that the transform is given

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Split timm's data configuration (`timm.data.resolve_model_data_config`)."""
        try:
            c, h, w = check_input_size(config["input_size"])
            mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
            # for other channels than it was trained with, as in timm's `resolve_input_data_config`
            if len(mean) != c:
                mean, std = (sum(mean) / len(mean),) * c, (sum(std) / len(std),) * c
            if len(std) != c or not all(map(math.isfinite, mean)) or not all(s > 0 for s in std):
                raise ValueError(f"its mean {mean} or std {std} is none of {c} channels")
            fill = mean if config["crop_mode"] == "border" else ()
            interpolation, crop_mode = str(config["interpolation"]), str(config["crop_mode"])
            crop_pct = float(config["crop_pct"])
            if not crop_pct > 0 or not 1 <= max(h, w) / crop_pct <= 2 * LARGEST_SIDE:
                raise ValueError(f"its crop_pct {crop_pct:g} makes {max(h, w)} pixels impossible")
            geometry = Geometry((c, h, w), interpolation, crop_pct, crop_mode, fill)
            made = geometry.build()(_noise(40, 60, c))
            if tuple(made.shape) != (c, h, w):
                raise ValueError(f"it makes images of {tuple(made.shape)} instead of {(c, h, w)}")
        except Exception as error:  # of whatever stands in a config.json
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"its preprocessing cannot be used ({kind}{one_line(error)}); see "
                "`pretrained_cfg` in its config.json, or pass a Backbone with a transform of yours"
            ) from error
        return cls(geometry, mean, std)

    @cached_property
    def key(self) -> Geometry | str:
        """Backbones with equal keys share the decoded images."""
        return self.geometry if self.geometry is not None else self._probe[0]

    @property
    def input_size(self) -> tuple[int, int, int] | None:
        """Channels, height, width, where known beforehand."""
        return self.geometry.input_size if self.geometry is not None else None

    @property
    def output_size(self) -> tuple[int, ...]:
        """Channels, height, width of what it makes of one image."""
        return self.input_size or self._probe[1]

    def blank(self) -> torch.Tensor:
        """Return what it makes of a black image of 256 × 256 pixels."""
        from PIL import Image

        channels = self.geometry.input_size[0] if self.geometry else self.channels
        if channels in (1, 3):
            return self.build()(Image.new("RGB", (256, 256)))
        return self.build()(np.zeros((256, 256, channels), np.uint8))

    def build(self) -> Callable[[Any], torch.Tensor]:
        """Return the shared first half: image to tensor."""
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

    @cached_property
    def _probe(self) -> tuple[str, tuple[int, ...]]:
        """Know a transform of the user's own by what it is made of and does to two images.

        Either alone could lie: what it is made of may be no Python, and two images do not tell
        transforms apart that treat others differently.
        """
        transform = self.transform
        assert transform is not None
        digest = hashlib.blake2b(identify(transform, "a transform").encode(), digest_size=16)
        shape: tuple[int, ...] = ()
        for height, width in ((97, 131), (300, 200)):
            try:
                probe = transform(_noise(height, width, self.channels))
                shape = tuple(probe.shape)
                digest.update(repr((shape, str(probe.dtype))).encode())
                digest.update(probe.contiguous().numpy().tobytes())
            except Exception as error:
                kind = (
                    "an RGB image" if self.channels == 3 else f"an array of {self.channels} bands"
                )
                raise ValueError(
                    f"its transform fails on {kind} of {width}×{height} pixels "
                    f"({type(error).__name__}: {error}); it must return a tensor (c, h, w)"
                ) from error
        return f"transform {digest.hexdigest()}", shape


def check_input_size(value: Any) -> tuple[int, int, int]:
    """Return an input size, or raise a ValueError if no images can be given to a backbone so."""
    sound = isinstance(value, (list, tuple)) and len(value) == 3
    if not sound or not all(isinstance(n, int) and 1 <= n <= LARGEST_SIDE for n in value):
        raise ValueError(
            "`input_size` must be channels, height and width, integers in 1 … "
            f"{LARGEST_SIDE}, but is {reprlib.repr(value)}"
        )
    c, h, w = value
    return c, h, w


def _noise(height: int, width: int, channels: int = 3) -> Any:
    from PIL import Image

    channels = 3 if channels == 1 else channels
    rows = np.random.default_rng(height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(rows) if channels == 3 else rows
