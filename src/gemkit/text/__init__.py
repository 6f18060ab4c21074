"""Strings to ids and back. Text is always plain: no string that a user writes becomes a control token.

Reading order: ``vocabulary`` (the pieces), ``special`` (control tokens and turns), ``spm_proto`` and ``tokenizer_json``
(the files they come in), ``tokenizer`` (encode and decode), ``chat`` (a conversation as ids), ``stream`` (text as its
tokens come).
"""
