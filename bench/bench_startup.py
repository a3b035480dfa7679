"""Start-up time of the package and of the command line: what a user waits before anything happens.

Run: python -m bench.bench_startup [--repeats 7] [--json]

Wall-clock seconds of a fresh interpreter, the interpreter's own start included and shown for comparison. Exit code 1
when a limit is missed by the best run (the median moves with the machine's load).
"""

from __future__ import annotations

import argparse
import json
import sys

from bench.common import command_seconds

LIMITS = {
    "interpreter": (["-c", "pass"], None),
    "import rlheals": (["-c", "import rlheals"], 0.2),
    "rlheals --help": (["-m", "rlheals.cli", "--help"], 0.5),
    "rlheals play FORMULA": (["-m", "rlheals.cli", "play", "(10+10)*1+4", "--cards", "A 4 J K"], None),
    "import rlheals.tasks": (["-c", "import rlheals.tasks"], None),
    "import rlheals.stats": (["-c", "import rlheals.stats"], None),
    "import rlheals.reporting": (["-c", "import rlheals.reporting"], None),
    "import torch, transformers": (["-c", "import torch, transformers"], None),
}


def main() -> int:
    """Measure and print; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = []
    for name, (options, limit) in LIMITS.items():
        median, best = command_seconds([sys.executable, *options], arguments.repeats)
        rows.append({"what": name, "median": median, "best": best, "limit": limit})
    if arguments.json:
        print(json.dumps(rows))
    else:
        print(f"{'seconds':28}{'median':>8}{'best':>8}{'limit':>8}")
        for row in rows:
            limit = f"{row['limit']:8.2f}" if row["limit"] else f"{'–':>8}"
            print(f"{row['what']:28}{row['median']:8.3f}{row['best']:8.3f}{limit}")
    return int(any(row["limit"] and row["best"] > row["limit"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
