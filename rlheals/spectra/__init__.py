"""What fine-tuning turned in the weights: singular values, principal angles, and what chance alone would do."""
