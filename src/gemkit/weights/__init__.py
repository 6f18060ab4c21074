"""Model files: reading, writing, block formats and tensor names. Imports NumPy only.

Reading order: `quant`, `checkpoint`, then one format: `gguf.container`, `gguf.names`, `gguf.read`, `gguf.write`.
"""
