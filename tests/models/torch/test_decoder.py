"""The PyTorch decoder against the reference and transformers, and its forms of attention. Budget: 60 s."""

import numpy as np
import pytest
import torch
from parity import transformers_models as hf
from parity.cases import CASES
from parity.tolerances import FRAMEWORK_FLOAT32, relative_error

from gemkit.arch.presets import preset
from gemkit.errors import GemkitError, UsageError
from gemkit.models.torch import Decoder, load_decoder
from gemkit.models.torch.attention import Where, attend_flex, attend_plain, attend_sdpa, visible
from gemkit.models.torch.load import pick_dtype
from gemkit.weights.checkpoint import Checkpoint


def decoder_of(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    case = CASES[name]
    return load_decoder(case.config, Checkpoint.from_params(case.config, case.params()).tensors, dtype)


def logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return decoder(torch.from_numpy(tokens)[None])[0].float().numpy()


def test_state_dict_is_hugging_faces():
    for name in ("gemma1_2b", "gemma2", "gemma3", "untied_embedding"):
        theirs = hf.build(CASES[name].config, CASES[name].params(), torch.float32).state_dict()
        if CASES[name].config.tie_word_embeddings:
            theirs.pop("lm_head.weight", None)
        ours = decoder_of(name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "name, count", [("gemma-2b", 2_506_172_416), ("gemma-7b", 8_537_680_896), ("gemma-3-270m", 268_098_176)]
)
def test_parameter_counts_without_memory(name, count):
    with torch.device("meta"):
        decoder = Decoder(preset(name).config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count


@pytest.mark.parametrize("name", ["gemma1_2b", "gemma2", "gemma3"])
def test_gradients_equal_those_of_transformers(name):
    case = CASES[name]
    tokens = torch.from_numpy(case.tokens())[None]
    theirs = hf.build(case.config, case.params(), torch.float32)
    hf.exact_buffers(theirs, case.config)
    gradients = {}
    for which, model in (("ours", decoder_of(name).requires_grad_(True)), ("theirs", theirs)):
        out = model(tokens)
        values = out if which == "ours" else out.logits
        torch.nn.functional.cross_entropy(values[0, :-1], tokens[0, 1:]).backward()
        gradients[which] = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}
    assert gradients["ours"].keys() == gradients["theirs"].keys()
    for key, value in gradients["ours"].items():
        assert relative_error(value, gradients["theirs"][key]) <= 5 * FRAMEWORK_FLOAT32, key


def test_compiles_without_graph_breaks():
    decoder = decoder_of("gemma3")
    tokens = torch.from_numpy(CASES["gemma3"].tokens())[None]
    with torch.inference_mode():
        assert torch._dynamo.explain(decoder)(tokens).graph_break_count == 0


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 6])
def test_every_form_of_attention_is_the_plain_one(softcap, window):
    torch.manual_seed(0)
    B, T, S, N, K, H = 2, 5, 33, 4, 2, 16
    q, k, v = (torch.randn(B, n, heads, H) * 2 for n, heads in ((T, N), (S, K), (S, K)))
    query_at, key_at = (Where(torch.arange(*span).expand(B, -1)) for span in ((20, 20 + T), (S,)))
    seen = visible(query_at, key_at, window)
    plain = attend_plain(q, k, v, seen, scale=0.3, softcap=softcap).numpy()
    flex = attend_flex(q, k, v, seen, scale=0.3, softcap=softcap, compiled=False).numpy()
    assert relative_error(flex, plain) <= FRAMEWORK_FLOAT32
    if softcap is None:
        assert relative_error(attend_sdpa(q, k, v, seen, scale=0.3).numpy(), plain) <= FRAMEWORK_FLOAT32
    else:
        uncapped = attend_plain(q, k, v, seen, scale=0.3).numpy()
        assert relative_error(uncapped, plain) > 100 * FRAMEWORK_FLOAT32


def test_float16_is_refused_where_it_overflows():
    cpu = torch.device("cpu")
    assert pick_dtype("float16", CASES["gemma1_2b"].config, cpu) == torch.float16
    with pytest.raises(UsageError, match="float16 overflows in Gemma 2 and 3: choose bfloat16"):
        pick_dtype("float16", CASES["gemma3"].config, cpu)
    with pytest.raises(UsageError, match="choose from auto"):
        pick_dtype("int3", CASES["gemma3"].config, cpu)


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_without_bfloat16(has, monkeypatch):
    """As a T4: torch would emulate it there, slowly."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or has)
    gpu, config = torch.device("cuda"), CASES["gemma3"].config
    for name in ("auto", "int8", "int4"):
        assert pick_dtype(name, config, gpu) == (torch.bfloat16 if has else torch.float32)
        assert pick_dtype(name, config, torch.device("cpu")) == torch.float32
    assert asked[0] == {"including_emulation": False}
    if has:
        assert pick_dtype("bfloat16", config, gpu) == torch.bfloat16
    else:
        with pytest.raises(UsageError, match="this GPU has no bfloat16: choose auto or float32"):
            pick_dtype("bfloat16", config, gpu)
    assert pick_dtype("bfloat16", config, torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("fault", ["missing", "transposed"])
def test_a_wrong_tensor_is_named(fault):
    case, name = CASES["gemma3"], "model.layers.1.mlp.up_proj.weight"
    weights = dict(Checkpoint.from_params(case.config, case.params()).tensors)
    wrong = weights.pop(name)
    if fault == "transposed":
        weights[name] = type(wrong)(wrong.type, wrong.shape[::-1], wrong.data)
    with pytest.raises(GemkitError, match=name):
        load_decoder(case.config, weights)
