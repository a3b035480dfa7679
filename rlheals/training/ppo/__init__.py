"""Proximal policy optimisation over the turns of a dialogue game: one branch from one rung of the SFT ladder.

A turn is the model's whole response; its state is the conversation before it, valued at the last prompt token.
"""
