"""Using a trained model: load a checkpoint, continue a text."""
