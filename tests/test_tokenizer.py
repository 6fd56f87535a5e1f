"""Tokenizers: round trips, nothing special in user text, and a saved vocabulary that needs neither network nor cache."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["", "hello world\n", "naïve — Ωmega 日本語 🙂🧪\r\n\ttab", "e\u0301 <|endoftext|> <|endofprompt|>", "  x   y\n\n\n z"]


def tiny_encoding():
    """A real tiktoken encoding of our own: 256 bytes, three merges, ids 259 to 261 unused, end of text 262, not the last id."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256, b"ll": 257, b" w": 258}
    pattern = r" ?\w+|\s+|[^\w\s]+"
    special = {"<|endoftext|>": 262, "<|endofprompt|>": 263}
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture
def tiny():
    return tokenizer.TiktokenTokenizer("tiny", tiny_encoding())


@pytest.fixture
def gpt2():
    pytest.importorskip("tiktoken")
    try:
        return tokenizer.get("gpt2")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["byte", "char", "tiny", "gpt2"])
def any_tokenizer(request):
    if request.param in ("tiny", "gpt2"):
        return request.getfixturevalue(request.param)
    return tokenizer.get(request.param, chars="".join(TEXTS))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(any_tokenizer, text):
    """Guards against a lossy encoder: decode(encode(text)) is the text, and every id is inside the vocabulary."""
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.decode_bytes(ids) == text.encode()
    assert all(type(i) is int and 0 <= i < any_tokenizer.vocab_size for i in ids)


def test_text_is_never_special(any_tokenizer):
    """Guards against user text ending a document: "<|endoftext|>" typed by a user must not become the end-of-text id."""
    ids = any_tokenizer.encode("e <|endoftext|> e")
    assert any_tokenizer.eos is None or any_tokenizer.eos not in ids
    assert len(ids) > 3


@pytest.mark.parametrize("name", ["tiny", "gpt2"])
def test_array_path_agrees_with_tiktoken(name, request):
    """Guards against ids that differ from those of every other user of the encoding (array path against list path)."""
    own = request.getfixturevalue(name)
    for text in TEXTS:
        assert own.encode(text) == own.encoding.encode_ordinary(text)


def test_gpt2_known_values(gpt2):
    """Guards against a wrong vocabulary behind the right name."""
    assert gpt2.encode("hello world") == [31373, 995]
    assert (gpt2.vocab_size, gpt2.eos) == (50257, 50256)


def test_byte_and_char_agree_with_plain_python():
    """Guards against mistakes in the vectorised lookup (order, byte order, duplicates)."""
    text = "".join(TEXTS)
    char = tokenizer.get("char", chars=text + text)
    table = {c: i for i, c in enumerate(sorted(set(text)))}
    assert char.encode(text) == [table[c] for c in text]
    byte = tokenizer.get("byte")
    assert (char.vocab_size, byte.vocab_size) == (len(table), 256)
    assert byte.encode(text) == list(text.encode())
    assert byte.decode_bytes(list(range(256))) == bytes(range(256)) and byte.decode_bytes([byte.eos]) == b"\0"


@pytest.mark.parametrize("unknown", ["\x01", "z", "\U0010ffff"])
def test_unknown_character_is_named(unknown):
    """Guards against a KeyError, or a silent wrong id, for a character outside the vocabulary (below, inside, above it), the first."""
    char = tokenizer.CharTokenizer("abcy{")
    with pytest.raises(ValueError, match="at position 3 is not in the vocabulary, which has the 5 characters") as error:
        char.encode("abc" + unknown + "a!")
    assert repr(unknown) in str(error.value)


