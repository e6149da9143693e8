// The torch library that operators are registered in. The emulation build (../emulator) compiles schemas and CUDA
// fronts a second time: under another name, and for CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#ifdef PYOPS_EMU
#define PYOPS_LIBRARY pyops_emulated
#define PYOPS_CUDA_KEY CPU
#else
#define PYOPS_LIBRARY pyops
#define PYOPS_CUDA_KEY CUDA
#endif
