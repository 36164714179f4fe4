#!/bin/sh
# Compiles the kernels of `cuda/` and the stand-in for the driver into one library that programs take for the CUDA driver.
#
#   sh tests/cuda/emulator/build.sh DIRECTORY        leaves DIRECTORY/libcuda.so
#   LD_LIBRARY_PATH=DIRECTORY gatedelta-headless check --device cuda
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cuda=$here/../../../cuda
out=$1
mkdir -p "$out"
flags="-std=c++17 -O2 -g1 -fPIC -w -fno-strict-aliasing -fvisibility=default -DGATEDELTA_EMULATOR -I$here -I$cuda"
objects=
for source in "$here"/*.cpp "$cuda"/*.cu "$cuda"/hopper/*.cu; do
    object=$out/$(basename "$(dirname "$source")")-$(basename "$source").o
    objects="$objects $object"
    # Objects are kept for as long as nothing they are made from is newer.
    if [ -e "$object" ] && [ -z "$(find "$source" "$here" "$cuda" "$cuda/hopper" -maxdepth 1 \( -name '*.h' -o -name '*.cuh' -o -path "$source" \) -newer "$object")" ]; then
        continue
    fi
    ${CXX:-g++} $flags -x c++ -c "$source" -o "$object"
done
${CXX:-g++} -shared -Wl,-soname,libcuda.so -o "$out/libcuda.so.new" $objects -ldl -lpthread
mv "$out/libcuda.so.new" "$out/libcuda.so"
