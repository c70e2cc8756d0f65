"""A participant's unchanged `crunch_synth` tracker, found, set up and asked through the client library."""

import json
import shutil
from pathlib import Path

import anyio
import pytest
from model_runner_client.grpc.generated.commons_pb2 import Argument, Variant, VariantType
from model_runner_client.model_concurrent_runners import DynamicSubclassModelConcurrentRunner

from condor_lite.config import (
    Config,
    FeedConfig,
    GameConfig,
    LogConfig,
    OrchestratorConfig,
    PredictConfig,
    ReportConfig,
    ScoringConfig,
    StorageConfig,
)
from condor_lite.game.entities import Setting
from condor_lite.models.orchestrator import LocalState, Orchestrator

pytestmark = pytest.mark.anyio

BASE = "crunch_synth.tracker.TrackerBase"
MODELS = Path(__file__).parent / "models"


async def test_a_crunch_synth_tracker_plays_as_it_is(tmp_path):
    pytest.importorskip("crunch_synth")
    shutil.copytree(MODELS / "crunch_synth_gaussian", tmp_path / "models" / "gaussian")
    config = Config(
        GameConfig((Setting("BTC", 3600, 300, 720),), base_class=BASE),
        FeedConfig(),
        OrchestratorConfig(port=0, models=tmp_path / "models"),
        PredictConfig(),
        ScoringConfig(target="price_change"),
        StorageConfig(),
        ReportConfig(),
        LogConfig(),
    )
    orch = Orchestrator(config, tmp_path / "data")
    async with anyio.create_task_group() as tasks:
        await tasks.start(orch.run)
        with anyio.fail_after(30):
            while True:
                if [state.state for state in orch.states()] == [LocalState.RUNNING]:
                    break
                await anyio.sleep(0.05)
        runner = DynamicSubclassModelConcurrentRunner(10, "condorgame", "127.0.0.1", orch.port, BASE)
        runner.model_cluster.ws_client.disconnect_sync = lambda: None
        await runner.init()
        (model,) = runner.model_cluster.models_run.values()
        prices = {"BTC": [[60 * i, 20_000 + 10 * (i % 7)] for i in range(1, 4000)]}
        _, error = await model.call(
            "tick", ([argument(1, VariantType.JSON, json.dumps(prices).encode())], [])
        )
        assert error is None
        question = [
            argument(1, VariantType.STRING, b"BTC"),
            argument(2, VariantType.INT, (3600).to_bytes(8, "little")),
            argument(3, VariantType.INT, (300).to_bytes(8, "little")),
        ]
        answer, error = await model.call("predict", (question, []))
        assert error is None
        assert [density["step"] for density in answer] == list(range(300, 3601, 300))
        scales = [density["components"][0]["density"]["params"]["scale"] for density in answer]
        assert all(1 < scale < 100 for scale in scales)  # in quote currency, not log returns
        await runner.model_cluster.ws_client.disconnect()
        await model.close()
        tasks.cancel_scope.cancel()


def argument(position, kind, value):
    return Argument(position=position, data=Variant(type=kind, value=value))
