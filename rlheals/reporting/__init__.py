"""From tables to figures, claims, metrics and a static site; reads files, never models."""
