"""The dual form: chunks of tokens in matrix products, no per-token copy of the weights."""

from titans.ops.chunked.op import chunked

__all__ = ["chunked"]
