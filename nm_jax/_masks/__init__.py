"""Masks over pytrees: solve the leaves, compute, apply, verify."""
