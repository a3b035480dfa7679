from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.inference.transformers_engine import TransformersEngine
from rlheals.models.checkpoint import load_model, save_model
from rlheals.restoration.edit import BASES, DOSED, Edit, Scope, Window, ends, head
from rlheals.restoration.grid import Grid, ModelSet, edit_model
from rlheals.restoration.plan import Cell, plan
from rlheals.spectra.reader import Weights
from rlheals.spectra.store import FactorStore
from tests.common import make_model, make_params, make_tokenizer
from tests.restoration.pairs import fitting
from tests.restoration.studies import answers, hands, live_checksums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import polars as pl

SEEDS = {"base": 0, "sft_max_ood": 1, "sft_end": 2, "rl": 3}
MIB = 2**20
HANDS = hands()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four models that differ by a drift; the norm scales too, which no edit of matrices may touch."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer("llama")
    for name, seed in SEEDS.items():
        model = make_model("llama", tokenizer, hidden_size=32, intermediate_size=48)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.03 * torch.randn(parameter.shape)
        save_model(model, tokenizer, root / name)
    return {name: root / name for name in SEEDS}


@pytest.fixture(scope="module")
def shared(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelSet]:
    """All models, with a store that is kept from test to test."""
    with ModelSet(folders, FactorStore(tmp_path_factory.mktemp("factors"), 64 * MIB)) as models:
        yield models


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> TransformersEngine:
    return TransformersEngine(load_model(folders["base"]), make_tokenizer("llama"), batch_size=4)


class Prober:
    """Answers that tell which weights were live; stops when told to."""

    def __init__(self, engine: TransformersEngine, stop_at: int = 1 << 30) -> None:
        self.engine, self.stop_at = engine, stop_at
        self.asked: list[str] = []
        self.loaded: list[str] = []

    def __call__(self, rows: pl.DataFrame, target: str, cell_id: str, count: Callable[[int], None]) -> pl.DataFrame:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(cell_id)
        count(len(rows))
        return answers(rows, cell_id, lambda condition, place: True, json.dumps(live_checksums(self.engine.model)))


def make_grid(models: ModelSet, prober: Prober, scratch: Path) -> Grid:
    def load(name: str) -> Any:
        prober.loaded.append(name)
        return load_model(models.weights[name].path)

    return Grid(models, prober.engine, prober, scratch, load)


def nothing(count: int, note: str) -> None:
    pass


def small_plan(models: ModelSet) -> list[Cell]:
    changes = ["restore.layer_blocks=2", "restore.heads=[0.2, 1.0]", "restore.doses=[0.5]", "restore.references=[base]"]
    return plan(make_params(*changes).restore, models.subjects())


def test_every_cell_is_live_alone_and_only_in_its_scope(
    shared: ModelSet, engine: TransformersEngine, tmp_path: Path
) -> None:
    cells = small_plan(shared)
    prober = Prober(engine)
    grid = make_grid(shared, prober, tmp_path)
    finished = grid.run(cells, HANDS, "select", nothing)
    assert prober.asked == [cell.cell_id for cell in cells]
    assert prober.loaded == ["sft_end", "rl"], "all weights are given to the engine once a target"
    unedited = {
        name: json.loads(grid.unedited(name, HANDS, "select", nothing)["response"][0]) for name in ("sft_end", "rl")
    }
    assert unedited["rl"] != unedited["sft_end"]
    for each in finished:
        edit, before = each.cell.edit, unedited[each.cell.edit.target]
        during = json.loads(each.answers["response"][0])
        assert {name for name in during if during[name] != before[name]} == set(edit.names(shared.topology))
        assert each.facts.change_norm > 0
        assert each.facts.bytes == sum(4 * _size(shared.shapes[name]) for name in edit.names(shared.topology))
    assert live_checksums(engine.model) == unedited["rl"]


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def scopes() -> st.SearchStrategy[Scope]:
    modules = st.lists(st.sampled_from(["q_proj", "o_proj", "up_proj", "down_proj"]), unique=True, max_size=3)
    layers = st.none() | st.lists(st.integers(0, 1), unique=True, min_size=1)
    return st.builds(
        lambda m, la, e, h: Scope(tuple(m), None if la is None else tuple(la), e, h),
        modules,
        layers,
        st.booleans(),
        st.booleans(),
    )


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    operator = draw(st.sampled_from(sorted(BASES)))
    reference, target = draw(st.permutations(sorted(SEEDS)))[:2]
    dose = draw(st.floats(0, 1)) if operator in DOSED else 1.0
    basis = draw(st.sampled_from(BASES[operator]))
    window = draw(st.sampled_from([head, lambda share: ends(share, share)]))(round(draw(st.floats(0, 1)), 3))
    return Edit(operator, basis, reference, target, draw(scopes()), fitting(operator, window), dose)


