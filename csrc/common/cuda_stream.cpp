#include "cuda_stream.h"

#include <dlfcn.h>

// Of the CUDA runtime, which is linked statically; declared here so that no CUDA header is needed.
extern "C" const char* cudaGetErrorString(int error);

namespace pyops {
namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// At our torch target the stream is only to be had from libtorch_cuda, which a CPU build of torch lacks: linking
// against it would tie this library to CUDA builds. It is loaded by the time a CUDA tensor exists.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return nullptr;
  return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

void* current_stream(int32_t device) {
  static const CurrentStream find = find_current_stream();
  void* stream = nullptr;
  if (!find || find(device, &stream) != 0) {
    throw std::runtime_error("pyops: torch has no current CUDA stream for device " + std::to_string(device));
  }
  return stream;
}

}  // namespace

CudaScope::CudaScope(const Tensor& tensor)
    : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

void check_launch(const char* op, int error) {
  if (error) [[unlikely]] {
    throw std::runtime_error(std::string("pyops::") + op + ": the CUDA launch failed: " + cudaGetErrorString(error));
  }
}

}  // namespace pyops
