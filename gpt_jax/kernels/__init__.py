"""Faster ways to compute what the core computes plainly: each beside a reference that tests it."""
