"""What the compilers were told, and what came out."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def build_folder(editable, tree) -> Path:
    return tree / "build" / "native" / str(sys.implementation.cache_tag)


def output_of(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def test_code_is_the_same_on_every_machine(build_folder):
    commands = (build_folder / "build.ninja").read_text()
    assert "-ffp-contract=off" in commands
    assert not re.search(r"-march=|-mtune=|-ffast-math|-Ofast|use_fast_math", commands)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there is one instruction set only")
def test_the_linker_cannot_mix_instruction_sets(build_folder):
    """A function of the AVX2 objects that the baseline could link to would crash older processors."""
    objects = sorted(build_folder.glob("csrc/cpu/*.avx2.o"))
    assert objects
    for file in objects:
        for line in output_of("nm", "--demangle", "--defined-only", "--extern-only", file).splitlines():
            assert re.search(r"\brmtkernels::avx2::", line), f"{file.name}: {line}"


def test_libraries_need_torch_and_know_no_path(editable, tree):
    libraries = sorted((tree / "rmtkernels").glob("_C*.so"))
    assert tree / "rmtkernels" / "_C.abi3.so" in libraries
    for library in libraries:
        dynamic = output_of("readelf", "--dynamic", "--wide", library)
        assert "libtorch.so" in dynamic
        assert "PATH" not in dynamic
        assert "libcudart" not in dynamic
        assert str(tree).encode() not in library.read_bytes()


def test_a_static_cxx_library_stays_inside(build_folder, tmp_path):
    """Exported, half of its symbols would resolve to torch's copy; an error message with a number then crashes."""
    flag = "-Wl,--exclude-libs,libstdc++.a"
    build = (build_folder / "build.ninja").read_text().replace("$\n", "")
    links = re.findall(r"^build \S+: link .*\n +flags = (.*)", build, re.MULTILINE)
    assert links and all(flag in line for line in links)

    def exported(*flags: str) -> list[str]:
        library = tmp_path / "probe.so"
        objects = build_folder / "csrc" / "cpu" / "sliding_window.cpp.o"
        output_of("g++", "-shared", "-static-libstdc++", "-o", library, objects, *flags)
        names = output_of("nm", "--dynamic", "--defined-only", "--format=just-symbols", library).split()
        return [name for name in names if name.startswith("_ZNSt6locale")]  # compiled into the library alone

    assert len(exported()) > 10, "the check finds nothing"
    assert len(exported(flag)) == 0
