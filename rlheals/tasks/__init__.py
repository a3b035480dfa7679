"""Tasks: importing this package registers every task folder beside it."""

from __future__ import annotations

import importlib
import pkgutil

from rlheals.tasks.core import (
    CONDITIONS as CONDITIONS,
    SPLITS as SPLITS,
    DatasetSizes as DatasetSizes,
    Episode as Episode,
    PromptFormat as PromptFormat,
    Task as Task,
    TaskData as TaskData,
    Turn as Turn,
    make_task as make_task,
    register as register,
    task_names as task_names,
    task_spec_model as task_spec_model,
)

for _module in pkgutil.iter_modules(__path__):
    if _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
