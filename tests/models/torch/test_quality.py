"""Cost of 8 and 4 bits in Google's smallest model: perplexity and KL on WikiText-2 against float32. Budget: 60 s."""

import copy
import math

import pytest
import torch
from parity.tolerances import MEAN_KL_INT4, MEAN_KL_INT8, PERPLEXITY_INT4, PERPLEXITY_INT8
from testdata import data_file

from gemkit.arch.tensors import manifest
from gemkit.hub.demo import demo_path
from gemkit.models.torch import Decoder, load_decoder
from gemkit.models.torch.linear import quantise
from gemkit.models.torch.load import bits_of, put
from gemkit.text.tokenizer import Tokenizer
from gemkit.weights.open import open_checkpoint

TOKENS = 257
SLICE = 64  # rows of 262,144 logits held at a time


def log_probabilities(decoder: Decoder, hidden_TD: torch.Tensor):
    for at in range(0, len(hidden_TD), SLICE):
        yield decoder.logits(hidden_TD[at : at + SLICE]).log_softmax(-1)


@pytest.fixture(scope="module")
def measured() -> dict[int, tuple[float, float]]:
    """By bits, the relative rise of perplexity and the mean KL from float32, in nats."""
    with open_checkpoint(demo_path()) as checkpoint:
        tokenizer = Tokenizer.from_cached(checkpoint.vocabulary_key, lambda: checkpoint.vocabulary)
        text = data_file("text_wikitext2", "valid.txt").read_text(encoding="utf-8")[:4_000]
        ids = torch.tensor(tokenizer.encode(text)[:TOKENS])
        assert len(ids) == TOKENS and ids[0] == tokenizer.bos_id
        exact = load_decoder(checkpoint.config, checkpoint.tensors)
    few = copy.deepcopy(exact)
    found = {}
    with torch.inference_mode():
        wanted = exact.hidden(ids[None, :-1])[0][0]
        for bits in (8, 4):
            for name, spec in manifest(exact.config).items():
                if spec.quantise and (bits == 8 or bits_of(spec, bits) != 8):
                    put(few, name, quantise(exact.get_parameter(name), bits_of(spec, bits)))
            rise = divergence = at = 0.0
            hidden = few.hidden(ids[None, :-1])[0][0]
            for p, q in zip(log_probabilities(exact, wanted), log_probabilities(few, hidden), strict=True):
                targets = ids[1:][int(at) : int(at) + len(p), None]
                rise += (p - q).gather(1, targets).sum().item()
                divergence += (p.exp() * (p - q)).sum().item()
                at += len(p)
            found[bits] = math.exp(rise / at) - 1, divergence / at
    return found


@pytest.mark.parametrize(
    "bits, perplexity, divergence", [(8, PERPLEXITY_INT8, MEAN_KL_INT8), (4, PERPLEXITY_INT4, MEAN_KL_INT4)]
)
def test_what_few_bits_cost(measured, bits, perplexity, divergence):
    rise, mean = measured[bits]
    print(f"{bits} bits: perplexity {rise:+.2%}, mean KL {mean:.5f} nats")
    assert rise <= perplexity
    assert 0 < mean <= divergence


def test_fewer_bits_cost_more(measured):
    assert measured[4][1] > 10 * measured[8][1]
