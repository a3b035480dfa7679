"""The driver's access to DVC: its graph, its verdicts, and the two halves of running a stage.

DVC's own ``Stage.run`` locks, removes old outputs, tries the run cache, runs the command, hashes, caches and writes
``dvc.lock``. Here the part before the command (`Pipeline.begin`) and the part after it (`Pipeline.finish`) are apart,
so that several commands may run at once, on other machines too. Both parts run in one thread of one process: DVC's
locks are neither thread-safe nor aware of other hosts.

This uses DVC's internals, which may change with any minor release; `check_version` refuses releases it was not tested
with.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack, chdir, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from rlheals.errors import UserError, disk_errors
from rlheals.orchestration.driver_lock import mend_marks
from rlheals.orchestration.job import Job, Node, Resources, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TESTED = SpecifierSet(">=3.67,<3.68")
logger = logging.getLogger(__name__)


def check_version(installed: str | None = None) -> None:
    """Refuse a release of DVC whose internals were not tested.

    Raises:
        UserError: it is outside `TESTED`; ``dvc repro`` still works with it.
    """
    found = installed or version("dvc")
    if found not in TESTED:
        raise UserError(
            f"DVC {found} is installed and the parallel driver was tested with {TESTED}; install a release of that "
            "range (`make setup`), or run the pipeline serially with `dvc repro`."
        )


class Pipeline:
    """The pipeline of ``dvc.yaml`` in one workspace, for one run of the driver."""

    def __init__(self, root: Path, *, force: bool = False, pull: bool = False) -> None:
        """Open the workspace.

        Args:
            root: folder with ``.dvc`` and ``dvc.yaml``.
            force: run every stage of the plan even when nothing has changed, as ``dvc repro --force``.
            pull: fetch missing outputs and run cache from the DVC remote, as ``dvc repro --pull``.

        Raises:
            UserError: an untested release of DVC, or ``root`` is no DVC workspace.
        """
        check_version()
        from dvc.exceptions import NotDvcRepoError
        from dvc.repo import Repo

        # One line for every write of dvc.lock tells nobody anything.
        logging.getLogger("dvc").setLevel(logging.WARNING)
        try:
            self._repo = Repo(str(root), _wait_for_lock=True)
        except NotDvcRepoError as error:
            raise UserError(f"{root} is no DVC workspace; run from the project folder, or `dvc init` first.") from error
        self.root = Path(self._repo.root_dir)
        self._force, self._pull = force, pull
        self._stages: dict[str, Any] = {}
        self._upstream: dict[str, list[Any]] = {}
        self._running: dict[str, ExitStack] = {}
        self._inputs: dict[str, dict[str, Any]] = {}

    def plan(self, targets: Sequence[str] = (), *, single_item: bool = False) -> list[Node]:
        """Stages to consider, every stage after those it depends on.

        Args:
            targets: stages, matrix groups, or ``dvc.yaml`` files; nothing means the whole of ``dvc.yaml``.
            single_item: only the targets themselves.

        Raises:
            UserError: dvc.yaml or params.yaml cannot be read, a target does not exist, or a ``meta`` is not usable.
        """
        with self._told("cannot plan"), self._locked():
            mend_marks(Path(self._repo.tmp_dir))
            graph, steps = self._steps(list(targets), single_item)
            self._stages = {stage.addressing: stage for stage in steps}
            upstream = {name: self._waits_for(graph, stage, single_item) for name, stage in self._stages.items()}
            if self._pull:
                self._pull_run_cache()
        # Single items are judged by what lies there, as in DVC, whatever became of the stages before them.
        judged_by = dict.fromkeys(upstream, ()) if single_item else upstream
        self._upstream = {name: [self._stages[other] for other in others] for name, others in judged_by.items()}
        return [
            Node(name, tuple(upstream[name]), Resources.of(name, stage.meta if stage.cmd else None))
            for name, stage in self._stages.items()
        ]

    def _steps(self, targets: list[str], single_item: bool) -> tuple[Any, list[Any]]:
        """DVC's graph, and the stages to consider in order."""
        from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

        stages = collect_stages(self._repo, targets or ["dvc.yaml"])
        graph = get_active_graph(self._repo.index.graph)
        steps = plan_repro(graph, stages)
        return graph, [stage for stage in steps if stage in stages] if single_item else steps

    def _waits_for(self, graph: Any, stage: Any, single_item: bool) -> list[str]:
        """Stages of the plan that have to be up to date first; of single items, however far upstream."""
        import networkx as nx

        before = nx.descendants(graph, stage) if single_item else graph.successors(stage)
        return [other.addressing for other in before if other.addressing in self._stages]

    def settle(self, name: str) -> Verdict | None:
        """Bring a stage up to date without running its command, where that is possible.

        Call it once everything upstream is up to date. None means that the command has to run.

        Raises:
            UserError: DVC refuses, for example because another process is using the same files.
        """
        stage = self._stages[name]
        with self._told(name), self._locked():
            if not stage.cmd or stage.is_import or stage.frozen:
                return self._reproduce_without_command(stage, self._upstream[name])
            if self._force:
                return None
            if not stage.changed(False, self._upstream[name]):
                return Verdict.CACHED
            if self._pull and not stage.changed(True, self._upstream[name]) and self._pulled(name):
                return Verdict.RESTORED
            if self._pull:
                self._pull_missing_inputs(stage)
            return self._restore(stage)

    def begin(self, name: str, log: Path) -> Job:
        """The half before the command: take DVC's locks, remove old outputs, record the inputs.

        Raises:
            UserError: an input is missing, or another process is using the same files.
        """
        from dvc.stage.run import _enforce_cmd_list, _make_cmd, get_executable

        stage = self._stages[name]
        with self._told(name), self._locked():
            self._hold(name)
            try:
                stage.save_deps()
                stage.remove_outs(ignore_remove=False, force=False)
            except BaseException:
                self._release(name)
                raise
        self._inputs[name] = {dep.def_path: (dep.hash_info, dep.meta) for dep in stage.deps}
        shell = get_executable()
        return Job(
            name=name,
            commands=tuple(tuple(_make_cmd(shell, command)) for command in _enforce_cmd_list(stage.cmd)),
            cwd=str(Path(stage.wdir).resolve()),
            environment={"DVC_ROOT": str(self.root), "DVC_STAGE": name, "PATH": search_path()},
            outputs=tuple(out.fs_path for out in stage.outs if not out.persist),
            log=str(log),
            timeout=Resources.of(name, stage.meta).timeout,
        )

    def finish(self, name: str) -> list[str]:
        """The half after the command: hash and cache the outputs, write ``dvc.lock``, free the locks.

        Inputs that changed while the command ran are recorded as they were when it began. (DVC itself records them as
        they are at the end, which declares results up to date that were made from something else.)

        Returns:
            The inputs that were changed meanwhile: the stage is out of date and runs again next time.

        Raises:
            UserError: an output that ``dvc.yaml`` declares was not written.
        """
        stage = self._stages[name]
        with self._told(name), self._locked():
            try:
                stage.save(run_cache=False)
                edited = self._restore_inputs(name)
                if not edited and _in_run_cache(stage):
                    self._repo.stage_cache.save(stage)
                stage.commit()
                stage.dump(update_pipeline=False)
            finally:
                self._release(name)
        return edited

    def abandon(self, name: str) -> None:
        """Free the locks of a stage whose command failed or was stopped; nothing is recorded."""
        if name in self._running:
            with self._told(name), self._locked():
                self._release(name)

    def close(self) -> None:
        """Free everything that is still held and close DVC's databases."""
        for name in list(self._running):
            self.abandon(name)
        self._repo.close()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """DVC's lock of the workspace; waits while another DVC command holds it.

        DVC looks targets and run cache up from the working directory, and names stages as seen from there.
        """
        from dvc.repo import lock_repo

        with chdir(self.root), lock_repo(self._repo):
            yield

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn DVC's exceptions into a `UserError` that keeps DVC's own words, and a full disk into one, too."""
        from dvc.exceptions import DvcException

        try:
            with disk_errors(self.root):
                yield
        except DvcException as error:
            causes = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
            raise UserError(f"{what}: DVC says: {': '.join(' '.join(text.split()) for text in causes)}") from error

    def _hold(self, name: str) -> None:
        """Mark the stage's inputs as read and its outputs as written for other DVC processes."""
        from dvc.rwlock import rwlock

        stage = self._stages[name]

        stack = ExitStack()
        stack.enter_context(
            rwlock(
                self._repo.tmp_dir,
                self._repo.fs,
                " ".join(sys.argv),
                [dep.fs_path for dep in stage.deps if dep.protocol == "local"],
                [out.fs_path for out in stage.outs],
                self._repo.config["core"].get("hardlink_lock", False),
            )
        )
        self._running[name] = stack

    def _release(self, name: str) -> None:
        """Unmark; then mark again what the others still hold, for DVC counts one mark a process and path."""
        from dvc.exceptions import DvcException

        self._inputs.pop(name, None)
        try:
            self._running.pop(name).close()
            for other in list(self._running):
                self._running.pop(other).close()
                self._hold(other)
        except DvcException as error:
            # The marks only keep other DVC commands away; what was recorded stays recorded.
            logger.warning("DVC's marks of %s could not be changed: %s", name, error)

    def _restore_inputs(self, name: str) -> list[str]:
        """Put back the recorded state of inputs that have changed since `begin`, and name them."""
        edited = []
        for dep in self._stages[name].deps:
            hash_info, meta = self._inputs[name][dep.def_path]
            if dep.hash_info != hash_info:
                edited.append(dep.def_path)
                dep.hash_info, dep.meta = hash_info, meta
        return edited

    def _restore(self, stage: Any) -> Verdict | None:
        """Check the outputs out of the cache where a run with these inputs is known and its outputs can be had."""
        known = self._known_run(stage)
        if known is None or not (known.outs_cached() or (self._pull and self._fetch(known) and known.outs_cached())):
            return None
        stage.remove_outs(ignore_remove=False, force=False)
        known.checkout()
        stage.save(run_cache=_in_run_cache(stage))
        stage.commit()
        stage.dump(update_pipeline=False)
        return Verdict.RESTORED

    def _known_run(self, stage: Any) -> Any | None:
        """What ``dvc.lock``, or else the run cache, recorded for these inputs, as a stage with outputs only.

        DVC's own ``StageCache.restore`` finds this too, but only after the old outputs have been removed; a stage that
        waits for a slot keeps them.
        """
        from dvc.stage.cache import _can_hash
        from dvc.stage.serialize import to_single_stage_lockfile

        # A missing input is told by `begin`.
        if not all(dep.exists for dep in stage.deps) or not _can_hash(stage):
            return None
        if not stage.changed_stage() and stage.deps_cached() and all(out.hash_info for out in stage.outs):
            entry = to_single_stage_lockfile(stage)
        else:
            stage.save_deps()
            entry = self._repo.stage_cache._load(stage)
        return self._repo.stage_cache._create_stage(entry, wdir=stage.wdir) if entry else None

    def _fetch(self, known: Any) -> bool:
        """Fetch what is recorded from the remote; False when it is not there."""
        from dvc.exceptions import DvcException

        try:
            for objects in known.get_used_objs().values():
                self._repo.cloud.pull(objects)
        except DvcException as error:
            logger.info("recorded outputs could not be fetched: %s", error)
            return False
        return True

    def _reproduce_without_command(self, stage: Any, upstream: list[Any]) -> Verdict:
        """A tracked file, an import or a frozen stage: DVC's own way, in the driver."""
        done = stage.reproduce(upstream=upstream, force=self._force, pull=self._pull)
        if done:
            stage.dump(update_pipeline=False)
        return Verdict.COMPLETED if done else Verdict.CACHED

    def _pulled(self, name: str) -> bool:
        from dvc.exceptions import DvcException

        stage = self._stages[name]
        try:
            self._repo.pull(name)
            stage.checkout()
        except DvcException as error:
            logger.info("%s could not be pulled: %s", name, error)
            return False
        return not stage.changed(False, self._upstream[name])

    def _pull_run_cache(self) -> None:
        from dvc.exceptions import DvcException

        try:
            self._repo.stage_cache.pull(None)
        except DvcException as error:
            logger.warning("the run cache could not be pulled: %s", error)

    def _pull_missing_inputs(self, stage: Any) -> None:
        """Fetch inputs that are not there; of a folder above outputs, the outputs, which DVC itself does not do."""
        from dvc.exceptions import DvcException

        for dep in stage.deps:
            if dep.protocol != "local" or dep.exists:
                continue
            inside = [out.fs_path for out in self._repo.index.outs if dep.fs.isin_or_eq(out.fs_path, dep.fs_path)]
            try:
                self._repo.pull(inside or [dep.fs_path])
            except DvcException as error:
                logger.info("%s could not be pulled: %s", dep.def_path, error)  # `begin` tells what is missing


def search_path() -> str:
    """PATH with this interpreter's folder first, so that `python` in dvc.yaml is the one that runs the driver."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _in_run_cache(stage: Any) -> bool:
    """As in DVC: a stage with outputs outside the cache has no entry in the run cache."""
    return all(out.use_cache or out.is_metric or out.is_plot for out in stage.outs)
