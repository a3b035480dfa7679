"""Sweeps: a grid of parameters becomes one isolated DVC experiment each, and one table that compares them.

``dvc exp run`` in the workspace stashes uncommitted changes, writes params.yaml and resets hard, all while somebody may
be editing or another driver running; with ``--temp`` it does so before it copies. So here every experiment gets a clone
of the repository under ``scratch/sweeps/``, with the workspace's uncommitted changes of tracked files, a params.yaml of
its own and the workspace's DVC cache. Two commands run in it, `dvc repro` and `dvc exp save`; the experiment they make
is fetched into the workspace's repository, where ``dvc exp show``, ``diff``, ``apply`` and ``branch`` know it. The
workspace's files are only read.

The name of an experiment holds a fingerprint of what decides its outcome, so that a repeated or extended sweep finds
what is done. A stopped or failed experiment keeps its clone and goes on from there; DVC's run cache serves all of them.
Stages that experiments share (say, the base model) are computed once when the cache has them before the sweep starts,
else by each experiment that reaches them at the same time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from rlheals.errors import UserError, disk_errors
from rlheals.orchestration.driver_lock import mend_marks
from rlheals.orchestration.grid import parse_grid
from rlheals.orchestration.job import Job, Node, Resources, Verdict
from rlheals.orchestration.pipeline import search_path
from rlheals.params import PARAMS_FILE, load_params, parse_params
from rlheals.profile import render, with_overrides

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


CLONES = Path("scratch/sweeps")
NOT_INPUTS = ("params.yaml", "dvc.lock", "reports")
"""Tracked files whose uncommitted changes decide nothing: an experiment has its own, or makes them."""
OWN = ("--git-dir=.git", "--work-tree=.")
"""Named for a clone, because git would look for a repository in the folders above and find the workspace's."""


@dataclass(frozen=True)
class Experiment:
    """One combination of a grid.

    Attributes:
        name: of the DVC experiment.
        assignment: the values of the grid, as they were written.
        params_text: the whole of its params.yaml.
        params: the values the grid sets, by dotted leaf key, as ``dvc exp show`` names them.
        done: the repository has this experiment already.
    """

    name: str
    assignment: dict[str, str]
    params_text: str
    params: dict[str, Any]
    done: bool


@dataclass(frozen=True)
class Sweep:
    """A checked sweep, ready to run.

    Attributes:
        root: the workspace.
        name: of the sweep, and of its folder under ``reports/sweeps/``.
        baseline: commit the experiments start from.
        changes: the workspace's uncommitted changes of tracked files, as a git patch.
        profile: profile of the experiments.
        targets: stages to bring up to date; none means all.
        experiments: in the order of the grid.
    """

    root: Path
    name: str
    baseline: str
    changes: bytes
    profile: str
    targets: tuple[str, ...]
    experiments: tuple[Experiment, ...]

    @cached_property
    def cache(self) -> str:
        """The workspace's DVC cache folder."""
        return dvc(self.root, "cache", "dir").strip()

    def clone(self, name: str) -> Path:
        """Folder an experiment runs in."""
        return self.root / CLONES / name


def plan_sweep(
    root: Path,
    grid: Sequence[str],
    *,
    profile: str | None = None,
    targets: Sequence[str] = (),
    name: str | None = None,
) -> Sweep:
    """Check every combination of a grid before anything runs, and name the experiments.

    Args:
        root: the workspace, top folder of a git and DVC repository.
        grid: texts for `parse_grid`.
        profile: preset to start from; None starts from the workspace's params.yaml.
        targets: stages to bring up to date.
        name: of the sweep; by default made from the grid's keys and a fingerprint of its experiments, so that another
            sweep of the same keys does not overwrite its tables.

    Raises:
        UserError: a bad grid, a combination that params.yaml may not hold, or no usable git and DVC repository.
    """
    axes = parse_grid(grid)
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise UserError(f"--name {name} is not usable; take lower-case letters, digits, - and _, such as --name lr.")
    root = root.resolve()
    baseline = _baseline(root)
    changes = _uncommitted(root)
    done = _saved(root, baseline)
    experiments = []
    for values in product(*(axis.values for axis in axes)):
        assignment = dict(zip([axis.key for axis in axes], values, strict=True))
        text, raw = _params(root, profile, assignment)
        label = f"{name or 'sweep'}-{_slug(assignment)}-{_fingerprint(raw, targets, changes)}"
        params = {key: value for key, value in leaves(raw) if _is_swept(key, assignment)}
        experiments.append(Experiment(label, assignment, text, params, label in done))
    _no_duplicates(experiments)
    keys = [axis.key.rsplit(".", 1)[-1] for axis in axes]
    return Sweep(
        root=root,
        name=name or "-".join(["sweep", *keys, _digest(baseline, *(each.name for each in experiments))]),
        baseline=baseline,
        changes=changes,
        profile=str(raw["profile"]),
        targets=tuple(targets),
        experiments=tuple(experiments),
    )


