// ../common/cuda_stream.cpp for the emulated device.
#include "../common/cuda_stream.h"

extern "C" size_t pyops_emulator_reports(char* text, size_t capacity, bool clear);

namespace pyops {

CudaScope::CudaScope(const Tensor&) : stream_(nullptr) {}

void check_launch(const char* op, int error) {
  if (error == 0) return;
  if (error == 710) throw std::runtime_error(std::string("pyops::") + op + ": device-side assert triggered");
  std::string reports(pyops_emulator_reports(nullptr, 0, false), '\0');
  pyops_emulator_reports(reports.data(), reports.size(), true);
  throw std::runtime_error(std::string("pyops::") + op + ": the emulator reports\n" + reports.c_str());
}

}  // namespace pyops
