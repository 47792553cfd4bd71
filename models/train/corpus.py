"""Text to token windows: the tokenizer, the prose stream and the dialogue stream."""

import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD, USER, ASSISTANT = range(5)
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>"]
HELD_OUT = 0.05  # of the text, from its end
SPEECH = re.compile(r"[A-Z][^\n:]{1,40}:\n(?P<words>.+)", re.DOTALL)


def train_tokenizer(text, vocab_size):
    """Byte-level BPE: every byte has a token, so any input has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def tokenizer_config(config, template):
    """tokenizer_config.json beside tokenizer.json, chat template inside."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "pad_token": SPECIALS[PAD],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                "special": True,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            }
            for i, token in enumerate(SPECIALS)
        },
        "chat_template": template,
    }


def split(text):
    """(training text, held-out text), cut between two paragraphs."""
    cut = text.find("\n\n", int(len(text) * (1 - HELD_OUT))) + 2
    return text[:cut], text[cut:]


def prose(text, tokenizer, dice):
    """The text as it stands, with a BOS before every few paragraphs."""
    paragraphs, ids = text.split("\n\n"), []
    while paragraphs:
        take = dice.randint(6, 19)
        piece, paragraphs = paragraphs[:take], paragraphs[take:]
        ids.append(BOS)
        ids += tokenizer.encode("\n\n".join(piece) + "\n\n").ids
    return torch.tensor(ids)


def dialogue(text, tokenizer, dice):
    """Neighbouring speeches as turns of a chat, in the form of the chat template.

    Scenes overlap by one speech, so that each is a question once and an answer once.
    """
    found = (SPEECH.fullmatch(paragraph.strip()) for paragraph in text.split("\n\n"))
    speeches = [tokenizer.encode(match["words"]).ids for match in found if match]
    ids, at = [], 0
    while at + 1 < len(speeches):
        turns = min(dice.randint(1, 3), (len(speeches) - at) // 2)
        ids.append(BOS)
        for asked, answered in zip(speeches[at : at + 2 * turns : 2], speeches[at + 1 : at + 2 * turns : 2]):
            ids += [USER, *asked, ASSISTANT, *answered, EOS]
        at += 2 * turns - 1
    return torch.tensor(ids)


class Windows:
    """Draws windows of `length` ids, from each stream in turn."""

    def __init__(self, text, tokenizer, length, seed):
        dice = random.Random(seed)
        self.streams = [prose(text, tokenizer, dice), dialogue(text, tokenizer, dice)]
        self.length, self.dice = length, dice
        for stream in self.streams:
            if stream.numel() <= length:
                raise SystemExit(f"the text is too short: a stream has {stream.numel()} tokens, a window {length}")

    def batch(self, size):
        """[size, length] token ids."""
        rows = []
        for i in range(size):
            stream = self.streams[i % len(self.streams)]
            start = self.dice.randrange(stream.numel() - self.length)
            rows.append(stream[start : start + self.length])
        return torch.stack(rows)


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")