def _params(root: Path, profile: str | None, assignment: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Text and content of one combination's params.yaml."""
    overrides = [f"{key}={value}" for key, value in assignment.items()]
    try:
        text = (render(profile, overrides) if profile else with_overrides(root / PARAMS_FILE, overrides)).text
        raw: dict[str, Any] = YAML(typ="safe").load(text)
        parse_params(raw)
    except UserError as error:
        raise UserError(f"the combination {' '.join(overrides)} cannot run: {error}") from error
    return text, raw


def _fingerprint(raw: dict[str, Any], targets: Sequence[str], changes: bytes) -> str:
    """Six hexadecimal digits of everything but the commit that decides an experiment's outcome."""
    content = json.dumps([raw, sorted(targets)], sort_keys=True, default=str)
    return _digest(content, changes)


def _digest(*parts: str | bytes) -> str:
    """Six hexadecimal digits that tell different parts apart."""
    content = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(content).hexdigest()[:6]


def _slug(assignment: dict[str, str]) -> str:
    """The assignment as part of a git reference, shortened to 60 signs; the fingerprint keeps names apart."""
    words = [word for key, value in assignment.items() for word in (key.rsplit(".", 1)[-1], value)]
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(words))
    return re.sub(r"\.{2,}", ".", plain)[:60].strip("-.")


