"""Parameter counts and bytes from abstract shapes, against the published totals (spec A.4, D.1)."""

import pytest

from v4jax.checkpoint import census, read_abstract, total
from v4jax.config import get_numerics
from v4jax.config.loading import load_model_config
from v4jax.model import abstract_transformer

from . import folders


def totals_of(name, storage="released"):
    """Returns the totals of a packaged configuration."""
    model = abstract_transformer(load_model_config(name), get_numerics("released"), storage=storage)
    return total(census(model))


# name: parameters, without drafts, stored elements, bytes of the tensors on disk, tensors
PUBLISHED = {
    "v4_flash": (
        *(290_942_289_362, 284_332_240_471, 158_069_433_298),
        *(159_609_485_896, 69_187),
    ),
    "v4_pro": (
        *(1_598_837_347_742, 1_572_997_201_763, 861_608_274_846),
        *(864_704_792_696, 145_116),
    ),
}

# name: tensors and bytes of the whole and of the draft module, the module's parameters
PUBLISHED_DRAFTS = {
    "v4_flash_0731": (72_317, 166_878_536_440, 4_705, 10_862_838_300, 19_845_850_983),
    "v4_pro_0813": (149_782, 892_727_580_904, 7_009, 41_979_375_900, 77_498_408_103),
}


@pytest.mark.parametrize("name", PUBLISHED_DRAFTS)
def test_published_draft_modules(name):
    model = abstract_transformer(load_model_config(name), get_numerics("released"))
    entries = census(model)
    whole, module = total(entries), total([entry for entry in entries if entry.drafts])
    assert PUBLISHED_DRAFTS[name] == (
        *(whole.tensors, whole.file_bytes),
        *(module.tensors, module.file_bytes, module.parameters),
    )
    preview = totals_of(name.rsplit("_", 1)[0])
    assert whole.parameters_without_drafts == preview.parameters_without_drafts


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    totals = totals_of(name)
    assert PUBLISHED[name] == (
        totals.parameters,
        totals.parameters_without_drafts,
        totals.stored_elements,
        totals.file_bytes,
        totals.tensors,
    )


# Bytes by dtype in the files of Flash and Pro; scales belong to their FP8 or FP4 parameter here.
CENSUS = {
    "v4_flash": dict(
        bfloat16=2_830_518_528,
        float32=144_672_072,
        quantized=6_023_020_544 + 8_858_737_664 + 141_733_920_768,
        tables=18_616_320,
    ),
    "v4_pro": dict(
        bfloat16=5_633_798_656,
        float32=351_105_656,
        quantized=23_169_335_296 + 49_150_268_416 + 786_381_668_352,
        tables=18_616_320,
    ),
}


@pytest.mark.parametrize("name", CENSUS)
def test_bytes_by_dtype(name):
    by_format = totals_of(name).memory_bytes_by_format
    assert CENSUS[name] == dict(
        bfloat16=by_format["bfloat16"],
        float32=by_format["float32"],
        quantized=by_format["fp8"] + by_format["fp4"],
        tables=2 * by_format["int32"],  # int64 in the files
    )


def test_base_has_no_fp4_and_as_many_parameters():
    base, flash = totals_of("v4_flash_base"), totals_of("v4_flash")
    assert "fp4" not in base.memory_bytes_by_format
    assert base.parameters == flash.parameters and base.tensors == flash.tensors


@pytest.mark.parametrize("name, millions", [("nano", (2, 10)), ("tiny", (0.5, 1))])
def test_small_models_are_small(name, millions):
    low, high = millions
    assert low * 1e6 <= totals_of(name).parameters <= high * 1e6


def test_plain_storage_counts_the_same_parameters():
    for storage, itemsize in (("float32", 4), ("bfloat16", 2)):
        totals = totals_of("tiny", storage)
        assert totals.parameters == totals_of("tiny").parameters
        assert totals.memory_bytes >= itemsize * totals.parameters


@pytest.mark.parametrize("kind", ["released", "base", "bfloat16"])
def test_folders_count_their_files(tmp_path, kind):
    tensors = folders.tensors_of(kind=kind)
    totals = total(census(read_abstract(folders.write(tmp_path, tensors))))
    assert totals.file_bytes == sum(array.nbytes for array in tensors.values())
    assert totals.stored_elements == sum(array.size for array in tensors.values())
    assert totals.tensors == len(tensors)


def test_entries_have_axes_for_every_dimension():
    config = load_model_config("tiny")
    for entry in census(abstract_transformer(config, get_numerics("released"))):
        assert len(entry.axes) == len(entry.shape), entry
        assert ("layers" in entry.axes) == entry.path.startswith("stack.period"), entry
