"""Compare models matrix by matrix: one tensor of each at a time, every decomposition made once, every answer kept.

The order of the work bounds its memory. For each analysed matrix the tensors are hashed first; pairs of equal digests
are `unchanged` and nothing is decomposed for them; pairs measured earlier on the same bytes come from the cache of
results; only for the rest are factors made (once for each distinct tensor) and read back by column slices.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import polars as pl

from rlheals.errors import UserError, first_line
from rlheals.models.families import OUTSIDE
from rlheals.models.topology import select, tables
from rlheals.progress import Progress
from rlheals.reporting.schemas import SCHEMAS, check
from rlheals.spectra.angles import resolve_k
from rlheals.spectra.coverage import Coverage, coverage
from rlheals.spectra.function_question import SMALL_MODEL, function_drift_table, prompts_of
from rlheals.spectra.gauge_question import GaugeQuestion, whole_layers
from rlheals.spectra.head_question import HEADS, HeadQuestion, has_both
from rlheals.spectra.matrix_question import MatrixQuestion
from rlheals.spectra.reader import Weights, check_same, common_rows
from rlheals.spectra.settings import Pair
from rlheals.spectra.turn import with_turn
from rlheals.spectra.verdict import MAGNITUDE, ROTATION, Verdict, correct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from rlheals.models.topology import Matrix
    from rlheals.spectra.function_question import Texts
    from rlheals.spectra.results import ResultCache
    from rlheals.spectra.settings import DiagnoseSettings
    from rlheals.spectra.store import FactorStore

NO_RUN = {"profile": "", "model": "", "seed": 0}
"""The columns that name a run of a study, where there is none."""


@dataclass(frozen=True)
class Caches:
    """Where finished work lies."""

    factors: FactorStore
    results: ResultCache

    def told(self) -> str:
        """One line about what was computed since these objects were made, and what was found on disk."""
        return (
            f"{self.factors.factorised} tensors factorised, {self.factors.hits} times factors came from the cache; "
            f"{self.results.computed} questions measured, {self.results.hits} answers came from the cache."
        )


@dataclass(frozen=True)
class Diagnosis:
    """What was found, in the tables of `rlheals.reporting.schemas`.

    Attributes:
        spectra: schema ``spectra``.
        verdicts: schema ``spectra_verdicts``.
        gauge: schema ``gauge``.
        function_drift: schema ``function_drift``; empty where it was not asked for.
        left_out: tensor name → why it was not analysed.
        notes: sentences for the reader.
        coverage: pair → what was not compared, and whether it differs; empty where it was not asked for.
    """

    spectra: pl.DataFrame
    verdicts: pl.DataFrame
    gauge: pl.DataFrame
    function_drift: pl.DataFrame
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()
    coverage: Mapping[str, Coverage] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether any matrix changed in a way that same-norm noise does not, or anything differs that was left out."""
        drifted = bool(self.verdicts["verdict"].is_in([ROTATION, MAGNITUDE]).any())
        return drifted or any(each.differing for each in self.coverage.values())

    @property
    def covered(self) -> list[str]:
        """One sentence a pair on what the verdicts cover."""
        named = len(self.coverage) > 1
        return [f"{pair}: {each.text}" if named else each.text for pair, each in self.coverage.items()]

    def tables(self) -> dict[str, pl.DataFrame]:
        """Every table by the name of its schema."""
        return {
            "spectra": self.spectra,
            "spectra_verdicts": self.verdicts,
            "gauge": self.gauge,
            "function_drift": self.function_drift,
        }


