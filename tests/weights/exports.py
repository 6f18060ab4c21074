"""Random exports of tiny Gemma models, as trainers, hubs and people leave them. All of an export follows from its seed.

The files are written by hand, so that they need not be what transformers would write today.
"""

import copy
import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from parity.cases import random_params

from gemkit.arch.hf_config import from_hf
from gemkit.text.spm_proto import read_model
from gemkit.text.tokenizer_json import write_tokenizer_json
from gemkit.weights.hf.safetensors import INDEX, SINGLE

SYLLABLES = ["ba", "ban", "na", "an", "so", "son", "nos", "the", "he", "then", "in", "nin", "ing", "aa", "a", "o"]
SYMBOLS = ["<mask>", "<unused0>", "<unused1>", "\n\n", "<h1>", "</h1>", "<start_of_turn>", "<end_of_turn>"]
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass
class Export:
    """seed; path: its folder. what: the choices made, for a message. may_refuse: refusals that are right."""

    seed: int
    path: Path
    what: list[str] = field(default_factory=list)
    may_refuse: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def words(rng: random.Random, count: int) -> str:
    """Made-up words of few syllables, which can be put together in many ways."""
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randrange(1, 5))) for _ in range(count))


def vocabulary() -> bytes:
    """A ``tokenizer.model``, trained; the same at every call."""
    import sentencepiece

    out, rng = io.BytesIO(), random.Random(0)
    corpus = [
        "hello world, the cat sat on the mat",
        "a user asks a model 42 times",
        *(words(rng, 9) for _ in range(300)),
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 3),
        model_writer=out,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=600,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_by_whitespace=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=SYMBOLS,
        minloglevel=2,
    )
    return out.getvalue()


