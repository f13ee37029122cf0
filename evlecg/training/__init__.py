"""The parts of a training job: built once (build), estimated (estimate), taken step by step (step), drawn (look)."""
