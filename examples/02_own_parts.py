"""Bring your own parts: a metric, a network and a data set, ranked in threads."""

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

import sfda_tune


def nearest_mean(x: np.ndarray, y: np.ndarray) -> float:
    """Fraction of images that lie nearest to the mean of their own class."""
    means = np.stack([x[y == c].mean(axis=0) for c in np.unique(y)])
    distances = ((x[:, None, :] - means) ** 2).sum(axis=2)
    return float((distances.argmin(axis=1) == y).mean())


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Turn an image into a tensor of 3 × 16 × 16 values between 0 and 1."""
    pixels = np.array(image.resize((16, 16)), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def coloured_images(n: int) -> tuple[np.ndarray, list[str]]:
    """Draw images of noise with a tint that depends on the class."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 128, (n, 24, 24, 3), np.uint8)
    labels = [("red", "green", "blue")[k % 3] for k in range(n)]
    for k, image in enumerate(images):
        image[..., k % 3] += rng.integers(0, 8, dtype=np.uint8)
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="use 60 images only")
    n = 60 if parser.parse_args().smoke else 600

    colours = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    pixels = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())
    with ThreadPoolExecutor(2) as pool:
        ranking = sfda_tune.rank(
            coloured_images(n),
            ["demo:*glyphs", {"colours": (colours, to_tensor), "pixels": (pixels, to_tensor)}],
            metric=nearest_mean,
            map_fn=pool.map,
            cache=False,
        )
    print(ranking)
    assert ranking.shortlist(1)[0] in ("colours", "pixels")


if __name__ == "__main__":
    main()
