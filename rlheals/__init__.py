"""What fine-tuning turned in a language model, whether it can be turned back, and whether RL is worth its price."""

__version__ = "0.1.0"
