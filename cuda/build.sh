#!/bin/sh
# Compiles the kernels for every architecture: the only step that needs a CUDA compiler. What it leaves in cuda/compiled is part
# of the repository, and a test fails while it is older than the sources.
#
#   sh cuda/build.sh              all files
#   sh cuda/build.sh matmul ..    some of them
#
# The compiler is $NVCC, or nvcc in the PATH, or that of the packages
#   pip install nvidia-cuda-nvcc==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*
# in a virtual environment: NVCC=VENV/lib/python3.11/site-packages/nvidia/cu13/bin/nvcc
set -eu
cd "$(dirname "$0")"
nvcc=${NVCC:-nvcc}
out=${OUT:-compiled}
mkdir -p "$out"

# The general kernels use nothing that sm_80 lacks: one pass of the compiler's front end serves them all.
general="-gencode arch=compute_80,code=[sm_80,sm_86,sm_89,sm_90,sm_100,sm_120,compute_80]"
# HOPPER_ALL=1: also the kernels for Hopper that the backend does not choose.
hopper="-gencode arch=compute_90a,code=sm_90a ${HOPPER_ALL:+-DHOPPER_ALL}"

# Compiles file $1 to family $2 for the architectures in the rest; what ptxas says of each kernel goes into a table.
compile() {
    source=$1 family=$2
    shift 2
    "$nvcc" -std=c++17 -O3 -fatbin --threads 2 --compress-mode=size -Xptxas -v "$@" -o "$out/$family.fatbin" "$source" 2>"$out/$family.log" || {
        cat "$out/$family.log" >&2
        exit 1
    }
    # kernel, architecture, registers, bytes of stack, bytes of spills (stores + loads)
    awk '/Compiling entry function/ { split($0, part, "\047"); name = part[2]; arch = part[4] }
        /bytes stack frame/ { stack = $1; spills = $5 + $9 }
        /Used [0-9]+ registers/ { for (i = 1; i < NF; i++) if ($i == "Used") used = $(i + 1); print name, arch, used, stack, spills }' \
        "$out/$family.log" | sort >"$out/$family.txt"
    rm "$out/$family.log"
}

if [ $# -gt 0 ]; then families=$*; else families=$(ls *.cu | sed 's/\.cu$//'; echo hopper hopper_grad hopper_matmul | tr ' ' '\n'); fi
for family in $families; do
    echo "cuda/$family"
    if [ "$family" = hopper ]; then
        compile hopper/forward.cu hopper $hopper
    elif [ "$family" = hopper_grad ]; then
        compile hopper/backward.cu hopper_grad $hopper
    elif [ "$family" = hopper_matmul ]; then
        compile hopper/matmul.cu hopper_matmul $hopper
    else
        compile "$family.cu" "$family" $general
    fi
done
# Sources that the compiled files were made from: POSIX checksum, bytes, name.
cksum *.cu *.cuh hopper/*.cu hopper/*.cuh >"$out/sources"
