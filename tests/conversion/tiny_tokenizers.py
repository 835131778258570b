# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of the kinds that checkpoints come with, and what it takes for two to be the same."""

import base64
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer


WORDS = ["hello what is the capital of France Hello world, depth attends over blocks; in 1999 and 2024"] * 20
VOCAB_SIZE = 640  # of the models: more than any tokenizer here has


def sentencepiece_like() -> Tokenizer:
    """As `tokenizer.json` files converted from SentencePiece are: spaces by a normalizer, bytes as a fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level() -> Tokenizer:
    """As GPT-2's and Llama 3's: bytes as characters. Digits merge, which some classes rebuild the rules against."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def save_json(tokenizer: Tokenizer, folder: Path):
    tokenizer.save(str(folder / "tokenizer.json"))


def save_vocab_and_merges(folder: Path):
    """The files that byte-level tokenizers had before `tokenizer.json`."""
    model = json.loads(byte_level().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))


def save_tekken(folder: Path):
    """Mistral's own format: single bytes here, and control tokens before them."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{rank}>" for rank in range(5, 20))]
    config = {
        "pattern": r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+",
        "num_vocab_tokens": 256,
        "default_vocab_size": 276,
        "default_num_special_tokens": 20,
        "version": "v7",
    }
    vocab = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ]
    control = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)]
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": control}))


def texts() -> list[str]:
    """200 texts that tokenizers like to disagree on: spaces, digits, control tokens, scripts, bytes."""
    generator = random.Random(0)
    chosen = [
        "[INST] Hello[/INST]",
        " Hello",
        "in 2024",
        "a  b\n\tc",
        "深い残差",
        "e\u0301",
        "<s>x</s>",
        "😀",
        "<unk>",
        "NEW",
    ]
    characters = "abc deé深 0123\n\t<|>[]/INST_hello▁"
    while len(chosen) < 200:
        chosen.append("".join(generator.choice(characters) for _ in range(generator.randint(1, 25))))
    return chosen


def behaviour(folder: Path) -> dict:
    """What a user of the tokenizer in `folder` sees."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in texts()]
    return {
        "class": type(tokenizer).__name__,
        "ids": ids,
        "ids without special tokens": [tokenizer(text, add_special_tokens=False).input_ids for text in texts()],
        "texts": [tokenizer.decode(row) for row in ids],
        "added tokens": {index: repr(token) for index, token in tokenizer.added_tokens_decoder.items()},
        "special tokens": tokenizer.special_tokens_map,
        "chat template": tokenizer.chat_template,
        "sides": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length),
        "size": len(tokenizer),
    }
