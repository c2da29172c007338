"""Rank over the actors of a Ray cluster, and see what they did.

    python examples/20_ray_extraction.py [--address auto] [--data photos/] [--cache s3://…]

Without an address a Ray starts on this machine, on loopback and with a random token. On a cluster
the cache must be a folder that all machines share, or a bucket. Kill it and start it again: it
goes on from there.
"""

import argparse

from sfda_tune_ray import RayExecutor

import sfda_tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", help="auto, host:6379; default: $RAY_ADDRESS, else local")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--backbones", nargs="+", default=["demo:*"])
    parser.add_argument("--cache", default=True)
    parser.add_argument("--actors", type=int, help="more than there is room for: it grows")
    parser.add_argument("--gpus", type=float, help="per actor; default: 1 where there are any yet")
    parser.add_argument("--cpus", type=float, help="per actor; default: what there is per GPU")
    parser.add_argument("--smoke", action="store_true", help="little, for the tests")
    o = parser.parse_args()

    actors = 1 if o.smoke else o.actors
    executor = RayExecutor(o.address, actors=actors, num_gpus=o.gpus, cpus_per_actor=o.cpus)
    ranking = sfda_tune.rank(
        o.data,
        ["demo:*noise*", "demo:*untrained"] if o.smoke else o.backbones,
        samples=60 if o.smoke else None,
        cache=o.cache,
        executor=executor,
        progress=not o.smoke,
    )
    print(ranking)

    report = ranking.info["executor"]
    print(f"utilisation {report['utilisation']:.0%}, restarts {report['restarts']}")
    print(f"each image was decoded {report['decodes_per_image']:.1f} times")
    for actor in report["actors"]:
        print(f"  {actor['machine']}: {actor['images_per_second'] or 0:.0f} images/s")
    for fault in report["faults"]:
        print(f"  {fault['kind']} on {fault['machine']}: {fault['reason']}")


if __name__ == "__main__":
    main()
