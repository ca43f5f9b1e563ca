"""Measuring: `harness.py` runs workloads in fresh processes; `ops.py`, `models.py`: those of `titans bench`."""
