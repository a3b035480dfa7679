"""The deployments, and a process that serves them: ``python -m flows.serve``.

``DEPLOYMENTS`` is where their names, parameters, schedules and tags are decided. ``prefect.yaml`` says the same for a
process work pool (`prefect work-pool create local --type process`, `prefect deploy --all --no-prompt`,
`prefect worker start --pool local`); a test compares the two.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flows.reproduce import reproduce
from flows.sweep import sweep

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.deployments.runner import RunnerDeployment

TIME_ZONE = "UTC"


@dataclass(frozen=True)
class Deployment:
    """What a deployment is made of, apart from where it runs.

    Attributes:
        name: of the deployment; `prefect deployment run <flow>/<name>` starts it.
        flow: the flow it runs.
        entrypoint: file and function of the flow, for a worker.
        description: one sentence.
        parameters: defaults, which every run may override.
        tags: for filters and limits.
        cron: schedule in `TIME_ZONE`; None for runs on demand only.
        concurrency_limit: runs at a time; more wait.
    """

    name: str
    flow: Flow[..., Any]
    entrypoint: str
    description: str
    parameters: dict[str, Any]
    tags: list[str] = field(default_factory=list)
    cron: str | None = None
    concurrency_limit: int = 1

    def runner(self) -> RunnerDeployment:
        """The deployment for this process to serve."""
        from prefect.schedules import Cron

        made: Any = self.flow.to_deployment(
            self.name,
            description=self.description,
            parameters=self.parameters,
            tags=self.tags,
            schedule=Cron(self.cron, timezone=TIME_ZONE) if self.cron else None,
            concurrency_limit=self.concurrency_limit,
        )
        return made  # type: ignore[no-any-return]  # Prefect's type covers asynchronous callers as well


DEPLOYMENTS = (
    Deployment(
        name="reproduce",
        flow=reproduce,
        entrypoint="flows/reproduce.py:reproduce",
        description="Bring the whole pipeline up to date, every night; a run on demand may name stages and settings.",
        # The nightly run must not fail because somebody is still running by hand.
        parameters={"keep_going": True, "wait": True},
        tags=["rlheals", "nightly"],
        cron="0 2 * * *",
    ),
    Deployment(
        name="figures",
        flow=reproduce,
        entrypoint="flows/reproduce.py:reproduce",
        description="Draw figures, tables and page again from the tables there are, training nothing.",
        parameters={"targets": ["report"], "single_item": True, "wait": True},
        tags=["rlheals", "figures"],
    ),
    Deployment(
        name="sweep",
        flow=sweep,
        entrypoint="flows/sweep.py:sweep",
        description="Compare the combinations of a grid of parameters, each in a clone of the repository.",
        parameters={"grid": ["sft.learning_rate=2e-4,5e-4,1e-3"], "profile": "smoke"},
        tags=["rlheals", "sweep"],
    ),
)


def main() -> None:
    """Serve the deployments until stopped; runs are children of this process and end with it."""
    from prefect import serve
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        sys.exit(
            "error: serving needs a Prefect server that stays: run `prefect server start` in another terminal, then "
            "`PREFECT_API_URL=http://127.0.0.1:4200/api python -m flows.serve`."
        )
    # Several runs may be served at once: reproduce waits for the workspace's lock, and sweeps do not need it.
    serve(*(deployment.runner() for deployment in DEPLOYMENTS), limit=len(DEPLOYMENTS))


if __name__ == "__main__":
    main()
