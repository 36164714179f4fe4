#!/bin/sh
# Runs the whole test suite. GPU kernels are tested on a software Vulkan driver (lavapipe, of Mesa): where there is none, this
# installs it if it may, and otherwise says what to install and goes on without.
#
#   sh tests/run.sh [arguments of cargo test]
#
# GATEDELTA_REQUIRE=lavapipe   a missing driver fails the run instead of skipping its tests; with the feature cuda also `emulator`
#                              (needs g++) and `nvcc` (needs the CUDA compiler), with commas; `xvfb` is a virtual display for the
#                              window; `openai` is the official OpenAI client, which the server's tests install with pip
# GATEDELTA_NO_INSTALL=1       never installs anything
set -eu
cd "$(dirname "$0")/.."

have_lavapipe() {
    for dir in /usr/share/vulkan/icd.d /etc/vulkan/icd.d /usr/local/share/vulkan/icd.d; do
        for file in "$dir"/lvp_icd*.json; do
            [ -e "$file" ] && ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' && return 0
        done
    done
    return 1
}

if [ "$(uname -s)" = Linux ] && ! have_lavapipe; then
    as_root=
    if [ "$(id -u)" != 0 ]; then
        as_root="sudo -n"
        sudo -n true 2>/dev/null || as_root=no
    fi
    if [ -z "${GATEDELTA_NO_INSTALL:-}" ] && [ "$as_root" != no ] && command -v apt-get >/dev/null; then
        echo "No software Vulkan driver found: installing mesa-vulkan-drivers and libvulkan1."
        $as_root apt-get update -qq
        DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends \
            mesa-vulkan-drivers libvulkan1 >/dev/null
    else
        echo "No software Vulkan driver found. To test the GPU kernels, install one:"
        echo "  Debian, Ubuntu:  sudo apt-get install mesa-vulkan-drivers libvulkan1"
        echo "  Fedora:          sudo dnf install mesa-vulkan-drivers vulkan-loader"
        echo "  Arch:            sudo pacman -S vulkan-swrast vulkan-icd-loader"
    fi
fi

exec cargo test --workspace "$@"
