"""Work on model files and machines: `check`, `convert`, `quantize`, `receipt`, `memory`, `doctor`."""
