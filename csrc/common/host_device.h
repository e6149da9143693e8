// Marks a function that CUDA kernels call too; nothing for a host compiler.
#pragma once

#ifdef __CUDACC__
#define PYOPS_HOST_DEVICE __host__ __device__
#else
#define PYOPS_HOST_DEVICE
#endif
