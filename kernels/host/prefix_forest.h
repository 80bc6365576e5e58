// Finds what requests share in their page tables. The device does the same (common/forest.h) and
// gives the same bytes.
#pragma once

#include "fi/plan/forest.h"
#include "host/planner.h"

namespace fi::host {

// Fills `forest` (make_forest_layout(capacity).total_bytes) for the requests of a step, whose page
// table is in host memory. Entries of pages that a request does not have are not read.
void find_forest(const PlanCapacity& capacity, const StepLengths& lengths,
                 const PageTableView& table, void* forest);

}  // namespace fi::host
