"""Windows, scopes and names of edits."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlheals.errors import UserError
from rlheals.models.topology import Topology, read_topology
from rlheals.restoration.edit import BASES, EVERYWHERE, FULL, Edit, Scope, Window, band, ends, from_recipe, head, tail
from rlheals.restoration.windows import parse_window
from rlheals.spectra.angles import resolve_k
from tests.restoration.pairs import columns, fitting

shares = st.floats(0.0, 1.0).map(lambda share: round(share, 3))
windows = st.one_of(
    st.builds(head, st.one_of(shares, st.integers(0, 300))),
    st.builds(tail, st.one_of(shares, st.integers(0, 300))),
    st.tuples(shares, shares).map(lambda ends: band(min(ends), max(ends))),
    st.tuples(st.integers(0, 300), st.integers(0, 300)).map(lambda ends: band(min(ends), max(ends))),
    st.tuples(*[st.one_of(shares, st.integers(0, 300))] * 2).map(lambda counts: ends(*counts)),
    st.just(FULL),
)


def small(*, tied: bool = False, family: str = "llama") -> Topology:
    config = {
        "model_type": family, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    if not tied:
        shapes["lm_head.weight"] = (16, 8)
    for layer in range(3):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"}
        shapes |= {f"{stem}.mlp.up_proj.weight": (12, 8), f"{stem}.input_layernorm.weight": (8,)}
    return read_topology(config, shapes)


@given(windows, st.integers(1, 200))
def test_a_window_lies_within_the_rank_and_reads_back(window: Window, rank: int) -> None:
    spans = window.spans(rank)
    edges = [edge for span in spans for edge in (span.start, span.stop)]
    assert len(spans) <= 2
    assert [0, *edges, rank] == sorted([0, *edges, rank])
    assert len(set(edges)) == len(edges), "no empty span, and no two that touch"
    again = parse_window(window.text)
    assert again == window
    assert again.spans(rank) == spans
    assert again.shares(rank) == window.shares(rank)
    assert hash(again) == hash(window)


counts = st.one_of(shares, st.integers(0, 300))


@given(counts, counts, st.integers(1, 200))
def test_both_ends_are_the_head_and_the_tail(k_head: float, k_tail: float, rank: int) -> None:
    window = ends(k_head, k_tail)
    parts = [each for end in (head(k_head), tail(k_tail)) for each in columns(end, rank)]
    assert columns(window, rank) == sorted(set(parts))
    first, last = window.shares(rank)
    if len(window.spans(rank)) == 2:
        assert first > last, "the columns rank_from and rank_to tell both ends from one"
    assert window.is_full == all(len(columns(window, many)) == many for many in (rank, 10**6, 10**6 + 1))


@given(st.integers(1, 200), st.floats(0.001, 0.999))
def test_shares_are_the_ones_of_the_measures(rank: int, share: float) -> None:
    assert head(share).spans(rank) == [slice(0, resolve_k(share, rank))]
    (last,) = tail(share).spans(rank)
    assert last.start < last.stop == rank


def test_windows_that_look_alike_differ() -> None:
    assert head(1) != head(1.0)
    assert head(1).spans(9) == [slice(0, 1)]
    assert head(1.0) == FULL == tail(1.0) == Window(0.0, 1.0)
    assert tail(0) != FULL
    assert tail(0).spans(9) == head(0).spans(9) == []
    assert len({head(4), head(4), tail(4), head(0.4)}) == 3
    assert band(20, 30).spans(10) == []
    assert ends(4, 0) == head(4)
    assert ends(0, 4) == tail(4)
    assert ends(0.25, 0.75) == ends(3, 1.0) == FULL
    assert len({ends(4, 4), ends(4, 0.4), ends(0.4, 4), head(4), tail(4)}) == 5


@pytest.mark.parametrize("text", [
    "", "head", "head:x", "head:1.5", "middle:0.2", "full:1", "band:5-2", "band:1", "tail:-3", "ends:4", "ends:4-x",
    "ends:4--4",
])  # fmt: skip
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"window"):
        parse_window(text)


@pytest.mark.parametrize(
    "given_", [(True, 1.0), (0, 1.5), (-4, -2), (-0.5, 1.0), (0.5, 0.25), (1, 4, 2), (0, 0, 2), (0, 4, -2), (0, 4, 1.5)]
)
def test_ends_that_make_no_window_are_refused(given_: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"window"):
        Window(*given_)


@pytest.mark.parametrize("text", ["head:1e-10", "tail:1e-10", "ends:1e-10-4", "ends:4-0.0000000001", "band:1e-10-0.5"])
def test_shares_that_would_read_back_as_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"window"):
        parse_window(text)
    assert parse_window(head(1e-9).text).spans(10) == head(1e-9).spans(10) == [slice(0, 1)]


def test_scopes_name_their_tensors() -> None:
    topology = small()
    assert len(Scope().names(topology)) == 15
    assert len(EVERYWHERE.names(topology)) == 17
    assert Scope(("q_proj",), (1,)).names(topology) == ("model.layers.1.self_attn.q_proj.weight",)
    assert Scope(("q_proj",), (), head=True).names(topology) == ("lm_head.weight",)
    assert Scope((), (), embeddings=True).names(topology) == ("model.embed_tokens.weight",)
    assert Scope(("lm_head",), ()).names(topology) == ("lm_head.weight",)
    with pytest.raises(UserError, match="no module 'q_prj', did you mean 'q_proj'"):
        Scope(("q_prj",)).names(topology)
    with pytest.raises(UserError, match="layer 7 is outside"):
        Scope(layers=(7,)).names(topology)


def test_a_tied_head_is_the_embedding() -> None:
    for scope in (Scope((), (), head=True), Scope((), (), embeddings=True)):
        assert scope.names(small(tied=True)) == ("model.embed_tokens.weight",)


def test_a_reset_takes_the_vectors_of_its_layers() -> None:
    reset = Edit("reset", "all", "base", "sft_end", Scope(layers=(0, 2)))
    vectors = [name for name in reset.names(small()) if "norm" in name]
    assert vectors == [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 2)]
    whole = Edit("reset", "all", "base", "sft_end", EVERYWHERE).names(small())
    assert "model.norm.weight" in whole
    assert len(whole) == 21


@pytest.mark.parametrize(("family", "extra"), [("llama", True), ("mllama", True), ("qwen2", False)])
def test_released_layer_scripts_take_embedding_and_head_on_llama(family: str, extra: bool) -> None:
    topology = small(family=family)
    official = Edit("directions", "uv", "base", "sft_end", Scope(layers=(1,)), official=True)
    assert ("lm_head.weight" in official.names(topology)) is extra
    assert ("model.embed_tokens.weight" in official.names(topology)) is extra


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_released_whole_model_scripts_edit_every_matrix(family: str) -> None:
    """They go over all parameters of two dimensions; only the layer scripts are told what to take."""
    topology = small(family=family)
    names = {matrix.name for matrix in topology.matrices}
    everywhere = Edit("directions", "uv", "base", "sft_end", Scope(), head(0.2), official=True)
    assert set(everywhere.names(topology)) == names >= {"lm_head.weight", "model.embed_tokens.weight"}
    ours = Edit("directions", "uv", "base", "sft_end", Scope(), head(0.2))
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(ours.names(topology))
    some = Edit("directions", "uv", "base", "sft_end", Scope(("q_proj",)), head(0.2), official=True)
    assert {name.split(".")[-2] for name in some.names(topology)} == {"q_proj"}


edits = st.sampled_from([(name, basis) for name, known in BASES.items() for basis in known]).flatmap(
    lambda kind: st.builds(
        Edit,
        st.just(kind[0]),
        st.just(kind[1]),
        st.sampled_from(["base", "sft_max_ood"]),
        st.sampled_from(["sft_end", "rl", "sft_40"]),
        st.builds(
            Scope,
            st.sampled_from([(), ("q_proj",), ("q_proj", "up_proj")]),
            st.one_of(st.none(), st.sets(st.integers(0, 2)).map(lambda layers: tuple(sorted(layers)))),
            st.booleans(),
            st.booleans(),
        ),
        windows.map(lambda window: fitting(kind[0], window)),
        seed=st.integers(0, 3),
        control_of=st.sampled_from(["", "a_cell"]),
    )
)


@given(st.lists(edits, min_size=2, max_size=8))
def test_names_of_cells_are_unique_and_safe(cells: list[Edit]) -> None:
    assert len({cell.cell_id for cell in cells}) == len(set(cells))
    for cell in cells:
        assert re.fullmatch(r"[A-Za-z0-9_.+-]{1,200}", cell.cell_id)
        assert from_recipe(json.loads(json.dumps(cell.recipe()))) == cell


def test_the_name_of_a_cell_stays() -> None:
    cell = Edit(
        "directions", "uv", "base", "sft_end", Scope(("q_proj", "v_proj"), (0, 1, 3), embeddings=True), head(0.2)
    )
    assert cell.cell_id == "directions_uv_base-to-sft_end_q+v.L0-1.3+emb_head0.2_960d1ba9"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operator": "direction"}, "did you mean 'directions'"),
        ({"basis": "sigma"}, "no basis 'sigma'; choose among uv, u, v, all"),
        ({"dose": 0.5}, "directions has no dose"),
        ({"operator": "rotate", "dose": 1.5}, "share within 0 and 1"),
        ({"operator": "rotate", "dose": math.nan}, "share within 0 and 1"),
        *(
            ({"operator": "noise", "basis": "all", "dose": dose}, "a number from 0 up")
            for dose in (math.nan, math.inf, -1)
        ),
        ({"operator": "noise", "basis": "all", "amounts": (("x", math.nan),)}, "a number from 0 up"),
        *(
            ({"operator": operator, "basis": "all", "window": window}, "has no window")
            for operator in ("swap", "interpolate", "reset", "noise", "round_trip")
            for window in (head(0.2), tail(3), head(0))
        ),
        *(({"operator": operator}, "give a window such as") for operator in ("rotate", "random_rotation")),
        ({"basis": "u", "official": True}, "released scripts have no directions"),
        ({"operator": "rotate", "window": head(0.2), "official": True}, "released scripts have no rotate"),
    ],
)
def test_edits_that_mean_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    given_: dict[str, object] = {"operator": "directions", "basis": "uv", "reference": "base", "target": "sft_end"}
    with pytest.raises(UserError, match=message):
        Edit(**given_ | {"scope": Scope()} | changes)  # type: ignore[arg-type]


def test_recipes_with_gaps_are_refused() -> None:
    recipe = Edit("swap", "all", "base", "sft_end", Scope()).recipe()
    for broken in ({k: v for k, v in recipe.items() if k != "scope"}, recipe | {"colour": "red"}):
        with pytest.raises(UserError, match="recipe of an edit"):
            from_recipe(broken)
