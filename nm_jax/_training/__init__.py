"""Sparse training: the optax transformation, its state and gradient rules."""
