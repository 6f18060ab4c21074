"""Gemma on the C++ core: builds the plan that it executes and speaks the engine's `Runner` protocol."""

from gemkit.models.native.packed import PackedStore
from gemkit.models.native.runner import NativeRunner, kernel_path

__all__ = ["NativeRunner", "PackedStore", "kernel_path"]
