"""Model files: reading, writing, block formats and tensor names. Imports NumPy only.

Reading order: `quant`, `gguf_file`, `names`, `checkpoint`, `gguf`, `gguf_writer`, `demo`.
"""
