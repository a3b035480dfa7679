"""Prefect flows over the pipeline of ``dvc.yaml``: orchestration and nothing else.

Importing any of them first sets what Prefect, DVC and Ray read from the environment at import: nothing is reported to
anybody, and the user interface asks no other host. What the caller has set stays.
"""

from __future__ import annotations

import os

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    # Twenty seconds, the default, are not enough on a busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
