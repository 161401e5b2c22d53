import pytest

from v4jax.errors import RequestError
from v4jax.tokenizer import BYTE_VOCAB_SIZE, ByteTokenizer, encode_messages

IDS = {
    "<｜begin▁of▁sentence｜>": 256,
    "<｜end▁of▁sentence｜>": 257,
    "<｜▁pad▁｜>": 258,
    "<｜User｜>": 259,
    "<｜Assistant｜>": 260,
    "<think>": 261,
    "</think>": 262,
    "｜DSML｜": 263,
    "<｜latest_reminder｜>": 264,
    "<｜action｜>": 265,
    "<｜query｜>": 266,
    "<｜authority｜>": 267,
    "<｜domain｜>": 268,
    "<｜title｜>": 269,
    "<｜read_url｜>": 270,
    "<｜extracted_url｜>": 271,
    "<｜fim▁hole｜>": 272,
    "<｜fim▁begin｜>": 273,
    "<｜fim▁end｜>": 274,
}
TEXTS = [
    "",
    "hi",
    "a\r\n\0b",
    "naïve 你好 🙂",
    "<think>x</think>",
    "<｜User｜｜DSML｜><｜reserved▁275｜>",
]


@pytest.fixture
def byte():
    return ByteTokenizer()


@pytest.mark.parametrize("literal, token", IDS.items())
def test_ids_never_change(byte, literal, token):
    assert byte.encode(literal) == [token]
    assert byte.decode([token]) == literal


def test_sizes(byte):
    assert (byte.vocab_size, byte.bos_id, byte.eos_id, byte.pad_id) == (320, 256, 257, 258)
    assert BYTE_VOCAB_SIZE == 320
    assert max(byte.controls.values()) == 319


@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(byte, text, specials):
    assert byte.decode(byte.encode(text, specials=specials)) == text


def test_bytes_come_back(byte):
    data = bytes(range(256)) * 2
    assert byte.encode_bytes(data) == list(data)
    assert byte.decode_bytes(byte.encode_bytes(data)) == data


def test_every_row_decodes(byte):
    assert all(byte.token_bytes(token) for token in range(320))


def test_prompt(byte):
    prompt = encode_messages([{"role": "user", "content": "hi"}])
    assert byte.encode(prompt) == [256, 259, 104, 105, 260, 262]


def test_decode_leaves_control_tokens_out(byte):
    assert byte.decode([256, 104, 105, 257], specials=False) == "hi"


@pytest.mark.parametrize("token", [-1, 320])
def test_id_outside(byte, token):
    with pytest.raises(RequestError) as error:
        byte.decode([token])
    assert str(error.value) == (
        f"token id must be between 0 and 319, got {token}; was it produced with another tokenizer?"
    )
