"""What a model prints: a file that all of its processes append to, and the one before it, neither long."""

from __future__ import annotations

import os
from pathlib import Path


def cap(file: int, path: Path, limit: int, more: int = 0) -> None:
    """Where `more` bytes would take the open `file` at `path` over `limit`, move its end to `path`.1.

    It is emptied in place, so whoever has it open goes on in the same one; it must be open for appending.
    """
    size = os.fstat(file).st_size
    if size == 0 or size + more <= limit:
        return
    recent = os.pread(file, limit, max(size - limit, 0))
    try:
        Path(f"{path}.1").write_bytes(recent)
    except OSError:  # as in a sandbox, or on a full disk
        os.ftruncate(file, 0)
        os.write(file, recent[-limit // 2 :][: max(limit - more, 0)])
    else:
        os.ftruncate(file, 0)
