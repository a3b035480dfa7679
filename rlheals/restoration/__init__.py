"""Edits that turn a fine-tuned model back, their controls, and repairs small enough to mail."""