def test_saved_tokenizer_is_complete(any_tokenizer, tmp_path):
    """Guards against a tokenizer.json that only names its encoding: loading must work without network and without cache."""
    tokenizer.save(any_tokenizer, tmp_path)
    texts = [text for text in TEXTS if text] + ["".join(TEXTS)]
    program = f"""
import json, socket, sys
def refuse(*args, **kwargs): raise SystemExit("the network was used")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
sys.path.insert(0, {str(ROOT)!r})
import tokenizer
t = tokenizer.load({str(tmp_path)!r})
same = t.state() == json.load(open({str(tmp_path / "tokenizer.json")!r}))
print(json.dumps([t.name, t.vocab_size, t.eos, [t.encode(x) for x in {texts!r}], same]))
"""
    empty = tmp_path / "empty"
    environment = {"TIKTOKEN_CACHE_DIR": str(empty), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    expected = [any_tokenizer.name, any_tokenizer.vocab_size, any_tokenizer.eos, [any_tokenizer.encode(x) for x in texts], True]
    assert json.loads(run.stdout) == expected
    assert not empty.exists()


def test_load_errors(tmp_path):
    """Guards against tracebacks for a missing or damaged tokenizer.json."""
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        tokenizer.load(tmp_path)
    bpe = b'{"name": "x", "pattern": "a", "special_tokens": {}, "ranks": %s}'
    char = b'{"name": "char", "chars": ""}'
    for damaged in (b'{"name": "by', b"{}", b"[1]", b'{"name": "caf\xe9"}', char, bpe % b"[]", bpe % b"{}", bpe % b'{"not base64": 0}'):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="tokenizer.json is damaged"):
            tokenizer.load(tmp_path)


def test_a_tokenizer_that_is_not_installed_is_no_damage(tiny, tmp_path, monkeypatch):
    """Guards advice to copy a file again that is fine."""
    tokenizer.save(tiny, tmp_path)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match="^a byte-pair tokenizer needs tiktoken"):
        tokenizer.load(tmp_path)


def test_unknown_name_lists_the_known_ones():
    """Guards against a bare KeyError for a typing mistake."""
    pytest.importorskip("tiktoken")
    with pytest.raises(ValueError, match="unknown tokenizer 'gtp2'; known: byte, char, .*gpt2"):
        tokenizer.get("gtp2")
    with pytest.raises(ValueError, match="needs the characters"):
        tokenizer.get("char")


def test_failed_download_says_what_to_put_where(tmp_path, monkeypatch):
    """Guards against tiktoken's page-long connection error; the two names are the sha1 of the addresses it downloads."""
    registry = pytest.importorskip("tiktoken.registry")
    monkeypatch.setattr(registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # the discard port: refuses at once
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(FileNotFoundError) as error:
        tokenizer.get("gpt2")
    message = str(error.value)
    assert "\n" not in message
    assert "TIKTOKEN_CACHE_DIR" in message
    for file in ("vocab.bpe", "encoder.json"):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}"
        assert f"{hashlib.sha1(address.encode()).hexdigest()} ({file})" in message


def test_ids_without_text_decode_to_a_replacement(any_tokenizer):
    """Guards against a crash while sampling from a model whose vocabulary is padded beyond the tokenizer's; -1 is no last id."""
    ids = any_tokenizer.encode("e")
    for beyond in (any_tokenizer.vocab_size, any_tokenizer.vocab_size + 47, -1):
        assert any_tokenizer.decode([*ids, beyond, *ids]) == "e\ufffde"


def test_unused_id_inside_the_vocabulary(tiny):
    """Guards against the same crash for the gaps that some encodings have below their end-of-text id."""
    assert (tiny.vocab_size, tiny.eos) == (264, 262)
    assert tiny.decode([256, 260, 257]) == "he\ufffdll"
    assert tiny.decode([262]) == "<|endoftext|>"


def test_lone_surrogate_does_not_crash(any_tokenizer):
    """Guards against UnicodeEncodeError for half a character, which a command line or JSON can contain."""
    if any_tokenizer.name == "char":
        with pytest.raises(ValueError, match="not in the vocabulary"):
            any_tokenizer.encode("e\ud800")
    else:
        assert any_tokenizer.decode(any_tokenizer.encode("e\ud800")) == "e?"
