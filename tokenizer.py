"""
Text to token ids and back: bytes, the characters of one text, or a byte-pair encoding of tiktoken (gpt2 and others).

All three have the same small interface: name, vocab_size, eos (the id that separates documents, or None), encode,
encode_array, decode_bytes, decode, state. `save` writes a tokenizer.json that holds the *whole* vocabulary, merges included:
whoever has a run directory can decode its samples, with no network, no cache and no copy of the training data.
"""

import base64
import json
from pathlib import Path

import numpy as np

FILE_NAME = "tokenizer.json"
REPLACEMENT = "\ufffd".encode()  # what an id without text decodes to: a model's vocabulary may be padded beyond its tokenizer's
# tiktoken names the files of its cache by the sha1 of their address; these two are vocab.bpe and encoder.json of GPT-2
GPT2_CACHE_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")


def unescaped(word: str) -> str:
    """A word of the command line in which \\n is a line end and \\t a tab."""
    return word.replace(r"\n", "\n").replace(r"\t", "\t")


def to_utf8(text: str) -> bytes:
    """UTF-8 of text; a lone surrogate (half a character, which JSON can smuggle in) becomes '?'."""
    return text.encode("utf-8", errors="replace")


class Tokenizer:
    """What the three have in common: everything is derived from their encode_array and decode_bytes."""

    name: str
    vocab_size: int  # ids are 0 .. vocab_size - 1
    eos: int | None  # id that stands after every document

    def encode(self, text: str) -> list[int]:
        """Token ids of text. Nothing in the text is special: "<|endoftext|>" is encoded as the characters it consists of."""
        return self.encode_array(text).tolist()

    def byte_lengths(self) -> np.ndarray:
        """(V,) bytes of text that each id stands for; one for the end of a document, as data/corpus.py counts them."""
        return np.array([1 if i == self.eos else len(self.decode_bytes([i])) for i in range(self.vocab_size)])

    def decode(self, ids: list[int]) -> str:
        """Text of ids; bytes that are not UTF-8 (a sample may end inside a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8. Byte 0, which no real text contains, separates documents."""

    name, vocab_size, eos = "byte", 256, 0

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(to_utf8(text), dtype=np.uint8)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(bytes((i,)) if 0 <= i < 256 else REPLACEMENT for i in ids)

    def state(self) -> dict:
        return {"name": self.name}


