"""Load the tables of every declared run, and refuse anything missing, stale or undeclared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError
from rlheals.publish import verify
from rlheals.reporting.schemas import read_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from rlheals.params import Params


@dataclass(frozen=True, slots=True)
class Choice:
    """The two rungs every later comparison starts from, chosen on ``select``."""

    model: str
    seed: int
    max_ood: int
    end: int


@dataclass(frozen=True)
class Study:
    """Read access to the outputs of one profile, for all its declared models and seeds.

    Attributes:
        params: the whole of ``params.yaml``.
        root: project directory.
    """

    params: Params
    root: Path
    _cache: dict[tuple[str, str], pl.DataFrame | None] = field(default_factory=dict, repr=False)
    _verified: set[str] = field(default_factory=set, repr=False)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Declared (model, seed) pairs in the order of params."""
        return [(model, seed) for model in self.params.models for seed in self.params.seeds]

    def directory(self, stage: str, model: str, seed: int) -> Path:
        """Where ``stage`` publishes for one run."""
        return self.root / "data" / self.params.profile / stage / model / str(seed)

    def has(self, stage: str) -> bool:
        """Whether ``stage`` has run for this profile at all."""
        return any(True for _ in _runs_on_disk(self.root / "data" / self.params.profile / stage))

    def check_runs(self, stage: str) -> None:
        """Check that ``stage`` has exactly the declared runs.

        Raises:
            UserError: a declared run is missing, or a run on disk is not declared.
        """
        folder = self.root / "data" / self.params.profile / stage
        declared, present = set(self.runs), set(_runs_on_disk(folder))
        for model, seed in self.runs:
            if (model, seed) not in present:
                raise UserError(
                    f"{self.directory(stage, model, seed)} is missing though params.yaml declares model {model} with "
                    f"seed {seed}; run `dvc repro`, or remove it from models or seeds."
                )
        for model, seed in sorted(present - declared):
            raise UserError(
                f"{self.directory(stage, model, seed)} is stale: params.yaml does not declare model {model} with seed "
                f"{seed} for profile {self.params.profile}; remove it with `rlheals prune`, or declare the run."
            )

    def table(self, stage: str, file: str, schema: str) -> pl.DataFrame | None:
        """One table of ``stage``, all runs below each other; None when the stage has not run for this profile.

        Raises:
            UserError: some runs are missing or undeclared, a file is unreadable, or its columns are wrong.
        """
        key = (stage, file)
        if key not in self._cache:
            self._cache[key] = self._load(stage, file, schema) if self.has(stage) else None
        return self._cache[key]

    def tables(self, stage: str, files: Mapping[str, str]) -> dict[str, pl.DataFrame] | None:
        """Tables of ``stage`` by schema, once its files are those of its manifests; None when it has not run.

        Args:
            stage: the stage that writes them.
            files: file name by schema.

        Raises:
            UserError: as `table`; or a file is missing or corrupted.
        """
        if not self.has(stage):
            return None
        if stage not in self._verified:  # several sections read the same stage, and each file is hashed for this
            self.check_runs(stage)
            for model, seed in self.runs:
                verify(self.directory(stage, model, seed))
            self._verified.add(stage)
        read = {schema: self.table(stage, file, schema) for schema, file in files.items()}
        return {schema: table for schema, table in read.items() if table is not None}

    def _load(self, stage: str, file: str, schema: str) -> pl.DataFrame:
        self.check_runs(stage)
        tables = []
        for model, seed in self.runs:
            path = self.directory(stage, model, seed) / file
            table = read_table(path, schema)
            _check_identity(table, path, {"profile": self.params.profile, "model": model, "seed": seed})
            tables.append(table)
        return pl.concat(tables)

    def json(self, stage: str, file: str, model: str, seed: int) -> dict[str, Any]:
        """One JSON object that ``stage`` wrote for one run.

        Raises:
            UserError: the file is missing or not a JSON object.
        """
        path = self.directory(stage, model, seed) / file
        if not path.is_file():
            raise UserError(f"{path} does not exist; run the stage that writes it (`dvc repro`).")
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON; delete {path.parent} and run `dvc repro`.") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} does not hold a JSON object; delete {path.parent} and run `dvc repro`.")
        return content

    @cached_property
    def answers(self) -> pl.DataFrame:
        """Graded answers of ``probe_sft``."""
        return self._required("answers")

    @cached_property
    def summary(self) -> pl.DataFrame:
        """Probe summary of ``probe_sft``."""
        return self._required("probe_summary")

    @cached_property
    def losses(self) -> pl.DataFrame:
        """Teacher-forced losses along SFT."""
        return self._required("losses")

    @cached_property
    def selection(self) -> pl.DataFrame:
        """What each selection criterion picks, and its regret."""
        return self._required("selection")

    @cached_property
    def choices(self) -> list[Choice]:
        """SFT_MaxOOD and SFT_End of every run."""
        found = []
        for model, seed in self.runs:
            content = self.json("probe_sft", "selection.json", model, seed)
            where = self.directory("probe_sft", model, seed) / "selection.json"
            steps = [content.get(key) for key in ("max_ood", "end")]
            if not all(isinstance(step, int) and step in self.params.sft.checkpoints for step in steps):
                raise UserError(f"{where} names steps {steps}, which are not both in sft.checkpoints; run `dvc repro`.")
            found.append(Choice(model, seed, int(content["max_ood"]), int(content["end"])))
        return found

    def _required(self, name: str) -> pl.DataFrame:
        table = self.table("probe_sft", f"{name}.parquet", name)
        if table is None:
            self.check_runs("probe_sft")
        assert table is not None  # check_runs raises when the stage has no run
        return table


