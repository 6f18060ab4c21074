"""Google's own formats: Orbax with Flax names, PyTorch `.ckpt`."""
