// Where rows end up: as partial states until the last arriver of a merge unit merges them, then in
// the output.
#pragma once

#include "cpu/rows.h"

namespace fi::cpu {

// Rows of scratch.o (running sums) -> normalised o and lse in scratch.
void normalise_rows(const Job& job, int32_t num_rows, Scratch* scratch);

// Finished rows (scratch.rows, o, lse) -> out and lse of the caller: v scale, then, unless the
// caller wants the partial state, sinks and output transform, then the cast.
void write_output(const Job& job, int32_t num_rows, int32_t kv_head, Scratch* scratch);

// Normalised rows of an item -> its partial states; then arrives at every merge unit that the item
// contributes to, and merges those that it completes.
void write_partial(const Job& job, const WorkItem& item, Scratch* scratch);

}  // namespace fi::cpu