def load_study(params: Params, root: Path) -> Study:
    """Check the outputs that every report needs and give read access to them.

    Raises:
        UserError: a declared run is missing, an undeclared one is present, a file is corrupted, or the ladder of a run
            differs from ``sft.checkpoints``.
    """
    study = Study(params, root)
    study.check_runs("probe_sft")
    for model, seed in study.runs:
        verify(study.directory("probe_sft", model, seed))
    _check_ladder(study)
    return study


def outcomes(answers: pl.DataFrame, choice: Choice, condition: str, steps: tuple[int, int]) -> pl.DataFrame:
    """First-try outcomes of two rungs on the same ``confirm`` hands.

    Returns:
        Columns ``hand_id``, ``first`` and ``second`` (booleans), one row a hand, sorted by hand.

    Raises:
        UserError: the two rungs answered different hands, or a hand twice.
    """
    rows = answers.filter(
        (pl.col("model") == choice.model)
        & (pl.col("seed") == choice.seed)
        & (pl.col("condition") == condition)
        & (pl.col("split") == "confirm")
        & (pl.col("attempt") == 1)
    )
    first, second = (rows.filter(pl.col("checkpoint_step") == step).select("hand_id", "solved") for step in steps)
    where = f"answers of {choice.model}, seed {choice.seed}, {condition}, steps {steps[0]} and {steps[1]}"
    if set(first["hand_id"]) != set(second["hand_id"]) or first.is_empty():
        raise UserError(f"{where} are not about the same hands, so they cannot be paired; run `dvc repro probe_sft`.")
    if first["hand_id"].n_unique() != len(first) or second["hand_id"].n_unique() != len(second):
        raise UserError(f"{where} hold a hand twice; make the probe sets free of repeats and run `dvc repro`.")
    joined = first.rename({"solved": "first"}).join(second.rename({"solved": "second"}), on="hand_id")
    return joined.sort("hand_id")


def _runs_on_disk(folder: Path) -> Iterator[tuple[str, int]]:
    """Runs below a stage's folder; hidden (half-written) folders are skipped, odd names are told.

    Raises:
        UserError: a folder where a seed should be is not a whole number.
    """
    for path in sorted(folder.glob("[!.]*/[!.]*")):
        if not path.is_dir():
            continue
        if not path.name.lstrip("-").isdigit():
            raise UserError(f"{path} is not the folder of a seed; delete it.")
        yield path.parent.name, int(path.name)


def _check_identity(table: pl.DataFrame, path: Path, expected: dict[str, str | int]) -> None:
    """Raise unless the identifying columns say what the path says."""
    for column, value in expected.items():
        if column in table.columns and len(table) and table[column].unique().to_list() != [value]:
            raise UserError(f"{path} holds rows of another {column} than {value}; delete {path.parent} and rerun.")


def _check_ladder(study: Study) -> None:
    """Raise unless every run was probed at exactly the declared rungs."""
    declared = set(study.params.sft.checkpoints)
    for model, seed in study.runs:
        rows = study.summary.filter((pl.col("model") == model) & (pl.col("seed") == seed))
        probed = set(rows["checkpoint_step"])
        if probed != declared:
            odd = sorted(probed ^ declared)
            raise UserError(
                f"{study.directory('probe_sft', model, seed)} and sft.checkpoints in params.yaml disagree about "
                f"step {odd[0]}; run `dvc repro`."
            )
