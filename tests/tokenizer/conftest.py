import pytest

from v4jax.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def v4():
    return load_tokenizer("v4")


@pytest.fixture(params=["v4", "byte"])
def tokenizer(request):
    return request.getfixturevalue("v4") if request.param == "v4" else load_tokenizer("byte")
