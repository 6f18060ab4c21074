"""Requests to tokens: continuous batching over paged caches, on any model that keeps the `Runner` protocol.

Reading order: ``interface`` (the `Runner` protocol), ``sampling`` (how a token is chosen), ``pages`` (who holds which
piece of cache), ``request`` (one request), ``scheduler`` (who runs in the next step), ``engine`` (the step).
"""
