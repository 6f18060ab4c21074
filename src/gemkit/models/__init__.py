"""Tensors to logits, one package per implementation."""
