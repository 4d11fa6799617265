"""Loaders of images and texts; no network and no pruning in them."""
