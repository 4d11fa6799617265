"""A pretrained network without training: scores, reconstruction, conversion."""
