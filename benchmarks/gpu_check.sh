#!/usr/bin/env bash
# The GPU check (gpu_check.py) on a machine that has torch with CUDA, but neither this project's environment nor a network.
#
#   bash benchmarks/gpu_check.sh prepare         on a machine with the environment, no GPU: fills .gpu/ and .whl/ (minutes)
#   bash benchmarks/gpu_check.sh run [OPTION …]  on the GPU machine, in a copy of the checkout with both folders
#
# .whl/ gets the wheels that such a machine lacks, in the versions installed here; .gpu/ gets torch 2.13's chunked loss and the
# traced peaks. Options are those of gpu_check.py. Variables: PYTHON and CUDA of the GPU machine (3.12 and 13.0) when preparing,
# OUT (results/gpu), the folder of the results, when running.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

prepare() {
  mkdir -p .gpu
  rm -rf .whl
  python - <<'PYTHON'
import shutil
from importlib.util import find_spec
from pathlib import Path

modules = Path(find_spec("torch").origin).parent / "nn/modules"
for name in ("linear_cross_entropy.py", "linear_cross_entropy_options.py"):
    shutil.copy(modules / name, Path(".gpu") / name)
PYTHON
  local package version platforms=()
  for tag in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_x86_64"); done
  for package in transformers tokenizers huggingface_hub httpx2 httpcore2 truststore peft bitsandbytes orjson backports.zstd \
    xxhash pydantic pydantic_core annotated_types typing_inspection typing_extensions; do
    version=$(python -c "from importlib.metadata import version; print(version('$package'))")
    python -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON:-3.12}" --implementation cp \
      "${platforms[@]}" --dest .whl "$package==$version"
  done
  leave_one_cuda_library "${CUDA:-13.0}"
  python benchmarks/gpu_check.py --trace
  du -sh .gpu .whl
}

# Of bitsandbytes' libraries only the one for the machine's CUDA is needed: 4 MB of 43.
leave_one_cuda_library() {
  python - "cuda${1/./}" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(".whl").glob("bitsandbytes-*.whl")
smaller = wheel.with_suffix(".smaller")
with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
    for item in old.infolist():
        if not item.filename.endswith(".so") or item.filename.endswith((f"_{sys.argv[1]}.so", "_cpu.so")):
            new.writestr(item, old.read(item))
    if not any(name.endswith(f"_{sys.argv[1]}.so") for name in new.namelist()):
        sys.exit(f"{wheel.name} has no library for {sys.argv[1]}")
smaller.rename(wheel)
PYTHON
}

run() {
  local begun=$SECONDS out=${OUT:-results/gpu} site
  site=$(mktemp -d)
  trap "rm -rf '$site'" EXIT
  mkdir -p "$out"
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
  export PYTHONPATH="$site:$PYTHONPATH" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
  python3 benchmarks/gpu_check.py --deadline $((540 - SECONDS + begun)) --output "$out/results.jsonl" "$@" 2>"$out/log.txt" |
    tee "$out/summary.md"
}

case "${1:-}" in
  prepare) prepare ;;
  run) run "${@:2}" ;;
  *) sed -n '2,5s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
