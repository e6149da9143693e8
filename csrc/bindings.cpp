// pybind11 module _native: build facts, the CPU level in use, test hooks, and probes of the processor for benchmarks.
// Tensors never pass through it: a pybind11 function cannot be traced, faked or exported. The only
// Python-version-specific file.
//
// It links nothing of _ops.so: the level functions are looked up in the loaded library by _lib.py's handle.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>

#include "probes.h"

namespace py = pybind11;

namespace {

// Entry points of _ops.so that are not operators; exported there with C linkage.
struct OpsLibrary {
  const char* (*detected_isa)();
  const char* (*current_isa)(char* error, int capacity);
  int (*force_isa)(const char* level);
  void (*in_parallel)(int64_t parts, void (*work)(int64_t part, void* context), void* context);
};

OpsLibrary library{};

template <class Function>
void resolve(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (function == nullptr) throw std::runtime_error(std::string("pyops: _ops.so lacks ") + name);
}

void attach(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) throw std::runtime_error("pyops: load " + path + " before attaching to it");
  resolve(handle, "pyops_detected_isa", library.detected_isa);
  resolve(handle, "pyops_current_isa", library.current_isa);
  resolve(handle, "pyops_force_isa", library.force_isa);
  resolve(handle, "pyops_in_parallel", library.in_parallel);
}

std::string current_isa() {
  char error[256] = "";
  const char* name = library.current_isa(error, sizeof(error));
  if (name == nullptr) throw std::runtime_error(error);
  return name;
}

void force_isa(const py::object& level) {
  const std::string name = level.is_none() ? "" : level.cast<std::string>();
  if (library.force_isa(name.c_str()) != 0) throw py::value_error("unknown ISA level '" + name + "'");
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = PYOPS_COMPILER;
  info["cuda_archs"] = PYOPS_CUDA_ARCHS;
  info["sanitize"] = PYOPS_SANITIZE;
  return info;
}

// The probes of the level in use. Other Python threads run meanwhile.
double dot_rate(double milliseconds) {
  const pyops::probes::Dots dots = pyops::probes::dots_of(current_isa());
  const py::gil_scoped_release released;
  return pyops::probes::dot_rate(dots, milliseconds);
}

// work(part) for each part, by torch's threads.
template <class Work>
void in_parallel(int64_t parts, Work work) {
  library.in_parallel(parts, [](int64_t part, void* context) { (*static_cast<Work*>(context))(part); }, &work);
}

int64_t dot_products(int64_t macs, int64_t threads) {
  const pyops::probes::Dots dots = pyops::probes::dots_of(current_isa());
  const py::gil_scoped_release released;
  std::atomic<int64_t> done{0};
  in_parallel(threads, [&](int64_t) { done += pyops::probes::dot_products(dots, macs / threads); });
  return done;
}

void read_memory(const std::vector<std::pair<uintptr_t, int64_t>>& pieces, int64_t threads) {
  const py::gil_scoped_release released;
  in_parallel(threads, [&](int64_t part) {
    for (const auto& [address, bytes] : pieces) {
      const int64_t share = bytes / threads;
      pyops::probes::read_rate(reinterpret_cast<const void*>(address + uintptr_t(part * share)), share);
    }
  });
}

double read_rate(uintptr_t address, int64_t bytes) {
  const py::gil_scoped_release released;
  return pyops::probes::read_rate(reinterpret_cast<const void*>(address), bytes);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Build facts and test hooks of pyops.";
  module.def("attach", &attach, "Resolve the hooks of a loaded _ops.so.");
  module.def("detected_isa", [] { return std::string(library.detected_isa()); }, "Best level of this processor.");
  module.def("current_isa", &current_isa, "Level in use: detected, capped by PYOPS_CPU_ISA and force_isa.");
  module.def("force_isa", &force_isa, py::arg("level").none(true), "Cap the level until the next call; None lifts it.");
  module.def("build_info", &build_info, "Compiler, CUDA targets and sanitizers of this build.");
  module.def(
      "dot_rate", &dot_rate, py::arg("milliseconds"),
      "Multiply-adds per second of one thread by the best 8-bit dot product of the level in use, from registers.");
  module.def("dot_products", &dot_products, py::arg("macs"), py::arg("threads") = 1,
             "Takes at least so many of them, shared out to threads of torch; returns how many.");
  module.def("read_memory", &read_memory, py::arg("pieces"), py::arg("threads") = 1,
             "Reads pieces of memory (address, bytes) in turn, each shared out to threads of torch.");
  module.def("read_rate", &read_rate, py::arg("address"), py::arg("bytes"),
             "Reads memory once; bytes per second of one thread.");
}
