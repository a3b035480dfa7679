"""Tasks: importing this package registers every task folder beside it."""

from __future__ import annotations

import importlib
import pkgutil

from rlheals.tasks.core import (
    CONDITIONS as CONDITIONS,
)
from rlheals.tasks.core import (
    SPLITS as SPLITS,
)
from rlheals.tasks.core import (
    DatasetSizes as DatasetSizes,
)
from rlheals.tasks.core import (
    Episode as Episode,
)
from rlheals.tasks.core import (
    PromptFormat as PromptFormat,
)
from rlheals.tasks.core import (
    Task as Task,
)
from rlheals.tasks.core import (
    TaskData as TaskData,
)
from rlheals.tasks.core import (
    Turn as Turn,
)
from rlheals.tasks.core import (
    make_task as make_task,
)
from rlheals.tasks.core import (
    register as register,
)
from rlheals.tasks.core import (
    task_names as task_names,
)
from rlheals.tasks.core import (
    task_spec_model as task_spec_model,
)

for _module in pkgutil.iter_modules(__path__):
    if _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
