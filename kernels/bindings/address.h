// How pointers cross to Python: as integers. Whoever passes them keeps the tensors alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fi {

// A pointer member as an integer attribute.
template <class Class, class Owner, class T>
void def_pointer(Class& cls, const char* name, T* Owner::* member) {
  using Self = typename Class::type;
  cls.def_property(
      name, [member](const Self& self) { return reinterpret_cast<intptr_t>(self.*member); },
      [member](Self& self, intptr_t address) { self.*member = reinterpret_cast<T*>(address); });
}

}  // namespace fi
