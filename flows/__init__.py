"""Prefect flows: orchestration and nothing else (none yet; the pipeline runs through `dvc repro`)."""