@given(edits())
@examples(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_no_edit_changes_a_tensor_outside_its_scope(shared: ModelSet, engine: TransformersEngine, edit: Edit) -> None:
    grid = make_grid(shared, Prober(engine), shared.store.directory)
    live = grid._on(edit.target)
    before = live_checksums(engine.model)
    with live.edited(edit_model(edit, shared).changes):
        during = live_checksums(engine.model)
    assert {name for name in before if during[name] != before[name]} <= set(edit.names(shared.topology))
    assert live_checksums(engine.model) == before


def test_a_killed_grid_goes_on_at_the_next_cell(shared: ModelSet, engine: TransformersEngine, tmp_path: Path) -> None:
    cells = small_plan(shared)
    whole = make_grid(shared, Prober(engine), tmp_path / "whole").run(cells, HANDS, "select", nothing)
    with pytest.raises(KeyboardInterrupt):
        make_grid(shared, Prober(engine, stop_at=5), tmp_path / "killed").run(cells, HANDS, "select", nothing)
    told: list[int] = []
    prober = Prober(engine)
    resumed = make_grid(shared, prober, tmp_path / "killed").run(
        cells, HANDS, "select", lambda done, note: told.append(done)
    )
    assert prober.asked == [cell.cell_id for cell in cells[5:]]
    assert sum(told) == len(HANDS) * len(cells), "progress counts what was found as well"
    for one, other in zip(whole, resumed, strict=True):
        assert one.cell == other.cell
        assert one.answers.equals(other.answers)
        assert {**vars(one.facts), "seconds": 0} == {**vars(other.facts), "seconds": 0}


@pytest.mark.parametrize("damage", ["no answers", "half facts", "other edit"])
def test_a_cell_that_is_not_whole_is_done_again(
    shared: ModelSet, engine: TransformersEngine, tmp_path: Path, damage: str
) -> None:
    cells = small_plan(shared)[:2]
    make_grid(shared, Prober(engine), tmp_path).run(cells, HANDS, "select", nothing)
    facts = tmp_path / "select" / f"{cells[0].cell_id}.json"
    if damage == "no answers":
        (tmp_path / "select" / f"{cells[0].cell_id}.parquet").unlink()
    elif damage == "half facts":
        facts.write_text(facts.read_text()[:40])
    else:
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "recipe": "another"}))
    prober = Prober(engine)
    make_grid(shared, prober, tmp_path).run(cells, HANDS, "select", nothing)
    assert prober.asked == [cells[0].cell_id]


def test_a_split_is_no_answer_to_another(shared: ModelSet, engine: TransformersEngine, tmp_path: Path) -> None:
    cells = small_plan(shared)[:1]
    prober = Prober(engine)
    grid = make_grid(shared, prober, tmp_path)
    for split in ("select", "confirm", "confirm"):
        grid.run(cells, hands(split=split), split, nothing)
        grid.unedited("sft_end", hands(split=split), split, nothing)
    assert prober.asked == [cells[0].cell_id, "unedited-sft_end"] * 2


