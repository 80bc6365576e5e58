// Variant functions that are part of the core, found by the hash of their printed text.
#pragma once

#include <string_view>

#include "fi/attention/variant_hooks.h"

namespace fi::cpu {

struct ShippedFunction {
  const char* key;                          // SHA-256 of kind and text, hexadecimal
  void (*run)(const VariantTile&, float*);  // its LogitsFn, MaskFn or OutputFn
  MaskKindFn mask_kind;                     // null unless it is a mask
};

// Null when no shipped function has this key.
const ShippedFunction* find_shipped(std::string_view key);

}  // namespace fi::cpu
