"""Training: typed recipes, transformers' Trainer with exact resumption and atomic checkpoints.

Import from the modules: ``titans.training.recipe`` needs neither torch nor transformers.
"""
