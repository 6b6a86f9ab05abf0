"""Kernels written by hand, each beside the plain code that it must equal."""
