"""Hugging Face folders: safetensors, configuration, tokenizer files; reading and writing."""
