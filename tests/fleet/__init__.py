"""Models and an orchestrator at the wire: real gRPC servers and a WebSocket, behaving as a test says."""

from tests.fleet.behaviours import BEHAVIOURS, answer_of, hangs, hangs_in_setup, refuses_setup, server
from tests.fleet.model import ModelServer, answers_well, normals, refusal, success
from tests.fleet.orchestrator import Orchestrator

raises = BEHAVIOURS["raises"]

__all__ = [
    "BEHAVIOURS",
    "ModelServer",
    "Orchestrator",
    "answer_of",
    "answers_well",
    "hangs",
    "hangs_in_setup",
    "normals",
    "raises",
    "refusal",
    "refuses_setup",
    "server",
    "success",
]