class Maker:
    """Writes exports. vision: the tensors of a tiny image part under transformers' names, and its configuration."""

    def __init__(self, vision: dict[str, torch.Tensor], vision_config: dict) -> None:
        self.vision, self.vision_config = vision, vision_config
        self.model = vocabulary()
        self.json = json.loads(write_tokenizer_json(read_model(self.model)))
        self.pieces = len(self.json["model"]["vocab"])

    def make(self, seed: int, path: Path) -> Export:
        rng = random.Random(seed)
        export = Export(seed, path)
        path.mkdir(parents=True)
        kind = rng.choice(["gemma", "gemma2", "gemma3_text", "gemma3_text", "gemma3"])
        facts = _config(rng, kind, self.pieces + rng.choice([0, 3, 8, 64]), export)
        rows = facts["vocab_size"]
        state = _state(rng, kind, copy.deepcopy(facts), seed, export)
        facts = self._around(rng, kind, facts, state, export)
        _write_weights(rng, path, state, export)
        (path / "config.json").write_text(json.dumps(facts))
        if rng.random() < 0.5:
            eos = rng.choice([1, [1, 107], [1, 5, 9], None, [1, 10**6]])
            (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": eos}))
        for name in rng.sample(["README.md", "optimizer.pt", "training_args.bin", "NOTICE", ".gitattributes"], 2):
            (path / name).write_bytes(b"x")
        self._tokenizer(rng, path, rows, export)
        return export

    def _around(self, rng, kind: str, facts: dict, state: dict, export: Export) -> dict:
        """The multimodal model around the text model: names and configuration."""
        if kind != "gemma3":
            return facts
        prefix = rng.choice(["language_model.model.", "model.language_model.", "model.language_model.model."])
        head = rng.choice(["lm_head.", "language_model.lm_head."])
        tower = "" if prefix.startswith("language") else "model."
        text = dict(state)
        state.clear()
        for name, value in text.items():
            new = head + name.removeprefix("lm_head.") if name.startswith("lm_head.") else None
            state[new or prefix + name.removeprefix("model.")] = value
        state |= {tower + name: value for name, value in self.vision.items()}
        export.what += [prefix, head]
        outer = {"model_type": "gemma3", "text_config": facts, "vision_config": self.vision_config}
        outer |= {"mm_tokens_per_image": 4, "image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302}
        tied = facts.pop("tie_word_embeddings", None)
        if tied is not None or rng.random() < 0.3:
            outer["tie_word_embeddings"] = True if tied is None else tied
        if rng.random() < 0.3:
            facts["tie_word_embeddings"] = rng.choice([True, False])
        if rng.random() < 0.3:
            del facts["model_type"]
        return outer

    def _tokenizer(self, rng, path: Path, rows: int, export: Export) -> None:
        files = rng.choice(["json", "json", "model", "both", "both"])
        spare = rows - self.pieces
        tokens = [_token(rng, export) for _ in range(rng.choice([0, 0, 1, 2, 3]))]
        tokens = list({token["content"]: token for token in tokens}.values())[: max(0, spare)]
        data = copy.deepcopy(self.json)
        style = rng.choice(["none", "list", "old files", "version 5", "class"])
        if files == "model" and style == "version 5":  # which writes tokenizer.json
            style = "none"
        export.what += [files, style, *(f"{t['content']!a}{'*' if t['special'] else ''}" for t in tokens)]
        numbered = {self.pieces + n: token for n, token in enumerate(tokens)}
        if rng.random() < 0.5:  # the file lists them as well
            data["added_tokens"] += [{"id": number, **token} for number, token in numbered.items()]
        if rng.random() < 0.1:
            data["added_tokens"].reverse()
        config = {"bos_token": "<bos>", "eos_token": rng.choice(["<eos>", "<end_of_turn>"]), "model_max_length": 128}
        if style == "list":
            listed = dict(numbered)
            ids = data["model"]["vocab"]
            for name in rng.sample(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<h1>", "\n\n"], rng.randrange(8)):
                special = name.startswith("<") and name != "<h1>"
                listed[ids[name]] = _plain_token(name, special)
            if rng.random() < 0.2 and spare > len(tokens) + 1:
                listed[4] = _plain_token("<|im_start|>", True)  # takes an unused piece's place
            config["added_tokens_decoder"] = {str(number): token for number, token in listed.items()}
        if style in ("old files", "class") and rng.random() < 0.7:
            (path / "added_tokens.json").write_text(json.dumps({t["content"]: n for n, t in numbered.items()}))
            special = [token["content"] for token in tokens if token["special"]]
            (path / "special_tokens_map.json").write_text(
                json.dumps({"additional_special_tokens": special, "bos_token": _plain_token("<bos>", True)})
            )
        if style == "version 5":
            config |= {"backend": "tokenizers", "extra_special_tokens": [t["content"] for t in tokens if t["special"]]}
            data["added_tokens"] = [
                *self.json["added_tokens"],
                *({"id": number, **token} for number, token in numbered.items()),
            ]
        config["tokenizer_class"] = rng.choice(["GemmaTokenizer", "GemmaTokenizerFast", None])
        if style == "class" and files != "model":
            config["tokenizer_class"] = rng.choice(["PreTrainedTokenizerFast", "TokenizersBackend", "Mine"])
        if style != "none":
            config = {key: value for key, value in config.items() if value is not None}
            (path / "tokenizer_config.json").write_text(json.dumps(config))
        if files != "model":
            (path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
        if files != "json":
            (path / "tokenizer.model").write_bytes(self.model)
        export.texts = [_text(rng, tokens) for _ in range(12)]


# --- configuration ---------------------------------------------------------------------------------------------------


def _config(rng, kind: str, rows: int, export: Export) -> dict:
    """A text model's ``config.json`` with keys as different versions wrote them."""
    layers = rng.choice([1, 2, 3])
    facts = {
        "model_type": "gemma3_text" if kind == "gemma3" else kind,
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": rng.choice([32, 64]),
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": rng.choice([1, 2]),
        "head_dim": 32,
        "max_position_embeddings": 128,
    }

    def maybe(chance: float, **more) -> None:
        if rng.random() < chance:
            facts.update(more)
            export.what.append(f"{more}")

    facts["tie_word_embeddings"] = rng.choice([True, False])
    if facts["tie_word_embeddings"] and rng.random() < 0.5:
        del facts["tie_word_embeddings"]
    maybe(0.3, rms_norm_eps=1e-3)
    maybe(0.3, bos_token_id=2, eos_token_id=rng.choice([1, [1, 106], [1, 10**5], None]), pad_token_id=0)
    maybe(0.3, **{rng.choice(["dtype", "torch_dtype"]): rng.choice(["bfloat16", "float32", "float16"])})
    maybe(0.2, attention_bias=False, attention_dropout=0.0, use_cache=True, transformers_version="4.51.0")
    maybe(0.3, architectures=[rng.choice(["GemmaForCausalLM", "Gemma3ForCausalLM", "GemmaModel"])])
    act = "hidden_act" if kind == "gemma" else "hidden_activation"
    maybe(0.3, **{act: rng.choice(["gelu_pytorch_tanh", "gelu_new"] + ["gelu"] * (kind == "gemma"))})
    maybe(0.2, rope_theta=rng.choice([10000.0, 500.0, 10000]))
    linear = {rng.choice(["rope_type", "type"]): "linear", "factor": rng.choice([2.0, 8])}
    maybe(0.25, rope_scaling=rng.choice([None, linear, {"rope_type": "default"}]))
    if kind == "gemma":
        maybe(0.2, rope_parameters=rng.choice([None, {"rope_theta": 300.0}, linear | {"rope_theta": 300.0}]))
        maybe(0.2, hidden_activation=None)
        return facts
    facts["query_pre_attn_scalar"] = rng.choice([32, 32, 24, 256])
    facts["sliding_window"] = rng.choice([4, 8])
    if rng.random() < 0.4:
        facts["layer_types"] = [rng.choice(["sliding_attention", "full_attention"]) for _ in range(layers)]
    maybe(0.3, sliding_window_pattern=rng.choice([1, 2, 3]))
    maybe(0.2, _sliding_window_pattern=rng.choice([1, 2]))
    maybe(0.3, final_logit_softcapping=rng.choice([None, 5.0]))
    maybe(0.3, attn_logit_softcapping=rng.choice([None, 5.0]))
    if kind == "gemma2":
        maybe(0.2, rope_parameters=rng.choice([None, {"rope_theta": 300.0}, linear | {"rope_theta": 300.0}]))
        return facts
    maybe(0.3, rope_local_base_freq=rng.choice([10000.0, 700.0]))
    nested = {
        "full_attention": rng.choice([{}, {"rope_theta": 300.0}, linear | {"rope_theta": 200.0}]),
        "sliding_attention": rng.choice([{}, {"rope_theta": 100.0}]),
    }
    maybe(0.4, rope_parameters=rng.choice([None, nested, {"rope_theta": 300.0, "rope_type": "default"}]))
    return facts


# --- weights ---------------------------------------------------------------------------------------------------------


def _state(rng, kind: str, facts: dict, seed: int, export: Export) -> dict[str, torch.Tensor]:
    """The text model's tensors by canonical name, with tensors next to or in place of them."""
    config = from_hf({**facts, "tie_word_embeddings": False, "rope_scaling": None, "rope_parameters": None})
    state = {key: torch.from_numpy(value) for key, value in random_params(config, seed).items()}
    tied = facts.get("tie_word_embeddings", True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    choice = rng.choice(["as it should be"] * 3 + ["both", "both in two types", "differ", "the other alone", "none"])
    if choice == "as it should be":
        if tied:
            del state[head]
    elif choice == "both":
        state[head] = state[embedding].clone()
    elif choice == "both in two types":
        state[embedding] = state[embedding].bfloat16()
        state[head] = state[embedding].to(rng.choice([torch.float32, torch.float64]))
    elif choice == "the other alone":
        state[head] = state.pop(embedding)
    elif choice == "none" and not tied:
        del state[head]
    export.what.append(f"head {choice}")
    dtype = rng.choice(["F32", "F32", "BF16", "F16", "mixed"])
    for name, value in state.items():
        if choice != "both in two types" or name not in (embedding, head):
            picked = rng.choice(list(TORCH)) if dtype == "mixed" and name not in (embedding, head) else dtype
            state[name] = value.to(TORCH.get(picked, torch.float32))
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.9.mlp.up_proj.weight": torch.ones(4, 4),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(4),
        "v_head.summary.weight": torch.ones(1, 32),
        "vision_tower.a.weight": torch.ones(2),
        "something": torch.ones(1),
    }
    if rng.random() < 0.3:
        for name in rng.sample(sorted(extra), rng.randrange(1, 3)):
            state[name] = extra[name]
            export.what.append(name)
    if rng.random() < 0.05:
        del state[rng.choice(sorted(state))]
        export.what.append("a tensor less")
    if rng.random() < 0.03:
        state["score.weight"] = torch.ones(1, 32)
        export.may_refuse.append("classifier or reward model")
    if kind != "gemma3" and rng.random() < 0.25:
        bare = {name.removeprefix("model."): value for name, value in state.items()}
        export.what.append("bare names")
        state = bare
    if kind != "gemma3" and rng.random() < 0.1 and "lm_head.weight" in state:
        state["model.lm_head.weight"] = state.pop("lm_head.weight")
    return state


def _write_weights(rng, path: Path, state: dict[str, torch.Tensor], export: Export) -> None:
    state = {name: value.contiguous().clone() for name, value in state.items()}
    metadata = {"format": "pt"}
    choice = rng.choice(["one file", "one file", "shards", "both", "odd index", "twice"])
    export.what.append(choice)
    if choice == "one file":
        safetensors.torch.save_file(state, path / SINGLE, metadata)
        return
    names = list(state)
    rng.shuffle(names)
    cuts = sorted(rng.sample(range(1, len(names)), min(rng.choice([1, 2]), len(names) - 1)))
    parts = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)])]
    index = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        if choice == "odd index" and rng.random() < 0.5:
            name = rng.choice([f"part{number}.safetensors", f"sub/part{number}.safetensors"])
            (path / name).parent.mkdir(exist_ok=True)
        tensors = {key: state[key] for key in part}
        if choice == "twice" and number == 1:  # the later file counts
            tensors |= {key: state[key] * 3 + 1 for key in parts[-1][:2]}
        safetensors.torch.save_file(tensors, path / name, metadata)
        index |= dict.fromkeys(part, name)
    if choice == "odd index":
        values = list(index.values())
        for key in rng.sample(names, len(names) // 3):
            if values.count(index[key]) > 1:
                values.remove(index[key])
                del index[key]
        index["model.not.there"] = rng.choice(values)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": index}))
    if choice == "both":  # the single file counts
        changed = {name: value * 2 for name, value in state.items()}
        safetensors.torch.save_file(changed, path / SINGLE, metadata)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _plain_token(content: str, special: bool, **more) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **flags, "special": special, **more}


