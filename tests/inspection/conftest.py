"""The probe models of tests/models: tiny, of any variant, with randomised weights in float64."""

from tests.models.conftest import build, fresh, tokens

__all__ = ["build", "fresh", "tokens"]
