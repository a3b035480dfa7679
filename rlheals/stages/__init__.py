"""One thin entry per DVC stage: ``python -m rlheals.stages.<name> [--model NAME --seed N]``."""
