#include "cpu/merge.h"

#include "cpu/attention.h"
#include "cpu/thread_pool.h"

namespace fi::cpu {

void merge_states(const MergeParams& p, int num_threads) {
  const int64_t grain = 64;  // rows: enough to pay for taking a ticket
  parallel_for(num_threads, p.rows, grain, 0, [&](int64_t begin, int64_t end, char*) {
    for (int64_t row = begin; row < end; ++row) {
      const auto visit = [&](const auto& use) {
        for (int64_t s = 0; s < p.num_states; ++s) {
          const int64_t state = s * p.rows + row;
          use(p.o + state * p.dim, p.softmax ? p.lse[state] : 0.0f);
        }
      };
      const float lse = merge_row(visit, p.softmax, p.dim, p.out_o + row * p.dim);
      if (p.softmax && p.out_lse) p.out_lse[row] = lse;
    }
  });
}

}  // namespace fi::cpu
