"""Model configurations, parameter names and shapes, and the reference implementation. Needs NumPy only.

Reading order: ``config`` (the configuration of one model), ``presets`` (the published models), ``tensors`` (names and
shapes of the parameters), ``reference`` (the forward pass in float64, the specification that every backend is tested
against).
"""
