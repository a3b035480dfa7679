"""The ``task`` block of params.yaml for GeneralPoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlheals.tasks.general_points.rules import BROAD_RANKS, FACES, Rule

# Larger values would make intermediate results longer than the verifier reads.
Value = Annotated[int, Field(ge=1, le=99)]
Share = Annotated[float, Field(gt=0, lt=1)]


class GeneralPointsSpec(BaseModel):
    """Hands, rules, splits and grading of one study; the keys are explained in params.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["general_points"]
    target: Annotated[int, Field(ge=1, le=10**9)]
    cards: Annotated[int, Field(ge=3, le=6)]
    deck: Literal["standard", "broad"]
    replacement: bool
    training_rule: dict[str, Value]
    ood_rule: dict[str, Value]
    held_out: Share
    reserved: Share
    fidelity: Literal["exact", "official"]
    attempts: Annotated[int, Field(ge=1)]
    feedback: Literal["leaking", "neutral", "none"]

    @model_validator(mode="after")
    def _rules_are_complete(self) -> GeneralPointsSpec:
        for key, mapping in (("training_rule", self.training_rule), ("ood_rule", self.ood_rule)):
            missing = [face for face in FACES if face not in mapping]
            unknown = [symbol for symbol in mapping if symbol not in BROAD_RANKS]
            if missing:
                raise ValueError(f"{key} gives no value to {missing[0]}; give one to each of J, Q and K")
            if unknown:
                raise ValueError(f"{key} names {unknown[0]!r}, which is no card; use {' '.join(BROAD_RANKS)}")
        if self.training_rule == self.ood_rule:
            raise ValueError("training_rule and ood_rule are the same, so nothing is out of distribution")
        return self

    @classmethod
    def paper(cls) -> GeneralPointsSpec:
        """The paper's hands and rules with the grading, feedback and splits of the ``mini`` profile."""
        return cls(
            name="general_points",
            target=24,
            cards=4,
            deck="standard",
            replacement=True,
            training_rule=dict.fromkeys(FACES, 10),
            ood_rule=dict(zip(FACES, (11, 12, 13), strict=True)),
            held_out=0.25,
            reserved=0.2,
            fidelity="exact",
            attempts=5,
            feedback="neutral",
        )

    def rule(self, name: str) -> Rule:
        """The rule of a condition: ``id`` is the training rule, ``ood`` the other."""
        return Rule(self.training_rule if name == "id" else self.ood_rule, self.target)
