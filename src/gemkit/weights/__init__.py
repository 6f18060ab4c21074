"""Files to canonical tensors: the only readers and writers of model files."""
