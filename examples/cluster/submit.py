"""Submit a ranking as a Ray job, and follow it.

    python examples/cluster/submit.py http://127.0.0.1:8265 /data/photos /data/features --actors 16

The job runs ``20_ray_extraction.py``, with its further options, on the head of the cluster. Where
the cluster asks for a token, set RAY_AUTH_TOKEN here, too.
"""

import argparse
import shlex
import time
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

HERE = Path(__file__).resolve().parent


def submit(client: JobSubmissionClient, command: str, environment: dict) -> str:
    """Submit a job; a cluster that has only just started has no agent for it yet."""
    end = time.monotonic() + 60
    while True:
        try:
            return client.submit_job(entrypoint=command, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > end:
                raise SystemExit(
                    "the cluster has no agent that takes jobs. Where another Ray runs on the same "
                    "machine, it holds the agent's port: give `ray start` one of its own by "
                    "--dashboard-agent-listen-port."
                ) from error
            time.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dashboard")
    parser.add_argument("data")
    parser.add_argument("cache", help="folder that all machines share, or a bucket")
    parser.add_argument("--backbones", nargs="+", default=["demo:*"])
    parser.add_argument("--pip", action="store_true", help="install sfda-tune on the machines")
    o, more = parser.parse_known_args()
    command = ["python", "20_ray_extraction.py", "--address", "auto", "--data", o.data]
    command += ["--cache", o.cache, "--backbones", *o.backbones, *more]
    environment: dict = {"working_dir": str(HERE.parent), "excludes": ["cluster"]}
    if o.pip:
        environment["pip"] = ["sfda-tune[ray]"]
    client = JobSubmissionClient(o.dashboard)
    job = submit(client, shlex.join(command), environment)
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(2)
    print(client.get_job_logs(job))
    if status != JobStatus.SUCCEEDED:
        raise SystemExit(f"the job {job} ended as {status}; submitted again it goes on from there")


if __name__ == "__main__":
    main()
