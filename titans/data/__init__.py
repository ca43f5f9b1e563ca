"""Text in, batches out: sources -> tokenizer -> prepare (shards on disk) -> dataset (packed batches).

Import from the modules: ``titans.data.sources`` and ``titans.data.shards`` need neither torch nor
transformers.
"""
