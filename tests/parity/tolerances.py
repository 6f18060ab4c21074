"""Every numerical tolerance of the test suite; no other file writes one.

Unless a line says otherwise, an error is max|a - b| / max|b| over all logits of a case (`relative_error`), b being the
side that is trusted.
"""

import numpy as np

# gemkit.arch.reference against Hugging Face transformers, both in float64 throughout.
REFERENCE_VS_TRANSFORMERS_F64 = 1e-9
# The same against transformers as it is: its norms, softmax and rotary tables stay in float32 in a float64 model.
REFERENCE_VS_TRANSFORMERS_F32 = 1e-5
# transformers computes the rotary frequencies with float32 powers, which are off by a few units in the last place.
ROPE_FREQUENCIES = 5e-7

# The native core with float32 activations against the reference.
NATIVE_FLOAT32 = 1e-4
# Its default mode: float matrices with a 16-bit cache, and quantised matrices with int8 activations. The tiny models
# are loud (their sublayers outweigh the embedding) and amplify what real weights hide.
NATIVE_INT8_CACHE = 2e-3
NATIVE_INT8_MATRICES = 1e-2
# Log-probabilities of the core against float64 ones of the same logits, in nats.
NATIVE_LOGPROB = 2e-5

# torch, JAX and Keras in float32 against the reference.
FRAMEWORK_FLOAT32 = 2e-5
# The same and transformers in float64 (transformers without its detours through float32).
FRAMEWORK_FLOAT64 = 1e-9
# The error of bfloat16 against float64, in those of transformers.
BFLOAT16_RATIO = 2.0

# Switching a case's trait off must move the logits by this many times the widest tolerance above.
TRAIT_MARGIN = 100

# Real weights, native core: perplexity against transformers float32 (relative difference) and llama.cpp (ratio),
# and the mean Kullback-Leibler divergence from the float32 distribution, in nats per token.
PERPLEXITY_VS_TRANSFORMERS = 3e-3
PERPLEXITY_RATIO_TO_LLAMA_CPP = 1.001
MEAN_KL = 2e-3
# The same perplexity with float32 activations, and its logits against transformers'.
PERPLEXITY_FLOAT32_VS_TRANSFORMERS = 1e-4
LOGITS_FLOAT32_REAL = 1e-4
# Any two implementations in float32 on real weights.
REAL_FLOAT32_PAIR = 2e-3

# A random matrix in 8 and 4 bits in torch and JAX, and real weights: relative rise of perplexity over float32's, and
# mean KL in nats. 4 bits hurt: the real model is the smallest there is, and was in four to six bits before.
INT8_MATRIX = 6e-3
INT4_MATRIX = 0.12
PERPLEXITY_INT8 = 5e-3
MEAN_KL_INT8 = 2e-3
PERPLEXITY_INT4 = 0.3
MEAN_KL_INT4 = 0.3
# The same compared in bfloat16.
BFLOAT16_PRODUCT = 2e-2

# Losses of training steps, in nats, of any two implementations from the same start on the same batches.
LOSS_CURVE = 1e-3

# Squared error of searched scales against ggml's own on the same rows, and the perplexity of the files made with them.
SEARCHED_ERROR_RATIO_TO_GGML = 1.002
SEARCHED_PERPLEXITY_RATIO_TO_GGML = 1.005
# Lead in the logit that the most probable token needs for llama.cpp, which rounds activations otherwise, to agree.
QUANTIZED_MARGIN = 0.5


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """max|actual - expected| / max|expected|; infinite where either is not finite, so that a NaN never passes."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape} differ"
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
