"""`python -m tests.fleet_process --models 1000 --behaviour hangs:10`: many models and their orchestrator.

Prints one line of JSON once all of them listen: {"port": the orchestrator's, "entries": what it announces}.
Then reads commands, a JSON object a line, and prints the result of each; it ends when its stdin does:

    {"do": "join", "models": 20, "behaviour": "well", "prefix": "new-"}    start and announce some more
    {"do": "say", "entries": [...]}                                        announce other processes' models
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from condor_lite.watchdog import spare_the_loop
from tests.fleet.behaviours import BEHAVIOURS, MIB, answer_of, server
from tests.fleet.model import ModelServer
from tests.fleet.orchestrator import Orchestrator

BEHAVIOURS["two_mb"] = answer_of(60 * 32768)  # what the largest limit allows for 60 segments


async def start(name: str, count: int, prefix: str) -> list[ModelServer]:
    models = [server(f"{prefix}{name}-{number:04}", name, remember=False) for number in range(count)]
    for model in models:
        await model.start()
    return models


async def obey(orchestrator: Orchestrator, command: dict[str, Any]) -> list[dict[str, Any]]:
    if command["do"] == "join":
        models = await start(command["behaviour"], command["models"], command["prefix"])
        entries = [model.entry() for model in models]
    else:
        entries = command["entries"]
    await orchestrator.say(entries)
    return entries


async def serve(models: int, behaviours: dict[str, int], prefix: str) -> None:
    behaviours["well"] = behaviours.get("well", 0) + models - sum(behaviours.values())
    orchestrator = Orchestrator()
    for name, count in behaviours.items():
        await orchestrator.announce(*(await start(name, count, prefix)))
    await orchestrator.start()
    spare_the_loop()  # else its collections are in the figures
    print(json.dumps({"port": orchestrator.port, "entries": list(orchestrator.entries.values())}), flush=True)
    commands = asyncio.StreamReader(limit=64 * MIB)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    while line := await commands.readline():
        print(json.dumps(await obey(orchestrator, json.loads(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--models", type=int, default=100, help="in all; those not told otherwise answer well"
    )
    parser.add_argument("--behaviour", action="append", default=[], metavar="NAME:COUNT")
    parser.add_argument("--prefix", default="", help="before each model id")
    given = parser.parse_args()
    behaviours = {name: int(count) for name, _, count in (item.partition(":") for item in given.behaviour)}
    asyncio.run(serve(given.models, behaviours, given.prefix))


if __name__ == "__main__":
    main()
