"""plotly's bundle, which draws the charts: from the installed package, at an address of its version."""

from __future__ import annotations

import math
from importlib import metadata, util
from pathlib import Path

from starlette.types import Receive, Scope, Send

from condor_lite.report.context import Context
from condor_lite.report.files import FOREVER
from condor_lite.report.replies import Reply, pack, respond

ADDRESS = f"/static/plotly-{metadata.version('plotly')}.min.js"


class Bundle:
    """Answers at `ADDRESS`. Read and zipped in a thread when it is first asked for, which takes a moment."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(scope, send, await self._context.remembered("plotly", math.inf, self._read))

    async def _read(self) -> Reply:
        return await self._context.alone(_read)


def _read() -> Reply:
    found = util.find_spec("plotly")
    assert found is not None
    assert found.origin is not None
    text = (Path(found.origin).parent / "package_data" / "plotly.min.js").read_bytes()
    return pack(text, media_type="text/javascript; charset=utf-8", headers={"cache-control": FOREVER})
