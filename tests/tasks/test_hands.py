from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rlheals.tasks.general_points.hands import (
    Draw,
    draw_hands,
    draw_solvable,
    ordered_hands,
    solvable_mask,
    symbols_of,
    value_multisets,
    with_suits,
)
from rlheals.tasks.general_points.rules import FACES, Rule
from rlheals.tasks.general_points.solver import solvable

ID, OOD = Rule.faces_as_10(24), Rule.faces_as_11_12_13(24)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ranks_of(draw: Draw) -> np.ndarray:
    return np.array([[draw.symbols.index(card) for card in hand] for hand in ordered_hands(draw)], np.uint8)


def test_ordered_solvable_hands_under_the_training_rule():
    mask = solvable_mask(ranks_of(Draw()), Draw(), ID)
    assert (mask.sum(), mask.size) == (20876, 13**4)


def test_faces_in_solvable_out_of_distribution_hands():
    draw = Draw(faces=True)
    hands = list(ordered_hands(draw))
    assert len(hands) == 13**4 - 10**4
    mask = solvable_mask(ranks_of(draw), draw, OOD)
    # A hand with f face cards is drawn in f ways: any of them may be the forced one.
    weight: Counter[int] = Counter()
    for hand, is_solvable in zip(hands, mask, strict=True):
        faces = sum(card in FACES for card in hand)
        weight[faces] += faces * int(is_solvable)
    shares = [round(weight[faces] / weight.total(), 3) for faces in (1, 2, 3, 4)]
    assert shares == [0.496, 0.404, 0.085, 0.015]


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("deck", ["standard", "broad"])
def test_every_rank_and_position_is_equally_likely(deck: str, replacement: bool):
    draw = Draw(5, deck, replacement)
    hands = draw_hands(rng(), 40_000, draw)
    assert hands.shape == (40_000, 5)
    expected = len(hands) / len(draw.symbols)
    for column in range(5):
        counts = np.bincount(hands[:, column] // 4, minlength=len(draw.symbols))
        # Five standard deviations of a binomial count.
        assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_a_deal_without_replacement_repeats_no_card():
    hands = np.sort(draw_hands(rng(), 5000, Draw(6, replacement=False)), axis=1)
    assert (np.diff(hands, axis=1) > 0).all()
    repeated = np.sort(draw_hands(rng(), 5000, Draw(6)), axis=1)
    assert not (np.diff(repeated, axis=1) > 0).all()


@pytest.mark.parametrize("replacement", [True, False])
def test_out_of_distribution_draw_has_a_face_card_in_any_position(replacement: bool):
    draw = Draw(faces=True, replacement=replacement)
    hands = symbols_of(draw_hands(rng(), 20_000, draw), draw)
    single = [hand for hand in hands if sum(card in FACES for card in hand) == 1]
    assert all(any(card in FACES for card in hand) for hand in hands)
    places = Counter(next(i for i, card in enumerate(hand) if card in FACES) for hand in single)
    expected = len(single) / 4
    assert all(abs(places[place] - expected) < 5 * expected**0.5 for place in range(4))


@pytest.mark.parametrize("cards", [3, 4, 5])
def test_mask_agrees_with_the_solver(cards: int):
    draw = Draw(cards)
    hands = draw_hands(rng(1), 300, draw)
    expected = [solvable(OOD.values(hand), 24) for hand in symbols_of(hands, draw)]
    assert solvable_mask(hands // 4, draw, OOD).tolist() == expected
    kept = draw_solvable(rng(1), 300, draw, OOD)
    assert len(kept) == sum(expected)


def test_draws_depend_on_the_seed_alone():
    assert (draw_hands(rng(3), 100, Draw()) == draw_hands(rng(3), 100, Draw())).all()
    assert (draw_hands(rng(3), 100, Draw()) != draw_hands(rng(4), 100, Draw())).any()


def test_suits_are_shown_only_on_request():
    draw = Draw()
    hand = np.array([9 * 4, 12 * 4 + 3], np.uint8)
    assert symbols_of(hand[None], draw) == [("10", "K")]
    assert with_suits(hand, draw) == ["H10", "CK"]


def test_number_of_value_multisets():
    assert len(list(value_multisets([tuple(range(1, 11))], 4))) == 715
    assert len(list(value_multisets([ID.values("AJ"), OOD.values(["J", "2"])], 3))) == 20  # of 1, 2, 10, 11
