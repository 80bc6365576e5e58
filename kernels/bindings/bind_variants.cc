// Addresses of the variant functions that the core carries.
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "bindings/bind.h"
#include "cpu/shipped_variants.h"

namespace py = pybind11;

namespace fi {

void bind_variants(py::module_& m) {
  m.def(
      "find_variant_function",
      [](const std::string& key) -> std::optional<std::pair<uintptr_t, uintptr_t>> {
        const cpu::ShippedFunction* function = cpu::find_shipped(key);
        if (!function) return std::nullopt;
        return std::pair(reinterpret_cast<uintptr_t>(function->run),
                         reinterpret_cast<uintptr_t>(function->mask_kind));
      },
      py::arg("key"),
      "Addresses (loop, mask kind) of the shipped function with this content key, or None.");
}

}  // namespace fi
