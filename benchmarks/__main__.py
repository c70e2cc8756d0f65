"""`python -m benchmarks [name ...]`: run one or all benchmarks of this folder."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks


def main() -> None:
    modules = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    names = [name for name in modules if not name.startswith("_")]
    chosen = sys.argv[1:] or names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are: {', '.join(names)}")
    for name in chosen:
        print(f"\n{name}\n{'-' * len(name)}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
