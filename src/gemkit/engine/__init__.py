"""Requests to tokens: continuous batching over paged caches, on any model that keeps the `Runner` protocol.

Reading order: ``interface`` (the `Runner` protocol), ``sampling`` (how a token is chosen), ``pages`` (cache pages and
their holders), ``request`` (one request), ``scheduler`` (the requests of the next step), ``engine`` (the step).
"""
