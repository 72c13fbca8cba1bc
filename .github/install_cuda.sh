#!/usr/bin/env bash
# Installs nvcc, the static runtime and CUB into a manylinux_2_28 container (AlmaLinux 8), for CUDA_VERSION such as 13.0.
# Nothing for the CPU variant.
set -euo pipefail
if [ "${SPEECHLM_CUDA:-OFF}" = OFF ]; then exit 0; fi
name=${CUDA_VERSION//./-}
dnf -y install dnf-plugins-core
dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
dnf -y install "cuda-nvcc-$name" "cuda-cudart-devel-$name" "cuda-cccl-$name"
ln -sfn "/usr/local/cuda-$CUDA_VERSION" /usr/local/cuda
/usr/local/cuda/bin/nvcc --version
