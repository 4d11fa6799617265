"""Pretrained networks made sparse without training."""
