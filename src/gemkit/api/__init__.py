"""The public classes and `load`."""
