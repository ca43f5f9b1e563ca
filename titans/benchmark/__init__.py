"""Measuring: `harness.py` runs workloads in fresh processes, `ops.py` holds those of `titans bench ops`."""