def test_each_tensor_of_each_model_is_decomposed_exactly_once(
    folders: dict[str, Path], engine: TransformersEngine, tmp_path: Path
) -> None:
    store = FactorStore(tmp_path / "factors", 64 * MIB)
    with ModelSet(folders, store) as models:
        cells = [cell for cell in small_plan(models) if cell.group != "embeddings"]
        models.check_room(cells)
        make_grid(models, Prober(engine), tmp_path / "cells").run(cells, HANDS, "select", nothing)
        matrices = len(Scope().names(models.topology))
        assert store.factorised == len(models.decomposed) == 3 * matrices, "base, sft_end and rl"
        models.check_counter()
    with ModelSet(folders, again := FactorStore(tmp_path / "factors", 64 * MIB)) as models:
        make_grid(models, Prober(engine), tmp_path / "more").run(cells, HANDS, "select", nothing)
        assert again.factorised == 0
        models.check_counter()


def test_a_tensor_that_is_decomposed_twice_is_noticed(
    folders: dict[str, Path], engine: TransformersEngine, tmp_path: Path
) -> None:
    """Only a cache that loses entries can bring it about: here one that keeps nothing, and few entries held open."""
    edit = Edit("values", "sigma", "base", "sft_end", Scope(("q_proj",), (0,)))
    with ModelSet(folders, FactorStore(tmp_path / "factors", 1)) as models:
        for _ in range(2):
            edit_model(edit, models)
            for factors in models._open.values():
                factors.close()
            models._open.clear()
            models.store._evict()
        with pytest.raises(UserError, match=r"4 decompositions were made of 2 tensors"):
            models.check_counter()


def test_a_cache_that_is_too_small_is_refused_before_the_work(folders: dict[str, Path], tmp_path: Path) -> None:
    with ModelSet(folders, FactorStore(tmp_path, 1000)) as models:
        with pytest.raises(UserError, match=r"restore.cache_gib allows .* GiB of factors, but this grid needs"):
            models.check_room(small_plan(models))
        models.check_room([Cell(Edit("swap", "all", "base", "sft_end", Scope()), "swap")])


def test_models_of_two_shapes_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama")
    save_model(make_model("llama", tokenizer, hidden_size=64), tokenizer, tmp_path / "wide")
    with pytest.raises(UserError, match="shape"):
        ModelSet({**folders, "sft_5": tmp_path / "wide"}, FactorStore(tmp_path / "factors", MIB))


def test_facts_are_those_of_the_weights(shared: ModelSet, folders: dict[str, Path]) -> None:
    edit = Edit("interpolate", "all", "base", "sft_end", Scope(("q_proj", "up_proj")), dose=0.5)
    found = edit_model(edit, shared)
    with Weights(folders["base"]) as base, Weights(folders["sft_end"]) as end:
        names = edit.names(base.topology)
        change = torch.cat([(base.tensor(name) - end.tensor(name)).flatten() for name in names]) / 2
        before = torch.cat([end.tensor(name).flatten() for name in names])
    assert found.facts.matrices == len(names) == 4
    assert found.facts.change_norm == pytest.approx(float(change.norm() / before.norm()), rel=1e-5)
    assert shared.distances(edit) == pytest.approx(
        {name: 2 * norm for name, norm in found.facts.norms.items()}, rel=1e-5
    )
    assert (found.facts.rank_from, found.facts.rank_to) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("window", "shares"),
    [
        (head(0.2), (0.0, 0.2)),
        (head(8), (0.0, 0.25)),
        (head(1.0), (0.0, 1.0)),
        (ends(8, 4), (0.875, 0.25)),
        (ends(0.1, 0.25), (0.75, 0.1)),
        (ends(30, 8), (0.0, 1.0)),
    ],
    ids=str,
)
def test_windows_are_told_as_shares_of_the_rank(shared: ModelSet, window: Window, shares: tuple[float, float]) -> None:
    edit = Edit("values", "sigma", "base", "sft_end", Scope(("q_proj",)), window)
    facts = edit_model(edit, shared).facts
    assert (facts.rank_from, facts.rank_to) == shares


def test_an_edit_that_changes_nothing_is_no_change(shared: ModelSet) -> None:
    edit = Edit("interpolate", "all", "base", "sft_end", Scope(), dose=0.0)
    found = edit_model(edit, shared)
    assert found.changes == {}
    assert (found.facts.bytes, found.facts.change_norm) == (0, 0.0)