def leaves(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a list is a value, as for DVC."""
    for key, value in block.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_swept(key: str, assignment: dict[str, str]) -> bool:
    return any(key == swept or key.startswith(f"{swept}.") for swept in assignment)


def _no_duplicates(experiments: list[Experiment]) -> None:
    """Refuse values that are written differently and mean the same, such as 1e-3 and 0.001."""
    seen: dict[str, Experiment] = {}
    for experiment in experiments:
        fingerprint = experiment.name.rsplit("-", 1)[-1]
        if fingerprint in seen:
            same = f"{_written(seen[fingerprint])} and {_written(experiment)}"
            raise UserError(f"{same} give the same params.yaml; leave one out.")
        seen[fingerprint] = experiment


def _written(experiment: Experiment) -> str:
    return " ".join(f"{key}={value}" for key, value in experiment.assignment.items())


def _git(folder: Path, *arguments: str, data: bytes | None = None) -> bytes:
    """Output of git in ``folder``.

    Raises:
        UserError: git is not there or refuses; its words are repeated.
    """
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise UserError("git was not found, and DVC experiments are git commits; install git.") from error
    except subprocess.CalledProcessError as error:
        words = " ".join(error.stderr.decode(errors="replace").split())
        raise UserError(f"`git {' '.join(arguments)}` failed in {folder}: {words}") from error


def dvc(folder: Path, *arguments: str) -> str:
    """Output of DVC in ``folder``.

    Raises:
        UserError: DVC refuses; its words are repeated.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`dvc {' '.join(arguments)}` failed in {folder}: {' '.join(done.stderr.split())}")
    return done.stdout


def _baseline(root: Path) -> str:
    """The commit of the workspace, which must be the top of a git repository with ``dvc.yaml``."""
    if not (root / "dvc.yaml").is_file() or not (root / ".dvc").is_dir():
        raise UserError(f"{root} has no dvc.yaml and .dvc; run the sweep in the project folder.")
    if Path(_git(root, "rev-parse", "--show-toplevel").decode().strip()) != root:
        raise UserError(f"{root} is not the top of its git repository; a sweep needs a repository of its own.")
    return _git(root, "rev-parse", "--verify", "HEAD").decode().strip()


def _uncommitted(root: Path) -> bytes:
    outside = [f":(exclude,top){path}" for path in NOT_INPUTS]
    return _git(root, "diff", "--binary", "--no-ext-diff", "--no-color", "HEAD", "--", ".", *outside)


def _reference(baseline: str, name: str = "") -> str:
    """Where DVC keeps an experiment of ``baseline``, or all of them."""
    return f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"


def _saved(root: Path, baseline: str) -> set[str]:
    """Names of the experiments there are on ``baseline``."""
    listed = _git(root, "for-each-ref", "--format=%(refname)", _reference(baseline)).decode()
    return {line.rsplit("/", 1)[-1] for line in listed.splitlines()}


@contextmanager
def sweep_lock(root: Path) -> Iterator[None]:
    """Hold the workspace's only place for a sweep while the body runs; the kernel frees it when the process dies.

    Raises:
        UserError: another sweep holds it.
    """
    path = root / CLONES / "lock"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another sweep runs in {root}; wait for it to end, or stop it.") from error
        yield


class Experiments:
    """The experiments of a sweep as `rlheals.orchestration.schedule.Stages`: independent of each other, each one job.

    Args:
        sweep: what to run.
        force: run all of it, every stage, even where a result is there.
    """

    def __init__(self, sweep: Sweep, *, force: bool = False) -> None:
        self._sweep, self._force = sweep, force
        self._by_name = {experiment.name: experiment for experiment in sweep.experiments}

    def nodes(self, gpus: int = 0) -> list[Node]:
        """The experiments as nodes that need ``gpus`` GPUs each.

        Inside an experiment plain ``dvc repro`` runs the stages, which knows no ``meta``: neither their time limits nor
        their retries are enforced in a sweep.
        """
        need = Resources(gpus=gpus)
        return [Node(each.name, (), need) for each in self._sweep.experiments]

    def launchers(self) -> dict[str, tuple[str, ...]]:
        """Prefix of each experiment's commands, which does nothing but make progress go to a file.

        DVC closes inherited descriptors for its children, so the stages inside an experiment could not use one.
        """
        return dict.fromkeys(self._by_name, ("env",))

    def settle(self, name: str) -> Verdict | None:
        """Cached for an experiment that is there."""
        return Verdict.CACHED if self._by_name[name].done and not self._force else None

    def begin(self, name: str, log: Path) -> Job:
        """Make the experiment's clone, or take up the one a stopped attempt left, and give the job to run in it.

        Raises:
            UserError: git refuses or the disk is full.
        """
        experiment, clone = self._by_name[name], self._sweep.clone(name)
        with disk_errors(clone):
            _check_out(self._sweep, clone)
            (clone / PARAMS_FILE).write_text(experiment.params_text)
            _share_cache(self._sweep, clone)
            _link_models(self._sweep.root, clone)
        dvc = (sys.executable, "-m", "dvc")
        force = ("--force",) if self._force else ()
        # Reports of some profiles are ignored by git, and an experiment without its metrics compares nothing.
        report = ("--include-untracked", f"reports/{self._sweep.profile}")
        save = ("exp", "save", "--force", "--name", name, "--message", f"sweep: {_written(experiment)}", *report)
        return Job(
            name=name,
            commands=((*dvc, "repro", *force, *self._sweep.targets), (*dvc, *save, *self._sweep.targets)),
            cwd=str(clone),
            environment={"PATH": search_path(), "DVC_NO_ANALYTICS": "1"},
            outputs=(),
            log=str(log),
        )

    def finish(self, name: str) -> list[str]:
        """Fetch the experiment into the workspace's repository, touching no file there, and remove its clone.

        Raises:
            UserError: git refuses.
        """
        reference, clone = _reference(self._sweep.baseline, name), self._sweep.clone(name)
        quiet = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance")
        _git(self._sweep.root, "fetch", *quiet, str(clone), f"+{reference}:{reference}")
        shutil.rmtree(clone, ignore_errors=True)
        return []

    def abandon(self, name: str) -> None:
        """Nothing to free: the clone stays, for another attempt to go on in and for a look at what happened."""


def _check_out(sweep: Sweep, clone: Path) -> None:
    """Bring ``clone`` to the state of the workspace, keeping what git ignores (data, scratch)."""
    _unlock(clone)
    if _is_usable(clone, sweep.baseline):
        _git(clone, *OWN, "reset", "--quiet", "--hard", sweep.baseline)
    else:
        shutil.rmtree(clone, ignore_errors=True)
        clone.parent.mkdir(parents=True, exist_ok=True)
        _git(sweep.root, "clone", "--quiet", "--local", "--no-tags", "--no-checkout", str(sweep.root), str(clone))
        _git(clone, "checkout", "--quiet", "--detach", sweep.baseline)
    if sweep.changes:
        # Into the index as well: only there are new files part of the experiment's commit, and of the next reset.
        _git(clone, "apply", "--index", "--whitespace=nowarn", "-", data=sweep.changes)
    for key in ("user.name", "user.email"):
        value = _git(sweep.root, "config", "--default", "", "--get", key).decode().strip()
        if value:
            _git(clone, "config", key, value)


def _unlock(clone: Path) -> None:
    """Remove what a killed git or DVC left in a clone; nothing else works there, for the sweep's lock is held."""
    for lock in (clone / ".git").rglob("*.lock"):  # no branch may be called so
        lock.unlink()
    mend_marks(clone / ".dvc/tmp")


def _is_usable(clone: Path, baseline: str) -> bool:
    """Whether git can read the clone's index and the commit; else it has to be made again."""
    try:
        _git(clone, *OWN, "ls-files")
        _git(clone, *OWN, "cat-file", "-e", f"{baseline}^{{tree}}")
    except (UserError, OSError):
        return False
    return True


def _share_cache(sweep: Sweep, clone: Path) -> None:
    """Give the clone the workspace's own settings and its DVC cache."""
    from dvc.config import Config, merge

    own = Config(str(sweep.root / ".dvc")).load_one("local")
    with Config(str(clone / ".dvc")).edit("local") as settings:
        merge(settings, own)
        settings["cache"]["dir"] = sweep.cache


def _link_models(root: Path, clone: Path) -> None:
    """Make model folders that params.yaml names by a path inside the workspace visible in the clone."""
    for spec in load_params(clone / PARAMS_FILE).model.values():
        source = Path(spec.source)
        if not source.is_absolute() and (root / source).is_dir() and not (clone / source).exists():
            (clone / source).parent.mkdir(parents=True, exist_ok=True)
            (clone / source).symlink_to(root / source, target_is_directory=True)
