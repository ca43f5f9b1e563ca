"""Tasks of recall as training data, and how well a model answers them after texts of any length.

Import from the modules: ``titans.tasks.settings`` needs neither torch nor transformers.
"""
