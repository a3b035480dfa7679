"""Write figures, tables, metrics and the page of a profile from the tables of the stages before it."""

from __future__ import annotations

from rlheals.publish import publish
from rlheals.reporting import site
from rlheals.stages.common import Run, run_stage


def report(run: Run) -> None:
    """Stage entry: publish ``reports/<profile>``."""
    with publish(run.root / "reports" / run.params.profile) as directory:
        site.build(run.params, run.root, directory)


if __name__ == "__main__":
    run_stage(report, per_model=False)
