"""From `python -m condor_lite` in an empty folder to the first prediction and the first score."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import httpx

TARGET_PREDICTION_S = 5.0
TARGET_SCORE_S = 90.0


def main() -> None:
    """Print both times, as ratios to the targets and to importing the client library alone."""
    reference_s = _import_s()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "CONDOR_LITE__REPORT__PORT": str(port),
        "CONDOR_LITE__ORCHESTRATOR__PORT": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.monotonic()
        game = subprocess.Popen([sys.executable, "-m", "condor_lite"], cwd=folder, env=environment)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
                first_prediction_s = _until(
                    lambda: client.get("/statistics").json()["total_predictions"] > 0, started_s, 60
                )
                first_score_s = _until(
                    lambda: any(
                        row["score"] is not None for row in client.get("/leaderboard").json()["models"]
                    ),
                    started_s,
                    180,
                )
        finally:
            game.send_signal(signal.SIGTERM)
            game.wait(20)
    print(f"import model_runner_client alone   {reference_s:6.2f} s   1.00 (reference)")
    print(
        f"start to first prediction   {first_prediction_s:6.2f} s   {first_prediction_s / reference_s:.2f}"
        f"   {first_prediction_s / TARGET_PREDICTION_S:.2f} of the target of {TARGET_PREDICTION_S:.0f} s"
    )
    print(
        f"start to first score               {first_score_s:6.2f} s   {first_score_s / reference_s:.2f}"
        f"   {first_score_s / TARGET_SCORE_S:.2f} of the target of {TARGET_SCORE_S:.0f} s"
    )


def _import_s() -> float:
    started_s = time.monotonic()
    subprocess.run([sys.executable, "-c", "import model_runner_client.model_cluster"], check=True)
    return time.monotonic() - started_s


def _until(happened: Callable[[], bool], started_s: float, limit_s: float) -> float:
    while True:
        try:
            if happened():
                return time.monotonic() - started_s
        except httpx.TransportError:
            pass  # not listening yet
        if time.monotonic() - started_s > limit_s:
            raise SystemExit(f"not within {limit_s} s")
        time.sleep(0.05)