def diagnose(
    base: Path,
    tuned: Sequence[Path],
    settings: DiagnoseSettings,
    caches: Caches,
    *,
    function: bool | None = None,
    prompts: Path | None = None,
) -> Diagnosis:
    """Compare ``base`` with each of ``tuned``; the answer of ``rlheals diagnose``.

    Args:
        base: Hugging Face folder.
        tuned: folders of the models after, in the order to report them.
        settings: which matrices, and what is measured.
        caches: where decompositions and finished measures lie.
        function: whether to run the models, too; None runs them when each is below `SMALL_MODEL` bytes.
        prompts: text file for that, one prompt a line; sampled from ``base`` when None.

    Raises:
        UserError: see `compare`; also an unreadable or empty file of prompts.
    """
    names = short_names([base, *tuned])
    models = dict(zip(names, [base, *tuned], strict=True))
    pairs = [Pair(names[0], name) for name in names[1:]]
    small = function is None and small_enough(models.values())
    # Before the long part: a mistake in the prompts must not cost its time.
    encoded = _texts(base, prompts, settings, caches) if function or prompts else None
    found = compare(models, pairs, settings, caches, covered=True)
    if function is False:
        return found
    if function is None and not small:
        return _noted(found, "function drift was not measured (a model is 2 GiB or larger); --function switches it on.")
    try:
        with _told():
            encoded = _texts(base, None, settings, caches) if encoded is None else encoded
            drift = function_drift_table(models, pairs, encoded, settings, caches.results, columns=NO_RUN)
    except UserError as error:
        if function:
            raise
        return _noted(found, f"function drift was not measured: {error}")
    return replace(found, function_drift=drift)


def _texts(base: Path, prompts: Path | None, settings: DiagnoseSettings, caches: Caches) -> Texts:
    """The texts to compare on; what the library advises while ``base`` writes them is kept off the terminal."""
    from rlheals.models.checkpoint import quiet_library

    with quiet_library():
        return prompts_of(base, prompts, settings, caches.results)


