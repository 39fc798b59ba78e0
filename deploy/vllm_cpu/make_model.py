"""Make a tiny Llama with random weights and its own tokenizer: no download, and every token is visible text.

`python deploy/vllm_cpu/make_model.py FOLDER` runs in the engine's environment (it needs tokenizers, torch and
transformers). The tokenizer's alphabet is plain ASCII: with all 256 bytes a random model mostly writes broken
UTF-8, and engines hold such tokens back, so events and tokens would no longer correspond.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
VOCABULARY = 512
HEAD_SIZE = 32
SEED = 20261122
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pseudo_text(chance: random.Random, sentences: int) -> list[str]:
    """Sentences of made-up words, from which the tokenizer learns its merges."""
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", ("a", "e", "io", "u", "an", "er"))]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(600)]
    return [
        " ".join(chance.choices(words, k=chance.randint(5, 25))).capitalize() + ".\n" for _ in range(sentences)
    ]


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of exactly `VOCABULARY` tokens over printable ASCII, space and line feed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    printable = [chr(code) for code in range(0x21, 0x7F)]
    space_and_line_feed = ["\u0120", "\u010a"]  # as byte-level BPE writes them
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=printable + space_and_line_feed,
        show_progress=False,
    )
    tokenizer.train_from_iterator(pseudo_text(random.Random(SEED), 3000), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens instead of {VOCABULARY}")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": 16384,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def make_weights(folder: Path) -> None:
    """Random weights of a two-layer Llama that never ends by itself and never writes a special token."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4 * HEAD_SIZE,
        intermediate_size=8 * HEAD_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        head = model.lm_head.weight
        head *= 8  # spreads the logits, so that the specials, at zero, are never among the likely ones
        head[: len(SPECIAL_TOKENS)] = 0
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text("{}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny Llama with random weights.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    make_weights(folder)


if __name__ == "__main__":
    main()
