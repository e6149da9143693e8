// The one way to reject an argument: PYOPS_CHECK(condition, op, argument, rule, got...).
//
// Raises "pyops::<op>: <argument> must <rule>, got <got>" as RuntimeError; PYOPS_CHECK_INDEX raises IndexError.
// The fake of the op (pyops/<family>/<op>.py) repeats every check with the same words. STD_TORCH_CHECK is not
// used: it puts the function and the build path in front of the message.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pyops {

template <class Error, class... Got>
[[noreturn]] void reject(const char* op, const char* argument, const std::string& rule, const Got&... got) {
  std::ostringstream text;
  text << "pyops::" << op << ": " << argument << " must " << rule << ", got ";
  (text << ... << got);
  throw Error(text.str());
}

}  // namespace pyops

#define PYOPS_CHECK(condition, op, argument, rule, ...)                     \
  do {                                                                      \
    if (!(condition)) [[unlikely]]                                          \
      ::pyops::reject<std::runtime_error>(op, argument, rule, __VA_ARGS__); \
  } while (false)

#define PYOPS_CHECK_INDEX(condition, op, argument, rule, ...)              \
  do {                                                                     \
    if (!(condition)) [[unlikely]]                                         \
      ::pyops::reject<std::out_of_range>(op, argument, rule, __VA_ARGS__); \
  } while (false)