@contextmanager
def _told() -> Iterator[None]:
    """Tell what a model's own code raises, of which transformers has some hundred kinds, as a `UserError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"the models could not be run on texts ({type(error).__name__}: {first_line(error)}); leave function drift "
            "out (--no-function)."
        ) from error


def _noted(found: Diagnosis, note: str) -> Diagnosis:
    return replace(found, notes=(*found.notes, note))


def compare(
    models: Mapping[str, Path],
    pairs: Sequence[Pair],
    settings: DiagnoseSettings,
    caches: Caches,
    columns: Mapping[str, Any] | None = None,
    *,
    covered: bool = False,
) -> Diagnosis:
    """Compare the weights of ``pairs`` of ``models``; no model is run.

    Args:
        models: folder of each model by the name that the pairs use.
        pairs: what is compared with what; the matrices of each are one family of Holm's correction.
        settings: which matrices, and what is measured.
        caches: where decompositions and finished measures lie.
        columns: values of profile, model and seed in the tables; empty by default.
        covered: also look whether what is not compared differs.

    Raises:
        UserError: a folder is unreadable, two models do not fit, nothing is selected, k exceeds a rank, a weight is
            not finite, a cache cannot be written.
    """
    with ExitStack() as files:
        weights = {name: files.enter_context(Weights(path)) for name, path in models.items()}
        for pair in pairs:
            check_same(weights[pair.reference], weights[pair.target])
        first = weights[pairs[0].reference]
        matrices = select(first.topology, settings.modules, settings.layers, embeddings=settings.embeddings)
        check_ks(settings, matrices, first)
        work = _Work(weights, pairs, settings, caches, dict(columns or NO_RUN))
        rows = work.run(matrices)
        rest = {pair.name: work.coverage(matrices, pair) for pair in pairs} if covered else {}
        notes = (*rows.notes, *(note for model in weights.values() for note in _peculiarities(model)))
    taken = {matrix.name for matrix in matrices}
    unselected = {each.name: "not selected" for each in first.topology.matrices if each.name not in taken}
    spectra = stack(rows.spectra, "spectra", pairs)
    return Diagnosis(
        spectra=spectra,
        verdicts=with_turn(verdict_table(rows.verdicts, pairs), spectra),
        gauge=stack(rows.gauge, "gauge", pairs),
        function_drift=pl.DataFrame(schema=SCHEMAS["function_drift"]),
        left_out={**first.topology.left_out, **unselected},
        notes=notes,
        coverage=rest,
    )


def _peculiarities(weights: Weights) -> Iterator[str]:
    """What a reader should know of how a folder was saved."""
    if weights.renamed:
        yield f"the names in {weights.path} begin with {weights.renamed!r}, which a wrapper left; it was ignored."
    heads = [name for name in tables(weights.shapes, "head") if weights.tied]
    embedding = next(iter(tables(weights.shapes, "embedding")), None)
    if heads and embedding and weights.digest(heads[0]) != weights.digest(embedding):
        yield (
            f"the config of {weights.path} ties the head to the embedding, but another head is stored; loaders untie "
            "the two, so set tie_word_embeddings to false to have the head analysed."
        )


def check_ks(settings: DiagnoseSettings, matrices: Sequence[Matrix], weights: Weights) -> None:
    """Refuse a k that some matrix has no room for, before anything is computed.

    Raises:
        UserError: naming the matrix, its rank and k.
    """
    for matrix in matrices:
        for k in settings.ks:
            try:
                resolve_k(k, min(weights.shapes[matrix.name]))
            except UserError as error:
                raise UserError(f"{matrix.name}: {error}") from error


@dataclass
class _Rows:
    """What is found, in the order of the work."""

    spectra: list[pl.DataFrame] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    gauge: list[pl.DataFrame] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Work:
    """The loops of one comparison."""

    weights: Mapping[str, Weights]
    pairs: Sequence[Pair]
    settings: DiagnoseSettings
    caches: Caches
    columns: dict[str, Any]

    def run(self, matrices: Sequence[Matrix]) -> _Rows:
        """All pairs of each matrix, then what needs several matrices at once."""
        rows = _Rows()
        first = self.weights[self.pairs[0].reference].topology
        layers = whole_layers(matrices) if self.settings.gauge and first.gauged else []
        gauged = [pair for pair in self.pairs if not pair.rung]
        heads = [pair for pair in gauged if not self.weights[pair.target].tied] if has_both(matrices) else []
        bar = Progress(
            "diagnose", len(matrices) * len(self.pairs) + len(heads) + len(layers) * len(gauged), unit="question"
        )
        for matrix in matrices:
            for pair in self.pairs:
                shared = self._shared(matrix, pair)
                if shared is not None:
                    self._matrix(shared, pair, rows)
                bar.update(note=f"{pair.target}: {matrix.name}")
        for pair in heads:
            self._heads(pair, rows)
            bar.update(note=f"{pair.target}: {HEADS}")
        for layer, parts in layers:
            for pair in gauged:
                self._gauge(layer, parts, pair, rows)
                bar.update(note=f"{pair.target}: gauge of layer {layer}")
        return rows

    def coverage(self, matrices: Sequence[Matrix], pair: Pair) -> Coverage:
        """What the pair's comparison leaves out."""
        shared = [self._shared(matrix, pair) for matrix in matrices]
        return coverage(*self._sides(pair), [matrix.name for matrix in shared if matrix is not None])

    def _shared(self, matrix: Matrix, pair: Pair) -> Matrix | None:
        """The matrix, or the rows of it that both models have; None where one has it tied to another."""
        reference, target = self._sides(pair)
        if matrix.kind not in OUTSIDE:
            return matrix
        if not (matrix.name in reference.shapes and matrix.name in target.shapes):
            return None
        return replace(matrix, name=common_rows(reference, target, matrix.name, matrix.name)[0])

    def _matrix(self, matrix: Matrix, pair: Pair, rows: _Rows) -> None:
        question = MatrixQuestion(matrix, *self._sides(pair), self.settings.of(pair), self.caches.factors)
        if question.same:
            found = question.unchanged(self.caches.results)
        else:
            found = self.caches.results.finding(question.decides(), question.answer)
        names = self._names(pair, matrix.layer, matrix.module, matrix.name)
        rows.spectra.append(label(found.table, names, "spectra"))
        shape = question.reference.shapes[matrix.name]
        facts = {key: value for key, value in found.facts.items() if key != "untrained"}
        warning = "; ".join(f"{getattr(pair, side)} {text}" for side, text in found.facts["untrained"].items())
        rows.verdicts.append({**names, "rows": shape[0], "columns": shape[1], **facts, "warning": warning})

    def _heads(self, pair: Pair, rows: _Rows) -> None:
        question = HeadQuestion(*self._sides(pair), self.settings, self.caches.factors)
        found = self.caches.results.finding(question.decides(), question.answer)
        rows.spectra.append(label(found.table, self._names(pair, -1, HEADS, HEADS), "spectra"))

    def _gauge(self, layer: int, parts: tuple[Matrix, ...], pair: Pair, rows: _Rows) -> None:
        question = GaugeQuestion(layer, parts, *self._sides(pair), self.settings.of(pair))
        if not question.same:
            found = self.caches.results.finding(question.decides(), question.answer)
            rows.gauge.append(label(found.table, {**self.columns, "pair": pair.name, "layer": layer}, "gauge"))
            for block, reason in found.facts["undefined"].items():
                rows.notes.append(f"{pair.target}, layer {layer}: the gauge of {block} is undefined, as {reason}.")

    def _sides(self, pair: Pair) -> tuple[Weights, Weights]:
        return self.weights[pair.reference], self.weights[pair.target]

    def _names(self, pair: Pair, layer: int, module: str, tensor: str) -> dict[str, Any]:
        return {**self.columns, "pair": pair.name, "layer": layer, "module": module, "tensor": tensor}