def _token(rng, export: Export) -> dict:
    content = rng.choice(
        [
            "<think>",
            "</think>",
            "<|im_end|>",
            "[INST]",
            "café",
            "two words",
            "\n\n\n",
            "<x",
            "<x>",
            "hello",
            " lead",
            "the",
        ]
    )
    special = rng.random() < 0.4
    token = _plain_token(content, special, normalized=not special and rng.random() < 0.5)
    if rng.random() < 0.05:
        flag = rng.choice(["lstrip", "rstrip", "single_word"])
        token[flag] = True
        if not special:
            export.may_refuse.append(f"has {flag}")
    if content.startswith(" ") or content == "two words":
        export.may_refuse.append("is a piece of the vocabulary too")
    return token


def _text(rng, tokens: list[dict]) -> str:
    parts = [
        words(rng, 2),
        words(rng, 3),
        "hello",
        "the",
        "cat",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\n\n\n",
        "user",
        "42",
        "é",
        "漢",
        "<h1>",
        "x",
        "<",
        "two words",
    ]
    parts += [token["content"] for token in tokens if not token["special"]]
    return "".join(rng.choice(parts) + rng.choice(["", " ", ""]) for _ in range(rng.randrange(1, 9)))


def ids(seed: int, rows: int, length: int = 20) -> np.ndarray:
    """Token ids for comparing logits, longer than the windows."""
    found = np.random.default_rng(seed).integers(0, rows, length)
    found[0] = 2
    return found
