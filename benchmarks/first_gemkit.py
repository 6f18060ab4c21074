"""A fresh process to its first token: first_gemkit.py MODEL THREADS IDS…"""

import sys

import gemkit

with gemkit.load(sys.argv[1], threads=int(sys.argv[2])) as model:
    for piece in model.stream([int(i) for i in sys.argv[3:]], max_tokens=1, ignore_eos=True):
        print(repr(str(piece)))