def label(table: pl.DataFrame, names: Mapping[str, Any], schema: str) -> pl.DataFrame:
    """``table`` with the columns ``names`` added, in the order and types of ``schema``."""
    types = SCHEMAS[schema]
    literals = [pl.lit(value, types[name]).alias(name) for name, value in names.items()]
    return table.with_columns(literals).select(list(types))


def verdict_table(rows: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> pl.DataFrame:
    """Schema ``spectra_verdicts``, corrected over the matrices of each pair; ``turn`` is left to `with_turn`."""
    corrected: list[dict[str, Any]] = []
    for pair in pairs:
        mine = [row for row in rows if row["pair"] == pair.name]
        verdicts = [Verdict(**{each.name: row[each.name] for each in fields(Verdict)}) for row in mine]
        corrected += [{**row, **asdict(verdict)} for row, verdict in zip(mine, correct(verdicts), strict=True)]
    schema = SCHEMAS["spectra_verdicts"]
    return check(pl.DataFrame(corrected, schema=schema), "spectra_verdicts", "the table of verdicts")


def stack(tables: Sequence[pl.DataFrame], schema: str, pairs: Sequence[Pair]) -> pl.DataFrame:
    """The tables below each other, pair by pair; the work goes matrix by matrix."""
    if not tables:
        return pl.DataFrame(schema=SCHEMAS[schema])
    order = pl.Enum([pair.name for pair in pairs])
    stacked = pl.concat(tables).sort(pl.col("pair").cast(order), maintain_order=True)
    return check(stacked, schema, f"the {schema} table")


def small_enough(folders: Iterable[Path]) -> bool:
    """Whether each model's weights are below `SMALL_MODEL` bytes, so that running two of them is no burden.

    Raises:
        UserError: a folder is unreadable.
    """
    for folder in folders:
        with Weights(folder) as weights:
            if weights.weight_bytes >= SMALL_MODEL:
                return False
    return True


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: as few of its last parts as tell it from the others; numbered where none do.

    >>> from pathlib import Path
    >>> short_names([Path("runs/base"), Path("runs/a/checkpoint-5"), Path("runs/b/checkpoint-5"), Path("runs/base")])
    ['base', 'a/checkpoint-5', 'b/checkpoint-5', 'base (2)']
    """
    names: list[str] = []
    parts = [folder.resolve().parts for folder in folders]
    for place, mine in enumerate(parts):
        others = [each for each in parts if each != mine]
        length = next(n for n in range(1, len(mine) + 2) if all(each[-n:] != mine[-n:] for each in others))
        before = sum(each == mine for each in parts[:place])
        names.append("/".join(mine[-length:]) + (f" ({before + 1})" if before else ""))
    return names
