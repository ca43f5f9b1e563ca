"""Measuring: `harness.py` runs workloads in fresh processes; `ops.py` and `models.py` hold those."""
