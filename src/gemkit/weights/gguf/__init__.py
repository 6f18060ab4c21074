"""GGUF: the container, names, vocabulary; reading and writing."""