class CharTokenizer(Tokenizer):
    """The distinct characters of a text, in code point order. There is no room for an end-of-document token."""

    name, eos = "char", None

    def __init__(self, chars: str):
        self.chars = "".join(sorted(set(chars)))
        if not self.chars:
            raise ValueError("a char tokenizer needs at least one character, but the text is empty")
        self.vocab_size = len(self.chars)
        self._points = np.array([ord(c) for c in self.chars], dtype=np.uint32)

    def encode_array(self, text: str) -> np.ndarray:
        """(characters,) ids; ValueError for a character outside the vocabulary."""
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids = np.minimum(np.searchsorted(self._points, points), self.vocab_size - 1)
        unknown = np.flatnonzero(self._points[ids] != points)
        if unknown.size:
            at = int(unknown[0])
            raise ValueError(
                f"character {text[at]!r} at position {at} is not in the vocabulary, which has the {self.vocab_size} characters "
                "of the training text; leave it out, or prepare the text again with --tokenizer byte, which knows all, and train on that"
            )
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(to_utf8(self.chars[i]) if 0 <= i < self.vocab_size else REPLACEMENT for i in ids)

    def state(self) -> dict:
        return {"name": self.name, "chars": self.chars}


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding of tiktoken, by name; `encoding` is given when it was rebuilt from a saved state instead."""

    def __init__(self, name: str, encoding=None):
        self.name = name
        self.encoding = _download(name) if encoding is None else encoding
        self.vocab_size = self.encoding.n_vocab  # highest id + 1; some encodings have unused ids below it
        self.eos = self.encoding._special_tokens.get("<|endoftext|>")

    def encode_array(self, text: str) -> np.ndarray:
        # the array comes straight from tiktoken's buffer: a list of Python ints would take ten times the memory
        return self.encoding.encode_to_numpy(to_utf8(text).decode(), disallowed_special=())

    def decode_bytes(self, ids: list[int]) -> bytes:
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):  # an unused or padded id among them
            return b"".join(self._decode_one(i) for i in ids)

    def _decode_one(self, i: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(i)
        except (KeyError, OverflowError):
            return REPLACEMENT

    def state(self) -> dict:
        ranks = {base64.b64encode(token).decode(): rank for token, rank in self.encoding._mergeable_ranks.items()}
        special = self.encoding._special_tokens
        return {"name": self.name, "pattern": self.encoding._pat_str, "special_tokens": special, "ranks": ranks}


class Unavailable(ValueError):
    """Nothing is wrong with what was read, but this machine or this version does not know its tokenizer."""


def _tiktoken():
    try:
        import tiktoken
    except ModuleNotFoundError:
        raise Unavailable("a byte-pair tokenizer needs tiktoken: pip install tiktoken, or use --tokenizer byte") from None
    return tiktoken


def _download(name: str):
    """tiktoken's own encoding, from its cache or the network; FileNotFoundError in one line when there is neither."""
    try:
        return _tiktoken().get_encoding(name)
    except OSError as error:  # every exception of requests is one
        files = f"{GPT2_CACHE_FILES[0]} (vocab.bpe) and {GPT2_CACHE_FILES[1]} (encoder.json)"
        if name != "gpt2":
            files = "its files, each named by the sha1 of its download address"
        raise FileNotFoundError(
            f"tokenizer {name} is neither in tiktoken's cache nor could it be downloaded ({type(error).__name__}): "
            f"set TIKTOKEN_CACHE_DIR to a folder with {files}"
        ) from error


def encode_question(text: Tokenizer, written: str, separator: int) -> list[int]:
    """
    Tokens of a question for a model of pairs: without line ends at its end, and with the separator behind it unless that is in it
    already (an answer has begun). Raises ValueError where there is no question.
    """
    prompt = text.encode(written.rstrip("\r\n"))
    prompt += [separator] * (separator not in prompt)
    if prompt[0] == separator:
        raise ValueError("the prompt is empty, but this model answers a question: give one")
    return prompt


def get(name: str, chars: str | None = None) -> Tokenizer:
    """Make a tokenizer by name: "byte", "char" (needs `chars`, a text or its characters), "gpt2" or another tiktoken encoding.

    Raises ValueError for an unknown name, FileNotFoundError when an encoding can neither be found nor downloaded.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        if chars is None:
            raise ValueError("tokenizer char needs the characters of the training text")
        return CharTokenizer(chars)
    known = _tiktoken().list_encoding_names()
    if name not in known:
        raise Unavailable(f"unknown tokenizer {name!r}; known: {', '.join(['byte', 'char', *sorted(known)])}")
    return TiktokenTokenizer(name)


def from_state(state: dict) -> Tokenizer:
    """The tokenizer whose state() this is, without network."""
    if "ranks" not in state:
        return get(state["name"], chars=state.get("chars"))
    ranks = {base64.b64decode(token): rank for token, rank in state["ranks"].items()}
    encoding = _tiktoken().Encoding(
        state["name"], pat_str=state["pattern"], mergeable_ranks=ranks, special_tokens=state["special_tokens"]
    )
    return TiktokenTokenizer(state["name"], encoding)


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write folder/tokenizer.json."""
    text = json.dumps(tokenizer.state(), ensure_ascii=True, separators=(",", ":"))
    (Path(folder) / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def load(folder: str | Path) -> Tokenizer:
    """Read folder/tokenizer.json; FileNotFoundError when there is none, ValueError when it is damaged."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it is written beside the data and copied into every run directory")
    try:
        return from_state(json.loads(path.read_text(encoding="utf-8")))
    except Unavailable:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged ({why}); copy it again from the data set's folder") from error
