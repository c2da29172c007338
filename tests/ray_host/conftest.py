"""One Ray cluster for the whole test run, on loopback, and `tests/ray_host` for its workers.

The variables are set before `ray` is imported, which reads some of them then. Authentication is
switched off here and nowhere else: nothing outside this machine can reach the cluster.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # `--import-mode=importlib` does not
_TEMPORARY = tempfile.mkdtemp(prefix="sfda_")  # short: socket paths hold about 100 characters
atexit.register(shutil.rmtree, _TEMPORARY, ignore_errors=True)
os.environ.pop("RAY_ADDRESS", None)  # never somebody else's cluster
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds everything to 127.0.0.1
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # at 15 other tests starve the workers
    "RAY_TMPDIR": _TEMPORARY,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a FutureWarning
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
}
_FAST_HEALTH_CHECK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """Run a head with 4 CPUs and 4 simulated GPUs; the driver is connected to it.

    It is a `ray.cluster_utils.Cluster`: a test may add nodes (main thread only) and must remove
    them again. A dead node is noticed within two seconds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 4,
                "num_gpus": 4,
                "object_store_memory": 150 << 20,
                "include_dashboard": False,
                "_system_config": _FAST_HEALTH_CHECK,
            },
        )
        if cluster.address.partition(":")[0] != "127.0.0.1":
            cluster.shutdown()
            pytest.exit(f"the test cluster listens on {cluster.address}, not on loopback")
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        gc.collect()  # Ray leaves sockets open, of which nobody shall be told later
    yield cluster
    ray.shutdown()
    cluster.shutdown()
