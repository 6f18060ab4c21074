"""Shared by the torch, JAX and Keras runners: batches, choice of tokens, the base runner, quantised weights."""
