"""PEFT's adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``; reading and writing."""
