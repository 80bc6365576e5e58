// A page table, read in place: dense rows (vLLM), rows behind an index (SGLang) or CSR.
// Entries past ceil(kv_len / page_size) of a row are stale and are never dereferenced.
#pragma once

#include "fi/core/types.h"

namespace fi {

struct PageTableView {
  const int32_t* entries;      // dense / indirect: row r starts at entries + row * row_stride
  const int32_t* indptr;       // CSR: row r is entries[indptr[r], indptr[r + 1]); else null
  const void* row_index;       // indirect: row of the table for request r; else null
  const int32_t* page_map;     // optional: page id -> page id of another pool; else null
  int64_t row_stride;          // elements
  int64_t entry_stride;        // elements between entries of consecutive pages (SGLang: page_size)
  int32_t page_size;           // tokens of a page
  int32_t slot_divisor;        // entries hold page ids times this (SGLang: page_size; else 1)
  int32_t row_index_is_int64;  //
  int32_t num_rows;
};

FI_HOST_DEVICE inline const int32_t* page_row(const PageTableView& table, int32_t row) {
  if (table.indptr) return table.entries + table.indptr[row];
  int64_t r = row;
  if (table.row_index) {
    r = table.row_index_is_int64 ? static_cast<const int64_t*>(table.row_index)[row]
                                 : static_cast<const int32_t*>(table.row_index)[row];
  }
  return table.entries + r * table.row_stride;
}

// Page id of logical page `index` of a row that page_row() returned.
FI_HOST_DEVICE inline int32_t page_id(const PageTableView& table, const int32_t* row,
                                      int32_t index) {
  int32_t id = row[index * table.entry_stride];
  if (table.slot_divisor != 1) id /= table.slot_divisor;
  return table.page_map ? table.page_map[id] : id;
}

}  // namespace fi
