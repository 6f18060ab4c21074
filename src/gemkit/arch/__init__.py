"""What a Gemma model is: its facts, its tensors and its mathematics. Needs NumPy only.

Reading order: ``config`` (the facts of one model), ``presets`` (the published models), ``tensors`` (names and shapes of
the parameters), ``reference`` (the forward pass in float64, the specification that every backend is tested against).
"""
