"""Raw text to batches: rows of a file or folder, tokens with a loss mask, train and validation parts, packed batches.

Reading order: ``rows`` (formats, rows that cannot be used), ``sources`` (files and folders), ``sample`` (tokens and
mask of a row), ``split``, ``prepare`` (all of these), ``pack`` and ``batch`` (arrays of a training step), ``report``.
"""
