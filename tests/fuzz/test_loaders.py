"""The fuzzing of loaders without atheris: each seed loads, and changes of it load or raise a typed error."""

import random

import pytest

from tests.fuzz import loaders

SEEDS = loaders.seeds()
CHANGES = 60
PIECES = (b"[" * 2000, b'{"a":', b"null", b"-1", b"1e999", b"NaN", b"\xff\xfe", b'"', b"9" * 5000, b"\x00", b"../..")


def changed(seed: bytes, draw: random.Random) -> bytes:
    """A byte flipped, a piece put in, cut out or doubled; behind the byte that chooses the loader."""
    data = bytearray(seed)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(1, len(data)) if len(data) > 1 else 1
        length = draw.randint(1, 40)
        match draw.randrange(4):
            case 0:
                data[at:at] = draw.choice(PIECES)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("name", loaders.NAMES)
def test_changed_files_load_or_raise_a_typed_error(name: str) -> None:
    seed = SEEDS[name]
    assert loaders.one_input(seed) == "loaded"
    draw = random.Random(name)
    found = {loaders.one_input(changed(seed, draw)) for _ in range(CHANGES)}
    assert any(outcome.endswith("Error") for outcome in found)
