"""Through the doors that a cluster has: the command line, a bucket, a job with a token."""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from sfda_tune import Ranking
from sfda_tune.extraction.store import FeatureStore

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def environment(clean_environment, tmp_path):
    """That of a user who has no Ray running."""
    kept = {k: v for k, v in clean_environment.items() if not k.startswith("RAY_")}
    path = f"{BIN}{os.pathsep}{kept['PATH']}"
    own = {"HOME": str(tmp_path), "PATH": path, "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
    return kept | own


def find_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serve(command, port, environment, tmp_path):
    """Run a server until the end of the block; it has answered on `port` before."""
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for _ in range(600):
                assert server.poll() is None, (tmp_path / "log").read_text()
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                time.sleep(0.1)
            yield
        finally:
            server.terminate()
            try:
                server.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)


def test_features_in_a_bucket(environment, forked, tmp_path, monkeypatch):
    """With the protocol of S3, spoken by moto on this machine."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    port = find_port()
    url = f"http://127.0.0.1:{port}"
    environment |= {
        "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def rank(name, *more, code=0):
        command = ["rank", "digits", "-b", "demo:*noise*", "demo:*untrained"]
        command += ["--samples", "40", "--device", "cpu", "--quiet", "--cache", "s3://photos/x"]
        child = forked([*command, "--out", tmp_path / name, *more], tmp_path / f"log of {name}")
        child.join(120)
        told = (tmp_path / f"log of {name}").read_text()
        assert child.exitcode == code, told
        return told

    with serve([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], port,
               environment, tmp_path):  # fmt: skip
        assert "could not be kept" in rank("none.json")  # there is no such bucket, nor will be
        with pytest.raises(OSError, match="404"):
            urllib.request.urlopen(f"{url}/photos")
        urllib.request.urlopen(urllib.request.Request(f"{url}/photos", method="PUT"))
        rank("first.json", "--ray")
        listed = urllib.request.urlopen(f"{url}/photos?list-type=2").read().decode()
        keys = re.findall("<Key>([^<]+)</Key>", listed)
        assert len(keys) == 2
        assert all(key.startswith("x/segments/") for key in keys)
        rank("again.json")
    first, again = (Ranking.from_json(tmp_path / f"{name}.json") for name in ("first", "again"))
    assert dict(first) == dict(again) == dict(Ranking.from_json(tmp_path / "none.json"))
    assert not any(score.details["cached"] for score in first.scores)
    assert all(score.details["cached"] for score in again.scores)
    error = rank("gone.json", code=1)
    assert "error: `cache` is 's3://photos/x' but it cannot be reached" in error


def test_a_job_on_a_cluster_with_a_token(environment, tmp_path):
    """`submit.py` as it stands, on a Ray that was started from the command line."""
    port, dashboard = find_port(), find_port()
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # loopback
    head = [BIN / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    head += ["--include-dashboard=true", f"--dashboard-port={dashboard}"]
    head += ["--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    # other tests run a Ray at the same time, which has the agent's usual port
    head += [f"--dashboard-agent-listen-port={find_port()}"]
    head += [f"--temp-dir={os.environ['RAY_TMPDIR']}/job"]
    submit = [sys.executable, ROOT / "examples/cluster/submit.py", f"http://127.0.0.1:{dashboard}"]

    def run(data, *more, **other):
        return subprocess.run(
            [*map(str, [*submit, data, tmp_path / "cache", *more])],
            env=environment | other, capture_output=True, text=True, check=False,
        )  # fmt: skip

    with serve(head, dashboard, environment, tmp_path):
        first, again = run("digits", "--smoke"), run("digits", "--smoke")
        refused = run("digits", RAY_AUTH_TOKEN="0" * 64)
        failed = run("no/such/folder")
    assert first.returncode == 0, first.stderr
    assert "demo:vit_untrained" in first.stdout
    assert "cached" not in first.stdout
    assert again.stdout.count("cached") == 2
    assert sum(1 for _ in FeatureStore(tmp_path / "cache").entries()) == 2
    assert refused.returncode != 0
    assert "Invalid authentication token" in refused.stderr
    assert failed.returncode == 1
    assert "'no/such/folder' does not exist" in failed.stdout
    assert "submitted again it goes on from there" in failed.stderr
