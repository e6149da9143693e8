// Memory of a thread that is kept from call to call: fresh pages would cost a step of a small layer more than some of
// its matrix products. One block per purpose and thread, grown when needed, given back when it was unusually large.
#pragma once

#include <stdint.h>

namespace pyops {

class Workspace {
 public:
  // Users that are inside one another have different purposes.
  enum Purpose : int { kProduct = 0, kPanels, kStep, kPurposes };

  explicit Workspace(Purpose purpose) : purpose_(purpose) {}
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // `count` numbers, aligned to a cache line, not initialised; once per workspace.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * int64_t(sizeof(T))));
  }

 private:
  void* bytes(int64_t count);
  Purpose purpose_;
};

}  // namespace pyops
